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

"""Which adapter a user means, and what else can be made of it: a whole pipeline, or a file for ComfyUI."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..paths import check_exists, not_found
from .adapter import DIFFUSERS_WEIGHTS_NAME, PEFT_WEIGHTS_NAME


PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."

# Networks whose layers ComfyUI knows by diffusers' names, or, those in `COMFYUI_NAMES`, by its own.
COMFYUI_NETWORKS = (
    "FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel", "Flux2Transformer2DModel",
    "ZImageTransformer2DModel",
    "ChromaTransformer2DModel", "Krea2Transformer2DModel", "WanTransformer3DModel",
)  # fmt: skip
# Those that it knows by its own names only, or knows by diffusers' since lately: single blocks of FLUX.2,
# https://github.com/Comfy-Org/ComfyUI/issues/11926, and the blocks of Wan, which have the names of Wan's own code.
COMFYUI_NAMES = {
    r"transformer\.single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"diffusion_model.single_blocks.\1.linear1",
    r"transformer\.single_transformer_blocks\.(\d+)\.attn\.to_out": r"diffusion_model.single_blocks.\1.linear2",
    r"transformer\.blocks\.(\d+)\.attn1\.to_([qkv])": r"diffusion_model.blocks.\1.self_attn.\2",
    r"transformer\.blocks\.(\d+)\.attn1\.to_out\.0": r"diffusion_model.blocks.\1.self_attn.o",
    r"transformer\.blocks\.(\d+)\.attn2\.to_([qkv])": r"diffusion_model.blocks.\1.cross_attn.\2",
    r"transformer\.blocks\.(\d+)\.attn2\.to_out\.0": r"diffusion_model.blocks.\1.cross_attn.o",
    r"transformer\.blocks\.(\d+)\.ffn\.net\.0\.proj": r"diffusion_model.blocks.\1.ffn.0",
    r"transformer\.blocks\.(\d+)\.ffn\.net\.2": r"diffusion_model.blocks.\1.ffn.2",
}
# Networks of which it knows no layer by diffusers' names.
COMFYUI_OWN_NAMES = ("WanTransformer3DModel",)
OWN_BLOCKS = "diffusion_model.blocks."


def find_adapter(adapter: str | os.PathLike) -> Path:
    """
    The file of a LoRA in diffusers' format, downloaded where it must be. Of the file only the names are read.

    Args:
        adapter (`str` or `os.PathLike`):
            A .safetensors file, a folder that a trainer wrote (`output_dir` or a checkpoint in it), or a Hub id.

    Raises:
        `ValueError`: there is no such file, it cannot be read, or is in PEFT's format; the message says what there is.
    """
    file = _locate(adapter)
    with _opened(file) as content:
        keys = list(content.keys())
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        raise ValueError(
            f"The adapter {str(file)!r} is in PEFT's format, not in diffusers'. {_conversion(file.parent, file)}"
        )
    return file


def _conversion(folder: Path, file: Path | None) -> str:
    beside = folder / DIFFUSERS_WEIGHTS_NAME
    if beside.is_file() and beside != file:
        return f"Give {DIFFUSERS_WEIGHTS_NAME!r} beside it, or the folder."
    return (
        "Convert it with trl_diffusion.hub.save_adapter(peft.PeftModel.from_pretrained(pipe.transformer, "
        f"{str(folder)!r}), type(pipe), {str(folder)!r})."
    )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter {str(file)!r} cannot be read: {error}. It is no safetensors file, or was not written or downloaded "
            "whole. Get it again."
        ) from error


def _locate(adapter: str | os.PathLike) -> Path:
    path = Path(adapter)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter {str(adapter)!r} is no .safetensors file.")
        return path
    if path.is_dir():
        file = path / DIFFUSERS_WEIGHTS_NAME
        if not file.is_file():
            found = sorted(entry.name for entry in path.iterdir())
            remedy = "Give a trainer's output_dir, one of its checkpoints, or the file itself."
            if PEFT_WEIGHTS_NAME in found:
                remedy = f"That is PEFT's format. {_conversion(path, None)}"
            raise ValueError(
                f"The folder {str(adapter)!r} holds no {DIFFUSERS_WEIGHTS_NAME}, but {', '.join(found) or 'nothing'}. "
                f"{remedy}"
            )
        return file
    check_exists(adapter, (".safetensors",))
    try:
        return Path(hf_hub_download(str(adapter), DIFFUSERS_WEIGHTS_NAME))
    except (HFValidationError, OSError) as error:
        raise ValueError(f"No adapter {str(adapter)!r}: {not_found(adapter, error)}") from error


def load_adapter(pipeline: DiffusionPipeline, adapter: str | os.PathLike, name: str) -> None:
    """
    Load a LoRA into a pipeline under a name, next to those that it has. All formats that diffusers knows are taken.

    Raises:
        `ValueError`: as [`find_adapter`]; something of the file does not fit the pipeline's transformer, which diffusers
            would leave out with a message or not at all; or its values are not finite.
    """
    file = find_adapter(adapter)
    source = {"pretrained_model_name_or_path_or_dict": str(file.parent), "weight_name": file.name}
    with _load_errors_told(pipeline, file):
        tensors = type(pipeline).lora_state_dict(**source)
    _check_fit(tensors, pipeline, file)
    with _load_errors_told(pipeline, file):
        pipeline.load_lora_weights(**source, adapter_name=name)


@contextlib.contextmanager
def _load_errors_told(pipeline: DiffusionPipeline, file: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # What is in the file decides which of these diffusers and PEFT raise.
        raise ValueError(
            f"The adapter {str(file)!r} is no whole LoRA in a format that diffusers knows for a {type(pipeline).__name__} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Get it again, or export it in diffusers' format."
        ) from error


def _check_fit(tensors: dict[str, torch.Tensor], pipeline: DiffusionPipeline, file: Path) -> None:
    """Whether a LoRA in diffusers' names is whole, finite and of the pipeline's transformer."""
    family, adapter = type(pipeline).__name__, f"The adapter {str(file)!r}"
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    layers = dict.fromkeys(key.partition(".lora_")[0] for key in tensors if ".lora_" in key)
    if not layers:
        raise ValueError(
            f"{adapter} changes nothing in the transformer of this {family}. Is it a LoRA of another model?"
        )
    modules = dict(pipeline.transformer.named_modules())
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(
            f"{adapter} is a LoRA of another model: of its {len(layers)} layers {len(missing)} are not in the transformer of "
            f"this {family}, as {missing[0]!r}. Give the base model that it was trained on."
        )
    for layer in layers:
        down, up = (tensors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ValueError(f"{adapter} is not whole: the matrices of the layer {layer!r} do not make a pair.")
        module = modules[layer]
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        # A quantised weight has another shape.
        width = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else module.weight.shape[:2]
        if (up.shape[0], down.shape[1]) != tuple(width):
            raise ValueError(
                f"{adapter} is a LoRA of another model: its layer {layer!r} is of {down.shape[1]} to {up.shape[0]} features, "
                f"that of this {family} of {width[1]} to {width[0]}. Give the base model that it was trained on."
            )
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{adapter} holds values that are not finite, as in {bad[0]!r}. Give another checkpoint.")


def merge_adapter(pipeline: DiffusionPipeline, adapter: str | os.PathLike, scale: float = 1.0) -> None:
    """
    Fold a LoRA into the weights of a pipeline, which is then an ordinary one, without an adapter.

    In float32 it draws what the pipeline with the adapter draws; in bfloat16 the sum is rounded once more.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The base model; changed in place.
        adapter (`str` or `os.PathLike`):
            See [`find_adapter`].
        scale (`float`, *optional*, defaults to `1.0`):
            Strength of the adapter.

    Raises:
        `ValueError`: as [`load_adapter`].
    """
    load_adapter(pipeline, adapter, "merged")
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


def export_comfyui(adapter: str | os.PathLike, output: str | os.PathLike) -> None:
    """
    Write a LoRA as ComfyUI reads it: names that it knows, and the alpha of each layer beside its matrices.

    ComfyUI maps `transformer.{layer}.lora_A.weight`, `lora_B.weight` and `alpha` to its own names of the networks in
    `COMFYUI_NETWORKS`; layers in `COMFYUI_NAMES` are given its own. It knows nothing of the metadata in which diffusers keeps alpha: with diffusers' own file it
    takes alpha for r, so an adapter with another alpha would act with another strength.

    Args:
        adapter (`str` or `os.PathLike`):
            See [`find_adapter`].
        output (`str` or `os.PathLike`):
            The .safetensors file to write.

    Raises:
        `ValueError`: as [`find_adapter`]; the file holds something other than a LoRA of a transformer, or says that it
        is of a network that ComfyUI does not know by these names; or `output` is no .safetensors file.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"The file to write must end in .safetensors, got {str(output)!r}.")
    tensors: dict[str, torch.Tensor] = {}
    with _opened(find_adapter(adapter)) as file:
        config = _lora_config(file.metadata() or {})
        network = (config.get("auto_mapping") or {}).get("base_model_class")
        if network is not None and network not in COMFYUI_NETWORKS:
            raise ValueError(
                f"{str(adapter)!r} is a LoRA of a {network}, whose names in ComfyUI are not known here. Known: "
                f"{', '.join(COMFYUI_NETWORKS)}. Use it in diffusers, or merge it with its base model."
            )
        for key in file.keys():  # noqa: SIM118, this is no dict
            if not key.startswith(PREFIX) or not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(
                    f"{str(adapter)!r} holds {key!r}, which is no LoRA matrix of a transformer in diffusers' format."
                )
            tensors[key] = file.get_tensor(key)
    # A file without metadata tells its network by what it has layers of.
    own_names = network in COMFYUI_OWN_NAMES or any(_comfyui_name(key).startswith(OWN_BLOCKS) for key in tensors)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        if own_names and _comfyui_name(key) == key:
            raise ValueError(
                f"{str(adapter)!r} has the layer {layer.removeprefix(PREFIX)!r} of a {COMFYUI_OWN_NAMES[0]}, whose name in "
                "ComfyUI is not known here. Known are the attention and feed-forward layers of its blocks: train those, or merge the "
                "adapter with its base model."
            )
        alpha = _alpha(config, layer.removeprefix(PREFIX), rank=tensors[key].shape[0])
        tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({_comfyui_name(key): tensor for key, tensor in tensors.items()}, output, metadata={"format": "pt"})


def _comfyui_name(key: str) -> str:
    for layer, name in COMFYUI_NAMES.items():
        key = re.sub(rf"^{layer}(?=\.(?:lora_[AB]|alpha))", name, key)
    return key


def _lora_config(metadata: dict[str, str]) -> dict[str, Any]:
    """The LoRA configuration in a file of diffusers; empty for a file without one, where alpha is r."""
    raw = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    return {name.removeprefix(PREFIX): value for name, value in raw.items()}


def _alpha(config: dict[str, Any], layer: str, rank: int) -> float:
    """The alpha of a layer, such that its scale is alpha / rank."""
    if not config:
        return float(rank)
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config["lora_alpha"])
    # Rank-stabilised LoRA scales by alpha / sqrt(r), which ComfyUI does not know.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
