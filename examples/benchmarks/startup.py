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
How long the command line takes to show its help and to tell a mistake, beside TRL's help.

```bash
python examples/benchmarks/startup.py
```

Every command is run once in each round, in turn, so that what else the machine does meets all alike; the table has the
medians, of seconds and of seconds of CPU, which hardly depend on what else runs. A first round, which fills the caches of the file system and of Python's byte code, does not count.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


TRL = "trl grpo --help"
_TRAINING = "--model_name_or_path shapes --dataset_name shapes --reward_funcs shapes-judge --output_dir run"
_DRAWING = "--model_name_or_path shapes"
# Command line -> exit status.
COMMANDS = {
    TRL: 0,
    "trl-diffusion chunk_grpo --help": 0,
    "trl-diffusion srpo --help": 0,
    "trl-diffusion evaluate --help": 0,
    "trl-diffusion generate --help": 0,
    f"trl-diffusion chunk_grpo {_TRAINING} --num_generation 8": 2,
    f"trl-diffusion chunk_grpo {_TRAINING} --sde_type ode": 2,
    f"trl-diffusion chunk_grpo {_TRAINING} --num_generations 3": 2,
    f"trl-diffusion srpo {_TRAINING} --num_landings 0": 2,
    f"trl-diffusion evaluate {_DRAWING} --adapter run --prompts shapes --rewards hpsv9": 2,
    f"trl-diffusion generate {_DRAWING} --prompt fox --batch_size 0": 2,
}


def measure(command: str, status: int, folder: str) -> tuple[float, float]:
    """Seconds and seconds of CPU that a command takes; it must end with the status."""
    program, *arguments = command.split()
    # Beside the Python that runs this, as a virtual environment has them.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    start, cpu_start = time.perf_counter(), cpu_seconds()
    done = subprocess.run([shutil.which(program, path=path), *arguments], cwd=folder, capture_output=True, text=True)
    taken = time.perf_counter() - start, cpu_seconds() - cpu_start
    if done.returncode != status:
        raise RuntimeError(f"{command} ended with {done.returncode} instead of {status}:\n{done.stderr}")
    return taken


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (%(default)s)")
    rounds = parser.parse_args().rounds
    taken = {command: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds + 1):
            for command, status in COMMANDS.items():
                measured = measure(command, status, folder)
                if index > 0:
                    taken[command].append(measured)
    medians = {
        command: [statistics.median(kind) for kind in zip(*rows, strict=True)] for command, rows in taken.items()
    }
    print("| command | seconds | of TRL's | of CPU | of TRL's |\n|---|---|---|---|---|")
    for command, (wall, cpu) in medians.items():
        shown = command.replace(_TRAINING, "...").replace(_DRAWING, "...")
        wall_share, cpu_share = (ours / trl for ours, trl in zip((wall, cpu), medians[TRL], strict=True))
        print(f"| `{shown}` | {wall:.2f} | {wall_share:.0%} | {cpu:.2f} | {cpu_share:.0%} |")


if __name__ == "__main__":
    main()
