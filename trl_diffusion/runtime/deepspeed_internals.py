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

"""
All that the package uses of DeepSpeed beyond its public interface: the files of its checkpoints, its float32 weights, and
networks of ZeRO-3 that stay gathered. Imported where DeepSpeed is used, which is optional.

[`NAMES`] lists the private names, so that a test tells which of them a new release has not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn


# Of each class the methods that are called, with the names of their arguments, and the attributes that are read.
NAMES: dict[type, tuple[dict[str, list[str]], list[str]]] = {
    DeepSpeedEngine: (
        {"_copy_recovery_script": ["save_path"], "zero_optimization_partition_weights": []},
        ["checkpoint_engine", "optimizer"],
    ),
    TorchCheckpointEngine: (
        {
            "makedirs": ["path", "exist_ok"],
            "save": ["state_dict", "path"],
            "load": ["path", "map_location"],
            "commit": ["info"],
        },
        ["zipfile_serialization"],
    ),
    DeepSpeedZeroOptimizer: ({"update_lp_params": []}, ["single_partition_of_fp32_groups"]),
    DeepSpeedZeroOptimizer_Stage3: (
        {"_partition_all_parameters": [], "_reassign_or_swap_out_partitioned_parameters": ["sub_group_id"]},
        ["fp32_partitioned_groups_flat", "fp16_groups", "parameter_offload"],
    ),
    DeepSpeedZeRoOffload: (
        {"get_param_coordinator": [], "_register_deepspeed_module": ["module", "count"]},
        ["forward_hooks", "backward_hooks", "module"],
    ),
    PartitionedParameterCoordinator: ({"is_invalid_trace": [], "_invalidate_trace": []}, []),
}

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


def float32_partitions(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """
    The flat partitions of the trained weights that this process has; the network's parameters have its dtype.

    Raises:
        `ValueError`: they are on a disk, so other policies than the current one cannot be had.
    """
    if engine.zero_nvme_offload_optimizer():
        raise ValueError(
            "The optimizer is offloaded to NVMe, so the weights are not in memory between steps and no copy of them can be "
            "kept or used. Offload it to the CPU, or train without one: ema_decay=None, and beta=0 or a LoRA."
        )
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def renew_parameters(engine: DeepSpeedEngine) -> None:
    """Bring the float32 partitions into the parameters, as a step does; to be called on every process."""
    optimizer = engine.optimizer
    if not engine.zero_optimization_partition_weights():
        optimizer.update_lp_params()
        return
    # Forwards of ZeRO-3 gather them anew.
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


@contextlib.contextmanager
def gathered(engine: DeepSpeedEngine) -> Iterator[nn.Module]:
    """
    The whole network of a ZeRO-3 engine on every process, for forwards without gradient: parameters are gathered once,
    and not layer by layer in each forward.

    Args:
        engine (`DeepSpeedEngine`): of stage 3.
    """
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        # The engine's hooks would partition each layer again after its forward.
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        try:
            yield engine.module
        finally:
            # What the engine recorded of the order of layers ends here.
            coordinator = offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(offload.module)
