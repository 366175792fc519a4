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

"""What a run has of the images that it makes and trains."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typing_extensions import Self  # of Python 3.11

from ..data.prompt_images import Prompt, from_json, to_json


def shared() -> Any:
    """A field of a [`Generation`] that is the same for all images, JSON, and not one value an image."""
    return field(default_factory=list, metadata={"shared": True})


def not_kept() -> Any:
    """A field of a [`Generation`] that is not in checkpoints, `None` at first."""
    return field(default=None, metadata={"kept": False})


@dataclass(kw_only=True)
class Generation:
    """
    Images of one generation, of all or some of this process's rows; B is their number.

    A method adds fields in a subclass: tensors whose first dimension is the image, dictionaries of them whose keys are
    integers, lists of one text an image, and, by [`shared`], what is the same for all. Checkpoints hold all but the
    columns and the images of prompts, which the rows of the dataset give again, and what is [`not_kept`].

    Attributes:
        index (`list[int]` of length B): the place of each among the images of all processes, which does not depend on
            how many there are.
        prompts (`list[Prompt]` of length B): their prompts, of an editing model with the images that they edit; what
            the conditioning is asked for. Rewards take [`~trl_diffusion.data.prompt_images.texts_of`] them.
        clean (`torch.Tensor` of shape `(B, ...)`): latents at sigma 0.
        scores (`torch.Tensor` of shape `(B, R)`): of the rewards, NaN where one does not apply.
        advantages (`torch.Tensor` of shape `(B,)`): group-relative.
        states (`dict[int, torch.Tensor]`): latents `(B, ...)` before and after each transition that was kept.
        log_probs (`torch.Tensor` of shape `(B, T)`): of the rollout's transitions, NaN where they are deterministic.
        relative_changes (`torch.Tensor` of shape `(B, T)`): of the latents, by transition.
        columns (`dict[str, list]`): the dataset's other columns that the rewards ask for.
    """

    index: list[int]
    prompts: list[Prompt]
    clean: torch.Tensor
    scores: torch.Tensor
    advantages: torch.Tensor
    states: dict[int, torch.Tensor]
    log_probs: torch.Tensor
    relative_changes: torch.Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def split(self, size: int) -> list[Self]:
        """Parts of `size` images each, which one micro-batch trains."""
        return [self.part(slice(start, start + size)) for start in range(0, len(self.prompts), size)]

    def part(self, rows: slice) -> Self:
        """Some of the images."""

        def part(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: tensor[rows] for key, tensor in value.items()}
            return value[rows]

        return dataclasses.replace(
            self, **{each.name: part(vars(self)[each.name]) for each in _fields(self, shared=False)}
        )

    def save(self, path: Path) -> None:
        """Write it, but for the columns."""
        tensors, lists = {}, {}
        for each in _fields(self, shared=False):
            value = vars(self)[each.name]
            if each.name == "columns":
                continue
            if isinstance(value, dict):
                tensors |= {f"{each.name}.{key}": tensor.contiguous() for key, tensor in value.items()}
            elif isinstance(value, torch.Tensor):
                tensors[each.name] = value.contiguous()
            else:
                lists[each.name] = to_json(value) if each.name == "prompts" else value
        metadata = {"rows": lists, "shared": {each.name: vars(self)[each.name] for each in _fields(self, shared=True)}}
        save_file(tensors, path, metadata={key: json.dumps(value) for key, value in metadata.items()})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The whole of its parts."""

        def join(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                whole = {key: [value[key] for value in values] for key in values[0]}
                return {key: join(rows) for key, rows in whole.items()}
            return torch.cat(values) if isinstance(values[0], torch.Tensor) else sum(values, [])

        joined = {
            each.name: join([vars(part)[each.name] for part in parts]) for each in _fields(parts[0], shared=False)
        }
        return dataclasses.replace(parts[0], **joined)

    @classmethod
    def load(cls, paths: Sequence[Path], index: Sequence[int], device: torch.device) -> Self:
        """
        The images with these places, wherever [`save`] has put them.

        Args:
            paths (`Sequence[Path]`): files, in the order in which they are searched; those that are missing are passed over.
            index (`Sequence[int]`): places among the images of all processes.
            device (`torch.device`): of the tensors.

        Raises:
            `ValueError`: some of the images are in none of the files.
        """
        wanted, found, values = set(index), defaultdict(dict), {}
        for path in paths:
            if len(found["index"]) == len(wanted) or not path.is_file():
                continue
            with safe_open(path, framework="pt") as file:
                rows, values = (json.loads(file.metadata()[key]) for key in ("rows", "shared"))
                places = {place: i for i, place in enumerate(rows["index"]) if place in wanted}
                for name, value in rows.items():
                    found[name] |= {place: value[i] for place, i in places.items()}
                for name in file.keys() if places else ():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    found[name] |= {place: tensor[i] for place, i in places.items()}
        missing = wanted - found["index"].keys()
        if missing:
            raise ValueError(
                f"{paths[0].parent} was written within a generation, and {len(missing)} of the {len(wanted)} images that "
                "this process is to train are in none of its files generation_*.safetensors. Copy the files of all "
                "processes into the folder, or resume from a checkpoint at the end of a generation."
            )
        for name, rows in found.items():
            in_order = [rows[place] for place in index]
            is_tensor = isinstance(in_order[0], torch.Tensor)
            name, _, key = name.partition(".")
            value = torch.stack(in_order).to(device) if is_tensor else in_order
            if key:
                values.setdefault(name, {})[int(key)] = value
            else:
                values[name] = value
        values["prompts"] = from_json(values["prompts"])
        return cls(**values)


def beginning_groups(groups: Sequence[Sequence[int]], size: int) -> list[list[slice | None]] | None:
    """
    Where the images of a group are in several micro-batches: the rows of the whole groups that begin in each of these.

    Args:
        groups (`Sequence[Sequence[int]]`): by process, the group of each row; rows of a group follow one another.
        size (`int`): rows of a micro-batch.

    Returns:
        `list[list[slice | None]]`: by process and micro-batch, `None` where none begins. `None` in place of all where each
        group of every process is in one micro-batch, or where groups begin in other micro-batches on some process than on
        others: what they do in a micro-batch would differ. It is the same on every process.
    """
    found, one_each = [], True
    for rows in groups:
        begins = [row for row, group in enumerate(rows) if row == 0 or group != rows[row - 1]]
        ends = [*begins[1:], len(rows)]
        one_each &= all(begin // size == (end - 1) // size for begin, end in zip(begins, ends, strict=True))
        parts: list[slice | None] = [None] * -(-len(rows) // size)
        for begin, end in zip(begins, ends, strict=True):
            before = parts[begin // size]
            parts[begin // size] = slice(begin if before is None else before.start, end)
        found.append(parts)
    alike = all([part is None for part in parts] == [part is None for part in found[0]] for parts in found)
    return found if alike and not one_each else None


def _fields(generation: Generation, shared: bool) -> list[dataclasses.Field]:
    """Those whose values are by image, or those whose value is shared; without those that have none, or are not kept."""
    there = [each for each in dataclasses.fields(generation) if vars(generation)[each.name] is not None]
    there = [each for each in there if each.metadata.get("kept", True)]
    return [each for each in there if each.metadata.get("shared", False) is shared]
