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

"""The benchmark of a training step counts every phase."""

import argparse

import pytest
from datasets import Dataset
from tiny_models import tiny_flux_pipeline

from examples.benchmarks.chunk_grpo import COUNTED, PHASES, TimedTrainer, measure, table
from examples.benchmarks.comparison import speedups
from trl_diffusion import ChunkGRPOConfig


def test_every_phase_is_counted(tmp_path):
    args = ChunkGRPOConfig(
        output_dir=str(tmp_path), num_inference_steps=4, chunk_sizes=[1, 2], num_generations=2, max_steps=1,
        per_device_train_batch_size=2, height=32, width=32, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = TimedTrainer(
        tiny_flux_pipeline(),
        lambda images, prompts: [float(i) for i, _ in enumerate(images)],
        args,
        Dataset.from_list([{"prompt": "a cat"}]),
    )
    trainer.train()
    assert trainer.seconds.keys() == set(COUNTED)
    assert all(seconds > 0 for seconds in trainer.seconds.values())


def test_ways_are_compared_step_by_step():
    """By hand: 8 / 2, 80 / 40 and 80 / 10, of which 4 is the median; that of the medians, 80 and 10, would be 8."""
    rounds = {"slow": [{"steps": [8.0, 80.0]}, {"steps": [80.0]}], "fast": [{"steps": [2.0, 40.0]}, {"steps": [10.0]}]}
    assert speedups(rounds, "slow") == {"slow": 1, "fast": 4}


def test_a_row_for_each_way():
    arguments = argparse.Namespace(
        model="shapes", device="cpu", dtype="float32", height=32, width=32, num_inference_steps=6, chunk_sizes=None,
        chunk_sampling=None, chunk_gradient="joint", activation_checkpointing=False, images=4, num_generations=4,
        batch_size=4, rollout_batch_size=None, steps=1, warm_up=0,
    )  # fmt: skip
    ways = ["one at a time", "nothing shared", "shared forwards", "mix_grpo", "rewards beside the rollout"]
    rounds = {way: [measure(argparse.Namespace(**vars(arguments), way=way))] for way in ways}
    # Of a group of 4 with 6 steps: 6 and 2 trained ones; of each the first is the group's.
    forwards = {way: results[0]["forwards_per_image"] for way, results in rounds.items()}
    assert forwards["one at a time"] == forwards["nothing shared"] == 8
    assert forwards["shared forwards"] == forwards["rewards beside the rollout"] == pytest.approx(8 - 2 * 3 / 4)
    # The first four steps train, each by itself.
    assert forwards["mix_grpo"] == pytest.approx(10 - 2 * 3 / 4)
    assert all(result[phase] > 0 for (result,) in rounds.values() for phase in PHASES)
    rows = table(arguments, rounds).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {way}" for way in ways]
    assert {row.count("|") for row in rows} == {10}
