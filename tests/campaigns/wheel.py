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
The wheel, installed into a new environment, runs the demo.

```bash
python tests/campaigns/wheel.py                 # with its dependencies, as a user would install it
python tests/campaigns/wheel.py --no_dependencies  # with those of this environment: no download
```
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
DEMO = ["demo", "chunk_grpo", "--max_steps", "1", "--num_eval_images", "16", "--output_dir", "demo"]
RESULTS = ("pytorch_lora_weights.safetensors", "README.md", "before_after.png", "results.json")


def run(*command: str | Path, folder: Path) -> str:
    finished = subprocess.run(
        [str(part) for part in command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if finished.returncode != 0:
        sys.exit(f"{finished.stdout}\nFAILED: {' '.join(map(str, command))}")
    return finished.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_dependencies", action="store_true", help="use the libraries of this environment")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, folder=ROOT)
        wheel = next(folder.glob("*.whl"))
        run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
        binaries = folder / "venv" / "bin"
        install = [binaries / "python", "-m", "pip", "install", "--disable-pip-version-check"]
        if arguments.no_dependencies:
            run(*install, "--no-deps", wheel, folder=folder)
            # Behind the new environment's own packages, so that an editable install here does not count.
            site = run(
                binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
            )
            (Path(site.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            run(*install, "-c", ROOT / "constraints.txt", wheel, folder=folder)
        place = run(binaries / "python", "-c", "import trl_diffusion; print(trl_diffusion.__file__)", folder=folder)
        if not Path(place.strip()).is_relative_to(folder):
            sys.exit(f"FAILED: {place.strip()} was imported, not the wheel")
        installed = time.perf_counter()
        print(run(binaries / "trl-diffusion", *DEMO, folder=folder))
        missing = [name for name in RESULTS if not (folder / "demo" / name).is_file()]
        if missing:
            sys.exit(f"FAILED: the demo did not write {missing}")
        seconds = time.perf_counter()
        print(
            f"PASSED: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB; installed in {installed - started:.0f} s, demo in "
            f"{seconds - installed:.0f} s"
        )


if __name__ == "__main__":
    main()
