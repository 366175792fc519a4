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

"""On a GPU, in bfloat16: one policy in rollout and training, and weights that move."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer


pytestmark = pytest.mark.gpu


def redness(images, prompts, **columns):
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]


def train(folder, **settings):
    config = ChunkGRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4,
        num_inference_steps=6, chunk_sizes=[2, 3], height=32, width=32, max_steps=4, learning_rate=1e-3,
        save_strategy="no", bf16=True, disable_tqdm=True, cache_prompt_embeds=False, **settings,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": name} for name in ("a cat", "a dog", "a bird", "a fish")])
    pipeline = tiny_flux_pipeline(seed=0).to(torch.bfloat16)
    trainer = ChunkGRPOTrainer(
        pipeline, redness, config, dataset, peft_config=LoraConfig(r=4, target_modules=["to_q", "to_v"])
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any((p != before[name]).any() for name, p in trainer.model.named_parameters() if p.requires_grad)
    return [log for log in trainer.state.log_history if "ratio/mean" in log]


@pytest.mark.parametrize("gradient", ["joint", "streamed"])
def test_on_policy_ratio_is_one(tmp_path, gradient):
    assert all(log["ratio/mean"] == 1.0 for log in train(tmp_path, chunk_gradient=gradient))


def test_recomputed_ratio_is_one_before_the_first_update(tmp_path):
    logs = train(tmp_path, steps_per_generation=4)
    assert logs[0]["ratio/mean"] == logs[2]["ratio/mean"] == 1.0


def test_rollout_log_probs_are_close_in_the_same_batch_shape(tmp_path):
    logs = train(tmp_path, chunk_gradient="streamed", rollout_batch_size=4)
    assert max(log["rollout_logp_gap"] for log in logs) < 1e-4
