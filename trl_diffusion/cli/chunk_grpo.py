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

"""
`trl-diffusion chunk_grpo`: training from the command line, from a YAML file or both.

```bash
trl-diffusion chunk_grpo --model_name_or_path shapes --dataset_name shapes --reward_funcs shapes-judge \
    --output_dir shapes-chunk-grpo --num_inference_steps 10 --chunk_sizes 1 2 2 4 --max_steps 50
trl-diffusion chunk_grpo --accelerate_config zero2 --num_processes 8 --config run.yaml
accelerate launch -m trl_diffusion.cli chunk_grpo --config run.yaml
```
"""

from collections.abc import Sequence

from ..trainer import ChunkGRPOConfig
from . import launch, training
from .parser import CommandParser


def make_parser() -> CommandParser:
    return training.make_parser(ChunkGRPOConfig, "chunk_grpo", "Chunk-GRPO")


def main(arguments: Sequence[str]) -> int:
    parser = make_parser()
    status = launch.launch("chunk_grpo", make_parser(), arguments)
    if status is not None:
        return status
    with parser.user_errors() as set_up:
        script_args, training_args = parser.parse_args_and_config(arguments)

        from ..trainer import ChunkGRPOTrainer

        return training.run(ChunkGRPOTrainer, script_args, training_args, set_up)
