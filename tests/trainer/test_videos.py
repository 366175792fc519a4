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

"""Trainers of videos: what is scored, what is shown, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from tiny_models import tiny_flux_pipeline, tiny_wan_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.cli.main import main
from trl_diffusion.data.videos import load_video
from trl_diffusion.rewards import RewardModel, VideoRewardModel


PROMPTS = ["a cat", "a dog on a hill in the rain"]
SIZE = {"height": 16, "width": 32, "num_frames": 9}


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Steadiness(VideoRewardModel):
    name = "steadiness"

    def score(self, videos, prompts):
        return 1 - videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def longest(images, prompts):
    return [float(len(video)) for video in images]


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        **SIZE,
        "num_inference_steps": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 5e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def grpo(folder, rewards, model=None, dataset=None, **changes):
    config = ChunkGRPOConfig(**settings(folder, num_generations=2, chunk_sizes=[1, 2], **changes))
    dataset = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    return ChunkGRPOTrainer(tiny_wan_pipeline() if model is None else model, rewards, config, dataset)


def srpo(folder, rewards, dataset=None, **changes):
    config = SRPOConfig(**settings(folder, **changes))
    dataset = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    return SRPOTrainer(tiny_wan_pipeline(), rewards, config, dataset)


@pytest.mark.parametrize("reduction", ["mean", "first", "min"])
def test_the_reward_is_that_of_the_frames(tmp_path, reduction):
    trainer = grpo(tmp_path, [Brightness(), Steadiness(), longest], frame_reduction=reduction)
    (batch,) = trainer.make_micro_batches([{"prompt": PROMPTS[0]}] * 2, 0)
    assert batch.clean.shape == (2, 4, 3, 2, 4)
    videos = trainer.decode(batch.clean)
    assert videos.shape == (2, 9, 3, 16, 32)
    frames = videos.mean(dim=(2, 3, 4))
    expected = {"mean": frames.mean(1), "first": frames[:, 0], "min": frames.amin(1)}[reduction]
    torch.testing.assert_close(batch.scores[:, 0], expected)
    torch.testing.assert_close(batch.scores[:, 1], 1 - (videos[:, 1:] - videos[:, :-1]).abs().mean(dim=(1, 2, 3, 4)))
    assert batch.scores[:, 2].tolist() == [9, 9]


def test_srpo_trains_a_reward_of_videos(tmp_path):
    trainer = srpo(tmp_path, [Brightness(), Steadiness()], frame_reduction="min", sigma_range=[0.5, 0.95])
    trainer.train()
    log = trainer.state.log_history[0]
    assert np.isfinite(log["denoise/steadiness/positive"]) and log["grad_norm"] > 0


@pytest.mark.parametrize("make", [grpo, srpo])
def test_samples_are_pictures_that_move_beside_contact_sheets(make, tmp_path):
    trainer = make(tmp_path, Brightness(), num_samples_to_log=2, report_to="tensorboard")
    trainer.train()
    folder = tmp_path / "samples" / "step_000001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "000.webp", "000_sheet.png", "001.webp", "001_sheet.png", "metadata.jsonl"
    ]  # fmt: skip
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [record["file_name"] for record in records] == ["000.webp", "001.webp"]
    for record in records:
        video = np.stack(load_video(folder / record["file_name"]))
        assert video.shape == (9, 16, 32, 3)
        assert video.mean() / 255 == pytest.approx(record["brightness"], abs=0.02)
        sheet = Image.open(folder / record["file_name"].replace(".webp", "_sheet.png"))
        assert sheet.size == (3 * 32, 3 * 16)
        assert np.asarray(sheet).mean() / 255 == pytest.approx(record["brightness"], abs=0.005)
    assert load_dataset("imagefolder", data_dir=str(folder), split="train")[0]["image"].size == (32, 16)


def test_the_card_is_of_videos(tmp_path):
    trainer = grpo(tmp_path, Brightness(), frame_reduction="min")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-video" in card and "- text-to-video" in card and "text-to-image" not in card
    assert "\n    num_frames=9,\n" in card and ").frames[0]" in card and "export_to_video(video" in card
    assert "| num\\_frames | 9 |" in card and "| frame\\_reduction | min |" in card
    assert re.search(r"url: samples/step_000001/000\.webp", card)
    samples = trainer._results_for_card(with_metrics=False)["samples"]
    assert list(samples) == ["samples/gallery/000.webp", "samples/gallery/001.webp"]
    assert len(load_video(tmp_path / "samples" / "gallery" / "001.webp")) == 9


def test_the_card_of_images_says_nothing_of_frames(tmp_path):
    trainer = grpo(tmp_path, Brightness(), tiny_flux_pipeline(), num_frames=None)
    trainer.save_model()
    assert "frame" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_run_resumes_within_a_generation_to_the_same_weights(tmp_path):
    def trained(folder, **changes):
        trainer = grpo(
            folder, [Brightness(), longest], max_steps=3, steps_per_generation=4, gradient_accumulation_steps=1,
            rollout_batch_size=2, overlap_rewards=True, log_samples=False, save_strategy="steps", save_steps=1,
            dataset=Dataset.from_dict({"prompt": [*PROMPTS, "rain", "a fish"]}),
        )  # fmt: skip
        trainer.train(**changes)
        return {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_evaluation_compares_videos(tmp_path):
    trainer = grpo(tmp_path, Brightness(), num_eval_images=3)
    scores = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
    videos = trainer.generate([*PROMPTS, PROMPTS[0]], range(3))
    assert scores["eval_rewards/brightness/mean"] == pytest.approx(videos.mean().item(), abs=1e-5)
    assert scores["eval_win_rate/reward"] == 0.5  # the adapter does nothing yet


def test_the_command_reads_a_video_again_and_reports_it(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny_wan_pipeline().save_pretrained(base)
    trainer = grpo(tmp_path / "run", Brightness(), str(base))
    trainer.train()
    trainer.save_model()
    (tmp_path / "my_rewards.py").write_text(
        "def longest(images, prompts):\n    return [len(video) for video in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [
        "evaluate", "--model_name_or_path", base, "--adapter", tmp_path / "run", "--prompts", tmp_path / "prompts.txt",
        "--rewards", "my_rewards.longest", "--output_dir", tmp_path / "report", "--height", 16, "--width", 32,
        "--num_frames", 9, "--num_inference_steps", 2,
    ]  # fmt: skip
    assert main([*map(str, arguments)]) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["settings"]["num_frames"] == 9
    assert results["rewards"]["longest"]["base"]["mean"] == 9
    files = sorted((tmp_path / "report" / "images").rglob("*.webp"))
    assert len(files) == 4
    written = [file.stat().st_mtime_ns for file in files]
    assert main([*map(str, arguments)]) == 0
    assert [file.stat().st_mtime_ns for file in files] == written  # not drawn again
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="sheet"') == 4 and page.count("data:image/webp;base64,") == 8


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_frames=10 is not possible with this WanPipeline.* Nearest: 9 and 13"):
        grpo(tmp_path, Brightness(), num_frames=10)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        grpo(tmp_path, Brightness(), num_frames=0)
    with pytest.raises(ValueError, match="frame_reduction must be one of 'mean', 'first', 'min', got 'max'"):
        grpo(tmp_path, Brightness(), frame_reduction="max")
    with pytest.raises(ValueError, match="num_frames=9 does not fit a FluxPipeline, which makes images"):
        grpo(tmp_path, Brightness(), tiny_flux_pipeline())
    images = {"model": tiny_flux_pipeline(), "num_frames": None}
    with pytest.raises(
        ValueError, match="frame_reduction='min' has no effect with a FluxPipeline, which makes images"
    ):
        grpo(tmp_path, Brightness(), frame_reduction="min", **images)
    with pytest.raises(ValueError, match="'steadiness' is a VideoRewardModel, .* and a FluxPipeline makes images"):
        grpo(tmp_path, Steadiness(), **images)
    pictures = Dataset.from_dict(
        {"prompt": PROMPTS, "image": [Image.new("RGB", (32, 16))] * 2},
        features=Features({"prompt": Value("string"), "image": ImageFeature()}),
    )
    with pytest.raises(ValueError, match="a column 'image', and a WanPipeline makes videos. Remove the column"):
        srpo(tmp_path, Brightness(), pictures)


def test_commands_refuse_frames_that_do_not_fit(tmp_path, capsys):
    base = tmp_path / "base"
    tiny_wan_pipeline().save_pretrained(base)
    for model, message in ((base, "Nearest: 9 and 13"), ("shapes", "which makes images")):
        with pytest.raises(SystemExit):
            main(["generate", "--model_name_or_path", str(model), "--prompt", "a", "--num_frames", "10",
                  "--output_dir", str(tmp_path / "images")])  # fmt: skip
        assert message in capsys.readouterr().err
