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

import os
import shutil
from pathlib import Path


# Where a checkpoint is written until it is whole. `get_last_checkpoint` does not take it for one.
STAGING_NAME = ".checkpoint-being-written"


def publish(staging: Path, final: Path) -> None:
    """
    Move a folder that was written beside to its name, after all of it has reached the disk. Whatever happens before
    the end of this function, `final` is either what it was before or all of the new content.

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
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
