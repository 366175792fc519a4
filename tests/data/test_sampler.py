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

import itertools

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.data.sampler import GroupSampler, GroupStream


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


@pytest.mark.parametrize("generation", [0, 2, 3, 7])
@pytest.mark.parametrize(("processes", "batch_size", "num_generations"), [(1, 4, 2), (2, 4, 2), (2, 2, 4)])
def test_what_comes_next_is_what_the_data_loader_gives(generation, processes, batch_size, num_generations):
    steps, repeats = 2, 4
    sampler = GroupSampler(9, num_generations, batch_size, steps, processes, repeats, seed=5)
    for process in range(processes):
        seen = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            batches = rows_of(sampler, process, processes, batch_size, steps)[::repeats]
            seen += [list(dict.fromkeys(batch)) for batch in batches]
        expected = [row for batch in seen[generation:] for row in batch]
        sampler.set_epoch(0)
        upcoming = sampler.upcoming(generation, process)
        assert [next(upcoming) for _ in expected] == expected


def stream_of(count):
    return Dataset.from_list([{"prompt": f"prompt {i}"} for i in range(count)]).to_iterable_dataset()


@pytest.mark.parametrize(("processes", "batch_size", "num_generations"), [(1, 4, 2), (2, 4, 2), (2, 2, 4)])
def test_a_stream_is_laid_out_as_a_dataset_in_its_own_order(processes, batch_size, num_generations):
    arguments = {
        "num_generations": num_generations, "batch_size": batch_size, "steps": 2, "num_processes": processes, "repeats": 4,
    }  # fmt: skip
    sampler = GroupSampler(11, **arguments, seed=0, shuffle=False)
    expected = [f"prompt {row}" for row in sampler]
    stream = GroupStream(stream_of(11), **arguments)
    rows = [row["prompt"] for row in itertools.islice(stream, 2 * len(expected))]
    assert rows == 2 * expected  # it begins anew
    upcoming = GroupStream(stream_of(11), **arguments).upcoming(1, processes - 1)
    others = sampler.upcoming(1, processes - 1)
    assert [next(upcoming)["prompt"] for _ in range(9)] == [f"prompt {next(others)}" for _ in range(9)]


def test_looking_ahead_takes_nothing_from_the_data_loader():
    stream = GroupStream(stream_of(11), num_generations=1, batch_size=2, steps=1, num_processes=1, repeats=1)
    loader = iter(stream)
    taken = [next(loader)["prompt"] for _ in range(4)]  # two generations
    ahead = stream.upcoming(1, 0)
    assert [next(ahead)["prompt"] for _ in range(6)] == [f"prompt {i}" for i in range(2, 8)]
    assert taken + [next(loader)["prompt"] for _ in range(6)] == [f"prompt {i}" for i in range(10)]


def test_a_shuffled_stream_has_another_order_in_each_pass():
    stream = GroupStream(stream_of(40).shuffle(seed=3, buffer_size=40), 1, 4, 1, 1, 1)
    rows = [row["prompt"] for row in itertools.islice(stream, 80)]
    assert sorted(rows[:40]) == sorted(rows[40:]) and rows[:40] != rows[40:]
    assert rows == [row["prompt"] for row in itertools.islice(stream, 80)]


def test_a_stream_too_short_for_a_generation():
    stream = GroupStream(stream_of(3), num_generations=2, batch_size=8, steps=1, num_processes=1, repeats=1)
    with pytest.raises(ValueError, match="has 3 rows, but a generation needs 4"):
        next(iter(stream))
