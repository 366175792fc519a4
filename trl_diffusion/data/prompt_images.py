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

"""A prompt together with the image that it edits: what stands for it wherever a plain prompt is a string."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from .images import open_picture, plain_rgb
from .prompts import CONDITION_IMAGE


@dataclass(frozen=True)
class PromptWithImage:
    """
    A prompt of an editing model. Two are equal where text and digest are; what the digest is of travels along, and is
    decoded when it is encoded.

    Args:
        text (`str`): the prompt.
        digest (`str`): of the image.
        image (`dict` or `PIL.Image.Image`, *optional*): the bytes of a file under "bytes" or its path under "path", or a
            picture. Made from anything by [`with_image`].
    """

    text: str
    digest: str
    image: dict[str, Any] | Image.Image | None = field(default=None, compare=False, repr=False)

    def open(self) -> Image.Image:
        """
        The picture, upright, RGB.

        Raises:
            `ValueError`: it cannot be read, or not become RGB; the message has the prompt.
        """
        name = f"The prompt {self.text!r}"
        if self.image is None:
            raise ValueError(f"{name} has no image any more. Pass it with its {CONDITION_IMAGE}.")
        try:
            picture = self.image if isinstance(self.image, Image.Image) else open_picture(self.image)
        except ValueError as error:
            raise ValueError(
                f"The {CONDITION_IMAGE} of the prompt {self.text!r} cannot be read: {error}. Replace it, or drop the prompt."
            ) from error
        return plain_rgb(picture, name)


# What [`Conditioning`], [`Sampler`] and the trainers take for a prompt.
Prompt = str | PromptWithImage


def with_image(text: str, image: Any) -> PromptWithImage:
    """
    A prompt with the image that it edits.

    Args:
        text (`str`): the prompt.
        image: a picture (`PIL.Image`), the path of a file, an undecoded value of a column of type [`~datasets.Image`], an
            array `(H, W, 3)` or a tensor `(3, H, W)`: uint8, or floating point in [0, 1].

    Raises:
        `ValueError`: no image, a file that is not there, an array of another shape.
        `TypeError`: something else.
    """
    if isinstance(image, str | os.PathLike):
        image = {"bytes": None, "path": os.fspath(image)}
    if isinstance(image, Mapping):
        content = image["bytes"]
        if content is None:
            try:
                content = Path(image["path"]).read_bytes()
            except OSError as error:
                raise ValueError(
                    f"The {CONDITION_IMAGE} {image['path']!r} of the prompt {text!r} cannot be read: {error.strerror}. Give "
                    "the path of a picture."
                ) from error
        return PromptWithImage(text, hashlib.sha256(content).hexdigest(), dict(image))
    picture = _as_picture(text, image)
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    return PromptWithImage(text, digest.hexdigest(), picture)


def _as_picture(text: str, image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().movedim(0, -1).numpy()
    if not isinstance(image, np.ndarray):
        what = "has no image" if image is None else f"has an image of type {type(image).__name__}"
        raise (ValueError if image is None else TypeError)(
            f"The prompt {text!r} {what}. Give a PIL.Image, a path, an array (H, W, 3) or a tensor (3, H, W)."
        )
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"The prompt {text!r} has an image of shape {image.shape}, channels last. Give an array (H, W, 3) or a tensor "
            "(3, H, W)."
        )
    if image.dtype != np.uint8:
        if not (0 <= image.min() and image.max() <= 1):
            raise ValueError(
                f"The prompt {text!r} has an image with values from {image.min():g} to {image.max():g}. Floating point must "
                "lie in [0, 1]; convert others to uint8."
            )
        image = (image.astype(np.float64) * 255).round().astype(np.uint8)
    return Image.fromarray(image)


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row of a dataset, with its image where it has the column."""
    return with_image(row["prompt"], row[CONDITION_IMAGE]) if CONDITION_IMAGE in row else row["prompt"]


def prompts_in(dataset: Dataset) -> Iterator[Prompt]:
    """The prompts of a dataset, as [`prompt_of`]."""
    if CONDITION_IMAGE not in dataset.column_names:
        return iter(dataset["prompt"])
    return map(prompt_of, dataset.select_columns(["prompt", CONDITION_IMAGE]))


def text_of(prompt: Prompt) -> str:
    """The text of a prompt, without its image."""
    return prompt.text if isinstance(prompt, PromptWithImage) else prompt


def texts_of(prompts: list[Prompt]) -> list[str]:
    """The texts of prompts, as rewards take them."""
    return [text_of(prompt) for prompt in prompts]


def key_of(prompt: Prompt) -> Prompt:
    """A prompt that is equal to this one, and holds no picture in memory."""
    return replace(prompt, image=None) if isinstance(prompt, PromptWithImage) else prompt


def to_json(prompts: list[Prompt]) -> list[str | dict[str, str]]:
    """Prompts as JSON, without their images."""
    return [
        {"text": prompt.text, "digest": prompt.digest} if isinstance(prompt, PromptWithImage) else prompt
        for prompt in prompts
    ]


def from_json(values: list[str | dict[str, str]]) -> list[Prompt]:
    """The inverse of [`to_json`]: prompts that are equal to those, without images."""
    return [PromptWithImage(**value) if isinstance(value, dict) else value for value in values]
