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
Every accelerate configuration of the package, with both trainers, a LoRA and all weights, through the examples and
through the command line, on two processes without a GPU.

```bash
python tests/campaigns/launchers.py
python tests/campaigns/launchers.py --configs zero1 --trainers srpo   # a part
```

Each run takes one optimizer step on the built-in model. What it saves is loaded by diffusers and must differ from the
base model; what it logs must appear once.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from trl_diffusion import shapes


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("multi_gpu", "zero1", "zero2", "zero3", "fsdp2")
TRAINERS = ("chunk_grpo", "srpo")
SMALL = [
    "--model_name_or_path", "shapes", "--reward_funcs", "shapes-clip", "--use_cpu", "true", "--max_steps", "1",
    "--num_inference_steps", "3", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
    "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--save_strategy", "no", "--num_samples_to_log", "2",
    "--disable_tqdm", "true",
]  # fmt: skip
OF_TRAINER = {
    "chunk_grpo": ["--num_generations", "4", "--chunk_sizes", "1", "1"],
    "srpo": ["--num_landings", "1"],
}
PROCESSES = ["--num_processes", "2", "--main_process_port", "0"]


def command(entrance: str, config: str, trainer: str, full: bool, folder: Path) -> list[str]:
    options = [*SMALL, *OF_TRAINER[trainer], "--output_dir", str(folder)]
    if entrance == "example":
        file = ROOT / "trl_diffusion" / "accelerate_configs" / f"{config}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), *PROCESSES]
        whole = ["--full_fine_tuning"] if full else []
        return [sys.executable, *launcher, str(ROOT / "examples" / f"{trainer}_flux.py"), *options, *whole]
    whole = ["--use_peft", "false"] if full else []
    launcher = ["--accelerate_config", config, *PROCESSES]
    return [
        sys.executable,
        "-m",
        "trl_diffusion.cli",
        trainer,
        *launcher,
        *options,
        "--dataset_name",
        "shapes",
        *whole,
    ]


def check(output: str, full: bool, folder: Path, base: dict[str, torch.Tensor]) -> None:
    assert len(re.findall(r"^\{'loss'", output, re.MULTILINE)) == 1, "the log line is not there once"
    assert len(list((folder / "samples" / "step_000001").glob("*.png"))) == 2
    assert (folder / "README.md").is_file()
    if full:
        trained = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
        assert trained.keys() == base.keys()
        assert any(not torch.equal(weight, base[name]) for name, weight in trained.items()), "nothing was trained"
    else:
        pipeline = shapes.load_pipeline()
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        weights = load_file(folder / "adapter_model.safetensors")
        assert any(weight.any() for name, weight in weights.items() if "lora_B" in name), "nothing was trained"


def run(entrance: str, config: str, trainer: str, full: bool, folder: Path, base: dict[str, torch.Tensor]) -> None:
    """
    Train for a step and check what is written.

    Raises:
        `AssertionError`: with what the run has printed.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # tests/sitecustomize.py shards on the CPU
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        command(entrance, config, trainer, full, folder),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, f"exit status {finished.returncode}\n{finished.stdout[-3000:]}"
    check(finished.stdout, full, folder, base)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--entrances", nargs="+", choices=("example", "command"), default=("example", "command"))
    arguments = parser.parse_args()
    base = shapes.load_pipeline().transformer.state_dict()
    failures = count = 0
    for entrance, config, trainer, full in itertools.product(
        arguments.entrances, arguments.configs, arguments.trainers, (False, True)
    ):
        start = time.perf_counter()
        outcome = "passed"
        with tempfile.TemporaryDirectory() as name:
            try:
                run(entrance, config, trainer, full, Path(name), base)
            except (AssertionError, OSError, ValueError) as error:
                failures += 1
                outcome = f"FAILED: {error}"
        count += 1
        what = "all weights" if full else "LoRA"
        print(f"{entrance} {config} {trainer} {what}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{count - failures} of {count} runs passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
