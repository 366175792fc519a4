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

"""The miniature: its shortest form, its statistics against tables and simulation, and the page against the results that are kept."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from trl_diffusion.flow.chunks import chunk_steps, equal_chunk_sizes


FOLDER = Path(__file__).parents[2] / "examples" / "miniature"
sys.path.insert(0, str(FOLDER))
import arms as miniature  # noqa: E402
import page  # noqa: E402
import run as runner  # noqa: E402


def script(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments], capture_output=True, text=True, env=environment, timeout=280
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two arms of one step each."""
    folder = tmp_path_factory.mktemp("miniature")
    shortest = ("--arms", "step", "weighted-steps", "--seeds", "2", "--rows", "0.01", "--num_images", "8")
    done = script("run.py", *shortest, "--results", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, shortest


def test_a_run_keeps_all_that_the_page_needs(results):
    folder, _ = results
    files = sorted(folder.glob("*/*.json"))
    assert len(files) == 2 * (3 * 2 + 2)
    for path in files:
        found = json.loads(path.read_text())
        assert found["settings"]["rows"] == 240 <= found["rows"] == found["curve"][-1]["rows"]
        # The rows of one update: what the trainer says it has computed, without the measurements.
        assert found["steps"] == 1 and len(found["reward_curve"]) == 1
        assert 0 <= found["held_out"]["attribute_share"] <= 1
        assert (
            found["settings"]["num_inference_steps"] == miniature.STEPS
            and found["versions"]["torch"] == torch.__version__
        )
        assert set(found["hybrids"]) == (
            {"0.4", "0.6", "0.8"} if found["arm"] == "step" and found["seed"] < 2 else set()
        )
    # Seeds are paired over arms: the first rollouts are the same images, whatever is trained of them.
    base = json.loads((folder / "base.json").read_text())
    rates = {name: runner.tuned(folder, name, base) for name in ("step", "weighted-steps")}
    for seed in (0, 1):
        step, weighted = (
            json.loads((folder / runner.Run(name, rate, seed).path).read_text()) for name, rate in rates.items()
        )
        assert step["reward_curve"] == weighted["reward_curve"]
        assert step["held_out"] != weighted["held_out"]


def test_rows_are_those_of_the_training_alone():
    """By hand: a rollout of 6 prompts x 8 images has 6 + 6 x 48 rows, an update three steps of 48, or the first of 6."""
    found = runner.train(runner.Run("step", 1e-3, 0), runner.Size(0.02, 8, 8))
    assert found["steps"] == 2 and [point["step"] for point in found["curve"]] == [1, 2]
    updates = found["rows"] - 2 * (6 + 6 * 48)
    assert updates in {2 * 144, 144 + 102, 2 * 102}


def test_the_best_learning_rate_on_the_tuning_seeds_is_taken(tmp_path):
    scores = {5e-4: (0.70, 0.74), 1e-3: (0.80, 0.70), 2e-3: (0.60, 0.85)}  # means 0.72, 0.75, 0.725
    base = {"held_out": {"attribute_share": 0.65}}
    for rate, values in scores.items():
        assert runner.tuned(tmp_path, "step", base) is None
        for seed, value in zip(miniature.TUNING_SEEDS, values, strict=True):
            path = tmp_path / runner.Run("step", rate, seed).path
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"held_out": {"attribute_share": value}}))
    assert runner.tuned(tmp_path, "step", base) == 1e-3


def test_what_is_there_is_not_run_again_and_other_settings_are_refused(results):
    folder, shortest = results
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    lost = folder / runner.Run("step", 1e-3, 100).path
    lost.unlink()
    assert script("run.py", *shortest, "--results", str(folder), "--processes", "1").returncode == 0
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert {path for path in after if after[path] != before[path]} == {lost}
    other = script("run.py", *shortest[:-1], "16", "--results", str(folder))
    assert other.returncode == 2 and "made with another size" in other.stderr
    (folder / "base.json").write_text(
        json.dumps({**json.loads((folder / "base.json").read_text()), "size": vars(runner.Size(0.02, 8, 8))})
    )
    other = script("run.py", *shortest[:-3], "0.02", *shortest[-2:], "--results", str(folder))
    assert other.returncode == 2 and "made with other settings (rows)" in other.stderr


