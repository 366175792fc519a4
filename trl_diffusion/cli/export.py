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

"""`trl-diffusion export`: an adapter for other programs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..paths import check_output_folder
from .parser import CommandParser


@dataclass
class ExportArguments:
    """
    What to export.

    Args:
        > Export

        adapter (`str`):
            The LoRA: a trainer's output folder, a checkpoint in it, a .safetensors file, or a Hub id.
        output (`str`):
            The .safetensors file to write.
        format (`str`, *optional*, defaults to `"comfyui"`):
            The program that will read it: comfyui.
    """

    adapter: str = field(
        metadata={"help": "The LoRA: a trainer's output folder, a checkpoint, a .safetensors file, or a Hub id."}
    )
    output: str = field(metadata={"help": "The .safetensors file to write."})
    format: str = field(default="comfyui", metadata={"help": "The program that will read it.", "choices": ["comfyui"]})

    def __post_init__(self):
        if Path(self.output).is_dir():
            raise ValueError(f"output is {self.output!r}, which is a folder. Give the .safetensors file to write.")
        check_output_folder(Path(self.output).parent, "The folder of output")


def main(arguments: Sequence[str]) -> int:
    parser = CommandParser(
        [ExportArguments],
        prog="trl-diffusion export",
        usage="trl-diffusion export --adapter ADAPTER --output FILE.safetensors [--format comfyui]",
        description="Write an adapter for another program.",
    )
    with parser.user_errors():
        (args,) = parser.parse_args_and_config(arguments)

        from ..hub.conversion import export_comfyui

        export_comfyui(args.adapter, args.output)
    print(f"Wrote {args.output}. Put it into ComfyUI/models/loras.")
    return 0
