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

"""
How far rewards move where images are not resized to the very levels of Pillow, but in two passes of PyTorch's: along the
rows, clamped, along the columns, clamped; or with each pass rounded to 8 bits besides, as Pillow does it.

```bash
PYTHONPATH=tests python tests/campaigns/resizing.py
```

A move is the difference of a picture's score from that with Pillow's own resizing, in units of the reward's spread, the
standard deviation of its scores over the pictures. Trained weights are those of `shapes-clip`; the others are the tests' tiny
models, and a CLIP ViT-L/14 of the true size with random weights.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib import cbook
from PIL import Image
from reward_folders import aesthetic_folder, clip_folder, hpsv3_folder, image_reward_folder
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from trl_diffusion import shapes
from trl_diffusion.rewards import RewardModel, load_reward, to_tensor
from trl_diffusion.rewards.preprocessing import resize


Resize = Callable[[torch.Tensor, int, int], torch.Tensor]
# Where the rewards look the resizing up.
NAMES = ("preprocessing.resize_like_pil", "hpsv3.resize_like_pil")


def pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow itself."""
    pictures = [Image.fromarray(np.uint8(image.permute(1, 2, 0) * 255 + 0.5)) for image in images]
    return to_tensor([picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures])


def clamped(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows = resize(images, images.shape[-2], width).clamp(0, 1)
    return resize(rows, height, width).clamp(0, 1)


def rounded(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    levels = (images.double() * 255).round()
    for size in ((images.shape[-2], width), (height, width)):
        levels = functional.interpolate(levels, size, mode="bicubic", antialias=True)
        levels = (levels.clamp(0, 255) + 0.5).floor()
    return (levels / 255).float()


def photographs(count: int) -> torch.Tensor:
    """Parts of a photograph that comes with matplotlib, of several sizes, as pictures of 400 x 400 pixels."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as photograph:
        photograph.load()
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        side = int(rng.integers(100, min(photograph.size)))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
        part = photograph.crop((left, top, left + side, top + side))
        pictures.append(part.resize((400, 400), Image.Resampling.LANCZOS))
    return to_tensor(pictures)


def drawings(count: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the built-in world, enlarged, and their captions."""
    captions = list(shapes.load_dataset("test")["prompt"])
    captions = [captions[index % len(captions)] for index in range(count)]
    levels = (shapes.reference(captions).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return to_tensor(
        [Image.fromarray(image).resize((400, 400), Image.Resampling.BICUBIC) for image in levels]
    ), captions


def large_clip(folder: Path) -> str:
    """CLIP ViT-L/14 with random weights, and the tests' tokenizer."""
    torch.manual_seed(0)
    clip_folder(folder)
    text = CLIPModel.from_pretrained(folder).config.text_config.to_dict()
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(folder)
    return f"clip:{folder}"


@torch.no_grad()
def scores(reward: RewardModel, images: torch.Tensor, prompts: list[str], resizing: Resize) -> torch.Tensor:
    with patch(f"trl_diffusion.rewards.{NAMES[0]}", resizing), patch(f"trl_diffusion.rewards.{NAMES[1]}", resizing):
        return torch.cat(
            [
                reward.score(images[start : start + 4], prompts[start : start + 4]).double()
                for start in range(0, len(images), 4)
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--large_images", type=int, default=16, help="for the model of the true size; 0 leaves it out")
    arguments = parser.parse_args()
    photos = photographs(max(arguments.images, arguments.large_images))
    drawn, captions = drawings(arguments.images)
    plain = ["a b c"] * len(photos)
    with tempfile.TemporaryDirectory() as name, redirect_stderr(io.StringIO()):
        folder = Path(name)
        rows = [("shapes-clip, trained", f"clip:{shapes.clip_path()}", drawn, captions)]
        for kind, make in (
            ("image_reward", image_reward_folder),
            ("hpsv3", hpsv3_folder),
            ("clip", clip_folder),
            ("aesthetic", aesthetic_folder),
        ):
            rows.append((f"{kind}, tiny", f"{kind}:{make(folder / kind)}", photos[: arguments.images], plain))
        if arguments.large_images:
            large = large_clip(folder / "large")
            rows.append(("clip, ViT-L/14, random", large, photos[: arguments.large_images], plain))
        print("largest move / root mean square, in thousandths of the spread")
        print(f"{'reward':24}{'images':>7}{'spread':>11}{'clamped':>20}{'rounded':>20}")
        for label, spec, images, prompts in rows:
            reward = load_reward(spec, dtype=torch.float32)
            expected = scores(reward, images, prompts, pillow)
            spread = expected.std()
            cells = []
            for resizing in (clamped, rounded):
                moves = 1000 * (scores(reward, images, prompts, resizing) - expected) / spread
                cells.append(f"{moves.abs().max():10.2f} /{moves.square().mean().sqrt():8.2f}")
            print(f"{label:24}{len(images):7}{spread:11.2e}{cells[0]}{cells[1]}", flush=True)


if __name__ == "__main__":
    main()
