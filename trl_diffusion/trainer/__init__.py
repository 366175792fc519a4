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

from .base_config import DiffusionConfig
from .base_trainer import DiffusionTrainer
from .chunk_grpo_config import ChunkGRPOConfig
from .chunk_grpo_trainer import ChunkGRPOTrainer
from .srpo_config import SRPOConfig
from .srpo_trainer import SRPOTrainer


__all__ = [
    "ChunkGRPOConfig",
    "ChunkGRPOTrainer",
    "DiffusionConfig",
    "DiffusionTrainer",
    "SRPOConfig",
    "SRPOTrainer",
]
