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

"""Scores from a reward server over HTTP: JSON with PNG images out, scores back, never a pickle."""

import base64
import io
import itertools
import json
import logging
import math
import os
import random
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image

from .base import BlackBoxReward
from .preprocessing import to_rgb


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_DIFFUSION_REWARD_TOKEN"
LONGEST_PAUSE = 60.0  # seconds between two attempts, at most
# Key of a picture in a column.
PNG = "png"
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


class RewardServerError(RuntimeError):
    """A reward server gave no usable answer; the message says which server, what it did and what to change."""


class RemoteReward(BlackBoxReward):
    """
    A black-box reward that asks a server, e.g. `trl-diffusion reward-server`.

    An image is sent as a PNG in base64: `POST {url}/score` with `{"images": [...], "prompts": [...], "columns":
    {...}}`, where a picture in a column is `{"png": "..."}`, answered by `{"scores": [...]}`, one number an image, or null
    where the reward does not apply. Where a server cannot be reached, is too slow, overloaded (429), failing (5xx) or
    breaks off its answer, the batch is sent again after a pause that doubles; after the last retry, and at once for any
    other wrong answer, the call fails. A
    batch is scored whole or not at all, so no score is made up and none counts twice.

    Args:
        url (`str`):
            Address of the server, `http://...` or `https://...`.
        token (`str`, *optional*):
            What the server knows us by; by default the environment variable `TRL_DIFFUSION_REWARD_TOKEN`.
        batch_size (`int`, *optional*, defaults to `16`):
            Images a request.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer.
        retries (`int`, *optional*, defaults to `8`):
            Further attempts after the first.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first retry; each further pause is twice as long, a minute at most. With the defaults a
            server may be away for about three minutes.
        max_answer_bytes (`int`, *optional*, defaults to `1048576`):
            Longer answers are refused.
        name (`str`, *optional*, defaults to `"remote"`):
            Name in logs.

    Raises:
        `ValueError`: an address that is none, or a setting out of its range.
    """

    scores_frames = True

    def __init__(
        self,
        url: str,
        token: str | None = None,
        batch_size: int = 16,
        timeout: float = 120.0,
        retries: int = 8,
        backoff: float = 1.0,
        max_answer_bytes: int = 2**20,
        name: str = "remote",
    ):
        check_url(url)
        least = {"batch_size": (batch_size, 1), "retries": (retries, 0), "max_answer_bytes": (max_answer_bytes, 1)}
        for setting, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{setting} must be at least {bound}, got {value}.")
        if timeout <= 0 or backoff < 0:
            raise ValueError(f"timeout must be positive and backoff not negative, got {timeout} and {backoff}.")
        self.url = url.rstrip("/") + "/score"
        self.token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self.batch_size = batch_size
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_answer_bytes = max_answer_bytes
        self.name = name
        self.session = requests.Session()
        # Given as `auth`, the token is not replaced by what a .netrc file says.
        self.session.auth = self._authorize
        # A generator of its own: pauses must not disturb the seeds of a run.
        self._random = random.Random()

    def __call__(self, images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float | None]:
        """
        Args:
            images (`list[PIL.Image]`): pictures.
            prompts (`list[str]`): one a picture.
            **columns (`list`): further columns of the dataset; must be JSON, or pictures.

        Returns:
            `list[float | None]`: one score a picture, None where the reward does not apply.

        Raises:
            [`RewardServerError`]: no usable answer. `ValueError`: a column that is not JSON.
        """
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            request = {
                "images": [encode_png(image) for image in images[rows]],
                "prompts": prompts[rows],
                "columns": {name: [_sendable(value) for value in values[rows]] for name, values in columns.items()},
            }
            try:
                body = json.dumps(request, allow_nan=False).encode()
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The columns {sorted(columns)} cannot be sent to the reward server as JSON: {error}. Remove "
                    "those that the reward does not need from the dataset, or make them strings and finite numbers."
                ) from error
            scores += self._ask(body, len(request["images"]))
        return scores

    def _ask(self, body: bytes, count: int) -> list[float | None]:
        """The scores of one request, however often it must be sent."""
        for attempt in itertools.count():
            try:
                return self._read_scores(self._send(body), count)
            except _TryAgain as failure:
                if attempt == self.retries:
                    raise RewardServerError(
                        f"The reward server {self.url} failed {attempt + 1} times; the last time it {failure}. Start "
                        "it again and resume, or raise timeout, retries or backoff."
                    ) from failure
                pause = min(self.backoff * 2**attempt, LONGEST_PAUSE) * self._random.uniform(0.8, 1.2)
                logger.warning(
                    "Paused: the reward server %s %s. Attempt %d of %d follows in %.1f s.",
                    self.url,
                    failure,
                    attempt + 2,
                    self.retries + 1,
                    pause,
                )
                time.sleep(pause)

    def _send(self, body: bytes) -> bytes:
        """The body of one answer."""
        deadline = time.monotonic() + self.timeout
        try:
            with self.session.post(
                self.url,
                data=body,
                # No compression: the bound on the size is one on what arrives.
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                timeout=self.timeout,
                stream=True,
                allow_redirects=False,
            ) as response:
                answer = b""
                for part in response.iter_content(2**16):
                    answer += part
                    if len(answer) > self.max_answer_bytes:
                        raise RewardServerError(
                            f"The reward server {self.url} answered with more than {self.max_answer_bytes} bytes. Is "
                            "it a reward server? Otherwise raise max_answer_bytes."
                        )
                    if time.monotonic() > deadline:
                        raise _TryAgain(f"took longer than {self.timeout} s to answer")
        except requests.Timeout as error:
            raise _TryAgain(f"took longer than {self.timeout} s to answer") from error
        except requests.RequestException as error:
            # Refused, reset, closed half-way through the answer.
            raise _TryAgain(f"could not be reached or broke off ({error})") from error
        if response.status_code == 200:
            return answer
        said = self._without_token(answer.decode(errors="replace"))[:500]
        if response.status_code in RETRIED_STATUS:
            raise _TryAgain(f"answered {response.status_code}: {said}")
        remedy = {
            401: f"Set the environment variable {TOKEN_VARIABLE} to the token that the server was started with.",
            507: f"Lower batch_size, now {self.batch_size}, or give the server's reward a smaller reward_batch_size.",
            413: f"Lower batch_size, now {self.batch_size}, or start the server with a larger --max-request-mb.",
        }.get(response.status_code, "Check the address and the log of the server.")
        raise RewardServerError(f"The reward server {self.url} answered {response.status_code}: {said} {remedy}")

    def _read_scores(self, answer: bytes, count: int) -> list[float | None]:
        shown = self._without_token(answer.decode(errors="replace"))[:200]
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RewardServerError(
                f'The reward server {self.url} did not answer with JSON that has "scores", but with {shown!r}. Is it '
                "a reward server?"
            ) from error
        if not isinstance(scores, list) or len(scores) != count:
            number = len(scores) if isinstance(scores, list) else f"no list but {type(scores).__name__}"
            raise RewardServerError(
                f"The reward server {self.url} answered with {number} scores for {count} images: {shown!r}. It must "
                "give one an image, in their order."
            )
        for score in scores:
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if score is not None and (not is_number or math.isinf(score)):
                raise RewardServerError(
                    f"The reward server {self.url} answered with the score {score!r}. Scores are finite numbers, or "
                    "null where the reward does not apply."
                )
        # NaN means the same as null, as from any reward.
        return [None if score is None or math.isnan(score) else float(score) for score in scores]

    def _without_token(self, text: str) -> str:
        """What a server said, for messages; one that repeats our header must not bring the token into logs."""
        return text.replace(self.token, "<token>") if self.token else text

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class _TryAgain(Exception):
    """An attempt failed in a way that may pass."""


def check_url(url: str) -> None:
    """
    Refuse what is no address of a server.

    Raises:
        `ValueError`: another scheme than http and https, no host, or a password in the address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a reward server. Give one like 'http://127.0.0.1:8000'.")
    if parts.username or parts.password:
        raise ValueError(
            f"The address of the reward server {parts.hostname!r} holds a user or a password, which would end up in "
            f"logs. Give the token in the environment variable {TOKEN_VARIABLE}."
        )


def _sendable(value: Any) -> Any:
    """A value of a column as JSON: a picture, as the one that a prompt edits, as the text of a PNG under "png"."""
    return {PNG: encode_png(value)} if isinstance(value, Image.Image) else value


def encode_png(image: Image.Image) -> str:
    """A picture as the text of a PNG in base64."""
    buffer = io.BytesIO()
    # Little compression: a fifth of the time for a tenth more bytes.
    to_rgb(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
