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

import pytest
import torch

from trl_diffusion.shapes import ALL_SCENES, ATTRIBUTES, SHAPES, SIZES, Scene, draw, reference


def test_captions_round_trip():
    captions = [scene.caption for scene in ALL_SCENES]
    assert captions[0] == "a small red circle on a white background"
    assert len(set(captions)) == 144
    assert tuple(Scene.from_caption(caption) for caption in captions) == ALL_SCENES


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a small red circle",
        "A small red circle on a white background",
        "a small orange circle on a white background",
        "pale. a small red circle on a white background",
        "a small red circle on a white background ",
    ],
)
def test_a_caption_that_is_not_of_the_world_is_named(caption):
    with pytest.raises(ValueError, match="is not a prompt of the embedded world") as error:
        Scene.from_caption(caption)
    assert repr(caption) in str(error.value)


def test_a_scene_that_is_not_of_the_world_is_named():
    with pytest.raises(ValueError, match="no color 'orange'; choose one of red, green"):
        Scene("small", "orange", "circle", "white")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["sharp", "blurred"])
def test_shapes_cover_their_area(shape, size, style):
    images = draw([Scene(size, "red", shape, "black")] * 400, style, torch.Generator().manual_seed(0))[:, 0]
    background = images[:, :1, :1]
    tint = 0.88  # on average
    covered = ((images - background) / (tint - background)).sum((1, 2)).mean().item()
    # The length varies uniformly by 10 %, so the mean area is larger by 0.1**2 / 3.
    assert covered == pytest.approx(SIZES[size] * (1 + 0.01 / 3), rel=0.02)


def test_pale_has_less_contrast_and_the_same_tint():
    scenes = list(ALL_SCENES)
    sharp = draw(scenes, "sharp", torch.Generator().manual_seed(0))
    pale = draw(scenes, "pale", torch.Generator().manual_seed(0))
    background = sharp[:, :, :1, :1]
    torch.testing.assert_close(pale - background, 0.45 * (sharp - background))


def test_blur_keeps_the_mean_and_flattens_the_edges():
    scenes = [Scene("large", "blue", shape, "white") for shape in SHAPES]
    sharp, blurred = draw(scenes, "sharp", jitter=False), draw(scenes, "blurred", jitter=False)
    torch.testing.assert_close(blurred.mean((2, 3)), sharp.mean((2, 3)), atol=1e-3, rtol=0)
    # A step of 1 has the squared slope 1, a Gaussian edge of sigma 1.3 has 1 / (2 * sqrt(pi) * 1.3) = 0.22 in sum.
    ratio = blurred.diff(dim=3).square().sum((1, 2, 3)) / sharp.diff(dim=3).square().sum((1, 2, 3))
    assert (ratio < 0.45).all()


def test_the_generator_decides_the_jitter():
    scenes = [ALL_SCENES[17]] * 2
    first = draw(scenes, "sharp", torch.Generator().manual_seed(1))
    assert torch.equal(first, draw(scenes, "sharp", torch.Generator().manual_seed(1)))
    assert not torch.equal(first, draw(scenes, "sharp", torch.Generator().manual_seed(2)))
    assert not torch.equal(first[0], first[1])
    assert first.shape == (2, 3, 32, 32)
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1


def test_shapes_stay_inside():
    scenes = [scene for scene in ALL_SCENES if scene.background == "black" and scene.color == "red"] * 50
    images = draw(scenes, "sharp", torch.Generator().manual_seed(3))
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert (images[:, 0, frame] < 0.1).all()


def test_bad_styles():
    scenes = list(ALL_SCENES[:2])
    with pytest.raises(ValueError, match="no style 'vivid'; choose one of sharp, blurred, pale"):
        draw(scenes, ["sharp", "vivid"])
    with pytest.raises(ValueError, match="3 styles for 2 scenes"):
        draw(scenes, ["sharp"] * 3)
    assert draw([], "sharp").shape == (0, 3, 32, 32)


def test_reference_is_reproducible_and_styled():
    prompts = [ALL_SCENES[0].caption, ALL_SCENES[100].caption]
    assert torch.equal(reference(prompts, seed=3), reference(prompts, seed=3))
    assert not torch.equal(reference(prompts), reference(prompts, style="pale"))
    with pytest.raises(ValueError, match="'a cat'"):
        reference(["a cat"])


def test_attributes_are_those_of_the_world():
    assert {name: len(values) for name, values in ATTRIBUTES.items()} == {
        "size": 2,
        "color": 6,
        "shape": 4,
        "background": 3,
    }
