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

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanPipeline

from .video_vae import VideoVAEFlowModel


class WanFlowModel(VideoVAEFlowModel):
    """
    Wan 2.1 and 2.2, text to video, with true guidance: the models with one network (1.3B and 14B of 2.1, 5B of 2.2).

    Latents are `(B, C, F, h, w)`; the VAE makes `1 + 4 (F - 1)` frames of F latent ones, one after the other. The network
    sees tokens of 2 x 2 latent pixels, that of 2.2 a time for each of them. The conditioning holds `prompt_embeds`
    `(B, L, D)` of UMT5, zero behind the prompt, to which the network attends as well. The scheduler makes the sigmas,
    since the pipeline's call takes none.

    Attributes:
        max_sequence_length (`int`):
            L, 512 as in the pipeline.
    """

    pipeline_class = WanPipeline
    true_guidance = True
    default_guidance_scale = 5.0
    default_size = (480, 832)
    default_num_frames = 81
    max_sequence_length = 512

    def __init__(self, pipeline: WanPipeline):
        self.check_pipeline(pipeline.config)
        super().__init__(pipeline)

    @classmethod
    def check_pipeline(cls, config: Mapping[str, Any]) -> None:
        has_second = (config.get("transformer_2") or (None,))[0] is not None
        if has_second or config.get("boundary_ratio") is not None:
            raise ValueError(
                f"This WanPipeline has two experts (transformer_2, boundary_ratio={config.get('boundary_ratio')}), as "
                "Wan2.2-T2V-A14B, and an adapter is trained on one network. Use a model with a single one: "
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan-AI/Wan2.1-T2V-14B-Diffusers or Wan-AI/Wan2.2-TI2V-5B-Diffusers."
            )

    @classmethod
    def vae_downsample(cls, vae_config: Mapping[str, Any]) -> int:
        return vae_config.get("scale_factor_spatial", 8)  # which the files of 2.1 do not have

    @property
    def latent_downsample(self) -> int:
        return self.pipeline.vae_scale_factor_spatial * self.patch_size

    @property
    def max_size(self) -> int:
        return self.transformer_config.rope_max_seq_len * self.latent_downsample

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_sequence_length
        )
        return [{"prompt_embeds": embeds} for embeds in prompt_embeds]

    def empty_row(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.empty(self.max_sequence_length, self.transformer_config.text_dim)}

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        time = sigma * self.pipeline.scheduler.config.num_train_timesteps
        if self.pipeline.config.expand_timesteps:
            num_tokens = latents[0, 0, :, :: self.patch_size, :: self.patch_size].numel()
            time = time[:, None].expand(-1, num_tokens)
        return denoiser(
            hidden_states=latents,
            timestep=time,
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]

    def unshifted_sigmas(self, num_inference_steps: int) -> None:
        return None

    def latent_shape(self, height: int, width: int, num_frames: int | None = None) -> tuple[int, ...]:
        num_frames = self.default_num_frames if num_frames is None else num_frames
        factor = self.pipeline.vae_scale_factor_spatial
        num_latent_frames = (num_frames - 1) // self.temporal_downsample + 1
        return (self.vae.config.z_dim, num_latent_frames, height // factor, width // factor)
