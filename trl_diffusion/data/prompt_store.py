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

"""Embeddings of prompts on disk, one file a prompt, shared by runs and processes."""

import hashlib
import os
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers.utils import logging

from .prompt_images import Prompt


logger = logging.get_logger(__name__)

_SUFFIX = ".safetensors"
# What a killed process has left half written is deleted when it is older than this.
_ABANDONED_SECONDS = 3600


class PromptStore:
    """
    A folder of files, one for each prompt and each way to encode it, that is kept below a size: the entries that were
    used longest ago go first.

    A file appears whole or not at all, so that several processes and runs may use one folder at the same time, and be
    killed at any time.

    Args:
        folder (`Path`): made if it does not exist.
        key (`str`): what the embeddings depend on besides the prompt; entries of other keys are not seen.
        max_gib (`float`): size in GiB that [`trim`] leaves, of entries of all keys.
    """

    def __init__(self, folder: Path, key: str, max_gib: float):
        self.folder = folder
        self.key = key
        self.max_bytes = max_gib * 2**30
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, prompt: Prompt) -> Path:
        # One with an image shows its digest.
        name = hashlib.sha256(f"{self.key}\n{prompt}".encode()).hexdigest()
        return self.folder / name[:2] / (name + _SUFFIX)  # no folder with a hundred thousand names

    def __contains__(self, prompt: Prompt) -> bool:
        return self._path(prompt).exists()

    def get(self, prompt: Prompt) -> dict[str, torch.Tensor] | None:
        """The embeddings of a prompt, on the CPU; `None` if it is not there, or its file is damaged."""
        path = self._path(prompt)
        try:
            # Opened once: `load_file` opens a file by its name twice, and another process may delete it in between.
            tensors = safetensors.torch.load(path.read_bytes())
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning(f"The embeddings in {path} are damaged and are made again: {error}.")
            return None
        return tensors

    def put(self, prompt: Prompt, tensors: dict[str, torch.Tensor]) -> None:
        """Write the embeddings of a prompt. Where another process does so at the same time, the last one stays."""
        path = self._path(prompt)
        path.parent.mkdir(exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent)
        os.close(descriptor)
        try:
            safetensors.torch.save_file(tensors, beside)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise

    def trim(self) -> None:
        """Delete the entries that were used longest ago until `max_gib` are left, and what killed processes left."""
        entries, total, now = [], 0, time.time()
        for folder in os.scandir(self.folder):
            for file in os.scandir(folder):
                try:
                    status = file.stat()
                except FileNotFoundError:  # deleted by another process meanwhile
                    continue
                if not file.name.endswith(_SUFFIX):
                    if now - status.st_mtime > _ABANDONED_SECONDS:
                        Path(file).unlink(missing_ok=True)
                    continue
                entries.append((status.st_mtime, status.st_size, file.path))
                total += status.st_size
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
