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

"""`shapes-clip`, the reward of the embedded world: a small CLIP model trained on the world's own captions."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from .drawing import IMAGE_SIZE


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_path() -> Path:
    """The folder with the weights and the tokenizer of `shapes-clip`."""
    return Path(__file__).parent / "weights" / "clip"


def load_clip(**kwargs) -> tuple[CLIPModel, CLIPTokenizer]:
    """
    Loads `shapes-clip`: a `CLIPModel` for 32x32 images, in float32 and evaluation mode, and its tokenizer.

    The score of an image and a text is the cosine of `get_image_features` and `get_text_features`. Prepare images with
    [`preprocess`] and texts with `tokenizer(texts, padding=True, truncation=True, return_tensors="pt")`.

    Args:
        **kwargs:
            Passed to `CLIPModel.from_pretrained`, e.g. `dtype`.
    """
    path = clip_path()
    model = CLIPModel.from_pretrained(path, **kwargs)
    return model.eval(), CLIPTokenizer.from_pretrained(path)


def preprocess(images: Tensor) -> Tensor:
    """
    Images as `shapes-clip` takes them; differentiable.

    Args:
        images (`Tensor`):
            Shape (B, 3, H, W), values in [0, 1].

    Returns:
        `Tensor`: `pixel_values` of shape (B, 3, 32, 32): resized (bilinear, anti-aliased) where H or W is not 32, then
        normalised by CLIP's mean and standard deviation.

    Raises:
        `ValueError`: If `images` does not have four dimensions and three channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected images of shape (B, 3, H, W), got {tuple(images.shape)}.")
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if images.shape[-2:] != size:
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    mean = torch.tensor(IMAGE_MEAN, device=images.device, dtype=images.dtype)[:, None, None]
    std = torch.tensor(IMAGE_STD, device=images.device, dtype=images.dtype)[:, None, None]
    return (images - mean) / std
