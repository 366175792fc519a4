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
from diffusers import DiffusionPipeline

from .base import FlowModel
from .vae_gradients import clamp_with_inward_gradient


class VideoVAEFlowModel(FlowModel):
    """
    Base of the families whose VAE is one of videos, as those of Qwen-Image and Wan: latents have frames, statistics are of
    each channel, and what is decoded is clamped.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        # After this clamp the VAE's own changes nothing.
        self.vae.decoder.register_forward_hook(lambda module, args, output: clamp_with_inward_gradient(output, -1, 1))

    def latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, 1 / std
