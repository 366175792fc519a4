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

"""Scores of several rewards, a batch at a time."""

import contextlib

import pytest
import torch

from trl_diffusion.rewards import RewardModel
from trl_diffusion.rewards.calls import Scorer


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def weekday(images, prompts, day, **columns):
    """Does not apply to the prompt "b"."""
    return [None if prompt == "b" else float(number) for prompt, number in zip(prompts, day, strict=True)]


def make_scorer(log, batch_size=2, retries=0):
    @contextlib.contextmanager
    def on_accelerator(reward):
        log.append(f"in {type(reward).__name__}")
        yield
        log.append("out")

    def agree(failure):
        log.append(failure)
        if failure is not None:
            raise failure

    return Scorer(batch_size, torch.device("cpu"), None, retries, on_accelerator, agree)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_do_not_depend_on_the_batch(batch_size):
    log = []
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 4, 4)
    scores = make_scorer(log, batch_size).score(
        {"bright": Brightness(), "day": weekday}, images, list("abcab"), {"day": [1, 2, 3, 4, 5]}
    )
    wanted = torch.tensor([[0, 0.25, 0.5, 0.75, 1], [1, torch.nan, 3, 4, torch.nan]])
    torch.testing.assert_close(scores.T, wanted, equal_nan=True)
    calls = -(-5 // batch_size)
    # Every process agrees on every call, and a reward is in its place for all of its batches.
    assert log == ["in Brightness", *[None] * calls, "out", "in function", *[None] * calls, "out"]


def test_no_reward_gives_no_column():
    assert make_scorer([]).score({}, torch.zeros(3, 3, 2, 2), ["a"] * 3, {}).shape == (3, 0)


def test_a_failure_is_handed_to_all():
    log = []

    def broken(images, prompts, **columns):
        raise OSError("no such disk")

    with pytest.raises(RuntimeError, match=r"'broken' failed: .*no such disk.*prompts \['a'\]"):
        make_scorer(log).score({"broken": broken}, torch.zeros(1, 3, 2, 2), ["a"], {})
    assert log[0] == "in function" and isinstance(log[1], RuntimeError)
