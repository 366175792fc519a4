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

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pyarrow import ArrowInvalid

from .. import shapes
from ..data.prompts import CONDITION_IMAGE, column_names
from ..paths import check_exists, not_found


TEXT_ENDINGS = (".csv", ".json", ".jsonl", ".txt")
FILE_ENDINGS = (*TEXT_ENDINGS, ".parquet")
COMPRESSIONS = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
# How a file may begin that says its encoding; the longer ones first, since UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = (",", ";", "\t")


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
            prompt a line, .csv, .json, .jsonl, .parquet), or `"shapes"` for the built-in prompts. A file may be
            compressed (.gz, .bz2, .xz). Text is in UTF-8, or in what its byte order mark says. Blank lines are left out.
            Paths in a column `condition_image` of a file are relative to it.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset. A file is one split, whatever the name.
        config (`str`, *optional*):
            Configuration of the dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Do not download the source: read it row by row, or the first `max_prompts` rows.
        max_prompts (`int`, *optional*):
            Take the first so many rows.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Name of the column that holds the prompts.

    Returns:
        [`~datasets.Dataset`], or [`~datasets.IterableDataset`] for `streaming` without `max_prompts`: the rows, with the
        prompts in the column "prompt".

    Raises:
        `ValueError`: a file of a kind that is not supported, or that cannot be read; no such column, split, file, folder
        or dataset of the Hub.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {max_prompts}.")
    try:
        dataset = _load(name, split, config, streaming, prompt_column)
        if streaming and max_prompts is not None:
            rows = list(itertools.islice(dataset, max_prompts))
            dataset = Dataset.from_list(rows, features=dataset.features)
            max_prompts = None
    except (DatasetsError, ArrowInvalid) as error:
        if isinstance(error, OSError):
            raise
        _find_unreadable_file(Path(name))
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # Some messages have paragraphs.
        raise ValueError(f"{name!r} cannot be read: {type(cause).__name__}: {' '.join(str(cause).split())}") from error
    except ValueError:
        _find_unreadable_file(Path(name))  # older releases of datasets let errors of pandas through
        raise
    if max_prompts is not None:
        dataset = dataset.select(range(min(max_prompts, len(dataset))))
    columns = column_names(dataset)
    if prompt_column == "prompt" and columns == ["text"]:
        prompt_column = "text"  # one text a line, from a file or a folder of them
    if prompt_column not in columns:
        raise ValueError(
            f"{name!r} has no column {prompt_column!r}, only {columns}. Name the one with the prompts: "
            "--prompt_column NAME."
        )
    if prompt_column == "prompt":
        return dataset
    if "prompt" in columns:
        dataset = dataset.remove_columns("prompt")
    return dataset.rename_column(prompt_column, "prompt")


def _load(name: str, split: str, config: str | None, streaming: bool, prompt_column: str) -> Dataset:
    path = Path(name)
    if name == "shapes":
        dataset = shapes.load_dataset(split)
    elif path.is_file():
        dataset = _read_file(path, prompt_column)
    elif path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        dataset = load_from_disk(name)
        if not isinstance(dataset, Dataset):
            if split not in dataset:
                raise ValueError(f"{name!r} has no split {split!r}, only {list(dataset)}.")
            dataset = dataset[split]
    else:
        check_exists(name, FILE_ENDINGS)
        try:
            dataset = load_dataset(name, config, split=split, streaming=streaming)
        except (ConnectionError, FileNotFoundError) as error:
            if path.exists():
                raise
            raise ValueError(not_found(name, error)) from error
        if dataset.column_names == ["text"]:
            # Lines of text files.
            dataset = dataset.map(lambda row: {"text": row["text"].removeprefix("\ufeff").strip()})
            dataset = dataset.filter(lambda row: bool(row["text"]))
        return dataset
    return dataset.to_iterable_dataset() if streaming else dataset


