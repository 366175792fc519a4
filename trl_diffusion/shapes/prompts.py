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

"""The prompts of the embedded world as datasets."""

from datasets import Dataset

from .drawing import ALL_SCENES, ATTRIBUTES, Scene


def load_dataset(split: str = "train") -> Dataset:
    """
    The prompts of the embedded world, one column "prompt".

    Of the 144 combinations of size, colour, shape and background, every fourth is held out, in a pattern that gives
    each single value its share of both splits: 108 prompts in "train", 36 in "test", none in both.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            "train" or "test".

    Raises:
        `ValueError`: If `split` is neither.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The embedded world has no split {split!r}; choose 'train' or 'test'.")
    return Dataset.from_dict(
        {"prompt": [scene.caption for scene in ALL_SCENES if _is_held_out(scene) == (split == "test")]}
    )


def _is_held_out(scene: Scene) -> bool:
    # A Latin pattern: the other three attributes say which shape of the four is held out, so every value of every
    # attribute is held out equally often.
    size, color, shape, background = (values.index(vars(scene)[name]) for name, values in ATTRIBUTES.items())
    return (2 * size + color + shape + background) % 4 == 0
