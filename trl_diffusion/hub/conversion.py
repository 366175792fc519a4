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

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from ..paths import check_exists, not_found
from .adapter import DIFFUSERS_WEIGHTS_NAME


PREFIX = "transformer."


def find_adapter(adapter: str | os.PathLike) -> Path:
    """
    The file of a LoRA in diffusers' format, downloaded where it must be.

    Args:
        adapter (`str` or `os.PathLike`):
            A .safetensors file, a folder that a trainer wrote (`output_dir` or a checkpoint in it), or a Hub id.

    Raises:
        `ValueError`: there is no such file; the message says what there is.
    """
    path = Path(adapter)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter {str(adapter)!r} is no .safetensors file.")
        return path
    if path.is_dir():
        file = path / DIFFUSERS_WEIGHTS_NAME
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise ValueError(
                f"The folder {str(adapter)!r} holds no {DIFFUSERS_WEIGHTS_NAME}, but {found}. Give a trainer's "
                "output_dir, one of its checkpoints, or the file itself."
            )
        return file
    check_exists(adapter, (".safetensors",))
    try:
        return Path(hf_hub_download(str(adapter), DIFFUSERS_WEIGHTS_NAME))
    except (HFValidationError, OSError) as error:
        raise ValueError(f"No adapter {str(adapter)!r}: {not_found(adapter, error)}") from error


def load_adapter(pipeline: DiffusionPipeline, adapter: str | os.PathLike, name: str) -> None:
    """
    Load a LoRA into a pipeline under a name, next to those that it has.

    Raises:
        `ValueError`: as [`find_adapter`], or nothing of the file fits the pipeline's transformer.
    """
    file = find_adapter(adapter)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    if name not in pipeline.get_list_adapters().get("transformer", []):
        raise ValueError(
            f"The adapter {str(adapter)!r} changes nothing in the transformer of this {type(pipeline).__name__}. Is it "
            "a LoRA of another model?"
        )


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
        `ValueError`: as [`load_adapter`]; the adapter holds values that are not finite.
    """
    load_adapter(pipeline, adapter, "merged")
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()


def export_comfyui(adapter: str | os.PathLike, output: str | os.PathLike) -> None:
    """
    Write a LoRA as ComfyUI reads it: diffusers' names, and the alpha of each layer beside its matrices.

    ComfyUI maps `transformer.{layer}.lora_A.weight`, `lora_B.weight` and `alpha` to its own names of FLUX.1 and
    Stable Diffusion 3. It knows nothing of the metadata in which diffusers keeps alpha: with diffusers' own file it
    takes alpha for r, so an adapter with another alpha would act with another strength.

    Args:
        adapter (`str` or `os.PathLike`):
            See [`find_adapter`].
        output (`str` or `os.PathLike`):
            The .safetensors file to write.

    Raises:
        `ValueError`: as [`find_adapter`]; the file holds something other than a LoRA of a transformer, or `output`
        is no .safetensors file.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"The file to write must end in .safetensors, got {str(output)!r}.")
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(find_adapter(adapter), framework="pt") as file:
        config = _lora_config(file.metadata() or {})
        for key in file.keys():  # noqa: SIM118, this is no dict
            if not key.startswith(PREFIX) or not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(
                    f"{str(adapter)!r} holds {key!r}, which is no LoRA matrix of a transformer in diffusers' format."
                )
            tensors[key] = file.get_tensor(key)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        alpha = _alpha(config, layer.removeprefix(PREFIX), rank=tensors[key].shape[0])
        tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata={"format": "pt"})


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
