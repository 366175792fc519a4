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

"""Whether settings are of the kinds that their annotations say."""

import functools
import math
import types
import typing
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments


# Settings of `TrainingArguments` that decide how a run goes; the others are left to transformers.
INHERITED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps", "warmup_steps", "logging_steps",
    "save_steps", "eval_steps", "save_total_limit", "seed", "data_seed",
)  # fmt: skip


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
