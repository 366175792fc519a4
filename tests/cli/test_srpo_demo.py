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

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from trl_diffusion import shapes
from trl_diffusion.cli import demo_run
from trl_diffusion.cli.demo_srpo import SRPODemo
from trl_diffusion.cli.main import main


def run(folder, *options):
    status = main(
        ["demo", "srpo", "--max_steps", "5", "--num_eval_images", "36", "--output_dir", str(folder), *options]
    )
    assert status == 0
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def relative(tmp_path_factory):
    folder = tmp_path_factory.mktemp("srpo") / "out"
    return folder, run(folder)


def test_short_demo_writes_everything(relative):
    folder, results = relative
    for name in (
        "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json", "README.md",
        "before_after.png", "reward.png",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    measures = {
        demo_run.MEASURE,
        demo_run.REWARD,
        demo_run.WATCHED,
        demo_run.PREFERENCE,
        "contrast",
        "sharpness",
        "color",
    }
    for column in ("base", "aligned", "change", "reference"):
        assert set(results[column]) >= measures
        for name, interval in results[column].items():
            assert interval["low"] <= interval["mean"] <= interval["high"], name
    assert results["seconds"] > 0 and results["images_per_second"] > 0 and results["max_steps"] == 5
    evaluated = [point["step"] for point in results["reward_curve"] if "objective" in point]
    assert evaluated == [0, 5]


def test_reference_is_freshly_drawn_sharp_pictures(relative):
    _, results = relative
    held_out = list(shapes.load_dataset("test")["prompt"])
    judged = shapes.judge(shapes.reference(held_out), held_out)
    for name in ("contrast", "sharpness", "all_attributes"):
        assert results["reference"][name]["mean"] == pytest.approx(judged[name].mean())
        assert results["reference"][name]["mean"] > results["base"][name]["mean"]


def test_card_shows_the_method_and_its_results(relative):
    folder, results = relative
    card = ModelCard.load(folder / "README.md")
    assert "srpo" in card.data.tags and "2509.06942" in card.text
    assert f"| contrast | {results['base']['contrast']['mean']:.4g} (" in card.text
    assert str(folder) not in card.text


def test_preference_is_that_of_the_control_words():
    prompts = list(shapes.load_dataset("test")["prompt"])
    measured = {
        style: SRPODemo().measure(shapes.reference(prompts, style), prompts)[demo_run.PREFERENCE].mean()
        for style in ("sharp", "blurred", "pale")
    }
    assert measured["sharp"] > max(measured["blurred"], measured["pale"])


def test_absolute_preference_trains_the_plain_prompt(tmp_path, capsys):
    results = run(
        tmp_path / "out", "--preference", "absolute", "--max_steps", "1", "--seed", "3", "--learning_rate", "1e-4"
    )
    printed = capsys.readouterr().out
    assert f"{demo_run.WATCHED} (trained)" in printed and f"{demo_run.REWARD} (watched)" in printed
    assert (results["seed"], results["learning_rate"]) == (3, 1e-4)


def test_remark_gives_shares_of_the_way():
    columns = {"base": 0.4, "aligned": 0.5, "reference": 0.8, "change": 0.1}
    results = {
        column: {name: {"mean": mean} for name in ("contrast", "sharpness", "all_attributes")}
        for column, mean in columns.items()
    }
    (remark,) = SRPODemo().remarks(results)
    assert "contrast went 25 % and sharpness went 25 %" in remark and "+10.0 points" in remark


def test_curve_and_its_picture(tmp_path):
    history = [
        {"step": 0, "eval_objective": 0.1, f"eval_watch/{demo_run.REWARD}/mean": 0.8, "eval_reward": 0.0},
        {"step": 1, "loss": 0.7, "reward": 0.3},
        {"step": 2, "loss": 0.6, "reward": 0.4},
        {"step": 2, "eval_objective": 0.2, f"eval_watch/{demo_run.REWARD}/mean": 0.7, "eval_reward": 0.0},
        {"step": 2, "train_runtime": 1.0},
    ]
    curve = SRPODemo().curve(history)
    assert curve == [
        {"step": 0, "objective": 0.1, demo_run.REWARD: 0.8},
        {"step": 1, "loss": 0.7, "reward": 0.3},
        {"step": 2, "loss": 0.6, "reward": 0.4, "objective": 0.2, demo_run.REWARD: 0.7},
    ]
    SRPODemo().plot(curve, tmp_path / "reward.png")
    with Image.open(tmp_path / "reward.png") as picture:
        assert len(np.unique(np.array(picture.convert("L")))) > 10


def test_preference_is_refused_for_the_other_demo(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "chunk_grpo", "--preference", "absolute"])
    assert exit_.value.code == 2
    assert "--preference absolute is for srpo" in capsys.readouterr().err
