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

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_diffusion.cli.main import main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for command in ("chunk_grpo", "demo", "env", "evaluate", "export", "generate", "merge", "reward-server", "srpo"):
        assert f"\n  {command} " in printed


@pytest.mark.parametrize("arguments", [[], ["ppo"], ["--seed", "1"]])
def test_wrong_command_is_refused_with_the_known_ones(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "chunk_grpo" in capsys.readouterr().err


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"- torch: {torch.__version__}\n" in printed
    assert "- trl_diffusion: " in printed
    assert "- Accelerator: " in printed


def test_env_shows_the_configuration_of_accelerate(tmp_path):
    config = tmp_path / "accelerate" / "default_config.yaml"
    config.parent.mkdir()
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 3\n")
    done = subprocess.run(
        [sys.executable, "-m", "trl_diffusion.cli", "env"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert '"num_processes": 3' in done.stdout


def test_rewards_of_the_current_folder(tmp_path):
    """By the installed script, whose own folder and not the current one is where Python looks first."""
    script = Path(sys.executable).with_name("trl-diffusion")
    assert script.is_file(), "the package is installed with its command"
    (tmp_path / "my_rewards.py").write_text(
        "from my_pixels import red\n\n\nasync def warmth(prompts, images, **columns):\n    return map(red, images)\n"
    )
    (tmp_path / "my_pixels.py").write_text(
        "def red(image):\n    return image.resize((1, 1)).getpixel((0, 0))[0] / 255\n"
    )
    done = subprocess.run(
        [script, "chunk_grpo", "--model_name_or_path", "shapes", "--dataset_name", "shapes", "--reward_funcs",
         "my_rewards.warmth", "--output_dir", "out", "--num_inference_steps", "3", "--chunk_sizes", "2",
         "--num_generations", "2", "--per_device_train_batch_size", "2", "--max_steps", "1", "--save_strategy", "no",
         "--use_cpu", "--lora_r", "4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rewards/warmth/mean" in done.stdout
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ["srpo", "--model_name_or_path", "shapes", "--dataset_name", "shapes", "--reward_funcs"],
        ["chunk_grpo", "--model_name_or_path", "shapes", "--dataset_name", "shapes", "--watch_reward_funcs"],
        ["evaluate", "--model_name_or_path", "shapes", "--adapter", "a", "--prompts", "shapes", "--rewards"],
        ["reward-server", "--port", "0", "--reward"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("form", ["{}.warmth", "ocr:{}.read"])
def test_an_error_in_a_module_of_the_current_folder_is_told(command, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = f"current_{command[0].replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text("raise OSError('weights of mine are missing')\n")
    more = ["--reward_funcs", "shapes-judge"] if "--watch_reward_funcs" in command else []
    with pytest.raises(SystemExit) as exit_:
        main([command[0], *more, *command[1:], form.format(module)])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert f"'{module}' raises OSError when it is imported: weights of mine are missing" in printed


def test_the_module_is_a_command_for_launchers():
    done = subprocess.run(
        [sys.executable, "-m", "trl_diffusion.cli", "demo", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "--num_eval_images" in done.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--max_steps", "0"), ("--num_eval_images", "1"), ("--seed", "x"), ("--steps", "3")]
)
def test_demo_refuses_wrong_options(capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "chunk_grpo", option, value])
    assert exit_.value.code == 2
    assert option in capsys.readouterr().err
