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
The judge of the embedded world: no network, only measurements on pixels with fixed thresholds.

How it sees a picture:

1. The background is the median of the two outermost rows and columns of pixels. It is "white", "gray" or "black" where
   each channel lies within 0.15 of that level (0.96, 0.50, 0.04). Where the median deviation from it exceeds 0.1, the
   picture is noise: there is no background and no shape.
2. The difference to the background, averaged over the 20 pixels whose neighbourhoods (3x3) differ most, gives the
   colour offset of the shape. Its root mean square over the channels is `contrast`. Below 0.05 there is no shape.
3. The colour is the one whose offset from this background points most nearly the same way (a cosine of at least 0.8).
   Paleness shortens the offset but does not turn it, so it does not fool the judge.
4. Each pixel's difference, projected on the offset and divided by its length, is the share of the pixel that the shape
   covers. Shares under 0.3 are taken for noise. The sum is the area in pixels: "small" from 32 to 120, "large" from
   120 to 400.
5. The coverage, moved to its centre of mass and scaled to unit area, is compared with the four shapes drawn sharp and
   blurred, small and large. The best correlation names the shape; below 0.85 it is no shape of the world.
6. `sharpness` is the slope of the coverage in 1/pixels, averaged over the 16 steepest pixels: about 1 where the edge
   is one pixel wide. Being measured on coverage, it does not depend on contrast.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image

from .drawing import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, SIZES, Scene, draw


BORDER = 2
BACKGROUND_TOLERANCE = 0.15
MAX_DEVIATION = 0.10
OFFSET_PIXELS = 20
MIN_CONTRAST = 0.05
MIN_COLOR_COSINE = 0.8
MIN_AREA, MIDDLE_AREA, MAX_AREA = 32.0, 120.0, 400.0  # pixels
MIN_COVERAGE = 0.3  # less is noise or a blurred fringe, and does not count for size, place and shape
MIN_SHAPE_CORRELATION = 0.85
SLOPE_PIXELS = 16
GRID = np.linspace(-1.1, 1.1, 17, dtype=np.float32)  # where the coverage is compared, in sides of the unit area

_LEVELS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_COLORS = np.array(list(COLORS.values()), dtype=np.float32)
_BATCH = 512  # bounds memory


