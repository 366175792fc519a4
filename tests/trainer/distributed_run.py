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
Short runs of both trainers on a tiny model, started by `test_distributed.py` on one process or several.

```bash
torchrun --nproc_per_node=2 distributed_run.py '[["FOLDER", "chunk_grpo", {"max_steps": 1}]]'
```

The argument lists runs that are made one after the other, each with its folder, its trainer and settings beyond these
here. A run writes its trained weights and its log.
"""

import gc
import json
import sys

import numpy as np
from campaigns.tiny_runs import Warmth
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_flux_kontext_pipeline, tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer


# Each trainer has the garbage collected; what the imports made stays, and looking through it takes a third of the time.
gc.freeze()

COMMON = {
    "height": 32,
    "width": 32,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "cache_prompt_embeds": False,
}
CHUNK_GRPO = {**COMMON, "num_inference_steps": 6, "chunk_sizes": [2, 3], "num_generations": 4, "max_steps": 3}
SRPO = {**COMMON, "num_inference_steps": 4, "num_landings": 2, "max_steps": 2}


def redness(images, prompts, **columns):
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]


def animals() -> Dataset:
    return Dataset.from_list([{"prompt": f"a {name}"} for name in ("cat", "dog", "bird", "fish")])


def edits() -> Dataset:
    """Images to edit of two sizes, one of which not every process sees at a time."""
    sizes = ((16, 16), (16, 16), (16, 16), (40, 20))
    images = [Image.new("RGB", size, (60 * i, 0, 99)) for i, size in enumerate(sizes)]
    return Dataset.from_dict({"prompt": animals()["prompt"][:], "condition_image": images})


def pictures() -> Dataset:
    """Four square pictures and four wide ones."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in [40, 80] * 4]
    return Dataset.from_dict(
        {"prompt": [f"picture {'very ' * i}" for i in range(8)], "image": images},
        features=Features({"prompt": Value("string"), "image": ImageFeature()}),
    )


RUNS = {
    "chunk_grpo": (ChunkGRPOTrainer, ChunkGRPOConfig, CHUNK_GRPO, redness, animals),
    "edits": (ChunkGRPOTrainer, ChunkGRPOConfig, CHUNK_GRPO, redness, edits),
    "srpo": (SRPOTrainer, SRPOConfig, SRPO, Warmth(), lambda: pictures().remove_columns("image")),
    "srpo_images": (SRPOTrainer, SRPOConfig, SRPO, Warmth(), pictures),
}


def run(folder: str, kind: str, settings: dict) -> None:
    trainer_class, config_class, defaults, reward, dataset = RUNS[kind]
    resume_from = settings.pop("resume_from", None)
    trainer = trainer_class(
        tiny_flux_kontext_pipeline(seed=0) if kind == "edits" else tiny_flux_pipeline(seed=0),
        reward,
        config_class(output_dir=folder, **{**defaults, **settings}),
        dataset(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    if trainer.is_world_process_zero():
        weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, f"{folder}/trained.safetensors")
        with open(f"{folder}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)
    # The next run of this file may go on from a checkpoint of this one.
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    for folder, kind, settings in json.loads(sys.argv[1]):
        run(folder, kind, settings)
