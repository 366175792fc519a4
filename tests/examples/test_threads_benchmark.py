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

"""The benchmark of waiting threads, in its shortest form."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)  # three trainings start
def test_every_setting_is_a_row(tmp_path):
    command = ["examples/benchmarks/threads.py", "--steps", "1", "--rounds", "1", "--settings", "one thread"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    header, _, row = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(header.strip("|").split("|")) and cells[0] == "one thread"
    alone, both = (float(cell.partition(" ")[0]) for cell in cells[1:3])
    # Of one setting alone the last column is what the two before say, up to their rounding.
    assert alone > 0 and abs(float(cells[3]) - 2 * alone / both) < 0.1 * float(cells[3])
