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

"""The threads that commands compute with, where cores are few and quotas small."""

import os
import subprocess
import sys

import pytest

from trl_diffusion.cli.threads import SPIN_COUNT, allowed_cores, set_thread_defaults, usable_cores


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        # Of a group and those above it the least counts.
        ("0::/pod/box", {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "800000 100000"}, 3),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000"}, 64),
        # The group as seen from outside of the container, which is mounted as the root.
        ("0::/docker/abc", {"cpu.max": "400000 100000"}, 4),
        # Version 1.
        ("4:memory:/x\n3:cpu,cpuacct:/x\n0::/", {"cpu/x/cpu.cfs_quota_us": "150000", "cpu/x/cpu.cfs_period_us": "50000"}, 3),
        ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 64),
        ("9:name=systemd:/\n8:cpuset:/", {}, 64),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(tmp_path, monkeypatch, membership, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert usable_cores(tmp_path / "root", tmp_path / "membership") == cores


def test_where_there_are_no_control_groups(tmp_path):
    assert usable_cores(tmp_path, tmp_path / "nothing") == allowed_cores()


@pytest.mark.parametrize(
    ("given", "usable", "added"),
    [
        ({}, 8, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({}, 3, {"GOMP_SPINCOUNT": SPIN_COUNT, "OMP_NUM_THREADS": "3"}),
        ({"OMP_NUM_THREADS": "5"}, 3, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, 8, {}),
        ({"OMP_WAIT_POLICY": "active"}, 3, {"OMP_NUM_THREADS": "3"}),
    ],
)
def test_what_the_user_set_stays(given, usable, added):
    environ = dict(given)
    set_thread_defaults(environ, usable, present=8)
    assert environ == {**given, **added}


def threads_of_a_command(**environ):
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-m", "trl_diffusion.cli", "env"], capture_output=True, text=True, timeout=120, check=True,
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **environ},
    )  # fmt: skip
    (threads,) = (line for line in done.stdout.splitlines() if line.startswith("- CPU threads: "))
    return int(threads.rpartition(" ")[2]), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP")
def test_torch_reads_them():
    threads, displayed = threads_of_a_command()
    assert threads == usable_cores()
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in displayed
    threads, displayed = threads_of_a_command(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="77")
    assert threads == 1
    assert "GOMP_SPINCOUNT = '77'" in displayed
