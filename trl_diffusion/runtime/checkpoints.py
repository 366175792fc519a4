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

"""Checkpoints appear whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Where a checkpoint is written until it is whole. Nothing takes it for one.
STAGING_NAME = ".checkpoint-being-written"
# What the trainers of this package keep beside what `transformers.Trainer` keeps.
STATE_NAME = "trl_diffusion_state.json"
# What a resume needs of the checkpoint, with sizes, written last.
MANIFEST_NAME = "trl_diffusion_files.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_REPLACED = re.compile(rf"\.({PREFIX_CHECKPOINT_DIR}-\d+)-replaced")


def write_manifest(folder: Path) -> None:
    """
    List the files of a checkpoint and their sizes in it, once all of them are written; but for the settings, which no
    resume reads and no push takes along.
    """
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != TRAINING_ARGS_NAME
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(files, indent=2), encoding="utf-8")


def publish(staging: Path, final: Path) -> None:
    """
    Move a folder that was written beside to its name, after all of it has reached the disk. Whatever happens before
    the end of this function, [`recover`] finds `final` as it was before, or all of the new content.

    Args:
        staging (`Path`): the folder as written.
        final (`Path`): its name, on the same file system; an older folder of this name is replaced.
    """
    for folder, _, names in os.walk(staging):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if final.exists():
        # A folder cannot be replaced in one step; the name of the old one must not look like a checkpoint's.
        old = final.with_name(f".{final.name}-replaced")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    _sync(final.parent)


def recover(folder: Path) -> None:
    """Put back a checkpoint that was moved aside by a [`publish`] that was killed, and delete what is left over."""
    if not folder.is_dir():
        return
    for old in folder.iterdir():
        match = _REPLACED.fullmatch(old.name)
        if match and not (folder / match[1]).exists():
            old.rename(folder / match[1])
        elif match:
            shutil.rmtree(old)


def why_incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks for a resume, in words; `None` if it is whole."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    manifest = checkpoint / MANIFEST_NAME
    if not manifest.is_file():
        return f"its list of files, {MANIFEST_NAME}, is missing"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return f"its list of files, {MANIFEST_NAME}, is broken"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"the file {name} is missing"
        if path.stat().st_size != size:
            return f"the file {name} has {path.stat().st_size} bytes instead of {size}"
    for name in (STATE_NAME, TRAINER_STATE_NAME):
        if name not in files:
            return f"it was written with save_only_model=True and has no {name}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folders that are called checkpoints, whole or not, by their step."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step, `None` if there is none; says which later ones it passes over."""
    for path in reversed(checkpoints(folder)):
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning(f"The checkpoint {path} is incomplete and is skipped: {reason}.")
    return None


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """
    Delete the checkpoints that were written first, until `limit` are left. Those in `keep` stay, even if they are more.

    `transformers` decides by the numbers of the steps where the clock of a file system cannot be trusted, which in a
    folder with the checkpoints of an earlier run would delete the one that was just written.

    Args:
        folder (`Path`): of the run.
        limit (`int`, *optional*): as `save_total_limit`; `None` or 0 deletes nothing.
        keep (`Collection[Path]`): the checkpoint that was just written, and the best one.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(folder)
    surplus = len(found) - limit
    for path in sorted((path for path in found if path not in keep), key=lambda path: path.stat().st_mtime):
        if surplus <= 0:
            return
        shutil.rmtree(path, ignore_errors=True)
        surplus -= 1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
