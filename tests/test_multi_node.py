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

"""The files for several machines, on one: launchers that take each other for another machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


ROOT = Path(__file__).parents[1]
FILES = ROOT / "docs" / "multi_node"
OPTIONS = [
    "--model_name_or_path", "shapes", "--reward_funcs", "shapes-clip", "--use_cpu", "true", "--max_steps", "2",
    "--num_inference_steps", "3", "--chunk_sizes", "1", "1", "--num_generations", "2", "--disable_tqdm", "true",
    "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--save_steps", "1",
]  # fmt: skip


@pytest.fixture
def environment():
    # Commands of the environment that runs the tests, wherever the package is imported from.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command, environment):
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_machines(tmp_path, environment):
    """A group of two images, one a machine, and one output folder."""
    machines = [
        start(
            [sys.executable, "-m", "trl_diffusion.cli", "chunk_grpo", "--accelerate_config", "multi_gpu",
             "--num_machines", "2", "--num_processes", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1",
             "--main_process_port", str(port), "--dataset_name", "shapes", "--output_dir", str(tmp_path), *OPTIONS],
            environment,
        )
        for port in [free_port()]
        for rank in "01"
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=250)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert [len(re.findall(r"^\{'loss'", output, re.MULTILINE)) for output in outputs] == [2, 2]  # a log a machine
    assert (tmp_path / "checkpoint-2" / "rng_state_1.pth").is_file()
    assert r"| num\_processes | 2 |" in (tmp_path / "README.md").read_text()


def test_configuration():
    config = load_config_from_file(str(FILES / "zero2.yaml"))
    assert (config.num_machines, config.num_processes) == (4, 32)
    one = load_config_from_file(str(ROOT / "trl_diffusion" / "accelerate_configs" / "zero2.yaml"))
    differing = {name for name, value in vars(config).items() if value != vars(one)[name]}
    assert differing == {"num_machines", "num_processes", "main_process_port"}


STAND_INS = {
    # A task for each machine, with its number; its status is that of the last that failed.
    "srun": """#!/bin/bash
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
status=0; for task in "${tasks[@]}"; do wait "$task" || status=$?; done; exit $status
""",
    "scontrol": """#!/bin/bash
[ "$1 $2 $3" = "show hostnames here[0-1]" ] && printf '127.0.0.1\\nelsewhere\\n'
""",
}


def test_slurm(tmp_path, environment):
    """The script starts a task a machine, and goes on from a checkpoint when it is submitted again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in STAND_INS.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    environment |= {
        "PATH": os.pathsep.join([str(commands), environment["PATH"]]),
        "SLURM_JOB_NODELIST": "here[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "1", "CONFIG": "multi_gpu",
    }  # fmt: skip
    command = [
        "bash",
        str(FILES / "train.slurm"),
        "--dataset_name",
        "shapes",
        "--output_dir",
        str(tmp_path / "out"),
        *OPTIONS,
    ]
    written = []
    for steps in ("2", "3"):
        job = start([*command, "--max_steps", steps], {**environment, "MAIN_PORT": str(free_port())})
        output, _ = job.communicate(timeout=250)
        assert job.returncode == 0, output[-3000:]
        written.append((tmp_path / "out" / "checkpoint-1").stat().st_mtime_ns)
    assert (tmp_path / "out" / "checkpoint-3" / "rng_state_1.pth").is_file()
    assert written[0] == written[1]  # the second job has not taken the first step again
