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

"""What DeepSpeed ZeRO and FSDP2 need of a trainer of diffusion models beyond what transformers and accelerate do."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# Elements, not bytes. accelerate derives "auto" from the `hidden_size` of a language model's configuration, which no
# diffusers model has, and DeepSpeed's own 5e8 reserves a gigabyte a bucket in bf16. These are the sizes that "auto"
# would give for a hidden size of 7000 in stages 1 and 2; the last two are stage 3's.
BUCKET_SIZES = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 45_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


def set_bucket_sizes(plugin: DeepSpeedPlugin) -> None:
    """
    Give the bucket sizes of DeepSpeed ZeRO that are "auto" or missing integers, so that a configuration made for language
    models serves as well. Sizes that are given as integers stay.

    Args:
        plugin ([`~accelerate.DeepSpeedPlugin`]): of the training arguments; changed in place.
    """
    zero = plugin.deepspeed_config["zero_optimization"]
    for name, size in BUCKET_SIZES.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = size


def keep_float32_inputs(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    With bf16, let FSDP2 cast parameters alone. By default it casts what goes into every block as well, and so rounds
    noise levels and position embeddings, and adds gradients of processes up in bfloat16.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@dataclasses.dataclass
class HeldWeights:
    """
    The trained weights as far as this process holds them, in the precision in which the optimizer changes them.

    Attributes:
        tensors (`Callable`): gives them by name; they share the memory of the weights.
        changed (`Callable`): to be called on every process after a change of them, for the forwards to see it.
        sharded (`bool`): whether each process holds another part of the weights.
    """

    tensors: Callable[[], dict[str, torch.Tensor]]
    changed: Callable[[], None]
    sharded: bool


def held_weights(network: nn.Module, engine: "DeepSpeedEngine | None") -> HeldWeights:
    """
    Args:
        network (`nn.Module`): that is trained, prepared for it.
        engine (`DeepSpeedEngine`, *optional*): that trains it.
    """
    if engine is not None:
        from .deepspeed_internals import float32_partitions, renew_parameters

        return HeldWeights(
            lambda: {f"partition_{index}": partition for index, partition in enumerate(float32_partitions(engine))},
            lambda: renew_parameters(engine),
            sharded=True,
        )
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if isinstance(network, FSDPModule):
        return HeldWeights(
            lambda: {name: weight.detach().to_local() for name, weight in trained.items()},
            lambda: _reshard(network),
            sharded=True,
        )
    return HeldWeights(lambda: trained, lambda: None, sharded=False)


def _reshard(network: nn.Module) -> None:
    """Let FSDP2 gather the weights anew; those that are still gathered would be used once more as they are."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
