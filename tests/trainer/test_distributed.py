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

"""Two processes give the update of one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


# The first test starts all runs.
pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).parent / "distributed_run.py"
# Images of a process; one process alone has twice as many.
SIZE = 2
SAVED = {"save_strategy": "steps", "save_steps": 1}
TWO_STEPS_A_GENERATION = {**SAVED, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
RUNS = {
    # Groups of four images span both processes.
    "on-policy": ("chunk_grpo", {"gradient_accumulation_steps": 4}),
    # A layout and chunks that depend on every process's rollout.
    "off-policy": (
        "chunk_grpo",
        {
            **TWO_STEPS_A_GENERATION,
            "chunk_sizes": "temporal",
            "num_chunks": 2,
            "chunk_sampling": "temporal",
            "beta": 0.1,
        },
    ),
    # What a generation draws depends on its number alone, and images of a group are on both processes.
    "window": (
        "chunk_grpo",
        {
            **TWO_STEPS_A_GENERATION,
            "chunk_sizes": None,
            "train_window": 2,
            "window_schedule": "random",
            "window_chunk": 2,
            "stochastic_steps": "trained",
            "trust_region": "guard",
            "epsilon": 1e-3,
            "overlap_rewards": True,
            "rollout_merged_lora": True,
        },
    ),
    # Micro-batches of several prompts, whose images to edit go through the network together or one after the other.
    "editing": ("edits", {"num_generations": 2, "gradient_accumulation_steps": 2, "rollout_batch_size": 4}),
    "srpo": ("srpo", {}),
    "srpo-images": ("srpo_images", {}),
}
# Each goes on where the other one stopped, also within a generation, whose images they cut otherwise.
RESUMED = {
    "off-policy": ["two/checkpoint-1", "two/checkpoint-2", "one/checkpoint-1"],
    "window": ["two/checkpoint-1"],
}
CUT = {"gradient_accumulation_steps": 4, "steps_per_generation": 8}
LOGGED = (
    "reward", "reward_std", "duplicate_images", "grad_norm", "adapter_norm", "ratio/mean", "log_ratio/abs_max", "kl",
    "denoise/warmth/difference", "inversion/loss", "denoise/recovery_error",
)  # fmt: skip


def launch(processes, runs):
    """Make runs on so many processes, which are started once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    for folder, _, _ in runs:
        Path(folder).mkdir(parents=True)
    finished = subprocess.run(
        [*launcher, str(SCRIPT), json.dumps(runs)], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "terminate called" not in finished.stderr


def resumed_folder(folder, name, checkpoint):
    return folder / name / f"after-{checkpoint.replace('/', '-')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs: of one process, then of two, some of which go on from those, then of one again, from those of two."""
    folder = tmp_path_factory.mktemp("runs")

    def resumed(processes, size, changed):
        started_by = "two/" if processes == 1 else "one/"
        return [
            (
                str(resumed_folder(folder, name, checkpoint)),
                RUNS[name][0],
                {
                    **RUNS[name][1],
                    **changed,
                    "per_device_train_batch_size": size,
                    "resume_from": str(folder / name / checkpoint),
                },
            )
            for name, checkpoints in RESUMED.items()
            for checkpoint in checkpoints
            if checkpoint.startswith(started_by)
        ]

    def all_runs(word, size):
        return [
            (str(folder / name / word), kind, {**settings, "per_device_train_batch_size": size})
            for name, (kind, settings) in RUNS.items()
        ]

    launch(1, all_runs("one", 2 * SIZE))
    launch(2, all_runs("two", SIZE) + resumed(2, SIZE, {}))
    launch(1, resumed(1, SIZE, CUT))
    return folder


def result(folder):
    return load_file(folder / "trained.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("name", list(RUNS))
def test_ddp_equals_one_process(folder, name):
    one, log_one = result(folder / name / "one")
    two, log_two = result(folder / name / "two")
    for key, weight in one.items():
        assert (weight - two[key]).abs().max() < 1e-5, key
    compared = set()
    for a, b in zip(log_one[:-1], log_two[:-1], strict=True):
        for key in LOGGED:
            # Rewards are logged by the optimizer step that begins a generation.
            assert (key in a) == (key in b)
            # A log-ratio is a difference of numbers near 1 in float32.
            rounding = 2.5e-7 if key == "log_ratio/abs_max" else 1e-12
            assert key not in a or a[key] == pytest.approx(b[key], rel=1e-3, abs=rounding), key
            compared |= {key} & a.keys()
    assert {"grad_norm", "inversion/loss" if name.startswith("srpo") else "ratio/mean"} <= compared
    # What a process writes appears once. Offline images are no samples.
    assert name == "srpo-images" or len(list((folder / name / "two" / "samples" / "step_000001").glob("*.png"))) > 0


@pytest.mark.parametrize("name", list(RESUMED))
def test_each_goes_on_where_the_other_stopped(folder, name):
    one, _ = result(folder / name / "one")
    for checkpoint in RESUMED[name]:
        found, _ = result(resumed_folder(folder, name, checkpoint))
        assert max((weight - found[key]).abs().max() for key, weight in one.items()) < 1e-5, checkpoint
    # The bound means something: the steps that were taken after the resume moved the weights by much more.
    before, after = (
        load_file(folder / name / "two" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 3)
    )
    assert max((weight - after[key]).abs().max() for key, weight in before.items()) > 1e-3
