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

"""How sure a mean of scores is, where several images share a prompt: the one interval of evaluation, card and demos."""

import math
from statistics import NormalDist

import numpy as np


def by_prompt(values: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """The values of each prompt, without NaN; prompts without any are left out."""
    groups: dict[str, list[float]] = {}
    for value, prompt in zip(values.tolist(), prompts, strict=True):
        if not math.isnan(value):
            groups.setdefault(prompt, []).append(value)
    return {prompt: np.array(group) for prompt, group in groups.items()}


def clustered_mean(groups: list[np.ndarray]) -> tuple[float, float]:
    """
    Mean over all values and its standard error, with the values of one group taken for dependent (cluster-robust).

    With one value a group the error is the usual std / sqrt(n): [[1], [3]] gives 2 and 1. NaN where there is no value,
    or only one group.
    """
    if not groups:
        return math.nan, math.nan
    values = np.concatenate(groups)
    mean = values.mean()
    if len(groups) == 1:
        return float(mean), math.nan
    sums = np.array([(group - mean).sum() for group in groups])
    error = math.sqrt(len(groups) / (len(groups) - 1) * np.square(sums).sum()) / len(values)
    return float(mean), error


def mean_interval(values: np.ndarray, prompts: list[str], confidence: float = 0.95) -> tuple[float, float, float]:
    """
    Mean of scores with its normal confidence interval; images of one prompt are not taken for independent.

    Args:
        values (`np.ndarray` of shape `(N,)`): one an image, NaN where there is none.
        prompts (`list[str]` of length N): one an image.
        confidence (`float`, *optional*, defaults to `0.95`): of the interval.

    Returns:
        `tuple[float, float, float]`: mean, lower and upper end; NaN ends where all values are of one prompt, and a NaN
        mean where there is no value.

    By hand: 1 and 3 of two prompts have the standard error 1, so 0.04 to 3.96.
    """
    mean, error = clustered_mean(list(by_prompt(values, prompts).values()))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return mean, mean - half, mean + half
