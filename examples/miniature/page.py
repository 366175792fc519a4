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
Makes the tables and figures of `docs/miniature.md` from the results that `run.py` keeps.

```bash
python examples/miniature/page.py            # write them
python examples/miniature/page.py --check    # status 1 where the page does not say what the results say
```
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
import numpy as np
from arms import ARMS, NUM_CURVE_IMAGES, QUESTIONS, SEEDS, TUNING_SEEDS, Arm, Comparison, Question
from run import BASE, RESULTS, Run, read, style, tuned


DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- made by examples/miniature/page.py ({}) -->", "<!-- end -->"
CONFIDENCE = 0.95
POWER = 0.8


def student_quantile(probability: float, degrees: int) -> float:
    """Of Student's distribution, for probabilities above one half; by hand, 0.975 with one degree of freedom: 12.706."""

    # A value beyond t has the probability I(x) / 2, with the incomplete beta function I and x = n / (n + t^2).
    def excess(x):
        return mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - 2 * (1 - probability)

    x = float(mpmath.findroot(excess, (0, 1), solver="bisect"))
    return math.sqrt(degrees * (1 - x) / x)


def student(values: np.ndarray) -> tuple[float, float, float]:
    """
    Mean, half of its interval by Student's distribution, and the effect that would be seen with a chance of `POWER`.

    By hand: 1, 2 and 3 have the mean 2, the standard error 1 / sqrt(3) and, with 2 degrees of freedom, 4.303 of it: 2.484.
    """
    error = values.std(ddof=1) / math.sqrt(len(values))
    quantile = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return values.mean(), quantile * error, (quantile + student_quantile(POWER, len(values) - 1)) * error


@dataclass
class Results:
    """What is in the folder, in points: hundred times a share, or per cent of the way to sharp pictures."""

    folder: Path
    seeds: int = len(SEEDS)

    def __post_init__(self):
        self.base = json.loads((self.folder / f"{BASE}.json").read_text(encoding="utf-8"))
        self.rates = {name: tuned(self.folder, name, self.base) for name in ARMS}

    def runs(self, name: str) -> dict[int, dict]:
        """By seed, at the arm's learning rate."""
        if self.rates[name] is None:
            return {}
        found = {seed: read(self.folder, Run(name, self.rates[name], seed)) for seed in range(self.seeds)}
        return {seed: run for seed, run in found.items() if run is not None}

    def value(self, run: dict, arm: Arm, measure: str | None, held_out: str = "held_out") -> float:
        measures = run[held_out] if held_out == "held_out" else run["hybrids"][held_out]
        if (measure or arm.measure) == "style":
            return 100 * style(measures, self.base["held_out"], self.base["reference"])
        return 100 * measures[measure or arm.measure]

    def values(self, name: str, measure: str | None = None) -> dict[int, float]:
        """By seed; `name` may have the part of a hybrid's steps behind an @."""
        arm, _, part = name.partition("@")
        return {seed: self.value(run, ARMS[arm], measure, part or "held_out") for seed, run in self.runs(arm).items()}

    def difference(self, comparison: Comparison) -> np.ndarray:
        """Of the seeds that both arms have."""
        arm, against = (self.values(name, comparison.measure) for name in (comparison.arm, comparison.against))
        return np.array([arm[seed] - against[seed] for seed in range(self.seeds) if seed in arm and seed in against])

    def has(self, arm: str) -> bool:
        """Whether all its runs are there."""
        return len(self.runs(arm)) == self.seeds

    def compared(self, question: Question) -> list[Comparison]:
        """Of which all runs are there."""
        return [c for c in question.comparisons if len(self.difference(c)) == self.seeds]


def verdict(differences: np.ndarray) -> str:
    mean, half, missed = student(differences)
    if not differences.any():
        return "no difference in any run, to five digits"
    if abs(mean) <= half:
        return f"not seen here; {missed:.1f} would have been"
    return "holds here" if mean > 0 else "**contradicted here**"


def signed(values: np.ndarray) -> str:
    """The mean with its interval."""
    mean, half, _ = student(values)
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def claims(results: Results) -> list[str]:
    lines = ["| claim | difference in points | verdict |", "|---|---|---|"]
    for question in QUESTIONS:
        lines.append(f"| **{question.number}. {question.title}** | | |")
        compared = results.compared(question)
        for comparison in compared:
            differences = results.difference(comparison)
            lines.append(f"| {comparison.claim} | {signed(differences)} | {verdict(differences)} |")
        lines += [f"| {c.claim} | | not run yet |" for c in question.comparisons if c not in compared]
    return lines


