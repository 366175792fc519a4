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

"""What an evaluation says of its images, on a scorer that works alone."""

import contextlib

import torch

from trl_diffusion.rewards.base import BlackBoxReward
from trl_diffusion.rewards.calls import Scorer, raise_failure
from trl_diffusion.trainer.evaluated_rewards import EvaluatedRewards


class Vote(BlackBoxReward):
    """As people would: of whole generations, in a training alone."""

    scores_generations = True

    def __call__(self, images, prompts, **columns):
        raise AssertionError("nobody is asked in an evaluation")


def length(images, prompts, **columns):
    return [float(len(prompt)) for prompt in prompts]


def of_cats(images, prompts, **columns):
    """Applies to cats alone."""
    return [1.0 if "cat" in prompt else None for prompt in prompts]


def test_scores_by_hand():
    evaluated = EvaluatedRewards(
        {"length": length, "vote": Vote(), "cats": of_cats}, torch.tensor([0.5, 100.0, 2.0]), {"length": length}
    )
    scorer = Scorer(2, torch.device("cpu"), None, 0, lambda reward: contextlib.nullcontext(), raise_failure)
    scores = evaluated.scores(scorer, torch.zeros(3, 3, 8, 8), ["cat", "dogs", "a cat"], {})
    assert list(scores) == evaluated.metrics
    expected = {
        "reward": [0.5 * 3 + 2, 0.5 * 4, 0.5 * 5 + 2],
        "rewards/length/mean": [3, 4, 5],
        "rewards/cats/mean": [1, torch.nan, 1],
        "watch/length/mean": [3, 4, 5],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    assert evaluated.metric_of == {"length": "watch/length/mean", "cats": "rewards/cats/mean"}


def test_rewards_of_generations_alone_have_no_sum():
    evaluated = EvaluatedRewards({"vote": Vote()}, torch.ones(1), {"length": length})
    assert evaluated.metrics == ["watch/length/mean"]
