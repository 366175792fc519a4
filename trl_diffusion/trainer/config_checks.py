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

"""Whether settings are of the kinds that their annotations say, and whether they can act."""

import functools
import math
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments


# Settings of `TrainingArguments` that decide how a run goes; the others are left to transformers.
INHERITED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps", "warmup_steps", "logging_steps",
    "save_steps", "eval_steps", "save_total_limit", "seed", "data_seed",
)  # fmt: skip

_EVALUATION = "Evaluations score images; set num_eval_images, rollout_batch_size and the reward functions instead."
_LENGTH = "The order of the prompts is the trainers' own, by data_seed."
_TOKENS = "There are no tokens in the loss."
_LABELS = "There are no labels; what is learned is the reward."
_CHECKPOINTING = "Set activation_checkpointing to True or False; diffusers decides how."
# Settings of `TrainingArguments` that the trainers never read, or that work on language models alone, and what to do
# instead of changing them. Not every release of transformers has all of them.
CANNOT_ACT = {
    "auto_find_batch_size": "A smaller batch would break up the groups of a prompt. Lower per_device_train_batch_size "
    "or rollout_batch_size instead.",
    "per_device_eval_batch_size": "Set rollout_batch_size instead, which counts the images of evaluations as well.",
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "do_predict": "Call the trainer's generate or evaluate instead.",
    "bf16_full_eval": "Evaluations have the precision of the rollouts; set bf16 instead.",
    "fp16_full_eval": "Evaluations have the precision of the rollouts; set fp16 instead.",
    "label_smoothing_factor": _LABELS,
    "label_names": _LABELS,
    "average_tokens_across_devices": _TOKENS,
    "include_num_input_tokens_seen": _TOKENS,
    "neftune_noise_alpha": "There are no token embeddings to add noise to.",
    "use_liger_kernel": "Its kernels are those of language models.",
    "liger_kernel_config": "Its kernels are those of language models.",
    "use_cache": "There is no cache of keys and values.",
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "torch_empty_cache_steps": "Lower rollout_batch_size or per_device_train_batch_size to save memory.",
    "train_sampling_strategy": _LENGTH,
    "length_column_name": _LENGTH,
    "group_by_length": _LENGTH,
    "logging_dir": "Set the environment variable TENSORBOARD_LOGGING_DIR instead.",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint by itself.",
    "parallelism_config": "Use DDP, DeepSpeed ZeRO or FSDP2 through accelerate's configuration instead.",
}


def check_settings_act(config: TrainingArguments) -> None:
    """
    Refuse settings that could not act, where they differ from their default.

    Args:
        config (`TrainingArguments`): of a subclass, as it was given.

    Raises:
        `ValueError`: names the setting and what to do instead.
    """
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = vars(config)[field.name]
        is_default = value == default or (default == "no" and value is False)  # a command line's, where yes is True
        if field.name in CANNOT_ACT and not is_default:
            raise ValueError(
                f"{field.name}={value!r} is not supported: it cannot act in this trainer. {CANNOT_ACT[field.name]} "
                f"Leave it at {default!r}."
            )


def check_types(config: TrainingArguments, unchecked: Collection[str]) -> None:
    """
    Check the settings of our own and those of `INHERITED` against their annotations. Numbers must be finite.

    Args:
        config (`TrainingArguments`): of a subclass.
        unchecked (`Collection[str]`): settings that have checks of their own, because they take more than they say.

    Raises:
        `ValueError`: a setting of another kind.
    """
    inherited = {field.name for field in fields(TrainingArguments)} - set(INHERITED)
    kinds = _annotations(type(config))
    for field in fields(config):
        if field.name not in inherited and field.name not in unchecked:
            value, kind = vars(config)[field.name], kinds[field.name]
            if not _fits(value, kind):
                name = kind.__name__ if isinstance(kind, type) else kind
                raise ValueError(f"{field.name} must be {name}{_finite(kind)}, got {value!r}.")


@functools.cache
def _annotations(config_class: type) -> dict[str, Any]:
    # Not the types of `dataclasses.fields`, from which `HfArgumentParser` takes away the `None`.
    return typing.get_type_hints(config_class)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        # int, but not its subclass bool; a whole number too large for a float has no place among the settings either.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _finite(kind: Any) -> str:
    return ", finite" if "float" in str(kind) else ""
