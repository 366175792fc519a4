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
The embedded world: a small trained FLUX pipeline, its reward and its judge, in the package and without a download.

It draws 32x32 pictures such as "a small red circle on a white background". Everything about it is real diffusers and
transformers code, only small: what runs here runs with FLUX.1-dev by changing one name.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image

from .clip import clip_path, load_clip, preprocess
from .drawing import (
    ALL_SCENES,
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    draw,
)
from .judge import judge
from .prompts import load_dataset


__all__ = [
    "ALL_SCENES",
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLORS",
    "IMAGE_SIZE",
    "MAX_SEQUENCE_LENGTH",
    "SHAPES",
    "SIZES",
    "STYLES",
    "Scene",
    "attribute_share",
    "clip_path",
    "draw",
    "judge",
    "load_clip",
    "load_dataset",
    "load_pipeline",
    "pipeline_path",
    "preprocess",
    "reference",
]

MAX_SEQUENCE_LENGTH = 12  # T5 tokens; FluxPipeline's own default is 512, which is slow and of no use here


def pipeline_path() -> Path:
    """The folder of the world's pipeline, in the layout of `FluxPipeline.save_pretrained`."""
    return Path(__file__).parent / "weights" / "pipeline"


def load_pipeline(**kwargs) -> FluxPipeline:
    """
    Loads the world's pipeline.

    Call it with `height=32, width=32, max_sequence_length=12, num_inference_steps=10` for the pictures it was trained
    to draw.

    Args:
        **kwargs:
            Passed to `FluxPipeline.from_pretrained`, e.g. `torch_dtype`; all is float32 unless given.
    """
    return FluxPipeline.from_pretrained(pipeline_path(), **kwargs)


def attribute_share(images: Sequence[Image.Image] | torch.Tensor, prompts: Sequence[str]) -> list[float]:
    """
    A black-box reward in [0, 1]: the judge's share of right attributes (background, color, size, shape) per image.

    Args:
        images (`list[PIL.Image.Image]` or `Tensor`):
            The pictures, or a float tensor of shape (B, 3, H, W) with values in [0, 1].
        prompts (`list[str]`):
            A caption of the world for each image.

    Raises:
        `ValueError`: As [`judge`].
    """
    return judge(images, prompts)["attributes"].tolist()


def reference(prompts: Sequence[str], style: str = "sharp", seed: int = 0) -> torch.Tensor:
    """
    Freshly drawn, perfect pictures of the prompts: what `contrast` and `sharpness` are compared with.

    Args:
        prompts (`Sequence[str]`):
            Captions of the world.
        style (`str`, *optional*, defaults to `"sharp"`):
            "sharp", "blurred" or "pale".
        seed (`int`, *optional*, defaults to `0`):
            Seed of the jitter.

    Returns:
        `Tensor`: float32, shape (len(prompts), 3, 32, 32), values in [0, 1].

    Raises:
        `ValueError`: If a prompt is not a caption of the world, or there is no such style.
    """
    scenes = [Scene.from_caption(prompt) for prompt in prompts]
    return draw(scenes, style, torch.Generator().manual_seed(seed))
