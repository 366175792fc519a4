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
networks of several sizes and compared with the formula of docs/memory.md; then what is planned for FLUX.1-dev.

```bash
python examples/benchmarks/memory.py              # measure on the CPU, some minutes
python examples/benchmarks/memory.py --paper      # only what is planned for FLUX.1-dev
# Two processes on the CPU under DDP, ZeRO and FSDP2, ten minutes; tests/sitecustomize.py lets FSDP2 run there.
PYTHONPATH=tests python examples/benchmarks/memory.py --sharded
```

Measured is one forward, backward and optimizer step, every tensor counted from its allocation to its release, so the
numbers are those of the tensors themselves, without what an allocator rounds up or keeps. With `--sharded` the real
trainer runs, and what a process holds is counted twice: by the tensors of network and optimizer, and by the C library's
allocator (glibc's, hence Linux), which also knows what no Python object shows.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import is_deepspeed_available
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

import trl_diffusion
from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes
from trl_diffusion.models import FluxFlowModel
from trl_diffusion.planning.configurations import read_configurations
from trl_diffusion.planning.counting import Tally
from trl_diffusion.planning.plan import Planner, sharded
from trl_diffusion.runtime.sharding import BUCKET_SIZES


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


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random_network(size: Size, channels: int = 64) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=channels, num_layers=size.double, num_single_layers=size.single, attention_head_dim=size.head_dim,
        num_attention_heads=size.heads, joint_attention_dim=size.text_dim, pooled_projection_dim=size.pooled,
        guidance_embeds=True, axes_dims_rope=(size.head_dim // 4, size.head_dim * 3 // 8, size.head_dim * 3 // 8),
    )  # fmt: skip


def measure(size: Size, rank: int | None, images: int, dtype: torch.dtype, checkpointing: bool) -> dict[str, int]:
    """Bytes of one update of a random network; `rank=None` trains all weights."""
    network = random_network(size).to(dtype)
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
    live = Tally([*network.parameters(), *network.buffers(), *inputs.values()])
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


# ---- Sharded over processes ----

CONFIGS = ["multi_gpu", "zero1", "zero2", "zero3", "fsdp2"]
CONFIG_FILES = Path(trl_diffusion.__file__).parent / "accelerate_configs"


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: frozen and trained ones, and those that ZeRO-3 leaves whole on every process."""

    frozen: int
    trained: int
    persistent: int


def sharded_formula(config: str, weights: Weights, dtype: torch.dtype, processes: int) -> dict[str, float]:
    """Bytes of one process; "step" and "terms" are the sums right before a step, and between two terms of the loss."""
    width = dtype.itemsize
    parts = sharded(config, width * weights.frozen, weights.trained, width, processes)
    parameters = parts["frozen weights"] + parts["trained weights"]
    if config == "zero3":
        parameters += width * weights.persistent
    # Before the step, ZeRO-1 has a share of the gradients; a bucket lives during a backward pass in stages 1 and 2.
    gradients = parts["gradients"] / (processes if config == "zero1" else 1)
    optimizer = parts["optimizer"]
    step = terms = parameters + gradients + optimizer
    if config in ("multi_gpu", "zero3"):
        step = terms = step + parts["buffers"]
    if config == "zero1":
        terms = parameters + parts["gradients"] + optimizer + parts["buffers"]
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer, "step": step, "terms": terms}


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes of the process in blocks that were mapped one by one: with `launch_sharded`'s threshold, its tensors."""
    gc.collect()
    glibc = ctypes.CDLL("libc.so.6")
    glibc.mallinfo2.restype = MallocInfo
    return glibc.mallinfo2().hblkhd


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by address: of views once, of distributed ones the part of this process."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = [tensor.untyped_storage() for tensor in locals_]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes() > 0}


def bytes_by_group(trainer: ChunkGRPOTrainer) -> dict[str, int]:
    parameters = list(trainer.model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    masters = []
    if trainer.deepspeed is None:
        optimizer = trainer.optimizer.optimizer
    else:
        zero = trainer.deepspeed.optimizer
        optimizer = zero.optimizer
        if trainer.deepspeed.zero_optimization_stage() == 3:
            parameters += [parameter.ds_tensor for parameter in parameters]
            gradients.append(zero.grad_partitions_flat_buffer)
            masters = zero.fp32_partitioned_groups_flat
        else:
            gradients += tree_leaves(list(zero.averaged_gradients.values()))
            masters = zero.single_partition_of_fp32_groups
    groups = {
        "parameters": parameters,
        "gradients": [gradient for gradient in gradients if gradient is not None],
        "optimizer": [*masters, *(v for v in tree_leaves(list(optimizer.state.values())) if torch.is_tensor(v))],
    }
    seen, found = set(), {}
    for name, tensors in groups.items():
        new = {address: size for address, size in storages(tensors).items() if address not in seen}
        found[name] = sum(new.values())
        seen |= new.keys()
    return found


class MeasuredTrainer(ChunkGRPOTrainer):
    """Counts, in the second optimizer step, when all states are there."""

    def train(self, *args, **kwargs):
        self.found = {}
        # What is there by now beside the network stays; the network becomes what the configuration makes of it.
        self.others = allocated() - bytes_of(self.model.parameters())
        return super().train(*args, **kwargs)

    def loss_terms(self, model, inputs):
        first, *others = super().loss_terms(model, inputs)

        def second():
            if self.state.global_step == 1:
                self.found["terms"] = allocated() - self.others
            return others[0]()

        return [first, second, *others[1:]]

    def count_before_step(self):
        if self.state.global_step == 1:
            self.found |= {**bytes_by_group(self), "step": allocated() - self.others}


class BeforeStep(TrainerCallback):
    def __init__(self, trainer: MeasuredTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.deepspeed is not None:
            # DeepSpeed takes the step at the end of the last backward pass.
            step = self.trainer.deepspeed.step

            def counted(*args, **kwargs):
                self.trainer.count_before_step()
                return step(*args, **kwargs)

            self.trainer.deepspeed.step = counted

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.deepspeed is None:
            self.trainer.count_before_step()


def measure_process(folder: Path, config: str, size: Size, rank: int | None, dtype: torch.dtype) -> None:
    """Train as one of several processes, on the built-in model with a random network in its transformer's place."""
    if is_deepspeed_available():
        import deepspeed

        # Gloo alone, so that nothing is compiled.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the configuration: from then on transformers would load text encoders in the shards of ZeRO-3.
    pipeline = shapes.load_pipeline()
    pipeline.transformer = random_network(size, pipeline.transformer.config.in_channels)
    if rank is not None:
        pipeline.transformer.to(dtype)  # as the trainer loads a frozen network
    args = ChunkGRPOConfig(
        output_dir=str(folder), height=32, width=32, num_inference_steps=3, chunk_sizes=[1, 1], chunk_fraction=1.0,
        num_generations=2, per_device_train_batch_size=2, max_steps=2, learning_rate=1e-5,
        bf16=dtype == torch.bfloat16, use_cpu=True, save_strategy="no", log_samples=False, report_to="none",
        disable_tqdm=True, cache_prompt_embeds=False,
    )  # fmt: skip
    trainer = MeasuredTrainer(
        pipeline,
        "shapes-clip",
        args,
        shapes.load_dataset("train").select(range(4)),
        peft_config=False if rank is None else LoraConfig(r=rank, target_modules=FluxFlowModel.lora_target_modules),
    )
    trainer.add_callback(BeforeStep(trainer))
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    threshold = BUCKET_SIZES["stage3_param_persistence_threshold"]
    weights = Weights(
        frozen=sum(parameter.numel() for parameter in parameters) - trained,
        trained=trained,
        persistent=sum(parameter.numel() for parameter in parameters if parameter.numel() <= threshold),
    )
    del parameters
    trainer.train()
    expected = sharded_formula(config, weights, dtype, args.world_size)
    (folder / f"{args.process_index}.json").write_text(json.dumps([trainer.found, expected]))


def measure_sharded(
    config: str, size: Size, rank: int | None, dtype: torch.dtype, processes: int = 2
) -> tuple[dict[str, int], dict[str, float]]:
    """Measured, on the process that holds most, and expected bytes of a configuration of the package."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "16384",
        # Kernels and buffers that are kept for the next call would count as well; how large they are depends on the CPU.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
        "MKL_DISABLE_FAST_MM": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, config, size.name, "0" if rank is None else str(rank), str(dtype)[6:]]
        finished = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG_FILES / f"{config}.yaml"),
             "--num_processes", str(processes), "--main_process_port", "0", __file__, "--process", *arguments],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if finished.returncode != 0:
            raise RuntimeError(finished.stderr[-5000:])
        results = [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(processes)]
    found = {name: max(found[name] for found, _ in results) for name in results[0][0]}
    return found, results[0][1]


def print_sharded(rank: int, processes: int = 2) -> None:
    """The three groups with their ratio to the formula; the sums with what they hold beyond it."""
    print(f"{processes} processes, MB of the one that holds most")
    print(
        f"{'':9} {'trained':7} {'dtype':8} {'parameters':>12} {'gradients':>12} {'optimizer':>13} {'at the step':>14} "
        f"{'between terms':>15}"
    )
    small = next(size for size in SIZES if size.name == "small")
    for lora in (None, rank):
        for dtype in (torch.float32, torch.bfloat16):
            for config in CONFIGS:
                found, expected = measure_sharded(config, small, lora, dtype, processes)
                groups = [
                    f"{found[name] / 1e6:{width}.1f} {found[name] / expected[name]:.3f}"
                    for name, width in (("parameters", 6), ("gradients", 6), ("optimizer", 7))
                ]
                sums = [
                    f"{found[name] / 1e6:{width}.1f} {(found[name] - expected[name]) / 1e6:+6.1f}"
                    for name, width in (("step", 7), ("terms", 8))
                ]
                trained = "all" if lora is None else f"r={lora}"
                print(f"{config:9} {trained:7} {str(dtype)[6:]:8}", *groups, *sums, flush=True)


def print_paper(rank: int) -> None:
    """What is planned for FLUX.1-dev at 1024 x 1024 in bf16, as docs/memory.md has it, in GiB."""
    gib, settings = 2**30, {"height": 1024, "width": 1024, "bf16": True, "use_cpu": True}
    configurations = read_configurations("black-forest-labs/FLUX.1-dev")
    print(
        "|  | frozen weights | LoRA with gradients and optimizer | activations of an update, m = 1 | m = 4 | peak, m = 1 | m = 4 |"
    )
    print("|---|---|---|---|---|---|---|")
    for quantization in (None, "int8", "nf4"):
        phases = []
        for images in (1, 4):
            with tempfile.TemporaryDirectory() as folder:
                args = ChunkGRPOConfig(
                    folder, per_device_train_batch_size=images, gradient_accumulation_steps=8 // images, num_generations=8,
                    quantization=quantization, offload_frozen=True, chunk_gradient="streamed", **settings,
                )  # fmt: skip
            lora = LoraConfig(r=rank, lora_alpha=rank)
            phases.append(Planner(configurations, args, ["hpsv2"], lora).plan())
        updates = [plan.phases["update"] for plan in phases]
        lora = sum(updates[0][name] for name in ("trained weights", "gradients", "optimizer"))
        row = [updates[0]["frozen weights"], lora, *(update["activations"] for update in updates)]
        row += [plan.peak for plan in phases]
        name = "bf16" if quantization is None else f"`{quantization}`"
        print(f"| {name} | " + " | ".join(f"{value / gib:.1f}" for value in row) + " |", flush=True)
    # The weights that ZeRO-3 leaves whole are biases and norms, 6 MB.
    weights = Weights(frozen=0, trained=network_parameters(FLUX_DEV), persistent=0)
    print(f"\nall weights, {weights.trained / 1e9:.2f} billion:")
    for cards in (1, 8, 32):
        for config in CONFIGS if cards > 1 else ("none",):
            expected = sharded_formula(config, weights, torch.bfloat16, cards)
            print(
                f"  on {cards} cards, {config}: {expected['step'] / gib:.1f} GiB a card at the step, "
                f"{expected['terms'] / gib:.1f} between terms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA")
    parser.add_argument("--paper", action="store_true", help="only what is planned for FLUX.1-dev")
    parser.add_argument("--sharded", action="store_true", help="measure two processes that share the work")
    parser.add_argument("--process", nargs=5, help=argparse.SUPPRESS)  # what `measure_sharded` launches
    arguments = parser.parse_args()
    if arguments.process is not None:
        folder, config, name, rank, dtype = arguments.process
        size = next(size for size in SIZES if size.name == name)
        measure_process(Path(folder), config, size, int(rank) or None, getattr(torch, dtype))
        return
    if arguments.sharded:
        print_sharded(arguments.rank)
    elif not arguments.paper:
        print_measurements(arguments.rank)
    print_paper(arguments.rank)


if __name__ == "__main__":
    main()
