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

"""From prompts and noise to latents and images: the one thing that draws."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .. import flow
from ..data.prompt_images import Prompt
from .base import FlowModel
from .conditioning import Conditioning


@dataclass(eq=False)
class Sampler:
    """
    Draws with a flow model: the rollouts of the trainers, their evaluations, and what the commands draw. A training calls
    [`velocity`] too, so that rollout and training share one forward.

    `dataclasses.replace(sampler, guidance_scale=1.0)` is one that differs in a setting and shares the rest.

    Args:
        flow_model ([`FlowModel`]):
            Model; its VAE and denoiser are on the device of `conditioning`.
        conditioning ([`Conditioning`]):
            Gives the conditioning of prompts. Its device is where everything is drawn.
        sigmas (`torch.Tensor` of shape `(T + 1,)`):
            Schedule, float32: the network is told these very values, and the algebra uses them.
        size (`tuple[int, int]`):
            Height and width in pixels.
        guidance_scale (`float`):
            Guidance, embedded or true, as in the family's pipeline.
        batch_size (`int`, *optional*, defaults to `1`):
            Images drawn together.
        generator_device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the noise of a seed is drawn. On the CPU it is the same on every machine.
        forward_context (`Callable`, *optional*):
            Gives the context that each forward runs in, as autocast.
        adapter_off (`Callable`, *optional*):
            Gives the context in which the network is the base model. Without it, no part of the steps can be drawn
            without the adapter.
        num_frames (`int`, *optional*):
            Frames of a video; the family's default if `None`. Stays `None` where the family makes images.

    Attributes:
        forwards (`int`): rows that [`velocity`] has put through the network, with guidance two an image.

    Raises:
        `ValueError`: a size, a number of frames or a guidance that the model does not have, or no batch.
    """

    flow_model: FlowModel
    conditioning: Conditioning
    sigmas: torch.Tensor
    size: tuple[int, int]
    guidance_scale: float
    batch_size: int = 1
    generator_device: torch.device | str = "cpu"
    forward_context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    adapter_off: Callable[[], contextlib.AbstractContextManager] | None = None
    num_frames: int | None = None
    forwards: int = field(default=0, init=False)

    def __post_init__(self):
        self.flow_model.check_size(*self.size)
        self.flow_model.check_num_frames(self.num_frames)
        if self.num_frames is None or self.flow_model.default_num_frames is None:
            self.num_frames = self.flow_model.default_num_frames
        self.flow_model.check_guidance_scale(self.guidance_scale)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")

    @classmethod
    def from_settings(
        cls,
        flow_model: FlowModel,
        num_inference_steps: int = 28,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        sigma_shift: float | None = None,
        conditioning: Conditioning | None = None,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> "Sampler":
        """
        A sampler from the settings that trainers and commands have.

        Args:
            flow_model ([`FlowModel`]):
                Model.
            num_inference_steps (`int`, *optional*, defaults to `28`):
                Number of steps T.
            height, width (`int`, *optional*):
                Size in pixels; the pipeline's default if `None`.
            guidance_scale (`float`, *optional*):
                Guidance; the pipeline's default if `None`.
            sigma_shift (`float`, *optional*):
                Static shift of the noise schedule; the pipeline's own schedule if `None`.
            conditioning ([`Conditioning`], *optional*):
                Gives the conditioning of prompts; by default one that encodes them where the denoiser is.
            num_frames (`int`, *optional*):
                Frames of a video; the pipeline's default if `None`. Not for images.
            **kwargs:
                Other arguments of [`Sampler`].

        Raises:
            `ValueError`: as [`Sampler`], or no steps.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        size = tuple(
            default if value is None else value
            for value, default in zip((height, width), flow_model.default_size, strict=True)
        )
        flow_model.check_size(*size)  # before a schedule that depends on it
        if sigma_shift is None:
            sigmas = flow_model.schedule(num_inference_steps, *size)
        else:
            sigmas = flow.shifted_schedule(num_inference_steps, sigma_shift)
        if guidance_scale is None:
            guidance_scale = flow_model.default_guidance_scale
        if conditioning is None:
            conditioning = Conditioning(flow_model, flow_model.denoiser.device)
        return cls(flow_model, conditioning, sigmas.float(), size, guidance_scale, num_frames=num_frames, **kwargs)

    def velocity(
        self, network: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """
        The one forward of rollout and training: [`FlowModel.velocity`] at the sampler's guidance, in its context.

        Args:
            network (`nn.Module`):
                The denoiser, wrapped or not.
            latents (`torch.Tensor` of shape `(B, C, [F,] h, w)`):
                Noisy latents, float32.
            sigma (`torch.Tensor` of shape `()` or `(B,)`):
                Noise levels.
            conditioning (`dict[str, torch.Tensor]`):
                Of the prompts, one row for each row of `latents`.

        Returns:
            `torch.Tensor` of the shape and dtype of `latents`, differentiable.
        """
        self.forwards += len(latents) * (2 if self.flow_model.is_guided(self.guidance_scale) else 1)
        with self.forward_context():
            return self.flow_model.velocity(network, latents, sigma, conditioning, self.guidance_scale)

    def draw_noise(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Initial noise `(B, C, [F,] h, w)`, float32, one generator a sample, so that none depends on its batch."""
        return self.flow_model.draw_noise(
            len(generators), *self.size, generators, self.conditioning.device, self.num_frames
        )

    @torch.no_grad()
    def rollout(
        self,
        prompts: list[Prompt],
        noise: torch.Tensor,
        network: nn.Module | None = None,
        transitions: flow.TransitionCoefficients | None = None,
        generators: list[torch.Generator] | None = None,
        keep: Collection[int] = (),
        adapter_fraction: float = 1.0,
        ahead: Iterable[Prompt] | None = None,
        groups: Sequence[int] | None = None,
        num_groups: int = 0,
        on_batch: Callable[[slice, torch.Tensor], None] | None = None,
    ) -> flow.Trajectory:
        """
        Sample from initial noise to clean latents, `batch_size` rows at a time, without gradient.

        Rows of a group are one trajectory until their noise differs, so all forwards up to and including that of the first
        stochastic transition are computed once a group.

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, with their images where the model edits them, see [`~trl_diffusion.data.prompt_images.with_image`].
            noise (`torch.Tensor` of shape `(B, C, [F,] h, w)`):
                Initial noise, see [`draw_noise`].
            network (`nn.Module`, *optional*):
                The network to call, wrapped or not; the pipeline's own by default.
            transitions ([`~trl_diffusion.flow.TransitionCoefficients`], *optional*):
                The transitions of `sigmas`; those of the deterministic Euler solver by default.
            generators (`list[torch.Generator]` of length B, *optional*):
                The noise of stochastic transitions, one generator a row.
            keep (`Collection[int]`, *optional*):
                Transitions whose latents are kept.
            adapter_fraction (`float`, *optional*, defaults to `1.0`):
                Share of the steps, from the noisy end, with the adapter (3 of 10 for 0.3); the others run inside
                `adapter_off()`.
            ahead (`Iterable[Prompt]`, *optional*):
                What [`Conditioning.get`] is told of the prompts to come.
            groups (`Sequence[int]` of length B, *optional*):
                A number for each row, the same for those that have the same prompt and the same noise.
            num_groups (`int`, *optional*, defaults to `0`):
                Compute as if there were at least so many groups: where the network is sharded, all processes must call it
                equally often.
            on_batch (`Callable`, *optional*):
                Gets the rows of each batch, a slice, and their clean latents, as soon as they are there.

        Returns:
            [`~trl_diffusion.flow.Trajectory`] of the B rows.

        Raises:
            `ValueError`: an `adapter_fraction` outside [0, 1], or below 1 without an adapter to switch off; noise,
                generators or groups for another number of rows; stochastic transitions without generators.
        """
        for name, values in (("noise", noise), ("generators", generators), ("groups", groups)):
            if values is not None and len(values) != len(prompts):
                raise ValueError(
                    f"Got {name} of {len(values)} rows for {len(prompts)} prompts: give one row a prompt."
                )
        if not 0 <= adapter_fraction <= 1:
            raise ValueError(f"adapter_fraction must lie in [0, 1], got {adapter_fraction}.")
        if adapter_fraction < 1 and self.adapter_off is None:
            raise ValueError(
                f"adapter_fraction={adapter_fraction} needs an adapter to switch off, and there is none. Leave it at 1."
            )
        first_without = round(adapter_fraction * (len(self.sigmas) - 1))
        network = self.flow_model.denoiser if network is None else network
        if transitions is None:
            transitions = flow.transition_coefficients(self.sigmas, None)

        def velocity(latents, sigma, step, conditioning):
            with contextlib.nullcontext() if step < first_without else self.adapter_off():
                return self.velocity(network, latents, sigma, conditioning)

        common, place = [], None
        if groups is not None:
            first_rows: dict[int, int] = {}
            for row, group in enumerate(groups):
                first_rows.setdefault(group, row)
            rows = list(first_rows.values())
            rows += rows[:1] * (num_groups - len(rows))
            parts = []
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                conditioning = self.conditioning.get([prompts[row] for row in part], ahead)
                velocity_of_rows = partial(velocity, conditioning=conditioning)
                parts.append(flow.common_velocities(velocity_of_rows, noise[part], self.sigmas, transitions))
            common = [torch.cat(velocities) for velocities in zip(*parts, strict=True)]
            places = {group: place for place, group in enumerate(first_rows)}
            place = torch.tensor([places[group] for group in groups], device=noise.device)

        def velocity_or_common(latents, sigma, step, rows, conditioning):
            if step < len(common):
                return common[step][place[rows]]
            return velocity(latents, sigma, step, conditioning)

        trajectories = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            initial, draw_noise = noise[rows], None
            if generators is not None:
                like = {"device": initial.device, "dtype": initial.dtype}
                draw_noise = partial(randn_tensor, tuple(initial.shape), generators[rows], **like)
            conditioning = self.conditioning.get(prompts[rows], ahead)
            velocity_of_rows = partial(velocity_or_common, rows=rows, conditioning=conditioning)
            trajectories.append(flow.rollout(velocity_of_rows, initial, self.sigmas, transitions, draw_noise, keep))
            if on_batch is not None:
                on_batch(rows, trajectories[-1].clean)
        return flow.Trajectory.cat(trajectories)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Images `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1] of clean latents, float32, without gradient,
        `batch_size` at a time.
        """
        # One layout in memory for any number of batches: the last bits of sums depend on it.
        if len(latents) <= self.batch_size:
            return self.flow_model.decode(latents).contiguous()
        images = None  # all of them, written batch by batch: a concatenation would hold them twice
        for i, part in enumerate(latents.split(self.batch_size)):
            decoded = self.flow_model.decode(part)
            if images is None:
                images = decoded.new_empty(len(latents), *decoded.shape[1:])
            images[i * self.batch_size :][: len(part)] = decoded
            del decoded
        return images

    @torch.no_grad()
    def draw_latents(
        self,
        prompts: list[Prompt],
        seeds: Sequence[int],
        network: nn.Module | None = None,
        adapter_fraction: float = 1.0,
    ) -> Iterator[torch.Tensor]:
        """
        Clean latents by the deterministic Euler solver, batch by batch.

        Args:
            prompts (`list[Prompt]` of length N):
                Prompts, as [`rollout`] takes them.
            seeds (`Sequence[int]` of length N):
                Seed of each image's initial noise; the noise does not depend on the batches.
            network, adapter_fraction (*optional*):
                See [`rollout`].

        Returns:
            `Iterator[torch.Tensor]`: latents `(B, C, [F,] h, w)`, float32.

        Raises:
            `ValueError`: as [`rollout`], or another number of seeds than of prompts.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"Got {len(seeds)} seeds for {len(prompts)} prompts: give one seed a prompt.")
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            noise = self.draw_noise(
                [torch.Generator(self.generator_device).manual_seed(int(seed)) for seed in seeds[rows]]
            )
            yield self.rollout(
                prompts[rows], noise, network, adapter_fraction=adapter_fraction, ahead=prompts[start:]
            ).clean

    def draw_images(
        self,
        prompts: list[Prompt],
        seeds: Sequence[int],
        network: nn.Module | None = None,
        adapter_fraction: float = 1.0,
    ) -> Iterator[torch.Tensor]:
        """
        Images `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, float32, in [0, 1], batch by batch; see [`draw_latents`] for the
        arguments.
        """
        return map(self.decode, self.draw_latents(prompts, seeds, network, adapter_fraction))
