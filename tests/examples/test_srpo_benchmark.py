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

"""The benchmark of SRPO does the same work in each of its ways."""

import argparse

import torch

from examples.benchmarks.srpo import WAYS, TwoCalls, measure, table
from trl_diffusion.rewards import load_reward


def test_two_calls_are_the_reward():
    reward = load_reward("shapes-clip")
    images, prompts = torch.rand(2, 3, 32, 32), ["a small red circle", "a large blue square"]
    assert torch.equal(TwoCalls(reward).score(images, prompts), reward.score(images, prompts))


def test_a_row_for_each_way():
    arguments = argparse.Namespace(
        model="shapes", reward="shapes-clip", device="cpu", dtype="float32", height=32, width=32, num_inference_steps=4,
        images=2, batch_size=2, steps=1, warm_up=0, ways=list(WAYS),
    )  # fmt: skip
    rounds = {way: [measure(argparse.Namespace(**vars(arguments), way=way))] for way in WAYS}
    for (result,) in rounds.values():
        assert len(result["steps"]) == 1
        assert 0 < result["update"] < result["steps"][0]
    rows = table(arguments, rounds).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {way}" for way in WAYS]
    assert {row.count("|") for row in rows} == {9}
