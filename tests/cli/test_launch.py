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
import re
import subprocess
import sys

import pytest
import yaml
from campaigns import launchers
from safetensors.torch import load_file

from trl_diffusion import shapes
from trl_diffusion.cli.chunk_grpo import main
from trl_diffusion.cli.launch import config_path


# Each test starts several runs of several processes.
pytestmark = pytest.mark.timeout(900)

NAMES = ["fsdp2", "multi_gpu", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("name", NAMES)
def test_named_configurations_leave_the_precision_to_the_trainer(name):
    config = yaml.safe_load(config_path(name).read_text())
    assert config["mixed_precision"] == "no"
    if name.startswith("zero"):
        assert config["deepspeed_config"]["zero_stage"] == int(name[-1])


def test_a_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\n")
    assert config_path(str(path)) == path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerate_config", "zero4"], "'zero3'"),
        (["--accelerate_config", "multi_gpu", "--num_proceses", "2"], "--num_proceses"),
    ],
)
def test_wrong_launch_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--model_name_or_path", "shapes"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_two_processes_from_the_command_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: shapes\ndataset_name: shapes\nreward_funcs: [shapes-judge]\nuse_cpu: true\n"
        "num_inference_steps: 3\nchunk_sizes: [1, 1]\nnum_generations: 4\nper_device_train_batch_size: 2\n"
        "gradient_accumulation_steps: 1\ndisable_tqdm: true\nsave_strategy: 'no'\nlora_r: 2\n"
    )
    command = [sys.executable, "-m", "trl_diffusion.cli", "chunk_grpo", "--accelerate_config", "multi_gpu"]
    command += ["--num_processes", "2", "--max_steps", "1", "--main_process_port", "0", "--config", str(config)]
    finished = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    # One group of four images, two a process, and one line of logs.
    assert len(re.findall(r"^\{'loss'", finished.stdout, re.MULTILINE)) == 1
    assert len(list((tmp_path / "out" / "samples" / "step_000001").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("entrance", "config", "trainer", "full"),
    [("example", "fsdp2", "chunk_grpo", False), ("command", "zero2", "srpo", True)],
)
def test_sharded_runs(tmp_path, entrance, config, trainer, full):
    """The campaign of `make campaigns` in short."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    launchers.run(entrance, config, trainer, full, tmp_path, shapes.load_pipeline().transformer.state_dict())


def test_fsdp_on_cpu_processes_is_refused(tmp_path):
    """Where accelerate would train with DDP, without a word."""
    command = launchers.command("command", "fsdp2", "srpo", False, tmp_path)
    # Not the tests' folder, whose sitecustomize.py lets them shard on the CPU.
    environment = {**os.environ, "PYTHONPATH": str(launchers.ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode != 0
    assert "FSDP2 is asked for on processes without accelerators" in finished.stderr
    assert "Traceback" not in finished.stderr
