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

"""`trl-diffusion merge`: an adapter becomes part of a whole pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..paths import check_exists, check_output_folder
from .parser import CommandParser


DTYPES = ("float32", "bfloat16", "float16")  # names of torch's


@dataclass
class MergeArguments:
    """
    What to merge.

    Args:
        > Merging

        model_name_or_path (`str`):
            The base model: a Hub id, a local folder, or `"shapes"`.
        adapter (`str`):
            The LoRA: a trainer's output folder, a checkpoint in it, a .safetensors file, or a Hub id.
        output_dir (`str`):
            Folder for the pipeline.
        scale (`float`, *optional*, defaults to `1.0`):
            Strength of the adapter.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype in which the weights are loaded, merged and saved: float32, bfloat16 or float16.
    """

    model_name_or_path: str = field(metadata={"help": "The base model: a Hub id, a local folder, or 'shapes'."})
    adapter: str = field(
        metadata={"help": "The LoRA: a trainer's output folder, a checkpoint, a .safetensors file, or a Hub id."}
    )
    output_dir: str = field(metadata={"help": "Folder for the pipeline."})
    scale: float = field(default=1.0, metadata={"help": "Strength of the adapter."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype in which the weights are loaded, merged and saved.", "choices": list(DTYPES)},
    )

    def __post_init__(self):
        check_output_folder(self.output_dir)


def main(arguments: Sequence[str]) -> int:
    parser = CommandParser(
        [MergeArguments],
        prog="trl-diffusion merge",
        usage="trl-diffusion merge --model_name_or_path MODEL --adapter ADAPTER --output_dir FOLDER [options]",
        description="Fold an adapter into its base model and save the whole pipeline.",
    )
    with parser.user_errors():
        (args,) = parser.parse_args_and_config(arguments)

        import torch
        from diffusers import DiffusionPipeline

        from .. import shapes
        from ..hub.conversion import find_adapter, merge_adapter

        model = shapes.pipeline_path() if args.model_name_or_path == "shapes" else args.model_name_or_path
        check_exists(model)
        adapter = find_adapter(args.adapter)  # before the model is loaded
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, args.dtype))
        merge_adapter(pipeline, adapter, args.scale)
    pipeline.save_pretrained(args.output_dir)
    print(f"Load it with DiffusionPipeline.from_pretrained({args.output_dir!r}).")
    return 0
