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
Kills runs at random instants with SIGKILL and resumes them: the end must be that of a run that was left alone, bit for
bit.

```bash
PYTHONPATH=tests python tests/campaigns/kill.py --kills 20
```

A run is killed up to four times, each time in another phase, at a random instant of a random occurrence of it, and
then left to finish. The run is a process of its own, forked from this one, which has imported the libraries and
computes nothing itself.
"""

import argparse
import collections
import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from campaigns.tiny_runs import TRAINERS, make_trainer, save_trained
from safetensors.torch import load_file

from trl_diffusion.runtime.checkpoints import last_whole_checkpoint


PHASES = ("rollout", "reward", "update", "save")
CONTEXT = multiprocessing.get_context("fork")


def reporting(trainer_class, connection):
    """The trainer, which says when a phase begins and ends."""

    class Reporting(trainer_class):
        @contextlib.contextmanager
        def timed(self, phase, *how):
            connection.send((phase, True))
            with super().timed(phase, *how):
                yield
            connection.send((phase, False))

        def _save_checkpoint(self, model, trial):
            connection.send(("save", True))
            super()._save_checkpoint(model, trial)
            connection.send(("save", False))

    return Reporting


def run(kind: str, folder: Path, connection) -> None:
    """A run from its last whole checkpoint, or from the start; in a process of its own."""
    torch.set_num_threads(1)
    trainer = make_trainer(kind, folder, reporting(TRAINERS[kind], connection))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) is not None)
    save_trained(trainer, folder / "trained.safetensors")


class Run:
    """A run and the phases that it reports."""

    def __init__(self, kind: str, folder: Path):
        self.reader, writer = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=run, args=(kind, folder, writer))
        self.process.start()
        writer.close()

    def events(self):
        """Yields (phase, whether it begins), until the run ends."""
        with contextlib.suppress(EOFError):
            while True:
                yield self.reader.recv()

    def wait(self) -> None:
        for _ in self.events():
            pass
        self.process.join()
        if self.process.exitcode != 0:
            raise RuntimeError(f"The run ended with status {self.process.exitcode}; its error is above.")

    def kill_at(self, phase: str, occurrence: int, delay: float) -> bool:
        """Kill the run `delay` seconds after a phase has begun so often; `False` if it ends before."""
        for name, begins in self.events():
            if name == phase and begins:
                occurrence -= 1
                if occurrence < 0:
                    time.sleep(delay)
                    self.process.kill()
                    break
        for _ in self.events():
            pass
        self.process.join()
        if self.process.exitcode > 0:
            raise RuntimeError(f"The run ended with status {self.process.exitcode}; its error is above.")
        return self.process.exitcode < 0


def durations(kind: str, folder: Path) -> dict[str, list[float]]:
    """The run that is left alone; how long each of its phases took, one number an occurrence."""
    seconds, begun = collections.defaultdict(list), {}
    whole = Run(kind, folder)
    for phase, begins in whole.events():
        if begins:
            begun[phase] = time.perf_counter()
        else:
            seconds[phase].append(time.perf_counter() - begun[phase])
    whole.wait()
    return seconds


def campaign(kind: str, kills: int, folder: Path, seed: int) -> dict[str, int]:
    """
    Kill a trainer's runs and compare.

    Returns:
        `dict[str, int]`: number of kills by phase.

    Raises:
        `AssertionError`: a resumed run did not end as the one that was left alone.
    """
    chance = random.Random(seed)
    seconds = durations(kind, folder / "whole")
    expected = load_file(folder / "whole" / "trained.safetensors")
    count = collections.Counter()
    chain = 0
    while count.total() < kills:
        chain += 1
        phases = chance.sample(PHASES, k=min(len(PHASES), kills - count.total()))
        run_folder = folder / f"run-{chain}"
        for phase in phases:
            # A resumed run has fewer occurrences left; among the first half, most of them are there.
            occurrence = chance.randrange(max(1, len(seconds[phase]) // 2))
            delay = chance.uniform(0, max(seconds[phase]))
            killed = Run(kind, run_folder).kill_at(phase, occurrence, delay)
            last = last_whole_checkpoint(run_folder)
            state = "killed" if killed else "ended before the kill"
            print(
                f"{kind} run {chain}: {state} {1000 * delay:.0f} ms into {phase} {occurrence}, whole: {last and last.name}"
            )
            if not killed:
                break
            count[phase] += 1
        Run(kind, run_folder).wait()
        resumed = load_file(run_folder / "trained.safetensors")
        assert resumed.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, resumed[name]), (
                f"{kind} run {chain}: {name} differs by {weight - resumed[name]}"
            )
    return dict(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each trainer's runs")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    for kind in arguments.trainers:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            count = campaign(kind, arguments.kills, Path(folder), arguments.seed)
        by_phase = ", ".join(f"{phase} {count[phase]}" for phase in PHASES if phase in count)
        print(
            f"{kind}: {sum(count.values())} kills ({by_phase}), every resumed run equal bit for bit, "
            f"{time.perf_counter() - start:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
