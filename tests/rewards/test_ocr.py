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

import functools

import pytest
from PIL import Image

from trl_diffusion.rewards.ocr import OCRReward, edit_distance, quoted_text


IMAGES = [Image.new("RGB", (2, 2)) for _ in range(3)]


def reader(*texts):
    def read(images):
        assert all(isinstance(image, Image.Image) for image in images)
        return list(texts[: len(images)])

    return read


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_edit_distance_against_the_definition():
    @functools.cache
    def by_definition(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(
            by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0])
        )

    words = ["", "a", "ab", "abc", "acb", "bca", "aabbcc", "cabbage", "bagage", "xyz"]
    assert all(edit_distance(a, b) == by_definition(a, b) for a in words for b in words)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open Now" above "Closed"', "open now"),
        ("a sign that says “Café”", "café"),
        ('lines "one\n two"', "one two"),
        ('empty "" then "full"', None),
        ('blank "  "', None),
        ("no quotes, it's a cat", None),
        ('only one "', None),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


def test_scores():
    reward = OCRReward(reader("OPEN  now", "open", "something else entirely"))
    prompts = ['"open now"', '"open now"', '"open now"']
    # 4 characters of 8 are missing; the third has more wrong than the target is long
    assert reward(IMAGES, prompts) == [1.0, 0.5, 0.0]


def test_only_images_with_a_target_are_read():
    reward = OCRReward(reader("hello"))
    assert reward(IMAGES, ["a cat", 'a "hallo"', "a dog"]) == [None, pytest.approx(0.8), None]
    assert OCRReward(reader())(IMAGES, ["a", "b", "c"]) == [None, None, None]


def test_bad_recognisers():
    with pytest.raises(TypeError, match="must be a callable"):
        OCRReward("tesseract")
    with pytest.raises(ValueError, match="returned 1 texts for 3 images"):
        OCRReward(reader("x"))(IMAGES, ['"a"', '"b"', '"c"'])