def test_the_page_is_made_from_the_results(results, tmp_path):
    folder, _ = results
    (tmp_path / "images").mkdir()
    text = (page.DOCS / "miniature.md").read_text(encoding="utf-8")
    (tmp_path / "miniature.md").write_text(text, encoding="utf-8")
    arguments = ("--results", str(folder), "--docs", str(tmp_path), "--seeds", "2")
    done = script("page.py", *arguments)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "miniature.md").read_text(encoding="utf-8")
    found = page.Results(folder, 2)
    step, weighted = (np.array(list(found.values(name).values())) for name in ("step", "weighted-steps"))
    assert f"| {np.mean(weighted - step):+.1f} (" in made
    assert f"2 of {len(miniature.ARMS)} arms are run, 16 runs" in made
    base = 100 * json.loads((folder / "base.json").read_text())["held_out"]["attribute_share"]
    assert f"| {np.mean(step):.1f} | {np.mean(step) - base:+.1f} (" in made
    assert (tmp_path / "images" / "miniature_2.png").stat().st_size > 1000
    assert script("page.py", *arguments, "--check").returncode == 0
    (tmp_path / "miniature.md").write_text(made.replace("16 runs", "17 runs"), encoding="utf-8")
    assert script("page.py", *arguments, "--check").returncode == 1


def test_the_page_says_what_the_kept_results_say():
    assert script("page.py", "--check").returncode == 0


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 7, 2.36462), (0.975, 30, 2.04227), (0.8, 7, 0.89603),
        (0.8, 1, 1.37638), (0.95, 10, 1.81246),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(probability, degrees, expected):
    assert page.student_quantile(probability, degrees) == pytest.approx(expected, rel=3e-6)


