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

"""What a dataset of prompts must look like."""

from typing import Any

from datasets import Dataset, IterableDataset


# Column of the images that prompts edit.
CONDITION_IMAGE = "condition_image"


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset; of a stream that does not tell, those of its first row, which is read for it."""
    return list(next(iter(dataset), {})) if dataset.column_names is None else dataset.column_names


def check_prompt(prompt: Any, row: int, name: str) -> None:
    """Refuse the prompt of a row of the dataset that the caller calls `name`."""
    if not isinstance(prompt, str):
        raise TypeError(
            f"Row {row} of {name} has the prompt {prompt!r} of type {type(prompt).__name__}. Prompts must be "
            "strings; filter or convert the column."
        )
    if not prompt.strip():
        raise ValueError(
            f"Row {row} of {name} has an empty prompt {prompt!r}. Filter such rows: "
            "dataset.filter(lambda row: row['prompt'].strip())."
        )


def check_prompts(dataset: Any, name: str = "train_dataset", may_stream: bool = False) -> None:
    """
    Refuse a dataset that no trainer can use, naming the row and the remedy. Rows of a stream are checked when they come.

    Args:
        dataset (`datasets.Dataset`): must have a column "prompt" of non-empty strings, none that is called "images" or
            "prompts", and no transform.
        name (`str`): what the caller calls it, for the message.
        may_stream (`bool`): whether a `datasets.IterableDataset` will do.

    Raises:
        `ValueError` or `TypeError`.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing. Pass a datasets.Dataset with a column 'prompt'.")
    streams = may_stream and isinstance(dataset, IterableDataset)
    if not streams and not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}. Build one with "
            "datasets.load_dataset(..., split='train') or datasets.Dataset.from_list([{'prompt': ...}]); take the "
            "first prompts of a stream with Dataset.from_list(list(stream.take(n)))."
        )
    if not streams and dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (with_transform or set_transform), which would make its rows anew whenever they are "
            "read; the trainers encode prompts once. Apply it to the rows with dataset.with_format(None).map(...), or "
            "leave it out with dataset.with_format(None)."
        )
    if streams and next(iter(dataset), None) is None:
        raise ValueError(f"{name} is an empty stream. It needs at least one prompt.")
    columns = column_names(dataset)
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has no column 'prompt', only {columns}. Rename the column that holds the prompts: "
            "dataset.rename_column(old_name, 'prompt')."
        )
    for column in ("images", "prompts"):
        if column in columns:
            raise ValueError(
                f"{name} has a column {column!r}. Rewards get the dataset's columns by name, and under this one they get "
                f"the {'drawn images' if column == 'images' else 'prompts'}. Rename it, "
                f"dataset.rename_column({column!r}, ...), or remove it."
            )
    if streams:
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty. It needs at least one prompt.")
    for row, prompt in enumerate(dataset.with_format(None)["prompt"]):
        check_prompt(prompt, row, name)
