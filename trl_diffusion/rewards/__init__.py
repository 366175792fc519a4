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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .base import (
    BlackBoxReward,
    Reward,
    RewardModel,
    VideoRewardModel,
    reward_name,
    score_images,
    score_pictures,
    sees_videos,
    to_pil,
)
from .functions import check_function, signature_of
from .preprocessing import to_tensor
from .pretrained import PretrainedReward, TwoTowerReward
from .remote import RemoteReward, RewardServerError, check_url
from .specification import RewardSpec, checked_options, merged_options, parse_spec, spec_text


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
    "shapes-clip": "trl_diffusion.rewards.shapes_clip:ShapesCLIPReward",
    "shapes-judge": "trl_diffusion.shapes:attribute_share",
    "vote": "trl_diffusion.rewards.vote:VoteReward",
    "vqa": "trl_diffusion.rewards.vqa:VQAReward",
}
# What may stand after "name:": weights, with an official default, or something that must be given.
WITH_WEIGHTS = {"aesthetic", "clip", "hpsv2", "hpsv3", "image_reward", "pickscore", "vqa"}
WITH_ADDRESS = {"remote": "the address of a server ('remote:http://127.0.0.1:8000')"}
WITH_CALLABLE = {"ocr": "the dotted path of a recogniser ('ocr:my_package.read_texts')"}
WITH_PLACE = WITH_WEIGHTS | WITH_ADDRESS.keys() | WITH_CALLABLE.keys()

# Models that are in use somewhere, so that a reward that is trained and measured as well is loaded once.
_LOADED: weakref.WeakValueDictionary[tuple, RewardModel] = weakref.WeakValueDictionary()


def check_reward(spec: str | Mapping[str, Any] | Reward, columns: Collection[str] | None = None) -> None:
    """
    Refuse what [`load_reward`] could not load or a trainer could not call, without loading weights.

    Args:
        spec (`str`, `Mapping`, [`RewardModel`] or `Callable`): see [`load_reward`].
        columns (`Collection[str]`, *optional*): of the dataset, without "prompt", which functions may ask for.

    Raises:
        `ValueError`: an unknown name, the message lists the known ones; a name without the address it needs, a folder
        that does not exist, an option that the reward does not have or of another type, a dotted path that leads nowhere.
        `TypeError`: neither a name, a [`RewardModel`] nor a callable, or a callable that cannot be called with images and
        prompts.
    """
    if isinstance(spec, str | Mapping):
        parsed = _check_named(spec)
        if parsed.name in WITH_CALLABLE:
            _recognizer(parsed, spec)
        if parsed.name in REWARDS:
            return
        reward = _named(parsed, spec)
        if not inspect.isclass(reward):
            check_reward(reward, columns)
        return
    if isinstance(spec, RewardModel):
        if list(inspect.signature(spec.score).parameters)[:2] == ["prompts", "images"]:
            raise TypeError(
                f"{type(spec).__name__}.score takes prompts before images. Write it as score(self, images, prompts)."
            )
    elif callable(spec):
        check_function(spec, columns)
    else:
        raise TypeError(
            f"A reward must be a name, a RewardModel or a callable, got {spec!r} of type {type(spec).__name__}."
        )


def load_reward(spec: str | Mapping[str, Any] | Reward, **options: Any) -> Reward:
    """
    Turn a specification into a reward.

    A model that is loaded with the same name and options and still in use is not loaded again.

    Args:
        spec (`str`, `Mapping`, [`RewardModel`] or `Callable`):
            The name of a reward (`"hpsv2"`), a name with the folder or Hub repository of its weights
            (`"hpsv2:/path"`), a server (`"remote:http://..."`), a recogniser of text
            (`"ocr:my_package.read_texts"`), the dotted path of a callable or [`RewardModel`] class
            (`"my_package.my_rewards.brightness"`), or the thing itself. Options of the class follow the name or the
            place (`"pickscore:scale=0.05"`, `"hpsv2:/path,scale=2,dtype=bfloat16"`), or stand in a mapping
            (`{"name": "hpsv2:/path", "scale": 2}`).
        **options:
            Further options of the class that `spec` names, e.g. `dtype`, `reward_batch_size`, `scale`.

    Returns:
        A frozen [`RewardModel`], or a callable.

    Raises:
        As [`check_reward`]; `ValueError`: weights that are missing, truncated or of another model, options for
        something that is loaded already or is no class.
    """
    check_reward(spec)
    if not isinstance(spec, str | Mapping):
        if options:
            raise ValueError(f"{sorted(options)} only apply to a reward that is given by name, not to {spec!r}.")
        return spec.freeze() if isinstance(spec, RewardModel) else spec
    parsed = parse_spec(spec)
    reward = _named(parsed, spec)
    options = checked_options(spec, reward, merged_options(spec, parsed.options, options), parsed.name in WITH_PLACE)
    key = (parsed.name, parsed.place, *sorted(options.items()))
    if key in _LOADED:
        return _LOADED[key]
    if inspect.isclass(reward):
        if parsed.name in WITH_CALLABLE:
            reward = reward(_recognizer(parsed, spec), **options)
        else:
            reward = reward(**options) if parsed.place is None else reward(parsed.place, **options)
        check_reward(reward)
    if isinstance(reward, RewardModel):
        reward.freeze()
        _LOADED[key] = reward
    return reward


def is_differentiable(spec: str | Mapping[str, Any] | Reward) -> bool:
    """
    Whether a specification is a [`RewardModel`] or names one, without loading weights.

    Raises:
        As [`check_reward`].
    """
    check_reward(spec)
    if not isinstance(spec, str | Mapping):
        return isinstance(spec, RewardModel)
    reward = _named(parse_spec(spec), spec)
    return issubclass(reward, RewardModel) if inspect.isclass(reward) else isinstance(reward, RewardModel)


