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

"""The parser of commands that also read a YAML file: TRL's, with grouped help, presets, and a hint for a wrong name."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from trl import TrlParser

from ..paths import nearest
from .errors import OneLineErrors


# In a docstring of transformers' form, after `inspect.cleandoc`: the heading of a group, and an argument.
_HEADING = re.compile(r"    > (?!\[)(.+)")
_ARGUMENT = re.compile(r"    (\w+) ?\(")


class CommandParser(OneLineErrors, TrlParser):
    """
    TRL's parser of dataclasses, for a command line and a YAML file with the same names; the command line wins.

    Beyond TRL's: `--help` in the groups of the dataclasses' docstrings; values of the file are checked as those of the
    command line are; an unknown name is an error that suggests the nearest one; presets, which the file and the
    command line override.

    Args:
        dataclass_types (`Sequence[type]`):
            What to parse into.
        presets (`dict[str, dict]`, *optional*):
            Values of each preset. Where there are any, one of the dataclasses has a field "preset".
        **kwargs:
            Passed to `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Sequence[type], presets: dict[str, dict[str, Any]] | None = None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.presets = presets or {}
        self._preset: str | None = None
        self._headings = {name: text for dtype in dataclass_types for name, text in _headings_of(dtype).items()}

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs) -> tuple[Any, ...]:
        """
        As [`~trl.TrlParser.parse_args_and_config`].

        Raises:
            `ValueError`: unknown names, values of a wrong type, an unknown preset, or a file that is not there or is no
            YAML. `OSError`: the file cannot be read.
        """
        # These two say where the others' values come from.
        sources = OneLineErrors(prog=self.prog, add_help=False, allow_abbrev=False)
        sources.add_argument("--config")
        sources.add_argument("--preset")
        known, rest = sources.parse_known_args(args)
        if known.preset is not None:
            rest += ["--preset", known.preset]
        for argument in rest:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                raise ValueError(f"unknown option {name}.{self._suggestion(name.lstrip('-'), prefix='--')}")
        self._preset = known.preset
        if self._preset is not None:
            self._apply_preset(self._preset)
        if known.config is not None:
            check_yaml(known.config)
            rest = ["--config", known.config, *rest]
        return super().parse_args_and_config(rest, **kwargs)

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        """Takes the values of a YAML file as defaults, over those of the preset that it names."""
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # the first is the option itself, the next its `--no_` form
        for name in kwargs:
            if name not in actions:
                raise ValueError(f"unknown key {name!r} in the configuration file.{self._suggestion(name)}")
        if self._preset is None and kwargs.get("preset") is not None:
            self._apply_preset(kwargs["preset"])
        values = {name: _checked(actions[name], value) for name, value in kwargs.items()}
        return super().set_defaults_with_config(**values)

    def format_help(self) -> str:
        groups: dict[str, list[argparse.Action]] = {}
        for action in self._actions:
            groups.setdefault(self._headings.get(action.dest, "Other options"), []).append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for heading in [*dict.fromkeys(self._headings.values()), "Other options"]:
            formatter.start_section(heading)
            formatter.add_arguments(groups.get(heading, []))
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _apply_preset(self, name: str) -> None:
        if name not in self.presets:
            raise ValueError(f"unknown preset {name!r}. Choose one of {', '.join(sorted(self.presets))}.")
        super().set_defaults_with_config(**self.presets[name])

    def _suggestion(self, name: str, prefix: str = "") -> str:
        names = [*dict.fromkeys(action.dest for action in self._actions), "config"]
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
        return f" Did you mean {prefix}{near[0]}?" if near else " '--help' lists all of them."


def check_yaml(path: str) -> None:
    """Raises `ValueError` if a file is not there or is no YAML mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise ValueError(f"There is no configuration file {path!r}.{nearest(path)}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The configuration file {path!r} is not YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The configuration file {path!r} must contain a YAML mapping, lines of `name: value`.")


def _headings_of(dataclass_type: type) -> dict[str, str]:
    """The heading above each argument in the docstrings of a class and, for what these leave out, of its bases."""
    headings: dict[str, str] = {}
    for base in dataclass_type.__mro__:
        heading = "Options"
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            if match := _HEADING.fullmatch(line):
                heading = match[1]
            elif match := _ARGUMENT.match(line):
                headings.setdefault(match[1], heading)
    return headings


def _checked(action: argparse.Action, value: Any) -> Any:
    """A value of the YAML file as the command line would give it."""
    if value is False and "no" in (action.choices or ()):
        value = "no"  # YAML reads a bare no as false
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list):
        if action.nargs is None and action.type in (int, float):
            raise ValueError(f"{action.dest} takes one value, got the list {value} in the configuration file.")
        return [_converted(action, entry) for entry in value]
    value = _converted(action, value)
    return [value] if action.nargs == "+" else value


def _converted(action: argparse.Action, value: Any) -> Any:
    if action.type in (int, float):
        try:
            value = action.type(str(value))
        except ValueError as error:
            kind = action.type.__name__
            raise ValueError(
                f"{action.dest} must be of type {kind}, got {value!r} in the configuration file."
            ) from error
    if action.choices is not None and value not in action.choices:
        allowed = ", ".join(map(str, action.choices))
        raise ValueError(f"{action.dest} must be one of {allowed}, got {value!r} in the configuration file.")
    return value
