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
How fast ChunkGRPOTrainer is in several ways, where its time goes, and the same work done one image at a time.

```bash
python examples/benchmarks/chunk_grpo.py                              # the embedded world, T = 6
python examples/benchmarks/chunk_grpo.py --num_inference_steps 17     # with the paper's chunks
python examples/benchmarks/chunk_grpo.py --model random               # a random FLUX, small enough for a CPU
python examples/benchmarks/chunk_grpo.py --model flux-dev-width       # two blocks of FLUX.1-dev's width
python examples/benchmarks/chunk_grpo.py --model flux-dev --device cuda --dtype bfloat16 --height 720 --width 720 \\
    --images 24 --num_generations 12 --batch_size 2 --rollout_batch_size 4 --num_inference_steps 17   # its full size
```

The ways run in turn, `--rounds` times, each in a process of its own, on the same prompts. "one at a time" is as released
research code does it: sampled, decoded, scored and trained image by image, step by step. "nothing shared" computes each
forward for each image; from "shared forwards" on, what the images of a group have in common is computed once, as it is by
default. Each is warmed up by `--warm_up` steps. "overhead" is all of a step that is not a forward, backward, decode or
reward: data, noise, the algebra of the sampler, advantages, the optimizer, logging.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, TrainerCallback

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes


PHASES = ("forward of rollout", "forward of update", "backward", "decode", "reward")

MIX_GRPO = {
    name: ChunkGRPOConfig.PRESETS["mix_grpo"][name]
    for name in ("stochastic_steps", "train_window", "window_schedule", "window_interval", "window_stride")
}
# Settings of each way. Chunks are those of the method: the first that trains, or all.
WAYS: dict[str, dict[str, Any]] = {
    "one at a time": {},
    "nothing shared": {},
    "shared forwards": {},
    "noise on trained steps": {"stochastic_steps": "trained"},
    "mix_grpo": {**MIX_GRPO, "chunk_sizes": None, "chunk_sampling": None},
    "compiled": {"compile_denoiser": True},
    "LoRA merged in rollouts": {"rollout_merged_lora": True},
    "rewards beside the rollout": {"overlap_rewards": True},
}
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


class TimedTrainer(ChunkGRPOTrainer):
    """A trainer that counts the seconds of its phases; on an accelerator it waits for each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        backward = self.accelerator.backward
        self.accelerator.backward = lambda *args, **kwargs: self.count("backward", backward, *args, **kwargs)
        score = self.scorer.score
        self.scorer.score = lambda *args, **kwargs: self.count("reward", score, *args, **kwargs)
        # The one forward of rollout and update.
        velocity = self.image_sampler.velocity
        self.image_sampler.velocity = lambda *args, **kwargs: self.count(
            "forward of update" if torch.is_grad_enabled() else "forward of rollout", velocity, *args, **kwargs
        )

    def synchronize(self):
        if self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).synchronize()

    def count(self, phase, function, *args, **kwargs):
        self.synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        return result

    def decode(self, *args, **kwargs):
        return self.count("decode", super().decode, *args, **kwargs)


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, and of each phase of it."""

    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.synchronize()
        self.start, self.before = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.synchronize()
        end, after = self.now()
        self.steps.append({"total": end - self.start, **{name: after[name] - self.before[name] for name in PHASES}})

    def now(self):
        return time.perf_counter(), dict(self.trainer.seconds)


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