def scores_generations(spec: str | Mapping[str, Any] | Reward) -> bool:
    """
    Whether a specification is a [`BlackBoxReward`] that scores whole generations of a training, or names one.

    Raises:
        As [`is_differentiable`].
    """
    check_reward(spec)
    reward = _named(parse_spec(spec), spec) if isinstance(spec, str | Mapping) else spec
    is_black_box = (
        issubclass(reward, BlackBoxReward) if inspect.isclass(reward) else isinstance(reward, BlackBoxReward)
    )
    return is_black_box and reward.scores_generations


def check_scores_apart(spec: str | Mapping[str, Any] | Reward) -> None:
    """
    Refuse a reward that scores whole generations where there are none.

    Raises:
        `ValueError`: it does. As [`is_differentiable`].
    """
    if scores_generations(spec):
        raise ValueError(
            f"The reward {spec!r} scores whole generations of a training with ChunkGRPOTrainer, and nothing else. Use another "
            "reward here."
        )


def asks_for_column(spec: str | Mapping[str, Any] | Reward, column: str) -> bool:
    """
    Whether a reward asks for a column of the dataset, by its signature: by the name of a parameter, or with `**columns`
    for all of them, as does a function without a signature. A [`RewardModel`] asks for none. No weights are loaded.

    Raises:
        As [`is_differentiable`].
    """
    if is_differentiable(spec):
        return False
    reward = _named(parse_spec(spec), spec) if isinstance(spec, str | Mapping) else spec
    signature = signature_of(reward)
    if signature is None:  # a built-in function that does not tell
        return True
    return column in signature.parameters or any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())


def usual_range(spec: str | Mapping[str, Any] | Reward) -> tuple[float, float] | None:
    """
    The scores that a specification gives most images, lowest and highest, its `scale` included, without loading weights.
    None where that is not known.
    """
    if isinstance(spec, str | Mapping):
        parsed = parse_spec(spec)
        reward = _named(parsed, spec)
        if not inspect.isclass(reward) or not issubclass(reward, PretrainedReward):
            return None
        scale = checked_options(spec, reward, parsed.options, parsed.name in WITH_PLACE).get("scale", 1.0)
    elif isinstance(spec, PretrainedReward):
        reward, scale = spec, spec.scale
    else:
        return None
    return None if reward.usual_range is None else tuple(sorted(scale * end for end in reward.usual_range))


def _check_named(spec: str | Mapping[str, Any]) -> RewardSpec:
    """The parts of a specification by name, once they are checked without importing what needs no import."""
    parsed = parse_spec(spec)
    name, place = parsed.name, parsed.place
    if name not in REWARDS and ("." not in name or place is not None):
        raise ValueError(
            f"Unknown reward {spec!r}. Give one of {', '.join(map(repr, sorted(REWARDS)))}, the dotted path of a "
            "callable ('my_package.my_rewards.brightness'), a RewardModel or a callable."
        )
    needs = {**WITH_ADDRESS, **WITH_CALLABLE}
    if name in needs:
        if not place:
            raise ValueError(f"The reward {spec!r} needs {needs[name]}.")
        if name in WITH_ADDRESS:
            check_url(place)
        elif "." not in place:
            raise ValueError(f"The reward {spec!r} needs {needs[name]}, got {place!r}.")
    elif name in WITH_WEIGHTS:
        if place == "":
            raise ValueError(f"The reward {spec!r} names no weights. Leave the colon out or give a folder after it.")
        if place is not None and place.startswith(("/", "./", "../", "~")) and not Path(place).expanduser().is_dir():
            raise ValueError(f"The reward {spec!r} names the folder {place!r}, which does not exist.")
    elif place is not None:
        raise ValueError(f"The reward {name!r} takes nothing after a colon but options, got {spec!r}.")
    if parsed.options:
        checked_options(spec, _named(parsed, spec), parsed.options, name in WITH_PLACE)
    return parsed


def _named(parsed: RewardSpec, spec: Any) -> Any:
    """The class, function or reward that a specification names."""
    if parsed.name in REWARDS:
        return _import(*REWARDS[parsed.name].split(":"), spec)
    module, _, attribute = parsed.name.rpartition(".")
    return _import(module, attribute, spec)


def _recognizer(parsed: RewardSpec, spec: Any) -> Any:
    module, _, attribute = parsed.place.rpartition(".")
    return _import(module, attribute, spec)


def _import(module: str, attribute: str, spec: Any) -> Any:
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a module of the user's
        # Of `a.b`, "a" or "a.b" is missing; another name is missing inside of it.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"Cannot load the reward {spec!r}: there is no module {error.name!r}. Modules are looked for in the "
                "current folder, among installed packages and in PYTHONPATH."
            ) from error
        raise ValueError(
            f"Cannot load the reward {spec!r}: its module {module!r} raises {type(error).__name__} when it is imported: "
            f"{error}"
        ) from error
    if attribute not in vars(imported):
        raise ValueError(f"Cannot load the reward {spec!r}: there is no {attribute!r} in the module {module!r}.")
    return vars(imported)[attribute]


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
    "VideoRewardModel",
    "asks_for_column",
    "check_reward",
    "is_differentiable",
    "load_reward",
    "load_rewards",
    "parse_spec",
    "reward_name",
    "score_images",
    "score_pictures",
    "sees_videos",
    "spec_text",
    "to_pil",
    "to_tensor",
    "usual_range",
]
