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

"""The commands on models that edit images."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_flux_kontext_pipeline, tiny_flux_pipeline

from trl_diffusion.cli.main import main
from trl_diffusion.data.prompt_images import with_image
from trl_diffusion.models import Sampler, load_flow_model
from trl_diffusion.rewards import to_pil


SIZE = ["--height", "16", "--width", "24", "--num_inference_steps", "2"]
REWARD = """
import numpy as np


def difference(images, prompts, condition_image):
    return [float(np.asarray(a).mean() - np.asarray(b).mean()) for a, b in zip(images, condition_image)]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models, pictures and a file of edits, in which the commands do not run."""
    folder = tmp_path_factory.mktemp("world")
    tiny_flux_kontext_pipeline().save_pretrained(folder / "kontext")
    tiny_flux_pipeline().save_pretrained(folder / "flux")
    rows = []
    for i, (size, colour) in enumerate([((40, 21), "red"), ((33, 34), "blue")]):
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        rows.append({"prompt": "a cat", "condition_image": f"{i}.png"})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text("a cat\na dog")
    return folder


def drawn(world, prompts):
    sampler = Sampler.from_settings(load_flow_model(world / "kontext"), 2, 16, 24)
    return [to_pil(batch)[0] for batch in sampler.draw_images(prompts, range(len(prompts)))]


def generated(folder):
    return [Image.open(path) for path in sorted(folder.glob("0*.png"))]


def generate(world, folder, *arguments, model="kontext"):
    return main(
        [
            "generate",
            "--model_name_or_path",
            str(world / model),
            "--output_dir",
            str(folder),
            *SIZE,
            *map(str, arguments),
        ]
    )


def test_generate_takes_one_picture_or_those_of_the_prompts(world, tmp_path):
    image = world / "0.png"
    generate(world, tmp_path / "one", "--prompt", "a cat", "a dog", "--condition_image", image)
    generate(world, tmp_path / "file", "--prompts", world / "prompts.txt", "--condition_image", image)
    generate(world, tmp_path / "own", "--prompts", world / "edits.jsonl")
    same = drawn(world, [with_image("a cat", image), with_image("a dog", image)])
    own = drawn(world, [with_image("a cat", image), with_image("a cat", world / "1.png")])
    for folder, expected in (("one", same), ("file", same), ("own", own)):
        pictures = generated(tmp_path / folder)
        assert len(pictures) == 2
        assert all(np.array_equal(one, other) for one, other in zip(pictures, expected, strict=True))
    assert not np.array_equal(*own)
    records = (tmp_path / "own" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in records] == ["a cat", "a cat"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("kontext", ["--prompt", "a"], "edits images, and there is no condition_image"),
        ("flux", ["--prompt", "a", "--condition_image", "0.png"], "FluxPipeline draws from prompts alone"),
        ("kontext", ["--prompt", "a", "--condition_image", "9.png"], "9.png' is no file. Give the path of a picture"),
        ("kontext", ["--prompts", "edits.jsonl", "--condition_image", "0.png"], "images of its own in the column"),
        ("kontext", ["--prompt", "a", "--condition_image", "prompts.txt"], "condition_image of the prompt 'a' cannot"),
    ],
)
def test_what_does_not_fit_is_refused(world, tmp_path, capsys, monkeypatch, model, arguments, message):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit):
        generate(world, tmp_path, *arguments, model=model)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_training_and_its_evaluation(world, tmp_path, monkeypatch):
    """The reward compares with the picture that is edited; two edits with the same words are two edits."""
    (tmp_path / "edit_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    status = main(
        [
            "chunk_grpo", "--model_name_or_path", str(world / "kontext"), "--dataset_name", str(world / "edits.jsonl"),
            "--reward_funcs", "edit_reward.difference", "--output_dir", str(tmp_path / "out"), "--height", "16",
            "--width", "24", "--num_inference_steps", "4", "--chunk_sizes", "1", "2", "--num_generations", "2",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "2",
            "--learning_rate", "5e-2", "--lr_scheduler_type", "constant", "--use_cpu", "true", "--lora_r", "4",
        ]
    )  # fmt: skip
    assert status == 0
    arguments = [
        "evaluate", "--model_name_or_path", str(world / "kontext"), "--adapter", str(tmp_path / "out"), "--prompts",
        str(world / "edits.jsonl"), "--rewards", "edit_reward.difference", "--output_dir", str(tmp_path / "report"), *SIZE,
    ]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["num_prompts"] == results["num_images"] == 2
    images = [Image.open(tmp_path / "report" / row["files"]["base"]) for row in results["images"]]
    expected = drawn(world, [with_image("a cat", world / f"{i}.png") for i in range(2)])
    assert all(np.array_equal(one, other) for one, other in zip(images, expected, strict=True))
    for i, row in enumerate(results["images"]):
        source = Image.open(world / f"{i}.png")
        difference = float(np.asarray(images[i]).mean() - np.asarray(source).mean())
        assert row["scores"]["difference"]["base"] == pytest.approx(difference)
    # What is there is found again, and another picture is another image.
    before = sorted((tmp_path / "report" / "images" / "base").glob("*.png"))
    assert main(arguments) == 0
    assert sorted((tmp_path / "report" / "images" / "base").glob("*.png")) == before