def brightness(images, prompts, **columns):
    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in images]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over the steps of a run in one of the ways, in seconds."""
    one_by_one = arguments.way == "one at a time"
    batch_size = 1 if one_by_one else arguments.batch_size
    world = arguments.model == "shapes"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    settings = {
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.num_inference_steps,
        "num_generations": arguments.num_generations,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": arguments.images // batch_size,
        "rollout_batch_size": 1 if one_by_one else arguments.rollout_batch_size,
        "chunk_sizes": arguments.chunk_sizes,
        "chunk_sampling": arguments.chunk_sampling,
        "chunk_gradient": "streamed" if one_by_one else arguments.chunk_gradient,
        "activation_checkpointing": arguments.activation_checkpointing,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.dtype == "bfloat16",
        **WAYS[arguments.way],
    }
    if "overlap_rewards" in settings:  # there must be a next batch
        settings["rollout_batch_size"] = max(1, (arguments.rollout_batch_size or batch_size) // 4)
    with tempfile.TemporaryDirectory() as folder:
        config = ChunkGRPOConfig(
            output_dir=folder, max_steps=arguments.warm_up + arguments.steps, log_samples=False, save_strategy="no",
            logging_strategy="steps", logging_steps=1, disable_tqdm=True, report_to="none", **settings,
        )  # fmt: skip
        trainer = TimedTrainer(
            model="shapes" if world else random_flux(arguments.model, dtype),
            reward_funcs=shapes.attribute_share if world else brightness,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": shapes.load_dataset("train")["prompt"]}),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        )
        trainer._computes_common_once = arguments.way not in ("one at a time", "nothing shared")
        times = StepTimes(trainer)
        trainer.add_callback(times)
        trainer.train()
    steps = times.steps[arguments.warm_up :]
    result = {name: statistics.median(step[name] for step in steps) for name in ("total", *PHASES)}
    result["overhead"] = statistics.median(step["total"] - sum(step[phase] for phase in PHASES) for step in steps)
    result["steps"] = [step["total"] for step in steps]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result["forwards_per_image"] = statistics.mean(log["forwards_per_image"] for log in logs[arguments.warm_up :])
    result["parameters"] = sum(p.numel() for p in trainer.flow.denoiser.parameters())
    device = trainer.args.device
    if device.type == "cpu":
        # On Linux in KiB.
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result["device"] = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    else:
        result["peak_gib"] = torch.get_device_module(device).max_memory_allocated() / 2**30
        result["device"] = torch.get_device_module(device).get_device_name()
    return result


def table(arguments: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each way, as Markdown."""
    lines = [
        '| way | images a second: median (least to most of the steps) | times "nothing shared" | forwards an image | '
        "rollout | update | decode and reward | overhead | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    median = {
        way: statistics.median(seconds for r in results for seconds in r["steps"]) for way, results in rounds.items()
    }
    for way, results in rounds.items():
        seconds = [seconds for result in results for seconds in result["steps"]]
        speeds = [arguments.images / value for value in (median[way], max(seconds), min(seconds))]
        share = {
            name: statistics.median(result[name] / result["total"] for result in results)
            for name in (*PHASES, "overhead")
        }
        against = f"{median['nothing shared'] / median[way]:.2f}" if "nothing shared" in median else ""
        cells = [
            way,
            f"{speeds[0]:.2f} ({speeds[1]:.2f} to {speeds[2]:.2f})",
            against,
            f"{statistics.mean(result['forwards_per_image'] for result in results):.2f}",
            f"{share['forward of rollout']:.0%}",
            f"{share['forward of update'] + share['backward']:.0%}",
            f"{share['decode'] + share['reward']:.0%}",
            ""
            if "overlap_rewards" in WAYS[way]
            else f"{share['overhead']:.1%}",  # its phases are not one after the other
            f"{max(result['peak_gib'] for result in results):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", *MODELS], default="shapes")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--chunk_sizes", nargs="+", default=None, help="by default [2, 3] at T = 6, at 17 the paper's")
    parser.add_argument("--chunk_sampling", nargs="+", default=None, help="by default the first chunk at T = 6")
    parser.add_argument("--chunk_gradient", choices=["joint", "streamed"], default="joint")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--images", type=int, default=None, help="images of a step")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=None, help="images of a micro-batch")
    parser.add_argument("--rollout_batch_size", type=int, default=None)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each round")
    parser.add_argument("--warm_up", type=int, default=1, help="steps of each round before those")
    parser.add_argument("--rounds", type=int, default=2, help="how often the ways take turns")
    parser.add_argument("--output", default=None, help="JSON file for the numbers")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = arguments.model in ("shapes", "random")
    arguments.height = arguments.height or (32 if arguments.model == "shapes" else 128 if small else 256)
    arguments.width = arguments.width or arguments.height
    arguments.images = arguments.images or (48 if arguments.model == "shapes" else 8)
    arguments.batch_size = arguments.batch_size or arguments.images
    if arguments.chunk_sizes is None and arguments.num_inference_steps == 6:
        arguments.chunk_sizes = [2, 3]
        arguments.chunk_sampling = arguments.chunk_sampling or ["0"]
    transformers.logging.set_verbosity_error()
    if arguments.way is not None:
        print(json.dumps(measure(arguments)))
        return

    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        for way in arguments.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds[way].append(json.loads(run.stdout.splitlines()[-1]))
            speed = arguments.images / rounds[way][-1]["total"]
            print(f"round {number + 1}, {way}: {speed:.2f} images a second", file=sys.stderr)
    one = rounds[arguments.ways[0]][0]
    print(
        f"{one['device']}, torch {torch.__version__}, {arguments.dtype}; {one['parameters'] / 1e6:.1f} M parameters, "
        f"{arguments.images} images a step, {arguments.height}x{arguments.width}, T = {arguments.num_inference_steps}, "
        f"medians of {arguments.rounds} x {arguments.steps} steps\n"
    )
    print(table(arguments, rounds))
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"arguments": vars(arguments), "rounds": rounds}, file, indent=2)


if __name__ == "__main__":
    main()
