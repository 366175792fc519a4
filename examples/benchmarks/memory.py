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
Where the memory of an update goes: bytes of parameters, gradients, optimizer and activations, measured on random FLUX
networks of several sizes and compared with the formula of docs/memory.md, which is then applied to FLUX.1-dev.

```bash
python examples/benchmarks/memory.py              # measure on the CPU, some minutes
python examples/benchmarks/memory.py --paper      # only apply the formula to FLUX.1-dev
```

Measured is one forward, backward and optimizer step, every tensor counted from its allocation to its release, so the
numbers are those of the tensors themselves, without what an allocator rounds up or keeps.
"""

import argparse
import weakref
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_diffusion.models import FluxFlowModel


@dataclass(frozen=True)
class Size:
    """A FLUX network: width D, double and single blocks, and the tokens N of one image and its prompt."""

    name: str
    heads: int
    head_dim: int
    double: int
    single: int
    image_tokens: int
    text_tokens: int
    pooled: int = 64
    text_dim: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


SIZES = [
    Size("tiny", heads=4, head_dim=32, double=2, single=4, image_tokens=64, text_tokens=16),
    Size("small", heads=4, head_dim=64, double=4, single=8, image_tokens=64, text_tokens=16),
    Size("long", heads=4, head_dim=64, double=4, single=8, image_tokens=256, text_tokens=64),
]
FLUX_DEV = Size("FLUX.1-dev", 24, 128, 19, 38, image_tokens=4096, text_tokens=512, pooled=768, text_dim=4096)
# Tensors of m x N x D values that one block needs at once in its recomputation and backward pass; read off `measure`.
# In bfloat16 some of them are float32, and count twice.
BLOCK = {4: 24, 2: 32}


# ---- The formula ----


def network_parameters(size: Size) -> int:
    """Weights and biases of the linear layers and the query-key norms."""
    d, h = size.width, size.head_dim
    attention = 4 * (d * d + d)
    double = 2 * (attention + 2 * h + (4 * d * d + 4 * d) + (4 * d * d + d) + 6 * (d * d + d))
    single = 3 * (d * d + d) + 2 * h + (4 * d * d + 4 * d) + (5 * d * d + d) + 3 * (d * d + d)
    embedders = 2 * (256 * d + d + d * d + d) + (size.pooled * d + d + d * d + d)  # time, guidance, pooled prompt
    ends = (size.text_dim * d + d) + (64 * d + d) + 2 * (d * d + d) + (64 * d + 64)
    return size.double * double + size.single * single + embedders + ends


def lora_parameters(size: Size, rank: int) -> int:
    """A LoRA on the attention layers: eight square ones in a double block, three in a single one."""
    return (8 * size.double + 3 * size.single) * 2 * size.width * rank


def activations(size: Size, images: int, bytes_per_value: int) -> int:
    """With activation checkpointing: the input of every block, and what one block needs at once."""
    blocks = size.double + size.single
    return (blocks + BLOCK[bytes_per_value]) * images * size.tokens * size.width * bytes_per_value


# ---- The measurement ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside and still exist, and their largest sum."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and key not in self.known:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.release, key)
        return result

    def release(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def ignore(self, tensors) -> None:
        self.known = {tensor.untyped_storage()._cdata for tensor in tensors}


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(size: Size, rank: int | None, images: int, dtype: torch.dtype, checkpointing: bool) -> dict[str, int]:
    """Bytes of one update of a random network; `rank=None` trains all weights."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=64, num_layers=size.double, num_single_layers=size.single, attention_head_dim=size.head_dim,
        num_attention_heads=size.heads, joint_attention_dim=size.text_dim, pooled_projection_dim=size.pooled,
        guidance_embeds=True, axes_dims_rope=(size.head_dim // 4, size.head_dim * 3 // 8, size.head_dim * 3 // 8),
    ).to(dtype)  # fmt: skip
    if checkpointing:
        network.enable_gradient_checkpointing()
    if rank is not None:
        network.requires_grad_(False)
        network = get_peft_model(network, LoraConfig(r=rank, target_modules=FluxFlowModel.lora_target_modules))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    inputs = {
        "hidden_states": torch.randn(images, size.image_tokens, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(images, size.text_tokens, size.text_dim, dtype=dtype),
        "pooled_projections": torch.randn(images, size.pooled, dtype=dtype),
        "timestep": torch.rand(images),
        "guidance": torch.full((images,), 3.5),
        "img_ids": torch.zeros(size.image_tokens, 3),
        "txt_ids": torch.zeros(size.text_tokens, 3),
    }
    live = LiveBytes()
    live.ignore([*network.parameters(), *network.buffers(), *inputs.values()])
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(**inputs, return_dict=False)[0].float().square().mean()
        loss.backward()
    gradients = bytes_of(parameter.grad for parameter in trained)
    optimizer.step()
    state = bytes_of(value for values in optimizer.state.values() for name, value in values.items() if name != "step")
    found = {"parameters": bytes_of(network.parameters()), "gradients": gradients, "optimizer": state}
    if rank is not None:
        # With few gradients the peak is that of the activations; they are the same when all weights are trained.
        found["activations"] = live.peak
    return found


def formula(size: Size, rank: int | None, images: int, dtype: torch.dtype) -> dict[str, int]:
    width = dtype.itemsize
    if rank is None:
        trained = network_parameters(size)
        parameters = trained * width
    else:
        trained = lora_parameters(size, rank)
        parameters = network_parameters(size) * width + trained * 4  # the LoRA is float32
    train_width = width if rank is None else 4
    return {
        "parameters": parameters,
        "gradients": trained * train_width,
        "optimizer": 2 * trained * train_width,
        "activations": activations(size, images, width),
    }


def print_measurements(rank: int) -> None:
    print(
        f"{'network':8} {'trained':8} {'dtype':9} {'images':>6} {'':11} {'measured':>12} {'formula':>12} {'ratio':>6}"
    )
    for size in SIZES:
        cases = [
            (rank, 2, torch.float32),
            (rank, 4, torch.float32),
            (rank, 2, torch.bfloat16),
            (None, 2, torch.float32),
        ]
        for lora, images, dtype in cases:
            found = measure(size, lora, images, dtype, checkpointing=True)
            expected = formula(size, lora, images, dtype)
            for name in found:
                print(
                    f"{size.name:8} {'all' if lora is None else f'r={lora}':8} {str(dtype)[6:]:9} {images:6} {name:11} "
                    f"{found[name]:12,} {expected[name]:12,} {found[name] / expected[name]:6.3f}"
                )
        without = measure(size, rank, 2, torch.float32, checkpointing=False)["activations"]
        per_block = without / (2 * size.tokens * size.width * 4 * (size.double + size.single))
        print(f"{size.name:8} without checkpointing, 2 images: {without:,} bytes, {per_block:.1f} m N D a block\n")


def print_paper(rank: int) -> None:
    """FLUX.1-dev at 1024 x 1024, bf16, in GiB for each card."""
    gib = 2**30
    base, lora = network_parameters(FLUX_DEV), lora_parameters(FLUX_DEV, rank)
    print(f"FLUX.1-dev: {base / 1e9:.2f} B parameters, LoRA of rank {rank}: {lora / 1e6:.1f} M")
    for images in (1, 4):
        print(f"activations of {images} images at 1024 x 1024: {activations(FLUX_DEV, images, 2) / gib:.2f} GiB")
    states = {"parameters": lora * 4, "gradients": lora * 4, "optimizer": lora * 8}
    print(f"LoRA's parameters, gradients and optimizer: {sum(states.values()) / gib:.2f} GiB")
    for name, bytes_per_weight in (("bf16", 2), ("int8", 1), ("nf4", 0.516)):
        print(f"frozen base in {name}: {base * bytes_per_weight / gib:.1f} GiB")
    # bf16 weights and gradients; float32 master weights and two moments.
    for cards in (1, 8, 32):
        weights, gradients, optimizer = base * 2 / gib, base * 2 / gib, base * 12 / gib
        print(
            f"all weights on {cards} cards, GiB a card: ZeRO-1 {weights + gradients + optimizer / cards:.1f}, "
            f"ZeRO-2 {weights + (gradients + optimizer) / cards:.1f}, "
            f"ZeRO-3 {(weights + gradients + optimizer) / cards:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA")
    parser.add_argument("--paper", action="store_true", help="only apply the formula to FLUX.1-dev")
    arguments = parser.parse_args()
    if not arguments.paper:
        print_measurements(arguments.rank)
    print_paper(arguments.rank)


if __name__ == "__main__":
    main()
