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

"""Runs of both trainers on the tiny model, with everything in them that a resume must restore."""

from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_models import tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.rewards import RewardModel


PROMPTS = ["a cat", "a dog", "a bird", "a fish", "a house on a hill", "rain"]
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["to_q", "to_v"])
TRAINERS = {"chunk_grpo": ChunkGRPOTrainer, "srpo": SRPOTrainer}


class Warmth(RewardModel):
    """Red over blue, more so where the prompt is long."""

    name = "warmth"

    def score(self, images, prompts):
        length = images.new_tensor([len(prompt) / 10 for prompt in prompts])
        return length * (images[:, 0] - images[:, 2]).mean((1, 2))


def make_trainer(
    kind, output_dir, trainer_class=None, reward=None, prompts=PROMPTS, eval_dataset=None, peft_config=LORA, **settings
):
    """
    A trainer with six steps, two micro-batches each: generations that span two steps, dropout that draws from the
    global generator, control words in turn, and a moving average of the weights.
    """
    settings = {
        "output_dir": str(output_dir),
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "log_samples": False,
        "cache_prompt_embeds": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    if kind == "chunk_grpo":
        own = {"num_generations": 4, "steps_per_generation": 4, "chunk_sizes": [1, 2], "beta": 0.1}
        config = ChunkGRPOConfig(**{**own, **settings})
    else:
        own = {"positive_words": ["warm", "red", "hot"], "negative_words": ["cold", "blue"], "num_landings": 1}
        config = SRPOConfig(**{**own, **settings})
    return (trainer_class or TRAINERS[kind])(
        tiny_flux_pipeline(seed=0),
        Warmth() if reward is None else reward,
        config,
        Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


def save_trained(trainer, path: Path) -> None:
    """Write the trained weights and the exported ones, their moving average."""
    with trainer.averaged_weights():
        with_average = {f"average.{name}": p.detach().clone() for name, p in _trained(trainer)}
    save_file({**with_average, **{f"trained.{name}": p.detach().clone() for name, p in _trained(trainer)}}, path)


def _trained(trainer):
    return [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
