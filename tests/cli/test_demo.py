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
import torch
from huggingface_hub import ModelCard
from PIL import Image

from trl_diffusion import shapes
from trl_diffusion.cli import demo_chunk_grpo, demo_run
from trl_diffusion.cli.main import main
from trl_diffusion.evaluation import compare
from trl_diffusion.metrics.win_rate import wilson_interval


@pytest.mark.parametrize("successes", [100, 256, 400])
def test_interval_of_a_proportion_is_near_wilsons(successes):
    values = np.zeros(512)
    values[:successes] = 1
    interval = demo_run.summarise([str(i) for i in range(512)], {"m": values}, {"m": values})["base"]["m"]
    assert interval["mean"] == successes / 512
    assert (interval["low"], interval["high"]) == pytest.approx(wilson_interval(successes / 512, 512), abs=0.005)


def test_images_of_a_prompt_are_not_independent():
    # Eight pictures of each of 64 prompts, all alike: they say what one picture a prompt says.
    values = np.random.default_rng(1).normal(3.0, 2.0, size=64)
    prompts = [str(index) for index in range(64)]
    once = demo_run.summarise(prompts, {"m": values}, {"m": values})["base"]["m"]
    eight = demo_run.summarise(prompts * 8, {"m": np.tile(values, 8)}, {"m": np.tile(values, 8)})["base"]["m"]
    half = 1.959964 * values.std(ddof=1) / 8
    assert once == pytest.approx({"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half})
    assert eight == pytest.approx(once)
    # The same as in an evaluation and, from there, on the cards.
    assert compare(np.tile(values, 8), {}, prompts * 8)["base"] == eight


def test_change_is_measured_in_pairs():
    base = np.random.default_rng(1).normal(size=200)
    summary = demo_run.summarise([str(i) for i in range(200)], {"m": base}, {"m": base + 0.25})
    assert summary["change"]["m"] == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
    assert summary["aligned"]["m"]["mean"] == pytest.approx(base.mean() + 0.25)


def test_table_shows_every_measure_with_its_unit():
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3}
    names = [demo_run.REWARD, demo_run.MEASURE, "contrast", demo_run.WATCHED]
    summary = {model: dict.fromkeys(names, interval) for model in ("base", "aligned", "change")}
    lines = demo_run.format_table(summary, {demo_run.WATCHED: "watched"}).splitlines()
    assert len(lines) == 6
    assert lines[3].split("  ")[0] == "all_attributes" and "+25.0 % (+20.0 to +30.0)" in lines[3]
    assert "0.250 (0.200 to 0.300)" in lines[4] and "%" not in lines[4]
    assert lines[5].startswith("shapes-clip (watched)  0.250")


def test_curve_and_pictures_are_written(tmp_path):
    curve = [{"step": step, "reward": 0.5, "reward_std": 0.1, demo_run.WATCHED: 0.3} for step in (1, 2, 3)]
    demo_chunk_grpo.plot_reward(curve, tmp_path / "reward.png")
    images = torch.rand(3, 3, 32, 32)
    demo_run.plot_before_after(images, images, ["a small red circle"] * 3, np.ones((2, 3)), tmp_path / "pictures.png")
    for name in ("reward.png", "pictures.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 400
            assert len(set(picture.convert("L").tobytes())) > 10  # something is drawn


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    status = main(["demo", "chunk_grpo", "--max_steps", "3", "--num_eval_images", "48", "--output_dir", str(folder)])
    assert status == 0
    return folder


def test_short_demo_writes_everything(short_demo):
    for name in (
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "before_after.png",
        "reward.png",
        "results.json",
    ):
        assert (short_demo / name).stat().st_size > 0, name
    results = json.loads((short_demo / "results.json").read_text())
    assert (
        set(results["base"])
        == set(results["aligned"])
        >= {demo_run.REWARD, demo_run.MEASURE, demo_run.WATCHED, "color"}
    )
    for model in ("base", "aligned"):
        for name, interval in results[model].items():
            assert interval["low"] <= interval["mean"] <= interval["high"], name
    assert results["seconds"] > 0 and results["images_per_second"] > 0
    assert [point["step"] for point in results["reward_curve"]] == [1, 2, 3]


def test_card_of_the_demo_shows_its_results(short_demo):
    card = ModelCard.load(short_demo / "README.md")
    results = json.loads((short_demo / "results.json").read_text())
    assert "chunk-grpo" in card.data.tags
    assert f"| all\\_attributes | {results['base'][demo_run.MEASURE]['mean']:.4g} (" in card.text
    assert "(before_after.png)" in card.text and str(short_demo) not in card.text


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_plain_pipeline_draws_what_the_demo_measured(short_demo, model):
    pipeline = shapes.load_pipeline()
    if model == "aligned":
        pipeline.load_lora_weights(short_demo, weight_name="pytorch_lora_weights.safetensors")
    held_out = list(shapes.load_dataset("test")["prompt"])
    prompts = [held_out[index % len(held_out)] for index in range(48)]
    images = pipeline(
        prompts,
        height=32,
        width=32,
        num_inference_steps=demo_chunk_grpo.CONFIG["num_inference_steps"],
        guidance_scale=3.5,
        max_sequence_length=shapes.MAX_SEQUENCE_LENGTH,
        generator=[torch.Generator().manual_seed(seed) for seed in range(48)],
        output_type="pt",
    ).images
    measures = demo_run.measure(images, prompts)
    results = json.loads((short_demo / "results.json").read_text())
    for name in ("contrast", demo_run.WATCHED):  # continuous; a right attribute is yes or no, and may tip over
        assert measures[name].mean() == pytest.approx(results[model][name]["mean"], abs=1e-5), name
    assert measures[demo_run.REWARD].mean() == pytest.approx(results[model][demo_run.REWARD]["mean"], abs=0.02)
    assert abs(results["change"][demo_run.WATCHED]["mean"]) > 2e-5  # so the two models can be told apart
