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

"""HPSv2.1: an open_clip ViT-H/14 tuned on people's preferences, run as a `transformers.CLIPModel`."""

import html
from pathlib import Path
from typing import Any

import ftfy
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .checkpoints import build_and_load, find_file, load_tokenizer, read_sizes, read_weights
from .preprocessing import center_crop, normalize, resize, short_side_to
from .pretrained import TwoTowerReward


# open_clip's ViT-H-14; its exact GELU, where CLIP of OpenAI has the quick one.
OFFICIAL_SIZES = {
    "projection_dim": 1024,
    "vision": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "text": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    },
}


class HPSv2Reward(TwoTowerReward):
    """
    HPSv2.1: cosine of an image and a prompt, about 0.14 to 0.33, without a logit scale.

    Source: [HPS v2](https://huggingface.co/papers/2306.09341), `xswu/HPSv2`, file `HPS_v2.1_compressed.pt`.

    Args:
        location (`str` or `Path`, *optional*):
            Folder with the official file, or a repository of the Hub that has it. A folder may hold a tokenizer and,
            for other sizes than ViT-H/14, a `config.json` with "projection_dim", "vision" and "text" (arguments of
            `CLIPVisionConfig` and `CLIPTextConfig`).
        dtype, reward_batch_size, scale:
            See [`PretrainedReward`].
    """

    name = "hpsv2"
    usual_range = (0.14, 0.33)
    official = "xswu/HPSv2"
    official_file = "HPS_v2.1_compressed.pt"
    official_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

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
        config = clip_config(read_sizes(location, OFFICIAL_SIZES))
        state = convert_open_clip(read_weights(path, key=None if path.suffix == ".safetensors" else "state_dict"))
        state = {key: weight.float() for key, weight in state.items()}
        self.model = build_and_load(lambda: CLIPModel(config), state, path).to(self.dtype)
        self.tokenizer = load_tokenizer(CLIPTokenizer, location, self.official_tokenizer)
        if self.tokenizer.eos_token_id != config.text_config.eos_token_id:
            # The feature of a text is read at this token: without it every text would have the same.
            raise ValueError(
                f"The tokenizer ends texts with the token {self.tokenizer.eos_token_id}, the model in {path} with "
                f"{config.text_config.eos_token_id}. Give the tokenizer of {self.official_tokenizer!r}."
            )
        self.freeze()

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = preprocess(images, self.model.config.vision_config.image_size)
        return self.model.get_image_features(pixels.to(self.dtype)).pooler_output

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        input_ids = tokenize(self.tokenizer, prompts, self.model.config.text_config.max_position_embeddings)
        return self.model.get_text_features(input_ids.to(self.device)).pooler_output


def preprocess(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    The official preprocessing: resized as a float tensor (no clamp), middle square, normalised.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [0, 1].
        size (`int`): side of the model's input.

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`, float32, differentiable.
    """
    resized = resize(images, *short_side_to(*images.shape[-2:], size))
    return normalize(center_crop(resized, size, rounding="torchvision"))


def clean_text(text: str) -> str:
    """open_clip's cleaning: broken Unicode mended, HTML entities resolved, spaces collapsed, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> torch.Tensor:
    """
    Tokens `(B, length)` as open_clip's tokenizer gives them: begin, text, end, then zeros. A text that is too long is
    cut before the end token.
    """
    texts = [clean_text(text) for text in texts]
    for token in tokenizer.all_special_tokens:
        # open_clip knows them as plain text, in three words.
        texts = [text.replace(token, f"{token[:2]} {token[2:-2]} {token[-2:]}") for text in texts]
    rows = tokenizer(texts, truncation=True, max_length=length).input_ids
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def clip_config(sizes: dict[str, Any]) -> CLIPConfig:
    """The configuration of a `CLIPModel` with the sizes of an open_clip model."""
    return CLIPConfig(text_config=sizes["text"], vision_config=sizes["vision"], projection_dim=sizes["projection_dim"])


def convert_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an open_clip model (two transformers) under the names of `transformers.CLIPModel`."""
    converted = {}
    for key, weight in state.items():
        if key in TOP_LEVEL:
            name = TOP_LEVEL[key]
            # open_clip multiplies by the projections from the right.
            converted[name] = weight.T.contiguous() if name.endswith("projection.weight") else weight
        elif "resblocks." in key:
            tower = "vision_model" if key.startswith("visual.") else "text_model"
            index, _, rest = key.partition("resblocks.")[2].partition(".")
            prefix = f"{tower}.encoder.layers.{index}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for name, part in zip("qkv", weight.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            else:
                module, _, kind = rest.rpartition(".")
                converted[f"{prefix}.{BLOCK.get(module, module)}.{kind}"] = weight
        else:
            module, _, kind = key.rpartition(".")
            converted[f"{MODULES.get(module, module)}.{kind}"] = weight
    return converted


TOP_LEVEL = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
MODULES = {
    "ln_final": "text_model.final_layer_norm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so in transformers
}
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
