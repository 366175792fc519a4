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

"""Every family of the table of `tests/models/test_families.py` from a folder through both trainers and the commands."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.cli.main import main
from trl_diffusion.data.videos import load_video
from trl_diffusion.models import Sampler, load_flow_model
from trl_diffusion.rewards import RewardModel

from ..models.test_families import FAMILIES, ONE_OF_EACH, PICTURES, Family, edited


PROMPTS = ["a cat", "a dog on a hill in the rain"]
NUM_STEPS = 4
REWARD = """
import numpy as np


def brightness(images, prompts, **columns):  # a video is a list of pictures
    return [float(np.stack(image).mean() if isinstance(image, list) else np.asarray(image).mean()) for image in images]
"""


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))  # of videos, frame by frame


@dataclass
class Run:
    """A family, its saved base model, and a trainer that has trained an adapter of it."""

    row: Family
    base: Path
    trainer: ChunkGRPOTrainer
    weights_before: dict[str, torch.Tensor]

    @property
    def prompts(self):
        """With the images that they edit, where the family does."""
        return edited(self.trainer.flow, PROMPTS)

    @property
    def folder(self):
        return Path(self.trainer.args.output_dir)

    def command(self, name, *arguments):
        arguments = ["--model_name_or_path", str(self.base), *map(str, arguments)]
        if name in ("generate", "evaluate"):
            arguments += ["--height", str(self.row.height), "--width", str(self.row.width)]
            arguments += ["--num_inference_steps", str(NUM_STEPS), "--guidance_scale", str(self.row.guidance_scale)]
            if self.row.num_frames is not None:
                arguments += ["--num_frames", str(self.row.num_frames)]
        assert main([name, *arguments]) == 0


def settings(row, folder):
    return {
        "output_dir": str(folder),
        "height": row.height,
        "width": row.width,
        "num_frames": row.num_frames,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": row.guidance_scale,
        "sigma_shift": None,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "log_samples": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def dataset(row):
    """Prompts, with the images that they edit where the family does."""
    images = {"condition_image": PICTURES} if row.model_class.takes_image else {}
    return Dataset.from_dict({"prompt": PROMPTS, **images})


def weights(trainer):
    """Copies of all weights of a trainer's pipeline and of its adapter, by name."""
    modules = {"network": trainer.network, "vae": trainer.flow.vae}
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def assert_only_the_adapter_changed(trainer, before):
    after = weights(trainer)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    trained = {f"network.{name}" for name, parameter in trainer.network.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained) and changed <= trained
    # The first matrix of an adapter gets no gradient while the second is zero. The last block of Stable Diffusion 3 makes
    # nothing of the queries of its text.
    assert len({name for name in trained if ".lora_B." in name} - changed) <= 1


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def run(request, tmp_path_factory):
    row = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    row.build(**row.arguments).save_pretrained(folder / "base")
    config = ChunkGRPOConfig(**settings(row, folder / "run"), max_steps=2, num_generations=2, chunk_sizes=[1, 2])
    trainer = ChunkGRPOTrainer(str(folder / "base"), Brightness(), config, dataset(row))
    before = weights(trainer)
    trainer.train()
    trainer.save_model()
    return Run(row, folder / "base", trainer, before)


