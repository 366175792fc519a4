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

"""Folders of tiny reward models with official file names: from the golden weights, or random but fixed by a seed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import clip_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast

from trl_diffusion.rewards.aesthetic import LinearHead


FIXTURES = Path(__file__).parent / "fixtures"
SPECIAL_TOKENS = {
    "image": "<|image_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "video": "<|video_pad|>",
    "pad": "<|endoftext|>",
    "reward": "<|Reward|>",
}


def hpsv2_folder(folder: Path, fixtures: Path = FIXTURES) -> Path:
    """`HPS_v2.1_compressed.pt` as the authors nest it, and a tokenizer of single bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": load_file(fixtures / "hpsv2/weights.safetensors")}, folder / "HPS_v2.1_compressed.pt")
    shutil.copy(fixtures / "hpsv2/config.json", folder)
    # The model's last two tokens begin and end a text, as open_clip's do.
    size = json.loads((folder / "config.json").read_text())["text"]["vocab_size"]
    vocab = clip_tokenizer().get_vocab()
    letters = sorted(token for token in vocab if not token.startswith("<|"))[: size - 2]
    tokens = [*letters, *(f"unused{index}" for index in range(size - 2 - len(letters)))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


def image_reward_folder(folder: Path, fixtures: Path = FIXTURES) -> Path:
    """`ImageReward.pt`, flat as the authors' file, and a tokenizer of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(load_file(fixtures / "image_reward/weights.safetensors"), folder / "ImageReward.pt")
    for name in ("config.json", "med_config.json"):
        shutil.copy(fixtures / "image_reward" / name, folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


def hpsv3_folder(folder: Path, fixtures: Path = FIXTURES) -> Path:
    """`HPSv3.safetensors` and a tokenizer of words that has the special tokens where the golden numbers have them."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(fixtures / "hpsv3/weights.safetensors", folder / "HPSv3.safetensors")
    shutil.copy(fixtures / "hpsv3/config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    tokens = [f"word{index}" for index in range(config["text"]["vocab_size"])]
    tokens[:3] = ["[UNK]", "<|im_start|>", "<|im_end|>"]
    for name, token in SPECIAL_TOKENS.items():
        tokens[config["tokens"][name]] = token
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The reward token is no special one before the reward makes it so, as in the published tokenizer of Qwen2-VL.
    special = ["<|im_start|>", "<|im_end|>", *(token for name, token in SPECIAL_TOKENS.items() if name != "reward")]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token=SPECIAL_TOKENS["pad"],
        extra_special_tokens=special,
    ).save_pretrained(folder)
    return folder


def tiny_clip(seed: int = 0, image_size: int = 28) -> CLIPModel:
    tokenizer = clip_tokenizer(77)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(
            CLIPConfig(
                text_config={**sizes, **tokens},
                vision_config={**sizes, "image_size": image_size, "patch_size": 7},
                projection_dim=24,
            )
        ).eval()


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A CLIP checkpoint as transformers saves it."""
    tiny_clip(seed).save_pretrained(folder)
    clip_tokenizer(77).save_pretrained(folder)
    return folder


def aesthetic_folder(folder: Path, seed: int = 0) -> Path:
    """`sac+logos+ava1-l14-linearMSE.pth`, and the CLIP model beside it."""
    clip_folder(folder, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(LinearHead(24).state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder
