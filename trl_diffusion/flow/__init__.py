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

"""The mathematics of flow-matching policies: tensors in, tensors out."""

from .chunks import (
    chunk_steps,
    draw_chunks,
    equal_chunk_sizes,
    relative_change,
    temporal_chunk_sizes,
    temporal_chunk_weights,
    train_window_offset,
)
from .direct_align import direct_align_pass, interpolate, recover
from .rollout import Trajectory, common_velocities, rollout
from .schedule import shifted_schedule
from .sde import DEFAULT_ETA, TransitionCoefficients, log_prob, step, transition_coefficients, transition_mean


__all__ = [
    "DEFAULT_ETA",
    "Trajectory",
    "TransitionCoefficients",
    "chunk_steps",
    "common_velocities",
    "direct_align_pass",
    "draw_chunks",
    "equal_chunk_sizes",
    "interpolate",
    "log_prob",
    "recover",
    "relative_change",
    "rollout",
    "shifted_schedule",
    "step",
    "temporal_chunk_sizes",
    "temporal_chunk_weights",
    "train_window_offset",
    "transition_coefficients",
    "transition_mean",
]
