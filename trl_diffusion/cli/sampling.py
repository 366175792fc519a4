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

"""What the commands that draw images share: their arguments, prompts and files."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from ..data.prompt_images import Prompt
    from ..evaluation import Adapters
    from ..models import Sampler


# Names of torch's, besides "auto".
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class SamplingArguments:
    """
    How to draw images.

    Args:
        > Model and sampling

        model_name_or_path (`str`):
            The base model: a Hub id, a local folder, or `"shapes"` for the built-in model.
        height (`int`, *optional*):
            Height in pixels. `None` takes the pipeline's default.
        width (`int`, *optional*):
            Width in pixels. `None` takes the pipeline's default.
        num_frames (`int`, *optional*):
            Frames of a video, for models that make videos. `None` takes the pipeline's default.
        num_inference_steps (`int`, *optional*, defaults to `28`):
            Number of sampling steps.
        guidance_scale (`float`, *optional*):
            Guidance. `None` takes the pipeline's default.
        negative_prompt (`str`, *optional*):
            What classifier-free guidance leads away from. `None` is the empty prompt. Refused where guidance is embedded.
        sigma_shift (`float`, *optional*):
            Static shift of the noise schedule, as in training. `None` takes the pipeline's own schedule, as users will.
        adapter_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the steps, from the noisy end, with the adapter: 1 is the aligned model, 0.6 the hybrid of
            Chunk-GRPO.
        num_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt, each from its own noise.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first image's noise; the next image has the next seed.
        batch_size (`int`, *optional*, defaults to `1`):
            Images drawn together.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the weights: float32, bfloat16, float16, or auto, which is bfloat16 except on a CPU.

        > Prompts

        prompts_split (`str`, *optional*, defaults to `"test"`):
            Split of the dataset of prompts.
        prompts_config (`str`, *optional*):
            Configuration of the dataset of prompts.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Name of the column that holds the prompts.
        max_prompts (`int`, *optional*):
            Use the first so many prompts. `None` uses all.
        condition_image (`str`, *optional*):
            Picture that an editing model edits, the same for all prompts. `None` takes those of the dataset's column
            `condition_image`.
        streaming (`bool`, *optional*, defaults to `False`):
            Download no more of the dataset than the first `max_prompts` rows, which must be given.
    """

    model_name_or_path: str = field(
        metadata={"help": "The base model: a Hub id, a local folder, or 'shapes' for the built-in model."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels. None takes the pipeline's default."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. None takes the pipeline's default."})
    num_frames: int | None = field(
        default=None,
        metadata={"help": "Frames of a video, for models that make videos. None takes the pipeline's default."},
    )
    num_inference_steps: int = field(default=28, metadata={"help": "Number of sampling steps."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance. None takes the pipeline's default."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "What classifier-free guidance leads away from. None is the empty prompt."}
    )
    sigma_shift: float | None = field(
        default=None,
        metadata={"help": "Static shift of the noise schedule, as in training. None takes the pipeline's own."},
    )
    adapter_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the steps, from the noisy end, with the adapter: 1 is the aligned model."},
    )
    num_images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, each from its own noise."})
    seed: int = field(default=0, metadata={"help": "Seed of the first image's noise; the next has the next seed."})
    batch_size: int = field(default=1, metadata={"help": "Images drawn together."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the weights; auto is bfloat16 except on a CPU.", "choices": list(DTYPES)},
    )
    prompts_split: str = field(default="test", metadata={"help": "Split of the dataset of prompts."})
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset of prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Name of the column that holds the prompts."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many prompts. None uses all."})
    condition_image: str | None = field(
        default=None,
        metadata={"help": "Picture that an editing model edits. None takes the dataset's column condition_image."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Download no more of the dataset than the first max_prompts rows, which must be given."},
    )

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"This command draws in one process, but was started in {os.environ['WORLD_SIZE']}. Start it without "
                "`accelerate launch` or `torchrun`."
            )
        for name in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.negative_prompt is not None and self.guidance_scale is not None and self.guidance_scale <= 1:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} has no effect at guidance_scale={self.guidance_scale}. Raise "
                "guidance_scale above 1, or leave negative_prompt unset."
            )
        if self.condition_image is not None and not Path(self.condition_image).is_file():
            raise ValueError(f"condition_image={self.condition_image!r} is no file. Give the path of a picture.")
        if self.streaming and self.max_prompts is None:
            raise ValueError(
                "streaming needs max_prompts, since images are made of all prompts: say how many rows, e.g. --max_prompts 200."
            )
        if not 0 <= self.adapter_fraction <= 1:
            raise ValueError(f"adapter_fraction must lie in [0, 1], got {self.adapter_fraction}.")

    def load_prompts(self, name: str) -> "Dataset":
        """The prompts of the dataset `name`, with the image that is given for all."""
        from ..data.prompts import CONDITION_IMAGE
        from .prompts import load_prompts

        dataset = load_prompts(
            name, self.prompts_split, self.prompts_config, self.streaming, self.max_prompts, self.prompt_column
        )
        if self.condition_image is None:
            return dataset
        if CONDITION_IMAGE in dataset.column_names:
            raise ValueError(
                f"condition_image={self.condition_image!r} is given, but {name!r} has images of its own in the column "
                f"{CONDITION_IMAGE!r}. Leave condition_image unset."
            )
        return dataset.add_column(CONDITION_IMAGE, len(dataset) * [self.condition_image])

    def load_sampler(self, files: dict[str, Path], prompts: Sequence["Prompt"]) -> tuple["Sampler", "Adapters"]:
        """Load the model and its adapters, and encode the prompts that will be drawn, where they are few."""
        import torch
        from accelerate import PartialState

        from ..data.prompt_images import PromptWithImage
        from ..evaluation import Adapters
        from ..models import Conditioning, Sampler, load_flow_model

        device = PartialState().device
        if self.dtype == "auto":
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        else:
            dtype = getattr(torch, self.dtype)
        flow_model = load_flow_model(
            self.model_name_or_path,
            dtype,
            size=(self.height, self.width),
            negative_prompt=self.negative_prompt,
            has_condition_image=isinstance(prompts[0], PromptWithImage),
            num_frames=self.num_frames,
        )
        adapters = Adapters(flow_model, files)
        sampler = Sampler.from_settings(
            flow_model,
            self.num_inference_steps,
            self.height,
            self.width,
            self.guidance_scale,
            self.sigma_shift,
            Conditioning(flow_model, device),
            self.num_frames,
            batch_size=self.batch_size,
            adapter_off=adapters.off if files else None,
        )
        if len(set(prompts)) <= sampler.conditioning.window:
            sampler.conditioning.keep_all(prompts)
        flow_model.vae.to(device)
        flow_model.denoiser.to(device)
        return sampler, adapters


def save_image(image: "Image.Image | list[Image.Image]", path: Path) -> Path:
    """
    Write a PNG, of a video, a list of pictures, a lossless animated picture, that appears whole or not at all.

    Args:
        image (`PIL.Image` or `list[PIL.Image]`): picture or video.
        path (`Path`): of the file, ending in `.png`; that of a video gets another ending.

    Returns:
        `Path`: the file.
    """
    partial = path.with_suffix(".part")
    if isinstance(image, list):
        from ..data.videos import SUFFIX, save_video

        path = path.with_suffix(SUFFIX)
        save_video(image, partial, lossless=True)
    else:
        image.save(partial, "PNG")
    os.replace(partial, path)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_metadata(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """The file that makes a folder of images one which `datasets.load_dataset("imagefolder", ...)` reads."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
