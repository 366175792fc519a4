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

"""The settings that every trainer of diffusion models shares."""

import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available

from ..planning.workload import Workload
from ..runtime.process_group import destroy_process_group_at_exit
from .config_checks import check_settings_act, check_types
from .process_checks import check_optimizer_with_modes, check_sharding, check_waiting


if TYPE_CHECKING:
    import torch


# Schedules of the learning rate that follow metric_for_best_model; older releases of transformers know the first alone.
FOLLOWING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


@dataclass
class DiffusionConfig(TrainingArguments):
    r"""
    Base of the trainers' configurations: [`~transformers.TrainingArguments`] plus what sampling images needs.

    `per_device_train_batch_size` counts images, and `gradient_accumulation_steps` micro-batches of images. Of models that make
    videos, what is said of images here is said of videos.

    Parameters:
        > Parameters that control sampling

        height (`int`, *optional*):
            Height of the images in pixels. `None` takes the pipeline's default.
        width (`int`, *optional*):
            Width of the images in pixels. `None` takes the pipeline's default.
        num_frames (`int`, *optional*):
            Frames of a video, for models that make videos. `None` takes the pipeline's default.
        num_inference_steps (`int`, *optional*, defaults to `17`):
            Number of sampling steps T.
        guidance_scale (`float`, *optional*):
            Guidance, embedded (FLUX.1-dev) or classifier-free (Stable Diffusion 3, Qwen-Image). `None` takes the pipeline's
            default.
        negative_prompt (`str`, *optional*):
            What classifier-free guidance leads away from. `None` is the empty prompt. Refused where guidance is embedded.
        sigma_shift (`float`, *optional*, defaults to `3.0`):
            Static shift of the noise schedule. `None` takes the pipeline's own schedule, which for FLUX depends on
            the resolution.
        shared_noise (`str`, *optional*, defaults to `"group"`):
            `"group"`: the samples of one prompt start from the same noise; `"none"`: each from its own.
        rollout_batch_size (`int`, *optional*):
            Number of images sampled, decoded and scored together. `None` takes `per_device_train_batch_size`. It
            changes the memory and speed of the rollout, not its result.

        > Parameters that control speed

        attention_backend (`str`, *optional*):
            Attention of the denoiser, in rollouts and in training: one of
            [diffusers' backends](https://huggingface.co/docs/diffusers/optimization/attention_backends), as `"flash"`. `None`
            leaves it as it is, PyTorch's own unless a passed pipeline has another.
        compile_denoiser (`bool`, *optional*, defaults to `False`):
            Compile the blocks of the denoiser with `torch.compile`, for rollouts and training alike. The first steps take
            minutes longer; `compiled_graphs`, which is logged, no longer grows after them. `torch_compile_backend` and
            `torch_compile_mode` say how.
        rollout_merged_lora (`bool`, *optional*, defaults to `False`):
            Add the LoRA to the weights of its layers for each rollout, which then costs no more than without one, and put
            the weights back afterwards, bit for bit. Takes the memory of these layers once more, and samples from what
            the dtype of the weights can hold of the sum.

        > Parameters that control memory

        activation_checkpointing (`bool`, *optional*, defaults to `True`):
            Recompute the denoiser's activations in the backward pass, for less memory and about 30 % more time of
            the update.
        gradient_checkpointing (`bool`, *optional*):
            Old name of `activation_checkpointing`, which works as well.
        quantization (`str`, *optional*):
            Quantise the frozen weights of a network that a LoRA is trained on: `"nf4"` to 4 bits (bitsandbytes, needs an
            accelerator), `"int8"` to 8 bits (torchao, weights only). Needs the extra `quantization`. A loaded pipeline
            is quantised by diffusers' `quantization_config` instead.
        offload_frozen (`bool`, *optional*, defaults to `False`):
            Keep the VAE and the rewards on the CPU, and move them to the accelerator for the phases that use them. Saves
            their memory during the forwards and backwards of the network, at the price of the transfers.
        ds3_gather_for_rollout (`bool`, *optional*, defaults to `True`):
            With DeepSpeed ZeRO-3, gather the network's weights once for a rollout, which is then faster. `False` gathers
            them layer by layer in each forward, for networks that do not fit onto one accelerator.

        > Parameters that control rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function. `None` weights all with 1.
        frame_reduction (`str`, *optional*, defaults to `"mean"`):
            How a reward of images scores a video: the `"mean"` of its frames' scores, that of the `"first"` frame, or the
            `"min"`, that of the worst one. A `VideoRewardModel` and functions score the video as a whole.

        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward may take; one that takes longer has hung, and is given up. `None` waits for
            ever.
        reward_retries (`int`, *optional*, defaults to `2`):
            Further attempts where a reward fails or hangs. After the last, the run saves a checkpoint and stops.

        > Parameters that control the moving average of the weights

        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the trained weights, in (0, 1), e.g. 0.995; it is what
            evaluations, `generate` and `save_model` use, while rollouts use the weights that are trained. `None` keeps
            none.

        > Parameters that control what happens when something breaks

        max_bad_steps (`int`, *optional*, defaults to `5`):
            A step whose loss or gradient is not finite is not applied; after this many in a row, the run saves a
            checkpoint and stops.
        on_save_error (`str`, *optional*, defaults to `"stop"`):
            What to do where a checkpoint cannot be written, e.g. because the disk is full: `"stop"`, or `"continue"`
            without it. Either way the last whole checkpoint stays.

        > Parameters that control prompts

        prompt_window (`int`, *optional*, defaults to `128`):
            Prompts whose embeddings are held in host memory, over all processes. A run encodes those of its next
            generations, so many at a time, and the text encoders wait on the CPU in between; where all prompts of the
            run fit, they are encoded once and the text encoders are freed. An embedding of FLUX.1 takes 4 MiB in
            bfloat16.
        encode_on_cpu (`bool`, *optional*, defaults to `False`):
            Leave the text encoders on the CPU, where they encode more slowly, and the accelerator's memory to the network:
            that of FLUX.2-dev takes 48 GB. With `cache_prompt_embeds` each prompt is encoded once for all runs.
        cache_prompt_embeds (`bool`, *optional*, defaults to `False`):
            Keep embeddings on disk as well, in `huggingface_hub`'s folder of assets, one file a prompt, for this run and
            later ones: where all are found, no text encoder is loaded.
        prompt_cache_gib (`float`, *optional*, defaults to `20.0`):
            Size in GiB of this folder; what was used longest ago goes first.

        > Parameters that control logging and evaluation

        log_samples (`bool`, *optional*, defaults to `True`):
            Write sample images with prompts, rewards and advantages to `output_dir/samples/step_XXXXXX/` and to every
            `report_to` backend that shows images, every `logging_steps`.
        num_samples_to_log (`int`, *optional*, defaults to `8`):
            Number of images of each such sample.
        samples_total_limit (`int`, *optional*, defaults to `50`):
            Folders `step_XXXXXX` that are kept: that of the first step, to compare with, and those that were written
            last. `None` keeps all.
        num_eval_images (`int`, *optional*, defaults to `64`):
            Number of images that an evaluation makes: the prompts of the evaluation dataset in order, repeated with
            other seeds where there are fewer of them.

        > Parameters whose defaults differ from those of [`~transformers.TrainingArguments`]

        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Initial learning rate of AdamW. The default suits LoRA; the papers train all weights with 1e-5.
        logging_steps (`float`, *optional*, defaults to `1`):
            Optimizer steps between two logs; below 1, their share of all steps.
        bf16 (`bool`, *optional*):
            Mixed precision in bfloat16. `None` switches it on where the accelerator supports it and `fp16` is not set.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            The dataset's other columns are passed to the reward functions, so they are kept.
        report_to (`str` or `list[str]`, *optional*, defaults to `"none"`):
            Backends to report to: `"tensorboard"`, `"wandb"`, `"trackio"`, ..., `"all"` or `"none"`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = TrainingArguments._VALID_DICT_FIELDS

    # Defaults of TrainingArguments that do not suit the trainers.
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "The initial learning rate for AdamW. The default suits LoRA; the papers train all weights with 1e-5."
        },
    )
    logging_steps: float = field(
        default=1,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bfloat16 mixed precision. If not set, it is on where the accelerator supports it "
            "and `fp16` is not set."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Other columns of the dataset are passed to the reward functions, so they are kept."},
    )
    attention_backend: str | None = field(
        default=None,
        metadata={"help": "Attention of the denoiser, in rollouts and in training: one of diffusers' backends."},
    )
    # As in transformers 5.23, for the older releases that Python 3.10 gets and that know the second alone.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute the denoiser's activations in the backward pass. On unless set to False.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Old name of activation_checkpointing.", "nargs": "?", "const": True},
    )
    # In this order of types, which the command line's parser needs.
    report_to: None | str | list[str] = field(
        default="none",
        metadata={"help": "The backends to report to: tensorboard, wandb, trackio, ..., all or none."},
    )

    # Sampling
    height: int | None = field(
        default=None, metadata={"help": "Height of the images in pixels. None takes the pipeline's default."}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the images in pixels. None takes the pipeline's default."}
    )
    num_frames: int | None = field(
        default=None,
        metadata={
            "help": "Frames of a video, for models that make videos. None takes the pipeline's default.",
        },
    )
    num_inference_steps: int = field(default=17, metadata={"help": "Number of sampling steps T."})
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance, embedded or classifier-free. None takes the pipeline's default."},
    )
    negative_prompt: str | None = field(
        default=None,
        metadata={"help": "What classifier-free guidance leads away from. None is the empty prompt."},
    )
    sigma_shift: float | None = field(
        default=3.0,
        metadata={"help": "Static shift of the noise schedule. None takes the pipeline's own schedule."},
    )
    shared_noise: str = field(
        default="group",
        metadata={
            "help": "'group': the samples of one prompt start from the same noise; 'none': each from its own.",
            "choices": ["group", "none"],
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of images sampled, decoded and scored together. None takes per_device_train_batch_size."
        },
    )

    compile_denoiser: bool = field(
        default=False,
        metadata={"help": "Compile the blocks of the denoiser with torch.compile, for rollouts and training alike."},
    )
    rollout_merged_lora: bool = field(
        default=False,
        metadata={"help": "Add the LoRA to the weights of its layers for each rollout, and put them back afterwards."},
    )

    # Memory
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Quantise the frozen weights of a network that a LoRA is trained on: 'nf4' (bitsandbytes, needs an "
            "accelerator) or 'int8' (torchao, weights only).",
            "choices": ["nf4", "int8"],
        },
    )
    offload_frozen: bool = field(
        default=False,
        metadata={
            "help": "Keep the VAE and the rewards on the CPU, and move them to the accelerator for the phases that use "
            "them."
        },
    )
    ds3_gather_for_rollout: bool = field(
        default=True,
        metadata={
            "help": "With DeepSpeed ZeRO-3, gather the network's weights once for a rollout, which is then faster. False "
            "gathers them layer by layer in each forward, for networks that do not fit onto one accelerator."
        },
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. None weights all with 1."}
    )
    frame_reduction: str = field(
        default="mean",
        metadata={
            "help": "How a reward of images scores a video: the 'mean' of its frames' scores, that of the 'first' frame, or "
            "the 'min', that of the worst one.",
            "choices": ["mean", "first", "min"],
        },
    )

    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward may take. None waits for ever."}
    )
    reward_retries: int = field(default=2, metadata={"help": "Further attempts where a reward fails or hangs."})

    # Moving average
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the trained weights, used by evaluations and exports. None keeps none."
        },
    )

    # Breakdowns
    max_bad_steps: int = field(
        default=5,
        metadata={"help": "Steps in a row with a non-finite loss or gradient after which the run saves and stops."},
    )
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "Whether the run stops or continues where a checkpoint cannot be written.",
            "choices": ["stop", "continue"],
        },
    )

    # Prompts
    prompt_window: int = field(
        default=128,
        metadata={
            "help": "Prompts that are encoded together and whose embeddings are held in host memory, over all processes. "
            "The text encoders are out of the accelerator's memory in between."
        },
    )
    encode_on_cpu: bool = field(
        default=False,
        metadata={"help": "Leave the text encoders on the CPU, and the accelerator's memory to the network."},
    )
    cache_prompt_embeds: bool = field(
        default=False,
        metadata={
            "help": "Keep the embeddings of the prompts on disk, one file a prompt, for this run and later ones."
        },
    )
    prompt_cache_gib: float = field(
        default=20.0, metadata={"help": "Size in GiB of these files; what was used longest ago goes first."}
    )

    # Logging and evaluation
    log_samples: bool = field(
        default=True,
        metadata={"help": "Write sample images with prompts, rewards and advantages every logging_steps."},
    )
    num_samples_to_log: int = field(default=8, metadata={"help": "Number of images of each such sample."})
    samples_total_limit: int | None = field(
        default=50,
        metadata={
            "help": "Folders step_XXXXXX that are kept: that of the first step, to compare with, and those that were "
            "written last. None keeps all."
        },
    )
    num_eval_images: int = field(default=64, metadata={"help": "Number of images that an evaluation makes."})

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    # The rewards of each preset, which its other settings belong to: what a trainer's `reward_funcs` takes.
    PRESET_REWARDS: ClassVar[dict[str, list[str]]] = {}
    # Of an evaluation; greater is better.
    BEST_METRIC: ClassVar[str] = "reward"

    @classmethod
    def preset(cls, name: str, **overrides) -> "DiffusionConfig":
        """
        The settings of a paper, by name; keyword arguments override them. The rewards that they are meant for are
        `PRESET_REWARDS[name]`, to be passed as `reward_funcs`.

        ```python
        >>> ChunkGRPOConfig.preset("dance_grpo", output_dir="out", max_steps=100).sde_type
        'dance'
        ```
        """
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__} has no preset {name!r}. Choose one of {sorted(cls.PRESETS)}.")
        return cls(**{**cls.PRESETS[name], **overrides})

    # Settings that take more than their annotation says, which the command line's parser needs.
    _UNCHECKED_TYPES: ClassVar[tuple[str, ...]] = ()

    @property
    def device(self) -> "torch.device":
        """Device of this process. A CPU has no index: with one, transformers before 5.18 loads no optimizer's state."""
        import torch

        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def _guidance_scales(self) -> list[float | None]:
        """Guidance of every forward; `None` is the pipeline's default."""
        return [self.guidance_scale]

    def __post_init__(self):
        check_types(self, self._UNCHECKED_TYPES)
        check_settings_act(self)
        self._choose_best_metric()
        # First, because the rest of transformers that its own checks load takes seconds.
        self._check_values()
        if self.bf16 is None:
            # On a machine without such an accelerator TrainingArguments refuses bf16.
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.ddp_find_unused_parameters is None:
            # Every trainable parameter takes part in every forward; the search would cost a pass over the graph.
            self.ddp_find_unused_parameters = False
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        # `TrainingArguments` makes the process group of a launched script.
        destroy_process_group_at_exit()
        compilation = self.torch_compile_backend, self.torch_compile_mode
        if self.compile_denoiser:
            # `TrainingArguments` would set torch_compile with them.
            self.torch_compile_backend = self.torch_compile_mode = None
        super().__post_init__()
        if self.compile_denoiser:
            self.torch_compile_backend, self.torch_compile_mode = compilation
        if self.activation_checkpointing is None:  # an older release has looked at the old name only
            self.activation_checkpointing = self.gradient_checkpointing
        if isinstance(self.resume_from_checkpoint, str) and self.resume_from_checkpoint.lower() in ("true", "false"):
            # The command line knows strings only.
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower() == "true"
        if self.deepspeed_plugin is not None:
            from ..runtime.sharding import (
                set_bucket_sizes,  # loads FSDP as well, which a command's help need not wait for
            )

            set_bucket_sizes(self.deepspeed_plugin)
        self._check_data_loader()
        check_sharding(self)
        self._check_processes()
        if self.optim.startswith("schedule_free"):
            check_optimizer_with_modes(self, f"optim={self.optim.value!r}")

    def _check_values(self) -> None:
        """Check, and complete, what is known without the run's processes and devices."""
        for name in (
            "height", "width", "num_frames", "num_inference_steps", "rollout_batch_size", "num_eval_images", "prompt_window",
            "per_device_train_batch_size", "gradient_accumulation_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.num_inference_steps > 1000:
            raise ValueError(
                f"num_inference_steps must be at most 1000, got {self.num_inference_steps}: the models know a thousand "
                "noise levels."
            )
        if self.num_inference_steps < 2:
            raise ValueError(
                f"num_inference_steps must be at least 2, got {self.num_inference_steps}: the last sampling step is "
                "never trained."
            )
        if self.sigma_shift is not None and self.sigma_shift <= 0:
            raise ValueError(
                f"sigma_shift must be above 0, got {self.sigma_shift}. Use None for the pipeline's own schedule."
            )
        if self.prompt_cache_gib <= 0:
            raise ValueError(
                f"prompt_cache_gib must be above 0, got {self.prompt_cache_gib}. Set cache_prompt_embeds=False to write no "
                "embeddings."
            )
        if self.negative_prompt is not None and all(
            scale is not None and scale <= 1 for scale in self._guidance_scales()
        ):
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} has no effect at guidance_scale={self.guidance_scale}. Raise "
                "guidance_scale above 1, or leave negative_prompt unset."
            )
        if self.num_samples_to_log < 1:
            raise ValueError(
                f"num_samples_to_log must be at least 1, got {self.num_samples_to_log}. Set log_samples=False to "
                "write no samples."
            )
        if self.samples_total_limit is not None and self.samples_total_limit < 2:
            raise ValueError(
                f"samples_total_limit must be at least 2, the first folder and the last, got {self.samples_total_limit}. "
                "Use None to keep all, or set log_samples=False to write none."
            )
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and value >= 2**32:
                raise ValueError(f"{name} must be below 2**32, got {value}.")
        if self.compile_denoiser and self.torch_compile:
            raise ValueError(
                "compile_denoiser=True compiles the denoiser's blocks, and torch_compile=True the whole of it. Set one."
            )
        self._check_choice("shared_noise", ("group", "none"))
        self._check_choice("frame_reduction", ("mean", "first", "min"))
        self._check_reliability()
        if self.quantization is not None:
            self._check_choice("quantization", ("nf4", "int8"))

    def _choose_best_metric(self) -> None:
        """What "best" means where it is not said; transformers would take the loss, which no evaluation has."""
        settings = {
            "load_best_model_at_end=True": self.load_best_model_at_end,
            "save_strategy='best'": self.save_strategy == SaveStrategy.BEST,
            f"lr_scheduler_type={str(self.lr_scheduler_type)!r}": self.lr_scheduler_type in FOLLOWING_SCHEDULERS,
        }
        needing = [setting for setting, is_set in settings.items() if is_set]
        if needing and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"{needing[0]} needs evaluations, and eval_strategy is 'no'. Set eval_strategy='steps' and eval_steps, and "
                "pass an eval_dataset."
            )
        if needing and self.metric_for_best_model is None:
            self.metric_for_best_model = self.BEST_METRIC
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = True  # of all that an evaluation logs
        if self.lr_scheduler_type in FOLLOWING_SCHEDULERS and self.greater_is_better and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"mode": "max"}  # PyTorch's default is for a loss

    def _check_reliability(self) -> None:
        self._check_choice("on_save_error", ("stop", "continue"))
        for name, least in (("reward_retries", 0), ("max_bad_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.reward_timeout is not None:
            if self.reward_timeout <= 0:
                raise ValueError(
                    f"reward_timeout must be above 0, got {self.reward_timeout}. Use None to wait for ever."
                )
        if self.ema_decay is not None:
            if not 0 < self.ema_decay < 1:
                raise ValueError(
                    f"ema_decay must lie in (0, 1), got {self.ema_decay}. Use None for no moving average."
                )

    def _check_data_loader(self) -> None:
        for name in ("dispatch_batches", "split_batches"):
            if vars(self.accelerator_config)[name]:
                raise ValueError(
                    f"accelerator_config has {name}=True, which hands out other rows than those that the trainer's order "
                    "gives each process: the images of a prompt would no longer be one group. Leave it unset."
                )

    def _check_processes(self) -> None:
        """Check, and complete, what depends on the number of processes."""
        check_waiting(self)

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP shards the weights, by the settings or by the launcher."""
        return self.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def shards_weights(self) -> bool:
        """Whether no process has the whole network, so that all must call it equally often."""
        zero_3 = self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3
        return zero_3 or self.uses_fsdp

    @property
    def consecutive_images(self) -> int:
        """Images of a process that follow one another in the order of all processes' images."""
        return self.per_device_train_batch_size

    @property
    def sharding(self) -> str:
        """How processes share the training, as [`~trl_diffusion.planning.plan.SHARDINGS`] names it."""
        if self.deepspeed_plugin is not None:
            return f"zero{self.deepspeed_plugin.zero_stage}"
        if self.uses_fsdp:
            return "fsdp2"
        return "multi_gpu" if self.world_size > 1 else "none"

    def workload(self) -> Workload | None:
        """What the method computes and holds, so that its runs can be planned. `None`, the default: it is not known."""
        return None

    def without_secrets(self) -> "DiffusionConfig":
        """A copy without tokens, to be written to disk."""
        copied = copy.copy(self)
        for setting in fields(self):
            if setting.name.endswith("_token"):
                setattr(copied, setting.name, None)
        return copied

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
