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

"""What the benchmarks share that do the same steps in several ways, in turn, each in a process of its own."""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, TrainerCallback

from trl_diffusion import shapes
from trl_diffusion.trainer.base_trainer import DiffusionTrainer


MODELS = {
    "random": {
        "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32,
        "joint_attention_dim": 256,
    },
    "flux-dev-width": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128,
        "joint_attention_dim": 4096,
    },
    "flux-dev": {
        "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
        "joint_attention_dim": 4096,
    },
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Side of the pictures, where it is not given.
SIDES = {"shapes": 32, "random": 128, "flux-dev-width": 256, "flux-dev": 1024}


def random_flux(model: str, dtype: torch.dtype) -> FluxPipeline:
    """A FLUX pipeline of the given size with random weights; its text encoders are one thin layer of the right width."""
    torch.manual_seed(0)
    size = MODELS[model]
    eighth, joint = size["attention_head_dim"] // 8, size["joint_attention_dim"]
    rope, small = (2 * eighth, 3 * eighth, 3 * eighth), model == "random"
    channels = (16, 32, 32, 32) if small else (128, 256, 512, 512)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 12 B parameters are not made in float32 first
    world = shapes.load_pipeline()  # for its tokenizers
    transformer = FluxTransformer2DModel(
        in_channels=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=rope, **size,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=1 if small else 2, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8 if small else 32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(world.tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                projection_dim=64,
                eos_token_id=world.tokenizer.eos_token_id,
            )  # fmt: skip
        ),
        tokenizer=world.tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(world.tokenizer_2), d_model=joint, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        ),
        tokenizer_2=world.tokenizer_2,
        transformer=transformer,
    )
    torch.set_default_dtype(default_dtype)
    return pipeline


def synchronize(device: torch.device) -> None:
    """Wait for the work of an accelerator."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


class StepTimes(TrainerCallback):
    """
    Seconds of each optimizer step, as "total", and of each phase of it.

    Args:
        device (`torch.device`): the accelerator, whose work is waited for.
        seconds (`dict[str, float]`, *optional*): of each phase so far; whoever counts them adds to it.
    """

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None):
        self.device, self.seconds = device, seconds or {}
        self.steps: list[dict[str, float]] = []

    def _now(self) -> dict[str, float]:
        synchronize(self.device)
        return {"total": time.perf_counter(), **self.seconds}

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append({name: value - self.start[name] for name, value in self._now().items()})


def pipeline(arguments: argparse.Namespace) -> str | FluxPipeline:
    """What a trainer takes as its model."""
    return "shapes" if arguments.model == "shapes" else random_flux(arguments.model, DTYPES[arguments.dtype])


def prompts(arguments: argparse.Namespace) -> Dataset:
    """Those of the built-in world, so often that every step, also at the end of an epoch, has as many images."""
    return Dataset.from_dict({"prompt": list(shapes.load_dataset("train")["prompt"]) * arguments.images})


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def settings_of_a_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings that the trainers share: of the model, the device, and a run that writes nothing."""
    return {
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.num_inference_steps,
        "max_steps": arguments.warm_up + arguments.steps,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.dtype == "bfloat16",
        "log_samples": False,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
    }


def facts(trainer: DiffusionTrainer) -> dict[str, Any]:
    """The device of a run, its peak memory and the size of its network."""
    device = trainer.args.device
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        name = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    else:
        module = torch.get_device_module(device)
        peak, name = module.max_memory_allocated(), module.get_device_name()
    parameters = sum(parameter.numel() for parameter in trainer.flow.denoiser.parameters())
    return {"peak_gib": peak / 2**30, "device": name, "parameters": parameters}


def all_steps(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """The seconds of the steps of all rounds, by way."""
    return {way: [seconds for result in results for seconds in result["steps"]] for way, results in rounds.items()}


def speedups(rounds: dict[str, list[dict[str, Any]]], against: str) -> dict[str, float]:
    """
    How many times as fast as `against` each way is: the median over the steps of all rounds, each divided by the same step
    of the same round. Steps can differ by what is drawn for them, which is the same in all ways.
    """
    seconds = all_steps(rounds)
    return {
        way: statistics.median(other / own for other, own in zip(seconds[against], values, strict=True))
        for way, values in seconds.items()
    }


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def parser(description: str, ways: Iterable[str]) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", *MODELS], default="shapes")
    parser.add_argument("--ways", nargs="+", choices=list(ways), default=list(ways))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--images", type=int, default=None, help="images of a step")
    parser.add_argument("--batch_size", type=int, default=None, help="images of a micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each round")
    parser.add_argument("--warm_up", type=int, default=1, help="steps of each round before those")
    parser.add_argument("--rounds", type=int, default=2, help="how often the ways take turns")
    parser.add_argument("--output", default=None, help="JSON file for the numbers")
    parser.add_argument("--way", choices=list(ways), help=argparse.SUPPRESS)
    return parser


def set_sizes(arguments: argparse.Namespace, images: int) -> None:
    """Give the sizes that were not given the defaults of the model; `images` are those of a step."""
    arguments.height = arguments.height or SIDES[arguments.model]
    arguments.width = arguments.width or arguments.height
    arguments.images = arguments.images or images
    arguments.batch_size = arguments.batch_size or arguments.images


def compare(
    arguments: argparse.Namespace,
    images: int,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[argparse.Namespace, dict[str, list[dict[str, Any]]]], str],
) -> None:
    """
    Measure the ways in turn and print the table; in the process of one way, only measure.

    Args:
        arguments (`argparse.Namespace`): of [`parser`], which gets the defaults that depend on the model.
        images (`int`): images of a step, where they are not given.
        measure (`Callable`): gives `steps`, the seconds of each step of a run, and what else `table` needs.
        table (`Callable`): makes a table of the runs by way.
    """
    set_sizes(arguments, images)
    transformers.logging.set_verbosity_error()
    if arguments.way is not None:
        print(json.dumps(measure(arguments)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        for way in arguments.ways:
            command = [sys.executable, *sys.argv, "--way", way]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds[way].append(json.loads(run.stdout.splitlines()[-1]))
            median = statistics.median(rounds[way][-1]["steps"])
            print(f"round {number + 1}, {way}: {median:.2f} s a step", file=sys.stderr)
    one = rounds[arguments.ways[0]][0]
    print(
        f"{one['device']}, torch {torch.__version__}, {arguments.dtype}; {one['parameters'] / 1e6:.1f} M parameters, "
        f"{arguments.images} images a step, {arguments.height}x{arguments.width}, T = {arguments.num_inference_steps}, "
        f"{arguments.rounds} x {arguments.steps} steps\n"
    )
    print(table(arguments, rounds))
    if arguments.output is not None:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rounds": rounds}, file, indent=2)
