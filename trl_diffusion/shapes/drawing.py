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

"""The pictures of the embedded world, drawn procedurally: one flat shape on a flat background, 32x32 pixels."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


IMAGE_SIZE = 32
SUPERSAMPLING = 4

# Areas in pixels, the same for every shape, so that "size" cannot be told from the shape or the other way round.
SIZES = {"small": 64.0, "large": 220.0}
COLORS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.68, 0.18),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.94, 0.88, 0.10),
    "purple": (0.72, 0.12, 0.82),
    "cyan": (0.10, 0.80, 0.86),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": 0.96, "gray": 0.50, "black": 0.04}
STYLES = ("sharp", "blurred", "pale")

# Every attribute a caption names, with the values it can take.
ATTRIBUTES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
}

PALE_CONTRAST = 0.45  # of the full contrast
SHARP_SIGMA = 0.5  # pixels, of the pictures that are not blurred: edges as an optical system draws them
BLUR_SIGMA = 1.6  # pixels
SIZE_JITTER = 0.04  # of the length
PLACE_JITTER = 0.8  # pixels
TINT_JITTER = 0.05  # of the full range, each channel
BACKGROUND_JITTER = 0.03  # of the full range, all channels alike

_CAPTION = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) on a ({'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class Scene:
    """What a picture of the world shows, as far as captions tell: everything but the style and the jitter."""

    size: str
    color: str
    shape: str
    background: str

    def __post_init__(self):
        for attribute, values in ATTRIBUTES.items():
            value = vars(self)[attribute]
            if value not in values:
                raise ValueError(f"The world has no {attribute} {value!r}; choose one of {', '.join(values)}.")

    @property
    def caption(self) -> str:
        """The scene in words, e.g. "a small red circle on a white background"."""
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"

    @classmethod
    def from_caption(cls, caption: str) -> "Scene":
        """
        The scene that a caption describes, the inverse of [`Scene.caption`].

        Raises:
            `ValueError`: If `caption` is not a caption of the world.
        """
        match = _CAPTION.fullmatch(caption)
        if match is None:
            raise ValueError(
                f"{caption!r} is not a prompt of the embedded world. Its prompts read 'a SIZE COLOR SHAPE on a "
                f"BACKGROUND background', with size in {tuple(SIZES)}, color in {tuple(COLORS)}, shape in {SHAPES} "
                f"and background in {tuple(BACKGROUNDS)}; `trl_diffusion.shapes.load_dataset` gives them."
            )
        return cls(*match.groups())


ALL_SCENES = tuple(
    Scene(size, color, shape, background)
    for size, color, shape, background in itertools.product(SIZES, COLORS, SHAPES, BACKGROUNDS)
)


def draw(
    scenes: Sequence[Scene],
    styles: str | Sequence[str] = "sharp",
    generator: torch.Generator | None = None,
    jitter: bool = True,
) -> Tensor:
    """
    Draws one picture per scene.

    Shapes are rasterised with 4x4 samples a pixel. Place, size, tint and background level vary from picture to
    picture. "blurred" pictures are convolved with a Gaussian of 1.6 pixels, all others with one of 0.5; "pale" ones have 0.45
    of the contrast of shape against background.

    Args:
        scenes (`Sequence[Scene]`):
            What to draw.
        styles (`str` or `Sequence[str]`, *optional*, defaults to `"sharp"`):
            One of "sharp", "blurred" and "pale", for all pictures or one for each.
        generator (`torch.Generator`, *optional*):
            CPU generator of the jitter.
        jitter (`bool`, *optional*, defaults to `True`):
            `False` draws the shape in the middle, with the nominal size and tint.

    Returns:
        `Tensor`: float32, shape (len(scenes), 3, 32, 32), values in [0, 1].

    Raises:
        `ValueError`: If a style is unknown or the number of styles differs from the number of scenes.
    """
    scenes = list(scenes)
    styles = [styles] * len(scenes) if isinstance(styles, str) else list(styles)
    if len(styles) != len(scenes):
        raise ValueError(f"Got {len(styles)} styles for {len(scenes)} scenes; pass one style, or one per scene.")
    for style in styles:
        if style not in STYLES:
            raise ValueError(f"The world has no style {style!r}; choose one of {', '.join(STYLES)}.")
    if not scenes:
        return torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)

    number = len(scenes)
    # Seven uniform numbers in [-1, 1] per picture: size, place (2), tint (3), background.
    noise = torch.rand(number, 7, generator=generator) * 2 - 1 if jitter else torch.zeros(number, 7)
    area = torch.tensor([SIZES[scene.size] for scene in scenes])
    scale = area.sqrt() * (1 + SIZE_JITTER * noise[:, 0])  # side of the square of that area
    reach = scale * torch.tensor([_REACH[scene.shape] for scene in scenes])
    freedom = (IMAGE_SIZE / 2 - 1 - reach).clamp(0, PLACE_JITTER)
    center = IMAGE_SIZE / 2 + freedom[:, None] * noise[:, 1:3]

    coverage = _rasterise([SHAPES.index(scene.shape) for scene in scenes], center, scale)
    color = torch.tensor([COLORS[scene.color] for scene in scenes]) + TINT_JITTER * noise[:, 3:6]
    level = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) + BACKGROUND_JITTER * noise[:, 6]
    contrast = torch.tensor([PALE_CONTRAST if style == "pale" else 1.0 for style in styles])
    level = level[:, None, None, None]
    offset = color[:, :, None, None].clamp(0, 1) - level
    images = level + contrast[:, None, None, None] * coverage[:, None] * offset

    blurred = torch.tensor([style == "blurred" for style in styles])
    for rows, sigma in ((blurred, BLUR_SIGMA), (~blurred, SHARP_SIGMA)):
        if rows.any():
            images[rows] = _blur(images[rows], sigma)
    return images.clamp(0, 1)


# Half the extent of a shape, in sides of the square of equal area, from the centre of its bounding box.
_TRIANGLE_SIDE = 2 / 3**0.25
_CROSS_LENGTH = math.sqrt(9 / 5)
_REACH = {
    "circle": 1 / math.sqrt(math.pi),
    "square": 0.5,
    "triangle": _TRIANGLE_SIDE / 2,
    "cross": _CROSS_LENGTH / 2,
}


def _rasterise(shapes: Sequence[int], center: Tensor, scale: Tensor) -> Tensor:
    """Coverage of every pixel, shape (B, 32, 32), in [0, 1]; `scale` is the side of the square of equal area."""
    samples = (torch.arange(IMAGE_SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x = (samples[None, None, :] - center[:, 0, None, None]) / scale[:, None, None]
    y = (samples[None, :, None] - center[:, 1, None, None]) / scale[:, None, None]
    shapes = torch.tensor(shapes)
    inside = torch.zeros(len(shapes), len(samples), len(samples))
    for index, shape in enumerate(SHAPES):
        rows = shapes == index
        if rows.any():
            inside[rows] = _INSIDE[shape](x[rows], y[rows]).float()
    return functional.avg_pool2d(inside[:, None], SUPERSAMPLING)[:, 0]


def _inside_circle(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y.square() <= 1 / math.pi


def _inside_square(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() <= 0.5) & (y.abs() <= 0.5)


def _inside_triangle(x: Tensor, y: Tensor) -> Tensor:
    # Equilateral, tip up (y grows downwards), centred on its bounding box.
    height = _TRIANGLE_SIDE * math.sqrt(3) / 2
    return (y <= height / 2) & (x.abs() <= (y + height / 2) / math.sqrt(3))


def _inside_cross(x: Tensor, y: Tensor) -> Tensor:
    half, arm = _CROSS_LENGTH / 2, _CROSS_LENGTH / 6
    return ((x.abs() <= half) & (y.abs() <= arm)) | ((x.abs() <= arm) & (y.abs() <= half))


_INSIDE = {
    "circle": _inside_circle,
    "square": _inside_square,
    "triangle": _inside_triangle,
    "cross": _inside_cross,
}


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Convolves (B, C, H, W) images with a Gaussian of `sigma` pixels; the border is continued."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    images = functional.pad(images, (radius, radius, radius, radius), mode="replicate")
    images = functional.conv2d(images, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(images, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
