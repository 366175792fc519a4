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
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import (
    BlackBoxReward,
    Reward,
    RewardModel,
    reward_name,
    score_images,
    score_pictures,
    to_pil,
)
from .preprocessing import to_tensor
from .pretrained import PretrainedReward, TwoTowerReward
from .remote import RemoteReward, RewardServerError, check_url


# Reward name -> where it is defined. Imported on demand: most runs need one of them.
REWARDS = {
    "aesthetic": "trl_diffusion.rewards.aesthetic:AestheticReward",
    "clip": "trl_diffusion.rewards.clip:CLIPReward",
    "hpsv2": "trl_diffusion.rewards.hpsv2:HPSv2Reward",
    "hpsv3": "trl_diffusion.rewards.hpsv3:HPSv3Reward",
    "image_reward": "trl_diffusion.rewards.image_reward:ImageRewardReward",
    "ocr": "trl_diffusion.rewards.ocr:OCRReward",
    "pickscore": "trl_diffusion.rewards.clip:PickScoreReward",
    "remote": "trl_diffusion.rewards.remote:RemoteReward",
    "shapes-clip": "trl_diffusion.shapes.reward:ShapesCLIPReward",
    "shapes-judge": "trl_diffusion.shapes:attribute_share",
    "vqa": "trl_diffusion.rewards.vqa:VQAReward",
}
# What may stand after "name:": weights, with an official default, or something that must be given.
WITH_WEIGHTS = {"aesthetic", "clip", "hpsv2", "hpsv3", "image_reward", "pickscore", "vqa"}
WITH_ADDRESS = {"remote": "the address of a server ('remote:http://127.0.0.1:8000')"}
WITH_CALLABLE = {"ocr": "the dotted path of a recogniser ('ocr:my_package.read_texts')"}

# Models that are in use somewhere, so that a reward that is trained and measured as well is loaded once.
_LOADED: weakref.WeakValueDictionary[tuple, RewardModel] = weakref.WeakValueDictionary()


def check_reward(spec: str | Reward) -> None:
    """
    Refuse what [`load_reward`] could not load, without loading anything.

    Raises:
        `ValueError`: an unknown name, the message lists the known ones; a name without the address it needs, a folder
        that does not exist. `TypeError`: neither a name, a [`RewardModel`] nor a callable.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise TypeError(
                f"A reward must be a name, a RewardModel or a callable, got {spec!r} of type {type(spec).__name__}."
            )
        return
    name, colon, location = spec.partition(":")
    if name not in REWARDS:
        if "." in name and not colon:
            return
        raise ValueError(
            f"Unknown reward {spec!r}. Give one of {', '.join(map(repr, sorted(REWARDS)))}, the dotted path of a "
            "callable ('my_package.my_rewards.brightness'), a RewardModel or a callable."
        )
    needs = {**WITH_ADDRESS, **WITH_CALLABLE}
    if name in needs:
        if not location:
            raise ValueError(f"The reward {spec!r} needs {needs[name]}.")
        if name in WITH_ADDRESS:
            check_url(location)
        elif "." not in location:
            raise ValueError(f"The reward {spec!r} needs {needs[name]}, got {location!r}.")
    elif name in WITH_WEIGHTS:
        if colon and not location:
            raise ValueError(f"The reward {spec!r} names no weights. Leave the colon out or give a folder after it.")
        if location.startswith(("/", "./", "../", "~")) and not Path(location).expanduser().is_dir():
            raise ValueError(f"The reward {spec!r} names the folder {location!r}, which does not exist.")
    elif colon:
        raise ValueError(f"The reward {name!r} takes nothing after a colon, got {spec!r}.")


def load_reward(spec: str | Reward, **options: Any) -> Reward:
    """
    Turn a specification into a reward.

    A model that is loaded with the same name and options and still in use is not loaded again.

    Args:
        spec (`str`, [`RewardModel`] or `Callable`):
            The name of a reward (`"hpsv2"`), a name with the folder or Hub repository of its weights
            (`"hpsv2:/path"`), a server (`"remote:http://..."`), a recogniser of text
            (`"ocr:my_package.read_texts"`), the dotted path of a callable or [`RewardModel`] class
            (`"my_package.my_rewards.brightness"`), or the thing itself.
        **options:
            Passed to the class that `spec` names, e.g. `dtype`, `reward_batch_size`, `scale`.

    Returns:
        A frozen [`RewardModel`], or a callable.

    Raises:
        As [`check_reward`]; `ValueError`: weights that are missing, truncated or of another model, options for
        something that is loaded already or is no class.
    """
    check_reward(spec)
    if not isinstance(spec, str):
        if options:
            raise ValueError(f"{sorted(options)} only apply to a reward that is given by name, not to {spec!r}.")
        return spec.freeze() if isinstance(spec, RewardModel) else spec
    key = (spec, *sorted(options.items()))
    if key in _LOADED:
        return _LOADED[key]
    name, _, location = spec.partition(":")
    reward = _named(spec)
    if inspect.isclass(reward):
        if name in WITH_CALLABLE:
            module, _, attribute = location.rpartition(".")
            reward = reward(_import(module, attribute, spec), **options)
        else:
            reward = reward(location, **options) if location else reward(**options)
    elif options:
        raise ValueError(f"The reward {spec!r} is a function and takes no {sorted(options)}.")
    if isinstance(reward, RewardModel):
        reward.freeze()
        _LOADED[key] = reward
    return reward


def is_differentiable(spec: str | Reward) -> bool:
    """
    Whether a specification is a [`RewardModel`] or names one, without loading weights.

    Raises:
        As [`check_reward`]; `ValueError`: a dotted path that leads nowhere.
    """
    check_reward(spec)
    if not isinstance(spec, str):
        return isinstance(spec, RewardModel)
    reward = _named(spec)
    return issubclass(reward, RewardModel) if inspect.isclass(reward) else isinstance(reward, RewardModel)


def asks_for_column(spec: str | Reward, column: str) -> bool:
    """
    Whether a reward asks for a column of the dataset, by its signature: by the name of a parameter, or with `**columns`
    for all of them, as does a function without a signature. A [`RewardModel`] asks for none. No weights are loaded.

    Raises:
        As [`is_differentiable`].
    """
    if is_differentiable(spec):
        return False
    reward = _named(spec) if isinstance(spec, str) else spec
    try:
        parameters = inspect.signature(reward.__call__ if inspect.isclass(reward) else reward).parameters
    except ValueError:  # a built-in function that does not tell
        return True
    return column in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _named(spec: str) -> Any:
    """The class, function or reward that a specification names."""
    name = spec.partition(":")[0]
    if name in REWARDS:
        return _import(*REWARDS[name].split(":"), spec)
    module, _, attribute = spec.rpartition(".")
    return _import(module, attribute, spec)


def _import(module: str, attribute: str, spec: str) -> Any:
    try:
        return importlib.import_module(module).__dict__[attribute]
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"Cannot load the reward {spec!r}: there is no {attribute!r} in the module {module!r} ({error})."
        ) from error


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
    "BlackBoxReward",
    "PretrainedReward",
    "RemoteReward",
    "Reward",
    "RewardModel",
    "RewardServerError",
    "TwoTowerReward",
    "asks_for_column",
    "check_reward",
    "is_differentiable",
    "load_reward",
    "load_rewards",
    "reward_name",
    "score_images",
    "score_pictures",
    "to_pil",
    "to_tensor",
]
