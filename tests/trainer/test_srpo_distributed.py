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


SCRIPT = Path(__file__).parent / "srpo_run.py"


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


@pytest.mark.parametrize("images", [False, True], ids=["rollouts", "images"])
def test_ddp_equals_one_process(tmp_path, images):
    one, log_one = run(tmp_path / "one", 1, per_device_train_batch_size=4, images=images)
    two, log_two = run(tmp_path / "two", 2, per_device_train_batch_size=2, images=images)
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-5, name
    for a, b in zip(log_one[:-1], log_two[:-1], strict=True):
        for name in ("grad_norm", "denoise/warmth/difference", "inversion/loss", "denoise/recovery_error"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
