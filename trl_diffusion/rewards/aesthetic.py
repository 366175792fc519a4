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

"""The LAION aesthetic predictor: five linear layers on CLIP's image feature."""

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from .checkpoints import build_and_load, find_file, load_transformers_model, read_weights
from .preprocessing import clip_pixels
from .pretrained import PretrainedReward


class LinearHead(nn.Module):
    """
    Five linear layers without activations, `width` to 1024 to 128 to 64 to 16 to 1, with dropout between them in
    training: the head of the aesthetic predictor and of ImageReward, with the names of both.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scores `(B,)` of features `(B, width)`."""
        return self.layers(features)[:, 0]


class AestheticReward(PretrainedReward):
    """
    The LAION aesthetic score, version 2, about 4 to 7. The prompt plays no part.

    Source: [improved-aesthetic-predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor),
    `sac+logos+ava1-l14-linearMSE.pth`; its copy on the Hub is that of TRL, `trl-lib/ddpo-aesthetic-predictor`.

    Args:
        location (`str` or `Path`, *optional*):
            Folder with `sac+logos+ava1-l14-linearMSE.pth` and, where it has a `config.json`, with the CLIP model as
            well (as `save_pretrained` writes it). By default both come from the Hub.
        dtype, reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "aesthetic"
    usual_range = (4.0, 7.0)
    official_file = "sac+logos+ava1-l14-linearMSE.pth"
    official_clip = "openai/clip-vit-large-patch14"
    # The same weights under another name: the original repository is not on the Hub.
    hub = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")

    def __init__(
        self,
        location: str | Path | None = None,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__(dtype, reward_batch_size, scale)
        clip = self.official_clip
        if location is None:
            path = find_file(*self.hub)
        else:
            path = find_file(location, self.official_file, stem_only=True)
            if (path.parent / "config.json").is_file():
                clip = path.parent
        self.clip = load_transformers_model(CLIPModel, ["clip"], clip).to(self.dtype)
        # Only images are encoded.
        del self.clip.text_model, self.clip.text_projection
        width = self.clip.config.projection_dim
        state = {key: weight.float() for key, weight in read_weights(path).items()}
        self.head = build_and_load(lambda: LinearHead(width), state, path)
        self.freeze()

    def score_batch(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        # The predictor was made with OpenAI's own package, which crops as torchvision does.
        pixels = clip_pixels(images, self.clip.config.vision_config.image_size, rounding="torchvision")
        features = self.clip.get_image_features(pixels.to(self.dtype)).pooler_output.float()
        return self.head(nn.functional.normalize(features, dim=-1))
