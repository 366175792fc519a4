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
`trl-diffusion generate`: images of a base model, of an adapter, or of a hybrid that switches the adapter off.

```bash
trl-diffusion generate --model_name_or_path shapes --prompt "a small red circle on a white background" --num_inference_steps 10
```
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..paths import check_output_folder
from .parser import CommandParser
from .sampling import SamplingArguments, save_image, write_metadata


SHEET_SIDE = 1280  # pixels of the longer side of a video's frames in the grid, at most


@dataclass(kw_only=True)
class GenerateArguments(SamplingArguments):
    """
    What to draw.

    Args:
        > What to draw

        adapter (`str`, *optional*):
            The LoRA: a trainer's output folder, a checkpoint in it, a .safetensors file, or a Hub id. Without it the
            base model draws.
        prompt (`list[str]`, *optional*):
            Prompts, each in quotes.
        prompts (`str`, *optional*):
            Or many of them: a Hub id, a local folder, a file (.txt with one prompt a line, .csv, .json, .jsonl,
            .parquet), or `"shapes"`.
        output_dir (`str`, *optional*, defaults to `"images"`):
            Folder for the images, `grid.png` and `metadata.jsonl`. Videos are animated pictures, without loss, and
            `grid.png` shows their frames.
    """

    adapter: str | None = field(
        default=None,
        metadata={"help": "The LoRA: a trainer's output folder, a checkpoint, a .safetensors file, or a Hub id."},
    )
    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts, each in quotes."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "Or many of them: a Hub id, a local folder, a file (.txt, .csv, .json, .jsonl, .parquet)."},
    )
    output_dir: str = field(default="images", metadata={"help": "Folder for the images, grid.png and metadata.jsonl."})

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("Give either --prompt TEXT or --prompts FILE_OR_DATASET.")
        check_output_folder(self.output_dir)
        if self.adapter is None and self.adapter_fraction != 1:
            raise ValueError(f"adapter_fraction={self.adapter_fraction} needs an --adapter to switch off.")


def main(arguments: Sequence[str]) -> int:
    parser = CommandParser(
        [GenerateArguments],
        prog="trl-diffusion generate",
        usage="trl-diffusion generate --model_name_or_path MODEL [--adapter ADAPTER] --prompt TEXT [TEXT ...] "
        "[--output_dir FOLDER] [options]",
        description="Draw images with a base model, an adapter, or a hybrid of both.",
    )
    with parser.user_errors():
        (args,) = parser.parse_args_and_config(arguments)

        from diffusers.utils import make_image_grid
        from tqdm.auto import tqdm

        from ..data.columns import ColumnReader
        from ..data.prompt_images import prompts_in, text_of, with_image
        from ..data.prompts import check_prompts
        from ..data.videos import contact_sheet
        from ..hub.conversion import find_adapter
        from ..rewards import to_pil

        prompts = args.prompt
        if prompts is None:
            dataset = args.load_prompts(args.prompts)
            check_prompts(dataset, "prompts")
            prompts = list(prompts_in(ColumnReader(lambda column: False).prepare(dataset, "prompts")))
        elif args.condition_image is not None:
            prompts = [with_image(prompt, args.condition_image) for prompt in prompts]
        files = {} if args.adapter is None else {"adapter": find_adapter(args.adapter)}
        sampler, adapters = args.load_sampler(files, prompts)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]
    seeds = [args.seed + index for index in range(len(prompts))]
    images, records = [], []
    adapter_on = adapters.use("adapter") if files else contextlib.nullcontext()
    with adapter_on, tqdm(total=len(prompts), desc="Drawing", unit="image") as progress:
        for batch in sampler.draw_images(prompts, seeds, adapter_fraction=args.adapter_fraction):
            for image in to_pil(batch):
                index = len(images)
                file = save_image(image, folder / f"{index:05d}.png")
                records.append({"file_name": file.name, "prompt": text_of(prompts[index]), "seed": seeds[index]})
                if isinstance(image, list):
                    image = contact_sheet(image)
                    image.thumbnail((SHEET_SIDE, SHEET_SIDE))  # of many videos they are all in the grid
                images.append(image)
            progress.update(len(batch))
    write_metadata(folder, records)
    # One prompt a row, or for one image a prompt as near to a square as possible.
    columns = args.num_images_per_prompt if args.num_images_per_prompt > 1 else _columns(len(images))
    save_image(make_image_grid(images, rows=len(images) // columns, cols=columns), folder / "grid.png")
    things = "images" if sampler.num_frames is None else "videos"
    print(f"Wrote {len(images)} {things} to {args.output_dir}.")
    return 0


def _columns(count: int) -> int:
    """The divisor of a count that makes the grid nearest to a square, not higher than wide: 4 of 12."""
    return next(columns for columns in range(1, count + 1) if count % columns == 0 and columns**2 >= count)
