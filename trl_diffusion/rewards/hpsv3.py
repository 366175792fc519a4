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

"""HPSv3: a Qwen2-VL-7B that reads image and prompt and rates them, from `transformers.Qwen2VLModel`."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

from .checkpoints import build_and_load, find_file, load_tokenizer, read_sizes, read_weights
from .preprocessing import normalize, resize_like_pil
from .pretrained import PretrainedReward


OFFICIAL_SIZES = {
    "vision": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
        "rms_norm_eps": 1e-6,
    },
}
PIXELS = 256 * 28 * 28  # an image is resized to about as many
REWARD_TOKEN = "<|Reward|>"
# The model was trained on these very words and spaces; other ones move its scores. Source: MizzenAI/HPSv3, MIT
# licence.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 "
    "being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or "
    "adult material. If such content is present, the image quality and satisfaction score should be the lowest "
    "possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n\n\n"
)
QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"
# Qwen2-VL's chat template, for one image and one text, with the generation prompt.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE_TOKEN = "<|image_pad|>"


class HPSv3Reward(PretrainedReward):
    """
    HPSv3: the mean of the rating that a tuned Qwen2-VL-7B predicts, about 0 to 15.

    Source: [HPSv3](https://huggingface.co/papers/2508.03789), `MizzenAI/HPSv3`, file `HPSv3.safetensors`.

    Args:
        location (`str` or `Path`, *optional*):
            Folder with the official file, or a repository of the Hub that has it. A folder may hold a tokenizer and,
            for other sizes, a `config.json` with "vision" and "text" (arguments of `Qwen2VLVisionConfig` and
            `Qwen2VLTextConfig`, "rope_theta" and "mrope_section" among the latter).
        dtype (`torch.dtype`, *optional*):
            What the transformers compute in. By default bfloat16, as released, where there is a GPU that has it, else
            float32.
        reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "hpsv3"
    usual_range = (0.0, 15.0)
    official = "MizzenAI/HPSv3"
    official_file = "HPSv3.safetensors"
    official_tokenizer = "Qwen/Qwen2-VL-7B-Instruct"

    def __init__(
        self,
        location: str | Path | None = None,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        if dtype is None and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            dtype = torch.bfloat16
        super().__init__(dtype, reward_batch_size, scale)
        location = self.official if location is None else location
        path = find_file(location, self.official_file)
        self.tokenizer = load_tokenizer(PreTrainedTokenizerFast, location, self.official_tokenizer)
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.reward_token_id, image_token_id = self.tokenizer.convert_tokens_to_ids([REWARD_TOKEN, IMAGE_TOKEN])

        state = {
            key: weight.to(torch.float32 if key.startswith("rm_head.") else self.dtype)
            for key, weight in convert_hpsv3(read_weights(path)).items()
        }
        embedding = "model.language_model.embed_tokens.weight"
        if embedding not in state:
            raise ValueError(f"{path} has no 'model.embed_tokens.weight'; it is not the official file of HPSv3.")
        vocabulary = len(state[embedding])
        if max(self.reward_token_id, image_token_id) >= vocabulary:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but {path} has embeddings of {vocabulary}. Give the "
                f"tokenizer of {self.official_tokenizer!r}."
            )
        config = qwen2_vl_config(read_sizes(location, OFFICIAL_SIZES), vocabulary, image_token_id)
        # Casting the built model would cast its rotary frequencies as well, so the weights were cast instead.
        parts = build_and_load(
            lambda: nn.ModuleDict({"model": Qwen2VLModel(config), "rm_head": rating_head(config)}), state, path
        )
        self.model, self.rm_head = parts["model"], parts["rm_head"]
        self.freeze()

    def score_batch(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        vision = self.model.config.vision_config
        pixel_values, grid = patches(
            images, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, PIXELS
        )
        image_tokens = int(grid.prod()) // vision.spatial_merge_size**2
        tokens = self.tokenizer(
            [chat(without_special_tokens(prompt, self.tokenizer), image_tokens) for prompt in prompts],
            padding=True,
            return_tensors="pt",
        ).to(images.device)
        grids = grid.expand(len(images), 3).to(images.device)
        return self.logits(tokens.input_ids, tokens.attention_mask, pixel_values, grids)[:, 0]

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): tokens, padded on the right, one reward token each.
            attention_mask (`torch.Tensor` of shape `(B, L)`): 0 for padding.
            pixel_values (`torch.Tensor` of shape `(patches of all images, values of a patch)`): see [`patches`].
            image_grid_thw (`torch.Tensor` of shape `(B, 3)`): number of patches in time, height and width.

        Returns:
            `torch.Tensor` of shape `(B, 2)`, float32: mean and logarithm of the deviation of the rating.
        """
        batch, length = input_ids.shape
        # The model was trained with linear positions, not with Qwen2-VL's own of three dimensions.
        position_ids = torch.arange(length, device=input_ids.device).expand(3, batch, length)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=False,
        ).last_hidden_state
        return self.rm_head(hidden[input_ids == self.reward_token_id].float())


def rating_head(config: Qwen2VLConfig) -> nn.Sequential:
    """The head on the reward token's last hidden state, with the names of the official one."""
    return nn.Sequential(
        nn.Linear(config.text_config.hidden_size, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


def chat(prompt: str, image_tokens: int) -> str:
    """The conversation that the model rates, with a place for each token of the image."""
    return CHAT.format(image=IMAGE_TOKEN * image_tokens, text=INSTRUCTION.format(text_prompt=prompt) + QUESTION)


def without_special_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A user's text that cannot end its turn, place an image or ask for a second rating."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    before = None
    # Until nothing changes: what is left may have closed up to a token.
    while text != before:
        before = text
        for token in special:
            text = text.replace(token, "")
    return text


def smart_resize(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """
    Height and width in multiples of `factor`, of nearly the same aspect ratio and about `pixels` pixels, as Qwen2-VL's
    processor computes them with its least and its most number of pixels both `pixels`.

    Raises:
        `ValueError`: the sides differ by more than 200 times.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"HPSv3 takes images of an aspect ratio of at most 200, got {height} x {width}.")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    ratio = math.sqrt(pixels / (height * width))
    if sides[0] * sides[1] > pixels:
        sides = [max(factor, math.floor(side * ratio / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < pixels:
        sides = [math.ceil(side * ratio / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(
    images: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int, pixels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Images as Qwen2-VL's vision tower takes them; differentiable.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [0, 1].
        patch_size (`int`): side of a patch, in pixels.
        merge_size (`int`): side of a group of patches that becomes one token, in patches.
        temporal_patch_size (`int`): frames in a patch; the image is repeated.
        pixels (`int`): about the number of pixels to resize to.

    Returns:
        `torch.Tensor` of shape `(B * patches, 3 * temporal_patch_size * patch_size**2)`, float32, and
        `torch.Tensor` of shape `(3,)`: the number of patches in time, height and width of each image.
    """
    height, width = smart_resize(*images.shape[-2:], patch_size * merge_size, pixels)
    images = normalize(resize_like_pil(images, height, width))
    rows, columns = height // patch_size, width // patch_size
    grouped = images.reshape(
        len(images), 3, rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size
    )
    # image, group row, group column, row in it, column in it, channel, y, x; then time after the channel
    grouped = grouped.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = grouped.expand(*grouped.shape[:6], temporal_patch_size, *grouped.shape[7:])
    return (
        repeated.reshape(len(images) * rows * columns, 3 * temporal_patch_size * patch_size**2),
        torch.tensor([1, rows, columns]),
    )


def qwen2_vl_config(sizes: dict[str, Any], vocabulary: int, image_token_id: int) -> Qwen2VLConfig:
    """The configuration of a `Qwen2VLModel` of these sizes."""
    text = dict(sizes["text"]) | {"vocab_size": vocabulary}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("mrope_section"),
    }
    return Qwen2VLConfig(text_config=text, vision_config=sizes["vision"], image_token_id=image_token_id)


def convert_hpsv3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the official file under the names of the parts "model" and "rm_head"."""
    converted = {}
    for key, weight in state.items():
        if key.startswith("lm_head."):
            continue  # of the language model; no rating uses it
        if key.startswith("visual."):
            key = f"model.{key}"
        elif key.startswith("model."):
            key = f"model.language_model.{key.removeprefix('model.')}"
        converted[key] = weight
    return converted
