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

"""Batches of one bucket, every row once an epoch, the same order on every process and after a resume."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.data.sampler import BucketSampler


@given(
    buckets=st.lists(st.integers(0, 3), min_size=1, max_size=60), batch_size=st.integers(1, 4),
    processes=st.integers(1, 3), seed=st.integers(0, 5),
)  # fmt: skip
def test_batches_of_all_processes_come_from_one_bucket_and_no_row_twice(buckets, batch_size, processes, seed):
    size = batch_size * processes
    full = sum(buckets.count(bucket) // size for bucket in set(buckets))
    if full == 0:
        with pytest.raises(ValueError, match=f"do not fill one batch of {size}"):
            BucketSampler(buckets, batch_size, processes, seed)
        return
    sampler = BucketSampler(buckets, batch_size, processes, seed)
    rows = list(sampler)
    assert len(rows) == len(sampler) == full * size
    assert len(set(rows)) == len(rows)
    for start in range(0, len(rows), size):
        assert len({buckets[row] for row in rows[start : start + size]}) == 1


@given(
    buckets=st.lists(st.integers(0, 1), min_size=8, max_size=30), cuts=st.tuples(*[st.integers(1, 4)] * 4),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_equal_fixed_settings_give_equal_rows_however_they_are_cut(buckets, cuts, seed):
    try:
        one, two = (BucketSampler(buckets, *cut, seed) for cut in (cuts[:2], cuts[2:]))
    except ValueError:
        return  # too few rows for a batch
    if one.fixed_settings() == two.fixed_settings():
        assert list(one) == list(two)


def test_epochs_differ_and_repeat():
    sampler = BucketSampler([0, 1] * 10, 2, 1, seed=0)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler)


def test_rows_left_over_change_from_epoch_to_epoch():
    sampler = BucketSampler([0] * 5, 4, 1, seed=0)
    left = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        left |= set(range(5)) - set(sampler)
    assert left == set(range(5))


def test_buckets_take_turns_at_random():
    sampler = BucketSampler([0] * 40 + [1] * 40, 2, 1, seed=0)
    turns = [row // 40 for row in list(sampler)[::2]]
    assert turns not in ([0] * 20 + [1] * 20, [1] * 20 + [0] * 20)
    assert turns.count(0) == 20


def test_order_of_one_bucket_does_not_depend_on_the_batches():
    orders = [
        list(BucketSampler([0] * 12, size, processes, 3)) for size, processes in ((12, 1), (4, 1), (1, 1), (2, 3))
    ]
    assert all(order == orders[0] for order in orders)


def test_too_few_rows_names_the_numbers():
    with pytest.raises(ValueError, match=r"has 5 rows in 2 aspect buckets of \[3, 2\] rows.* batch of 4 \(2 x 2 proc"):
        BucketSampler([0, 1, 0, 1, 0], 2, 2, 0)


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
def test_what_comes_next_is_what_the_data_loader_gives(batch):
    sampler = BucketSampler([0, 1, 1, 0, 0, 1, 0, 1, 0], batch_size=2, num_processes=2, seed=1)  # two batches an epoch
    rows = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        rows += list(sampler)
    for process in range(2):
        batches = [rows[start : start + 2] for start in range(2 * process, len(rows), 4)][batch:]
        upcoming = sampler.upcoming(batch, process)
        assert [next(upcoming) for _ in range(2 * len(batches))] == sum(batches, [])
