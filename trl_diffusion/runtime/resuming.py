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

"""Settings against checkpoints: what a resumed run compares with the run it goes on, and what its settings change."""

import json
from pathlib import Path
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .checkpoints import STATE_NAME


# Schedules whose learning rate depends on what happened before.
BY_HISTORY = ("reduce_lr_on_plateau", "greedy")
# What an optimizer keeps of the settings in its groups; the rest of a group is state, which belongs to the checkpoint.
HYPERPARAMETERS = ("lr", "initial_lr", "betas", "momentum", "eps", "weight_decay")


def saved_state(checkpoint: str | Path) -> dict[str, Any]:
    """What the trainer had written of itself into a checkpoint."""
    return json.loads((Path(checkpoint) / STATE_NAME).read_text(encoding="utf-8"))


def as_saved(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a checkpoint gives them back: tuples are lists."""
    return json.loads(json.dumps(settings))


def refuse_changed(
    checkpoint: str | Path, saved: dict[str, Any], current: dict[str, Any], reason: str, remedy: str
) -> None:
    """
    Refuse to resume where settings differ that both know: another release may know more of them.

    Args:
        checkpoint (`str` or `Path`): its folder.
        saved (`dict[str, Any]`): settings that it was written with, by name.
        current (`dict[str, Any]`): those of the run.
        reason (`str`): why they cannot differ.
        remedy (`str`): what to do, beside taking the old settings.

    Raises:
        `ValueError`: they do; names each setting with both values.
    """
    current = as_saved(current)
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in current.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} cannot be resumed with these settings: {'; '.join(changed)}. {reason} Set what was "
            f"changed back to what it was, or {remedy}."
        )


class OptimizerSettings:
    """
    What the settings say of an optimizer and its schedule. Loading a checkpoint puts the values of its own time in their
    place; [`apply`] brings those of the run back, and leaves moments and counts of steps.

    Args:
        optimizer (`torch.optim.Optimizer`): before a checkpoint is loaded.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): its schedule, likewise.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler):
        self.groups = [
            {name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups
        ]
        self.base_lrs = list(unwrapped(scheduler).base_lrs) if is_function_of_the_step(scheduler) else None

    def apply(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """After the checkpoint was loaded; a schedule that depends on its history keeps its learning rates."""
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            rates = {name: group[name] for name in ("lr", "initial_lr") if name in group}
            group.update(settings)
            if self.base_lrs is None:
                group.update(rates)
        if self.base_lrs is not None:
            scheduler = unwrapped(scheduler)
            scheduler.base_lrs = self.base_lrs
            factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
            scheduler._last_lr = [lr * factor for lr, factor in zip(self.base_lrs, factors, strict=True)]
            for group, lr in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr


def is_function_of_the_step(scheduler: LRScheduler) -> bool:
    """Whether the learning rate at a step depends on nothing that happened before it."""
    return type(unwrapped(scheduler)) is LambdaLR


def unwrapped(scheduler: LRScheduler | AcceleratedScheduler) -> LRScheduler:
    """The scheduler itself, where DeepSpeed's configuration has made accelerate wrap it."""
    return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
