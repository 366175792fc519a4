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


from typing import Any

import torch
from diffusers import QwenImagePipeline

from .video_vae import VideoVAEFlowModel


class QwenImageFlowModel(VideoVAEFlowModel):
    """
    Qwen-Image, with true guidance whose result keeps the norm of each token.

    The network sees tokens of 2 x 2 latent pixels; the VAE is one of videos, and latents are one frame. The conditioning
    holds `prompt_embeds` `(B, L, D)` of Qwen2.5-VL, of as many tokens as the prompt has.

    Attributes:
        max_sequence_length (`int`):
            Tokens of a prompt that the network sees at most, 512 as in the pipeline.
    """

    pipeline_class = QwenImagePipeline
    true_guidance = True
    variable_length = ("prompt_embeds",)
    default_guidance_scale = 4.0
    max_sequence_length = 512

    def is_unused(self, name: str) -> bool:
        # The last block's answer for the text goes nowhere.
        last = f"transformer_blocks.{self.transformer_config.num_layers - 1}."
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        return any(last + part in name for part in parts)

    @classmethod
    def vae_downsample(cls, vae_config: dict[str, Any]) -> int:
        return 2 ** len(vae_config["temperal_downsample"])

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, mask = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        lengths = [prompt_embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return [{"prompt_embeds": embeds[:length]} for embeds, length in zip(prompt_embeds, lengths, strict=True)]

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        num, _, _, height, width = latents.shape
        velocity = denoiser(
            hidden_states=self._pack(latents),
            timestep=sigma,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * num,
            return_dict=False,
        )[0]
        return self._unpack(velocity, latents)

    def guidance_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance_scale, "negative_prompt": self.negative_prompt}

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        guided = self._pack(super().guide(positive, negative, guidance_scale))
        norm = self._pack(positive).norm(dim=-1, keepdim=True)
        return self._unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), positive)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return (self.vae.config.z_dim, 1, height // factor, width // factor)

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        num, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, num, channels, height, width)

    def _unpack(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.pipeline._unpack_latents(tokens, *like.shape[-2:], vae_scale_factor=1)
