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
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from .editing import EditingFlowModel
from .flux import FluxFlowModel


class FluxKontextFlowModel(EditingFlowModel, FluxFlowModel):
    """
    FLUX.1 Kontext: FLUX.1 whose network sees the tokens of an image behind those that it draws, at positions whose first
    coordinate is 1.

    The conditioning is FLUX.1's, with the image's latents at the one of the pipeline's preferred sizes whose aspect is
    nearest.
    """

    pipeline_class = FluxKontextPipeline

    def encode_text(self, prompt: str, picture: Image.Image, device: torch.device) -> dict[str, torch.Tensor]:
        (row,) = FluxFlowModel.encode(self, [prompt], device)
        return row

    def condition_size(self, picture: Image.Image) -> tuple[int, int]:
        height, width = self.pipeline.image_processor.get_default_height_width(picture)
        # Of the module, as the pipeline reads them.
        preferred = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(width / height - w / h), w, h) for w, h in preferred)
        multiple = self.latent_downsample
        return height // multiple * multiple, width // multiple * multiple

    def size_arguments(self, height: int, width: int) -> dict[str, int]:
        # Or the pipeline draws about a million pixels in this aspect.
        return {"height": height, "width": width, "max_area": height * width}

    def forward_of_size(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        tokens, image_tokens = (self.pipeline._pack_latents(x, *x.shape) for x in (latents, image_latents))
        ids, image_ids = (
            self._get_image_ids(x.shape[-2] // 2, x.shape[-1] // 2, x.device) for x in (latents, image_latents)
        )
        prompt_embeds = conditioning["prompt_embeds"]
        velocity = denoiser(
            hidden_states=torch.cat([tokens, image_tokens], 1),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.transformer_config.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
            img_ids=torch.cat([ids, image_ids + torch.tensor([1.0, 0.0, 0.0], device=ids.device)]),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(velocity[:, : tokens.shape[1]], *latents.shape[-2:], vae_scale_factor=1)
