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

import torch
from diffusers import FluxPipeline

from .base import FlowModel


class FluxFlowModel(FlowModel):
    """
    FLUX.1: dev (guidance embedded in the network) and schnell (no guidance).

    The network sees tokens of 2 x 2 latent pixels. The conditioning holds `prompt_embeds` `(B, L, D)` of T5 and
    `pooled_prompt_embeds` `(B, P)` of CLIP.

    Attributes:
        max_sequence_length (`int`):
            L: 512, or less if the T5 tokenizer's own limit is lower.
    """

    pipeline_class = FluxPipeline

    def __init__(self, pipeline: FluxPipeline):
        super().__init__(pipeline)
        self.has_guidance = self.transformer_config.guidance_embeds
        self.default_guidance_scale = 3.5 if self.has_guidance else 1.0
        tokenizer = pipeline.tokenizer_2
        self.max_sequence_length = 512 if tokenizer is None else min(512, tokenizer.model_max_length)
        self._image_ids: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        return [
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            for embeds, pooled in zip(prompt_embeds, pooled_prompt_embeds, strict=True)
        ]

    def empty_row(self) -> dict[str, torch.Tensor]:
        return {
            **super().empty_row(),
            "pooled_prompt_embeds": torch.empty(self.transformer_config.pooled_projection_dim),
        }

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        height, width = latents.shape[-2:]
        prompt_embeds = conditioning["prompt_embeds"]
        velocity = denoiser(
            hidden_states=self.pipeline._pack_latents(latents, *latents.shape),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.transformer_config.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
            img_ids=self._get_image_ids(height // 2, width // 2, latents.device),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)

    def _get_image_ids(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Position of each token, `(N, 3)`; float32, which holds any position exactly."""
        key = (rows, columns, device)
        if key not in self._image_ids:
            self._image_ids[key] = self.pipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
        return self._image_ids[key]
