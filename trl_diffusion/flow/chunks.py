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

r"""
Chunks of consecutive sampling steps ([Chunk-GRPO](https://huggingface.co/papers/2510.21583)): their layout, and which
of them train.

T sampling steps have T - 1 trainable transitions, index 0 the noisiest; the last step is never trained. A layout is a
list of chunk sizes that sum to T - 1.
"""

from itertools import accumulate
from typing import Literal

import torch


def relative_change(latents: torch.Tensor, next_latents: torch.Tensor) -> torch.Tensor:
    r"""
    How much a step changes the latents: $L1_{rel} = \overline{|x_{t+1} - x_t|} / (\overline{|x_t|} + 10^{-8})$.

    Args:
        latents, next_latents (`torch.Tensor` of shape `(B, ...)`): before and after the step.

    Returns:
        `torch.Tensor` of shape `(B,)`, without unit.
    """
    change = (next_latents - latents).abs().flatten(1).mean(1)
    return change / (latents.abs().flatten(1).mean(1) + 1e-8)


def chunk_steps(chunk_sizes: list[int]) -> list[list[int]]:
    """
    The transitions of each chunk.

    ```python
    >>> chunk_steps([2, 3])
    [[0, 1], [2, 3, 4]]
    ```
    """
    ends = list(accumulate(chunk_sizes))
    return [list(range(end - size, end)) for size, end in zip(chunk_sizes, ends, strict=True)]


def equal_chunk_sizes(num_transitions: int, size: int) -> list[int]:
    """
    Chunks of `size` transitions each; the last one is smaller where `size` does not divide `num_transitions`.

    ```python
    >>> equal_chunk_sizes(9, 4)
    [4, 4, 1]
    ```
    """
    full, rest = divmod(num_transitions, size)
    return [size] * full + ([rest] if rest else [])


def temporal_chunk_sizes(relative_changes: torch.Tensor, num_chunks: int = 4, min_chunk_size: int = 2) -> list[int]:
    r"""
    Cut the curve of relative changes into segments of near-equal dynamics.

    The `num_chunks` contiguous segments, each of at least `min_chunk_size` transitions, that minimise the
    within-segment squared deviation of $\log L1_{rel}$; found exactly by dynamic programming. The paper gives its
    temporal-dynamics-guided layout in prose only; this is a well-defined rule with the same pattern: small chunks
    where the dynamics change fast, large ones where they are flat.

    Args:
        relative_changes (`torch.Tensor` of shape `(T - 1,)`): positive, averaged over a rollout batch.
        num_chunks (`int`, *optional*, defaults to `4`): number of segments K.
        min_chunk_size (`int`, *optional*, defaults to `2`): fewest transitions of a segment.

    Returns:
        `list[int]`: K sizes that sum to T - 1. Of equally good cuts, the one with the earliest cuts is returned.

    Raises:
        `ValueError`: where `num_chunks` or `min_chunk_size` is below 1, where `num_chunks * min_chunk_size` exceeds
        the number of transitions, or where a relative change has no finite logarithm.

    Example: two plateaus are cut where they meet.

    ```python
    >>> temporal_chunk_sizes(torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0]), num_chunks=2)
    [2, 3]
    ```
    """
    num_transitions = len(relative_changes)
    if num_chunks < 1 or min_chunk_size < 1:
        raise ValueError(
            f"num_chunks and min_chunk_size must be at least 1, got num_chunks={num_chunks} and "
            f"min_chunk_size={min_chunk_size}."
        )
    if num_chunks * min_chunk_size > num_transitions:
        raise ValueError(
            f"num_chunks={num_chunks} chunks of at least min_chunk_size={min_chunk_size} need "
            f"{num_chunks * min_chunk_size} transitions, but there are {num_transitions} (num_inference_steps - 1). "
            "Lower num_chunks or min_chunk_size, or raise num_inference_steps."
        )
    logarithms = relative_changes.double().log()
    if not bool(logarithms.isfinite().all()):
        raise ValueError(
            f"relative changes must be positive and finite, got {relative_changes.tolist()}: the rollout stood still "
            "or diverged. Check eta and the model, or give chunk_sizes as a list."
        )
    curve = logarithms.tolist()
    sums = [0.0, *accumulate(curve)]
    squares = [0.0, *accumulate(value**2 for value in curve)]

    def deviation(start: int, end: int) -> float:
        total = sums[end] - sums[start]
        return squares[end] - squares[start] - total**2 / (end - start)

    # best[end] = (cost, sizes) of the cheapest cut of the first `end` transitions into the chunks placed so far.
    best = {0: (0.0, [])}
    for _ in range(num_chunks):
        following = {}
        for start, (cost, sizes) in best.items():
            for end in range(start + min_chunk_size, num_transitions + 1):
                candidate = cost + deviation(start, end)
                # Rounding must not decide between cuts that are equally good.
                if end not in following or candidate < following[end][0] - 1e-12:
                    following[end] = (candidate, [*sizes, end - start])
        best = following
    return best[num_transitions][1]


