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

"""A frozen network in 4 or 8 bits, under a LoRA."""

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_torchao_available


def check_quantization(name: str, device: torch.device) -> None:
    """
    Refuse a quantisation that this machine cannot make, before weights are loaded.

    Args:
        name (`str`): "nf4" or "int8".
        device (`torch.device`): that the network will run on.

    Raises:
        `ValueError`: if its library is missing, or it needs an accelerator and there is none.
    """
    library, available = {
        "nf4": ("bitsandbytes", is_bitsandbytes_available()),
        "int8": ("torchao", is_torchao_available()),
    }[name]
    if name == "nf4" and device.type == "cpu":
        raise ValueError(
            "quantization='nf4' needs an accelerator: bitsandbytes does not quantise on the CPU. Use quantization='int8'."
        )
    if not available:
        raise ValueError(
            f"quantization={name!r} needs {library}. Install it: pip install 'trl_diffusion[quantization]'."
        )


def quantization_config(name: str) -> PipelineQuantizationConfig:
    """
    What a pipeline's `from_pretrained` takes to quantise its transformer, and nothing else.

    Args:
        name (`str`):
            "nf4": 4-bit normal float with double quantisation, of [QLoRA](https://huggingface.co/papers/2305.14314),
            computing in bfloat16. "int8": weights in 8 bits with a scale for each output channel.
    """
    if name == "nf4":
        transformer = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        transformer = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return PipelineQuantizationConfig(quant_mapping={"transformer": transformer})