def arms_table(results: Results, question: Question) -> list[str]:
    lines = [
        "| arm | learning rate | held-out measure | over the base | optimizer steps | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in question.arms:
        if not results.has(name):
            continue
        runs = list(results.runs(name).values())
        values = np.array(list(results.values(name).values()))
        gains = values - results.value(results.base, ARMS[name], None)
        steps, seconds = (np.mean([run[key] for run in runs]) for key in ("steps", "seconds"))
        rates = ARMS[name].learning_rates
        edge = ", the edge of what was tried" if results.rates[name] in (rates[0], rates[-1]) else ""
        lines.append(
            f"| `{name}` | {results.rates[name]:g}{edge} | {values.mean():.1f} | {signed(gains)} | {steps:.0f} | {seconds:.0f} |"
        )
    return lines


def reached(points: list[tuple[float, float]], level: float) -> float | None:
    """
    Where a curve of (place, value) first rises to the level, linear between points; `None` where it never does.

    By hand: from (0, 1) to (10, 3), the level 2 is reached at 5.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < level <= y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def times_less(results: Results, name: str, against: str, unit: str) -> np.ndarray:
    """
    How many times less of `unit` an arm takes to the score at which `against` ends with the same seed; of the seeds with which
    both curves get there.
    """
    measure = ARMS[against].measure

    def place(run: dict, level: float) -> float | None:
        points = [(0, results.base["curve"][measure]), *((point[unit], point[measure]) for point in run["curve"])]
        return reached(points, level)

    others = results.runs(against)
    found = []
    for seed, run in results.runs(name).items():
        level = others[seed]["curve"][-1][measure]
        places = [place(others[seed], level), place(run, level)]
        if None not in places:
            found.append(places[0] / places[1])
    return np.array(found)


def beside_the_line(base: dict, run: dict, reward: str, measure: str) -> float:
    """
    Points of the measure above the line that leads from the base to freshly drawn pictures, at the reward of a run's end. Below
    0, the run has more of the reward than of what the reward stands for.
    """
    (x0, y0), (x1, y1), (x, y) = (
        (held_out[reward], held_out[measure]) for held_out in (base["held_out"], base["reference"], run["held_out"])
    )
    return 100 * (y - y0 - (y1 - y0) * (x - x0) / (x1 - x0))


def reward_table(results: Results, question: Question) -> list[str]:
    """
    Of arms with one reward: how many times less compute each takes to the score of `same_reward_as`, the geometric mean over
    seeds with its interval by Student's distribution of the logarithms, and how far its end is [`beside_the_line`].
    """
    against = question.same_reward_as
    if against is None or not results.has(against):
        return []
    lines = [
        f"| arm | seeds that reach the end of `{against}` | times fewer rows | times fewer seconds | judge beside the line |",
        "|---|---|---|---|---|",
    ]
    for name in filter(results.has, question.arms):
        cells = [""] * 3
        if name != against:
            rows, seconds = (times_less(results, name, against, unit) for unit in ("rows", "seconds"))
            cells = [f"{len(rows)} of {results.seeds}", geometric(rows), geometric(seconds)]
        arm = ARMS[against]
        beside = [beside_the_line(results.base, run, arm.reward, arm.measure) for run in results.runs(name).values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {signed(np.array(beside))} |")
    return lines


def geometric(ratios: np.ndarray) -> str:
    """The geometric mean with its interval; nothing of a single ratio, or of none."""
    if len(ratios) < 2:
        return ""
    mean, half, _ = student(np.log(ratios))
    return f"{math.exp(mean):.1f} ({math.exp(mean - half):.1f} to {math.exp(mean + half):.1f})"


def third_panel(question: Question) -> Callable[..., None] | None:
    """What is drawn beside the curves and the differences, if anything: what was paid or cheated for them."""
    if any(ARMS[name].measure == "style" for name in question.arms):
        return plot_cost
    return None if question.same_reward_as is None else plot_reward


def line_styles(question: Question) -> dict[str, dict[str, str]]:
    """Of the arms' curves. Where the arms are pairs, a pair has one colour, and what is compared against is dashed."""
    arms, comparisons = question.arms, question.comparisons
    if len(arms) < 2 * len(comparisons):
        return {name: {"color": f"C{place}"} for place, name in enumerate(arms)}
    pairs = [(pair.arm, pair.against) for pair in comparisons]
    return {
        name: {"color": f"C{place}", "linestyle": style}
        for place, pair in enumerate(pairs)
        for name, style in zip(pair, ("-", "--"), strict=True)
    }


def plot(results: Results, question: Question, path: Path) -> None:
    """The held-out measure over rows, the paired differences with their intervals, and the [`third_panel`]."""
    from matplotlib.figure import Figure

    third = third_panel(question)
    figure = Figure(figsize=(9 if third is None else 13, 4.2), layout="constrained")
    left, right, *more = figure.subplots(1, 2 if third is None else 3)
    for axes in more:
        third(axes, results, question)
    for name, look in line_styles(question).items():
        if not results.has(name):
            continue
        runs, arm = list(results.runs(name).values()), ARMS[name]

        def point(measures: dict[str, float], arm: Arm = arm) -> float:
            if arm.measure == "style":
                return 100 * style(measures, results.base["curve"], results.base["reference"])
            return 100 * measures[arm.measure]

        rows = np.array([[0, *(p["rows"] for p in run["curve"])] for run in runs]).mean(0)
        values = np.array([[point(results.base["curve"]), *map(point, run["curve"])] for run in runs])
        half = [student(column)[1] if column.std() else 0.0 for column in values.T]
        left.plot(rows / 1000, values.mean(0), marker="o", markersize=3, label=name, **look)
        left.fill_between(rows / 1000, values.mean(0) - half, values.mean(0) + half, alpha=0.12, color=look["color"])
    left.set_xlabel("thousand rows through the network")
    left.set_ylabel(f"held out ({NUM_CURVE_IMAGES} images), points")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    shown = results.compared(question)
    for place, comparison in enumerate(reversed(shown)):
        differences = results.difference(comparison)
        mean, half, _ = student(differences)
        right.plot(differences, np.full(len(differences), place), ".", color="gray", alpha=0.6)
        right.errorbar(mean, place, xerr=half, fmt="o", capsize=4, color="tab:blue")
    right.set_yticks(range(len(shown)), [label(c) for c in reversed(shown)], fontsize=8)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_ylim(-0.6, len(shown) - 0.4)
    right.set_xlabel("paired difference at the end, points")
    right.grid(alpha=0.3, axis="x")
    figure.suptitle(question.title, fontsize=11)
    figure.savefig(path, dpi=90)


def label(comparison: Comparison) -> str:
    measure = "" if comparison.measure is None else f"\n({comparison.measure})"
    return f"{comparison.arm}\n- {comparison.against}{measure}"


def plot_cost(axes, results: Results, question: Question) -> None:
    """
    Right attributes over style, a point a learning rate, of all seeds that it has: at equal style, the higher arm costs less.
    """
    axes.plot(0, 100 * results.base["held_out"]["attribute_share"], "s", color="black", label="base")
    for name in filter(results.has, question.arms):
        points = []
        for rate in ARMS[name].learning_rates:
            runs = [read(results.folder, Run(name, rate, seed)) for seed in (*TUNING_SEEDS, *range(results.seeds))]
            found = [run for run in runs if run is not None]
            points.append(
                [np.mean([results.value(run, ARMS[name], m) for run in found]) for m in ("style", "attribute_share")]
            )
        axes.plot(*np.transpose(points), marker="o", markersize=3, label=name)
    axes.set_xlabel("style, points: 0 the base, 100 sharp pictures")
    axes.set_ylabel("right attributes, points")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def plot_reward(axes, results: Results, question: Question) -> None:
    """
    What the judge says over what the trained reward says, as a run goes on. The line leads from the base to freshly drawn
    pictures; a curve below it has more of the reward than of what the reward stands for.
    """
    arm = ARMS[question.same_reward_as]

    def point(measures: dict[str, float]) -> tuple[float, float]:
        return measures[arm.reward], 100 * measures[arm.measure]

    ends = [point(results.base[key]) for key in ("curve", "reference")]
    axes.plot(*np.transpose(ends), color="black", linewidth=0.8, linestyle="--", label="to freshly drawn pictures")
    for name in (*filter(results.has, question.arms), *filter(results.has, question.shown_beside)):
        curves = [[point(measures) for measures in run["curve"]] for run in results.runs(name).values()]
        points = np.concatenate([ends[:1], np.mean(curves, 0)])
        axes.plot(*points.T, marker="o", markersize=3, label=name)
    axes.set_xlabel(f"{arm.reward}, the trained reward, held out")
    axes.set_ylabel("the judge: right attributes, points")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def page(results: Results) -> dict[str, str]:
    """The parts of the page that are made: the claims, and the questions."""
    finished = [name for name in ARMS if results.has(name)]
    compared = [c for question in QUESTIONS for c in results.compared(question)]
    told = (
        f"{len(finished)} of {len(ARMS)} arms are run, {len(finished) * (3 * len(TUNING_SEEDS) + results.seeds)} runs, and "
        f"{len(compared)} differences are told: of so many, {len(compared) / 20:.1f} would be seen by chance where there "
        "is none."
    )
    sections = []
    for question in QUESTIONS:
        if results.compared(question):
            rewards = reward_table(results, question)
            sections += [
                f"### {question.number}. {question.title}", "", *([question.note, ""] if question.note else []),
                *arms_table(results, question), "", *rewards, *([""] if rewards else []),
                f"![{question.title}](images/miniature_{question.number}.png)", "",
            ]  # fmt: skip
    return {"claims": "\n".join([*claims(results), "", told]), "questions": "\n".join(sections).strip()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with miniature.md and images/ (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=len(SEEDS), help="fresh seeds of an arm, at least 2 (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where the page says otherwise")
    arguments = parser.parse_args()
    if not (arguments.results / f"{BASE}.json").exists():
        parser.error(f"{arguments.results} has no {BASE}.json, so no results. Give the folder that run.py wrote.")
    results = Results(arguments.results, arguments.seeds)
    path = arguments.docs / "miniature.md"
    old = new = path.read_text(encoding="utf-8")
    for name, text in page(results).items():
        begin = BEGIN.format(name)
        head, rest = new.split(begin, 1)
        new = f"{head}{begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"
    if arguments.check:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    for question in QUESTIONS:
        if results.compared(question):
            plot(results, question, arguments.docs / "images" / f"miniature_{question.number}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