def temporal_chunk_weights(relative_changes: torch.Tensor, chunk_sizes: list[int]) -> torch.Tensor:
    """
    The paper's weights for drawing chunks: the mean relative change of each chunk's transitions, normalised.

    Args:
        relative_changes (`torch.Tensor` of shape `(T - 1,)`): positive, averaged over a rollout batch.
        chunk_sizes (`list[int]`): K sizes that sum to T - 1.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64, summing to 1.
    """
    means = torch.stack([chunk.mean() for chunk in relative_changes.double().split(chunk_sizes)])
    return means / means.sum()


def draw_chunks(
    num_chunks: int, fraction: float, weights: torch.Tensor | None, generator: torch.Generator
) -> list[int]:
    """
    Which chunks train: `max(1, int(num_chunks * fraction))` distinct ones, in ascending order.

    Args:
        num_chunks (`int`): K.
        fraction (`float`): share of the chunks that train, in (0, 1].
        weights (`torch.Tensor` of shape `(K,)` or `None`): odds of a draw without replacement; `None` is uniform.
        generator (`torch.Generator`): seeded alike on every process, so that all run the same forwards.
    """
    count = max(1, int(num_chunks * fraction))
    if weights is None:
        weights = torch.ones(num_chunks, dtype=torch.float64)
    weights = weights.to(generator.device)
    return sorted(torch.multinomial(weights, count, generator=generator).tolist())


def train_window_offset(
    num_transitions: int,
    window: int,
    generation: int,
    schedule: Literal["sliding", "random"],
    interval: int = 25,
    stride: int = 1,
    generator: torch.Generator | None = None,
) -> int:
    """
    The first transition of the window that a generation trains, a function of its number alone.

    Source: `"sliding"` is that of [MixGRPO](https://huggingface.co/papers/2507.21802), `"random"` that of Flow-GRPO-Fast
    ([Flow-GRPO](https://huggingface.co/papers/2505.05470)).

    Args:
        num_transitions (`int`): T - 1.
        window (`int`): transitions of the window W, from 1 to `num_transitions`.
        generation (`int`): number of the generation, from 0 on.
        schedule (`str`): `"sliding"`: from the noisiest transition on, and around; `"random"`: drawn among the offsets of
            the noisier half.
        interval (`int`, *optional*, defaults to `25`): generations after which a sliding window moves.
        stride (`int`, *optional*, defaults to `1`): transitions by which it moves.
        generator (`torch.Generator`, *optional*): of a random window, seeded alike on every process.

    Returns:
        `int`: from 0 to `num_transitions - window`.

    Example: three offsets have room; a generation each, and around.

    ```python
    >>> [train_window_offset(5, 3, generation, "sliding", interval=1) for generation in range(5)]
    [0, 1, 2, 0, 1]
    ```
    """
    num_offsets = num_transitions - window + 1
    if schedule == "sliding":
        return generation // interval * stride % num_offsets
    return int(torch.randint(max(1, num_offsets // 2), (), generator=generator))
