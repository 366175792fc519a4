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

"""Trainers for flow-matching text-to-image models, as an extension of TRL and the Hugging Face stack."""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .trainer import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer

# Imported on demand: `trl_diffusion.shapes` or the command line's help need no trainer.
_EXPORTS = {
    "ChunkGRPOConfig": ".trainer",
    "ChunkGRPOTrainer": ".trainer",
    "SRPOConfig": ".trainer",
    "SRPOTrainer": ".trainer",
}

__all__ = ["ChunkGRPOConfig", "ChunkGRPOTrainer", "SRPOConfig", "SRPOTrainer", "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
