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

"""The users' scripts, as users start them, on the built-in model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("script", "options", "method"),
    [
        ("srpo_flux.py", [], "SRPOTrainer"),
        ("chunk_grpo_flux.py", ["--num_generations", "4"], "ChunkGRPOTrainer"),
    ],
)
def test_accelerate_launch(tmp_path, script, options, method):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLES / script),
        "--model_name_or_path", "shapes", "--reward_funcs", "shapes-clip", "--output_dir", str(tmp_path),
        "--max_steps", "2", "--per_device_train_batch_size", "8", "--lora_r", "4", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert method in (tmp_path / "README.md").read_text()
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("script", ["srpo_flux.py", "chunk_grpo_flux.py"])
def test_unknown_option_is_refused(script):
    command = [sys.executable, str(EXAMPLES / script), "--model_name_or_path", "shapes", "--max_step", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "--max_step" in done.stderr
