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

"""What families have in common that edit an image: its latents beside those that are drawn."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.prompt_images import Prompt, PromptWithImage
from .base import FlowModel


class EditingFlowModel(FlowModel):
    """
    Base of the families whose network sees the latents of an image beside those that it draws.

    A prompt comes with its image, a [`~trl_diffusion.data.prompt_images.PromptWithImage`]. The conditioning holds
    `image_latents` `(B, C, [1,] h, w)`, the mode of the VAE's posterior, of different images with zeros beyond the height
    and the width of each, and these as `image_size` `(B, 2)`. The networks have one set of positions for a whole batch and
    no mask for images, so rows whose images differ in size go through the network one size after the other.

    A family writes [`encode_text`], [`condition_size`] and [`forward_of_size`].
    """

    takes_image = True

    def negative_of(self, prompt: Prompt) -> Prompt | None:
        return None if self.negative_prompt is None else replace(prompt, text=self.negative_prompt)

    @abstractmethod
    def encode_text(self, prompt: str, picture: Image.Image, device: torch.device) -> dict[str, torch.Tensor]:
        """The conditioning of one prompt and the picture that it edits, but for the latents of this."""

    @abstractmethod
    def condition_size(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width in pixels at which the pipeline gives a picture to the VAE."""

    @abstractmethod
    def forward_of_size(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        image_latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        """As [`forward`], with the images' latents `(B, C, [1,] h, w)`, all of one size."""

    def encode(self, prompts: list[PromptWithImage], device: torch.device) -> list[dict[str, torch.Tensor]]:
        rows = []
        for prompt in prompts:
            picture = prompt.open()
            height, width = self.condition_size(picture)
            pixels = self.pipeline.image_processor.preprocess(picture, height, width)
            latents = self.encode_image(pixels / 2 + 0.5)[0].to(device)
            size = torch.tensor(latents.shape[-2:], device=device)
            text = self.encode_text(prompt.text, picture, device)
            rows.append({**text, "image_latents": latents, "image_size": size})
        return rows

    @contextlib.contextmanager
    def text_encoders_on(self, device: torch.device) -> Iterator[None]:
        # Images are encoded with their prompts.
        before = self.vae.device
        with super().text_encoders_on(device):
            self.vae.to(device)
            try:
                yield
            finally:
                self.vae.to(before)

    def empty_row(self) -> dict[str, torch.Tensor]:
        # The pipelines give the network about a million pixels.
        latents = torch.empty(self.latent_shape(1024, 1024))
        return {**super().empty_row(), "image_latents": latents, "image_size": torch.empty(2, dtype=torch.int64)}

    def image_sizes(self, conditioning: dict[str, torch.Tensor]) -> list[list[int]]:
        """Height and width of the image's latents of each row of a batch."""
        return conditioning["image_size"].tolist()

    def collate(self, rows: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
        height, width = (max(row["image_latents"].shape[axis] for row in rows) for axis in (-2, -1))
        padded = []
        for row in rows:
            latents = row["image_latents"]
            beyond = (0, width - latents.shape[-1], 0, height - latents.shape[-2])
            padded.append({**row, "image_latents": F.pad(latents, beyond)})
        return super().collate(padded, length)

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        rows_of_size: dict[tuple[int, ...], list[int]] = {}
        for row, size in enumerate(self.image_sizes(conditioning)):
            rows_of_size.setdefault(tuple(size), []).append(row)
        velocities, order = [], []
        for (height, width), rows in rows_of_size.items():
            part = {
                name: tensor if len(rows) == len(latents) else tensor[rows]
                for name, tensor in {"latents": latents, "sigma": sigma, **conditioning}.items()
            }
            del part["image_size"]
            image_latents = part.pop("image_latents")[..., :height, :width]
            velocities.append(
                self.forward_of_size(
                    denoiser, part.pop("latents"), image_latents, part.pop("sigma"), part, guidance_scale
                )
            )
            order += rows
        if len(velocities) == 1:
            return velocities[0]
        return torch.cat(velocities)[torch.tensor(order, device=latents.device).argsort()]
