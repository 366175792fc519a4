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

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "huggingface_hub",
    "deepspeed",
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trl-diffusion env", description="Print versions and devices.")
    parser.parse_args(arguments)

    import torch

    import trl_diffusion

    lines = {
        "trl_diffusion": trl_diffusion.__version__,
        "Platform": platform.platform(),
        "Python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    lines["CPU threads"] = str(torch.get_num_threads())
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines["CUDA"] = f"{torch.version.cuda}, {', '.join(devices)}" if devices else "no device"

    print("Copy this into your report:\n")
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0
