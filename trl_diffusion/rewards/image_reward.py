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

"""ImageReward: BLIP's vision and text encoders with a head, from the parts of transformers."""

from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from .aesthetic import LinearHead
from .checkpoints import build_and_load, find_file, load_tokenizer, read_sizes, read_weights
from .preprocessing import clip_pixels
from .pretrained import PretrainedReward


# BLIP's ViT-L/16 and BERT-base with cross-attention (the official med_config.json).
OFFICIAL_SIZES = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "encoder_hidden_size": 1024,
        "max_position_embeddings": 512,
    },
}
MAX_TOKENS = 35
# Mean and deviation of the raw scores on the authors' data.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072


class ImageRewardReward(PretrainedReward):
    """
    ImageReward: how well people would like the image for the prompt, standardised, about -2 to 2.

    Source: [ImageReward](https://huggingface.co/papers/2304.05977), `THUDM/ImageReward`, file `ImageReward.pt`.

    Args:
        location (`str` or `Path`, *optional*):
            Folder with the official file, or a repository of the Hub that has it. A folder may hold a tokenizer and,
            for other sizes, a `config.json` with "vision" and "text" (arguments of `BlipVisionConfig` and
            `BlipTextConfig`). dtype, reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "image_reward"
    usual_range = (-2.0, 2.0)
    official = "THUDM/ImageReward"
    official_file = "ImageReward.pt"
    official_tokenizer = "bert-base-uncased"

    def __init__(
        self,
        location: str | Path | None = None,
        dtype: torch.dtype | None = None,
        reward_batch_size: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__(dtype, reward_batch_size, scale)
        location = self.official if location is None else location
        path = find_file(location, self.official_file)
        sizes = read_sizes(location, OFFICIAL_SIZES)
        vision_config = BlipVisionConfig(**{"layer_norm_eps": 1e-6, **sizes["vision"]})
        # is_decoder creates the cross-attention. Dropout as in the official file; it is never on.
        text_config = BlipTextConfig(
            **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "is_decoder": True, **sizes["text"]}
        )
        state = {key: weight.float() for key, weight in convert_image_reward(read_weights(path)).items()}
        parts = build_and_load(
            lambda: nn.ModuleDict(
                {
                    "vision": BlipVisionModel(vision_config),
                    "text": BlipTextModel(text_config, add_pooling_layer=False),
                    "mlp": LinearHead(text_config.hidden_size),
                }
            ),
            state,
            path,
        )
        self.vision, self.text, self.mlp = parts["vision"].to(self.dtype), parts["text"].to(self.dtype), parts["mlp"]
        self.tokenizer = load_tokenizer(BertTokenizer, location, self.official_tokenizer)
        self.freeze()

    def score_batch(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        pixels = clip_pixels(images, self.vision.config.image_size, rounding="torchvision")
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        return self.score_encoded(pixels, tokens.input_ids, tokens.attention_mask)

    def score_encoded(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, size, size)`): images as the model sees them.
            input_ids (`torch.Tensor` of shape `(B, L)`): tokens.
            attention_mask (`torch.Tensor` of shape `(B, L)`): 0 for padding.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, standardised.
        """
        image = self.vision(pixel_values.to(self.dtype)).last_hidden_state
        # Bidirectional: the text is read, not generated.
        text = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image, is_decoder=False)
        return (self.mlp(text.last_hidden_state[:, 0].float()) - SCORE_MEAN) / SCORE_STD


def convert_image_reward(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the official file under the names of the parts "vision", "text" and "mlp"."""
    converted = {}
    for key, weight in state.items():
        if key.endswith("position_ids") or key.startswith(("blip.vision_proj.", "blip.text_proj.")):
            continue  # constants, and projections that no score uses
        if key.startswith("blip.visual_encoder."):
            key = key.removeprefix("blip.visual_encoder.")
            for official, ours in VISION_NAMES.items():
                key = key.replace(official, ours)
            key = "vision." + (f"post_layer{key}" if key.startswith("norm.") else key)
        converted[key.replace("blip.text_encoder.", "text.")] = weight
    return converted


VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
}
