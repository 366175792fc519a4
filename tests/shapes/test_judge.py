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

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from trl_diffusion.shapes import ALL_SCENES, ATTRIBUTES, STYLES, Scene, attribute_share, draw, judge, reference


def by_hand(
    shape: str, size: str, color: tuple[int, int, int], level: int, center: tuple[float, float]
) -> Image.Image:
    """A picture drawn by PIL at ten times the size, independently of `draw`, and reduced."""
    image = Image.new("RGB", (320, 320), (level, level, level))
    pen = ImageDraw.Draw(image)
    x, y = (10 * value for value in center)
    half = 10 * {"small": 4.0, "large": 7.5}[size]
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "square":
        pen.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        half *= 1.4
        pen.polygon([(x - half, y + 0.8 * half), (x + half, y + 0.8 * half), (x, y - 0.9 * half)], fill=color)
    else:
        half *= 1.3
        pen.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill=color)
        pen.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill=color)
    return image.resize((32, 32), Image.Resampling.BOX)


@pytest.mark.parametrize("style", STYLES)
def test_fresh_drawings_are_judged_right(style):
    scenes = [scene for scene in ALL_SCENES for _ in range(7)]
    images = draw(scenes, style, torch.Generator().manual_seed(11))
    measures = judge(images, [scene.caption for scene in scenes])
    for attribute in ATTRIBUTES:
        assert measures[attribute].mean() >= 0.97, attribute
    assert measures["all_attributes"].mean() >= 0.95


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
@pytest.mark.parametrize("size", ATTRIBUTES["size"])
def test_pictures_drawn_by_hand_are_judged_right(shape, size):
    colors = {
        "red": (200, 20, 30),
        "green": (30, 150, 40),
        "blue": (40, 50, 220),
        "yellow": (250, 230, 20),
        "purple": (170, 30, 190),
        "cyan": (20, 200, 210),
    }
    levels = {"white": 250, "gray": 120, "black": 5}
    images, prompts = [], []
    for color, rgb in colors.items():
        for background, level in levels.items():
            images.append(by_hand(shape, size, rgb, level, (15.3, 16.9)))
            prompts.append(Scene(size, color, shape, background).caption)
    measures = judge(images, prompts)
    assert measures["all_attributes"].tolist() == [1.0] * len(prompts)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("style", STYLES)
def test_a_wrong_word_is_found_in_its_attribute_only(attribute, style):
    wrong = []
    for scene in ALL_SCENES:
        values = ATTRIBUTES[attribute]
        other = values[(values.index(vars(scene)[attribute]) + 1) % len(values)]
        wrong.append(Scene(**{**vars(scene), attribute: other}).caption)
    measures = judge(draw(ALL_SCENES, style, torch.Generator().manual_seed(12)), wrong)
    for name in ATTRIBUTES:
        mean = measures[name].mean()
        assert mean <= 0.03 if name == attribute else mean >= 0.97, name
    np.testing.assert_allclose(measures["attributes"], np.mean([measures[name] for name in ATTRIBUTES], axis=0))
    assert measures["all_attributes"].mean() <= 0.03


def test_style_measures_against_values_known_by_hand():
    # A square of 8x8 whole pixels: the slope across each edge is 1 per pixel, and 1/(sigma*sqrt(2 pi)) once blurred.
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 0, 0), (12, 12, 20, 20))
    blurred = image.filter(ImageFilter.GaussianBlur(2.0))
    pale = Image.new("RGB", (32, 32), (0, 0, 0))
    pale.paste((102, 0, 0), (12, 12, 20, 20))
    measures = judge([image, blurred, pale], ["a small red square on a black background"] * 3)
    assert measures["contrast"][0] == pytest.approx(1 / math.sqrt(3), abs=1e-3)
    assert measures["contrast"][2] == pytest.approx(0.4 / math.sqrt(3), abs=1e-3)
    assert measures["sharpness"][0] == pytest.approx(1, abs=0.05)
    assert measures["sharpness"][2] == pytest.approx(1, abs=0.05)
    assert measures["sharpness"][1] == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)), abs=0.05)


def test_style_measures_tell_the_styles_apart():
    prompts = [scene.caption for scene in ALL_SCENES]
    sharp, blurred, pale = (judge(reference(prompts, style), prompts) for style in STYLES)
    assert pale["contrast"].mean() == pytest.approx(0.45 * sharp["contrast"].mean(), rel=0.02)
    assert pale["sharpness"].mean() == pytest.approx(sharp["sharpness"].mean(), rel=0.02)
    assert blurred["sharpness"].mean() < 0.5 * sharp["sharpness"].mean()


@pytest.mark.parametrize("kind", ["noise", "flat", "black", "white", "stripes", "two shapes", "gradient"])
def test_garbage_is_wrong_and_never_nan(kind):
    prompts = [scene.caption for scene in ALL_SCENES]
    number = len(prompts)
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        images = torch.rand(number, 3, 32, 32, generator=generator)
    elif kind == "stripes":
        images = (torch.arange(32) % 4 < 2).float().expand(number, 3, 32, 32)
    elif kind == "two shapes":
        left = draw([Scene("small", "red", "circle", "black")], jitter=False).roll(-8, dims=3)
        images = torch.maximum(left, left.roll(16, dims=3)).expand(number, 3, 32, 32)
    elif kind == "gradient":
        images = torch.linspace(0, 1, 32).expand(number, 3, 32, 32)
    else:
        images = torch.full((number, 3, 32, 32), {"flat": 0.5, "black": 0.0, "white": 1.0}[kind])
    measures = judge(images, prompts)
    for name, values in measures.items():
        assert np.isfinite(values).all(), name
    assert measures["shape"].max() == 0
    assert measures["all_attributes"].max() == 0


def test_pil_images_and_tensors_are_judged_alike():
    scenes = ALL_SCENES[::5]
    prompts = [scene.caption for scene in scenes]
    tensor = (draw(scenes, "blurred", torch.Generator().manual_seed(13)) * 255).round() / 255
    images = [Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for image in tensor]
    from_tensor, from_images = judge(tensor, prompts), judge(images, prompts)
    for name in from_tensor:
        np.testing.assert_allclose(from_tensor[name], from_images[name], atol=1e-5)
    enlarged = judge([image.resize((96, 96), Image.Resampling.BICUBIC) for image in images], prompts)
    assert enlarged["all_attributes"].mean() >= 0.95
    half = judge(tensor.half(), prompts)
    np.testing.assert_allclose(half["all_attributes"], from_tensor["all_attributes"])


def test_attribute_share_is_a_reward():
    scene = Scene("small", "red", "circle", "white")
    prompts = [scene.caption, "a large red circle on a white background", "a large blue cross on a black background"]
    images = draw([scene] * 3, "pale", torch.Generator().manual_seed(14))
    assert attribute_share(images=images, prompts=prompts) == [1.0, 0.75, 0.0]


def test_no_images():
    assert all(values.shape == (0,) for values in judge([], []).values())


def test_bad_input():
    images = torch.rand(2, 3, 32, 32)
    prompt = ALL_SCENES[0].caption
    with pytest.raises(ValueError, match="'a photo of a cat' is not a prompt of the embedded world"):
        judge(images, [prompt, "a photo of a cat"])
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        judge(images, [prompt])
    with pytest.raises(ValueError, match=r"\(2, 32, 32, 3\)"):
        judge(images.permute(0, 2, 3, 1), [prompt] * 2)
    with pytest.raises(ValueError, match="not finite"):
        judge(torch.full((1, 3, 32, 32), math.nan), [prompt])
