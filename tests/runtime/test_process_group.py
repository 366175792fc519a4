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

"""The process group is taken down when the interpreter exits, and the script's status stays."""

import os
import subprocess
import sys

import pytest


# A thread of gloo that has to free a tensor of the last collective waits for the interpreter, which with this interval is
# released by nobody until it ends. The group is held elsewhere as well, as DDP and DeepSpeed hold it.
SCRIPT = """
import sys

import torch
import torch.distributed as dist

from trl_diffusion import ChunkGRPOConfig

folder, ending = sys.argv[1:]
args = ChunkGRPOConfig(output_dir=folder, use_cpu=True)
assert args.world_size == dist.get_world_size() == 2
held = dist.group.WORLD
sys.setswitchinterval(1000)
for _ in range(2):
    dist.all_reduce(torch.ones(3))
if ending == "raise":
    raise LookupError("an error of the script")
if ending == "destroy":
    dist.destroy_process_group()
if ending == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("ending", "status"), [("return", None), ("destroy", None), ("exit", 3), ("raise", 1)])
def test_processes_end_with_their_own_status(tmp_path, ending, status):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*command, str(script), str(tmp_path), ending],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "terminate called" not in ended.stderr, ended.stderr
    assert ended.returncode == (0 if status is None else 1), ended.stderr
    assert ("LookupError: an error of the script" in ended.stderr) is (ending == "raise")
    if status is not None:
        assert f"exitcode  : {status} " in ended.stderr
