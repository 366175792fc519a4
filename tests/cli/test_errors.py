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

"""Mistakes of the user end every command with one line and status 2; other errors keep their traceback."""

import subprocess
import sys

import pytest

from trl_diffusion.cli.errors import OneLineErrors
from trl_diffusion.cli.main import main


MODEL = ["--model_name_or_path", "shapes"]
TRAINING = [
    *MODEL, "--dataset_name", "shapes", "--reward_funcs", "shapes-judge", "--use_cpu", "--num_inference_steps", "3",
    "--chunk_sizes", "1", "1", "--max_prompts", "4", "--num_generations", "4", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "1", "--max_steps", "1", "--lora_r", "2", "--output_dir", "out",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a small red circle on a white background"}\n')
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xe4\n")
    (tmp_path / "models" / "empty").mkdir(parents=True)
    for name, content in (("train.parquet", "PAR1 cut off"), ("train.jsonl", '{"prompt": "a"}\n{"prompt')):
        (tmp_path / f"folder_of_{name}").mkdir()
        (tmp_path / f"folder_of_{name}" / name).write_text(content)
    return tmp_path


def told(capsys, command: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2
    # Progress bars of what was loaded before may stand above.
    line = capsys.readouterr().err.rsplit("\r", 1)[-1].strip().splitlines()[-1]
    name = f"trl-diffusion {command[0]}".removesuffix(" ppo")
    assert line.startswith(f"{name}: error: "), line
    return line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ppo"], "invalid choice: 'ppo'"),
        (["env", "--all"], "unrecognized arguments: --all"),
        (["demo", "ppo"], "invalid choice: 'ppo'"),
        (["demo", "srpo", "--output_dir", "a_file/out"], "'a_file' is a file"),
        (["reward-server", "--reward", "nothing"], "Unknown reward 'nothing'"),
        (["reward-server", "--reward", "shapes-judge", "--port", "x"], "invalid int value: 'x'"),
        (["export", "--adapter", "a"], "required: --output"),
        (["export", "--adapter", "lora.safetensor", "--output", "b.safetensors"], "no file 'lora.safetensor'"),
        (["export", "--adapter", "a", "--output", "models"], "'models', which is a folder"),
        (["merge", *MODEL, "--adapter", "./a", "--output_dir", "a_file"], "'a_file' is a file"),
        (
            ["merge", "--model_name_or_path", "./modles/empty", "--adapter", "a", "--output_dir", "b"],
            "'models/empty'?",
        ),
        (["generate", *MODEL, "--prompt", "a", "--output_dir", "a_file"], "'a_file' is a file"),
        (["generate", *MODEL, "--prompts", "promts.jsonl"], "Did you mean 'prompts.jsonl'?"),
        (["generate", "--model_name_or_path", "models/empt", "--prompt", "a"], "Did you mean 'models/empty'?"),
        (["generate", "--model_name_or_path", "models/empty", "--prompt", "a"], "no file named model_index.json"),
        (["generate", "--model_name_or_path", "a_file", "--prompt", "a"], "'a_file' is a file"),
        (["generate", "--config", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        (["evaluate", "--config", "list.yaml"], "must contain a YAML mapping"),
        (["evaluate", *MODEL, "--adapter", "./a", "--rewards", "shapes-judge", "--prompts", "shapes"], "folder './a'"),
        (["chunk_grpo", "--config", "broken.yaml"], "is not YAML"),
        (["chunk_grpo", "--config", "latin.yaml"], "is not YAML in UTF-8"),
        (["chunk_grpo", "--config", "models"], "models: Is a directory"),
        (["chunk_grpo", "--accelerate_config", "zero2", "--config", "brokn.yaml"], "Did you mean 'broken.yaml'?"),
        (["chunk_grpo", *TRAINING, "--num_generations", "3"], "num_generations (3) must divide"),
        (["chunk_grpo", *TRAINING, "--save_strategy", "never"], "never"),
        (["chunk_grpo", *TRAINING, "--reward_funcs", "hpsv9"], "Unknown reward 'hpsv9'"),
        (["chunk_grpo", *TRAINING, "--dataset_name", "prompts.jsnl"], "Did you mean 'prompts.jsonl'?"),
        (
            ["chunk_grpo", *TRAINING, "--dataset_name", "folder_of_train.parquet"],
            "parquet' cannot be read: ArrowInvalid: ",
        ),
        (
            ["generate", *MODEL, "--prompts", "folder_of_train.jsonl"],
            "Line 2 of 'folder_of_train.jsonl/train.jsonl' is not JSON: ",
        ),
        (["chunk_grpo", *TRAINING, "--dataset_name", "nobody/nothing"], "Couldn't reach 'nobody/nothing' on the Hub"),
        (["chunk_grpo", *TRAINING, "--output_dir", "a_file"], "not writable"),
        (["chunk_grpo", *TRAINING, "--resume_from_checkpoint", "out/checkpoint-7"], "there is no such folder"),
        (["chunk_grpo", *TRAINING, "--lora_target_modules", "nothing.*x"], "nothing.*x not found"),
        (["srpo", *TRAINING[:-2], "--output_dir", "out"], "--chunk_sizes"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_one_line(capsys, command, message):
    assert message in told(capsys, command)


def test_errors_of_a_run_keep_their_traceback(folder, monkeypatch):
    (folder / "faulty_reward.py").write_text("def short(images, prompts, **columns):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError, match="returned 1 scores for 4 images"):
        main(["chunk_grpo", *TRAINING, "--reward_funcs", "faulty_reward.short"])


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("TRL_DIFFUSION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Unknown reward"):
        main(["reward-server", "--reward", "nothing"])


def test_faults_of_the_program_are_no_user_errors():
    with pytest.raises(AttributeError), OneLineErrors(prog="trl-diffusion").user_errors():
        raise AttributeError("a bug")


def test_several_processes_tell_it_once(folder):
    (folder / "run.yaml").write_text("num_generations: 1\n")
    command = [sys.executable, "-m", "trl_diffusion.cli", "chunk_grpo", "--accelerate_config", "multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--config", "run.yaml", *TRAINING]
    command.remove("--num_generations")
    command.remove("4")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("trl-diffusion chunk_grpo: error: num_generations must be at least 2, got 1") == 1
    assert "Traceback (most recent call last)" not in done.stderr
