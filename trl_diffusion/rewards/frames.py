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

"""How the scores of a video's frames become one."""

import torch


# Ways to reduce, each a name in a setting.
FRAME_REDUCTIONS = ("mean", "first", "min")
FRAMES_TOGETHER = 16  # frames that a reward of images gets together at most, unless a call has more videos


def scored_frames(videos: torch.Tensor, reduction: str) -> torch.Tensor:
    """The frames `(B, f, 3, H, W)` of videos `(B, F, 3, H, W)` whose scores a reduction needs: all, or the first."""
    return videos[:, :1] if reduction == "first" else videos


def reduce_frames(scores: torch.Tensor, reduction: str) -> torch.Tensor:
    """
    One score a video, differentiable. A frame with NaN, to which the reward does not apply, is left out.

    Args:
        scores (`torch.Tensor` of shape `(B, f)`): scores of the frames of [`scored_frames`].
        reduction (`str`): `"mean"` over the frames, `"first"`, or `"min"`, the worst frame.

    Returns:
        `torch.Tensor` of shape `(B,)`: NaN where the reward applies to no frame.

    Raises:
        `ValueError`: another reduction.

    By hand: scores [1, 3, NaN] have the mean 2 and the minimum 1.
    """
    if reduction not in FRAME_REDUCTIONS:
        raise ValueError(
            f"frame_reduction must be one of {', '.join(map(repr, FRAME_REDUCTIONS))}, got {reduction!r}."
        )
    if reduction == "first":
        return scores[:, 0]
    if reduction == "mean":
        return scores.nanmean(1)
    unknown = scores.isnan()
    return scores.masked_fill(unknown, torch.inf).amin(1).masked_fill(unknown.all(1), torch.nan)
