# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What the training commands share: their arguments, their prompts, and the way from these to a trained model."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from ..rewards import check_reward
from ..trainer import DiffusionConfig
from .errors import SetUp
from .parser import CommandParser


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import LoraConfig

    from ..trainer import DiffusionTrainer


# The end of a module's name; anything else in `lora_target_modules` is a regular expression or "all-linear".
_MODULE_NAME = re.compile(r"[\w.]+")


@dataclass
class ScriptArguments:
    """
    What to train on what. The settings of the training itself are those of the trainer's configuration.

    Args:
        > Model, prompts and rewards

        model_name_or_path (`str`):
            Pipeline to train: a Hub id, a local folder, or `"shapes"` for the built-in model.
        dataset_name (`str`):
            Prompts, in a column "prompt", for SRPO images, in a column "image", where there are any, and for a model that
            edits images these, in a column "condition_image": a Hub id, a local folder, a file (.txt with one prompt a
            line, .csv, .json, .jsonl, .parquet), or `"shapes"` for the built-in prompts.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, for datasets that have several.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on; loaded only if `eval_strategy` is not "no".
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Name of the column that holds the prompts.
        max_prompts (`int`, *optional*):
            Use the first so many rows of a split. `None` uses all.
        streaming (`bool`, *optional*, defaults to `False`):
            Do not download the dataset: train its rows in their order as they come, which needs `max_steps`, or the first
            `max_prompts` rows.
        reward_funcs (`list[str]`):
            Rewards to maximise: names of rewards, with options where need be (`pickscore:scale=0.05`, in a YAML file also
            `{name: pickscore, scale: 0.05}`), or dotted paths of callables, e.g. `my_package.my_reward`.
        watch_reward_funcs (`list[str]`, *optional*):
            Rewards to measure during training and not to train.
        preset (`str`, *optional*):
            Start from the settings of a paper, its reward included; the file and the command line override them.

        > LoRA

        use_peft (`bool`, *optional*, defaults to `True`):
            Train a LoRA; `False` trains all weights of the transformer.
        lora_r (`int`, *optional*):
            Rank of the LoRA. `None` takes the trainer's default LoRA, changed by what else is given here.
        lora_alpha (`int`, *optional*):
            Alpha of the LoRA. `None` takes `lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the LoRA.
        lora_target_modules (`list[str]`, *optional*):
            Modules to adapt: ends of their names, one regular expression that matches whole names, or `"all-linear"`.
            `None` takes the attention layers of the model's family.
    """

    model_name_or_path: str = field(
        metadata={"help": "Pipeline to train: a Hub id, a local folder, or 'shapes' for the built-in model."}
    )
    dataset_name: str = field(
        metadata={
            "help": "Prompts, in a column 'prompt': a Hub id, a local folder, a file (.txt with one prompt a line, "
            ".csv, .json, .jsonl, .parquet), or 'shapes' for the built-in prompts."
        }
    )
    reward_funcs: list[str] = field(
        metadata={
            "help": "Rewards to maximise: names of rewards, with options where need be (pickscore:scale=0.05), or dotted "
            "paths of callables. A preset has its own."
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, for datasets that have several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on; loaded only if eval_strategy is not 'no'."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Name of the column that holds the prompts."})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Use the first so many rows of a split. None uses all."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Do not download the dataset: train its rows in their order as they come, which needs max_steps, or "
            "the first max_prompts rows."
        },
    )
    watch_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards to measure during training and not to train."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Start from the settings of a paper, its reward included; the file and the command line override them."
        },
    )
    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA; False trains all weights of the transformer."}
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of the LoRA. None takes the trainer's LoRA, changed by what else is given."},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA. None takes lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: ends of their names, one regular expression for whole names, or 'all-linear'. None "
            "takes the attention layers of the model's family."
        },
    )

    def __post_init__(self):
        for name in ("reward_funcs", "watch_reward_funcs"):
            if isinstance(getattr(self, name), dict):  # one mapping in a YAML file
                setattr(self, name, [getattr(self, name)])
        for reward in [*self.reward_funcs, *(self.watch_reward_funcs or ())]:
            check_reward(reward)
        given = [name for name in ("lora_r", "lora_alpha", "lora_target_modules") if getattr(self, name) is not None]
        given += ["lora_dropout"] if self.lora_dropout else []
        if not self.use_peft and given:
            raise ValueError(f"use_peft is False, but {', '.join(given)} were given. Remove them, or use_peft.")
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        patterns = [name for name in self.lora_target_modules or () if not _MODULE_NAME.fullmatch(name)]
        if patterns and len(self.lora_target_modules) > 1:
            raise ValueError(
                f"lora_target_modules takes names, or one regular expression or 'all-linear' alone, got {patterns[0]!r} "
                f"among {len(self.lora_target_modules)}. Join regular expressions with |."
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"lora_target_modules is {pattern!r}, which is no regular expression: {error}."
                ) from error

    def peft_config(self) -> "LoraConfig | bool | None":
        """What to pass as the trainer's `peft_config`."""
        if not self.use_peft:
            return False
        if (
            self.lora_r is None
            and self.lora_alpha is None
            and self.lora_target_modules is None
            and not self.lora_dropout
        ):
            return None

        from peft import LoraConfig

        from ..trainer.network import DEFAULT_LORA

        lora = DEFAULT_LORA if self.lora_r is None else {"r": self.lora_r, "lora_alpha": self.lora_r}
        if self.lora_alpha is not None:
            lora = {**lora, "lora_alpha": self.lora_alpha}
        modules = self.lora_target_modules
        if modules is not None and not _MODULE_NAME.fullmatch(modules[0]):
            modules = modules[0]  # as PEFT takes it
        return LoraConfig(**lora, lora_dropout=self.lora_dropout, target_modules=modules)


