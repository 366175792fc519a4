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
"""The sizes of reward models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPModel

from ..rewards import Reward, RewardModel
from ..rewards.base import reward_name
from ..rewards.hpsv2 import OFFICIAL_SIZES, HPSv2Reward, clip_config
from ..rewards.pretrained import without_autocast
from ..rewards.specification import DTYPES, parse_spec


_CLIP_L = {
    "projection_dim": 768,
    "vision": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
    "text": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408, "max_position_embeddings": 77,
    },
}  # fmt: skip
# By the name of the reward: its network, or the number of its weights where that is all that is known here.
_CLIPS = {"hpsv2": OFFICIAL_SIZES, "pickscore": OFFICIAL_SIZES, "clip": _CLIP_L, "aesthetic": _CLIP_L}
_WEIGHTS = {"image_reward": 446_000_000, "hpsv3": 8_291_375_616}
# They take no memory of the accelerator.
_ELSEWHERE = ("remote", "ocr", "vote")


@dataclass(frozen=True)
class RewardSize:
    """
    Attributes:
        name (`str`): the reward.
        bytes (`int`): of its weights on the accelerator.
        model ([`~trl_diffusion.rewards.RewardModel`], *optional*): it without weights, where its network is known.
        note (`str`, *optional*): what is not counted.
    """

    name: str
    bytes: int
    model: RewardModel | None = None
    note: str | None = None


class _ClipTowers(HPSv2Reward):
    """A reward of two towers of which only the sizes matter."""

    def __init__(self, sizes: Mapping[str, Any], mode: FakeTensorMode, dtype: torch.dtype):
        super(HPSv2Reward, self).__init__(dtype)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with mode:
                self.model = CLIPModel(clip_config(sizes))
        finally:
            torch.set_default_dtype(default)
        self.freeze()

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        # Without a look at the values of the images, which are not there.
        with without_autocast(images.device):
            features = self.text_features(prompts).detach().float()
            return self.score_features(self.image_features(images).float(), features)

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        return self.model.get_text_features(torch.ones(len(prompts), length, dtype=torch.long)).pooler_output


def reward_size(spec: str | Mapping[str, Any] | Reward, mode: FakeTensorMode) -> RewardSize:
    """The size of a reward, or of the one that a specification means."""
    if isinstance(spec, RewardModel):
        weights = sum(parameter.numel() * parameter.element_size() for parameter in spec.parameters())
        return RewardSize(reward_name(spec), weights, None, f"the work and activations of {reward_name(spec)}")
    if not isinstance(spec, str | Mapping):
        return RewardSize(reward_name(spec), 0, None, f"all of {reward_name(spec)}")
    parsed = parse_spec(spec)
    name, dtype = parsed.name, DTYPES.get(str(parsed.options.get("dtype")), torch.float32)
    if name in _CLIPS:
        model = _ClipTowers(_CLIPS[name], mode, dtype)
        return RewardSize(name, sum(p.numel() * p.element_size() for p in model.parameters()), model)
    if name in _WEIGHTS:
        return RewardSize(name, _WEIGHTS[name] * dtype.itemsize, None, f"the work and activations of {name}")
    if name in _ELSEWHERE:
        return RewardSize(name, 0)
    return RewardSize(name, 0, None, f"all of {name}")
