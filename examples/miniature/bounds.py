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
Tells how often an arm's bound acts: the share of the ratios of chunks, or of steps, that an update clips or drops, by the place of
the update in its generation. One run an arm; nothing is kept.

```bash
OMP_NUM_THREADS=1 python examples/miniature/bounds.py step-clip-2 chunk-clip-2
```
"""

import argparse
import math
import tempfile
from statistics import fmean

import torch
from arms import ARMS
from run import curve_callback, make_trainer
from transformers import PrinterCallback


def shares_bounded(name: str, learning_rate: float, seed: int, rows: float = 1.0) -> list[float]:
    """Of each update of a generation, the mean over the run, NaN where it has none; `rows` is the share of the arm's budget."""
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arm, output_dir=folder, learning_rate=learning_rate, seed=seed)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(curve_callback(trainer, round(arm.rows * rows), number=1))  # ends the run
        trainer.train()
        updates = trainer.args.steps_per_generation
    bounded: dict[int, list[float]] = {place: [] for place in range(updates)}
    for log in trainer.state.log_history:
        if "clip_ratio/low_mean" in log:
            bounded[(log["step"] - 1) % updates].append(log["clip_ratio/low_mean"] + log["clip_ratio/high_mean"])
    return [fmean(shares) if shares else math.nan for shares in bounded.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "arms", nargs="+", choices=[name for name in ARMS if "steps_per_generation" in ARMS[name].settings]
    )
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(%(default)s, what these arms have chosen)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--rows", type=float, default=1.0, help="share of the budget (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.arms:
        shares = shares_bounded(name, arguments.learning_rate, arguments.seed, arguments.rows)
        print(name, *(f"{share:.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
