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

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import TrlParser

from .. import shapes
from ..trainer import DiffusionTrainer


# Prompt files: ending -> builder of `datasets`.
FILE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class ScriptArguments:
    """
    What to train on what. The settings of the training itself are those of the trainer's configuration.

    Args:
        model_name_or_path (`str`):
            Pipeline to train: a Hub id, a local folder, or `"shapes"` for the built-in model.
        dataset_name (`str`):
            Prompts, in a column "prompt", and for SRPO images, in a column "image", where there are any: a Hub id, a
            local folder, a file (.txt with one prompt a line, .csv, .json, .jsonl, .parquet), or `"shapes"` for the
            built-in prompts.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, for datasets that have several.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on; loaded only if `eval_strategy` is not "no".
        reward_funcs (`list[str]`):
            Rewards to maximise: names of rewards, or dotted paths of callables, e.g. `my_package.my_reward`.
        watch_reward_funcs (`list[str]`, *optional*):
            Rewards to measure during training and not to train.
        use_peft (`bool`, *optional*, defaults to `True`):
            Train a LoRA; `False` trains all weights of the transformer.
        lora_r (`int`, *optional*):
            Rank of the LoRA. `None` takes the trainer's default.
        lora_alpha (`int`, *optional*):
            Alpha of the LoRA. `None` takes `lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the LoRA.
        lora_target_modules (`list[str]`, *optional*):
            Modules to adapt. `None` takes the attention layers of the model's family.
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
        metadata={"help": "Rewards to maximise: names of rewards, or dotted paths of callables."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, for datasets that have several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on; loaded only if eval_strategy is not 'no'."}
    )
    watch_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards to measure during training and not to train."}
    )
    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA; False trains all weights of the transformer."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the LoRA. None takes the trainer's default."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA. None takes lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to adapt. None takes the attention layers of the model's family."},
    )

    def __post_init__(self):
        lora = {name: getattr(self, name) for name in ("lora_r", "lora_alpha", "lora_target_modules")}
        given = [name for name, value in lora.items() if value is not None]
        if not self.use_peft and given:
            raise ValueError(f"use_peft is False, but {given} were given. Remove them, or use_peft.")
        if self.use_peft and given and self.lora_r is None:
            raise ValueError(f"{given} were given without lora_r. Give the rank as well, e.g. --lora_r 64.")

    def peft_config(self) -> LoraConfig | bool | None:
        """What to pass as the trainer's `peft_config`."""
        if not self.use_peft:
            return False
        if self.lora_r is None:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


def load_prompts(name: str, split: str, config: str | None = None) -> Dataset:
    """
    Loads the prompts that a command line names.

    Args:
        name (`str`):
            `"shapes"`, a file, a folder or a Hub id, see [`ScriptArguments`].
        split (`str`):
            Split of the dataset. A file is one split, whatever the name.
        config (`str`, *optional*):
            Configuration of the dataset.

    Returns:
        [`~datasets.Dataset`]: the prompts; the trainer checks that it has a column "prompt".

    Raises:
        `ValueError`: if `name` is a file of a kind that is not supported.
    """
    if name == "shapes":
        return shapes.load_dataset(split)
    path = Path(name)
    if not path.is_file():
        return load_dataset(name, config, split=split)
    if path.suffix not in FILE_BUILDERS:
        raise ValueError(
            f"dataset_name is the file {name!r}, whose ending is not supported. Use one of {sorted(FILE_BUILDERS)}."
        )
    dataset = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split="train")
    return dataset.rename_column("text", "prompt") if path.suffix == ".txt" else dataset


def make_parser(trainer_class: type[DiffusionTrainer], command: str, method: str) -> TrlParser:
    """The parser of a training command: every field of the script's arguments and of the trainer's configuration."""
    return TrlParser(
        (ScriptArguments, trainer_class.config_class),
        prog=f"trl-diffusion {command}",
        usage=f"trl-diffusion {command} [--config FILE.yaml] [--accelerate_config NAME_OR_FILE] --model_name_or_path MODEL --dataset_name PROMPTS "
        "--reward_funcs REWARD [REWARD ...] [--output_dir FOLDER] [options]",
        description=f"Train a flow-matching text-to-image model with {method}. Every option can also stand in the "
        "YAML file; the command line wins. --accelerate_config multi_gpu, zero1, zero2, zero3, fsdp2 or a file of "
        "`accelerate config` trains on several processes, with options of `accelerate launch` as --num_processes 4.",
        allow_abbrev=False,
    )


def run(trainer_class: type[DiffusionTrainer], parser: TrlParser, arguments: Sequence[str]) -> int:
    """
    Train as the command line says, and save the model.

    Returns:
        `int`: exit status. Wrong arguments end the process with status 2 and a message.
    """
    try:
        script_args, training_args = parser.parse_args_and_config(arguments)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))

    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_prompts(
            script_args.dataset_name, script_args.dataset_test_split, script_args.dataset_config
        )
    trainer = trainer_class(
        model=script_args.model_name_or_path,
        reward_funcs=script_args.reward_funcs,
        args=training_args,
        train_dataset=load_prompts(
            script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config
        ),
        eval_dataset=eval_dataset,
        peft_config=script_args.peft_config(),
        watch_reward_funcs=script_args.watch_reward_funcs,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0
