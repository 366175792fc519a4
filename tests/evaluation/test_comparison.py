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

import math

import numpy as np
import pytest

from trl_diffusion.evaluation import compare, markdown_table


def test_comparison_by_hand():
    numbers = compare([0.0, 0.0], {"a": [1.0, 3.0]}, ["x", "y"])
    assert numbers["base"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert numbers["a"]["change"]["mean"] == 2
    # The standard error of [1, 3] is 1.
    assert (numbers["a"]["change"]["low"], numbers["a"]["change"]["high"]) == pytest.approx((0.04, 3.96), abs=1e-3)
    assert (numbers["a"]["win_rate"], numbers["a"]["wins"], numbers["a"]["losses"]) == (1.0, 2, 0)


def test_change_is_of_pairs():
    scores = np.random.default_rng(0).normal(size=100)
    numbers = compare(scores.tolist(), {"a": (scores + 0.5).tolist()}, [str(i) for i in range(100)])
    assert numbers["a"]["change"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert numbers["a"]["high"] - numbers["a"]["low"] == pytest.approx(
        2 * 1.959964 * scores.std(ddof=1) / math.sqrt(100), rel=1e-3
    )


def test_images_of_a_prompt_are_not_independent():
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.normal(size=10), 8).tolist()
    together = compare([0.0] * 80, {"a": scores}, [str(i // 8) for i in range(80)])["a"]
    apart = compare([0.0] * 80, {"a": scores}, [str(i) for i in range(80)])["a"]
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_what_does_not_apply_is_left_out():
    numbers = compare([0.0, None, 1.0], {"a": [1.0, 5.0, None], "b": [None] * 3}, ["x", "y", "z"])
    assert numbers["base"]["mean"] == 0.5
    assert numbers["a"]["mean"] == 3 and numbers["a"]["change"] == {"mean": 1.0, "low": None, "high": None}
    assert numbers["b"]["mean"] is None and numbers["b"]["win_rate"] is None
    table = markdown_table({"r|1": numbers}).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| r\\|1 | a | 0.5 (") and "| +1 | 100.0 % (" in table[2]
    assert table[3].count("not applicable") == 3
