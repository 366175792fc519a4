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

"""The columns of a dataset besides the prompt: those that a reward asks for, and no others, are read."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature

from .images import (
    AnyDataset,
    check_condition_images,
    check_pictures,
    open_picture,
    undecoded_condition_images,
)
from .prompt_images import prompt_of
from .prompts import CONDITION_IMAGE, column_names


class ColumnReader:
    """
    Reads the columns that rewards ask for, as Python values; images by [`open_picture`], which reads what cameras write.

    Args:
        asked_for (`Callable[[str], bool]`): whether a reward asks for the column of this name.
        process_index, num_processes (`int`, *optional*): this process, and how many there are.
    """

    def __init__(self, asked_for: Callable[[str], bool], process_index: int = 0, num_processes: int = 1):
        self.asked_for = asked_for
        self.process_index = process_index
        self.num_processes = num_processes
        self._image_columns: set[str] = set()

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """
        The dataset with the prompts, the images that they edit, and the columns that are asked for, its images undecoded;
        each is read once, so that a broken file ends the run before it begins, but for those of a stream. To be called by
        all processes.

        Args:
            dataset (`datasets.Dataset`): as the user gave it, or as this method returned it.
            name (`str`): what the caller calls it, for the message.

        Raises:
            `ValueError`: an image that cannot be read, or none to edit; the message names its row.
        """
        dataset = dataset.with_format(None)
        columns = [
            column
            for column in column_names(dataset)
            if column in ("prompt", CONDITION_IMAGE) or self.asked_for(column)
        ]
        dataset = dataset.select_columns(columns)
        for column, feature in (dataset.features or {}).items():  # a stream may not tell
            if column == CONDITION_IMAGE:
                is_new = not isinstance(feature, ImageFeature) or feature.decode
                dataset = undecoded_condition_images(dataset, name)
                if is_new and isinstance(dataset, Dataset):
                    check_condition_images(dataset, name, self.process_index, self.num_processes)
            elif isinstance(feature, ImageFeature) and feature.decode:
                dataset = dataset.cast_column(column, ImageFeature(decode=False))
                if isinstance(dataset, Dataset):
                    check_pictures(dataset, column, name, self.process_index, self.num_processes)
                self._image_columns.add(column)
        return dataset

    def read(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        """The columns, other than the prompt, of rows of datasets that were prepared: those that are asked for."""
        columns = {
            name: [
                open_picture(row[name]) if name in self._image_columns and row[name] is not None else row[name]
                for row in rows
            ]
            for name in rows[0]
            if name not in ("prompt", CONDITION_IMAGE)
        }
        if CONDITION_IMAGE in rows[0] and self.asked_for(CONDITION_IMAGE):
            prompts = [prompt_of(row) for row in rows]
            pictures = {prompt: prompt.open() for prompt in dict.fromkeys(prompts)}  # once for all images of a prompt
            columns[CONDITION_IMAGE] = [pictures[prompt] for prompt in prompts]
        return columns
