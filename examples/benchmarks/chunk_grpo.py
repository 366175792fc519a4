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
import statistics
import tempfile
import time
from typing import Any

import torch
from comparison import (
    StepTimes,
    all_steps,
    compare,
    facts,
    lora,
    markdown,
    parser,
    pipeline,
    prompts,
    settings_of_a_run,
    speedups,
    synchronize,
)

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes


COUNTED = ("forward of rollout", "forward of update", "backward")
PHASES = (*COUNTED, "decode", "reward")

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
    "mix_grpo": MIX_GRPO,
    "compiled": {"compile_denoiser": True},
    "LoRA merged in rollouts": {"rollout_merged_lora": True},
    "rewards beside the rollout": {"overlap_rewards": True},
}


class TimedTrainer(ChunkGRPOTrainer):
    """A trainer that counts the seconds of forwards and backwards; on an accelerator it waits for each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = dict.fromkeys(COUNTED, 0.0)
        backward = self.accelerator.backward
        self.accelerator.backward = lambda *args, **kwargs: self.count("backward", backward, *args, **kwargs)
        # The one forward of rollout and update.
        velocity = self.image_sampler.velocity
        self.image_sampler.velocity = lambda *args, **kwargs: self.count(
            "forward of update" if torch.is_grad_enabled() else "forward of rollout", velocity, *args, **kwargs
        )

    def count(self, phase, function, *args, **kwargs):
        synchronize(self.args.device)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize(self.args.device)
        self.seconds[phase] += time.perf_counter() - start
        return result


def brightness(images, prompts, **columns):
    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in images]


def make_trainer(arguments: argparse.Namespace, folder: str, trainer_class=ChunkGRPOTrainer) -> ChunkGRPOTrainer:
    """Of one of the ways."""
    one_by_one = arguments.way == "one at a time"
    batch_size = 1 if one_by_one else arguments.batch_size
    settings = {
        "num_generations": arguments.num_generations,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": arguments.images // batch_size,
        "rollout_batch_size": 1 if one_by_one else arguments.rollout_batch_size,
        "chunk_sizes": arguments.chunk_sizes,
        "chunk_sampling": arguments.chunk_sampling,
        "chunk_gradient": "streamed" if one_by_one else arguments.chunk_gradient,
        "activation_checkpointing": arguments.activation_checkpointing,
        **WAYS[arguments.way],
    }
    if arguments.num_inference_steps == 6 and settings["chunk_sizes"] is None and "train_window" not in settings:
        settings |= {"chunk_sizes": [2, 3], "chunk_sampling": [0]}
    if "overlap_rewards" in settings:  # there must be a next batch
        settings["rollout_batch_size"] = max(1, (arguments.rollout_batch_size or batch_size) // 4)
    trainer = trainer_class(
        model=pipeline(arguments),
        reward_funcs=shapes.attribute_share if arguments.model == "shapes" else brightness,
        args=ChunkGRPOConfig(output_dir=folder, **settings_of_a_run(arguments), **settings),
        train_dataset=prompts(arguments),
        peft_config=lora(),
    )
    trainer._computes_common_once = arguments.way not in ("one at a time", "nothing shared")
    return trainer


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps of a run in one of the ways, and the medians of their phases, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, folder, TimedTrainer)
        times = StepTimes(trainer.args.device, trainer.seconds)
        trainer.add_callback(times)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log][arguments.warm_up :]
    steps = [
        {**step, "decode": log["time/decode"], "reward": log["time/reward"]}
        for step, log in zip(times.steps[arguments.warm_up :], logs, strict=True)
    ]
    result = {name: statistics.median(step[name] for step in steps) for name in ("total", *PHASES)}
    result["overhead"] = statistics.median(step["total"] - sum(step[phase] for phase in PHASES) for step in steps)
    result["steps"] = [step["total"] for step in steps]
    result["forwards_per_image"] = statistics.mean(log["forwards_per_image"] for log in logs)
    return result | facts(trainer)


def table(arguments: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each way."""
    header = [
        "way", "images a second: median (least to most of the steps)", 'times "nothing shared"', "forwards an image",
        "rollout", "update", "decode and reward", "overhead", "GiB",
    ]  # fmt: skip
    rows, seconds = [], all_steps(rounds)
    times = speedups(rounds, "nothing shared") if "nothing shared" in rounds else {}
    for way, results in rounds.items():
        median = statistics.median(seconds[way])
        speeds = [arguments.images / value for value in (median, max(seconds[way]), min(seconds[way]))]
        share = {
            name: statistics.median(result[name] / result["total"] for result in results)
            for name in (*PHASES, "overhead")
        }
        # Phases that are not one after the other leave no rest to tell.
        overhead = "" if "overlap_rewards" in WAYS[way] else f"{share['overhead']:.1%}"
        rows.append([
            way,
            f"{speeds[0]:.2f} ({speeds[1]:.2f} to {speeds[2]:.2f})",
            f"{times[way]:.2f}" if times else "",
            f"{statistics.mean(result['forwards_per_image'] for result in results):.2f}",
            f"{share['forward of rollout']:.0%}",
            f"{share['forward of update'] + share['backward']:.0%}",
            f"{share['decode'] + share['reward']:.0%}",
            overhead,
            f"{max(result['peak_gib'] for result in results):.2f}",
        ])  # fmt: skip
    return markdown(header, rows)


def options() -> argparse.ArgumentParser:
    options = parser(__doc__, WAYS)
    options.add_argument(
        "--chunk_sizes", nargs="+", default=None, help="by default [2, 3] at T = 6, at 17 the paper's"
    )
    options.add_argument("--chunk_sampling", nargs="+", default=None, help="by default the first chunk at T = 6")
    options.add_argument("--chunk_gradient", choices=["joint", "streamed"], default="joint")
    options.add_argument("--activation_checkpointing", action="store_true")
    options.add_argument("--num_generations", type=int, default=8)
    options.add_argument("--rollout_batch_size", type=int, default=None)
    return options


def images_of_a_step(model: str) -> int:
    return 48 if model == "shapes" else 8


def main() -> None:
    arguments = options().parse_args()
    compare(arguments, images_of_a_step(arguments.model), measure, table)


if __name__ == "__main__":
    main()
