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

"""The network that a run trains: a pipeline's denoiser, with an adapter or without, and its files."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
from diffusers import DiffusionPipeline, ModelMixin, attention_backend
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import load_torch_model, save_torch_state_dict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import set_seed

from ..hub import check_names, plain_network, save_adapter
from ..models import FlowModel
from .base_config import DiffusionConfig


TRANSFORMER_SUBFOLDER = "transformer"
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"

# Of a LoRA's configuration, what its weights do not depend on.
FREE_LORA_SETTINGS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "revision")

# Of Flow-GRPO's LoRA for FLUX and Stable Diffusion 3.
DEFAULT_LORA = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian"}


# Ways that a block may be called: gradient, train or eval mode, adapter, one sample or several, and room for a family's own.
COMPILED_WAYS = 64


class _SerializableConfig(FrozenDict):
    """A diffusers config with the two methods that transformers' reporting callbacks call on a model's config."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str, sort_keys=True)


def adapter_config(flow: FlowModel, peft_config: PeftConfig | Literal[False] | None) -> PeftConfig | Literal[False]:
    """What to train of a model, as users say it: `None` is a LoRA, which is on the attention layers unless it says where."""
    if peft_config is False:
        return False
    peft_config = LoraConfig(**DEFAULT_LORA) if peft_config is None else copy.copy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = flow.lora_target_modules
    return peft_config


def trained_network(flow: FlowModel, args: DiffusionConfig, peft_config: PeftConfig | Literal[False]) -> nn.Module:
    """
    The denoiser of a model, ready to be trained.

    Args:
        flow ([`FlowModel`]): the model.
        args ([`DiffusionConfig`]): settings; that of activation checkpointing is carried out and unset.
        peft_config ([`~peft.PeftConfig`] or `False`): the adapter, of [`adapter_config`]; `False` trains all weights.

    Raises:
        `ValueError`: all weights are to be trained, or a LoRA to be added to them, and they are quantised; or see
            [`use_attention_backend`] and [`compile_blocks`].
    """
    denoiser = flow.denoiser
    if peft_config is False and denoiser.config.get("quantization_config") is not None:
        raise ValueError(
            "peft_config=False, but the pipeline's transformer is quantised, and quantised weights cannot be trained. "
            "Train a LoRA, or load the pipeline without quantization_config."
        )
    denoiser._internal_dict = _SerializableConfig(denoiser.config)
    if args.activation_checkpointing:
        # A diffusers model has another method than the one Trainer would call. Older releases of transformers
        # read the old name.
        flow.enable_gradient_checkpointing()
        args.activation_checkpointing = args.gradient_checkpointing = False
    if args.attention_backend is not None:
        use_attention_backend(denoiser, args.attention_backend)
    if args.rollout_merged_lora and denoiser.config.get("quantization_config") is not None:
        raise ValueError(
            "rollout_merged_lora=True, but the pipeline's transformer is quantised, and a sum with quantised weights is not "
            "what is trained. Leave it at False, or load the pipeline without quantization_config."
        )
    if args.compile_denoiser:
        compile_blocks(denoiser, args.torch_compile_backend or "inductor", args.torch_compile_mode)
    if peft_config is False:
        network = denoiser.requires_grad_(True)
    else:
        set_seed(args.seed)  # the adapter's start is random; Trainer sets the seed only later
        # ZeRO-3 partitions parameters of one dtype; elsewhere the adapter is trained in float32.
        network = get_peft_model(denoiser, peft_config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    flow.freeze_unused(network)
    return network


def use_attention_backend(denoiser: ModelMixin, name: str) -> None:
    """
    Let the attention of a network, and of no other, be that of one of diffusers' backends.

    Raises:
        `ValueError`: the network's attention takes no backend.
    """
    with attention_backend(name):  # diffusers changes that of all models, which is put back
        denoiser.set_attention_backend(name)
    if not any("_attention_backend" in vars(processor) for processor in denoiser.attn_processors.values()):
        raise ValueError(
            f"attention_backend={name!r} has no effect on a {type(denoiser).__name__}, whose attention in diffusers is "
            "PyTorch's own. Leave it unset."
        )


def compile_blocks(denoiser: ModelMixin, backend: str = "inductor", mode: str | None = None) -> None:
    """
    Let the repeated blocks of a network be compiled when they are called first, for batches and sizes of any number.

    Names of weights stay as they are. Blocks of one class have one graph for each way they are called: with gradient and
    without, with the adapter and without, one sample or several.

    Args:
        denoiser (`ModelMixin`): the network.
        backend, mode (`str`, *optional*): of `torch.compile`.

    Raises:
        `ValueError`: it has no lists of blocks.
    """
    # More ways than PyTorch allows by default, after which it would silently no longer compile.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_WAYS)
    blocks = [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise ValueError(
            f"compile_denoiser=True has no effect on a {type(denoiser).__name__}, which has no lists of blocks. Leave it at "
            "False."
        )
    for block in blocks:
        block.compile(dynamic=True, backend=backend, mode=mode)


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def adapter_settings(network: nn.Module) -> dict[str, Any]:
    """What a checkpoint of the network depends on, by name, as JSON."""
    if not isinstance(network, PeftModel):
        return {"peft_config": False}
    config = network.peft_config[network.active_adapter].to_dict()
    return {"peft_config": "LoRA"} | {
        f"peft_config.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in config.items()
        if name not in FREE_LORA_SETTINGS
    }


def save_network(
    network: nn.Module,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None,
    pipeline_class: type[DiffusionPipeline],
    base_model: str | None,
) -> None:
    """
    Save the adapter, or all weights in the subfolder that a pipeline has them in.

    Args:
        network (`nn.Module`): the network, unwrapped.
        folder (`Path`): where to.
        state_dict (`dict`, *optional*): its weights, where they have been gathered from several processes.
        pipeline_class (`type`): class of the pipeline, whose `load_lora_weights` is to read the adapter.
        base_model (`str`, *optional*): id of the model that the adapter is for.
    """
    if isinstance(network, PeftModel):
        save_adapter(network, pipeline_class, folder, state_dict=state_dict, base_model=base_model)
        return
    state_dict = network.state_dict() if state_dict is None else state_dict
    check_names(state_dict, plain_network(network).state_dict())
    network.save_config(folder / TRANSFORMER_SUBFOLDER)
    save_torch_state_dict(state_dict, folder / TRANSFORMER_SUBFOLDER, filename_pattern=WEIGHTS_PATTERN)


def load_network(network: nn.Module, folder: str) -> None:
    """Load all weights that [`save_network`] saved."""
    load_torch_model(network, Path(folder) / TRANSFORMER_SUBFOLDER, filename_pattern=WEIGHTS_PATTERN)
