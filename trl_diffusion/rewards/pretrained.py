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

"""What all the built-in reward models share: batches, dtype, scale, and scoring outside autocast."""

from abc import abstractmethod
from collections.abc import Iterator

import torch

from .base import RewardModel
from .preprocessing import check_images, check_inputs


class PretrainedReward(RewardModel):
    """
    Base of the built-in reward models.

    A subclass loads its weights in `__init__`, after calling this one, and defines [`score_batch`].

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            What the encoders compute in, float32 or bfloat16. Preprocessing, normalised dot products and heads are
            always in float32, and autocast is off.
        reward_batch_size (`int`, *optional*):
            Images that are scored together; all of a call by default.
        scale (`float`, *optional*, defaults to `1.0`):
            What scores are multiplied by.
    """

    usual_range: tuple[float, float] | None = None
    """Lowest and highest score that most images get, without `scale`, where that is known."""

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}.")
        if reward_batch_size is not None and reward_batch_size < 1:
            raise ValueError(f"reward_batch_size must be at least 1 or None (all together), got {reward_batch_size}.")
        self.dtype = torch.float32 if dtype is None else dtype
        self.reward_batch_size = reward_batch_size
        self.scale = scale

    @abstractmethod
    def score_batch(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores `(B,)`, float32, of images and prompts that were checked and fit into one batch; without `scale`."""

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        check_inputs(images, prompts)
        with without_autocast(images.device):
            scores = [self.score_batch(images[rows], prompts[rows]) for rows in self.batches(len(prompts))]
            return self.scale * torch.cat(scores)

    def batches(self, count: int) -> Iterator[slice]:
        """Rows to process together."""
        size = self.reward_batch_size or max(count, 1)
        return (slice(start, start + size) for start in range(0, count, size))


class TwoTowerReward(PretrainedReward):
    """
    A reward that is the dot product of an image's and a text's feature, times `score_scale`.

    Text features of unit length may be combined before the product, so that one forward of the image serves several
    prompts; semantic relative preference does so. A subclass defines [`image_features`] and [`text_features`].

    ```python
    class MyCLIP(TwoTowerReward):
        name = "my-clip"

        def __init__(self):
            super().__init__()
            self.model, self.tokenizer = load_my_clip()

        def image_features(self, images):
            return self.model.get_image_features(my_preprocessing(images)).pooler_output

        def text_features(self, prompts):
            tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
            return self.model.get_text_features(**tokens).pooler_output
    ```
    """

    # Text features that are kept: prompts of a training set and their variants. 64 MiB at 1024 dimensions.
    max_cached_texts = 16384

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__(dtype, reward_batch_size, scale)
        self._text_cache: dict[str, torch.Tensor] = {}

    @abstractmethod
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(B, D)` of images `(B, 3, H, W)` in [0, 1], of any length, differentiable in the images."""

    @abstractmethod
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Features `(B, D)` of prompts, of any length."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def score_scale(self) -> float:
        """What the dot product of unit features is multiplied by."""
        return self.scale

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): float, in [0, 1], of any size.

        Returns:
            `torch.Tensor` of shape `(B, D)`, float32, rows of unit length, differentiable in the images.

        Raises:
            `TypeError` or `ValueError`: images that cannot be scored, see [`~rewards.preprocessing.check_images`].
        """
        check_images(images)
        with without_autocast(images.device):
            features = [self.image_features(images[rows]).float() for rows in self.batches(len(images))]
            return torch.nn.functional.normalize(torch.cat(features), dim=-1)

    def encode_texts(self, prompts: list[str]) -> torch.Tensor:
        """
        Args:
            prompts (`list[str]`): texts; each distinct one is encoded once and kept.

        Returns:
            `torch.Tensor` of shape `(B, D)`, float32, rows of unit length, without gradient.
        """
        wanted = dict.fromkeys(prompts)
        new = [prompt for prompt in wanted if prompt not in self._text_cache]
        excess = max(0, len(self._text_cache) + len(new) - self.max_cached_texts)
        for prompt in [prompt for prompt in self._text_cache if prompt not in wanted][:excess]:
            del self._text_cache[prompt]
        with torch.no_grad(), without_autocast(self.device):
            for rows in self.batches(len(new)):
                features = torch.nn.functional.normalize(self.text_features(new[rows]).float(), dim=-1)
                self._text_cache.update(zip(new[rows], features.unbind(), strict=True))
        return torch.stack([self._text_cache[prompt].to(self.device) for prompt in prompts])

    def score_features(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Scores `(B,)` of features `(B, D)` of [`encode_images`] and of (combinations of) [`encode_texts`]."""
        with without_autocast(image_features.device):
            return self.score_scale * (image_features * text_features).sum(dim=-1)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        check_inputs(images, prompts)
        return self.score_features(self.encode_images(images), self.encode_texts(prompts))


def without_autocast(device: torch.device) -> torch.autocast:
    """Within this context nothing is cast: bfloat16 costs normalised dot products and small heads their accuracy."""
    return torch.autocast(device.type, enabled=False)
