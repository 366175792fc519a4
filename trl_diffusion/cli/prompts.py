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

"""Prompts as a command line names them."""

import itertools
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from .. import shapes
from ..paths import check_exists, not_found


# Prompt files: ending -> builder of `datasets`.
FILE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def load_prompts(
    name: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    max_prompts: int | None = None,
    prompt_column: str = "prompt",
) -> Dataset:
    """
    Loads the prompts that a command line names.

    Args:
        name (`str`):
            A Hub id, a local folder (of files, of images, or written by `Dataset.save_to_disk`), a file (.txt with one
            prompt a line, .csv, .json, .jsonl, .parquet), or `"shapes"` for the built-in prompts.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset. A file is one split, whatever the name.
        config (`str`, *optional*):
            Configuration of the dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the first `max_prompts` rows of the source and no more.
        max_prompts (`int`, *optional*):
            Take the first so many rows.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Name of the column that holds the prompts.

    Returns:
        [`~datasets.Dataset`]: the rows, with the prompts in the column "prompt".

    Raises:
        `ValueError`: a file of a kind that is not supported, no such column, streaming without `max_prompts`.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}.")
    if streaming and max_prompts is None:
        raise ValueError(
            "streaming needs max_prompts: training repeats and shuffles its prompts, so it reads a part of the stream "
            "and keeps it. Say how many rows, e.g. --max_prompts 10000."
        )
    dataset = _load(name, split, config, streaming)
    if streaming:
        rows = list(itertools.islice(dataset, max_prompts))
        dataset = Dataset.from_list(rows, features=dataset.features)
    elif max_prompts is not None:
        dataset = dataset.select(range(min(max_prompts, len(dataset))))
    if prompt_column == "prompt" and dataset.column_names == ["text"]:
        prompt_column = "text"  # one text a line, from a file or a folder of them
    if prompt_column not in dataset.column_names:
        raise ValueError(
            f"{name!r} has no column {prompt_column!r}, only {dataset.column_names}. Name the one with the prompts: "
            "--prompt_column NAME."
        )
    if prompt_column == "prompt":
        return dataset
    if "prompt" in dataset.column_names:
        dataset = dataset.remove_columns("prompt")
    return dataset.rename_column(prompt_column, "prompt")


def _load(name: str, split: str, config: str | None, streaming: bool) -> Dataset:
    if name == "shapes":
        dataset = shapes.load_dataset(split)
        return dataset.to_iterable_dataset() if streaming else dataset
    path = Path(name)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        dataset = load_from_disk(name)
        dataset = dataset if isinstance(dataset, Dataset) else dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(f"The ending of the file {name!r} is not supported. Use one of {sorted(FILE_BUILDERS)}.")
        return load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=streaming)
    check_exists(name, FILE_BUILDERS)
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        if path.exists():
            raise
        raise ValueError(not_found(name, error)) from error
