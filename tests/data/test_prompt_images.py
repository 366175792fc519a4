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

"""A prompt with the image that it edits, as a key and from any form of image."""

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.data.prompt_images import PromptWithImage, from_json, key_of, texts_of, to_json, with_image


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "form",
    [
        lambda picture, folder: picture,
        lambda picture, folder: np.asarray(picture),
        lambda picture, folder: np.asarray(picture) / 255,
        lambda picture, folder: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        lambda picture, folder: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255,
        lambda picture, folder: saved(picture, folder / "picture.png"),
        lambda picture, folder: {"bytes": saved(picture, folder / "picture.png").read_bytes(), "path": None},
        lambda picture, folder: picture.convert("RGBA"),
    ],
)
def test_an_image_may_be_given_in_any_form(form, tmp_path):
    assert np.array_equal(with_image("a", form(PICTURE, tmp_path)).open(), PICTURE)


def saved(picture, path):
    picture.save(path)
    return path


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, ValueError, "'a cat' has no image. Give a PIL.Image, a path"),
        (3, TypeError, "'a cat' has an image of type int"),
        (
            "nowhere.png",
            ValueError,
            "condition_image 'nowhere.png' of the prompt 'a cat' cannot be read: No such file",
        ),
        (np.zeros((4, 4)), ValueError, r"'a cat' has an image of shape \(4, 4\)"),
        (np.full((4, 4, 3), 255.0), ValueError, "values from 255 to 255. Floating point must lie in"),
        (
            {"bytes": b"none", "path": None},
            ValueError,
            "condition_image of the prompt 'a cat' cannot be read: Unidenti",
        ),
        (Image.new("RGBA", (4, 4)), ValueError, "The prompt 'a cat' has an image with transparent pixels"),
        (Image.new("F", (4, 4)), ValueError, "The prompt 'a cat' has an image of mode 'F'"),
    ],
)
def test_an_image_that_cannot_be_used_names_its_prompt(image, error, message):
    with pytest.raises(error, match=message):
        with_image("a cat", image).open()


def test_prompts_are_equal_where_text_and_image_are():
    red, blue = PICTURE, PICTURE.rotate(90)
    prompts = [with_image("a", red), with_image("a", red.copy()), with_image("a", blue), with_image("b", red), "a"]
    assert prompts[0] == prompts[1] and len(set(prompts)) == 4


def test_json_keeps_what_they_are_known_by():
    prompts = [with_image("a", PICTURE), "b"]
    again = from_json(to_json(prompts))
    assert again == prompts == [key_of(prompt) for prompt in prompts]
    assert texts_of(again) == ["a", "b"]
    assert isinstance(again[0], PromptWithImage) and again[0].image is None
    with pytest.raises(ValueError, match="The prompt 'a' has no image any more"):
        again[0].open()


def test_a_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    PICTURE.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        with_image("a", tmp_path / "turned.png").open(), PICTURE.transpose(Image.Transpose.ROTATE_270)
    )
