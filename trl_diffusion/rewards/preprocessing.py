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

"""Images as reward models take them: checked in one place, resized faithfully and differentiably."""

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL
import torch
from packaging import version
from PIL import Image
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


# Decoded and resized images may leave [0, 1] by rounding; [-1, 1] and [0, 255] are mistakes.
RANGE_TOLERANCE = 1e-3
PILLOW_BITS = 22  # after the point, of Pillow's weights
PILLOW_13 = version.parse(PIL.__version__) >= version.parse("13")


def check_images(images: torch.Tensor) -> None:
    """
    Refuse what no reward model can score.

    Args:
        images (`torch.Tensor`): should be `(B, 3, H, W)`, float, finite, in [0, 1].

    Raises:
        `TypeError`: no floating-point tensor. `ValueError`: no images, not RGB, NaN or infinite pixels, pixels out of
        [0, 1].
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(
            f"Images must be a float tensor of shape (B, 3, H, W) in [0, 1], got {kind}. Turn 8-bit pictures into one "
            "with trl_diffusion.rewards.to_tensor."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Images must be RGB, of shape (B, 3, H, W), got {tuple(images.shape)}. Repeat the channel of greyscale "
            "images three times; drop the alpha channel of RGBA images."
        )
    if images.numel() == 0:
        raise ValueError(f"There are no images to score: the shape is {tuple(images.shape)}. Give at least one image.")
    low, high = (bound.item() for bound in torch.aminmax(images.detach()))
    if not -RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
        # NaN lands here as well: aminmax hands it on, and it compares false.
        bad = [
            index
            for index, image in enumerate(images.detach())
            if not ((image >= -RANGE_TOLERANCE) & (image <= 1 + RANGE_TOLERANCE)).all()
        ]
        raise ValueError(
            f"Pixels must be finite and in [0, 1], got {low} to {high} (images {bad} of {len(images)}). NaN means "
            "that the sampler or the VAE diverged; map [-1, 1] by x / 2 + 0.5 and 8-bit values by x / 255, and clamp."
        )


def check_inputs(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """
    As [`check_images`], and one prompt an image.

    Raises:
        `TypeError`: prompts that are no list of strings. `ValueError`: another number of prompts than images.
    """
    check_images(images)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"Prompts must be a list of strings, one an image, got {prompts!r}.")
    if len(prompts) != len(images):
        raise ValueError(f"Got {len(prompts)} prompts for {len(images)} images. Give one prompt an image.")


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A picture of any mode as RGB: grey levels are repeated, palettes resolved, transparent parts laid on white.

    Raises:
        `TypeError`: `image` is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected a PIL image, got {type(image).__name__}. Open files with PIL.Image.open.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """
    Pictures of one size as a tensor `(B, 3, H, W)`, float32, in [0, 1]; see [`to_rgb`] for other modes than RGB.

    Raises:
        `ValueError`: no pictures, or pictures of several sizes.
    """
    if not images:
        raise ValueError("There are no images to score. Give at least one image.")
    pictures = [to_rgb(image) for image in images]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"Images of one batch must have one size, got {sorted(sizes)}. Score the sizes one by one.")
    return torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def short_side_to(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the short side `size`, the long one rounded down, as torchvision and transformers do."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic, antialiased, in one pass and without a clamp, as torchvision resizes float tensors. In float32."""
    # In bfloat16 there is no such kernel on the CPU.
    return functional.interpolate(images.float(), (height, width), mode="bicubic", antialias=True)


