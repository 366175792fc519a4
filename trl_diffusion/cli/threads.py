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

"""How many threads a command computes with, and how they wait: read once, when torch is loaded."""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path


# How often a thread of GNU's OpenMP looks for work before it sleeps. Its own default, which waits for milliseconds,
# starves whatever else runs: two trainings side by side take 16 times as long as one alone. For the choice see
# docs/benchmarks.md.
SPIN_COUNT = "1000"
# What decides on waiting, where a user has set it.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def set_thread_defaults(environ: MutableMapping[str, str], usable: int, present: int) -> None:
    """
    Set the variables of OpenMP that the user has not set. To be called before torch is loaded.

    Args:
        environ (`MutableMapping`): the environment.
        usable (`int`): cores that this process may keep busy, see [`usable_cores`].
        present (`int`): cores that OpenMP would use.
    """
    if usable < present:
        environ.setdefault("OMP_NUM_THREADS", str(usable))
    if not any(name in environ for name in WAITING):
        environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def allowed_cores() -> int:
    """Cores that this process may run on, which OpenMP knows as well."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def usable_cores(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """
    Cores that this process may keep busy: those that it may run on, but not more than the quota of its control groups,
    which containers have and OpenMP does not know; at least 1.

    Args:
        root (`Path`, *optional*): where control groups are mounted.
        membership (`Path`, *optional*): the file that names those of this process.
    """
    quotas = [float(allowed_cores())]
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # the one hierarchy of version 2
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        folder = base / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(base):
                quotas += _quota(place)
    return max(1, int(min(quotas)))


def _quota(group: Path) -> list[float]:
    """The quota in cores of one control group, or nothing."""
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").is_file():
        quota = (group / "cpu.cfs_quota_us").read_text().strip()
        period = (group / "cpu.cfs_period_us").read_text()
    else:
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]
