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

"""The benchmark of a training step counts every phase."""

from datasets import Dataset
from tiny_models import tiny_flux_pipeline

from examples.benchmarks.chunk_grpo import PHASES, TimedTrainer
from trl_diffusion import ChunkGRPOConfig


def test_every_phase_is_counted(tmp_path):
    args = ChunkGRPOConfig(
        output_dir=str(tmp_path), num_inference_steps=4, chunk_sizes=[1, 2], num_generations=2, max_steps=1,
        per_device_train_batch_size=2, height=32, width=32, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = TimedTrainer(
        tiny_flux_pipeline(),
        lambda images, prompts: [float(i) for i, _ in enumerate(images)],
        args,
        Dataset.from_list([{"prompt": "a cat"}]),
    )
    trainer.train()
    assert trainer.seconds.keys() == set(PHASES)
    assert all(seconds > 0 for seconds in trainer.seconds.values())
