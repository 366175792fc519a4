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
Trains arms x seeds in the built-in world and keeps one file of results a run.

```bash
python examples/miniature/run.py                         # all arms, some eight hours on two cores
python examples/miniature/run.py --arms step temporal    # some of them
python examples/miniature/run.py --questions 1 3
```

For each arm three learning rates are tried on two seeds; the one with the best held-out measure at the end goes on to eight
fresh seeds. Runs whose file is there are not run again, so that an interrupted command goes on where it was. `page.py` makes
the tables and figures.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arms import (
    ARMS,
    CURVE_POINTS,
    LAYOUT,
    NUM_CURVE_IMAGES,
    NUM_IMAGES,
    QUESTIONS,
    SEEDS,
    STEPS,
    TUNING_SEEDS,
    Arm,
)
from tqdm import tqdm


RESULTS = Path(__file__).parent / "results"
BASE = "base"  # the model without training: one file


@dataclass(frozen=True)
class Size:
    """How much a run computes; the protocol's, or less to try the script."""

    rows: float = 1.0
    """Share of each arm's budget."""
    num_images: int = NUM_IMAGES
    num_curve_images: int = NUM_CURVE_IMAGES


@dataclass(frozen=True)
class Run:
    arm: str
    learning_rate: float
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.arm) / f"lr{self.learning_rate:g}-seed{self.seed}.json"


def settings_of(arm: Arm) -> dict[str, Any]:
    """Of the trainer's configuration, but for learning rate, seed and place."""
    from trl_diffusion.cli.demo_run import SETTINGS

    common = {
        **SETTINGS, "num_inference_steps": STEPS, "lr_scheduler_type": "constant", "disable_tqdm": True,
        "max_steps": 100_000,  # the budget of rows ends a run
    }  # fmt: skip
    if arm.method == "srpo":
        from trl_diffusion.cli.demo_srpo import NEGATIVE_WORDS, POSITIVE_WORDS

        return {
            **common, "per_device_train_batch_size": 24, "max_grad_norm": 0.1, "vae_gradient_checkpointing": False,
            "positive_words": POSITIVE_WORDS, "negative_words": NEGATIVE_WORDS, **arm.settings,
        }  # fmt: skip
    return {
        **common, "sde_type": "flow", "eta": 0.7, "num_generations": 8, "per_device_train_batch_size": 48,
        "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, **arm.settings,
    }  # fmt: skip


def single_divisor(step: int) -> float:
    """
    What the loss of a step that is drawn by itself is divided by. Half of the steps are drawn; chunks, of which one in
    `len(LAYOUT)` is, weigh a step by 1 over its chunk's size: with this the weights have one mean.
    """
    size_of = [size for size in LAYOUT for _ in range(size)]
    return size_of[step] * len(LAYOUT) / 2


def make_trainer(arm: Arm, **settings: Any):
    from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer, shapes
    from trl_diffusion.cli.demo_run import shapes_arguments

    class StepsDrawnSingly(ChunkGRPOTrainer):
        """Step-level GRPO in which each step weighs 1 over the size of its chunk of `LAYOUT`, and is drawn by itself."""

        def make_micro_batches(self, rows, index):
            micro_batches = super().make_micro_batches(rows, index)
            for micro_batch in micro_batches:
                micro_batch.divisors = [single_divisor(step) for (step,) in micro_batch.chunks]
            return micro_batches

    trainers = {"chunk_grpo": ChunkGRPOTrainer, "steps": StepsDrawnSingly, "srpo": SRPOTrainer}
    config = SRPOConfig if arm.method == "srpo" else ChunkGRPOConfig
    reward = shapes.attribute_share if arm.reward == "attribute_share" else arm.reward
    return trainers[arm.method](
        reward_funcs=reward, args=config(**{**settings_of(arm), **settings}), **shapes_arguments()
    )


def held_out(number: int) -> tuple[list[str], list[int]]:
    """Prompts that are not trained, and seeds of noise: the same for every run."""
    from trl_diffusion import shapes

    prompts = list(shapes.load_dataset("test")["prompt"])
    return [prompts[index % len(prompts)] for index in range(number)], list(range(number))


def measured(trainer, number: int, adapter_fraction: float = 1.0) -> dict[str, float]:
    """Means over images of held-out prompts."""
    from trl_diffusion.cli.demo_run import measure

    prompts, seeds = held_out(number)
    images = trainer.generate(prompts, seeds, adapter_fraction)
    return {name: round(float(values.mean()), 5) for name, values in measure(images, prompts).items()}


