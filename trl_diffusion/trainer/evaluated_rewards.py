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

"""What an evaluation says of its images: rewards that score them as they are, and the sum of those that are trained."""

from dataclasses import dataclass
from typing import Any

import torch

from ..rewards import Reward, scores_generations
from ..rewards.calls import Scorer


@dataclass
class EvaluatedRewards:
    """
    The rewards of a trainer in its evaluations, without those that score whole generations.

    Args:
        trained (`dict[str, Reward]` of length R): by name.
        weights (`torch.Tensor` of shape `(R,)`): theirs in the sum.
        watched (`dict[str, Reward]`): scored besides.
    """

    trained: dict[str, Reward]
    weights: torch.Tensor
    watched: dict[str, Reward]

    @property
    def _single(self) -> dict[str, Reward]:
        return {name: reward for name, reward in self.trained.items() if not scores_generations(reward)}

    @property
    def _means(self) -> list[tuple[str, str]]:
        """The names of rewards and of the metrics that are their means; what is trained and watched is there twice."""
        single = [(name, f"rewards/{name}/mean") for name in self._single]
        return single + [(name, f"watch/{name}/mean") for name in self.watched]

    @property
    def metric_of(self) -> dict[str, str]:
        """By the name of a reward, the name of the metric that is its mean."""
        return dict(self._means)

    @property
    def metrics(self) -> list[str]:
        """The names of what [`EvaluatedRewards.scores`] gives."""
        return [*(["reward"] if self._single else []), *(metric for _, metric in self._means)]

    def scores(
        self, scorer: Scorer, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, torch.Tensor]:
        """What an evaluation averages over its images, `(B,)` by the name of the metric; see [`Scorer.score`]."""
        single = self._single
        scores = scorer.score(single, images, prompts, columns)
        watched = scorer.score(self.watched, images, prompts, columns)
        weights = [weight for name, weight in zip(self.trained, self.weights, strict=True) if name in single]
        sums = [(scores * scores.new_tensor(weights)).nansum(1)] if single else []
        return dict(zip(self.metrics, [*sums, *scores.unbind(1), *watched.unbind(1)], strict=True))