def test_a_training_is_on_policy_and_changes_the_adapter_alone(run):
    assert_only_the_adapter_changed(run.trainer, run.weights_before)
    logs = [log for log in run.trainer.state.log_history if "ratio/mean" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["ratio/mean"] == 1.0 and log["log_ratio/abs_max"] == 0.0 and log["rollout_logp_gap"] < 1e-5


def test_srpo_changes_the_adapter_alone(run, tmp_path):
    config = SRPOConfig(**settings(run.row, tmp_path), max_steps=1, sigma_range=[0.5, 0.95])
    trainer = SRPOTrainer(str(run.base), Brightness(), config, dataset(run.row))
    before = weights(trainer)
    trainer.train()
    assert_only_the_adapter_changed(trainer, before)


def test_a_base_in_8_bits_trains(run, tmp_path):
    """Its weights are rounded and stay, the adapter changes, and the policy that samples is the one that trains."""
    pytest.importorskip("torchao", reason="needs the extra 'quantization'")
    config = ChunkGRPOConfig(
        **settings(run.row, tmp_path), max_steps=1, num_generations=2, chunk_sizes=[1, 2], quantization="int8"
    )
    trainer = ChunkGRPOTrainer(str(run.base), Brightness(), config, dataset(run.row))
    layers = {
        name: layer
        for name, layer in trainer.model.named_modules()
        if isinstance(layer, torch.nn.Linear) and type(layer.weight).__name__ == "Int8Tensor"
    }
    adapted = {name.partition(".lora_A")[0] for name, _ in trainer.model.named_modules() if name.endswith(".lora_A")}
    assert {f"{name}.base_layer" for name in adapted} <= layers.keys()
    before = {name: layer.weight.dequantize().clone() for name, layer in layers.items()}
    adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(torch.equal(layer.weight.dequantize(), before[name]) for name, layer in layers.items())
    unchanged = [
        name for name, p in trainer.model.named_parameters() if name in adapter and torch.equal(p, adapter[name])
    ]
    assert len([name for name in unchanged if ".lora_B." in name]) <= 1
    (log,) = [log for log in trainer.state.log_history if "ratio/mean" in log]
    assert log["ratio/mean"] == 1.0 and log["grad_norm"] > 0


def source_of_card(row, folder):
    """What to put in place of the path of the image that the example edits."""
    if not row.model_class.takes_image:
        return {}
    PICTURES[0].save(folder / "source.png")
    return {"path/or/url/of/an/image": str(folder / "source.png")}


def test_the_example_of_the_card_draws_what_the_trainer_draws(run, tmp_path):
    """`load_lora_weights` of the family's own pipeline, and its own call."""
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    for old, new in {
        "path/to/the/base/model": str(run.base),
        "path/to/this/folder": str(run.folder),
        "torch.bfloat16": "torch.float32",
        **source_of_card(run.row, tmp_path),
        'pipe.to("cuda")\n': "",
        **run.row.card,
        f").{run.row.results}": "    generator=torch.Generator().manual_seed(7),\n"
        f'    output_type="pt",\n).{run.row.results}',
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names = {"diffusers": diffusers}
    exec(code, names)
    assert type(names["pipe"]) is run.row.model_class.pipeline_class
    aligned, base = (run.trainer.generate(run.prompts[:1], [7], fraction)[0] for fraction in (1.0, 0.0))
    assert (aligned - base).abs().max() > 1e-3
    torch.testing.assert_close(names["image" if run.row.num_frames is None else "video"], aligned, rtol=0, atol=1e-5)
    for model in (run.row.undistilled_model, load_flow_model(run.base).distilled_model):
        assert model is None or f"https://huggingface.co/{model}" in card


def test_merged_it_draws_the_same(run, tmp_path):
    run.command("merge", "--adapter", run.folder, "--output_dir", tmp_path)
    sampler = Sampler.from_settings(
        load_flow_model(tmp_path),
        NUM_STEPS,
        run.row.height,
        run.row.width,
        run.row.guidance_scale,
        num_frames=run.row.num_frames,
    )
    (image,) = sampler.draw_images(run.prompts[:1], [7])
    torch.testing.assert_close(image, run.trainer.generate(run.prompts[:1], [7]), rtol=0, atol=2e-5)


def test_generate_and_evaluate(run, tmp_path, monkeypatch):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    if run.row.model_class.takes_image:
        for i, each in enumerate(rows):
            each["condition_image"] = f"{i}.png"  # beside the file
            PICTURES[i].save(tmp_path / f"{i}.png")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = tmp_path / "prompts.jsonl"
    run.command("generate", "--adapter", run.folder, "--prompts", prompts, "--output_dir", tmp_path / "images")
    for index, image in enumerate(run.trainer.generate(run.prompts, [0, 1])):
        if run.row.num_frames is None:
            drawn = np.asarray(Image.open(tmp_path / "images" / f"{index:05d}.png"), dtype=float) / 255
        else:
            drawn = np.stack(load_video(tmp_path / "images" / f"{index:05d}.webp")).astype(float) / 255
        assert drawn.shape[:-3] == image.shape[:-3]
        assert np.abs(drawn - image.movedim(-3, -1).numpy()).max() < 0.6 / 255
    assert (tmp_path / "images" / "grid.png").is_file()
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    run.command(
        "evaluate", "--adapter", run.folder, "--prompts", prompts, "--output_dir", tmp_path / "report",
        "--rewards", "my_reward.brightness",
    )  # fmt: skip
    (scores,) = json.loads((tmp_path / "report" / "results.json").read_text())["rewards"].values()
    means = [score["mean"] for score in scores.values()]
    assert len(means) == 2 and means[0] != means[1]


def test_export(run, tmp_path, capsys):
    output = tmp_path / "lora.safetensors"
    arguments = ["export", "--adapter", str(run.folder), "--output", str(output)]
    if run.row.comfyui:
        assert main(arguments) == 0 and output.is_file()
        return
    with pytest.raises(SystemExit):
        main(arguments)
    assert type(run.trainer.flow.denoiser).__name__ in capsys.readouterr().err and not output.exists()


def test_training_a_distilled_model_warns(run, tmp_path, caplog):
    config = SRPOConfig(**settings(run.row, tmp_path), max_steps=1)
    diffusers.utils.logging.enable_propagation()
    SRPOTrainer(str(run.base), Brightness(), config, dataset(run.row))
    warned = f"Better train {run.row.undistilled_model}, which it is distilled from" in caplog.text
    assert warned == (run.row.undistilled_model is not None)
