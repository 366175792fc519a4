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

"""The sampling loop: from noise to clean latents, keeping what training will need."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from .chunks import relative_change
from .sde import TransitionCoefficients, step


@dataclass
class Trajectory:
    """
    What a rollout leaves behind.

    Attributes:
        clean (`torch.Tensor` of shape `(B, ...)`):
            Latents at sigma 0.
        states (`dict[int, torch.Tensor]`):
            Latents `(B, ...)` before transition `i`, for each `i` in `kept` and each `i + 1`.
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each transition under the sampling policy, NaN where the step was deterministic.
        relative_changes (`torch.Tensor` of shape `(B, T)`):
            [`~trl_diffusion.flow.chunks.relative_change`] of each transition.
    """

    clean: torch.Tensor
    states: dict[int, torch.Tensor]
    log_probs: torch.Tensor
    relative_changes: torch.Tensor

    def keep(self, steps: Collection[int]) -> None:
        """Forget the states that the transitions `steps` do not need."""
        needed = {state for i in steps for state in (i, i + 1)}
        self.states = {i: latents for i, latents in self.states.items() if i in needed}

    @classmethod
    def cat(cls, trajectories: list["Trajectory"]) -> "Trajectory":
        """Join trajectories of the same schedule along the batch."""
        return cls(
            clean=torch.cat([trajectory.clean for trajectory in trajectories]),
            states={i: torch.cat([t.states[i] for t in trajectories]) for i in trajectories[0].states},
            log_probs=torch.cat([trajectory.log_probs for trajectory in trajectories]),
            relative_changes=torch.cat([trajectory.relative_changes for trajectory in trajectories]),
        )


@torch.no_grad()
def common_velocities(
    velocity: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    coefficients: TransitionCoefficients,
) -> list[torch.Tensor]:
    """
    The velocities that all trajectories from the same noise have in common: those of the transitions up to the first
    stochastic one, and its own, whose input is still the same.

    Args:
        velocity (`Callable`):
            See [`rollout`].
        noise (`torch.Tensor` of shape `(B, ...)`):
            Distinct initial latents.
        sigmas (`torch.Tensor` of shape `(T + 1,)`):
            Schedule.
        coefficients ([`~trl_diffusion.flow.sde.TransitionCoefficients`]):
            The schedule's transitions.

    Returns:
        `list[torch.Tensor]`: of transition 0, 1, ..., `(B, ...)` each; of all T where none is stochastic.
    """
    stochastic = (coefficients.std > 0).tolist()
    count = stochastic.index(True) + 1 if any(stochastic) else len(stochastic)
    sigmas = sigmas.to(noise)
    coefficients = coefficients.to(noise.device, noise.dtype)
    steps = torch.arange(count, device=noise.device)
    latents, velocities = noise, []
    for i in range(count):
        velocities.append(velocity(latents, sigmas[i].expand(len(noise)), i))
        latents, _ = step(latents, velocities[i], coefficients.rows(steps[i : i + 1], latents.ndim), None)
    return velocities


@torch.no_grad()
def rollout(
    velocity: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    coefficients: TransitionCoefficients,
    draw_noise: Callable[[], torch.Tensor] | None = None,
    keep: Collection[int] = (),
) -> Trajectory:
    """
    Sample from noise to clean latents, without gradient.

    Args:
        velocity (`Callable`):
            `velocity(latents, sigma, i)` at transition `i`, with latents `(B, ...)` and sigma `(B,)`.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Initial latents, float32 or better.
        sigmas (`torch.Tensor` of shape `(T + 1,)`):
            Schedule; the very values are passed to the network.
        coefficients ([`~trl_diffusion.flow.sde.TransitionCoefficients`]):
            The schedule's transitions.
        draw_noise (`Callable`, *optional*):
            Gives standard normal noise `(B, ...)`; called once for each stochastic transition, in order.
        keep (`Collection[int]`, *optional*):
            Transitions whose latents are kept for training.

    Returns:
        [`Trajectory`].

    Raises:
        `ValueError`: where a transition is stochastic and `draw_noise` is missing.
    """
    latents = noise
    batch_size = len(noise)
    needed = {state for i in keep for state in (i, i + 1)}
    states, log_probs, changes = {}, [], []
    stochastic = (coefficients.std > 0).tolist()
    if draw_noise is None and any(stochastic):
        raise ValueError(
            f"{sum(stochastic)} of the {len(stochastic)} transitions are stochastic, but draw_noise is None. Pass "
            "draw_noise, or take the coefficients of the deterministic solver (sde_type=None)."
        )
    sigmas = sigmas.to(noise)
    coefficients = coefficients.to(noise.device, noise.dtype)
    steps = torch.arange(len(stochastic), device=noise.device)
    for i in range(len(sigmas) - 1):
        if i in needed:
            states[i] = latents
        prediction = velocity(latents, sigmas[i].expand(batch_size), i)
        z = draw_noise() if stochastic[i] else None
        next_latents, log_prob = step(latents, prediction, coefficients.rows(steps[i : i + 1], latents.ndim), z)
        log_probs.append(latents.new_full((batch_size,), float("nan")) if log_prob is None else log_prob)
        changes.append(relative_change(latents, next_latents))
        latents = next_latents
    if len(sigmas) - 1 in needed:
        states[len(sigmas) - 1] = latents
    return Trajectory(latents, states, torch.stack(log_probs, 1), torch.stack(changes, 1))
