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
Starts a plain script on two processes again and again: every process must end with the status that the script gives it.

```bash
PYTHONPATH=tests python tests/campaigns/exits.py --launches 100
```

The launches take the configurations in turn; every fifth script raises after the training, and must end with a failing
status and its own traceback.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
CONFIGS = ("multi_gpu", "zero2", "fsdp2")


def launch(config: str, ending: str) -> str | None:
    """What was wrong about one launch, in words; `None` if nothing was."""
    configs = TESTS.parent / "trl_diffusion" / "accelerate_configs"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(configs / f"{config}.yaml"),
        ]
        command += ["--num_processes", "2", "--main_process_port", "0"]
        command += [str(TESTS / "campaigns" / "plain_script.py"), folder, ending]
        finished = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        saved = (Path(folder) / "adapter_model.safetensors").exists()
    output = finished.stdout
    if "terminate called" in output or "Signal 6" in output:
        return f"a process aborted, status {finished.returncode}\n{output[-3000:]}"
    if not saved or (finished.returncode == 0) != (ending == "return"):
        return f"status {finished.returncode}, adapter saved: {saved}\n{output[-3000:]}"
    if ending == "raise" and ("LookupError: an error of the script" not in output or "exitcode  : 1 " not in output):
        return f"the script's own error is not shown\n{output[-3000:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--at_once", type=int, default=1, help="launches at the same time")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    arguments = parser.parse_args()
    configs = [arguments.configs[i % len(arguments.configs)] for i in range(arguments.launches)]
    endings = ["raise" if i % 5 == 4 else "return" for i in range(arguments.launches)]
    start = time.perf_counter()
    passed, failures = collections.Counter(), 0
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for config, ending, fault in zip(configs, endings, pool.map(launch, configs, endings), strict=True):
            if fault is None:
                passed[f"{config} {ending}"] += 1
            else:
                failures += 1
            print(f"{config} {ending}: {fault or 'passed'}", flush=True)
    by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(passed.items()))
    print(
        f"{passed.total()} of {arguments.launches} launches ended as they should ({by_kind}), "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
