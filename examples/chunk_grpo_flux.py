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
Chunk-GRPO on FLUX.1-dev with HPSv2.1, at the settings of https://huggingface.co/papers/2510.21583.

```bash
accelerate launch examples/chunk_grpo_flux.py --output_dir flux-chunk-grpo
accelerate launch examples/chunk_grpo_flux.py --reward_funcs hpsv3 image_reward --reward_weights 1.0 0.5
python examples/chunk_grpo_flux.py --model_name_or_path shapes --reward_funcs shapes-clip   # a small FLUX, on a CPU
```
"""

import argparse
from collections.abc import Sequence

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import TrlParser

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes


PROMPTS = "Gustavosta/Stable-Diffusion-Prompts"
NUM_PROMPTS = 4096  # as many as the run can see; each costs a few megabytes of embeddings on disk

# What the paper sets; the learning rate is that of a LoRA.
FLUX = {
    **ChunkGRPOConfig.PRESETS["chunk_grpo"],
    "output_dir": "flux-chunk-grpo",
    "learning_rate": 3e-4,
    "save_steps": 50,
}
# The same in small.
SHAPES = {
    "output_dir": "shapes-chunk-grpo",
    "num_inference_steps": 10,
    "chunk_sizes": [1, 2, 2, 4],
    "per_device_train_batch_size": 48,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 100,
}


def load_prompts(name: str | None, split: str) -> Dataset:
    """The prompts of the command line, in a column "prompt"."""
    if name == "shapes":
        return shapes.load_dataset(split)
    if name is not None:
        return load_dataset(name, split=split)
    prompts = load_dataset(PROMPTS, split="train").rename_column("Prompt", "prompt")
    return prompts.shuffle(seed=0).select(range(NUM_PROMPTS))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every field of ChunkGRPOConfig is an option as well; --config FILE.yaml reads them from a file.",
    )  # fmt: skip
    parser.add_argument("--model_name_or_path", default="black-forest-labs/FLUX.1-dev", help="pipeline to train")
    parser.add_argument(
        "--dataset_name", help="prompts, with a split 'train'; 'shapes' or the default where not given"
    )
    parser.add_argument(
        "--reward_funcs", nargs="+", default=["hpsv2"], help="rewards to train (names or dotted paths of callables)"
    )
    parser.add_argument("--lora_r", type=int, help="rank of the LoRA; the trainer's default where not given")
    parser.add_argument("--full_fine_tuning", action="store_true", help="train all weights of the transformer")
    script, rest = parser.parse_known_args(arguments)

    embedded = script.model_name_or_path == "shapes"
    settings = TrlParser(ChunkGRPOConfig, allow_abbrev=False)
    settings.set_defaults(**(SHAPES if embedded else FLUX))
    (args,) = settings.parse_args_and_config(rest)

    peft_config = None
    if script.full_fine_tuning:
        peft_config = False
    elif script.lora_r is not None:
        peft_config = LoraConfig(r=script.lora_r, lora_alpha=script.lora_r)
    trainer = ChunkGRPOTrainer(
        model=script.model_name_or_path,
        reward_funcs=script.reward_funcs,
        args=args,
        train_dataset=load_prompts(
            "shapes" if embedded and script.dataset_name is None else script.dataset_name, "train"
        ),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
