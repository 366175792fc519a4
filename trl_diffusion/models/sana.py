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

import functools
import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch.utils.checkpoint import checkpoint

from .base import FlowModel


class SanaFlowModel(FlowModel):
    """
    Sana 1 and 1.5, with true guidance.

    The network sees each latent pixel as a token; the autoencoder has no posterior, so that images have one encoding. The
    conditioning holds `prompt_embeds` `(B, L, D)` of Gemma 2 and `prompt_attention_mask` `(B, L)`. The pipeline puts an
    instruction before a prompt, and none before the negative one.

    Attributes:
        max_sequence_length (`int`):
            L, 300 as in the pipeline.
    """

    pipeline_class = SanaPipeline
    true_guidance = True
    default_guidance_scale = 4.5
    max_sequence_length = 300
    patch_size = 1
    negative_mark = "\0negative\0"

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.transformer_config.sample_size * self.pipeline.vae_scale_factor
        return size, size

    @classmethod
    def vae_downsample(cls, vae_config: dict[str, Any]) -> int:
        return 2 ** (len(vae_config["encoder_block_out_channels"]) - 1)

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        rows = []
        for prompt in prompts:
            embeds, mask, _, _ = self.pipeline.encode_prompt(
                prompt.removeprefix(self.negative_mark),
                do_classifier_free_guidance=False,
                device=device,
                max_sequence_length=self.max_sequence_length,
                complex_human_instruction=None if prompt.startswith(self.negative_mark) else instruction,
            )
            rows.append({"prompt_embeds": embeds[0], "prompt_attention_mask": mask[0]})
        return rows

    def empty_row(self) -> dict[str, torch.Tensor]:
        return {
            "prompt_embeds": torch.empty(self.max_sequence_length, self.transformer_config.caption_channels),
            "prompt_attention_mask": torch.empty(self.max_sequence_length, dtype=torch.int64),
        }

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        time_unit = self.pipeline.scheduler.config.num_train_timesteps * self.transformer_config.timestep_scale
        return denoiser(
            hidden_states=latents,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=sigma * time_unit,
            return_dict=False,
        )[0]

    def guidance_arguments(self, guidance_scale: float) -> dict[str, Any]:
        # Its call would draw the nearest of its own sizes, and resize the image.
        return {**super().guidance_arguments(guidance_scale), "use_resolution_binning": False}

    def latent_statistics(self, like: torch.Tensor) -> tuple[float, float]:
        return 0.0, self.vae.config.scaling_factor

    def encode_pixels(self, pixels: torch.Tensor, generator: Any) -> torch.Tensor:
        return self.vae.encode(pixels).latent

    def enable_vae_gradient_checkpointing(self) -> None:
        for block in self.vae.decoder.up_blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
