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

"""Names that may be a path here or an id on the Hub, and what to say of a path that is not there."""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_exists(name: str | os.PathLike, endings: Collection[str] = ()) -> None:
    """
    Refuse a path that is not there, before the Hub is asked for an id of that name.

    A name that could be an id is left to the Hub, unless it ends as a file does.

    Args:
        name (`str` or `os.PathLike`): a path, or an id on the Hub.
        endings (`Collection[str]`): of files that could be meant, as ".csv"; a misspelt one counts.

    Raises:
        `ValueError`: nothing is there; the message has the nearest names that are.
    """
    text = os.fspath(name)
    if Path(text).exists():
        return
    ending = Path(text).suffix.lower()
    is_file = bool(endings) and re.fullmatch(r"\.[a-z]+", ending) is not None
    is_file = is_file and bool(difflib.get_close_matches(ending, endings, n=1, cutoff=0.75))
    if isinstance(name, os.PathLike) or is_file or not _may_be_id(text):
        raise ValueError(f"There is no {'file' if is_file else 'file or folder'} {text!r}.{nearest(text)}")


def check_output_folder(name: str | os.PathLike, setting: str = "output_dir") -> None:
    """
    Refuse a folder to write to that cannot be made, before there is anything to write.

    Raises:
        `ValueError`: it, or a folder above it, is a file.
    """
    folder = Path(name)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{setting} is {str(name)!r}, but {str(path)!r} is a file. Name another folder.")


def not_found(name: str | os.PathLike, answer: Exception) -> str:
    """What to say of a name that is no path here and that the Hub did not give."""
    return f"There is no file or folder {os.fspath(name)!r} here.{nearest(name)} The Hub was asked for it: {answer}"


def nearest(name: str | os.PathLike) -> str:
    """ " Did you mean ...?" with what is called nearly so, for the end of a message; "" if nothing is."""
    path = Path(name)
    if path.exists():
        return ""
    if path.expanduser() != path and path.expanduser().exists():
        return f" Did you mean {str(path.expanduser())!r}? '~' is the shell's."
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    names = {entry.name.lower(): entry.name for entry in missing.parent.iterdir()} if missing.parent.is_dir() else {}
    near = difflib.get_close_matches(missing.name.lower(), names, n=1, cutoff=0.7)
    return "" if not near else f" Did you mean {str(missing.with_name(names[near[0]]) / path.relative_to(missing))!r}?"


def _may_be_id(name: str) -> bool:
    if name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
