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

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from .base import MEMORY_REMEDY, RewardOutOfMemoryError, is_out_of_memory
from .remote import RewardServerError


logger = logging.get_logger(__name__)

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
