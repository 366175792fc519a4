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

"""Rewards as people write them: each way of writing one gets the right thing, or is refused with its signature."""

import asyncio
import functools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.rewards import BlackBoxReward, RewardModel, check_reward, reward_name, score_images
from trl_diffusion.rewards.base import RewardOutOfMemoryError


IMAGES = torch.stack([torch.full((3, 4, 4), level) for level in (0.0, 0.2, 1.0)])
PROMPTS = ["a", "bb", "ccc"]
COLUMNS = {"target": [1, 2, 3], "texts": ["x", "y", "z"]}
# A hundred times the length of the prompt, and the grey level: swapped arguments cannot give these.
EXPECTED = [100.0, 251.0, 555.0]


def rated(images, prompts):
    assert all(isinstance(image, Image.Image) for image in images)
    return [100.0 * len(prompt) + image.getpixel((0, 0))[0] for image, prompt in zip(images, prompts, strict=True)]


def swapped(prompts, images, **columns):
    assert columns == COLUMNS
    return rated(images, prompts)


def keyword_only(*, prompts, images, target):
    assert target == [1, 2, 3]
    return rated(images, prompts)


def without_columns(images, prompts):
    return rated(images, prompts)


def positional(pictures, captions):
    return rated(pictures, captions)


def half_named(images, captions, scale=1.0):
    assert scale == 1.0
    return rated(images, captions)


def positional_only(prompts, images, /):
    return rated(images, prompts)


def all_positional(*arguments):
    return rated(*arguments)


def wrapper(*args, **kwargs):
    return swapped(*args, **kwargs)


async def asynchronous(prompts, images, **columns):
    await asyncio.sleep(0)
    return rated(images, prompts)


def one_awaitable_an_image(images, prompts):
    async def one(image, prompt):
        begun.append(prompt)
        while len(begun) < 3:  # all three are on their way, or none gets through
            await asyncio.sleep(0)
        return rated([image], [prompt])[0]

    begun = []
    return [one(*pair) for pair in zip(images, prompts, strict=True)]


class Judge:
    def __call__(self, prompts, images):
        return rated(images, prompts)

    def judged(self, prompts, images, target):
        return self(prompts, images)


class AsynchronousJudge:
    async def __call__(self, prompts, images):
        return rated(images, prompts)


class Module(torch.nn.Module):
    def forward(self, captions, images):
        return rated(images, captions)


@pytest.mark.parametrize(
    "reward",
    [
        swapped, keyword_only, without_columns, positional, half_named, positional_only, all_positional, wrapper,
        asynchronous, one_awaitable_an_image, Judge(), Judge().judged, AsynchronousJudge(), Module(),
        functools.partial(half_named, scale=1.0), functools.partial(asynchronous, extra=1),
        lambda prompts, images, **columns: rated(images, prompts),
        lambda pictures, captions: rated(pictures, captions),
    ],
)  # fmt: skip
def test_every_way_of_writing_one(reward):
    check_reward(reward, COLUMNS)
    assert score_images(reward, IMAGES, PROMPTS, COLUMNS).tolist() == EXPECTED


def test_a_function_may_leave_out_what_it_does_not_need():
    assert score_images(lambda images: [len(images)] * 3, IMAGES, PROMPTS, COLUMNS).tolist() == [3, 3, 3]
    assert score_images(lambda prompts: map(len, prompts), IMAGES, PROMPTS, COLUMNS).tolist() == [1, 2, 3]
    # A column's name is stronger than the place: `texts` is the column, and `pictures` are the images.
    assert score_images(lambda pictures, texts: map(ord, texts), IMAGES, PROMPTS, COLUMNS).tolist() == [120, 121, 122]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts, style: [], r"<lambda>\(images, prompts, style\).*'style' is neither.*\['target', 'texts'\]"),
        (lambda a, b, c: [], r"<lambda>\(a, b, c\) cannot be called: 'c'"),
        (lambda *, a, b: [], r"\(\*, a, b\) cannot be called: 'a'"),
        (lambda: [], r"<lambda>\(\) takes neither images nor prompts"),
        (lambda target=None: [], "takes neither images nor prompts"),
        (functools.partial(lambda images, prompts, a, b: [], b=1), "cannot be called: 'a'"),
        (Judge, r"is a class. Pass an instance, Judge\("),
    ],
)  # fmt: skip
def test_functions_that_cannot_be_called(reward, message):
    with pytest.raises(TypeError, match=message):
        check_reward(reward, COLUMNS)


