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
import socket
import subprocess
import sys
import textwrap


# A thread of gloo that has to free a tensor of the last collective waits for the interpreter, which with this interval is
# released by nobody until it ends. The group is held elsewhere as well, as DDP and DeepSpeed hold it.
SCRIPT = """
    import sys
    import torch
    import torch.distributed as dist
    from trl_diffusion.trainer.process_group import destroy_process_group_at_exit

    destroy_process_group_at_exit()
    destroy_process_group_at_exit()
    dist.init_process_group("gloo")
    held = dist.group.WORLD
    sys.setswitchinterval(1000)
    for _ in range(2):
        dist.all_reduce(torch.ones(3))
    if dist.get_rank() == 0:
        raise LookupError("an error of the script")
    sys.exit(3)
"""


def test_processes_end_with_their_own_status():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(path for path in sys.path if path)
    common = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT)],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 3], errors
    assert [error.count("Traceback") for error in errors] == [1, 0]
    assert "LookupError: an error of the script" in errors[0]
