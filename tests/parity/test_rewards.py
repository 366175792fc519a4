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

"""Reward models against the official packages: scores to 1e-5, gradients to 1e-4 relative, from official key names."""

import pytest
import torch
from reward_folders import hpsv2_folder, hpsv3_folder, image_reward_folder
from safetensors.torch import load_file

from trl_diffusion.rewards import load_reward
from trl_diffusion.rewards.hpsv2 import preprocess


SCORE = {"rtol": 0, "atol": 1e-5}


def assert_same_gradient(ours: torch.Tensor, official: torch.Tensor) -> None:
    official = official.float()
    assert official.norm() > 0
    assert (ours - official).norm() / official.norm() < 1e-4


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def hpsv2(fixtures_dir, tmp_path_factory):
    folder = hpsv2_folder(tmp_path_factory.mktemp("hpsv2"), fixtures_dir)
    return load_reward(f"hpsv2:{folder}", dtype=torch.float32), load_file(fixtures_dir / "hpsv2/case.safetensors")


@pytest.fixture(scope="module")
def image_reward(fixtures_dir, tmp_path_factory):
    folder = image_reward_folder(tmp_path_factory.mktemp("image_reward"), fixtures_dir)
    case = load_file(fixtures_dir / "image_reward/case.safetensors")
    return load_reward(f"image_reward:{folder}", dtype=torch.float32), case


@pytest.fixture(scope="module")
def hpsv3(fixtures_dir, tmp_path_factory):
    folder = hpsv3_folder(tmp_path_factory.mktemp("hpsv3"), fixtures_dir)
    return load_reward(f"hpsv3:{folder}", dtype=torch.float32), load_file(fixtures_dir / "hpsv3/case.safetensors")


def hpsv2_texts(reward, input_ids):
    return unit(reward.model.get_text_features(input_ids).pooler_output)


def test_hpsv2_preprocessing(hpsv2):
    reward, case = hpsv2
    raw = [name for name in case if name.startswith("image_")]
    assert raw
    for name in raw:
        index = int(name.split("_")[1])
        image = case[name].permute(2, 0, 1)[None].float() / 255
        pixels = preprocess(image, case["pixel_values"].shape[-1])
        torch.testing.assert_close(pixels[0], case["pixel_values"][index], rtol=0, atol=1e-5)


def test_hpsv2_score_and_gradient(hpsv2):
    reward, case = hpsv2
    pixels = case["pixel_values"].float().requires_grad_()
    image = unit(reward.model.get_image_features(pixels).pooler_output)
    score = reward.score_features(image, hpsv2_texts(reward, case["input_ids"]))
    score.sum().backward()
    torch.testing.assert_close(score.detach(), case["score"], **SCORE)
    assert_same_gradient(pixels.grad, case["pixel_grad"])


def test_hpsv2_raw_images_to_score(hpsv2):
    reward, case = hpsv2
    texts = hpsv2_texts(reward, case["input_ids"])
    for name in (name for name in case if name.startswith("image_")):
        index = int(name.split("_")[1])
        features = reward.encode_images(case[name].permute(2, 0, 1)[None].float() / 255)
        torch.testing.assert_close(reward.score_features(features[0], texts[index]), case["score"][index], **SCORE)


def test_hpsv2_semantic_relative_preference(hpsv2):
    reward, case = hpsv2
    image = unit(reward.model.get_image_features(case["pixel_values"].float()).pooler_output)
    positive, negative = (hpsv2_texts(reward, case[name]) for name in ("input_ids", "negative_input_ids"))
    relative = reward.score_features(image, 1.2 * positive - negative)
    torch.testing.assert_close(relative, case["relative_score_k02"], **SCORE)


def test_image_reward(image_reward):
    reward, case = image_reward
    pixels = case["pixel_values"].float().requires_grad_()
    score = reward.score_encoded(pixels, case["input_ids"], case["attention_mask"])
    score.sum().backward()
    torch.testing.assert_close(score.detach(), case["score"], **SCORE)
    assert_same_gradient(pixels.grad, case["pixel_grad"])


def test_hpsv3(hpsv3):
    reward, case = hpsv3
    pixels = case["pixel_values"].float().requires_grad_()
    logits = reward.logits(case["input_ids"], case["attention_mask"], pixels, case["image_grid_thw"])
    logits[:, 0].sum().backward()
    torch.testing.assert_close(logits.detach(), case["logits"], **SCORE)
    torch.testing.assert_close(logits[:, 0].detach(), case["score"], **SCORE)
    assert_same_gradient(pixels.grad, case["pixel_grad"])
