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

from collections import Counter

import pytest

from trl_diffusion.shapes import ALL_SCENES, ATTRIBUTES, Scene, load_dataset


def test_the_splits_share_no_combination_and_cover_all():
    train, test = load_dataset("train"), load_dataset("test")
    assert train.column_names == test.column_names == ["prompt"]
    assert len(train) == 108
    assert len(test) == 36
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    assert set(train["prompt"]) | set(test["prompt"]) == {scene.caption for scene in ALL_SCENES}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_is_in_every_split_equally_often(split, attribute):
    prompts = load_dataset(split)["prompt"]
    counts = Counter(vars(Scene.from_caption(prompt))[attribute] for prompt in prompts)
    values = ATTRIBUTES[attribute]
    assert counts == {value: len(prompts) / len(values) for value in values}


def test_the_splits_are_fixed():
    assert load_dataset("test")["prompt"][:2] == [
        "a small red circle on a white background",
        "a small red triangle on a black background",
    ]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="no split 'validation'; choose 'train' or 'test'"):
        load_dataset("validation")
