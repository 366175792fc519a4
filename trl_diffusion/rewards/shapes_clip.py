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

"""`shapes-clip`, the small CLIP model of the embedded world, as a reward."""

import torch

from ..shapes import load_clip, preprocess
from .pretrained import TwoTowerReward


class ShapesCLIPReward(TwoTowerReward):
    """
    The cosine of an image and its prompt under the world's small CLIP model; differentiable in the image.

    Prompts may have a style word in front ("sharp. a small red circle on a white background").
    """

    name = "shapes-clip"

    def __init__(self):
        super().__init__()
        self.model, self.tokenizer = load_clip()

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(preprocess(images.to(self.device, torch.float32))).pooler_output

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**tokens).pooler_output