def style(measures: dict[str, float], base: dict[str, float], reference: dict[str, float]) -> float:
    """How far contrast and sharpness went from the base (0) to freshly drawn sharp pictures (1), their mean."""
    names = ("contrast", "sharpness")
    return sum((measures[name] - base[name]) / (reference[name] - base[name]) for name in names) / len(names)


def curve_callback(trainer, budget: int, number: int):
    """Measures at equal distances of rows, and ends the training when the budget is spent."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        points: list[dict[str, Any]] = []
        evaluated = 0  # rows of the measurements, which are not of the budget
        paused = 0.0

        def rows(self) -> int:
            return trainer.image_sampler.forwards - self.evaluated

        def measure(self, step: int) -> None:
            rows, seconds = self.rows(), time.perf_counter() - self.started - self.paused
            self.points.append({"step": step, "rows": rows, "seconds": round(seconds, 2), **measured(trainer, number)})
            self.evaluated = trainer.image_sampler.forwards - rows
            self.paused = time.perf_counter() - self.started - seconds

        def on_train_begin(self, args, state, control, **kwargs):
            self.points, self.started = [], time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            rows = self.rows()
            if rows >= budget * (len(self.points) + 1) / CURVE_POINTS:
                self.measure(state.global_step)
            control.should_training_stop = rows >= budget

    return Curve()


def train(run: Run, size: Size) -> dict[str, Any]:
    """One run: its settings, its curve and the held-out measures at the end."""
    import torch
    from transformers import PrinterCallback

    from trl_diffusion import __version__

    arm = ARMS[run.arm]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"learning_rate": run.learning_rate, "seed": run.seed}
        trainer = make_trainer(arm, output_dir=folder, **settings)
        curve = curve_callback(trainer, round(arm.rows * size.rows), size.num_curve_images)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(curve)
        trainer.train()
        last = curve.points[-1]
        hybrids = () if run.seed in TUNING_SEEDS else arm.fractions
        return {
            "arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed,
            "settings": described(run, size),
            "versions": {"trl_diffusion": __version__, "torch": torch.__version__},
            "rows": last["rows"], "seconds": last["seconds"], "steps": last["step"],
            "held_out": measured(trainer, size.num_images),
            "hybrids": {f"{part:g}": measured(trainer, size.num_images, part) for part in hybrids},
            "curve": curve.points,
            "reward_curve": [
                {"step": log["step"], "reward": round(log["reward"], 5)}
                for log in trainer.state.log_history if "reward" in log
            ],
        }  # fmt: skip


def measure_base(size: Size) -> dict[str, Any]:
    """Of the model without training, and of pictures freshly drawn for the same prompts."""
    from trl_diffusion import shapes
    from trl_diffusion.cli.demo_run import measure

    prompts, _ = held_out(size.num_images)
    drawn = measure(shapes.reference(prompts), prompts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(ARMS["step"], output_dir=folder)
        return {
            "size": vars(size),
            "held_out": measured(trainer, size.num_images),
            "curve": measured(trainer, size.num_curve_images),
            "reference": {name: round(float(values.mean()), 5) for name, values in drawn.items()},
        }


def described(run: Run, size: Size) -> dict[str, Any]:
    """All that decides on the result of a run."""
    arm = ARMS[run.arm]
    return {
        "method": arm.method, "reward": arm.reward, "rows": round(arm.rows * size.rows), "num_images": size.num_images,
        "num_curve_images": size.num_curve_images, **settings_of(arm),
    }  # fmt: skip


def work(run: Run | None, size: Size, results: Path) -> None:
    """In a process of its own: one run, written when it is whole."""
    path = results / (f"{BASE}.json" if run is None else run.path)
    found = measure_base(size) if run is None else train(run, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def prepare() -> None:
    """A process of the pool: one core, and none of the remarks and bars of a single run; an error comes back by itself."""
    sys.stderr = open(os.devnull, "w")
    import warnings

    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read(results: Path, run: Run) -> dict[str, Any] | None:
    path = results / run.path
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def score(found: dict[str, Any], arm: Arm, base: dict[str, Any]) -> float:
    """The held-out measure of the arm."""
    if arm.measure == "style":
        return style(found["held_out"], base["held_out"], base["reference"])
    return found["held_out"][arm.measure]


def tuned(results: Path, name: str, base: dict[str, Any]) -> float | None:
    """The learning rate with the best mean over the tuning seeds; `None` while a run of them is missing."""
    arm = ARMS[name]
    means = {}
    for rate in arm.learning_rates:
        found = [read(results, Run(name, rate, seed)) for seed in TUNING_SEEDS]
        if None in found:
            return None
        means[rate] = sum(score(run, arm, base) for run in found) / len(found)
    return max(means, key=means.get)


def check(results: Path, run: Run, size: Size) -> bool:
    """
    Whether the run is done.

    Raises:
        `ValueError`: its file was made with other settings.
    """
    found = read(results, run)
    if found is None:
        return False
    wanted = json.loads(json.dumps(described(run, size)))
    if found["settings"] != wanted:
        names = {n for n in {*wanted, *found["settings"]} if wanted.get(n) != found["settings"].get(n)}
        raise ValueError(
            f"{results / run.path} was made with other settings ({', '.join(sorted(names))}). Remove it, or give another "
            "--results."
        )
    return True


class Schedule:
    """What is to be run, an arm after the other; fresh seeds when the learning rate is known."""

    def __init__(self, names: list[str], seeds: tuple[int, ...], results: Path, size: Size):
        self.names, self.seeds, self.results, self.size = names, seeds, results, size
        self.begun: set[Run] = set()
        self.done = 0
        self.base: dict[str, Any] | None = None

    def __len__(self) -> int:
        return sum(len(ARMS[name].learning_rates) * len(TUNING_SEEDS) + len(self.seeds) for name in self.names)

    def runs(self) -> Iterator[Run]:
        """In order, as far as they are known."""
        for name in self.names:
            for rate in ARMS[name].learning_rates:
                yield from (Run(name, rate, seed) for seed in TUNING_SEEDS)
            rate = tuned(self.results, name, self.base)
            if rate is not None:
                yield from (Run(name, rate, seed) for seed in self.seeds)

    def next(self) -> Run | None:
        """The first that is not begun; `None` where all that are known are."""
        for run in self.runs():
            if run not in self.begun:
                self.begun.add(run)
                if not check(self.results, run, self.size):
                    return run
                self.done += 1
        return None


def run_all(names: list[str], seeds: tuple[int, ...], results: Path, size: Size, processes: int) -> None:
    """
    Runs what is missing, `processes` side by side.

    Raises:
        `ValueError`: a file of the results was made with other settings.
    """
    schedule = Schedule(names, seeds, results, size)
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool:
        base = results / f"{BASE}.json"
        if not base.exists():
            pool.submit(work, None, size, results).result()
        schedule.base = json.loads(base.read_text(encoding="utf-8"))
        if schedule.base["size"] != vars(size):
            raise ValueError(f"{base} was made with another size ({schedule.base['size']}). Give another --results.")
        running: dict[Future, Run] = {}
        with tqdm(total=len(schedule), unit="run", smoothing=0) as bar:
            while True:
                while len(running) < processes and (run := schedule.next()) is not None:
                    running[pool.submit(work, run, size, results)] = run
                # What was there already took no time.
                bar.total = len(schedule) - schedule.done
                bar.set_postfix_str(", ".join(str(run.path.with_suffix("")) for run in running.values()))
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    future.result()
                    bar.update()
                    found = read(results, run)
                    value = score(found, ARMS[run.arm], schedule.base)
                    bar.write(
                        f"{run.path.with_suffix('')}: {ARMS[run.arm].measure} {value:.3f}, {found['steps']} steps, "
                        f"{found['seconds']:.0f} s"
                    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--questions", nargs="+", type=int, choices=[question.number for question in QUESTIONS])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fresh seeds of an arm (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, a core each (%(default)s)")
    parser.add_argument("--rows", type=float, default=1.0, help="share of each arm's budget, to try the script")
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help="held-out images at the end (%(default)s)")
    arguments = parser.parse_args()
    chosen = [name for q in QUESTIONS if q.number in (arguments.questions or []) for name in q.arms]
    names = list(dict.fromkeys([*(arguments.arms or []), *chosen])) or list(
        dict.fromkeys(name for question in QUESTIONS for name in question.arms)
    )
    size = Size(arguments.rows, arguments.num_images, min(arguments.num_images, NUM_CURVE_IMAGES))
    try:
        run_all(names, tuple(range(arguments.seeds)), arguments.results, size, arguments.processes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
