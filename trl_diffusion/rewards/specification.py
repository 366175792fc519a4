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

"""
A reward in a setting: a name, and behind a colon a place and options.

`name`, `name:place`, `name:option=value,option=value`, `name:place,option=value,...`, or a mapping `{"name": "name:place",
"option": value}`, which is the form for values that are no text.
"""

import inspect
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import torch
import yaml


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OPTION = re.compile(r"[A-Za-z_]\w*=")
_COMMA_BEFORE_OPTION = re.compile(rf",(?={_OPTION.pattern})")
_PATH = ("/", "./", "../", "~")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class RewardSpec:
    """
    What a specification says.

    Attributes:
        name (`str`): of a reward, or a dotted path.
        place (`str`, *optional*): what stands behind the colon and is no option: weights, an address, a recogniser.
        options (`dict[str, Any]`): arguments of the reward's class; of a text, as text.
    """

    name: str
    place: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def parse_spec(spec: str | Mapping[str, Any]) -> RewardSpec:
    """
    Take a specification apart.

    A part of the text is an option where it reads `word=...` and stands directly behind the colon or a comma. Commas and
    equals signs elsewhere belong to the place or the value. Of a path, the longest folder that exists is the place; an
    address with a question mark is the place as a whole, and has its options in a mapping.

    Raises:
        `ValueError`: an option given twice, or a mapping without a name.
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(
                f"The reward {dict(spec)!r} has no name. Write it like {{'name': 'pickscore', 'scale': 0.05}}."
            )
        parsed = parse_spec(name)
        return RewardSpec(parsed.name, parsed.place, merged_options(spec, parsed.options, options))
    name, colon, rest = spec.partition(":")
    if not colon:
        return RewardSpec(name)
    if "://" in rest and "?" in rest:
        place, parts = rest, []
    elif _OPTION.match(rest):
        place, parts = None, _COMMA_BEFORE_OPTION.split(rest)
    else:
        place, *parts = _COMMA_BEFORE_OPTION.split(rest)
        if place.startswith(_PATH):
            for count in range(len(parts), 0, -1):
                longer = ",".join([place, *parts[:count]])
                if Path(longer).expanduser().is_dir():
                    place, parts = longer, parts[count:]
                    break
    options: dict[str, Any] = {}
    for part in parts:
        option, _, value = part.partition("=")
        options = merged_options(spec, options, {option: value})
    return RewardSpec(name, place, options)


def merged_options(spec: Any, options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both; `ValueError` where an option is in both."""
    for option in options.keys() & more.keys():
        raise ValueError(f"The reward {spec!r} has the option {option!r} twice. Give it once.")
    return {**options, **more}


def spec_text(spec: str | Mapping[str, Any]) -> str:
    """A specification as one text, to tell it from others."""
    return spec if isinstance(spec, str) else json.dumps(dict(spec), sort_keys=True, default=str)


def checked_options(spec: Any, reward: Any, options: Mapping[str, Any], has_place: bool) -> dict[str, Any]:
    """
    Options as the class of a reward takes them.

    Args:
        spec: for messages.
        reward: what the specification names.
        options (`Mapping[str, Any]`): values of the right type, or texts that read as one.
        has_place (`bool`): whether the first parameter of the class is the place.

    Raises:
        `ValueError`: not a class, an option that it does not have, the message lists those it has, or a value of another
        type.
    """
    if not options:
        return {}
    if not inspect.isclass(reward):
        raise ValueError(f"The reward {spec!r} is a function and takes no options, got {sorted(options)}.")
    parameters = inspect.signature(reward, eval_str=True).parameters
    known = dict(list(parameters.items())[1:] if has_place else parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        known |= {
            name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in options.keys() - known.keys()
        }
    for name in options:
        if name not in known:
            names = ", ".join(
                name for name, parameter in known.items() if parameter.kind is not parameter.VAR_POSITIONAL
            )
            raise ValueError(f"The reward {spec!r} has no option {name!r}. It has {names or 'none'}.")
    return {name: _value(spec, name, value, known[name]) for name, value in options.items()}


def _value(spec: Any, name: str, value: Any, parameter: inspect.Parameter) -> Any:
    kind = parameter.annotation
    if kind is parameter.empty:
        kind = Any if parameter.default in (None, parameter.empty) else type(parameter.default)
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for kind in kinds:
        try:
            return _converted(kind, value)
        except ValueError:
            continue
    wanted = " or ".join(map(_shown, kinds))
    raise ValueError(f"The option {name!r} of the reward {spec!r} must be {wanted}, got {value!r}.")


def _converted(kind: Any, value: Any) -> Any:
    """A value, or a text that reads as one, as an annotation says; `ValueError` where it is of another type."""
    text = value if isinstance(value, str) else None
    if text is not None:
        if kind is type(None) and text.lower() in ("none", "null"):
            return None
        if kind is bool and text.lower() in _TRUTH:
            return _TRUTH[text.lower()]
        if kind in (int, float, Path):
            return kind(text)
        if kind is torch.dtype and text.removeprefix("torch.") in DTYPES:
            return DTYPES[text.removeprefix("torch.")]
        if kind is Any:
            return yaml.safe_load(text)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and not is_number:
        raise ValueError
    if kind is Any or not isinstance(kind, type) or isinstance(value, kind):
        return value
    raise ValueError


def _shown(kind: Any) -> str:
    if kind is torch.dtype:
        return " or ".join(DTYPES)
    if kind is type(None):
        return "None"
    return f"of type {kind.__name__}" if isinstance(kind, type) else str(kind)
