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

"""`trl-diffusion env`: versions and devices."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import OneLineErrors


PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "pillow",
    "bitsandbytes",
    "deepspeed",
)


def main(arguments: Sequence[str]) -> int:
    parser = OneLineErrors(prog="trl-diffusion env", description="Print versions and devices.")
    parser.parse_args(arguments)

    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file

    from ..version import __version__

    lines = {
        "trl_diffusion": __version__,
        "Platform": platform.platform(),
        "Python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    lines["torch"] = torch.__version__  # its metadata may lack the build, such as "+cu130"
    lines["CPU threads"] = str(torch.get_num_threads())
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        lines["Accelerator"] = "none"
    elif accelerator.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        lines["Accelerator"] = f"CUDA {torch.version.cuda or torch.version.hip}, {', '.join(names)}"
    else:
        lines["Accelerator"] = f"{accelerator.type}, {torch.accelerator.device_count()} devices"
    if Path(default_config_file).is_file():
        lines["accelerate's configuration"] = json.dumps(load_config_from_file(None).to_dict(), default=str)
    else:
        lines["accelerate's configuration"] = "none"

    print("Copy this into your report:\n")
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0
