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

"""Two processes under ZeRO-2, ZeRO-3 and FSDP2 give the update of one process with the same global batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file

import trl_diffusion
from trl_diffusion.trainer.sharding import BUCKET_SIZES, set_bucket_sizes


pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

SCRIPT = Path(__file__).parent / "sharded_run.py"
CONFIGS = Path(trl_diffusion.__file__).parent / "accelerate_configs"
RUNS = ["chunk_grpo", "srpo", "chunk_grpo_full", "srpo_full"]
# ZeRO-2 has the whole network everywhere, as DDP has: one trainer each way suffices.
OF_CONFIG = {
    "zero2": ["chunk_grpo", "srpo_full", "chunk_grpo_full+bf16"],
    "zero3": [*RUNS, "chunk_grpo+resumed", "chunk_grpo+offload"],
    "fsdp2": [*RUNS, "chunk_grpo+resumed", "srpo_full+resumed", "chunk_grpo_full+bf16"],
}
GLOBAL_BATCH = 4


def launch(folder, config, runs):
    """Make the runs on one process, or on two with a configuration of the package; returns what was printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        # On a machine with accelerators these runs stay on the CPU as well.
        "DS_ACCELERATOR": "cpu",
    }
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
    finished = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(GLOBAL_BATCH), ",".join(runs)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return finished.stdout + finished.stderr


def weights(folder, run):
    if "_full" in run:
        return load_file(folder / run / "transformer" / "diffusion_pytorch_model.safetensors")
    return load_file(folder / run / "adapter_model.safetensors")


def result(folder, run):
    return json.loads((folder / run / "result.json").read_text())


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(folder, None, RUNS)
    return folder


@pytest.mark.parametrize("config", list(OF_CONFIG))
def test_two_processes_equal_one(tmp_path, one_process, config):
    one = one_process
    runs = OF_CONFIG[config]
    output = launch(tmp_path, config, runs)
    for run in set(RUNS) & set(runs):
        truth, found = result(one, run), result(tmp_path, run)
        assert found["distributed_type"] == ("FSDP" if config == "fsdp2" else "DEEPSPEED")
        assert found["num_processes"] == 2
        assert largest_difference(weights(one, run), weights(tmp_path, run)) < 1e-4, run
        # The bounds mean something: the run changed the images by much more.
        assert found["change"] > 1e-3, run
        np.testing.assert_allclose(found["images"], truth["images"], atol=1e-5)
        for a, b in zip(truth["log"], found["log"], strict=True):
            for name in ("loss", "grad_norm", "reward", "eval_reward", "ratio/mean", "kl", "denoise/loss"):
                assert (name in a) == (name in b)
                assert name not in a or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (run, name)
    for run in runs:
        base, _, variant = run.partition("+")
        if variant == "resumed":  # to the same bits
            assert largest_difference(weights(tmp_path, base), weights(tmp_path, run)) == 0
        elif variant == "bf16":  # near, and not the same
            found, truth = (
                result(folder, name)["log"][0]["grad_norm"] for folder, name in ((tmp_path, run), (one, base))
            )
            assert found != truth and found == pytest.approx(truth, rel=0.03)
        elif variant == "offload":
            assert largest_difference(weights(tmp_path, base), weights(tmp_path, run)) < 1e-6
    # What all processes do is shown once: two steps a run, or one where it was resumed from the first.
    steps = sum(1 if run.endswith("+resumed") else 2 for run in runs)
    for pattern, count in {
        r"^\{'loss'": steps,
        r"^\{'train_runtime'": len(runs),
        r"^\{'eval_": len(runs),
        r"Encoding prompts: +0%": len(runs),
        r"watch_reward_funcs are scored when": sum(run.startswith("srpo") for run in runs),
    }.items():
        assert len(re.findall(pattern, output, re.MULTILINE)) == count, pattern
    # So is what is saved.
    for run in set(RUNS) & set(runs):
        records = (tmp_path / run / "samples" / "step_000001" / "metadata.jsonl").read_text().splitlines()
        assert len(records) == 2  # num_samples_to_log
        state = json.loads((tmp_path / run / "checkpoint-2" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"]] == [1, 2]


def test_bucket_sizes_are_integers():
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "allgather_bucket_size": 1000,
            }
        }
    )
    set_bucket_sizes(plugin)
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["allgather_bucket_size"] == 1000
    assert zero["reduce_bucket_size"] == BUCKET_SIZES["reduce_bucket_size"]
    assert zero["stage3_prefetch_bucket_size"] == BUCKET_SIZES["stage3_prefetch_bucket_size"]
