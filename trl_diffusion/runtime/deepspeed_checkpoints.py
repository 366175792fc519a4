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

"""The files of DeepSpeed's checkpoints; imported where DeepSpeed is used, which is optional."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address


# What DeepSpeed's checkpoints hold beyond tensors and plain values.
CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """
    DeepSpeed's usual way to read and write files, but for two things: nothing that is read is run, and an error of one
    process waits, since the others are on their way to the next collective and would wait there for ever.

    Args:
        zipfile_serialization (`bool`): as DeepSpeed's configuration has it.
        errors_noted (`Callable`): makes the context in which something is written.
        release_reserve (`Callable`): makes room on the disk for a small file.
    """

    def __init__(
        self,
        zipfile_serialization: bool,
        errors_noted: Callable[[], AbstractContextManager[None]],
        release_reserve: Callable[[], None],
    ):
        super().__init__()
        self.zipfile_serialization = zipfile_serialization
        self._errors_noted = errors_noted
        self._release_reserve = release_reserve

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._errors_noted():
            super().makedirs(path, exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        with self._errors_noted():
            super().save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        with torch.serialization.safe_globals(CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        # Next the first process writes the name of this checkpoint, and nothing notes an error of that.
        dist.barrier()
        self._release_reserve()
        return super().commit(info)


def make_checkpoints_safe(
    engine: DeepSpeedEngine,
    errors_noted: Callable[[], AbstractContextManager[None]],
    release_reserve: Callable[[], None],
) -> None:
    """
    Let an engine use [`SafeCheckpointEngine`], unless its configuration asks for another one than the usual.

    Args:
        engine (`DeepSpeedEngine`): changed in place.
        errors_noted, release_reserve (`Callable`): see there.
    """
    usual = engine.checkpoint_engine
    if type(usual) is TorchCheckpointEngine:
        engine.checkpoint_engine = SafeCheckpointEngine(usual.zipfile_serialization, errors_noted, release_reserve)
        copy_script = engine._copy_recovery_script

        @functools.wraps(copy_script)
        def copy_script_noted(*args, **kwargs):
            with errors_noted():
                copy_script(*args, **kwargs)

        engine._copy_recovery_script = copy_script_noted
