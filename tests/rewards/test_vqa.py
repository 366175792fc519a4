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

"""P("Yes") of a tiny LLaVA, against a forward written out here."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trl_diffusion.rewards import reward_name, score_images
from trl_diffusion.rewards.vqa import VQAReward


WORDS = ["<pad>", "<unk>", "<image>", "<end>", "Yes", "No", "a", "cat", "dog", "Is", "it", "?", "USER", "ASSISTANT"]
TEMPLATE = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT{% endif %}"
)
QUESTION = "Is it a {prompt} ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            extra_special_tokens=["<image>", "<end>"],
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
                text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), bos_token_id=None, eos_token_id=3),
                image_token_index=2,
            )
        )
        model.lm_head.weight.data.mul_(20)  # probabilities away from uniform
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures():
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8)) for i in range(3)]


def test_probability_of_yes(folder, pictures):
    reward = VQAReward(folder, question=QUESTION)
    assert reward_name(reward) == "vqa"
    prompts = ["cat", "dog dog dog", "<image> cat <end>"]
    ours = reward(pictures, prompts)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for picture, words, score in zip(pictures, (["cat"], ["dog"] * 3, ["cat"]), ours, strict=True):
        # 28 / 14 squared patches; special tokens of the prompt are gone
        text = ["USER", *["<image>"] * 4, "Is", "it", "a", *words, "?", "ASSISTANT"]
        pixels = torch.as_tensor(np.array(processor(picture)["pixel_values"]))
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[WORDS.index(word) for word in text]]), pixel_values=pixels)
        assert score == pytest.approx(output.logits[0, -1].softmax(-1)[WORDS.index("Yes")].item(), abs=1e-5)
    assert len({round(score, 4) for score in ours}) == 3


def test_batches_and_the_answer(folder, pictures):
    reward = VQAReward(folder, question=QUESTION)
    together = reward(pictures, ["cat", "dog", "cat cat"])
    apart = VQAReward(folder, question=QUESTION, reward_batch_size=1)(pictures, ["cat", "dog", "cat cat"])
    assert together == pytest.approx(apart, abs=1e-5)
    no = VQAReward(folder, question=QUESTION, answer="No")(pictures, ["cat", "dog", "cat cat"])
    assert no != pytest.approx(together, abs=1e-5)
    images = torch.rand(2, 3, 28, 28)
    assert score_images(reward, images, ["cat", "dog"]).shape == (2,)


def test_bad_input(folder):
    with pytest.raises(ValueError, match="must hold the words {prompt}"):
        VQAReward(folder, question="Is it good?")
    with pytest.raises(ValueError, match="answer 'Yes a' has 2 tokens"):
        VQAReward(folder, answer="Yes a")
    with pytest.raises(ValueError, match="processor of 'nobody/nothing' could not be loaded"):
        VQAReward("nobody/nothing")