def make_parser(config_class: type[DiffusionConfig], command: str, method: str) -> CommandParser:
    """The parser of a training command: every field of the script's arguments and of the trainer's configuration."""
    return CommandParser(
        (ScriptArguments, config_class),
        presets={
            name: {**settings, "reward_funcs": config_class.PRESET_REWARDS[name]}
            for name, settings in config_class.PRESETS.items()
        },
        prog=f"trl-diffusion {command}",
        usage=f"trl-diffusion {command} [--config FILE.yaml] [--accelerate_config NAME_OR_FILE] --model_name_or_path MODEL --dataset_name PROMPTS "
        "--reward_funcs REWARD [REWARD ...] [--output_dir FOLDER] [options]",
        description=f"Train a flow-matching text-to-image model with {method}. Every option can also stand in the "
        "YAML file; the command line wins. --accelerate_config multi_gpu, zero1, zero2, zero3, fsdp2 or a file of "
        "`accelerate config` trains on several processes, with options of `accelerate launch` as --num_processes 4.",
        epilog="Presets: " + ", ".join(sorted(config_class.PRESETS)) + ".",
    )


def run(
    trainer_class: type["DiffusionTrainer"],
    script_args: ScriptArguments,
    training_args: DiffusionConfig,
    set_up: SetUp,
) -> int:
    """
    Train as the command line says, and save the model.

    Args:
        trainer_class (`type`): the method.
        script_args ([`ScriptArguments`]): what to train on what.
        training_args ([`DiffusionConfig`]): settings of the method.
        set_up ([`SetUp`]): over when the first step begins.

    Returns:
        `int`: exit status.
    """
    from .prompts import load_prompts

    def prompts(split: str, max_prompts: int | None) -> "Dataset | IterableDataset":
        return load_prompts(
            script_args.dataset_name,
            split,
            script_args.dataset_config,
            script_args.streaming,
            max_prompts,
            script_args.prompt_column,
        )

    eval_dataset = None
    if training_args.eval_strategy != "no":
        # An evaluation uses no more rows than it makes images.
        most = training_args.num_eval_images if script_args.streaming else None
        eval_dataset = prompts(script_args.dataset_test_split, script_args.max_prompts or most)
    trainer = trainer_class(
        model=script_args.model_name_or_path,
        reward_funcs=script_args.reward_funcs,
        args=training_args,
        train_dataset=prompts(script_args.dataset_train_split, script_args.max_prompts),
        eval_dataset=eval_dataset,
        callbacks=[_EndOfSetUp(set_up)],
        peft_config=script_args.peft_config(),
        watch_reward_funcs=script_args.watch_reward_funcs,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)  # saves as well
    else:
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card(dataset_name=script_args.dataset_name)
    return 0


class _EndOfSetUp(TrainerCallback):
    def __init__(self, set_up: SetUp):
        self.set_up = set_up

    def on_train_begin(self, *args, **kwargs) -> None:
        self.set_up.over = True
