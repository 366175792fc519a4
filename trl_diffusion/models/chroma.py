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
from diffusers import ChromaPipeline
from torch.utils.checkpoint import checkpoint

from .base import FlowModel


class ChromaFlowModel(FlowModel):
    """
    Chroma: FLUX.1's network without its embedded guidance, with true guidance and a mask over the text.

    The network sees tokens of 2 x 2 latent pixels. The conditioning holds `prompt_embeds` `(B, L, D)` of T5 and
    `prompt_attention_mask` `(B, L)`: as in the pipeline a number that is added to the attention's scores, 1 at the tokens of
    the prompt and one more, 0 at the rest. So padding is attended to, less, and its length matters.

    Attributes:
        max_sequence_length (`int`):
            L, 512 as in the pipeline.
    """

    pipeline_class = ChromaPipeline
    true_guidance = True
    default_guidance_scale = 5.0
    max_sequence_length = 512

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [
            {"prompt_embeds": embeds, "prompt_attention_mask": row}
            for embeds, row in zip(prompt_embeds, mask, strict=True)
        ]

    def empty_row(self) -> dict[str, torch.Tensor]:
        return {**super().empty_row(), "prompt_attention_mask": torch.empty(self.max_sequence_length)}

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        num, _, height, width = latents.shape
        prompt_embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
        hidden_states = self.pipeline._pack_latents(latents, *latents.shape)
        velocity = denoiser(
            hidden_states=hidden_states,
            timestep=sigma,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
            img_ids=self.pipeline._prepare_latent_image_ids(
                num, height // 2, width // 2, latents.device, torch.float32
            ),
            attention_mask=torch.cat([mask, mask.new_ones(hidden_states.shape[:2])], dim=1),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)

    def enable_gradient_checkpointing(self) -> None:
        # Where diffusers recomputes the blocks it gives the mask to the double ones only, and the network would answer
        # otherwise than without. The single blocks come after them.
        mask = None

        def checkpointed(block, *inputs):
            nonlocal mask
            if len(inputs) == 3:
                inputs = (*inputs, mask)
            else:
                mask = inputs[-1]
            return checkpoint(block, *inputs, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(checkpointed)
