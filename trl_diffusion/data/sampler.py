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

"""The order in which prompts are trained, the same on every process and after a resume."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler

from .prompts import check_prompt


def _layout(num_generations: int, batch_size: int, steps: int, num_processes: int) -> list[int]:
    """The prompt of the generation batch that each row of the data loader's order shows."""
    return [
        ((i * num_processes + p) * batch_size + r) // num_generations
        for p in range(num_processes)
        for i in range(steps)
        for r in range(batch_size)
    ]


def _of_process(layout: list[int], process: int, num_processes: int) -> list[int]:
    """The distinct prompts of a process in a layout."""
    rows = len(layout) // num_processes
    return list(dict.fromkeys(layout[process * rows : (process + 1) * rows]))


class GroupSampler(Sampler[int]):
    r"""
    Each prompt `num_generations` times, laid out so that every optimizer step trains the same images whatever the
    number of processes.

    A generation batch is `num_processes * steps * batch_size` images. The data loader hands process `p` the rows
    `[p * steps * batch_size, (p + 1) * steps * batch_size)` of it, which it trains in `steps` optimizer steps, each in one
    micro-batch or several. Row `(p, i, r)` (process, step, row) therefore carries the image with the global index
    `(i * num_processes + p) * batch_size + r`, and image `g` belongs to the prompt `g // num_generations` of the
    generation batch: step `i` of all processes together is a contiguous piece of the global order, and so is the part of each.

    The order of an epoch depends on `seed` and the epoch alone, so a resumed run goes on where the first one stopped.

    Args:
        num_prompts (`int`): size of the dataset.
        num_generations (`int`): images per prompt G.
        batch_size (`int`): images of an optimizer step on one process.
        steps (`int`): optimizer steps of a generation.
        num_processes (`int`): processes.
        repeats (`int`): how often a generation batch is yielded (steps x passes, as the data loader is read once a
            micro-batch).
        seed (`int`): of the order.
        shuffle (`bool`): whether to shuffle the prompts, anew each epoch.

    Example: two prompts of two images each, on one process and on two, one micro-batch each.

    ```python
    >>> list(GroupSampler(2, 2, batch_size=4, steps=1, num_processes=1, repeats=1, seed=0, shuffle=False))
    [0, 0, 1, 1]
    >>> list(GroupSampler(2, 2, batch_size=1, steps=2, num_processes=2, repeats=1, seed=0, shuffle=False))
    [0, 1, 0, 1]
    ```
    """

    def __init__(
        self,
        num_prompts: int,
        num_generations: int,
        batch_size: int,
        steps: int,
        num_processes: int,
        repeats: int,
        seed: int,
        shuffle: bool = True,
    ):
        self.num_prompts = num_prompts
        self.num_processes = num_processes
        self.prompts_per_batch = num_processes * steps * batch_size // num_generations
        if num_prompts < self.prompts_per_batch:
            raise ValueError(
                f"The dataset has {num_prompts} prompts, but a generation needs {self.prompts_per_batch} distinct "
                f"ones ({num_processes * steps * batch_size} images / {num_generations} per prompt). Add prompts, "
                "raise num_generations, or lower generation_batch_size."
            )
        self.repeats = repeats
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.layout = _layout(num_generations, batch_size, steps, num_processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def fixed_settings(self) -> dict[str, int]:
        """What the order of the rows depends on, besides the seed and the size of a generation batch."""
        return {"rows of train_dataset": self.num_prompts}

    @property
    def _per_epoch(self) -> int:
        """Generations of an epoch."""
        return self.num_prompts // self.prompts_per_batch

    def _prompts(self, epoch: int) -> Iterator[list[int]]:
        """The distinct prompts of each generation of an epoch."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        else:
            order = list(range(self.num_prompts))
        for index in range(self._per_epoch):
            yield order[index * self.prompts_per_batch : (index + 1) * self.prompts_per_batch]

    def __iter__(self) -> Iterator[int]:
        for prompts in self._prompts(self.epoch):
            for _ in range(self.repeats):
                yield from (prompts[index] for index in self.layout)

    def upcoming(self, generation: int, process: int) -> Iterator[int]:
        """
        The rows that a process will see from a generation of the run on, without end.

        Args:
            generation (`int`): number of the first one, counted from the start of the run.
            process (`int`): index of the process.
        """
        mine = _of_process(self.layout, process, self.num_processes)
        for epoch in itertools.count(generation // self._per_epoch):
            for prompts in itertools.islice(self._prompts(epoch), generation % self._per_epoch, None):
                yield from (prompts[index] for index in mine)
            generation = 0

    def __len__(self) -> int:
        return self._per_epoch * self.repeats * len(self.layout)


class BucketSampler(Sampler[int]):
    r"""
    Each row once an epoch, in batches that come from one bucket, e.g. of images of one size.

    A batch is `num_processes * batch_size` rows, of which the data loader hands `batch_size` to each process: all
    processes work on one bucket at a time. The rows of a bucket that do not fill a batch wait for the next epoch,
    which shuffles anew.

    The order of an epoch depends on `seed` and the epoch alone, so a resumed run goes on where the first one stopped.

    Args:
        bucket_of_row (`list[int]`): bucket of each row of the dataset.
        batch_size (`int`): rows of a micro-batch on one process.
        num_processes (`int`): processes.
        seed (`int`): of the order.

    Raises:
        `ValueError`: no bucket has enough rows for a batch.

    Example: two buckets of three rows, batches of two.

    ```python
    >>> sampler = BucketSampler([0, 1, 0, 1, 0, 1], batch_size=2, num_processes=1, seed=0)
    >>> len(sampler), [row % 2 for row in sampler]
    (4, [0, 0, 1, 1])
    ```
    """

    def __init__(self, bucket_of_row: list[int], batch_size: int, num_processes: int, seed: int):
        self.num_processes = num_processes
        self.batch_size = num_processes * batch_size
        self.seed = seed
        self.epoch = 0
        self.buckets: dict[int, list[int]] = {}
        for row, bucket in enumerate(bucket_of_row):
            self.buckets.setdefault(bucket, []).append(row)
        if len(self) == 0:
            sizes = sorted((len(rows) for rows in self.buckets.values()), reverse=True)
            kinds = "" if len(sizes) == 1 else f" in {len(sizes)} aspect buckets of {sizes} rows"
            raise ValueError(
                f"The dataset has {len(bucket_of_row)} rows{kinds}, which do not fill one batch of {self.batch_size} "
                f"({batch_size} x {num_processes} processes). Add rows or lower per_device_train_batch_size."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def fixed_settings(self) -> dict[str, int | list[int] | None]:
        """What the order of the rows depends on, besides the seed."""
        sizes = [len(rows) for _, rows in sorted(self.buckets.items())]
        several = len(sizes) > 1  # which take turns from batch to batch
        return {
            "rows of train_dataset": sizes if several else sizes[0],
            "rows of an epoch, in whole batches of per_device_train_batch_size x processes": len(self),
            "per_device_train_batch_size x processes, with images of several shapes": (
                self.batch_size if several else None
            ),
        }

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        """The rows of each batch of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled, turns = {}, []
        for bucket, rows in sorted(self.buckets.items()):
            shuffled[bucket] = iter([rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()])
            turns += [bucket] * (len(rows) // self.batch_size)
        # The buckets take turns at random, each in its own order: with one bucket, the order of the rows does not
        # depend on the size of batches.
        for i in torch.randperm(len(turns), generator=generator).tolist():
            yield list(itertools.islice(shuffled[turns[i]], self.batch_size))

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self._batches(self.epoch))

    def upcoming(self, batch: int, process: int) -> Iterator[int]:
        """
        The rows that a process will see from a batch of the run on, without end.

        Args:
            batch (`int`): number of the first one, counted from the start of the run.
            process (`int`): index of the process.
        """
        size, per_epoch = self.batch_size // self.num_processes, len(self) // self.batch_size
        for epoch in itertools.count(batch // per_epoch):
            for rows in itertools.islice(self._batches(epoch), batch % per_epoch, None):
                yield from rows[process * size : (process + 1) * size]
            batch = 0

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size for rows in self.buckets.values()) * self.batch_size


# The data loader takes rows before they are trained, by less than this.
_KEPT_GENERATIONS = 64


class GroupStream(TorchIterableDataset):
    """
    The rows of a stream in its own order, each `num_generations` times, laid out as [`GroupSampler`] does. It begins
    anew where the stream ends, in the order of the stream's next epoch, and so never ends itself.

    Args:
        stream ([`~datasets.IterableDataset`]): rows.
        num_generations, batch_size, steps, num_processes, repeats (`int`): see [`GroupSampler`].

    Raises:
        `ValueError`: while it is read, the stream is too short for one generation.
    """

    def __init__(
        self,
        stream: IterableDataset,
        num_generations: int,
        batch_size: int,
        steps: int,
        num_processes: int,
        repeats: int,
    ):
        self.stream = stream
        self.num_processes = num_processes
        self.prompts_per_batch = num_processes * steps * batch_size // num_generations
        self.repeats = repeats
        self.layout = _layout(num_generations, batch_size, steps, num_processes)
        self._reset()

    def _reset(self) -> None:
        self._reader = self._read()
        self._generations: dict[int, list[dict[str, Any]]] = {}
        self._next = 0  # to be read

    def set_epoch(self, epoch: int) -> None:
        """Nothing: what the trainer calls an epoch is no pass over the stream."""

    def fixed_settings(self) -> dict[str, str]:
        """What the order of the rows depends on, which a stream does not tell."""
        return {}

    def _read(self) -> Iterator[list[dict[str, Any]]]:
        for epoch in itertools.count():
            self.stream.set_epoch(epoch)
            count = 0
            batch = []
            for index, row in enumerate(self.stream):
                check_prompt(row["prompt"], index, "train_dataset")
                batch.append(row)
                if len(batch) == self.prompts_per_batch:
                    count += 1
                    yield batch
                    batch = []
            if count == 0:
                raise ValueError(
                    f"The stream has {len(batch)} rows, but a generation needs {self.prompts_per_batch} distinct "
                    "prompts. Use a longer one, raise num_generations, or lower generation_batch_size."
                )

    def _generation(self, index: int) -> list[dict[str, Any]]:
        while self._next <= index:
            self._generations[self._next] = next(self._reader)
            self._next += 1
        return self._generations[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._reset()
        for index in itertools.count():
            rows = self._generation(index)
            for _ in range(self.repeats):
                yield from (rows[i] for i in self.layout)
            self._generations.pop(index - _KEPT_GENERATIONS, None)

    def upcoming(self, generation: int, process: int) -> Iterator[dict[str, Any]]:
        """The rows that a process will see from a generation of the run on, as [`GroupSampler.upcoming`]."""
        mine = _of_process(self.layout, process, self.num_processes)
        for index in itertools.count(generation):
            rows = self._generation(index)
            yield from (rows[i] for i in mine)
