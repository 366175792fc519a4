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

"""The commands that draw images, on the embedded world with an adapter that was never trained, only perturbed."""

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from trl_diffusion import shapes
from trl_diffusion.cli.main import main
from trl_diffusion.hub import save_adapter
from trl_diffusion.rewards import load_reward, score_pictures


STEPS = 3
SIZE = {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": shapes.MAX_SEQUENCE_LENGTH}
SHAPES = ["--model_name_or_path", "shapes", "--num_inference_steps", str(STEPS)]


OWN_REWARD = """
def redness(images, prompts, **columns):
    with open(__file__ + ".calls", "a") as calls:
        calls.write("x" * len(images))
    return [None if "blue" in p else image.getpixel((16, 16))[0] for image, p in zip(images, prompts, strict=True)]
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters, by name."""
    folders = {}
    for seed, name in enumerate(("first", "second")):
        pipeline = shapes.load_pipeline()
        torch.manual_seed(seed)  # of the LoRA's A; the suite sets its seeds later
        model = get_peft_model(pipeline.transformer, LoraConfig(r=4, target_modules=["to_q", "to_v"], lora_alpha=8))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, type(pipeline), folders[name])
    return folders


def pipeline_images(prompts, seeds, adapter=None):
    """What diffusers draws, one image at a time."""
    pipeline = shapes.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter), weight_name="pytorch_lora_weights.safetensors")
    return [
        np.asarray(pipeline(prompt, generator=torch.Generator().manual_seed(seed), **SIZE).images[0], dtype=int)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


class TestGenerate:
    @pytest.mark.parametrize("which", ["base", "aligned"])
    def test_draws_what_the_pipeline_draws(self, tmp_path, adapters, which):
        prompts = shapes.load_dataset("test")["prompt"][:2]
        arguments = [] if which == "base" else ["--adapter", str(adapters["first"])]
        output = tmp_path / "out"
        status = main(
            ["generate", *SHAPES, *arguments, "--prompt", *prompts, "--num_images_per_prompt", "2", "--seed", "5",
             "--batch_size", "3", "--output_dir", str(output)]
        )  # fmt: skip
        assert status == 0
        repeated = [prompt for prompt in prompts for _ in range(2)]
        expected = pipeline_images(repeated, range(5, 9), None if which == "base" else adapters["first"])
        for index, image in enumerate(expected):
            assert np.abs(read(output / f"{index:05d}.png") - image).max() <= 1
        grid = read(output / "grid.png")
        assert grid.shape == (64, 64, 3)
        assert np.array_equal(grid[32:, :32], read(output / "00002.png"))
        rows = load_dataset("imagefolder", data_dir=str(output), split="train")
        assert rows["prompt"][:] == repeated and rows["seed"][:] == [5, 6, 7, 8]

    def test_hybrid_switches_the_adapter_off(self, tmp_path, adapters):
        images = {}
        for fraction in ("0", "0.34", "1"):
            main(
                ["generate", *SHAPES, "--adapter", str(adapters["first"]), "--adapter_fraction", fraction, "--prompts",
                 "shapes", "--max_prompts", "1", "--output_dir", str(tmp_path / fraction)]
            )  # fmt: skip
            images[fraction] = read(tmp_path / fraction / "00000.png")
        (base,) = pipeline_images(shapes.load_dataset("test")["prompt"][:1], [0])
        assert np.abs(images["0"] - base).max() <= 1
        assert np.abs(images["0.34"] - base).max() > 1 and np.abs(images["0.34"] - images["1"]).max() > 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Give either --prompt"),
            (["--prompt", "a", "--prompts", "shapes"], "Give either --prompt"),
            (["--prompt", "a", "--adapter_fraction", "0.5"], "needs an --adapter"),
            (["--prompt", "a", "--adapter", "x", "--adapter_fraction", "1.5"], "must lie in [0, 1], got 1.5"),
            (["--prompt", "a", "--height", "33"], "height=33"),
            (["--prompt", "a", "--batch_size", "0"], "batch_size must be at least 1"),
            (
                ["--prompt", "a", "--negative_prompt", "b", "--guidance_scale", "1"],
                "negative_prompt='b' has no effect",
            ),
            (["--prompt", "a", "--negative_prompt", "b"], "negative_prompt='b' has no effect with a FluxPipeline"),
            (["--prompts", "no_such_file.txt"], "no_such_file.txt"),
            (["--prompt", "a", "--adaptor", "x"], "Did you mean --adapter?"),
        ],
    )
    def test_wrong_arguments_are_refused(self, capsys, monkeypatch, tmp_path, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exit_:
            main(["generate", *SHAPES, *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["generate", *SHAPES, "--prompt", "a"])
    assert "in one process, but was started in 2" in capsys.readouterr().err


def evaluate(folder, adapters, *arguments, names=("first", "second"), rewards=("shapes-judge", "shapes-clip")):
    return main(
        ["evaluate", *SHAPES, "--adapter", *[str(adapters[name]) for name in names], "--rewards", *rewards,
         "--prompts", "shapes", "--max_prompts", "6", "--batch_size", "4", "--output_dir", str(folder), *arguments]
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory, adapters):
    folder = tmp_path_factory.mktemp("evaluation")
    assert evaluate(folder, adapters) == 0
    return folder


class TestEvaluate:
    def test_images_are_those_of_the_pipelines(self, done, adapters):
        results = json.loads((done / "results.json").read_text())
        prompts = shapes.load_dataset("test")["prompt"][:6]
        assert [row["prompt"] for row in results["images"]] == prompts
        for model, adapter in {"base": None, **adapters}.items():
            expected = pipeline_images(prompts, range(6), adapter)
            for row, image in zip(results["images"], expected, strict=True):
                assert np.abs(read(done / row["files"][model]) - image).max() <= 1

    def test_scores_are_those_of_the_rewards(self, done):
        results = json.loads((done / "results.json").read_text())
        assert results["reward_specs"] == {"attribute_share": "shapes-judge", "shapes-clip": "shapes-clip"}
        prompts = [row["prompt"] for row in results["images"]]
        for name, spec in results["reward_specs"].items():
            for model in ("base", "first", "second"):
                pictures = [Image.open(done / row["files"][model]) for row in results["images"]]
                expected = score_pictures(load_reward(spec), pictures, prompts)
                assert [row["scores"][name][model] for row in results["images"]] == pytest.approx(expected, abs=1e-5)
                assert results["rewards"][name][model]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
            change = [row["scores"][name]["first"] - row["scores"][name]["base"] for row in results["images"]]
            assert results["rewards"][name]["first"]["change"]["mean"] == pytest.approx(np.mean(change), abs=1e-5)
            assert results["rewards"][name]["first"]["wins"] == sum(value > 0 for value in change)

    def test_table_and_page(self, done):
        table = (done / "results.md").read_text()
        assert len(table.splitlines()) == 2 + 4
        assert re.search(r"\| shapes-clip \| second \| [\d.]+ \([\d.]+ to [\d.]+\) \|", table)
        page = (done / "report.html").read_text(encoding="utf-8")
        assert page.count("<article") == 6 and page.count("<figure>") == 18

    def test_nothing_is_made_twice(self, done, adapters, tmp_path, capfd):
        folder = shutil.copytree(done, tmp_path / "copy")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
        assert len(before) == 18
        # Killed while drawing and scoring: some images and scores are missing, and one was being written.
        lost = sorted(before)[::7]
        for path in lost:
            path.unlink()
        lost[0].with_suffix(".part").write_bytes(b"\x89PNG")
        diffusers.utils.logging.enable_progress_bar()  # the demo, in the same process, switches it off
        assert evaluate(folder, adapters) == 0
        printed = capfd.readouterr().err
        assert "3/3" in printed and "Loading pipeline" in printed
        for path, time in before.items():
            assert (path.stat().st_mtime_ns == time) is (path not in lost), path
        first, again = (json.loads((place / "results.json").read_text()) for place in (done, folder))
        assert again["rewards"] == first["rewards"]
        # With everything there no model is loaded.
        assert evaluate(folder, adapters) == 0
        printed = capfd.readouterr().err
        assert "Drawing" not in printed and "Loading" not in printed and "Scoring shapes" not in printed

    def test_other_settings_and_adapters_make_other_images(self, done, adapters, tmp_path):
        folder = shutil.copytree(done, tmp_path / "copy")
        # The name of an adapter says nothing: its weights have changed.
        assert evaluate(folder, {"first": adapters["second"]}, "--adapter_names", "first", names=["first"]) == 0
        row = json.loads((folder / "results.json").read_text())["images"][0]
        old = json.loads((done / "results.json").read_text())["images"][0]
        assert row["files"]["base"] == old["files"]["base"] and row["files"]["first"] != old["files"]["first"]
        assert np.array_equal(read(folder / row["files"]["first"]), read(done / old["files"]["second"]))
        assert evaluate(folder, adapters, "--seed", "1", "--max_prompts", "1", names=["first"]) == 0
        assert len(list((folder / "images" / "base").glob("*.png"))) == 7

    def test_own_reward_is_asked_again_and_may_not_apply(self, done, adapters, tmp_path, monkeypatch):
        folder = shutil.copytree(done, tmp_path / "copy")
        (tmp_path / "my_reward.py").write_text(OWN_REWARD)
        monkeypatch.syspath_prepend(tmp_path)
        for _ in range(2):
            assert evaluate(folder, adapters, names=["first"], rewards=["my_reward.redness"]) == 0
        assert len((tmp_path / "my_reward.py.calls").read_text()) == 24
        results = json.loads((folder / "results.json").read_text())
        numbers = results["rewards"]["redness"]["first"]
        blue = sum("blue" in row["prompt"] for row in results["images"])
        assert numbers["wins"] + numbers["ties"] + numbers["losses"] == 6 - blue

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--adapter", "first", "--rewards", "hpsv9"], "Unknown reward 'hpsv9'"),
            (["--adapter", "first", "first", "--rewards", "shapes-judge"], "names must differ"),
            (["--adapter", "nowhere/base", "--rewards", "shapes-judge"], "from 'base'"),
            (["--adapter", "./nowhere", "--rewards", "shapes-judge"], "./nowhere"),
            (["--adapter", "first", "--rewards", "shapes-judge", "--confidence", "95"], "confidence"),
            (["--adapter", "first", "--rewards", "shapes-judge", "--adapter_names", "a", "b"], "2 names for 1"),
        ],
    )
    def test_wrong_arguments_are_refused(self, capsys, monkeypatch, tmp_path, adapters, arguments, message):
        monkeypatch.chdir(tmp_path)
        arguments = [str(adapters["first"]) if argument == "first" else argument for argument in arguments]
        with pytest.raises(SystemExit) as exit_:
            main(["evaluate", *SHAPES, "--prompts", "shapes", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
