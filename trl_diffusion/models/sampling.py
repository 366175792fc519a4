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

"""Deterministic sampling with an adapter that is on for all, some or none of the steps."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..flow import rollout, transition_coefficients
from .base import FlowModel


@torch.no_grad()
def sample_latents(
    flow_model: FlowModel,
    velocity: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    conditioning: Callable[[list[str], list[str]], dict[str, torch.Tensor]],
    prompts: list[str],
    seeds: Sequence[int],
    sigmas: torch.Tensor,
    size: tuple[int, int],
    device: torch.device,
    batch_size: int,
    adapter_fraction: float = 1.0,
    adapter_off: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    generator_device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    """
    Clean latents of prompts by the deterministic Euler solver, batch by batch.

    Args:
        flow_model ([`FlowModel`]):
            Draws the noise.
        velocity (`Callable`):
            `velocity(latents, sigma, conditioning)`, with latents `(B, ...)` and sigma `(B,)`.
        conditioning (`Callable`):
            `conditioning(prompts, ahead)`: the conditioning of prompts, on `device`; `ahead` are those that follow, too.
        prompts (`list[str]` of length N):
            Prompts.
        seeds (`Sequence[int]` of length N):
            Seed of each image's initial noise; the noise does not depend on the batches.
        sigmas (`torch.Tensor` of shape `(T + 1,)`):
            Schedule.
        size (`tuple[int, int]`):
            Height and width in pixels.
        device (`torch.device`):
            Where the latents are.
        batch_size (`int`):
            Images sampled together.
        adapter_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the steps, from the noisy end, with the adapter (3 of 10 for 0.3); the others run inside
            `adapter_off()`.
        adapter_off (`Callable`, *optional*):
            Gives the context in which the model is the base model.
        generator_device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the noise is drawn. On the CPU a seed is the same noise on every machine.

    Returns:
        `Iterator[torch.Tensor]`: latents `(B, ...)`, float32, at sigma 0.

    Raises:
        `ValueError`: `adapter_fraction` lies outside [0, 1].
    """
    if not 0 <= adapter_fraction <= 1:
        raise ValueError(f"adapter_fraction must lie in [0, 1], got {adapter_fraction}.")
    first_without = round(adapter_fraction * (len(sigmas) - 1))
    euler = transition_coefficients(sigmas, None)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        embeddings = conditioning(prompts[rows], prompts[start:])
        generators = [torch.Generator(generator_device).manual_seed(int(seed)) for seed in seeds[rows]]

        def velocity_at(latents, sigma, step, embeddings=embeddings):
            with contextlib.nullcontext() if step < first_without else adapter_off():
                return velocity(latents, sigma, embeddings)

        noise = flow_model.draw_noise(len(generators), *size, generators, device)
        yield rollout(velocity_at, noise, sigmas, euler).clean
