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

"""The order of prompts: the same images in every optimizer step whatever the number of processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.data.sampler import GroupSampler


def rows_of(sampler, process, processes, batch_size, steps):
    """What the data loader hands to a process: batch k of the sampler goes to process k modulo the processes."""
    order, size = list(sampler), batch_size * steps
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return batches[process::processes]


@given(
    processes=st.integers(1, 4), batch_size=st.integers(1, 4), steps=st.integers(1, 4), groups=st.integers(1, 4),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_micro_batches_of_all_processes_are_contiguous_and_groups_whole(processes, batch_size, steps, groups, seed):
    images = processes * batch_size * steps
    if images % groups:
        return
    num_generations = images // groups
    sampler = GroupSampler(3 * groups + 1, num_generations, batch_size, steps, processes, repeats=1, seed=seed)
    local = [rows_of(sampler, process, processes, batch_size, steps) for process in range(processes)]
    one = GroupSampler(3 * groups + 1, num_generations, images, 1, 1, repeats=1, seed=seed)
    expected = list(one)
    for generation in range(3):
        together = [
            prompt
            for i in range(steps)
            for process in range(processes)
            for prompt in local[process][generation][i * batch_size : (i + 1) * batch_size]
        ]
        assert together == expected[generation * images : (generation + 1) * images]
        for start in range(0, images, num_generations):
            assert len(set(together[start : start + num_generations])) == 1
        assert len(set(together)) == groups


def test_epochs_differ_and_repeat():
    sampler = GroupSampler(20, 2, 4, 1, 1, repeats=2, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) == 80
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler)


def test_every_prompt_once_an_epoch():
    sampler = GroupSampler(12, 3, 6, 1, 1, repeats=1, seed=3)
    assert sorted(list(sampler)[::3]) == list(range(12))


def test_too_few_prompts_names_both_numbers():
    with pytest.raises(ValueError, match="has 3 prompts, but a generation needs 4"):
        GroupSampler(3, 2, 8, 1, 1, repeats=1, seed=0)
