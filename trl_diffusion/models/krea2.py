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
from diffusers import Krea2Pipeline

from .base import FlowModel
from .qwen_image import QwenImageFlowModel


class Krea2FlowModel(QwenImageFlowModel):
    """
    Krea 2: Raw, with true guidance, and Turbo, distilled, without guidance. The VAE is that of Qwen-Image.

    The conditioning holds `prompt_embeds` `(B, L, K, D)` of K layers of Qwen3-VL, of as many tokens as the prompt has: the
    pipeline pads in the middle of its template, and the network, to which all text is at one place, sees no padding.
    """

    pipeline_class = Krea2Pipeline
    default_guidance_scale = 4.5
    unguided_scale = 0.0
    lora_target_modules = ["to_q", "to_k", "to_v", "to_gate", "to_out.0"]

    def __init__(self, pipeline: Krea2Pipeline):
        super().__init__(pipeline)
        if pipeline.config.is_distilled:
            self.set_distilled("krea/Krea-2-Raw")
        else:
            self.distilled_model = "krea/Krea-2-Turbo"

    def is_unused(self, name: str) -> bool:
        return False

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, mask = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        return [{"prompt_embeds": embeds[kept]} for embeds, kept in zip(prompt_embeds, mask, strict=True)]

    def empty_row(self) -> dict[str, torch.Tensor]:
        config = self.transformer_config
        shape = self.max_sequence_length, config.num_text_layers, config.text_hidden_dim
        return {"prompt_embeds": torch.empty(shape)}

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        prompt_embeds = conditioning["prompt_embeds"]
        height, width = (side // self.patch_size for side in latents.shape[-2:])
        velocity = denoiser(
            hidden_states=self._pack(latents),
            encoder_hidden_states=prompt_embeds,
            timestep=sigma,
            position_ids=self.pipeline.prepare_position_ids(prompt_embeds.shape[1], height, width, latents.device),
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            return_dict=False,
        )[0]
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(velocity, *(side * factor for side in latents.shape[-2:]))

    def schedule_shift(self, num_tokens: int, num_inference_steps: int) -> float:
        if self.pipeline.config.is_distilled:
            return 1.15
        return super().schedule_shift(num_tokens, num_inference_steps)

    def guidance_arguments(self, guidance_scale: float) -> dict[str, Any]:
        return FlowModel.guidance_arguments(self, guidance_scale)

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        return positive + guidance_scale * (positive - negative)
