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

"""
Runs of two processes on disks that are too small for a second checkpoint, by more or less, so that another file is the
first that fails: the run must say so, keep the first checkpoint, and go on or stop as it is told. None may hang.

```bash
PYTHONPATH=tests python tests/campaigns/full_disk.py      # as root, who alone can mount a small file system
```
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trl_diffusion.runtime.checkpoints import checkpoints, last_whole_checkpoint
from trl_diffusion.runtime.reliable_trainer import RESERVE_BYTES


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("multi_gpu", "zero1", "zero2", "zero3", "fsdp2")
# What there is room for beside the first checkpoint: 0 is the reserve alone, 1 another checkpoint.
ROOM = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
KIB = 1024


class CannotMount(RuntimeError):
    """Only root can mount a file system."""


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes, in memory."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size // KIB}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        raise CannotMount(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(config: str, folder: Path, seconds: float | None = None, **settings) -> tuple[int, str]:
    """Two steps on two processes; returns the exit status and what was printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "trl_diffusion" / "accelerate_configs" / f"{config}.yaml")]
    settings = {"max_steps": 2, "save_total_limit": None, **settings}
    command += [str(ROOT / "tests" / "trainer" / "faulty_run.py"), "srpo", str(folder), "{}", json.dumps(settings)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    return finished.returncode, finished.stdout


def bytes_of_a_checkpoint(config: str, folder: Path) -> int:
    """What the first checkpoint takes on a disk that is large enough."""
    with small_disk(folder, 2**26):
        status, output = run(config, folder)
        assert status == 0, output[-3000:]
        blocks = subprocess.run(
            ["du", "-sk", str(folder / "checkpoint-1")], capture_output=True, text=True, check=True
        )
        return int(blocks.stdout.split()[0]) * KIB


def check(config: str, folder: Path, checkpoint: int, room: float, on_save_error: str) -> str:
    """
    Run where there is room for one checkpoint and a share of another.

    Returns:
        `str`: the message.
    """
    reserve = RESERVE_BYTES if config.startswith("zero") else 0
    with small_disk(folder, checkpoint + reserve + int(room * (checkpoint - reserve))):
        status, output = run(config, folder, seconds=120, on_save_error=on_save_error)
        messages = [line for line in output.splitlines() if "The checkpoint checkpoint-2 could not be written" in line]
        assert messages, output[-3000:]
        assert "The last whole checkpoint is checkpoint-1." in messages[0]
        assert checkpoints(folder) == [last_whole_checkpoint(folder)] == [folder / "checkpoint-1"]
        if on_save_error == "continue":
            assert status == 0, output[-3000:]
            assert not list(folder.glob(".checkpoint*"))
        else:
            assert status != 0 and "Free some space and resume" in output
    return messages[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    arguments = parser.parse_args()
    count = 0
    for config in arguments.configs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = bytes_of_a_checkpoint(config, folder)
            for index, room in enumerate(ROOM):
                start = time.perf_counter()
                on_save_error = ("continue", "stop")[index % 2]
                message = check(config, folder, checkpoint, room, on_save_error)
                count += 1
                reason = message.partition("MiB free: ")[2].partition(" The last whole")[0]
                print(
                    f"{config}: room for {room:.2f} of {checkpoint // KIB} KiB, {on_save_error}: {reason} "
                    f"({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    print(f"{count} full disks, none hung")
    return 0


if __name__ == "__main__":
    sys.exit(main())
