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

"""A short run of a tiny model, started by `test_distributed.py` on one process or several; writes the trained weights."""

import json
import sys

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_flux_kontext_pipeline, tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer


def redness(images, prompts, **columns):
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]


def main(output: str, settings: dict) -> None:
    resume_from = settings.pop("resume_from", None)
    edits = settings.pop("edits", False)
    config = ChunkGRPOConfig(
        output_dir=output,
        **{
            "num_inference_steps": 6,
            "chunk_sizes": [2, 3],
            "num_generations": 4,
            "height": 32,
            "width": 32,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        },
    )
    columns = {"prompt": [f"a {name}" for name in ("cat", "dog", "bird", "fish")]}
    if edits:
        # Of two sizes, one of which not every process sees at a time.
        sizes = ((16, 16), (16, 16), (16, 16), (40, 20))
        columns["condition_image"] = [Image.new("RGB", size, (60 * i, 0, 99)) for i, size in enumerate(sizes)]
    dataset = Dataset.from_dict(columns)
    trainer = ChunkGRPOTrainer(
        tiny_flux_kontext_pipeline(seed=0) if edits else tiny_flux_pipeline(seed=0),
        redness,
        config,
        dataset,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    if trainer.is_world_process_zero():
        weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, f"{output}/trained.safetensors")
        with open(f"{output}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
