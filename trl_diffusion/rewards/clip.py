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

"""CLIP and PickScore: the cosine of an image and a text, from `transformers.CLIPModel`."""

from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

from .checkpoints import load_tokenizer, load_transformers_model
from .preprocessing import clip_pixels
from .pretrained import TwoTowerReward


class CLIPReward(TwoTowerReward):
    """
    Cosine of CLIP's image and text features, about 0.1 to 0.35.

    Source: [CLIP](https://huggingface.co/papers/2103.00020), and
    [CLIPScore](https://huggingface.co/papers/2104.08718), which multiplies it by 2.5.

    Args:
        location (`str` or `Path`, *optional*):
            Any CLIP checkpoint of transformers, on the Hub or in a folder.
        dtype, reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "clip"
    usual_range = (0.1, 0.35)
    official = "openai/clip-vit-large-patch14"
    official_tokenizer: str | None = None  # that of the checkpoint itself

    def __init__(
        self,
        location: str | Path | None = None,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__(dtype, reward_batch_size, scale)
        location = self.official if location is None else location
        self.model = load_transformers_model(CLIPModel, ["clip"], location)
        # Read before the cast: bfloat16 would move exp(logit_scale) by a percent.
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.to(self.dtype)
        self.tokenizer = load_tokenizer(CLIPTokenizer, location, self.official_tokenizer or str(location))
        self.freeze()

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        # 224 pixels, crop rounded down, CLIP's mean and deviation: the processors of these models.
        pixels = clip_pixels(images, self.model.config.vision_config.image_size, rounding="transformers")
        return self.model.get_image_features(pixels.to(self.dtype)).pooler_output

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        return self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output


class PickScoreReward(CLIPReward):
    """
    PickScore: exp(logit scale) times the cosine of a CLIP ViT-H/14 tuned on people's choices, about 18 to 24.

    Source: [Pick-a-Pic](https://huggingface.co/papers/2305.01569), `yuvalkirstain/PickScore_v1`. `scale=1 / 20` brings
    scores near 1.

    Args:
        location (`str` or `Path`, *optional*):
            Another checkpoint of the same kind, on the Hub or in a folder.
        dtype, reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "pickscore"
    usual_range = (18.0, 24.0)
    official = "yuvalkirstain/PickScore_v1"
    official_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @property
    def score_scale(self) -> float:
        return self.scale * self.logit_scale
