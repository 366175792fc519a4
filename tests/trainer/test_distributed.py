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


# Each test starts several runs of several processes.
pytestmark = pytest.mark.timeout(900)

SCRIPT = Path(__file__).parent / "distributed_run.py"


def run(folder, processes, **settings):
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    finished = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), json.dumps(settings)], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "terminate called" not in finished.stderr
    return load_file(folder / "trained.safetensors"), json.loads((folder / "log.json").read_text())


TWO_STEPS_A_GENERATION = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}


@pytest.mark.parametrize(
    ("settings", "resumed"),
    [
        # Groups of four images span both processes.
        ({"gradient_accumulation_steps": 4}, []),
        # A layout and chunks that depend on every process's rollout.
        (
            {
                **TWO_STEPS_A_GENERATION,
                "chunk_sizes": "temporal",
                "num_chunks": 2,
                "chunk_sampling": "temporal",
                "beta": 0.1,
            },
            ["two/checkpoint-1", "two/checkpoint-2", "one/checkpoint-1"],
        ),
        # What a generation draws depends on its number alone, and images of a group are on both processes.
        (
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
            ["two/checkpoint-1"],
        ),
        # Micro-batches of two prompts, whose images to edit go through the network together or one after the other.
        ({"edits": True, "size": 4, "num_generations": 2, "gradient_accumulation_steps": 1}, []),
    ],
    ids=["on-policy", "off-policy", "window", "editing"],
)
def test_ddp_equals_one_process(tmp_path, settings, resumed):
    size = settings.get("size", 2)
    settings = {name: value for name, value in settings.items() if name != "size"}
    settings |= {"per_device_train_batch_size": size, "save_strategy": "steps", "save_steps": 1}
    one, log_one = run(tmp_path / "one", 1, **{**settings, "per_device_train_batch_size": 2 * size})
    two, log_two = run(tmp_path / "two", 2, **settings)
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-5, name
    for a, b in zip(log_one[:-1], log_two[:-1], strict=True):
        for name in (
            "reward", "reward_std", "duplicate_images", "grad_norm", "adapter_norm", "ratio/mean", "log_ratio/abs_max",
            "kl",
        ):  # fmt: skip
            # Rewards are logged by the optimizer step that begins a generation.
            assert (name in a) == (name in b)
            # A log-ratio is a difference of numbers near 1 in float32.
            rounding = 2.5e-7 if name == "log_ratio/abs_max" else 1e-12
            assert name not in a or a[name] == pytest.approx(b[name], rel=1e-3, abs=rounding), name
    # Each goes on where the other one stopped, also within a generation, whose images they cut otherwise.
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4, "steps_per_generation": 8}
    for checkpoint in resumed:
        processes, changed = (1, cut) if checkpoint.startswith("two") else (2, {})
        folder = tmp_path / f"after-{checkpoint.replace('/', '-')}"
        found, _ = run(folder, processes, **{**settings, **changed}, resume_from=str(tmp_path / checkpoint))
        assert max((weight - found[name]).abs().max() for name, weight in one.items()) < 1e-5, checkpoint
    if resumed:
        # The bound means something: the steps that were taken after the resume moved the weights by much more.
        before = load_file(tmp_path / "two" / "checkpoint-2" / "adapter_model.safetensors")
        after = load_file(tmp_path / "two" / "checkpoint-3" / "adapter_model.safetensors")
        assert max((weight - after[name]).abs().max() for name, weight in before.items()) > 1e-3
    # What a process writes appears once.
    assert len(list((tmp_path / "two" / "samples" / "step_000001").glob("*.png"))) > 0
