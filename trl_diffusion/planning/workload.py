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
"""What a plan needs to know of a method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """
    What a method computes and holds, as its configuration tells. A row is one image at one noise level in the network.

    Attributes:
        rollout_rows (`float`): of a rollout, an image that is drawn.
        trained_rows (`float`): with a gradient, an image of an update.
        term_rows (`int`): with a gradient in one loss term, an image of a micro-batch.
        held_latents (`int`): latents that are kept, an image.
        held_images (`int`, *optional*): images of which all processes together keep them. `None`: those of the micro-batches
            that are trained.
        drawn (`float`, *optional*, defaults to `1.0`): images that are drawn, an image of an update.
        other_rows (`float`, *optional*, defaults to `0.0`): without a gradient besides those of the rollout, an image that is
            drawn: of the old policy and of the reference.
        through_rewards (`bool`, *optional*, defaults to `False`): whether the gradient comes through rewards and VAE.
        has_reference (`bool`, *optional*, defaults to `False`): whether a second policy is kept where all weights train.
        streamed (`bool`, *optional*): whether a term is a single row, and the ratio of all of them is computed before. `None`:
            there is no such setting.
        on_policy (`bool`, *optional*, defaults to `True`): whether that ratio is 1 and needs no computing.
        notes (`tuple[str, ...]`, *optional*): what this takes for granted.
    """

    rollout_rows: float
    trained_rows: float
    term_rows: int
    held_latents: int
    held_images: int | None = None
    drawn: float = 1.0
    other_rows: float = 0.0
    through_rewards: bool = False
    has_reference: bool = False
    streamed: bool | None = None
    on_policy: bool = True
    notes: tuple[str, ...] = ()