def test_intervals_hold_what_they_promise():
    """By simulation: 95 % hold the mean, and an effect of the size that is told is seen in about 80 %."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(1, 2, (4000, 8))
    half = page.student_quantile(0.975, 7) * drawn.std(1, ddof=1) / 8**0.5
    assert (abs(drawn.mean(1) - 1) <= half).mean() == pytest.approx(0.95, abs=0.01)
    mean, half_of_first, missed = page.student(drawn[0])
    assert (mean, half_of_first) == pytest.approx((drawn[0].mean(), half[0]))
    shifted = generator.normal(missed, drawn[0].std(ddof=1), (4000, 8))
    assert (
        page.student_quantile(0.975, 7) * shifted.std(1, ddof=1) / 8**0.5 < shifted.mean(1)
    ).mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.2, 0.9], "holds here"),
        ([-1.0, -1.2, -0.9], "**contradicted here**"),
        # A standard error of 0.717, times 4.303 and 1.061.
        ([1.0, -1.2, 0.9], "not seen here; 3.8 would have been"),
        ([0.0, 0.0, 0.0], "no difference in any run"),
    ],
)
def test_verdicts(differences, expected):
    assert page.verdict(np.array(differences)).startswith(expected)


def test_the_layout_is_what_the_base_model_gives(tmp_path):
    arm = miniature.grpo(chunk_sizes="temporal", num_chunks=len(miniature.LAYOUT), min_chunk_size=1)
    trainer = runner.make_trainer(arm, output_dir=str(tmp_path), seed=0, max_steps=1)
    trainer.train()
    assert trainer.chunk_sizes == miniature.LAYOUT


def test_every_arm_answers_a_question_and_its_settings_are_taken(tmp_path):
    from trl_diffusion import ChunkGRPOConfig, SRPOConfig

    assert {name for question in miniature.QUESTIONS for name in question.arms} == set(miniature.ARMS)
    for arm in miniature.ARMS.values():
        config = SRPOConfig if arm.method == "srpo" else ChunkGRPOConfig
        for rate in arm.learning_rates:
            config(output_dir=str(tmp_path), learning_rate=rate, **runner.settings_of(arm))


def test_arms_with_several_updates_differ_in_the_ratio_alone(tmp_path):
    """Both of a pair train the same steps in every generation, singly or as one chunk."""
    from trl_diffusion import ChunkGRPOConfig

    (question,) = (question for question in miniature.QUESTIONS if question.number == 4)
    assert len(question.comparisons) == 6
    for comparison in question.comparisons:
        trained, others = [], []
        for name in (comparison.arm, comparison.against):
            settings = runner.settings_of(miniature.ARMS[name])
            size = int(settings.pop("chunk_sizes").removeprefix("equal:"))
            chunks = chunk_steps(equal_chunk_sizes(miniature.STEPS - 1, size))
            trained.append(sorted(step for chunk in settings.pop("chunk_sampling") for step in chunks[chunk]))
            others.append(settings)
        assert trained == [[0, 1, 2], [0, 1, 2]] and others[0] == others[1]
        settings = runner.settings_of(miniature.ARMS[comparison.arm])
        config = ChunkGRPOConfig(output_dir=str(tmp_path), **settings)
        assert f"{config.trust_region}-{config.steps_per_generation}" == comparison.arm.removeprefix("chunk-")


def test_what_style_costs_is_drawn_from_the_kept_results():
    """By hand from the files: a point a learning rate, means over all seeds that were run with it."""
    found, figure = page.Results(page.RESULTS), Figure()
    (question,) = (question for question in miniature.QUESTIONS if question.number == 5)
    axes = figure.subplots()
    page.plot_cost(axes, found, question)
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert set(lines) == {"base", *question.arms}
    base = found.base["held_out"]
    assert lines["base"] == pytest.approx(np.array([[0, 100 * base["attribute_share"]]]))
    for name in question.arms:
        assert len(lines[name]) == 3
        for point, rate in zip(lines[name], miniature.ARMS[name].learning_rates, strict=True):
            paths = (page.RESULTS / name).glob(f"lr{rate:g}-seed*.json")
            runs = [json.loads(path.read_text())["held_out"] for path in paths]
            assert len(runs) == (10 if rate == found.rates[name] else 2)
            ways = [
                (run[m] - base[m]) / (found.base["reference"][m] - base[m])
                for run in runs
                for m in ("contrast", "sharpness")
            ]
            assert point == pytest.approx(
                100 * np.array([np.mean(ways), np.mean([r["attribute_share"] for r in runs])])
            )


def write_curves(folder, name, curves):
    """
    One file a seed, with the (rows, seconds, judged, trained reward) of its curve, and a tenth more of the judge at the end;
    those of the tuning seeds besides.
    """
    rates = miniature.ARMS[name].learning_rates
    runs = [(rate, seed, curves[0]) for rate in rates for seed in miniature.TUNING_SEEDS]
    for rate, seed, curve in [*runs, *((rates[0], seed, curve) for seed, curve in enumerate(curves))]:
        keys = ("rows", "seconds", "attribute_share", "shapes-clip")
        points = [dict(zip(keys, point, strict=True)) for point in curve]
        path = folder / runner.Run(name, rate, seed).path
        path.parent.mkdir(exist_ok=True)
        # The images at the end are others than those of the curve.
        held_out = {**points[-1], "attribute_share": points[-1]["attribute_share"] + 0.1}
        path.write_text(json.dumps({"curve": points, "held_out": held_out, "hybrids": {}}))


def around(first, second):
    """The mean of two seeds, with its interval."""
    mean, half = (first + second) / 2, 12.7062 * abs(first - second) / 2
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def test_how_many_times_less_compute_is_told_from_where_curves_cross(tmp_path):
    """
    By hand, from a base of 0.5. GRPO ends at 0.7 after 200 rows and 100 s with both seeds. The first seed of the other is
    there in the middle of its first 100 rows and 10 s, the second at the end of them: 4 and 2 times fewer rows, 20 and 10
    times fewer seconds. In logarithms the mean is that of sqrt(8) and sqrt(200), and the two lie half of ln 2 from it, so
    that the interval is 12.7062 / sqrt(2) of sqrt(2) ln(2) / 2 wide on each side.
    """
    (question,) = (question for question in miniature.QUESTIONS if question.number == 6)
    level = {"attribute_share": 0.5, "shapes-clip": 0.4}
    drawn = {"attribute_share": 1.0, "shapes-clip": 0.9}
    (tmp_path / "base.json").write_text(json.dumps({"held_out": level, "curve": level, "reference": drawn}))
    write_curves(tmp_path, "grpo-on-clip", [[(100, 50, 0.6, 0.5), (200, 100, 0.7, 0.6)]] * 2)
    write_curves(tmp_path, "direct-align", [[(100, 10, 0.9, 0.7)], [(100, 10, 0.7, 0.8)]])
    write_curves(tmp_path, "refl", [[(100, 10, 0.6, 0.7)], [(100, 10, 0.8, 0.8)]])
    found = page.Results(tmp_path, 2)
    wide = np.exp(12.7062 * np.log(2) / 2)
    rows, seconds = (f"{x:.1f} ({x / wide:.1f} to {x * wide:.1f})" for x in (8**0.5, 200**0.5))
    # The line rises by one point of the judge a hundredth of the reward.
    assert page.reward_table(found, question)[2:] == [
        "| `grpo-on-clip` |  |  |  | +10.0 (+10.0 to +10.0) |",
        f"| `refl` | 1 of 2 |  |  | {around(-10, 0)} |",
        f"| `direct-align` | 2 of 2 | {rows} | {seconds} | {around(20, -10)} |",
    ]
    axes = Figure().subplots()
    page.plot_reward(axes, found, question)
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert lines["direct-align"] == pytest.approx(np.array([[0.4, 50], [0.75, 80]]))
    assert lines["to freshly drawn pictures"] == pytest.approx(np.array([[0.4, 50], [0.9, 100]]))


def test_the_third_panel_shows_what_was_paid_or_cheated():
    panels = {question.number: page.third_panel(question) for question in miniature.QUESTIONS}
    shown = {number: panel for number, panel in panels.items() if panel is not None}
    assert shown == {5: page.plot_cost, 6: page.plot_reward}
    (question,) = (question for question in miniature.QUESTIONS if question.number == 6)
    axes = Figure().subplots()
    page.plot_reward(axes, page.Results(page.RESULTS), question)
    labels = {line.get_label() for line in axes.get_lines()}
    assert labels == {"to freshly drawn pictures", *question.arms, "relative"}


def test_how_often_a_bound_acts_is_told_by_the_update():
    done = script("bounds.py", "step-clip-2", "chunk-kl-4", "--rows", "0.1")
    assert done.returncode == 0, done.stderr
    shares = [line.split() for line in done.stdout.splitlines() if line.startswith(("step-", "chunk-"))]
    assert [(name, len(of_updates)) for name, *of_updates in shares] == [("step-clip-2", 2), ("chunk-kl-4", 4)]
    for _, first, *others in shares:
        # The first update of a generation is on-policy: its ratios are 1.
        assert first == "0.0%" and all(0 < float(share.rstrip("%")) < 100 for share in others)


def test_curves_can_be_told_apart():
    for question in miniature.QUESTIONS:
        looks = page.line_styles(question)
        assert list(looks) and set(looks) == set(question.arms)
        assert len({tuple(look.items()) for look in looks.values()}) == len(looks)
        assert {look["color"] for look in looks.values()} <= {f"C{place}" for place in range(10)}  # then they repeat
    looks = page.line_styles(miniature.QUESTIONS[3])
    assert looks["chunk-kl-4"] == {"color": "C4", "linestyle": "-"}
    assert looks["step-kl-4"] == {"color": "C4", "linestyle": "--"}


def test_a_curve_that_never_rises_to_a_level_has_no_place():
    assert page.reached([(0, 1.0), (10, 3.0), (20, 2.0)], 2.0) == 5
    assert page.reached([(0, 1.0), (10, 3.0), (20, 2.0)], 3.5) is None
    assert page.reached([(0, 1.0), (10, 3.0)], 0.5) is None


def test_a_comparison_of_another_measure_says_so():
    labels = [page.label(comparison) for question in miniature.QUESTIONS for comparison in question.comparisons]
    assert len(set(labels)) == len(labels) and "relative\n- low-noise\n(attribute_share)" in labels


def test_steps_drawn_singly_weigh_on_average_as_in_chunks():
    """Over all draws: a chunk of `LAYOUT`, or half of the steps with the weights of the control."""
    layout = miniature.LAYOUT
    size_of = [size for size in layout for _ in range(size)]
    in_chunks = [1 / (len(layout) * size) for size in size_of]  # drawn once in K generations, 1 / size each
    draws = list(itertools.combinations(range(len(size_of)), len(size_of) // 2))
    singly = [0.0] * len(size_of)
    for draw in draws:
        for step in draw:
            singly[step] += 1 / runner.single_divisor(step) / len(draws)
    assert singly == pytest.approx(in_chunks, rel=1e-12)
