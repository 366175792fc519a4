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
Plans every ready configuration whose name says for which accelerator it is: each must fit.

```bash
PYTHONPATH=tests python tests/campaigns/plans.py            # all, about ten minutes
PYTHONPATH=tests python tests/campaigns/plans.py wan sana   # whose names contain one of these
```
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import diffusers
import transformers

from trl_diffusion.cli import plan


CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"


def planned(path: Path) -> dict:
    """What the command says of a file, for the accelerator in its name."""
    memory = path.stem.rpartition("_")[2]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = plan.main([path.parent.name, "--config", str(path), "--memory", memory, "--json", "-"])
    found = json.loads(printed.getvalue())
    assert status == (0 if found["fits"] else plan.DOES_NOT_FIT_STATUS)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    failed = 0
    print("| configuration | peak, GiB | in the phase | fits |\n| --- | --- | --- | --- |")
    for path in sorted(CONFIGS.glob("*/*gb.yaml")):
        if names and not any(name in path.name for name in names):
            continue
        found = planned(path)
        sums = {phase: sum(parts.values()) for phase, parts in found["phases"].items()}
        phase = max(sums, key=sums.get)
        word = "yes" if found["fits"] else "no"
        print(f"| `{path.parent.name}/{path.name}` | {found['peak'] / 2**30:.1f} | {phase} | {word} |", flush=True)
        for remedy in found["remedies"]:
            print(f"  {remedy['settings']}: {remedy['peak'] / 2**30:.1f}", file=sys.stderr)
        failed += not found["fits"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
