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
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from .editing import EditingFlowModel
from .qwen_image import QwenImageFlowModel


class QwenImageEditPlusFlowModel(EditingFlowModel, QwenImageFlowModel):
    """
    Qwen-Image-Edit from release 2509 on: Qwen-Image whose network sees the tokens of one image behind those that it draws,
    and whose text encoder reads the image, in small, with the prompt, and with the negative prompt.

    The conditioning is Qwen-Image's, with the image's latents at about a million pixels.
    """

    pipeline_class = QwenImageEditPlusPipeline

    def __init__(self, pipeline: QwenImageEditPlusPipeline | QwenImageEditPipeline):
        super().__init__(pipeline)
        if pipeline.processor is not None:
            self.tokenizers["processor"] = pipeline.processor

    def condition_size(self, picture: Image.Image) -> tuple[int, int]:
        # Of the module, as the pipeline reads it; likewise below.
        return self._size(pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE, picture)

    def read_picture(self, picture: Image.Image) -> list[Image.Image]:
        """The images that the pipeline gives to the text encoder."""
        height, width = self._size(pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, picture)
        return [self.pipeline.image_processor.resize(picture, height, width)]

    def encode_text(self, prompt: str, picture: Image.Image, device: torch.device) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipeline.encode_prompt([prompt], image=self.read_picture(picture), device=device)
        return {"prompt_embeds": embeds[0]}

    def forward_of_size(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        tokens, image_tokens = self._pack(latents), self._pack(image_latents)
        shapes = [(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in (latents, image_latents)]
        velocity = denoiser(
            hidden_states=torch.cat([tokens, image_tokens], 1),
            timestep=sigma,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        return self._unpack(velocity[:, : tokens.shape[1]], latents)

    @staticmethod
    def _size(area: int, picture: Image.Image) -> tuple[int, int]:
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, picture.width / picture.height)
        return height, width


class QwenImageEditFlowModel(QwenImageEditPlusFlowModel):
    """The first release of Qwen-Image-Edit, whose text encoder reads the image at the size that the network sees it."""

    pipeline_class = QwenImageEditPipeline

    def condition_size(self, picture: Image.Image) -> tuple[int, int]:
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, picture.width / picture.height)
        return height, width

    def read_picture(self, picture: Image.Image) -> list[Image.Image]:
        return [self.pipeline.image_processor.resize(picture, *self.condition_size(picture))]
