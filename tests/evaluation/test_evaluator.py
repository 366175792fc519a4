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

"""Evaluations without a trainer: what is drawn and scored, and what is made of it."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from trl_diffusion.evaluation import Evaluator, compare, evaluation_share


DATASET = Dataset.from_dict({"prompt": ["a", "b"], "wish": [1.0, 2.0]})


class Model:
    """Draws grey images as bright as their seed, a little brighter with an adapter, and notes what it was asked for."""

    def __init__(self):
        self.drawn = []

    def draw(self, prompts, seeds, adapter_fraction):
        self.drawn.append((list(prompts), list(seeds), adapter_fraction))
        return torch.stack([torch.full((3, 2, 2), 0.1 * seed + 0.02 * adapter_fraction) for seed in seeds])

    def score(self, images, prompts, columns):
        brightness = images.mean(dim=(1, 2, 3))
        only_a = torch.tensor([0.0 if prompt == "a" else math.nan for prompt in prompts])
        return {"brightness": brightness, "wishes": torch.tensor(columns["wish"]), "only_a/mean": brightness + only_a}

    def evaluator(self, num_images=5, has_base=True):
        def columns(rows):
            return {"wish": [row["wish"] for row in rows]}

        return Evaluator(self.draw, self.score, columns, num_images, Accelerator(cpu=True), has_base)


def test_means_base_and_win_rates():
    metrics = Model().evaluator().metrics(DATASET)
    # Seeds 0 to 4 of a, b, a, b, a.
    assert metrics == pytest.approx(
        {
            "brightness": 0.22, "wishes": 7 / 5, "only_a/mean": 0.22,
            "base/brightness": 0.2, "base/wishes": 7 / 5, "base/only_a/mean": 0.2,
            "win_rate/brightness": 1.0, "win_rate/wishes": 0.5, "win_rate/only_a": 1.0,
        }
    )  # fmt: skip


def test_the_base_is_drawn_once_a_dataset():
    model = Model()
    evaluator = model.evaluator(num_images=3)
    evaluator.metrics(DATASET)
    evaluator.metrics(DATASET)
    evaluator.metrics(DATASET.select([1]))
    drawn = [(["a", "b", "a"], [0, 1, 2], 0.0), (["a", "b", "a"], [0, 1, 2], 1.0), (["a", "b", "a"], [0, 1, 2], 1.0)]
    assert model.drawn == [*drawn, (["b"] * 3, [0, 1, 2], 0.0), (["b"] * 3, [0, 1, 2], 1.0)]


def test_without_a_base_nothing_is_compared():
    model = Model()
    assert set(model.evaluator(has_base=False).metrics(DATASET)) == {"brightness", "wishes", "only_a/mean"}
    assert [fraction for _, _, fraction in model.drawn] == [1.0]


def test_intervals_are_those_of_the_report():
    model = Model()
    intervals = model.evaluator().intervals(DATASET, {"bright": "brightness"})
    seeds = 0.1 * np.arange(5)
    report = compare(seeds, {"x": seeds + 0.02}, ["a", "b", "a", "b", "a"])
    for name, wanted in (("base", report["base"]), ("aligned", report["x"])):
        assert intervals[name]["bright"] == pytest.approx([wanted["mean"], wanted["low"], wanted["high"]], rel=1e-5)


@pytest.mark.parametrize(("images", "processes"), [(5, 2), (4, 2), (1, 4), (7, 3)])
def test_processes_share_the_images_and_make_as_many_each(images, processes):
    shares = [evaluation_share(images, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sum(shares, [])[:images] == list(range(images))
    assert len(shares[0]) == math.ceil(images / processes)
