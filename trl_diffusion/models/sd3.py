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
from diffusers import StableDiffusion3Pipeline

from .base import FlowModel


class SD3FlowModel(FlowModel):
    """
    Stable Diffusion 3 and 3.5, with true classifier-free guidance.

    Latents are those of the VAE: `(B, C, H / 8, W / 8)`.

    The conditioning holds `prompt_embeds` `(B, L, D)` and `pooled_prompt_embeds` `(B, P)` of the prompts, and the same
    two of the empty prompt as `negative_prompt_embeds` and `negative_pooled_prompt_embeds`.

    Attributes:
        max_sequence_length (`int`):
            Tokens the T5 encoder sees, 256 as in the pipeline. The 77 of CLIP come in addition.
    """

    pipeline_class = StableDiffusion3Pipeline
    # By their last name, so that the second attention of Stable Diffusion 3.5 medium (`attn2`) is among them.
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
    shared_conditioning = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    default_guidance_scale = 7.0

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__(pipeline)
        self.latent_downsample = pipeline.vae_scale_factor * pipeline.patch_size
        self.max_sequence_length = 256

    @property
    def max_size(self) -> int:
        return self.transformer_config.pos_embed_max_size * self.latent_downsample

    def _encode_prompt(self, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        # The empty prompt is one more row, instead of one for each prompt as in the pipeline.
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            [*prompts, ""],
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        num = len(prompts)
        return {
            "prompt_embeds": prompt_embeds[:num],
            "pooled_prompt_embeds": pooled_prompt_embeds[:num],
            "negative_prompt_embeds": prompt_embeds[num:].expand(num, -1, -1),
            "negative_pooled_prompt_embeds": pooled_prompt_embeds[num:].expand(num, -1),
        }

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
        timestep = self._rows(sigma, latents) * self.pipeline.scheduler.config.num_train_timesteps
        hidden_states = latents.to(self.dtype)
        prompt_embeds = self._to_network(conditioning["prompt_embeds"], latents)
        pooled_prompt_embeds = self._to_network(conditioning["pooled_prompt_embeds"], latents)
        guided = guidance_scale > 1
        if guided:
            # One doubled batch: the empty prompt first, as in the pipeline.
            negative_prompt_embeds = self._to_network(conditioning["negative_prompt_embeds"], latents)
            negative_pooled_prompt_embeds = self._to_network(conditioning["negative_pooled_prompt_embeds"], latents)
            timestep = torch.cat([timestep, timestep])
            hidden_states = torch.cat([hidden_states, hidden_states])
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            pooled_prompt_embeds = torch.cat([negative_pooled_prompt_embeds, pooled_prompt_embeds])
        velocity = denoiser(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0].to(latents.dtype)
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        return velocity
