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

"""Rewards of videos: frame by frame, or as a whole."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.metrics import load_metric
from trl_diffusion.rewards import BlackBoxReward, RewardModel, VideoRewardModel, score_images, score_pictures, to_pil
from trl_diffusion.rewards.frames import FRAMES_TOGETHER, reduce_frames
from trl_diffusion.rewards.ocr import OCRReward


VIDEOS = torch.rand(3, 5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["x", "yy", "zzz"]
OF_FRAMES = VIDEOS.mean(dim=(2, 3, 4))
REDUCED = {"mean": OF_FRAMES.mean(1), "first": OF_FRAMES[:, 0], "min": OF_FRAMES.min(1).values}


class Brightness(RewardModel):
    """Remembers how many images it got."""

    name = "brightness"

    def __init__(self):
        super().__init__()
        self.counts = []

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        self.counts.append(len(images))
        return images.mean(dim=(1, 2, 3))


class Steadiness(VideoRewardModel):
    name = "steadiness"

    def score(self, videos, prompts):
        return -videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("reduction", REDUCED)
def test_frames_are_scored_as_images_and_reduced(reduction):
    reward = Brightness()
    scores = score_images(reward, VIDEOS, PROMPTS, frame_reduction=reduction)
    torch.testing.assert_close(scores, REDUCED[reduction])
    assert sum(reward.counts) == (3 if reduction == "first" else 15)


def test_many_frames_are_scored_a_part_at_a_time():
    reward, video = Brightness(), torch.rand(2, 41, 3, 2, 2)
    torch.testing.assert_close(score_images(reward, video, ["a", "b"]), video.mean(dim=(1, 2, 3, 4)))
    assert sum(reward.counts) == 82 and max(reward.counts) == FRAMES_TOGETHER


def test_reductions_by_hand():
    nan = math.nan
    scores = torch.tensor([[1.0, 3.0, nan], [nan, nan, nan], [nan, 2.0, -1.0]], requires_grad=True)
    expected = {"mean": [2.0, nan, 0.5], "min": [1.0, nan, -1.0], "first": [1.0, nan, nan]}
    for reduction, values in expected.items():
        torch.testing.assert_close(reduce_frames(scores, reduction), torch.tensor(values), equal_nan=True)
    reduce_frames(scores[:1], "mean").sum().backward()
    assert scores.grad[0].tolist() == [0.5, 0.5, 0.0]
    with pytest.raises(ValueError, match="frame_reduction must be one of 'mean', 'first', 'min', got 'max'"):
        reduce_frames(scores, "max")


def test_a_video_reward_model_sees_whole_videos():
    scores = score_images(Steadiness(), VIDEOS, PROMPTS, frame_reduction="min")
    torch.testing.assert_close(scores, -(VIDEOS[:, 1:] - VIDEOS[:, :-1]).abs().flatten(1).mean(1))
    with pytest.raises(ValueError, match="'steadiness' is a VideoRewardModel, which scores videos, and these are im"):
        score_images(Steadiness(), VIDEOS[:, 0], PROMPTS)


def frame_differences(images, prompts, weight=(1, 1, 1)):
    assert [len(video) for video in images] == [5, 5, 5]
    assert all(isinstance(frame, Image.Image) and frame.size == (6, 4) for video in images for frame in video)
    arrays = [np.stack([np.asarray(frame, dtype=float) for frame in video]) for video in images]
    return [
        None if prompt == "yy" else each * np.abs(np.diff(array, axis=0)).mean()
        for array, prompt, each in zip(arrays, prompts, weight, strict=True)
    ]


@pytest.mark.parametrize("reward", [frame_differences, functools.partial(frame_differences)])
def test_a_function_gets_a_list_of_pictures_a_video(reward):
    scores = score_images(reward, VIDEOS, PROMPTS, {"weight": [1, 2, 3]})
    levels = (VIDEOS * 255).round()
    expected = torch.tensor([1, math.nan, 3]) * levels.diff(dim=1).abs().flatten(1).mean(1)
    torch.testing.assert_close(scores, expected, equal_nan=True)


class Whole(BlackBoxReward):
    def __call__(self, images, prompts):
        return [len(video) for video in images]


class Each(BlackBoxReward):
    scores_frames = True

    def __call__(self, images, prompts, offset):
        assert not any(isinstance(image, list) for image in images)
        return [float(np.asarray(image).mean()) / 255 + each for image, each in zip(images, offset, strict=True)]


def test_a_black_box_says_whether_it_scores_frames():
    assert score_images(Whole(), VIDEOS, PROMPTS).tolist() == [5, 5, 5]
    scores = score_images(Each(), VIDEOS, PROMPTS, {"offset": [10, 20, 30]}, "min")
    torch.testing.assert_close(scores, REDUCED["min"] + torch.tensor([10, 20, 30]), rtol=0, atol=1e-2)


def test_text_is_read_in_every_frame():
    texts = iter(["open", "oven", "open", "xxxx", "open", "pen"])
    reward = OCRReward(lambda images: [next(texts) for _ in images])
    prompts = ['a sign "open"', 'a sign "open"', "no text"]
    scores = score_images(reward, VIDEOS[:, :3], prompts)
    torch.testing.assert_close(scores, torch.tensor([2.75 / 3, 1.75 / 3, math.nan]), equal_nan=True)


def test_an_infinite_score_of_a_frame_is_refused():
    reward = Brightness()
    reward.score = lambda images, prompts: torch.full((len(images),), math.inf)
    with pytest.raises(ValueError, match="returned inf for the prompt 'x'. A score must be finite"):
        score_images(reward, VIDEOS, PROMPTS)


@pytest.mark.parametrize("reduction", REDUCED)
def test_videos_of_pictures_may_differ_in_size_and_length(reduction):
    other = torch.rand(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = [to_pil(VIDEOS)[0], to_pil(other)[0], to_pil(VIDEOS)[2]]
    scores = score_pictures(Brightness(), pictures, PROMPTS, frame_reduction=reduction)
    of_other = {"mean": other.mean(), "first": other[0, 0].mean(), "min": other.mean(dim=(0, 2, 3, 4)).min()}[
        reduction
    ]
    expected = [REDUCED[reduction][0], of_other, REDUCED[reduction][2]]
    assert scores == pytest.approx([float(each) for each in expected], abs=5e-3)


def test_a_metric_is_of_images():
    with pytest.raises(ValueError, match=r"images must be of shape \(B, 3, H, W\), got \(3, 5, 3, 4, 6\)"):
        load_metric(Brightness()).add_batch(images=VIDEOS, prompts=PROMPTS)