def test_asynchronous_rewards_share_one_loop_that_a_notebook_does_not_disturb():
    loops = []

    async def reward(images, prompts):
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    async def notebook():
        return score_images(reward, IMAGES, PROMPTS)

    asyncio.run(notebook())
    score_images(reward, IMAGES, PROMPTS)
    thread = threading.Thread(target=score_images, args=(reward, IMAGES, PROMPTS))
    thread.start()
    thread.join()
    assert len(loops) == 3 and len(set(loops)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, None, 2], (0.5, float("nan"), 2.0), (score for score in (0.5, None, 2)), iter([0.5, None, 2]),
        np.array([0.5, np.nan, 2]), np.array([0.5, None, 2], dtype=object), np.array([[0.5], [np.nan], [2]]),
        torch.tensor([0.5, torch.nan, 2]), torch.tensor([[0.5], [torch.nan], [2]], requires_grad=True),
        torch.tensor([0.5, torch.nan, 2], dtype=torch.bfloat16),
        [torch.tensor(0.5), None, torch.tensor([2])], [np.float32(0.5), None, np.array([2])],
        {"a": 0.5, "b": None, "c": 2}.values(),
    ],
    ids=lambda answer: f"{type(answer).__module__}.{type(answer).__name__}",
)  # fmt: skip
def test_kinds_of_answers(answer):
    scores = score_images(lambda images, prompts: answer, IMAGES, PROMPTS)
    assert scores[0] == 0.5 and scores[1].isnan() and scores[2] == 2 and scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"a": 1.0, "b": 2.0, "c": 3.0}, r"returned \{'a': 1.0.*must return a list with one float or None an image"),
        ({1.0, 2.0, 3.0}, "must return a list"),
        (torch.zeros(3, 2), r"of shape \(3, 2\)"),
        (np.float64(1), "must return a list"),
        (b"abc", "must return a list"),
        ([[1.0, 2.0]] * 3, r"returned \[1.0, 2.0\] for the prompt 'a'"),
        ([1j, 1j, 1j], "returned 1j"),
    ],
    ids=str,
)
def test_answers_that_are_refused(answer, message):
    with pytest.raises(TypeError, match=message):
        score_images(lambda images, prompts: answer, IMAGES, PROMPTS)


def test_columns_that_collide():
    with pytest.raises(ValueError, match="A column is called 'images'.*Rename it"):
        score_images(swapped, IMAGES, PROMPTS, {"images": [1, 2, 3]})


def test_a_reward_without_a_name_has_that_of_its_class():
    class Nameless(RewardModel):
        def score(self, images, prompts):
            return images.mean(dim=(1, 2, 3), keepdim=False)[:, None]

    class Child(Nameless):
        pass

    class Box(BlackBoxReward):
        def __call__(self, images, prompts):
            return [1.0] * len(images)

    assert [reward_name(reward) for reward in (Nameless(), Child(), Box())] == ["Nameless", "Child", "Box"]
    assert score_images(Nameless(), IMAGES, PROMPTS).tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_a_model_that_takes_prompts_first_is_refused():
    class Swapped(RewardModel):
        def score(self, prompts, images):
            return images.mean(dim=(1, 2, 3))

    with pytest.raises(TypeError, match=r"Swapped.score takes prompts before images"):
        check_reward(Swapped())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    def reward(images, prompts):
        raise error

    with pytest.raises(
        RewardOutOfMemoryError, match="ran out of memory on 3 images.*rollout_batch_size.*offload_frozen"
    ):
        score_images(reward, IMAGES, PROMPTS)
