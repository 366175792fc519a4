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

from examples.benchmarks import overhead
from examples.benchmarks.chunk_grpo import COUNTED, PHASES, TimedTrainer, measure, table
from examples.benchmarks.comparison import prompts, speedups
from examples.benchmarks.overhead import Parts
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


def of_a_small_run(**more):
    return argparse.Namespace(
        model="shapes", device="cpu", dtype="float32", height=32, width=32, num_inference_steps=6, chunk_sizes=None,
        chunk_sampling=None, chunk_gradient="joint", activation_checkpointing=False, images=4, num_generations=4,
        batch_size=4, rollout_batch_size=None, **{"steps": 1, "warm_up": 0, **more},
    )  # fmt: skip


def test_no_step_at_the_end_of_an_epoch_is_short():
    """The world has 108 prompts, and a step of SRPO with 24 images would be the half of one."""
    dataset = prompts(argparse.Namespace(images=24))
    assert len(dataset) % 24 == 0 and len(set(dataset["prompt"])) == 108


def test_parts_are_counted_without_what_they_call():
    """By hand, with a clock that is moved: 1 s of its own before and after two calls of 10 s each."""
    now = [0.0]
    parts = Parts(clock=lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    inner = parts.counted("inner", spend)
    outer = parts.counted("outer", lambda: (spend(1), inner(10), inner(10), spend(1)))
    outer()
    assert not parts.seconds  # it does not count yet
    parts.counting = True
    outer()
    assert parts.seconds == {"inner": 20, "outer": 2}


def test_the_parts_of_a_step_add_up_to_its_time():
    seconds = overhead.measure(of_a_small_run(way="shared forwards", steps=2, warm_up=1))
    assert sum(seconds.values()) == pytest.approx(2 * seconds["total"]) and min(seconds.values()) > 0
    rows = [row.split(" | ")[0].removeprefix("| ") for row in overhead.table(seconds).splitlines()[2:]]
    assert sorted(rows) == sorted([*seconds, "overhead"]) and rows[-6:] == ["overhead", *overhead.WORK, "total"]


def test_a_row_for_each_way():
    arguments = of_a_small_run()
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
