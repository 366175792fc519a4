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

"""Text in images: how well the words that a prompt puts in quotes can be read."""

import re
from collections.abc import Callable

from PIL import Image

from .base import BlackBoxReward


# Straight or typographic double quotes.
_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")


class OCRReward(BlackBoxReward):
    """
    1 - (edit distance of the recognised text to the wanted one) / (length of the wanted one), at least 0.

    The wanted text stands between the first double quotes of the prompt: `a sign that says "open"`. Case and the kind
    and number of spaces do not count. Prompts without quotes are not applicable. Source:
    [Flow-GRPO](https://huggingface.co/papers/2505.05470).

    Args:
        recognizer (`Callable`):
            What reads: `recognizer(images: list[PIL.Image]) -> list[str]`.
        name (`str`, *optional*, defaults to `"ocr"`):
            Name in logs.
    """

    scores_frames = True

    def __init__(self, recognizer: Callable[[list[Image.Image]], list[str]], name: str = "ocr"):
        if not callable(recognizer):
            raise TypeError(
                f"The recogniser must be a callable from a list of PIL images to a list of texts, got {recognizer!r}."
            )
        self.recognizer = recognizer
        self.name = name

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        """
        Args:
            images (`list[PIL.Image]`): pictures.
            prompts (`list[str]`): one a picture.

        Returns:
            `list[float | None]`: in [0, 1], None where the prompt has no text in quotes.

        Raises:
            `ValueError`: the recogniser returned another number of texts than pictures.
        """
        targets = [quoted_text(prompt) for prompt in prompts]
        rows = [row for row, target in enumerate(targets) if target is not None]
        texts = self.recognizer([images[row] for row in rows]) if rows else []
        if len(texts) != len(rows):
            raise ValueError(f"The recogniser returned {len(texts)} texts for {len(rows)} images; give one an image.")
        scores: list[float | None] = [None] * len(images)
        for row, text in zip(rows, texts, strict=True):
            target = targets[row]
            scores[row] = max(0.0, 1 - edit_distance(_plain(text), target) / len(target))
        return scores


def quoted_text(prompt: str) -> str | None:
    """The text between the first double quotes, in lower case and with single spaces; None if there is none."""
    match = _QUOTED.search(prompt)
    return (_plain(match[1]) or None) if match else None


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: the least number of characters to insert, delete or replace. ("ab", "cb") has 1."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
