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
Seconds of a training step alone and with a second training beside it, by how threads wait for work.

    python examples/benchmarks/threads.py

GNU's OpenMP lets threads look for work a while before they sleep. Alone that saves waking them; beside other work it takes
the cores away from it. The commands of trl-diffusion choose a point between; this shows the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (300, 1000, 3000, 10_000)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WARM_UP = 2


def work(steps: int) -> None:
    """Print the seconds of each step of a training as the demo's, as JSON."""
    from transformers import TrainerCallback

    from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = ChunkGRPOConfig(
            output_dir=folder, num_inference_steps=6, chunk_sizes=[2, 3], num_generations=8, save_strategy="no",
            per_device_train_batch_size=48, max_steps=WARM_UP + steps, log_samples=False, disable_tqdm=True,
            use_cpu=True, report_to="none", logging_strategy="no",
        )  # fmt: skip
        dataset = shapes.load_dataset("train").select(range(100))
        ChunkGRPOTrainer("shapes", "shapes-clip", args, dataset, callbacks=[Clock()]).train()
    print(json.dumps([b - a for a, b in zip(Clock.times, Clock.times[1:], strict=False)][WARM_UP - 1 :]))


def measure(environ: dict[str, str], steps: int, processes: int) -> float:
    """Median seconds of a step of so many trainings side by side."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--steps", str(steps), "--work"]
    workers = [
        subprocess.Popen(command, env={**clean, **environ}, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    seconds = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    return statistics.median(sum(seconds, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="steps of each training that are measured")
    parser.add_argument("--rounds", type=int, default=3, help="times that each setting is measured, in turn")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="which ones")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.steps)
        return
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in options.settings}
    for _ in range(options.rounds):
        for name in options.settings:
            times = [measure(SETTINGS[name], options.steps, processes) for processes in (1, 2)]
            results[name].append((times[0], times[1]))
            print(f"{name}: {times[0]:.2f} s alone, {times[1]:.2f} s side by side", file=sys.stderr)
    fastest = min(statistics.median(alone for alone, _ in measured) for measured in results.values())
    print(
        "| threads | alone, s a step: median (least to most) | two side by side | both together, of the fastest alone |"
    )
    print("|---|---|---|---|")
    for name, measured in results.items():
        cells = [
            f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in zip(*measured, strict=True)
        ]
        share = 2 * fastest / statistics.median(both for _, both in measured)
        print(f"| {name} | {cells[0]} | {cells[1]} | {share:.2f} |")


if __name__ == "__main__":
    main()
