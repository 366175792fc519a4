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

"""Two processes give the update of one process with the same global batch, under every configuration of the package."""

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
from trl_diffusion.runtime.sharding import BUCKET_SIZES, set_bucket_sizes

from .sharded_run import make_trainer


pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

# Each test starts several runs of several processes.
pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).parent / "sharded_run.py"
CONFIGS = Path(trl_diffusion.__file__).parent / "accelerate_configs"
RUNS = ["chunk_grpo", "srpo", "chunk_grpo_full", "srpo_full"]
AVERAGED = ["chunk_grpo+ema", "srpo_full+ema"]
# ZeRO-1 is ZeRO-2 but for the gradients: one run of each kind suffices.
OF_CONFIG = {
    "multi_gpu": [*RUNS, "chunk_grpo+once", "srpo+slower", "srpo+ema+best"],
    "zero1": ["srpo", "chunk_grpo_full+ema"],
    "zero2": [
        *RUNS,
        "srpo+slower",
        "srpo_full+ema",
        "srpo_full+ema+resumed",
        "srpo_full+ema+best",
        "chunk_grpo_full+ema+bf16",
        "srpo+trapped",
    ],
    "zero3": [
        *RUNS,
        *AVERAGED,
        "chunk_grpo+resumed",
        "srpo_full+ema+resumed",
        "srpo+slower",
        "srpo+ema+best",
        "chunk_grpo+once",
        "chunk_grpo+ema+offload",
    ],
    "fsdp2": [
        *RUNS,
        *AVERAGED,
        "chunk_grpo+resumed",
        "srpo_full+ema+resumed",
        "srpo+slower",
        "srpo+ema+best",
        "chunk_grpo+once",
        "chunk_grpo_full+ema+bf16",
        "chunk_grpo+ema+kept",
    ],
}
KINDS = {"multi_gpu": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
GLOBAL_BATCH = 4


def launch(folder, config, runs, processes=2):
    """Make the runs on one process, or on several with a configuration of the package; returns what was printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # On a machine with accelerators these runs stay on the CPU as well.
        "DS_ACCELERATOR": "cpu",
    }
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    finished = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(GLOBAL_BATCH), ",".join(runs)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "terminate called" not in finished.stderr
    # Compiling DeepSpeed's reduction for the CPU would take a minute (tests/sitecustomize.py).
    assert "deepspeed_shm_comm" not in finished.stdout + finished.stderr
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
    launch(folder, None, [*RUNS, *AVERAGED, "chunk_grpo_full+ema", "chunk_grpo+once", "srpo+slower"])
    return folder


@pytest.mark.parametrize("config", list(OF_CONFIG))
def test_two_processes_equal_one(tmp_path, one_process, config):
    one = one_process
    runs = OF_CONFIG[config]
    output = launch(tmp_path, config, runs)
    if "srpo+trapped" in runs:
        assert (tmp_path / "srpo+trapped" / "checkpoint-1").is_dir() and not (
            tmp_path / "srpo+trapped" / "trap"
        ).exists()
    runs = [run for run in runs if not run.endswith("+trapped")]  # which takes no step
    for run in runs:
        found = result(tmp_path, run)
        assert found["distributed_type"] == KINDS[config] and found["num_processes"] == 2
        assert found["agree"], f"{run}: the processes make different images"
        variant = run.rpartition("+")[2]
        base = run.removesuffix(f"+{variant}")
        if variant == "resumed":  # to the same bits
            assert largest_difference(weights(tmp_path, base), weights(tmp_path, run)) == 0
            continue
        if variant == "best":  # what was evaluated, which is the average
            state = json.loads((tmp_path / run / "checkpoint-2" / "trainer_state.json").read_text())
            best = Path(state["best_model_checkpoint"]).name
            assert best == "checkpoint-1"
            assert largest_difference(weights(tmp_path, run), weights(tmp_path, f"{run}/{best}")) == 0
            assert largest_difference(weights(tmp_path, run), weights(tmp_path, f"{run}/checkpoint-2")) > 0
            continue
        if variant == "bf16":  # near, and not the same
            a, b = (result(folder, name)["log"][0]["grad_norm"] for folder, name in ((tmp_path, run), (one, base)))
            assert a != b and a == pytest.approx(b, rel=0.03)
            continue
        if variant in ("offload", "kept"):
            run, found_weights = base, weights(tmp_path, run)
        else:
            found_weights = weights(tmp_path, run)
        truth = result(one, run)
        difference = largest_difference(weights(one, run), found_weights)
        assert difference < (1e-5 if config == "multi_gpu" else 1e-4), run
        # The bounds mean something: the run changed the images by much more, and an average is not the weights.
        if variant == "slower":
            assert largest_difference(weights(one, run), weights(one, "srpo")) > 1e-3
        else:
            assert found["change"] > 1e-3, run
        if run in AVERAGED:
            assert largest_difference(weights(one, run), weights(one, run.removesuffix("+ema"))) > 1e-4
        np.testing.assert_allclose(found["images"], truth["images"], atol=1e-5)
        np.testing.assert_allclose(found["trained"], truth["trained"], atol=1e-5)
        for a, b in zip(truth["log"], found["log"], strict=True):
            for name in (
                "loss", "grad_norm", "adapter_norm", "reward", "eval_reward", "ratio/mean", "kl", "denoise/loss",
            ):  # fmt: skip
                assert (name in a) == (name in b)
                assert name not in a or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), (run, name)
    # What all processes do is shown once: two steps a run, or one where it was resumed from the first.
    steps = sum(1 if run.endswith(("+resumed", "+slower")) else 2 for run in runs)
    for pattern, count in {
        r"^\{'loss'": steps,
        r"^\{'train_runtime'": len(runs),
        r"^\{'eval_": len(runs) + 2 * sum(run.endswith("+best") for run in runs),
        r"Encoding prompts: +0%": len(OF_CONFIG[config]),
        r"watch_reward_funcs are scored when": sum(
            run.startswith("srpo") and not run.endswith("+best") for run in OF_CONFIG[config]
        ),
    }.items():
        assert len(re.findall(pattern, output, re.MULTILINE)) == count, pattern
    if config == "zero2":
        with pytest.raises(ValueError, match="sharding was 'ZeRO-2' and is None.*processes was 2"):
            make_trainer("srpo", tmp_path / "whole", GLOBAL_BATCH).train(str(tmp_path / "srpo" / "checkpoint-1"))
    if config == "fsdp2":
        # Another number of processes goes on within a generation.
        launch(tmp_path, config, ["chunk_grpo+resumed"], processes=1)
        assert result(tmp_path, "chunk_grpo+resumed")["num_processes"] == 1
        assert largest_difference(weights(tmp_path, "chunk_grpo"), weights(tmp_path, "chunk_grpo+resumed")) < 1e-4
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
