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

"""HPSv2's text side against open_clip's own tokenizer, whose answers are stored."""

import json
from pathlib import Path

import pytest
import torch
from reward_folders import hpsv2_folder
from tiny_models import clip_tokenizer
from transformers import CLIPTokenizer

from trl_diffusion.rewards import load_reward
from trl_diffusion.rewards.hpsv2 import clean_text, tokenize


@pytest.fixture(scope="module")
def golden():
    return json.loads((Path(__file__).parents[1] / "fixtures/hpsv2_tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The vocabulary of open_clip with fewer merges, in transformers: bytes, ends of words, merges, two marks."""
    merges = [tuple(merge.split()) for merge in golden["merges"]]
    # open_clip's order of bytes: printable ones first
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def test_tokens_are_those_of_open_clip(golden, tokenizer):
    ours = tokenize(tokenizer, golden["prompts"], 77)
    for prompt, row, official in zip(golden["prompts"], ours.tolist(), golden["tokens"], strict=True):
        assert row == official, prompt


def test_the_stored_prompts_are_awkward(golden):
    prompts = "".join(golden["prompts"])
    assert all(part in prompts for part in ("“", "’", "&amp;lt;", "ﬁ", "Ｆ", "Ã¶", "<|endoftext|>", "🎨"))
    assert "" in golden["prompts"]
    assert any(row[-1] != 0 for row in golden["tokens"])  # 77 tokens and more


def test_clean_text():
    assert clean_text("  “Caf&amp;eacute;”\n ＡＢ ﬁ ") == '"café" ab fi'


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = hpsv2_folder(tmp_path)
    clip_tokenizer(77).save_pretrained(folder)
    with pytest.raises(ValueError, match="ends texts with the token 1, the model in .* with 511"):
        load_reward(f"hpsv2:{folder}")


def test_raw_prompts_and_images_to_score(tmp_path):
    """The whole way, against the tokens written by hand and the features of the model."""
    reward = load_reward(f"hpsv2:{hpsv2_folder(tmp_path)}", dtype=torch.float32)
    ids = reward.tokenizer.convert_tokens_to_ids(["<|startoftext|>", "a</w>", "b", "c</w>", "<|endoftext|>"])
    tokens = torch.tensor([ids + [0] * 72])
    text = reward.model.get_text_features(tokens).pooler_output
    images = torch.rand(1, 3, 56, 56)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    mean, std = mean[:, None, None], std[:, None, None]
    image = reward.model.get_image_features((images - mean) / std).pooler_output
    expected = torch.nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(reward.score(images, [" A  BC"]), expected, rtol=0, atol=1e-6)
