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

"""A reward as an `evaluate` metric."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image
from torch import nn

from ..rewards import Reward, load_reward, reward_name, score_pictures, to_pil
from ..rewards.remote import encode_png
from .intervals import by_prompt, clustered_mean


INPUTS = """
    images (`list[PIL.Image]` or `torch.Tensor` of shape `(B, 3, H, W)` in [0, 1]): the images, of any sizes.
    prompts (`list[str]`): one an image.
"""


class PictureMetric(evaluate.Metric):
    """
    Base of the metrics: named after a reward, fed with pictures and prompts, in any number of batches.

    Args:
        reward (`str`, [`RewardModel`] or `Callable`): see [`load_reward`].
        device (`torch.device` or `str`, *optional*): where a reward model runs; a GPU if there is one.
        batch_size (`int`, *optional*, defaults to `32`): images that are scored together.
        **kwargs: of `evaluate.Metric`, e.g. `experiment_id` or `cache_dir`.
    """

    _description: str
    _inputs_description: str
    picture_inputs: tuple[str, ...]  # names of the inputs besides "prompts"

    def __init__(
        self,
        reward: str | Reward,
        device: torch.device | str | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ):
        self.reward = load_reward(reward)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(self.reward, nn.Module):
            self.reward.to(self.device)
        self.batch_size = batch_size
        super().__init__(**kwargs)

    @property
    def name(self) -> str:
        """The reward's name; prefixes and cache folders are named after it."""
        return reward_name(self.reward)

    def _info(self) -> evaluate.MetricInfo:
        # Pictures are kept as PNG files and decoded batch by batch: thousands of them need not fit into memory.
        inputs = dict.fromkeys(self.picture_inputs, datasets.Value("large_string"))
        return evaluate.MetricInfo(
            description=self._description,
            citation="",
            inputs_description=self._inputs_description,
            features=datasets.Features({**inputs, "prompts": datasets.Value("string")}),
        )

    def add_batch(self, *, prompts: list[str], **pictures: Sequence[Image.Image] | torch.Tensor) -> None:
        """
        Add images and prompts.

        Raises:
            `ValueError`: no images, or another number of prompts than images.
        """
        unknown = sorted(pictures.keys() - set(self.picture_inputs))
        missing = [name for name in self.picture_inputs if pictures.get(name) is None]
        if unknown or missing or prompts is None:
            raise ValueError(
                f"The metric {self.name!r} takes {', '.join(self.picture_inputs)} and prompts; "
                f"got {unknown or 'nothing'} besides, and without {missing or 'prompts'}."
            )
        files = {}
        for name in self.picture_inputs:
            images = pictures[name]
            if isinstance(images, torch.Tensor):
                if images.ndim != 4:
                    raise ValueError(
                        f"{name} must be of shape (B, 3, H, W), got {tuple(images.shape)}. Score videos by "
                        "trl_diffusion.rewards.score_images."
                    )
                images = to_pil(images)
            if not len(images):
                raise ValueError(f"There are no {name} to score. Give at least one.")
            if len(images) != len(prompts):
                raise ValueError(f"Got {len(prompts)} prompts for {len(images)} {name}. Give one prompt an image.")
            files[name] = [encode_png(image) for image in images]
        super().add_batch(prompts=list(prompts), **files)

    def add(self, *, prompts: str, **pictures: Image.Image) -> None:
        """Add one image and its prompt, under the names of the batches: `add(images=image, prompts=prompt)`."""
        self.add_batch(prompts=[prompts], **{name: [picture] for name, picture in pictures.items()})

    def _scores(self, files: list[str], prompts: list[str]) -> np.ndarray:
        """Scores of encoded pictures, NaN where the reward does not apply."""
        scores = []
        for start in range(0, len(files), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pictures = [Image.open(io.BytesIO(base64.b64decode(file))) for file in files[rows]]
            scores += score_pictures(self.reward, pictures, prompts[rows], device=self.device)
        return np.array([math.nan if score is None else score for score in scores])


class RewardMetric(PictureMetric):
    """
    Mean, standard error and scores of images under a reward.

    `compute(images=..., prompts=...)` returns, for the reward "hpsv2":

    - `hpsv2` (`float`): mean over the images to which the reward applies;
    - `hpsv2_standard_error` (`float`): of the mean, NaN for fewer than two prompts. Several images of one prompt are
      not taken for independent;
    - `hpsv2_scores` (`list[float]`): one an image, in order, NaN where the reward does not apply;
    - `hpsv2_per_prompt` (`dict[str, float]`): mean of each prompt's images.

    ```python
    metric = evaluate.combine([load_metric("hpsv2"), load_metric("image_reward")])
    metric.compute(images=images, prompts=prompts)["hpsv2"]
    ```

    See [`PictureMetric`] for the arguments.
    """

    _description = "Mean score of images for their prompts under a reward model."
    _inputs_description = INPUTS
    picture_inputs = ("images",)

    def _compute(self, images: list[str], prompts: list[str]) -> dict[str, Any]:
        scores = self._scores(images, prompts)
        groups = by_prompt(scores, prompts)
        mean, error = clustered_mean(list(groups.values()))
        return {
            self.name: mean,
            f"{self.name}_standard_error": error,
            f"{self.name}_scores": scores.tolist(),
            f"{self.name}_per_prompt": {prompt: float(values.mean()) for prompt, values in groups.items()},
        }


def load_metric(reward: str | Reward, **options: Any) -> RewardMetric:
    """
    A reward as a metric.

    Args:
        reward (`str`, [`RewardModel`] or `Callable`): see [`load_reward`].
        **options: passed to [`load_reward`] where `reward` is a name.
    """
    return RewardMetric(load_reward(reward, **options))