def _ending(path: Path) -> str:
    """The ending that says what a file holds, without that of a compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ending


def _read_file(path: Path, prompt_column: str) -> Dataset:
    ending = _ending(path)
    if ending not in FILE_ENDINGS:
        raise ValueError(f"The ending of the file {str(path)!r} is not supported. Use one of {sorted(FILE_ENDINGS)}.")
    if ending == ".parquet":
        try:
            return load_dataset("parquet", data_files=str(path), split="train")
        except ValueError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    text = _read_text(path)
    if ending == ".txt":
        lines = [line.strip() for line in text.split("\n")]
        columns: dict[str, Any] = {"text": [line for line in lines if line]}
    elif ending == ".csv":
        columns = _read_csv(path, text, prompt_column)
    else:
        columns = _read_json(path, text)
    if CONDITION_IMAGE in columns:  # beside the file
        columns[CONDITION_IMAGE] = [
            str(path.parent / image) if isinstance(image, str) else image for image in columns[CONDITION_IMAGE]
        ]
    try:
        return Dataset.from_dict(columns)
    except (TypeError, ValueError) as error:  # columns of different lengths, or with values of different types
        raise ValueError(f"{str(path)!r} is no table: {error}") from error


def _read_text(path: Path) -> str:
    """The text of a file, with lines that end in a line feed; `ValueError` naming the line that cannot be decoded."""
    try:
        with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
            data = file.read()
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be unpacked: {error}") from error
    marked = [encoding for mark, encoding in BYTE_ORDER_MARKS.items() if data.startswith(mark)]
    encoding = marked[0] if marked else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        message = f"Line {line} of {str(path)!r} is not in {encoding.removesuffix('-sig').upper()}: {error.reason}."
        if not marked:
            shown = data[max(0, error.start - 20) : error.start + 20].decode("latin-1").splitlines()
            message += (
                f" In Latin-1 it reads {' '.join(shown)!r}; if that is right, convert the file: "
                "iconv -f LATIN1 -t UTF-8 OLD > NEW."
            )
        raise ValueError(message) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"Line {line} of {str(path)!r} has a NUL character: the file may be in UTF-16 without a byte order mark. "
            "Convert it, e.g. iconv -f UTF-16LE -t UTF-8 OLD > NEW."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_csv(path: Path, text: str, prompt_column: str) -> dict[str, list[Any]]:
    header = next((line for line in text.split("\n") if line.strip()), "")
    # Spreadsheets of some languages write semicolons. The one that makes the column of the prompts of the header is it.
    delimiter = next(
        (d for d in DELIMITERS if prompt_column in next(csv.reader([header], delimiter=d), [])), DELIMITERS[0]
    )
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    names: list[str] = []
    try:
        for row in reader:
            names = names or row
            if len(row) > len(names):
                # pandas would take the first field for a number of the row.
                raise ValueError(
                    f"Line {reader.line_num} of {str(path)!r} has {len(row)} fields, but the first line names "
                    f"{len(names)} columns. Put texts with {delimiter!r} in double quotes."
                )
        if not names:
            return {}
        # An empty field is None; the prompts "None" and "1984" are texts.
        frame = pd.read_csv(
            io.StringIO(text), sep=delimiter, dtype={prompt_column: str}, keep_default_na=False, na_values=[""]
        )
    except (csv.Error, pd.errors.ParserError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as CSV: {error}") from error
    return {
        str(name): [None if pd.isna(value) else value for value in column.tolist()] for name, column in frame.items()
    }


def _read_json(path: Path, text: str) -> dict[str, list[Any]]:
    """JSON Lines, or one list of objects or prompts, or an object of columns."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        content = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    content.append(json.loads(line))
                except json.JSONDecodeError as line_error:
                    # Of a file that is no JSON Lines, the place in the whole says more.
                    where = line_error if content else error
                    place = number if content else error.lineno
                    raise ValueError(f"Line {place} of {str(path)!r} is not JSON: {where.msg}.") from where
    if isinstance(content, dict) and content and all(isinstance(values, list) for values in content.values()):
        return content
    rows = content if isinstance(content, list) else [content]
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"Row {index} of {str(path)!r} is {row!r}. Give objects with a key for the prompt, or prompts in quotes."
            )
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}


def _find_unreadable_file(folder: Path) -> None:
    """Raise the error of the first text file of a folder that is not in UTF-8, or not the JSON that it should be."""
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and _ending(path) in TEXT_ENDINGS:
                text = _read_text(path)
                if _ending(path).startswith(".json"):
                    _read_json(path, text)
