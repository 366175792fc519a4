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

"""Images of a base model, of its adapters, and of hybrids of both."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import PartialState

from ..flow import shifted_schedule
from ..hub.conversion import find_adapter, load_adapter
from ..models import Conditioning, load_flow_model, sample_latents


class ImageGenerator:
    """
    Draws images with one base model and any number of LoRAs, as the trainers' `generate` does.

    Args:
        model (`str`):
            Id of a pipeline on the Hub, path of one, or `"shapes"`.
        adapters (`Mapping[str, str]`):
            LoRAs by the name to call them: what [`~trl_diffusion.hub.conversion.find_adapter`] takes.
        prompts (`Sequence[str]`):
            Every prompt that will be drawn. Where they are few, the text encoders run once and are freed.
        height, width (`int`, *optional*):
            Size in pixels; the pipeline's default if `None`.
        num_inference_steps (`int`, *optional*, defaults to `28`):
            Number of steps T.
        guidance_scale (`float`, *optional*):
            Guidance; the pipeline's default if `None`.
        negative_prompt (`str`, *optional*):
            What classifier-free guidance leads away from; the empty prompt if `None`.
        sigma_shift (`float`, *optional*):
            Static shift of the noise schedule; the pipeline's own schedule if `None`.
        torch_dtype (`torch.dtype`, *optional*):
            Dtype of the weights. By default bfloat16 on an accelerator and float32 on the CPU.

    Raises:
        `ValueError`: a model, an adapter or a size that is not possible.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str | os.PathLike],
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        sigma_shift: float | None = None,
        torch_dtype: torch.dtype | None = None,
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        adapters = {adapter: find_adapter(source) for adapter, source in adapters.items()}  # before the model
        self.device = PartialState().device
        if torch_dtype is None:
            torch_dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.flow = load_flow_model(model, torch_dtype, size=(height, width), negative_prompt=negative_prompt)
        self.height = self.flow.default_size[0] if height is None else height
        self.width = self.flow.default_size[1] if width is None else width
        self.flow.check_size(self.height, self.width)
        self.guidance_scale = self.flow.default_guidance_scale if guidance_scale is None else guidance_scale
        if sigma_shift is None:
            self.sigmas = self.flow.schedule(num_inference_steps, self.height, self.width).float()
        else:
            self.sigmas = shifted_schedule(num_inference_steps, sigma_shift).float()
        # PEFT makes module names of them, which hold no dots.
        self._names = {adapter: f"adapter_{index}" for index, adapter in enumerate(adapters)}
        for adapter, source in adapters.items():
            load_adapter(self.flow.pipeline, source, self._names[adapter])

        self.conditioning = Conditioning(self.flow, self.device)
        if len(set(prompts)) <= self.conditioning.window:
            self.conditioning.keep_all(prompts)
        self.flow.vae.to(self.device)
        self.flow.denoiser.to(self.device).eval()

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        adapter: str | None = None,
        adapter_fraction: float = 1.0,
        batch_size: int = 1,
    ) -> Iterator[torch.Tensor]:
        """
        Images, batch by batch.

        Args:
            prompts (`list[str]` of length N):
                Prompts, of those given to the constructor.
            seeds (`Sequence[int]` of length N):
                Seed of each image's noise, which is drawn on the CPU: the same on every machine.
            adapter (`str`, *optional*):
                Name of the adapter; `None` is the base model.
            adapter_fraction (`float`, *optional*, defaults to `1.0`):
                Share of the steps, from the noisy end, with the adapter.
            batch_size (`int`, *optional*, defaults to `1`):
                Images drawn together.

        Returns:
            `Iterator[torch.Tensor]`: images `(B, 3, H, W)`, float32, in [0, 1], on the CPU.
        """
        denoiser = self.flow.denoiser
        if self._names:
            if adapter is None:
                denoiser.disable_adapters()
            else:
                denoiser.enable_adapters()
                denoiser.set_adapters(self._names[adapter])
        for latents in sample_latents(
            self.flow,
            self._velocity,
            self.conditioning.get,
            prompts,
            seeds,
            self.sigmas,
            (self.height, self.width),
            self.device,
            batch_size,
            adapter_fraction if adapter is not None else 1.0,
            self._adapter_off,
        ):
            yield self.flow.decode(latents).cpu()

    def _velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        return self.flow.velocity(self.flow.denoiser, latents, sigma, conditioning, self.guidance_scale)

    @contextlib.contextmanager
    def _adapter_off(self) -> Iterator[None]:
        self.flow.denoiser.disable_adapters()
        yield
        self.flow.denoiser.enable_adapters()
