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

"""How often images are better than others for the same prompts."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from .intervals import by_prompt
from .reward_metric import PictureMetric


class WinRate(PictureMetric):
    """
    Share of the images that a reward prefers to those of a baseline for the same prompts, with a confidence interval.

    `compute(images=..., baseline_images=..., prompts=...)` returns, for the reward "hpsv2":

    - `hpsv2_win_rate` (`float`): a tie counts as half a win; pairs to which the reward does not apply are left out;
    - `hpsv2_win_rate_low`, `hpsv2_win_rate_high` (`float`): Wilson's interval. Several pairs of one prompt count as
    one observation, so the interval errs to the wide side there;
    - `hpsv2_wins`, `hpsv2_ties`, `hpsv2_losses` (`int`).

    `confidence` of `compute` is 0.95 unless given. See [`PictureMetric`] for the arguments.
    """

    _description = "Win rate of images over baseline images for the same prompts under a reward model."
    _inputs_description = """
    images, baseline_images (`list[PIL.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` in [0, 1]): pairs of images.
    prompts (`list[str]`): one a pair.
"""
    picture_inputs = ("images", "baseline_images")

    def _compute(
        self, images: list[str], baseline_images: list[str], prompts: list[str], confidence: float = 0.95
    ) -> dict[str, Any]:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
        difference = self._scores(images, prompts) - self._scores(baseline_images, prompts)
        return {f"{self.name}_{name}": value for name, value in win_rate(difference, prompts, confidence).items()}


def win_rate(difference: np.ndarray, prompts: list[str], confidence: float = 0.95) -> dict[str, float]:
    """
    How often a difference of scores is above 0, with Wilson's interval, see [`WinRate`].

    Args:
        difference (`np.ndarray` of shape `(N,)`): score less that of the baseline, NaN where there is none.
        prompts (`list[str]`): one a difference.
        confidence (`float`, *optional*, defaults to `0.95`): of the interval.

    Returns:
        `dict[str, float]`: `win_rate`, `win_rate_low`, `win_rate_high`, `wins`, `ties`, `losses`.
    """
    outcome = np.where(np.isnan(difference), math.nan, (np.sign(difference) + 1) / 2)
    known = outcome[~np.isnan(outcome)]
    rate = float(known.mean()) if len(known) else math.nan
    low, high = wilson_interval(rate, len(by_prompt(outcome, prompts)), confidence)
    return {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "wins": int((known == 1).sum()),
        "ties": int((known == 0.5).sum()),
        "losses": int((known == 0).sum()),
    }


def wilson_interval(rate: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval of a share `rate` observed `count` times; NaN for no observation.

    By hand: 8 of 10 at 95 % gives 0.490 to 0.943.
    """
    if count == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / count
    center = (rate + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)
