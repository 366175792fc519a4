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

"""Calls of rewards that fail or hang: under a time limit, and again."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers.utils import logging

from .base import MEMORY_REMEDY, BlackBoxReward, Reward, RewardOutOfMemoryError, is_out_of_memory, score_images
from .remote import RewardServerError


logger = logging.get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a retry; each pause is twice the last


class RewardError(RuntimeError):
    """A reward failed or hung, here or on another process, and was not mended by trying again."""


def shown(prompts: Sequence[str], count: int = 8, length: int = 200) -> str:
    """The first distinct prompts, shortened, for messages."""
    distinct = list(dict.fromkeys(prompts))
    texts = [prompt if len(prompt) <= length else prompt[:length] + "..." for prompt in distinct[:count]]
    return f"{texts}" + (f" and {len(distinct) - count} more" if len(distinct) > count else "")


def call_reward(
    name: str,
    prompts: Sequence[str],
    call: Callable[[], Any],
    timeout: float | None,
    retries: int,
    device: torch.device,
) -> Any:
    """
    Call a reward, again where it fails or hangs.

    Args:
        name (`str`): of the reward, for messages.
        prompts (`Sequence[str]`): of the images, for messages.
        call (`Callable`): the call, without arguments.
        timeout (`float`, *optional*): seconds that it may take; `None` waits for ever. A call that takes longer goes
            on in a thread of its own, which nobody waits for.
        retries (`int`): further attempts after the first. A reward server has been asked again by its client already.
        device (`torch.device`): the accelerator that is current in the thread of the call.

    Returns:
        What the call returns.

    Raises:
        [`RewardError`]: it failed or hung in every attempt, or ran out of memory in one. `TypeError`, `ValueError`: it gave a wrong answer, which
        another attempt would not mend.
    """
    for attempt in range(retries + 1):
        try:
            return call() if timeout is None else _call_within(call, timeout, device)
        except TimeoutError:
            reason, cause = f"gave no answer within reward_timeout={timeout:g} s", None
        except (TypeError, ValueError):
            raise
        except RewardOutOfMemoryError as error:
            raise RewardError(f"{error} (prompts {shown(prompts)})") from error
        except Exception as error:  # a reward is foreign code
            if is_out_of_memory(error):
                raise RewardError(
                    f"The reward {name!r} ran out of memory on {len(prompts)} images: {error}. {MEMORY_REMEDY} (prompts "
                    f"{shown(prompts)})"
                ) from error
            reason, cause = f"failed: {error}", error
            if isinstance(error, RewardServerError) or isinstance(error.__cause__, RewardServerError):
                break
        if attempt < retries:
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            logger.warning(
                f"The reward {name!r} {reason}. Attempt {attempt + 2} of {retries + 1} follows in {pause:g} s."
            )
            time.sleep(pause)
    raise RewardError(f"The reward {name!r} {reason} (attempt {attempt + 1}, prompts {shown(prompts)})") from cause


def raise_failure(failure: Exception | None) -> None:
    """What a [`Scorer`] agrees by that works alone."""
    if failure is not None:
        raise failure


@dataclass
class Scorer:
    """
    Scores images by rewards that may fail or hang, a batch at a time.

    A [`BlackBoxReward`] that scores generations gets all images at once, without a time limit and once.

    Args:
        batch_size (`int`): images that a reward gets together.
        device (`torch.device`): where a batch is scored; see [`call_reward`], as for the next two.
        timeout (`float`, *optional*): seconds that a call may take.
        retries (`int`): further attempts after the first.
        on_accelerator (`Callable`): gives the context in which a reward can be used.
        agree (`Callable`): gets the failure of each call, or `None`, and raises it; where several processes score
            together, on all of them.
        frame_reduction (`str`): see [`score_images`].
    """

    batch_size: int
    device: torch.device
    timeout: float | None
    retries: int
    on_accelerator: Callable[[Reward], contextlib.AbstractContextManager[None]]
    agree: Callable[[Exception | None], None]
    frame_reduction: str = "mean"

    def score(
        self,
        rewards: Mapping[str, Reward],
        images: torch.Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> torch.Tensor:
        """
        Args:
            rewards (`Mapping[str, Reward]` of length R): rewards by name.
            images (`torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`): in [0, 1], on any device.
            prompts (`Sequence[str]` of length B): their prompts.
            columns (`Mapping[str, Sequence]`): columns of the dataset for black-box rewards, each of length B.

        Returns:
            `torch.Tensor` of shape `(B, R)`, on `device`, NaN where a reward does not apply.
        """
        scores = []
        for name, reward in rewards.items():
            parts = []
            together = isinstance(reward, BlackBoxReward) and reward.scores_generations
            size = max(len(prompts), 1) if together else self.batch_size
            ask = replace(self, timeout=None, retries=0).call if together else self.call
            with self.on_accelerator(reward):
                for start in range(0, len(prompts), size):
                    rows = slice(start, start + size)
                    columns_of_rows = {column: values[rows] for column, values in columns.items()}
                    call = partial(
                        score_images,
                        reward,
                        images[rows].to(self.device),
                        prompts[rows],
                        columns_of_rows,
                        self.frame_reduction,
                    )
                    parts.append(ask(name, prompts[rows], call))
            scores.append(torch.cat(parts))
        return torch.stack(scores, 1) if scores else images.new_zeros((len(prompts), 0), device=self.device)

    def call(self, name: str, prompts: Sequence[str], call: Callable[[], T]) -> T:
        """What a call of the reward of this name, on images of these prompts, returns; see [`call_reward`]."""
        result, failure = None, None
        try:
            result = call_reward(name, prompts, call, self.timeout, self.retries, self.device)
        except (RewardError, TypeError, ValueError) as error:
            failure = error
        self.agree(failure)
        return result


def _call_within(call: Callable[[], Any], timeout: float, device: torch.device) -> Any:
    """What a call returns or raises in a thread, `TimeoutError` if it takes longer than `timeout` seconds."""
    outcome: dict[str, Any] = {}
    # The state of autograd and the current device belong to a thread.
    gradient = torch.is_grad_enabled()

    def run() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)
        try:
            with torch.set_grad_enabled(gradient):
                outcome["result"] = call()
        except BaseException as error:  # handed to the caller's thread, whatever it is
            outcome["error"] = error

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
