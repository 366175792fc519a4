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

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from .base import FlowModel


# Layers of Stable Diffusion 3.5 large; medium has 24.
LARGE_LAYERS = 38


class SD3FlowModel(FlowModel):
    """
    Stable Diffusion 3 and 3.5, with true classifier-free guidance, and 3.5 large turbo, without guidance.

    The conditioning holds `prompt_embeds` `(B, L, D)` and `pooled_prompt_embeds` `(B, P)`.

    Attributes:
        max_sequence_length (`int`):
            Tokens the T5 encoder sees, 256 as in the pipeline. The 77 of CLIP come in addition.
    """

    pipeline_class = StableDiffusion3Pipeline
    true_guidance = True
    default_guidance_scale = 7.0
    max_sequence_length = 256

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__(pipeline)
        self.patch_size = pipeline.patch_size
        # Large turbo differs from large by its weights alone.
        if "turbo" in Path(pipeline.name_or_path or "").name:
            self.set_distilled("stabilityai/stable-diffusion-3.5-large")
        elif self.transformer_config.num_layers == LARGE_LAYERS:
            self.distilled_model = "stabilityai/stable-diffusion-3.5-large-turbo"

    @property
    def max_size(self) -> int:
        return self.transformer_config.pos_embed_max_size * self.latent_downsample

    def unshifted_sigmas(self, num_inference_steps: int) -> None:
        return None

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            for embeds, pooled in zip(prompt_embeds, pooled_prompt_embeds, strict=True)
        ]

    def empty_row(self) -> dict[str, torch.Tensor]:
        length = self.pipeline.tokenizer_max_length + self.max_sequence_length
        config = self.transformer_config
        return {
            "prompt_embeds": torch.empty(length, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.empty(config.pooled_projection_dim),
        }

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        return denoiser(
            hidden_states=latents,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