def resize_like_pil(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Bicubic, antialiased, to the very levels of the installed Pillow: images are rounded to 8 bits, then resampled along
    the rows and along the columns, where the size changes, each time rounded to 8 bits again.

    The gradient is that of the two passes without rounding, each clamped. Without the rounding values are up to 1.06/255
    apart from Pillow's, in one pass without a clamp up to 33/255. Hence not PyTorch's resizing alone: in two clamped passes
    it moves rewards by up to 45 thousandths of their spread (docs/rewards.md, tests/campaigns/resizing.py).

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [0, 1].
        height (`int`): of the result.
        width (`int`): of the result.

    Returns:
        `torch.Tensor` of shape `(B, 3, height, width)`, float32, in [0, 1]; `images` themselves if that is their size.
    """
    sizes = {-1: width, -2: height}
    order = (-2, -1) if _columns_first(*images.shape[-2:], height, width) else (-1, -2)
    dims = [dim for dim in order if images.shape[dim] != sizes[dim]]
    if not dims:
        return images
    # Integers in float64, so that sums are exact; Apple's accelerators have none.
    levels = images.detach().to("cpu" if images.device.type == "mps" else images.device, torch.float64)
    levels = (levels.clamp(0, 1) * 255).round()
    for dim in dims:
        weights = torch.from_numpy(_pillow_weights(levels.shape[dim], sizes[dim])).to(levels.device)
        sums = (levels.movedim(dim, -1) @ weights).movedim(-1, dim)
        levels = ((sums + 2 ** (PILLOW_BITS - 1)) / 2**PILLOW_BITS).floor().clamp(0, 255)
    exact = (levels / 255).to(images.device, torch.float32)
    if not images.requires_grad:
        return exact
    smooth = images
    for dim in dims:
        shape = [*smooth.shape[-2:]]
        shape[dim] = sizes[dim]
        smooth = resize(smooth, *shape).clamp(0, 1)
    return smooth + (exact - smooth).detach()


@functools.lru_cache(maxsize=64)
def _pillow_weights(size: int, new_size: int) -> np.ndarray:
    """
    Pillow's bicubic weights in units of 2**-22, rounded to integers, shape (size, new_size); see `precompute_coeffs` and
    `normalize_coeffs_8bpc` in Pillow's Resample.c.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, new_size))
    for column in range(new_size):
        center = (column + 0.5) * scale
        first = max(int(center - 2 * stretch + 0.5), 0)
        last = min(int(center + 2 * stretch + 0.5), size)
        x = np.abs((np.arange(first, last) - center + 0.5) / stretch)
        inner, outer = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        kernel = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
        weights[first:last, column] = kernel / kernel.sum()
    scaled = weights * 2**PILLOW_BITS
    return np.trunc(scaled + np.copysign(0.5, scaled))


def _columns_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """
    The order of Pillow's passes. Pillow 13 takes the columns first where the height loses more than twice as many
    pixels as the width (https://github.com/python-pillow/Pillow/pull/9549), which no usual picture does.
    """
    return PILLOW_13 and new_height < height and height - new_height > 2 * (width - new_width)


def center_crop(images: torch.Tensor, size: int, rounding: Literal["torchvision", "transformers"]) -> torch.Tensor:
    """The middle `size` x `size` pixels. Where a margin is odd, torchvision rounds half to even, transformers down."""
    top, left = (
        round((extent - size) / 2) if rounding == "torchvision" else (extent - size) // 2
        for extent in images.shape[-2:]
    )
    return images[..., top : top + size, left : left + size]


def normalize(
    images: torch.Tensor, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
) -> torch.Tensor:
    """Mean and deviation of each channel taken out; CLIP's by default."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=images.device) for values in (mean, std))
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def clip_pixels(
    images: torch.Tensor,
    size: int,
    rounding: Literal["torchvision", "transformers"],
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
) -> torch.Tensor:
    """
    CLIP's preprocessing of 8-bit pictures: short side to `size` as PIL does it, middle square, normalised.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [0, 1].
        size (`int`): side of the model's square input.
        rounding (`str`): whose centre crop, see [`center_crop`].

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`, float32, differentiable.
    """
    resized = resize_like_pil(images, *short_side_to(*images.shape[-2:], size))
    return normalize(center_crop(resized, size, rounding), mean, std)
