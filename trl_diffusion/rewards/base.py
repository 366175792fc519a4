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

"""The contract of a reward, and the one place where rewards are called and their answers checked."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from .frames import FRAMES_TOGETHER, reduce_frames, scored_frames
from .functions import RESERVED, call_function, score_list
from .preprocessing import to_tensor


MEMORY_REMEDY = (
    "Lower the number of images scored together (rollout_batch_size, per_device_train_batch_size, or the reward's "
    "reward_batch_size), or make room: offload_frozen=True, reward_gradient_checkpointing=True with SRPO, or the reward on "
    "a server of its own ('remote:http://...')."
)


class RewardOutOfMemoryError(RuntimeError):
    """A reward ran out of memory, as it would again with as many images; the message says what to lower."""


class _ClassName:
    """A class attribute that is the name of the class it is read from."""

    def __get__(self, instance: Any, owner: type) -> str:
        return owner.__name__


class RewardModel(nn.Module):
    """
    A frozen, differentiable reward: images and prompts in, one score an image out.

    A subclass writes `score` and sets `name`, which is the name of the class otherwise. It is kept in eval mode with frozen parameters, by [`freeze`]; never
    score under `no_grad` inside a reward, the trainers decide on that.

    ```python
    class Brightness(RewardModel):
        name = "brightness"

        def score(self, images, prompts):
            return images.mean(dim=(1, 2, 3))
    ```
    """

    name: str = _ClassName()
    gradient_checkpointing = False

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): float, in [0, 1], of any size.
            prompts (`list[str]`): one an image.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, differentiable in the images.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(images, prompts).")

    def forward(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.score(images, prompts)

    def freeze(self) -> "RewardModel":
        """Eval mode and no gradient for the parameters; gradients still reach the images."""
        return self.requires_grad_(False).eval()

    def enable_gradient_checkpointing(self) -> None:
        """
        Recompute the layers of transformers models in the backward pass instead of keeping their activations.

        Raises:
            `ValueError`: the model has no layer that transformers can checkpoint.
        """
        if not self._checkpointed_layers():
            raise ValueError(
                f"The reward {self.name!r} has no layers of transformers to checkpoint. Switch gradient checkpointing "
                "of rewards off, or override enable_gradient_checkpointing in it."
            )
        self.gradient_checkpointing = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "RewardModel":
        super().train(mode)
        if self.gradient_checkpointing:
            # transformers checkpoints in training mode only. The flag of the layer alone is set, not its children's:
            # dropout stays off. The public switch is refused by some models and does nothing in eval mode.
            for layer in self._checkpointed_layers():
                layer.training = True
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        return self

    def _checkpointed_layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer  # seconds, which no check of a name needs

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]


class VideoRewardModel(RewardModel):
    """
    A frozen, differentiable reward of whole videos, as of motion: [`score`] gets `(B, F, 3, H, W)` in [0, 1] and returns one
    score a video, `(B,)`. Any other [`RewardModel`] gets the frames as images, and its scores are reduced by
    `frame_reduction`.

    ```python
    class Steadiness(VideoRewardModel):
        name = "steadiness"

        def score(self, videos, prompts):
            return -videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    ```
    """

    def score(self, videos: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Args:
            videos (`torch.Tensor` of shape `(B, F, 3, H, W)`): float, in [0, 1], of any size and number of frames.
            prompts (`list[str]`): one a video.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, differentiable in the videos.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(videos, prompts).")


class BlackBoxReward:
    """
    A reward that is no differentiable model and needs a name or settings: a server, a recogniser of text.

    A subclass sets `name` (else it is the name of the class) and defines `__call__(images: list[PIL.Image], prompts:
    list[str], **columns)`, which returns a list of float or None. Plain functions serve as well.

    Of videos it gets a list of pictures each, as plain functions do; with `scores_frames` the pictures of all frames, whose
    scores are reduced by `frame_reduction`.

    With `scores_generations` it gets all images of a generation in one call, which may take as long as it likes, and it is
    asked in a training alone, not in its evaluations: people are such a reward.
    """

    name: str = _ClassName()
    scores_frames = False
    scores_generations = False


# A reward as users give it: a model, or a black box `f(images: list[PIL.Image], prompts: list[str], **columns)` that
# returns a list of float or None; of videos it gets a list of pictures each.
Reward = RewardModel | Callable[..., list[float | None]]


def reward_name(reward: Reward) -> str:
    """The name under which a reward is logged."""
    if isinstance(reward, RewardModel | BlackBoxReward):
        return reward.name
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return reward.__name__ if inspect.isroutine(reward) else type(reward).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | RewardOutOfMemoryError):
        return True
    text = str(error)
    if isinstance(error, RuntimeError) and ("out of memory" in text or should_reduce_batch_size(RuntimeError(text))):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def to_pil(images: torch.Tensor) -> list[Image.Image] | list[list[Image.Image]]:
    """Images `(B, 3, H, W)` in [0, 1] as 8-bit pictures; videos `(B, F, 3, H, W)` as a list of pictures each."""
    from diffusers.image_processor import VaeImageProcessor  # as above

    if images.ndim == 5:
        return [to_pil(video) for video in images]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.detach().float()))


def sees_videos(reward: Reward) -> bool:
    """Whether a reward gets a video as a whole, and not each of its frames as an image."""
    if isinstance(reward, functools.partial):
        return sees_videos(reward.func)
    if isinstance(reward, RewardModel):
        return isinstance(reward, VideoRewardModel)
    return not (isinstance(reward, BlackBoxReward) and reward.scores_frames)


def score_images(
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    columns: dict[str, list[Any]] | None = None,
    frame_reduction: str = "mean",
) -> torch.Tensor:
    """
    Score images, or videos, without gradient, and check the answer.

    Args:
        reward (`RewardModel` or `Callable`): see [`RewardModel`].
        images (`torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`): in [0, 1].
        prompts (`list[str]`): one an image.
        columns (`dict[str, list]`, *optional*): the dataset's other columns, for black-box rewards.
        frame_reduction (`str`, *optional*, defaults to `"mean"`): how the scores of a video's frames become one, where the
            reward does not see videos; see [`~trl_diffusion.rewards.frames.reduce_frames`].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, on the images' device; NaN where the reward said None or NaN, "not
        applicable".

    Raises:
        `RuntimeError`: the reward raised. [`RewardOutOfMemoryError`]: it ran out of memory. `TypeError`: it returned
        something other than numbers. `ValueError`: it returned a wrong number of scores or an infinite one, a column
        is called "images" or "prompts", or the reward is of videos and these are images. Each names the reward and the
        prompts.
    """
    name = reward_name(reward)
    columns = columns or {}
    if images.ndim == 5 and not sees_videos(reward):
        return _score_frames(reward, images, prompts, columns, frame_reduction)
    if images.ndim == 4 and isinstance(reward, VideoRewardModel):
        raise ValueError(
            f"The reward {name!r} is a VideoRewardModel, which scores videos, and these are images (first prompt: "
            f"{prompts[0]!r}). Use it with a model that makes videos, or a RewardModel."
        )
    for column in RESERVED:
        if column in columns:
            raise ValueError(f"A column is called {column!r}, which is what rewards call the {column}. Rename it.")
    try:
        if isinstance(reward, RewardModel):
            with torch.no_grad():
                answer = reward.score(images, prompts)
        else:
            answer = call_function(reward, to_pil(images), prompts, columns)
        scores = score_list(answer)
    except Exception as error:
        if is_out_of_memory(error):
            raise RewardOutOfMemoryError(
                f"The reward {name!r} ran out of memory on {len(prompts)} images: {error}. {MEMORY_REMEDY}"
            ) from error
        raise RuntimeError(
            f"The reward function {name!r} raised {type(error).__name__}: {error} (first of {len(prompts)} prompts: "
            f"{prompts[0]!r}). Mend it, or return None for an image that it cannot score."
        ) from error
    if scores is None:
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, torch.Tensor | np.ndarray) else ""
        raise TypeError(
            f"The reward function {name!r} returned {answer!r}{shape} for {len(prompts)} images (first prompt: "
            f"{prompts[0]!r}). It must return a list with one float or None an image."
        )
    if len(scores) != len(prompts):
        raise ValueError(
            f"The reward function {name!r} returned {len(scores)} scores for {len(prompts)} images (first prompt: "
            f"{prompts[0]!r}). It must return one score an image, in their order."
        )
    return torch.tensor(
        [_checked_score(score, name, prompt) for score, prompt in zip(scores, prompts, strict=True)],
        dtype=torch.float32,
        device=images.device,
    )


def _score_frames(
    reward: Reward, videos: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]], reduction: str
) -> torch.Tensor:
    """Scores `(B,)` of videos by a reward of images; not all frames together, of which a video has many."""
    frames = scored_frames(videos, reduction)
    num = frames.shape[1]
    frames, prompts = frames.flatten(0, 1), [prompt for prompt in prompts for _ in range(num)]
    columns = {name: [value for value in values for _ in range(num)] for name, values in columns.items()}
    together = max(len(videos), FRAMES_TOGETHER)
    parts = []
    for start in range(0, len(prompts), together):
        rows = slice(start, start + together)
        columns_of_rows = {name: values[rows] for name, values in columns.items()}
        parts.append(score_images(reward, frames[rows], prompts[rows], columns_of_rows))
    return reduce_frames(torch.cat(parts).view(-1, num), reduction)


def score_pictures(
    reward: Reward,
    pictures: list[Image.Image] | list[list[Image.Image]],
    prompts: list[str],
    columns: dict[str, list[Any]] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    frame_reduction: str = "mean",
) -> list[float | None]:
    """
    As [`score_images`], for PIL images, which may be of several sizes and modes, or videos, each a list of them.

    Args:
        reward (`RewardModel` or `Callable`): see [`RewardModel`]; a model on `device`.
        pictures (`list[PIL.Image]`): see [`~rewards.preprocessing.to_rgb`] for other modes than RGB.
        prompts (`list[str]`): one a picture.
        columns (`dict[str, list]`, *optional*): further columns, for black-box rewards.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where a reward model is.
        batch_size (`int`, *optional*, defaults to `32`): pictures that are scored together, at most.
        frame_reduction (`str`, *optional*, defaults to `"mean"`): see [`score_images`].

    Returns:
        `list[float | None]`: None where the reward does not apply.

    Raises:
        As [`score_images`]; `ValueError`: no pictures, or another number of prompts or column values.
    """
    columns = columns or {}
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(pictures):
            raise ValueError(f"Got {len(values)} {name} for {len(pictures)} images. Give one an image.")
    if not pictures:
        raise ValueError("There are no images to score. Give at least one image.")
    scores: list[float | None] = [None] * len(pictures)
    rows_of_size: dict[tuple, list[int]] = {}
    for row, picture in enumerate(pictures):
        size = (picture[0].size, len(picture)) if isinstance(picture, list) else picture.size
        rows_of_size.setdefault(size, []).append(row)
    batches = [
        rows[start : start + batch_size] for rows in rows_of_size.values() for start in range(0, len(rows), batch_size)
    ]
    for rows in batches:
        values = score_images(
            reward,
            _as_tensor([pictures[row] for row in rows]).to(device),
            [prompts[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in columns.items()},
            frame_reduction,
        ).tolist()
        for row, value in zip(rows, values, strict=True):
            scores[row] = None if math.isnan(value) else value
    return scores


def _as_tensor(pictures: list[Image.Image] | list[list[Image.Image]]) -> torch.Tensor:
    """Pictures of one size `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, in [0, 1]."""
    if isinstance(pictures[0], list):
        return torch.stack([to_tensor(video) for video in pictures])
    return to_tensor(pictures)


def _checked_score(score: Any, name: str, prompt: str) -> float:
    if score is None:
        return math.nan
    try:
        if isinstance(score, str):
            raise TypeError
        score = float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The reward function {name!r} returned {score!r} for the prompt {prompt!r}. A score must be a float, or "
            "None where the reward does not apply."
        ) from error
    if math.isinf(score):
        raise ValueError(
            f"The reward function {name!r} returned {score} for the prompt {prompt!r}. A score must be finite; return "
            "None where the reward does not apply."
        )
    return score