def judge(images: Sequence[Image.Image] | torch.Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """
    Measures which attributes of the prompts the images show, and how they are drawn.

    Args:
        images (`list[PIL.Image.Image]` or `Tensor`):
            The pictures, or a float tensor of shape (B, 3, H, W) with values in [0, 1]. Pictures of another size than
            32x32 are resized.
        prompts (`list[str]`):
            A caption of the world for each image.

    Returns:
        `dict[str, np.ndarray]`: arrays of shape (B,), float64. "background", "color", "size", "shape": 1 where right,
        else 0. "attributes": the share of the four that is right. "all_attributes": 1 where all four are right.
        "contrast" (root mean square over the channels of the offset of shape to background, 0 to about 1) and
        "sharpness" (1/pixels, 0 to about 1.4) do not depend on the prompts. An image without a recognisable shape has
        its attributes wrong, and sharpness 0 where nothing at all is to be seen.

    Raises:
        `ValueError`: If a prompt is not a caption of the world, the numbers of images and prompts differ, or the
            tensor's shape or values are not those of images.
    """
    scenes = [Scene.from_caption(prompt) for prompt in prompts]
    pixels = _to_pixels(images)
    if len(pixels) != len(scenes):
        raise ValueError(f"Got {len(pixels)} images for {len(scenes)} prompts; pass one prompt per image.")
    seen = [_see(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
    seen = {key: np.concatenate([part[key] for part in seen]) for key in seen[0]} if seen else _see(pixels)
    measures = {}
    for attribute, values in (
        ("background", tuple(BACKGROUNDS)),
        ("color", tuple(COLORS)),
        ("size", tuple(SIZES)),
        ("shape", SHAPES),
    ):
        wanted = np.array([values.index(vars(scene)[attribute]) for scene in scenes], dtype=np.int64)
        measures[attribute] = (seen[attribute] == wanted).astype(np.float64)
    right = np.stack(list(measures.values()))
    measures["attributes"] = right.mean(axis=0)
    measures["all_attributes"] = right.prod(axis=0)
    measures["contrast"] = seen["contrast"].astype(np.float64)
    measures["sharpness"] = seen["sharpness"].astype(np.float64)
    return measures


def _to_pixels(images: Sequence[Image.Image] | torch.Tensor) -> np.ndarray:
    """Images as a float32 array of shape (B, 32, 32, 3)."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Expected images of shape (B, 3, H, W), got {tuple(images.shape)}.")
        images = images.detach().float().cpu()
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        pixels = images.permute(0, 2, 3, 1).numpy()
        if not np.isfinite(pixels).all():
            raise ValueError("The images contain values that are not finite; pass values in [0, 1].")
        return pixels.clip(0, 1)
    pixels = np.zeros((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    for row, image in enumerate(images):
        image = image.convert("RGB")
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        pixels[row] = np.asarray(image, dtype=np.float32) / 255
    return pixels


def _see(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What the pictures show: an index into the values of each attribute, or -1, and the two style measures."""
    number = len(pixels)
    frame = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(pixels[:, frame], axis=1)  # (B, 3)
    distance = np.abs(background[:, None] - _LEVELS[:, None]).max(axis=-1)  # (B, levels)
    even = np.median(np.abs(pixels[:, frame] - background[:, None]).max(axis=-1), axis=1) <= MAX_DEVIATION
    background_index = np.where(even & (distance.min(axis=1) <= BACKGROUND_TOLERANCE), distance.argmin(axis=1), -1)

    difference = pixels - background[:, None, None]
    squared = np.square(_average_neighbours(difference)).sum(axis=-1).reshape(number, IMAGE_SIZE**2)
    difference = difference.reshape(number, IMAGE_SIZE**2, 3)
    largest = np.argpartition(squared, -OFFSET_PIXELS, axis=1)[:, -OFFSET_PIXELS:]
    offset = np.take_along_axis(difference, largest[..., None], axis=1).mean(axis=1)  # (B, 3)
    length = np.sqrt(np.square(offset).sum(axis=-1))
    contrast = length / np.sqrt(3, dtype=np.float32)
    visible = even & (contrast >= MIN_CONTRAST)
    length = np.where(visible, length, 1)

    expected = _COLORS - background[:, None]  # (B, colors, 3)
    expected_length = np.maximum(np.sqrt(np.square(expected).sum(axis=-1)), 1e-6)
    cosine = np.einsum("bkc,bc->bk", expected, offset) / (expected_length * length[:, None])
    color_index = np.where(visible & (cosine.max(axis=1) >= MIN_COLOR_COSINE), cosine.argmax(axis=1), -1)

    coverage = (difference @ (offset / np.square(length)[:, None])[..., None]).reshape(number, IMAGE_SIZE, IMAGE_SIZE)
    coverage = np.where(visible[:, None, None], coverage, 0)
    across = np.diff(coverage, axis=2, append=coverage[:, :, -1:])
    down = np.diff(coverage, axis=1, append=coverage[:, -1:])
    slope = np.sqrt(np.square(across) + np.square(down)).reshape(number, IMAGE_SIZE**2)
    sharpness = np.partition(slope, -SLOPE_PIXELS, axis=1)[:, -SLOPE_PIXELS:].mean(axis=1)

    coverage = np.where(coverage >= MIN_COVERAGE, coverage.clip(0, 1), 0)
    area = coverage.sum(axis=(1, 2))
    within = visible & (area >= MIN_AREA) & (area <= MAX_AREA)
    size_index = np.where(within, (area >= MIDDLE_AREA).astype(np.int64), -1)

    correlation = np.einsum("bp,sp->bs", _normalised_shape(coverage), _templates())
    best = correlation.argmax(axis=1) // (len(_templates()) // len(SHAPES))
    shape_index = np.where(within & (correlation.max(axis=1) >= MIN_SHAPE_CORRELATION), best, -1)
    return {
        "background": background_index,
        "color": color_index,
        "size": size_index,
        "shape": shape_index,
        "contrast": contrast,
        "sharpness": sharpness,
    }


def _average_neighbours(values: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels of a (B, H, W, C) array; the border is continued."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _normalised_shape(coverage: np.ndarray) -> np.ndarray:
    """
    Coverage (B, 32, 32), moved to its centre of mass, scaled to unit area, sampled on GRID x GRID, with mean 0 and
    length 1: shape (B, 289). The product of two such rows is their correlation.
    """
    number = len(coverage)
    area = np.maximum(coverage.sum(axis=(1, 2)), 1)
    position = np.arange(IMAGE_SIZE, dtype=np.float32)
    x = (coverage.sum(axis=1) @ position / area)[:, None] + np.sqrt(area)[:, None] * GRID
    y = (coverage.sum(axis=2) @ position / area)[:, None] + np.sqrt(area)[:, None] * GRID
    # Bilinear interpolation is separable: one sparse matrix for rows, one for columns. Outside there is no shape.
    rows = np.maximum(0, 1 - np.abs(y[..., None] - position))
    columns = np.maximum(0, 1 - np.abs(x[..., None] - position))
    sampled = (rows @ coverage @ columns.transpose(0, 2, 1)).reshape(number, len(GRID) ** 2)
    sampled = sampled - sampled.mean(axis=1, keepdims=True)
    return sampled / np.maximum(np.sqrt(np.square(sampled).sum(axis=1, keepdims=True)), 1e-6)


@cache
def _templates() -> np.ndarray:
    """The four shapes as `_normalised_shape` sees them, sharp and blurred, small and large: shape (16, 289)."""
    scenes, styles = [], []
    for shape in SHAPES:
        for size in SIZES:
            for style in ("sharp", "blurred"):
                scenes.append(Scene(size, "yellow", shape, "black"))
                styles.append(style)
    images = draw(scenes, styles, jitter=False)
    red = images[:, 0].numpy()
    level = BACKGROUNDS["black"]
    coverage = (red - level) / (COLORS["yellow"][0] - level)
    return _normalised_shape(np.where(coverage >= MIN_COVERAGE, coverage, 0))
