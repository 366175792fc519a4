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

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FluxPipeline

from .base import FlowModel


class FluxFlowModel(FlowModel):
    """
    FLUX.1: dev (guidance embedded in the network) and schnell (no guidance).

    Latents are packed: `(B, N, 4 C)` with N = (H / 16) (W / 16) tokens of 2 x 2 latent pixels.

    The conditioning holds `prompt_embeds` `(B, L, D)` of T5 and `pooled_prompt_embeds` `(B, P)` of CLIP.

    Attributes:
        max_sequence_length (`int`):
            L: 512, or less if the T5 tokenizer's own limit is lower.
    """

    pipeline_class = FluxPipeline
    lora_target_modules = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ]

    def __init__(self, pipeline: FluxPipeline):
        super().__init__(pipeline)
        self.latent_downsample = pipeline.vae_scale_factor * 2
        self.default_guidance_scale = 3.5 if self.transformer_config.guidance_embeds else 1.0
        tokenizer = pipeline.tokenizer_2
        self.max_sequence_length = 512 if tokenizer is None else min(512, tokenizer.model_max_length)
        self._image_ids: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def _encode_prompt(self, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _unshifted_sigmas(self, num_inference_steps: int) -> Sequence[float]:
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

    def velocity(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
        height: int,
        width: int,
    ) -> torch.Tensor:
        prompt_embeds = self._to_network(conditioning["prompt_embeds"], latents)
        guidance = None
        if self.transformer_config.guidance_embeds:
            guidance = latents.new_full((latents.shape[0],), guidance_scale, dtype=torch.float32)
        velocity = denoiser(
            hidden_states=latents.to(self.dtype),
            timestep=self._rows(sigma, latents),
            guidance=guidance,
            pooled_projections=self._to_network(conditioning["pooled_prompt_embeds"], latents),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
            img_ids=self._get_image_ids(height, width, latents.device),
            return_dict=False,
        )[0]
        return velocity.to(latents.dtype)

    def _get_image_ids(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Position of each token, `(N, 3)`; float32, which holds any position exactly."""
        key = (height, width, device)
        if key not in self._image_ids:
            rows, columns = height // self.latent_downsample, width // self.latent_downsample
            self._image_ids[key] = self.pipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
        return self._image_ids[key]

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
