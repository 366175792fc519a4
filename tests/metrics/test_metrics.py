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
import statistics

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.metrics import RewardMetric, WinRate, clustered_mean, load_metric
from trl_diffusion.metrics.win_rate import wilson_interval
from trl_diffusion.rewards import RewardModel


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def length(images, prompts):
    return [None if prompt == "skip" else float(len(prompt)) for prompt in prompts]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def grey(*levels, size=(4, 4)):
    return [Image.new("RGB", size, (level,) * 3) for level in levels]


def test_mean_standard_error_and_scores():
    result = load_metric(Brightness()).compute(images=grey(0, 51, 102, 255), prompts=list("abcd"))
    values = [0.0, 0.2, 0.4, 1.0]
    assert result["brightness_scores"] == pytest.approx(values)
    assert result["brightness"] == pytest.approx(statistics.mean(values))
    assert result["brightness_standard_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(4))
    assert result["brightness_per_prompt"] == pytest.approx(dict(zip("abcd", values, strict=True)))


def test_images_of_one_prompt_are_not_independent():
    # Ten copies of the same four images say no more than the four.
    once = load_metric(Brightness()).compute(images=grey(0, 51, 102, 255), prompts=list("abcd"))
    tenfold = load_metric(Brightness()).compute(images=grey(0, 51, 102, 255) * 10, prompts=list("abcd") * 10)
    assert tenfold["brightness_standard_error"] == pytest.approx(once["brightness_standard_error"])
    assert tenfold["brightness"] == pytest.approx(once["brightness"])
    assert clustered_mean([np.array([1.0]), np.array([3.0])]) == (2.0, 1.0)
    assert clustered_mean([]) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_combined_and_in_batches_of_any_size_and_mode():
    metric = evaluate.combine([load_metric(Brightness()), RewardMetric(length, batch_size=2)])
    metric.add_batch(images=grey(51, 102), prompts=["a", "skip"])
    metric.add_batch(images=torch.ones(1, 3, 7, 9), prompts=["three"])
    metric.add(images=Image.new("L", (3, 5), 255), prompts="a")
    result = metric.compute()
    assert result["brightness_scores"] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert result["length_scores"] == pytest.approx([1.0, math.nan, 5.0, 1.0], nan_ok=True)
    assert result["length"] == pytest.approx(7 / 3)
    assert result["length_per_prompt"] == {"a": 1.0, "three": 5.0}
    assert metric.compute(images=grey(255), prompts=["b"])["brightness"] == 1.0  # nothing is left of before


def test_one_prompt_has_no_standard_error():
    result = load_metric(Brightness()).compute(images=grey(0, 255), prompts=["a", "a"])
    assert result["brightness"] == 0.5 and math.isnan(result["brightness_standard_error"])


def test_jpeg_files_are_not_compressed_again(tmp_path):
    path = tmp_path / "noise.jpg"
    Image.effect_noise((16, 16), 100).save(path, quality=30)
    with Image.open(path) as picture:
        expected = np.asarray(picture, dtype=np.float64).mean() / 255
        result = load_metric(Brightness()).compute(images=[picture], prompts=["a"])
    assert result["brightness"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": [], "prompts": []}, "no images to score"),
        ({"images": grey(1, 2), "prompts": ["a"]}, "1 prompts for 2 images"),
        ({"images": grey(1)}, "without prompts"),
        ({"prompts": ["a"]}, r"without \['images'\]"),
    ],
)
def test_bad_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        load_metric(Brightness()).compute(**inputs)
    with pytest.raises(ValueError, match="'others'"):
        load_metric(Brightness()).add_batch(images=grey(1), prompts=["a"], others=[1])


def test_win_rate():
    metric = WinRate(Brightness())
    result = metric.compute(images=grey(9, 8, 7, 6, 5), baseline_images=grey(1, 2, 7, 3, 6), prompts=list("abcde"))
    assert (result["brightness_wins"], result["brightness_ties"], result["brightness_losses"]) == (3, 1, 1)
    assert result["brightness_win_rate"] == pytest.approx(3.5 / 5)
    assert result["brightness_win_rate_low"] < 0.7 < result["brightness_win_rate_high"]
    narrow = metric.compute(images=grey(9, 8), baseline_images=grey(1, 9), prompts=["a", "b"], confidence=0.5)
    wide = metric.compute(images=grey(9, 8), baseline_images=grey(1, 9), prompts=["a", "b"])
    assert narrow["brightness_win_rate_low"] > wide["brightness_win_rate_low"]
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        metric.compute(images=grey(9), baseline_images=grey(1), prompts=["a"], confidence=95)


def test_win_rate_without_the_pairs_that_do_not_apply():
    result = WinRate(length).compute(images=grey(1, 2), baseline_images=grey(1, 2), prompts=["skip", "a"])
    assert (result["length_wins"], result["length_ties"], result["length_losses"]) == (0, 1, 0)
    nothing = WinRate(length).compute(images=grey(1), baseline_images=grey(1), prompts=["skip"])
    assert math.isnan(nothing["length_win_rate"]) and math.isnan(nothing["length_win_rate_low"])


def test_wilson_interval():
    # Published example: 8 of 10; and the rule of three's neighbourhood for 10 of 10.
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    # Its definition: the shares that a test at the observed one does not reject.
    for bound in wilson_interval(0.3, 50):
        assert abs(0.3 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 50), rel=1e-5)


def test_the_interval_covers():
    rng = np.random.default_rng(0)
    covered = [
        low <= 0.7 <= high for low, high in (wilson_interval(rng.binomial(40, 0.7) / 40, 40) for _ in range(2000))
    ]
    assert 0.93 < np.mean(covered) < 0.98
