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

"""Calling a reward: what it gets, and that every wrong answer is named."""

import functools
import math

import pytest
import torch
from PIL import Image

from trl_diffusion.rewards import RewardModel, check_reward, load_reward, load_rewards, reward_name, score_images


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def length(images, prompts, **columns):
    return [float(len(prompt)) for prompt in prompts]


class Brightness(RewardModel):
    name = "brightness"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def score(self, images, prompts):
        return self.weight * images.mean(dim=(1, 2, 3))


def test_a_callable_gets_pictures_prompts_and_columns():
    def reward(images, prompts, target):
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
        assert images[0].getpixel((0, 0)) == tuple((IMAGES[0, :, 0, 0] * 255).round().int().tolist())
        assert prompts == PROMPTS and target == [1, 2, 3]
        return [0.5, None, float("nan")]

    scores = score_images(reward, IMAGES, PROMPTS, {"target": [1, 2, 3]})
    assert scores[0] == 0.5 and scores[1:].isnan().all() and scores.dtype == torch.float32


def test_a_model_is_frozen_and_differentiable():
    model = load_reward(Brightness())
    assert not model.training and not model.weight.requires_grad
    images = IMAGES.clone().requires_grad_()
    model(images, PROMPTS).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 1 / (3 * 64)))
    assert torch.allclose(score_images(model, IMAGES, PROMPTS), IMAGES.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "'reward' returned 2 scores for 3 images"),
        ("good", TypeError, "'reward' returned 'good'"),
        (["good", "bad", "good"], TypeError, "'reward' returned 'good' for the prompt 'a'"),
        ([0.0, math.inf, 0.0], ValueError, "'reward' returned inf for the prompt 'b'"),
        (1.0, TypeError, "'reward' returned 1.0 for 3 images"),
        (None, TypeError, "'reward' returned None"),
        ([[1.0], [2.0], [3.0]], TypeError, r"returned \[1.0\] for the prompt 'a'"),
    ],
)
def test_wrong_answers(answer, error, message):
    def reward(images, prompts, **columns):
        return answer

    with pytest.raises(error, match=message):
        score_images(reward, IMAGES, PROMPTS)


def test_an_exception_names_reward_and_prompt():
    def reward(images, prompts, **columns):
        raise ZeroDivisionError("no")

    with pytest.raises(RuntimeError, match="'reward' raised ZeroDivisionError: no.*'a'") as caught:
        score_images(reward, IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_names():
    assert reward_name(length) == "length"
    assert reward_name(functools.partial(length, scale=2)) == "length"
    assert reward_name(Brightness()) == "brightness"
    assert list(load_rewards([length, length, Brightness()])) == ["length", "length_2", "brightness"]


def test_loading():
    assert load_reward("trl_diffusion.shapes.attribute_share").__name__ == "attribute_share"
    with pytest.raises(ValueError, match="Unknown reward 'clipp'.*'shapes-clip'"):
        check_reward("clipp")
    with pytest.raises(ValueError, match="there is no 'nothing' in the module 'trl_diffusion.shapes'"):
        load_reward("trl_diffusion.shapes.nothing")
    with pytest.raises(TypeError, match="got 3 of type int"):
        check_reward(3)
