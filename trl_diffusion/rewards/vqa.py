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

"""A vision-language model asked whether the image shows what the prompt says."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from .base import BlackBoxReward
from .checkpoints import load_transformers_model
from .hpsv3 import without_special_tokens


class VQAReward(nn.Module, BlackBoxReward):
    """
    P("Yes") as the first word of the answer of a vision-language model, among all words.

    Source: [VQAScore](https://huggingface.co/papers/2404.01291). A black box: the model's own processor works on 8-bit
    pictures, so there is no gradient.

    Args:
        location (`str` or `Path`, *optional*, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`):
            An image-text-to-text model of transformers with a chat template, on the Hub or in a folder. Its processor
            may need torchvision.
        dtype (`torch.dtype`, *optional*):
            Of the model. By default bfloat16 where there is a GPU that has it, else float32.
        reward_batch_size (`int`, *optional*):
            Images that are scored together; all of a call by default.
        question (`str`, *optional*):
            What is asked, with `{prompt}` in it.
        answer (`str`, *optional*, defaults to `"Yes"`):
            The answer whose probability is the score; must be one token.
        processor (`ProcessorMixin`, *optional*):
            Processor of the model; by default from where the model is.
        name (`str`, *optional*, defaults to `"vqa"`):
            Name in logs.

    Raises:
        `ValueError`: a model that cannot be loaded, a question without the prompt, an answer of several tokens.
    """

    official = "Qwen/Qwen2.5-VL-7B-Instruct"
    scores_frames = True

    def __init__(
        self,
        location: str | Path | None = None,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        question: str = 'Does this figure show "{prompt}"? Please answer yes or no.',
        answer: str = "Yes",
        processor: ProcessorMixin | None = None,
        name: str = "vqa",
    ):
        super().__init__()
        if "{prompt}" not in question:
            raise ValueError(
                f"The question must hold the words {{prompt}} where the prompt belongs, got {question!r}."
            )
        if dtype is None:
            has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            dtype = torch.bfloat16 if has_bf16 else torch.float32
        location = self.official if location is None else location
        if processor is None:
            try:
                processor = AutoProcessor.from_pretrained(location)
            except (ImportError, OSError, ValueError) as error:
                raise ValueError(
                    f"The processor of {str(location)!r} could not be loaded: {error} Check the name, the network and "
                    "that what it needs is installed, or give the processor."
                ) from error
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"  # the answer follows the last token
        tokens = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"The answer {answer!r} has {len(tokens)} tokens for this model, not one. Give another.")
        self.answer_token = tokens[0]
        self.model = load_transformers_model(AutoModelForImageTextToText, [], location, dtype)
        self.requires_grad_(False).eval()
        self.reward_batch_size = reward_batch_size
        self.question = question
        self.name = name

    @torch.no_grad()
    def forward(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        """
        Args:
            images (`list[PIL.Image]`): pictures.
            prompts (`list[str]`): one a picture.

        Returns:
            `list[float | None]`: probabilities, in [0, 1].
        """
        size = self.reward_batch_size or len(images)
        scores = []
        for start in range(0, len(images), size):
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image"},
                            {"type": "text", "text": self.question.replace("{prompt}", self._plain(prompt))},
                        ],
                    }
                ]
                for prompt in prompts[start : start + size]
            ]
            texts = [
                self.processor.apply_chat_template(conversation, add_generation_prompt=True)
                for conversation in conversations
            ]
            inputs = self.processor(
                images=images[start : start + size], text=texts, padding=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            scores += logits.softmax(dim=-1)[:, self.answer_token].tolist()
        return scores

    def _plain(self, prompt: str) -> str:
        return without_special_tokens(prompt, self.processor.tokenizer)
