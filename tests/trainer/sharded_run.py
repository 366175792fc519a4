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
Short runs of both trainers, started by `test_sharded.py` on one process or several, sharded or not, as the launcher says.

```bash
accelerate launch --config_file trl_diffusion/accelerate_configs/zero2.yaml --num_processes 2 sharded_run.py FOLDER SIZE RUNS
```

SIZE is the number of images that all processes together train in a micro-batch, RUNS which runs to make, one after the
other: "srpo" trains a LoRA, "srpo_full" all weights, "srpo+ema" keeps a moving average, "srpo+resumed" goes on from the
first checkpoint of "srpo", "srpo+slower" as well with another learning rate, and "srpo+ema+resumed" from that of
"srpo+ema". "srpo+kept" keeps
FSDP2's weights gathered after a forward, in this run and those after it. "chunk_grpo+once" is on-policy: on two processes
a group's common step is trained in one of its micro-batches. "srpo+best" ends with the
checkpoint that was evaluated best. "srpo+trapped" tries to resume when somebody has put
code into a file of that checkpoint.
"""

import gc
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.runtime.checkpoints import MANIFEST_NAME, write_manifest


# Each trainer has the garbage collected; what the imports made stays, and looking through it takes a third of the time.
gc.freeze()

PROMPTS = [f"a {size} {color} circle" for size in ("small", "large") for color in ("red", "green", "blue", "white")]
COMMON = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 5,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "lr_scheduler_type": "constant",
    # Adam's default of 1e-8 is as small as the smallest gradients here: it makes differences in their last bits, which
    # depend on how a batch is cut, as large as the step.
    "adam_epsilon": 1e-6,
    "num_eval_images": 3,
    "num_samples_to_log": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "cache_prompt_embeds": False,
}
# Groups span both processes, chunks are unequal, and one generation is trained in two optimizer steps.
CHUNK_GRPO = {**COMMON, "num_generations": 4, "chunk_sizes": [1, 3], "steps_per_generation": 4, "beta": 0.1}
SRPO = {**COMMON, "num_landings": 1, "sigma_range": [0.3, 0.9]}
# Optimizer and parameters rest on the CPU; the sizes that stay "auto" are for the trainer to set. DeepSpeed's own Adam
# for the CPU would have to be compiled.
OFFLOAD = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
RUNS = {
    "chunk_grpo": (ChunkGRPOTrainer, ChunkGRPOConfig, {**CHUNK_GRPO, "learning_rate": 1e-2}),
    "srpo": (SRPOTrainer, SRPOConfig, {**SRPO, "learning_rate": 1e-2}),
    "chunk_grpo_full": (ChunkGRPOTrainer, ChunkGRPOConfig, {**CHUNK_GRPO, "learning_rate": 1e-3}),
    "srpo_full": (SRPOTrainer, SRPOConfig, {**SRPO, "learning_rate": 1e-3}),
}


def make_trainer(name: str, folder: Path, size: int, **settings):
    trainer_class, config_class, defaults = RUNS[name]
    config = config_class(output_dir=str(folder), **{**defaults, **settings})
    config.per_device_train_batch_size = size // config.world_size
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
    return trainer_class(
        tiny_flux_pipeline(seed=0),
        "shapes-clip",
        config,
        dataset,
        eval_dataset=dataset.select(range(2)),
        peft_config=False if name.endswith("_full") else lora,
        watch_reward_funcs="shapes-clip",
    )


def run(name: str, folder: Path, size: int, resume_from: Path | None = None, **settings) -> None:
    trainer = make_trainer(name, folder, size, **settings)
    before = trainer.generate(PROMPTS[:2], [0, 1])
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    metrics = trainer.evaluate()
    trainer.save_model()
    images = trainer.generate(PROMPTS[:2], [0, 1])
    # Outside of an evaluation the weights are those that are trained.
    trainer.policies.drop("average")
    trained = trainer.generate(PROMPTS[:2], [0, 1])
    of_processes = trainer.accelerator.gather(images.flatten()[None].to(trainer.args.device))
    if trainer.is_world_process_zero():
        result = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "num_processes": trainer.accelerator.num_processes,
            "log": trainer.state.log_history,
            "metrics": metrics,
            "images": images.flatten().tolist(),
            "trained": trained.flatten().tolist(),
            "agree": (of_processes == of_processes[:1]).all().item(),
            "change": (images - before).abs().max().item(),
        }
        (folder / "result.json").write_text(json.dumps(result))


class Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def run_trapped(name: str, folder: Path, size: int, checkpoint: Path) -> None:
    """Resume from a checkpoint whose files with DeepSpeed's states make a folder when they are unpickled."""
    trainer = make_trainer(name, folder, size, save_strategy="no")
    trapped = folder / checkpoint.name
    if trainer.is_world_process_zero():
        shutil.copytree(checkpoint, trapped)
        for path in trapped.rglob("*optim_states.pt"):
            torch.save({"state": Malice(folder / "trap")}, path)
        (trapped / MANIFEST_NAME).unlink()
        write_manifest(trapped)  # an attacker would, too
    trainer.accelerator.wait_for_everyone()
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        trainer.train(resume_from_checkpoint=str(trapped))


def main(folder: Path, size: int, names: list[str]) -> None:
    for name in names:
        base, *variants = name.split("+")
        if "trapped" in variants:
            run_trapped(base, folder / name, size, folder / base / "checkpoint-1")
            continue
        settings, resume_from = {"save_strategy": "steps", "save_steps": 1}, None
        if "ema" in variants:
            settings["ema_decay"] = 0.9
        if "bf16" in variants:
            settings["bf16"] = True
        if "best" in variants:
            settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
            # These steps are so large that the reward falls: it is best after the first.
            settings |= {"metric_for_best_model": "reward", "greater_is_better": True, "num_eval_images": 2}
        if "once" in variants:
            settings |= {"steps_per_generation": 2, "chunk_fraction": 1.0}
        if "kept" in variants:
            os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
        if "offload" in variants:
            # accelerate takes its launcher's configuration or a DeepSpeed file, not both.
            del os.environ["ACCELERATE_CONFIG_DS_FIELDS"]
            settings["deepspeed"] = OFFLOAD
        if "resumed" in variants:
            resume_from = folder / name.removesuffix("+resumed") / "checkpoint-1"
            settings["ds3_gather_for_rollout"] = False
        if "slower" in variants:
            resume_from = folder / base / "checkpoint-1"
            settings |= {"learning_rate": 5e-3, "weight_decay": 0.1, "adam_beta1": 0.5, "adam_epsilon": 1e-5}
        run(base, folder / name, size, resume_from, **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
