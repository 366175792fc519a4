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

"""Rewards: what a trainer maximises, and what it watches."""

import importlib
import inspect
from collections.abc import Callable

from .base import Reward, RewardModel, reward_name, score_images, to_pil


# Reward name -> where it is defined. Imported on demand: most runs need one of them.
REWARDS = {
    "shapes-clip": "trl_diffusion.shapes.reward:ShapesCLIPReward",
    "shapes-judge": "trl_diffusion.shapes:attribute_share",
}


def check_reward(spec: str | Reward) -> None:
    """
    Refuse what [`load_reward`] could not load, without loading anything.

    Raises:
        `ValueError`: an unknown name; the message lists the known ones. `TypeError`: neither a name, a
        [`RewardModel`] nor a callable.
    """
    if isinstance(spec, str):
        if spec not in REWARDS and "." not in spec:
            raise ValueError(
                f"Unknown reward {spec!r}. Give one of {', '.join(map(repr, sorted(REWARDS)))}, the dotted path of a "
                "callable ('my_package.my_rewards.brightness'), a RewardModel or a callable."
            )
    elif not callable(spec):
        raise TypeError(
            f"A reward must be a name, a RewardModel or a callable, got {spec!r} of type {type(spec).__name__}."
        )


def load_reward(spec: str | Reward) -> Reward:
    """
    Turn a specification into a reward.

    Args:
        spec (`str`, [`RewardModel`] or `Callable`):
            The name of a reward (`"shapes-clip"`), the dotted path of a callable or [`RewardModel`] class
            (`"my_package.my_rewards.brightness"`), or the thing itself.

    Returns:
        A frozen [`RewardModel`], or a callable.
    """
    check_reward(spec)
    if isinstance(spec, str):
        module, _, attribute = REWARDS[spec].partition(":") if spec in REWARDS else spec.rpartition(".")
        try:
            reward = importlib.import_module(module).__dict__[attribute]
        except (ImportError, KeyError) as error:
            raise ValueError(
                f"Cannot load the reward {spec!r}: there is no {attribute!r} in the module {module!r} ({error})."
            ) from error
        if inspect.isclass(reward):
            reward = reward()
    else:
        reward = spec
    return reward.freeze() if isinstance(reward, RewardModel) else reward


def load_rewards(specs: str | Reward | list[str | Reward] | Callable) -> dict[str, Reward]:
    """Load one reward or a list of them, by the name under which they are logged; names are made distinct."""
    rewards: dict[str, Reward] = {}
    for spec in specs if isinstance(specs, list | tuple) else [specs]:
        reward = load_reward(spec)
        name = base = reward_name(reward)
        count = 1
        while name in rewards:
            count += 1
            name = f"{base}_{count}"
        rewards[name] = reward
    return rewards


__all__ = [
    "REWARDS",
    "Reward",
    "RewardModel",
    "check_reward",
    "load_reward",
    "load_rewards",
    "reward_name",
    "score_images",
    "to_pil",
]
