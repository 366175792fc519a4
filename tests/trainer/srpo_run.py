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

"""A short run of SRPO on a tiny model, started by `test_srpo_distributed.py`; writes the trained weights."""

import json
import sys

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_flux_pipeline

from trl_diffusion import SRPOConfig, SRPOTrainer
from trl_diffusion.rewards import RewardModel


class Warmth(RewardModel):
    """Red over blue, more so where the prompt is long."""

    name = "warmth"

    def score(self, images, prompts):
        length = images.new_tensor([len(prompt) / 10 for prompt in prompts])
        return length * (images[:, 0] - images[:, 2]).mean((1, 2))


def main(output: str, settings: dict) -> None:
    # Four square pictures and four wide ones.
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in [40, 80] * 4]
    dataset = Dataset.from_dict(
        {"prompt": [f"picture {'very ' * i}" for i in range(8)], "image": pictures},
        features=Features({"prompt": Value("string"), "image": ImageFeature()}),
    )
    if not settings.pop("images"):
        dataset = dataset.remove_columns("image")
    config = SRPOConfig(
        output_dir=output,
        num_inference_steps=4,
        height=32,
        width=32,
        max_steps=2,
        learning_rate=1e-2,
        num_landings=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        cache_prompt_embeds=False,
        **settings,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
    trainer = SRPOTrainer(tiny_flux_pipeline(seed=0), Warmth(), config, dataset, peft_config=lora)
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, f"{output}/trained.safetensors")
        with open(f"{output}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
