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

"""The trainers and their configurations."""

import gc
import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .base_config import DiffusionConfig
    from .base_trainer import DiffusionTrainer
    from .chunk_grpo_config import ChunkGRPOConfig
    from .chunk_grpo_trainer import ChunkGRPOTrainer
    from .generation import Generation
    from .online_config import OnlineConfig
    from .online_trainer import OnlineTrainer
    from .srpo_config import SRPOConfig
    from .srpo_trainer import SRPOTrainer

# Imported on demand: a configuration loads in a fraction of a trainer's time, and the command line's help needs no more.
_EXPORTS = {
    "ChunkGRPOConfig": ".chunk_grpo_config",
    "ChunkGRPOTrainer": ".chunk_grpo_trainer",
    "DiffusionConfig": ".base_config",
    "DiffusionTrainer": ".base_trainer",
    "Generation": ".generation",
    "OnlineConfig": ".online_config",
    "OnlineTrainer": ".online_trainer",
    "SRPOConfig": ".srpo_config",
    "SRPOTrainer": ".srpo_trainer",
}

__all__ = [
    "ChunkGRPOConfig",
    "ChunkGRPOTrainer",
    "DiffusionConfig",
    "DiffusionTrainer",
    "Generation",
    "OnlineConfig",
    "OnlineTrainer",
    "SRPOConfig",
    "SRPOTrainer",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        # The libraries below make some 800,000 objects, which all stay: the collector would look through them in vain, again
        # and again, for a fifth of the time.
        collects = gc.isenabled()
        gc.disable()
        try:
            return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
        finally:
            if collects:
                gc.enable()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
