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

"""Which settings of a `DiffusionConfig` processes that train together cannot have: under DeepSpeed, FSDP2 or any launcher."""

import os
from typing import Any

from transformers import TrainingArguments
from transformers.utils.versions import require_version


def check_sharding(args: TrainingArguments) -> None:
    """Refuse settings that sharded weights cannot have."""
    if args.uses_fsdp:
        # Settings of the arguments win over the launcher's, which are in the environment.
        version = (args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
        if int(version) != 2:
            raise ValueError(
                f"fsdp_version is {version}, and the trainers support FSDP2 alone. Set fsdp_version: 2 in accelerate's "
                "configuration, or use the package's fsdp2.yaml."
            )
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args, args.deepspeed_plugin.zero_stage, args.deepspeed_plugin.deepspeed_config)
    for name in ("quantization", "compile_denoiser", "rollout_merged_lora"):
        value = vars(args)[name]
        if value and args.shards_weights:
            raise ValueError(
                f"{name}={value!r} cannot be used with ZeRO-3 or FSDP, which shard the weights. Use multi_gpu, ZeRO-1 or "
                f"ZeRO-2, or leave {name} unset."
            )


def _check_deepspeed(args: TrainingArguments, stage: int, config: dict[str, Any]) -> None:
    require_version("deepspeed>=0.19.8", "Older releases apply steps whose gradient is not finite.")
    # As these do.
    if stage == 0:
        raise ValueError("zero_stage is 0, which shards nothing. Use ZeRO-1, 2 or 3, or multi_gpu without DeepSpeed.")
    accumulation = config.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and args.bf16 and accumulation == "fp32":
        raise ValueError(
            "data_types.grad_accum_dtype is 'fp32', which with bf16 needs ZeRO-2 or 3, and the stage is 1. Use ZeRO-2, "
            "or leave grad_accum_dtype unset."
        )
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    if args.ema_decay is not None and offload.get("device") == "nvme":
        raise ValueError(
            f"ema_decay={args.ema_decay} cannot be used with an optimizer that is offloaded to NVMe, where the weights "
            "are not in memory after a step. Offload it to the CPU, or set ema_decay to None."
        )


def check_waiting(args: TrainingArguments) -> None:
    """Refuse rewards that may take longer than processes wait for each other."""
    if args.reward_timeout is not None and args.world_size > 1:
        if args.reward_timeout * (args.reward_retries + 1) >= args.ddp_timeout:
            raise ValueError(
                f"reward_timeout={args.reward_timeout} s in {args.reward_retries + 1} attempts takes longer than "
                f"the {args.ddp_timeout} s that processes wait for each other. Lower reward_timeout or "
                "reward_retries, or raise ddp_timeout."
            )


def check_optimizer_with_modes(args: TrainingArguments, name: str) -> None:
    """
    Refuse what an optimizer with train and eval modes cannot be used with.

    Args:
        name (`str`): of the optimizer, as it was given.

    Raises:
        `ValueError`: weights are sharded, or averaged otherwise.
    """
    if args.deepspeed_plugin is not None or args.uses_fsdp:
        raise ValueError(
            f"{name} has train and eval modes, which DeepSpeed and FSDP do not pass on to all weights. Use multi_gpu, or "
            "another optimizer, e.g. optim='adamw_torch'."
        )
    if args.ema_decay is not None:
        raise ValueError(
            f"{name} averages the weights itself, so ema_decay={args.ema_decay} would average twice. Set ema_decay to "
            "None, or use another optimizer."
        )
