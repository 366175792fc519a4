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
import textwrap

import pytest


# A thread of gloo that has to free a tensor of the last collective waits for the interpreter, which with this interval is
# released by nobody until it ends. The group is held elsewhere as well, as DDP and DeepSpeed hold it.
SCRIPT = """
    import collections, os, socket, sys
    import torch.distributed as dist
    from trl_diffusion.trainer.process_group import destroy_process_group_at_exit

    def script(ending):
        global held
        if ending != "unguarded":
            destroy_process_group_at_exit()
            destroy_process_group_at_exit()
        dist.init_process_group("gloo")
        held = dist.group.WORLD
        sys.setswitchinterval(1000)
        for _ in range(2):
            dist.all_reduce(torch.ones(3))
        if ending == "raise":
            raise LookupError("an error of the script")
        if ending == "exit":
            sys.exit(3)

    import torch
    torch.set_num_threads(1)
    ending, count = sys.argv[1], int(sys.argv[2])
    statuses = collections.Counter()
    for _ in range(count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        children = []
        for rank in range(2):
            os.environ["RANK"] = str(rank)
            child = os.fork()
            if child == 0:
                script(ending)
                sys.exit(0)
            children.append(child)
        for child in children:
            statuses[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    print(dict(statuses))
"""


@pytest.mark.parametrize(("ending", "status"), [("return", 0), ("raise", 1), ("exit", 3)])
def test_processes_end_with_their_own_status(ending, status):
    path = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), ending, "10"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.stdout.strip() == str({status: 20}), finished.stderr[-3000:]
    assert "terminate called" not in finished.stderr
    assert finished.stderr.count("Traceback") == (20 if ending == "raise" else 0)
