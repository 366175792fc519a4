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

"""Preprocessing against PIL and the processors of transformers, and the one place that checks images."""

import numpy as np
import pytest
import torch
from campaigns import resizing
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trl_diffusion import shapes
from trl_diffusion.rewards import load_reward
from trl_diffusion.rewards.preprocessing import (
    center_crop,
    check_images,
    check_inputs,
    clip_pixels,
    resize,
    resize_like_pil,
    short_side_to,
    to_rgb,
    to_tensor,
)


CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def picture(height, width, seed=0):
    """Smooth areas and hard edges from black to white, where resampling over- and undershoots."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 2] = np.where(np.indices((height // 2, width))[1][..., None] % 8 < 4, 0, 255)
    return Image.fromarray(image)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((64, 48), (20, 15)),
        ((30, 50), (90, 77)),
        ((61, 61), (28, 61)),
        ((33, 70), (33, 28)),
        ((24, 24), (24, 24)),
        ((84, 31), (56, 22)),  # the height loses more than twice as many pixels: the columns come first
        ((57, 11), (8, 23)),
        ((50, 40), (30, 30)),
    ],
)
def test_resize_like_pil(size, target):
    image = picture(*size)
    ours = resize_like_pil(to_tensor([image]), *target)
    assert torch.equal(ours, to_tensor([image.resize(target[::-1], Image.Resampling.BICUBIC)]))
    # What a gradient passes through has the same values.
    assert torch.equal(resize_like_pil(to_tensor([image]).requires_grad_(), *target), ours)


def test_rewards_are_those_of_pictures_that_pillow_resized():
    """The campaign of `make campaigns` in short: two clamped passes of PyTorch's would move them."""
    images, captions = resizing.drawings(8)
    reward = load_reward(f"clip:{shapes.clip_path()}", dtype=torch.float32)
    expected = resizing.scores(reward, images, captions, resizing.pillow)
    assert torch.equal(reward.score(images, captions).double(), expected)
    moves = resizing.scores(reward, images, captions, resizing.clamped) - expected
    assert moves.abs().max() > 1e-3 * expected.std()


def test_one_pass_without_clamp_would_not_do():
    image = picture(64, 48)
    pil = to_tensor([image.resize((15, 20), Image.Resampling.BICUBIC)])
    assert (resize(to_tensor([image]), 20, 15) - pil).abs().max() > 5 / 255


@pytest.mark.parametrize("size", [(64, 48), (30, 51), (28, 28), (29, 90), (512, 333)])
def test_clip_pixels_are_those_of_the_processor_of_transformers(size):
    image = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    official = torch.as_tensor(np.array(processor(image)["pixel_values"]))
    ours = clip_pixels(to_tensor([image]), 28, rounding="transformers")
    assert ours.shape == official.shape == (1, 3, 28, 28)
    assert ((ours - official).abs() * CLIP_STD).max() <= 1e-6


@pytest.mark.parametrize(("extent", "torchvision", "transformers"), [(31, 2, 1), (29, 0, 0), (33, 2, 2), (30, 1, 1)])
def test_center_crop_offsets(extent, torchvision, transformers):
    columns = torch.arange(extent).expand(1, 1, extent, extent)
    # round half to even, and rounding down: 3 / 2 and 1 / 2 tell them apart
    assert center_crop(columns, 28, "torchvision")[0, 0, 0, 0] == torchvision
    assert center_crop(columns, 28, "transformers")[0, 0, 0, 0] == transformers
    assert center_crop(columns.mT, 28, "torchvision")[0, 0, 0, 0] == torchvision


def test_short_side():
    assert short_side_to(117, 176, 56) == (56, 84)
    assert short_side_to(168, 112, 56) == (84, 56)
    assert short_side_to(10, 10, 56) == (56, 56)


def test_gradient_passes_the_rounding():
    images = torch.rand(1, 3, 20, 30, requires_grad=True)
    weights = torch.randn(1, 3, 11, 13)
    # In the middle of the range nothing is clamped, and the two passes are one linear map.
    (gradient,) = torch.autograd.grad((resize_like_pil(images * 0.2 + 0.4, 11, 13) * weights).sum(), images)
    (expected,) = torch.autograd.grad((resize(images * 0.2 + 0.4, 11, 13) * weights).sum(), images)
    torch.testing.assert_close(gradient, expected)


def test_preprocessing_is_differentiable_and_takes_bfloat16():
    images = torch.rand(1, 3, 20, 30, dtype=torch.bfloat16, requires_grad=True)
    pixels = clip_pixels(images, 14, rounding="torchvision")
    assert pixels.dtype == torch.float32
    pixels.sum().backward()
    assert images.grad.dtype == torch.bfloat16 and images.grad.abs().sum() > 0


def test_pictures_of_other_modes():
    grey = Image.new("L", (2, 2), 100)
    assert to_rgb(grey).getpixel((0, 0)) == (100, 100, 100)
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    assert [to_rgb(rgba).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert to_rgb(rgba.convert("P")).mode == "RGB"
    assert to_tensor([grey, grey]).shape == (2, 3, 2, 2)
    with pytest.raises(TypeError, match="Expected a PIL image, got str"):
        to_rgb("image.png")
    with pytest.raises(ValueError, match="no images"):
        to_tensor([])
    with pytest.raises(ValueError, match=r"one size, got \[\(2, 2\), \(3, 2\)\]"):
        to_tensor([grey, Image.new("RGB", (3, 2))])


def with_pixel(value):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 0, 2, 2] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(1, 4, 8, 8), ValueError, r"RGB.*\(1, 4, 8, 8\).*alpha"),
        (torch.rand(1, 1, 8, 8), ValueError, r"RGB.*\(1, 1, 8, 8\).*greyscale"),
        (torch.rand(3, 8, 8), ValueError, r"\(3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), ValueError, "no images"),
        (torch.rand(1, 3, 0, 8), ValueError, "no images"),
        (with_pixel(float("nan")), ValueError, r"nan to nan \(images \[1\] of 2\).*diverged"),
        (with_pixel(float("inf")), ValueError, r"images \[1\] of 2"),
        (with_pixel(-1.0), ValueError, r"-1.0 to 0.5"),
        (torch.rand(1, 3, 8, 8) * 255, ValueError, "8-bit values by x / 255"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8.*to_tensor"),
        ([Image.new("RGB", (2, 2))], TypeError, "got list.*to_tensor"),
    ],
)
def test_images_that_cannot_be_scored(images, error, message):
    with pytest.raises(error, match=message):
        check_images(images)


def test_prompts_that_cannot_be_scored():
    images = torch.rand(2, 3, 8, 8)
    check_inputs(images, ["a", ""])
    check_images(images * 1.0005)  # rounding
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        check_inputs(images, ["a"])
    for prompts in ("ab", ["a", None]):
        with pytest.raises(TypeError, match="list of strings"):
            check_inputs(images, prompts)
