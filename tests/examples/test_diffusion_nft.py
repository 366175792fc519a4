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

"""A method of one's own, in short: it runs, resumes to the same bits, and does not depend on the number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "diffusion_nft.py"
# Two optimizer steps a generation, so that the checkpoints of odd steps are within one.
SETTINGS = {
    "max_steps": 4, "save_steps": 1, "logging_steps": 1, "num_generations": 4, "gradient_accumulation_steps": 1,
    "generation_batch_size": 16, "num_eval_images": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "report_to": "none",
    "use_cpu": True,
}  # fmt: skip


def run(folder, processes=1, **settings):
    settings = {**SETTINGS, "output_dir": folder, "per_device_train_batch_size": 8 // processes, **settings}
    launcher = [sys.executable]
    if processes > 1:
        config = ROOT / "trl_diffusion" / "accelerate_configs" / "multi_gpu.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [*launcher, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_reward" in done.stdout and "eval_base/reward" in done.stdout
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_it_resumes_and_runs_on_two_processes(tmp_path):
    whole = run(tmp_path / "one")
    assert all(torch.isfinite(weight).all() for weight in whole.values())
    old = load_file(tmp_path / "one" / "checkpoint-3" / "policies.safetensors")
    assert any(
        (weight != whole[name.removeprefix("old.").replace(".default.", ".")]).any() for name, weight in old.items()
    )
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=tmp_path / "one" / "checkpoint-3")
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())
    start = load_file(tmp_path / "one" / "checkpoint-1" / "adapter_model.safetensors")
    two = run(tmp_path / "two", processes=2)
    difference = max((weight - whole[name]).abs().max().item() for name, weight in two.items())
    change = max((weight - whole[name]).abs().max().item() for name, weight in start.items())
    assert difference < 1e-5 < 1e-3 < change
