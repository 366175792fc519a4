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
from diffusers import ZImagePipeline

from .base import FlowModel


# What is published has one configuration but for this shift of the schedule: 3 in Z-Image-Turbo, 6 in Z-Image.
TURBO_SHIFT = 3.0


class ZImageFlowModel(FlowModel):
    """
    Z-Image, with true guidance, and Z-Image-Turbo, without.

    The network takes lists of images and of prompts, is told 1 - sigma, and predicts x_0 - e. The pipeline's guidance g
    leads from the negative prompt g + 1 times as far as the prompt, so 0 is none. The conditioning holds `prompt_embeds`
    `(B, L, D)` of Qwen3, of as many tokens as the prompt has.

    Attributes:
        max_sequence_length (`int`):
            Tokens of a prompt that the network sees at most, 512 as in the pipeline.
    """

    pipeline_class = ZImagePipeline
    true_guidance = True
    unguided_scale = 0.0
    variable_length = ("prompt_embeds",)
    default_guidance_scale = 5.0
    max_sequence_length = 512

    def __init__(self, pipeline: ZImagePipeline):
        super().__init__(pipeline)
        if pipeline.scheduler.config.shift == TURBO_SHIFT:
            self.set_distilled("Tongyi-MAI/Z-Image")
        else:
            self.distilled_model = "Tongyi-MAI/Z-Image-Turbo"

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def max_size(self) -> int:
        # The first of the three is for the prompt.
        return min(self.transformer_config.axes_lens[1:]) * self.latent_downsample

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        # The pipeline writes its template into the list that it is given.
        prompt_embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"prompt_embeds": embeds} for embeds in prompt_embeds]

    def empty_row(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.empty(self.max_sequence_length, self.transformer_config.cap_feat_dim)}

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        lengths = self.row_lengths(conditioning["prompt_embeds_mask"])
        prompts = [embeds[:length] for embeds, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]
        images = list(latents.unsqueeze(2).unbind())  # each of one frame
        return -torch.stack(denoiser(images, 1 - sigma, prompts, return_dict=False)[0]).squeeze(2)

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        return super().guide(positive, negative, guidance_scale + 1)
