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

"""What a pipeline that a user has loaded, and perhaps changed, must be before it is trained."""

from accelerate.hooks import remove_hook_from_module
from accelerate.utils import is_compiled_module
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


logger = logging.get_logger(__name__)


def make_plain(pipeline: DiffusionPipeline) -> None:
    """
    Take off a pipeline's networks what only wraps them, and refuse what would be left out of a training or of its result.

    Taken off, in place: `torch.compile` around a network or a part of it (networks that were compiled in place keep
    their names and stay compiled), DataParallel and DistributedDataParallel, and the hooks of accelerate that move weights
    (`enable_model_cpu_offload`, `enable_sequential_cpu_offload`), since the trainers place the weights themselves.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline; changed in place.

    Raises:
        `ValueError`: for adapters in any network, fused or not; attention processors with weights of their own
            (IP-Adapter); fused projections; hooks of diffusers (caches, layerwise casting, group offloading); weights on
            several devices. The message has the lines that help.
    """
    pipeline.reset_device_map()
    for name, module in _networks(pipeline).items():
        plain = _unwrapped(module)
        if plain is not module:
            setattr(pipeline, name, plain)
        if any("_hf_hook" in vars(part) for part in plain.modules()):
            remove_hook_from_module(plain, recurse=True)
            logger.warning(f"The hooks that move the weights of {name} are removed: the trainer places it itself.")
        if len(set(vars(plain).get("hf_device_map", {}).values())) > 1:
            raise ValueError(
                f"The pipeline's {name} lies on several devices: {plain.hf_device_map}. Load it without device_map; "
                "DeepSpeed ZeRO-3 or FSDP2 share its weights out for a training."
            )
        _refuse_hooks(name, plain)
    pipeline.remove_all_hooks()  # forgets those removed above
    _refuse_adapters(pipeline)
    _refuse_changed_attention(pipeline.transformer)


def _networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network without wrappers, around it or around its parts, which would be in the names of its weights."""
    while True:
        if is_compiled_module(module):
            module = module._orig_mod
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            break
    for name, child in list(module.named_children()):
        plain = _unwrapped(child)
        if plain is not child:
            setattr(module, name, plain)
    return module


def _refuse_hooks(name: str, module: nn.Module) -> None:
    # A cache would leave out forwards. Layerwise casting and group offloading take weights away that the backward pass
    # needs.
    hooks = {
        hook
        for part in module.modules()
        if "_diffusers_hook" in vars(part)
        for hook in vars(part)["_diffusers_hook"].hooks
    }
    if hooks:
        raise ValueError(
            f"The pipeline's {name} has hooks of diffusers, {sorted(hooks)}: caches, layerwise casting and group "
            f"offloading are for inference. Load the pipeline without them; a cache ends with pipe.{name}.disable_cache()."
        )


def _adapter_layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _refuse_adapters(pipeline: DiffusionPipeline) -> None:
    """A new adapter beside one that is there would switch that off, or replace it if it had the same name."""
    found = {
        name: _adapter_layers(module)
        for name, module in _networks(pipeline).items()
        if isinstance(module, PeftModel) or _adapter_layers(module)
    }
    if not found:
        return
    keep, drop, loadable = [], [], []
    for name in found:
        if isinstance(getattr(pipeline, name), PeftModel):
            keep.append(f"pipe.{name} = pipe.{name}.merge_and_unload()")
            drop.append(f"pipe.{name} = pipe.{name}.unload()")
        elif name in pipeline._lora_loadable_modules:
            loadable.append(name)
        else:  # `fuse_lora` of the pipeline knows only those
            imports = [
                "from diffusers.loaders.lora_base import fuse_text_encoder_lora",
                "from diffusers.utils.peft_utils import recurse_remove_peft_layers",
            ]
            remove = f"recurse_remove_peft_layers(pipe.{name})"
            keep += [*imports, f"fuse_text_encoder_lora(pipe.{name})", remove]
            drop += [imports[1], remove]
    if loadable:
        # What is merged is what the pipeline draws; fusing again would add what else is active.
        merged = any(layer.merged for name in loadable for layer in found[name] if isinstance(layer, BaseTunerLayer))
        keep += [] if merged else [f"pipe.fuse_lora(components={loadable})"]
        drop += [f"pipe.unfuse_lora(components={loadable})"] if merged else []
        keep.append("pipe.unload_lora_weights()")
        drop.append("pipe.unload_lora_weights()")
    names = sorted({adapter for layers in found.values() for layer in layers for adapter in layer.active_adapters})
    lines = {kind: "".join(f"\n    {line}" for line in block) for kind, block in (("keep", keep), ("drop", drop))}
    raise ValueError(
        f"The pipeline holds adapters already, {names} in its {' and '.join(found)}, and a training would switch them off "
        f"or replace them. To train on top of them, make them part of the weights first:{lines['keep']}\n"
        f"To train without them:{lines['drop']}"
    )


def _refuse_changed_attention(transformer: nn.Module) -> None:
    processors = [
        name
        for name, part in transformer.named_modules()
        if name.endswith(".processor") and next(part.parameters(), None) is not None
    ]
    if processors:
        raise ValueError(
            f"The pipeline's transformer has attention processors with weights of their own, {processors[0]!r} and "
            f"{len(processors) - 1} more, as an IP-Adapter has. A training gives them no image. Remove them with "
            "pipe.unload_ip_adapter()."
        )
    fused = [name for name, part in transformer.named_modules() if vars(part).get("fused_projections", False)]
    if fused:
        raise ValueError(
            f"The projections of the pipeline's transformer are fused ({fused[0]!r} and {len(fused) - 1} more), so that "
            "it does not use the layers that an adapter is put on. Call pipe.transformer.unfuse_qkv_projections() first."
        )
