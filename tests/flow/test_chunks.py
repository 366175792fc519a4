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

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.flow import (
    chunk_steps,
    draw_chunks,
    equal_chunk_sizes,
    relative_change,
    temporal_chunk_sizes,
    temporal_chunk_weights,
    train_window_offset,
)


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def test_relative_change_by_hand():
    # |(3, -1) - (1, -3)| = (2, 2), mean 2, over the mean of (1, 3), 2; the second sample does not move.
    before = torch.tensor([[1.0, -3.0], [5.0, 5.0]], dtype=torch.float64)
    after = torch.tensor([[3.0, -1.0], [5.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(relative_change(before, after), expected, rtol=1e-8, atol=0)


def test_relative_change_is_finite_from_zero_latents():
    assert relative_change(torch.zeros(1, 2), torch.ones(1, 2)).isfinite().all()


@given(sizes=sizes)
def test_chunks_partition_the_transitions_in_order(sizes):
    chunks = chunk_steps(sizes)
    assert [len(chunk) for chunk in chunks] == sizes
    assert [i for chunk in chunks for i in chunk] == list(range(sum(sizes)))


@given(num_transitions=st.integers(1, 50), size=st.integers(1, 20))
def test_equal_chunks_cover_the_transitions_and_only_the_last_is_smaller(num_transitions, size):
    result = equal_chunk_sizes(num_transitions, size)
    assert sum(result) == num_transitions
    assert all(one == size for one in result[:-1])
    assert 1 <= result[-1] <= size


def all_layouts(num_transitions, num_chunks, min_chunk_size):
    for cuts in combinations(range(1, num_transitions), num_chunks - 1):
        layout = np.diff([0, *cuts, num_transitions]).tolist()
        if min(layout) >= min_chunk_size:
            yield layout


def deviation(curve, layout):
    """Within-segment squared deviation of the logarithm."""
    segments = np.split(np.log(curve), np.cumsum(layout)[:-1])
    return sum(float(np.var(segment) * len(segment)) for segment in segments)


@st.composite
def layouts(draw):
    num_chunks, min_chunk_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_transitions = draw(st.integers(num_chunks * min_chunk_size, 12))
    # Few distinct values, so that plateaus and ties occur too.
    value = st.one_of(st.sampled_from([0.01, 0.1, 0.2]), st.floats(1e-4, 10))
    curve = draw(st.lists(value, min_size=num_transitions, max_size=num_transitions))
    return curve, num_chunks, min_chunk_size


@given(case=layouts())
def test_temporal_sizes_are_the_best_of_all_layouts(case):
    curve, num_chunks, min_chunk_size = case
    result = temporal_chunk_sizes(torch.tensor(curve, dtype=torch.float64), num_chunks, min_chunk_size)
    candidates = list(all_layouts(len(curve), num_chunks, min_chunk_size))
    assert result in candidates
    best = min(deviation(curve, layout) for layout in candidates)
    assert deviation(curve, result) == pytest.approx(best, abs=1e-10)


@given(case=layouts(), scale=st.floats(0.1, 10))
def test_temporal_sizes_do_not_depend_on_the_scale_of_the_curve(case, scale):
    curve, num_chunks, min_chunk_size = case
    scaled = temporal_chunk_sizes(scale * torch.tensor(curve, dtype=torch.float64), num_chunks, min_chunk_size)
    plain = temporal_chunk_sizes(torch.tensor(curve, dtype=torch.float64), num_chunks, min_chunk_size)
    assert deviation(curve, scaled) == pytest.approx(deviation(curve, plain), abs=1e-10)


def test_temporal_sizes_of_a_flat_curve_cut_earliest():
    assert temporal_chunk_sizes(torch.full((16,), 0.3), num_chunks=4, min_chunk_size=2) == [2, 2, 2, 10]


def test_temporal_sizes_find_plateaus():
    curve = torch.tensor([0.5] * 2 + [0.3] * 3 + [0.1] * 4 + [0.05] * 7)
    assert temporal_chunk_sizes(curve, num_chunks=4) == [2, 3, 4, 7]


def test_temporal_sizes_obey_the_minimum():
    # The single outlier would be a chunk of its own.
    curve = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert temporal_chunk_sizes(curve, num_chunks=2, min_chunk_size=1) == [1, 5]
    assert temporal_chunk_sizes(curve, num_chunks=2, min_chunk_size=2) == [2, 4]
    assert temporal_chunk_sizes(curve, num_chunks=2, min_chunk_size=3) == [3, 3]


def test_more_chunks_than_transitions_are_an_error_that_names_the_numbers():
    with pytest.raises(ValueError, match=r"num_chunks=4 .*min_chunk_size=2 need 8 transitions, but there are 7"):
        temporal_chunk_sizes(torch.ones(7), num_chunks=4, min_chunk_size=2)


@pytest.mark.parametrize(("num_chunks", "min_chunk_size"), [(0, 2), (2, 0), (-1, 1)])
def test_sizes_below_one_are_an_error(num_chunks, min_chunk_size):
    with pytest.raises(ValueError, match=f"num_chunks={num_chunks} and min_chunk_size={min_chunk_size}"):
        temporal_chunk_sizes(torch.ones(7), num_chunks, min_chunk_size)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_curve_without_logarithm_is_an_error(value):
    with pytest.raises(ValueError, match="relative changes must be positive and finite, got"):
        temporal_chunk_sizes(torch.tensor([1.0, 2.0, value, 1.0]), num_chunks=2)


def test_temporal_weights_by_hand():
    # Means of the chunks: (0.4 + 0.2) / 2 = 0.3, 0.6, (0.1 + 0.1 + 0.1) / 3 = 0.1; their sum is 1.
    curve = torch.tensor([0.4, 0.2, 0.6, 0.1, 0.1, 0.1], dtype=torch.float64)
    expected = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    torch.testing.assert_close(temporal_chunk_weights(curve, [2, 1, 3]), expected, rtol=0, atol=1e-15)


@given(
    num_chunks=st.integers(1, 12),
    fraction=st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_drawn_chunks_are_distinct_ordered_and_of_the_right_number(num_chunks, fraction, weighted, seed):
    weights = torch.arange(1, num_chunks + 1, dtype=torch.float64) if weighted else None
    drawn = draw_chunks(num_chunks, fraction, weights, torch.Generator().manual_seed(seed))
    assert len(drawn) == max(1, int(num_chunks * fraction))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(num_chunks))


def test_drawing_depends_on_the_generator_alone():
    def draws(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw_chunks(8, 0.5, None, generator) for _ in range(20)]

    first = draws(3)
    torch.manual_seed(99)
    assert draws(3) == first
    assert draws(4) != first
    assert len({tuple(drawn) for drawn in first}) > 1  # the generator moves on


DRAWS = 20_000


def assert_frequencies(weights, fraction, expected):
    """`expected` maps each outcome to its probability; the counts lie within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    num_chunks = 4
    counts = Counter(tuple(draw_chunks(num_chunks, fraction, weights, generator)) for _ in range(DRAWS))
    assert sum(expected.values()) == pytest.approx(1)
    for outcome, probability in expected.items():
        error = (probability * (1 - probability) / DRAWS) ** 0.5
        assert counts[outcome] / DRAWS == pytest.approx(probability, abs=5 * error)


def test_uniform_drawing_gives_every_pair_the_same_chance():
    assert_frequencies(None, 0.5, dict.fromkeys(combinations(range(4), 2), 1 / 6))


def test_weighted_drawing_of_one_follows_the_weights():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    assert_frequencies(weights, 0.25, {(i,): weights[i].item() for i in range(4)})


def test_weighted_drawing_is_without_replacement_by_the_remaining_weights():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    w = weights.tolist()
    # i first and then j out of the rest, or the other way round.
    expected = {(i, j): w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j]) for i, j in combinations(range(4), 2)}
    assert_frequencies(weights, 0.5, expected)


@given(
    num_transitions=st.integers(1, 20), window=st.integers(1, 20), interval=st.integers(1, 4), stride=st.integers(1, 7)
)
def test_a_sliding_window_moves_on_and_around(num_transitions, window, interval, stride):
    window = min(window, num_transitions)
    offset, count = 0, 0
    for generation in range(40):
        assert offset == train_window_offset(num_transitions, window, generation, "sliding", interval, stride)
        assert 0 <= offset <= num_transitions - window
        count += 1
        if count == interval:
            # One by one, so that the way around can be seen.
            for _ in range(stride):
                offset = 0 if offset == num_transitions - window else offset + 1
            count = 0


@pytest.mark.parametrize(
    ("num_transitions", "window", "offsets"),
    [
        (9, 2, {0, 1, 2, 3}),  # those that Flow-GRPO-Fast draws with 10 steps: the window ends within the first five
        (16, 2, set(range(7))),
        (5, 5, {0}),
        (5, 4, {0}),
    ],
)
def test_a_random_window_lies_in_the_noisier_half(num_transitions, window, offsets):
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(
        train_window_offset(num_transitions, window, 0, "random", generator=generator) for _ in range(DRAWS)
    )
    assert drawn.keys() == offsets
    for count in drawn.values():
        error = (1 / len(offsets) * (1 - 1 / len(offsets)) / DRAWS) ** 0.5
        assert count / DRAWS == pytest.approx(1 / len(offsets), abs=5 * error)


@pytest.mark.gpu
def test_weights_on_the_gpu_are_drawn_with_the_generator_of_the_cpu():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    on_cpu = draw_chunks(4, 0.5, weights, torch.Generator().manual_seed(1))
    assert draw_chunks(4, 0.5, weights.cuda(), torch.Generator().manual_seed(1)) == on_cpu
