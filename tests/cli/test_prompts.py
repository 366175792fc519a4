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

"""Prompt files as people have them."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_diffusion.cli.prompts import load_prompts


PROMPTS = ["a fox", "ein Bär", "雨", "1984"]
TEXT = "\n".join(PROMPTS) + "\n"
JSON_LINES = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in PROMPTS)
FILES = {
    "prompts.txt": TEXT,
    "blank_lines.txt": "\n" + TEXT.replace("\n", "  \n\n \t\n"),
    "no_last_line_feed.txt": TEXT.strip(),
    "of_windows.txt": TEXT.replace("\n", "\r\n"),
    "UPPER_CASE.TXT": TEXT,
    "lines.jsonl": JSON_LINES,
    "blank_lines.jsonl": "\n" + JSON_LINES.replace("\n", "\r\n\n"),
    "UPPER_CASE.JSONL": JSON_LINES,
    "prompts.jsonl": "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS),
    "list.json": json.dumps([{"prompt": prompt} for prompt in PROMPTS], indent=2),
    "prompts.json": json.dumps(PROMPTS),
    "columns.json": json.dumps({"prompt": PROMPTS, "likes": [1, 2, 3, 4]}, indent=2),
    "prompts.csv": "prompt\n" + TEXT,
    "semicolons.csv": "likes;prompt\r\n" + "".join(f"{i};{prompt}\r\n" for i, prompt in enumerate(PROMPTS)),
    "tabs.csv": "prompt\tlikes\n" + "".join(f"{prompt}\t{i}\n\n" for i, prompt in enumerate(PROMPTS)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(FILES[name].encode(encoding))
    assert load_prompts(str(path))["prompt"][:] == PROMPTS


@pytest.mark.parametrize("name", ["prompts.txt", "lines.jsonl", "prompts.csv"])
def test_compressed_files(tmp_path, name):
    path = tmp_path / f"{name}.gz"
    data = gzip.compress(FILES[name].encode())
    path.write_bytes(data)
    assert load_prompts(str(path))["prompt"][:] == PROMPTS
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}.gz' cannot be unpacked"):
        load_prompts(str(path))


def test_other_columns_keep_their_types(tmp_path):
    rows = [{"prompt": "a", "likes": 3, "target": None}, {"prompt": "None", "likes": 4, "target": "x"}]
    for name, text in (
        ("a.csv", "prompt,likes,target\na,3,\nNone,4,x\n"),
        ("a.jsonl", '{"prompt": "a", "likes": 3}\n{"target": "x", "prompt": "None", "likes": 4}\n'),
    ):
        (tmp_path / name).write_text(text)
        assert load_prompts(str(tmp_path / name)).to_list() == rows


def test_quoted_fields_of_several_lines(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,n\n"a ""red"", small\nfox",1\nb,2\n')
    assert load_prompts(str(tmp_path / "a.csv"))["prompt"][:] == ['a "red", small\nfox', "b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "a fox\nein Bär\n".encode("latin-1"), "Line 2 of '.*a.txt' is not in UTF-8.*it reads .*ein Bär.*iconv"),
        ("a.csv", "prompt\na\nein Bär\n".encode("cp1252"), "Line 3 of '.*a.csv' is not in UTF-8.*ein Bär"),
        ("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "Line 1 of '.*a.jsonl' is not in UTF-8"),
        ("a.txt", "a fox\nein Bär\n".encode("utf-16")[:-1], "Line 2 of '.*a.txt' is not in UTF-16: truncated data"),
        ("a.txt", "a fox\n".encode("utf-16-le"), "Line 1 of '.*a.txt' has a NUL character: .* UTF-16 without a byte"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": b}\n', "Line 3 of '.*a.jsonl' is not JSON: Expecting value"),
        ("a.json", b'[\n  {"prompt": "a"},\n  {"prompt"}\n]', "Line 3 of '.*a.json' is not JSON: Expecting ':'"),
        ("a.jsonl", b'"a"\n5\n', "Row 1 of '.*a.jsonl' is 5. Give objects"),
        ("a.json", b'{"prompt": ["a", "b"], "n": [1]}', "a.json' is no table: .*expected length 2"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 5}\n', "a.jsonl' is no table"),
        ("a.csv", b"prompt\na fox\na small, red fox\n", "Line 3 of '.*a.csv' has 2 fields, .*double quotes"),
        ("a.csv", b'prompt\n"a fox\nb\n', "a.csv' cannot be read as CSV"),
        ("a.csv", b"", "a.csv' has no column 'prompt'"),
        ("a.parquet", b"not parquet", "a.parquet' cannot be read: "),
        ("a.xlsx.gz", b"", "The ending of the file .* is not supported"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_folder_of_text_files(tmp_path):
    (tmp_path / "train.txt").write_bytes("\n  \na fox \r\nein Bär\r\n\n".encode("utf-8-sig"))
    for arguments in ({}, {"streaming": True, "max_prompts": 9}):
        assert load_prompts(str(tmp_path), **arguments)["prompt"][:] == ["a fox", "ein Bär"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nein Bär\n".encode("latin-1"), "Line 2 of '.*train.txt' is not in UTF-8"),
        ("a\nein Bär\n".encode("utf-16"), "cannot be read: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_the_cause_of_an_error_inside_datasets_is_shown(tmp_path, data, message):
    (tmp_path / "train.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path))


@pytest.mark.parametrize("name", ["promts.txt", "./folder", "no/such/folder", "folder/promts.JSONL"])
def test_what_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"There is no file( or folder)? '{name}'"):
        load_prompts(name)


def test_split_that_a_saved_dataset_does_not_have(tmp_path):
    DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved' has no split 'test', only \['train'\]"):
        load_prompts(str(tmp_path / "saved"), "test")
