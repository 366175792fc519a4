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

"""What scores say about adapters and their base model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import mean_interval, win_rate


def compare(
    base: Sequence[float | None],
    aligned: Mapping[str, Sequence[float | None]],
    prompts: list[str],
    confidence: float = 0.95,
) -> dict[str, Any]:
    """
    Compare the scores of several models with those of the base model, image by image.

    Args:
        base (`Sequence[float | None]` of length N):
            Scores of the base model's images, `None` where the reward does not apply.
        aligned (`Mapping[str, Sequence[float | None]]`):
            Those of each other model, for the same prompts and noises.
        prompts (`list[str]` of length N):
            Prompts; images of one prompt are not taken for independent.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the intervals: [`mean_interval`] of the means, Wilson's of the win rates.

    Returns:
        `dict`: under "base" and under the name of each model `mean`, `low`, `high`; in those of the models besides
        `change`, the same of the paired differences, and `win_rate`, `win_rate_low`, `win_rate_high`, `wins`, `ties`,
        `losses`. `None` stands for what cannot be said: an interval from a single prompt.

    By hand: base [0, 0] and aligned [1, 3] of two prompts give a change of 2 with standard error 1, so 0.04 to 3.96.
    """
    base_scores = _array(base)
    result = {"base": _interval(base_scores, prompts, confidence)}
    for name, scores in aligned.items():
        difference = _array(scores) - base_scores
        result[name] = {
            **_interval(_array(scores), prompts, confidence),
            "change": _interval(difference, prompts, confidence),
            **{key: _finite(value) for key, value in win_rate(difference, prompts, confidence).items()},
        }
    return result


def markdown_table(rewards: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of what [`compare`] says of each reward, one row an adapter and reward."""
    lines = ["| reward | adapter | base | aligned | change | win rate |", "|---|---|---|---|---|---|"]
    for reward, models in rewards.items():
        for name, numbers in models.items():
            if name == "base":
                continue
            cells = [
                _escape(reward),
                _escape(name),
                format_interval(models["base"]),
                format_interval(numbers),
                format_interval(numbers["change"], sign="+"),
                format_win_rate(numbers),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_interval(interval: Mapping[str, float | None], sign: str = "-") -> str:
    """An interval in four digits: "0.2500 (0.2000 to 0.3000)"."""
    if interval["mean"] is None:
        return "not applicable"
    mean = f"{interval['mean']:{sign}.4g}"
    if interval["low"] is None:
        return mean
    return f"{mean} ({interval['low']:{sign}.4g} to {interval['high']:{sign}.4g})"


def format_win_rate(numbers: Mapping[str, Any]) -> str:
    """A win rate in per cent."""
    if numbers["win_rate"] is None:
        return "not applicable"
    low, high = 100 * numbers["win_rate_low"], 100 * numbers["win_rate_high"]
    return f"{100 * numbers['win_rate']:.1f} % ({low:.1f} to {high:.1f})"


def _array(scores: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if score is None else score for score in scores], dtype=np.float64)


def _interval(values: np.ndarray, prompts: list[str], confidence: float) -> dict[str, float | None]:
    ends = mean_interval(values, prompts, confidence)
    return dict(zip(("mean", "low", "high"), map(_finite, ends), strict=True))


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_")
