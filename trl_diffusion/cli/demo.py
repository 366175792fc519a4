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
`trl-diffusion demo`: the embedded FLUX is aligned on this machine, measured before and after.

Here are the command and the demo of Chunk-GRPO; `demo_srpo` has the other one, `demo_run` what both share.
"""

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..paths import check_output_folder
from .demo_run import LORA, REWARD, STYLE_MEASURES, WATCHED, Demo, format_table, run
from .demo_srpo import SRPODemo
from .errors import OneLineErrors


if TYPE_CHECKING:
    from ..trainer.base_trainer import DiffusionTrainer


# The settings of the Chunk-GRPO demo, in one place.
CONFIG = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 6,  # = T
    "guidance_scale": 3.5,
    "sigma_shift": 3.0,
    "sde_type": "flow",
    "eta": 0.7,
    "num_generations": 8,  # = G
    "per_device_train_batch_size": 48,  # 6 prompts x 8 images, one optimizer step each: strictly on-policy
    "gradient_accumulation_steps": 1,
    "chunk_sizes": [1, 2, 2],
    "chunk_sampling": [0, 1],  # the noisy steps decide on what is in a picture
    "max_steps": 240,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "cache_prompt_embeds": False,
    "log_samples": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": False,
    "dataloader_pin_memory": False,
}

SMOOTHING = 10  # steps of the moving average in the curve


class ChunkGRPODemo(Demo):
    """The judge's share of right attributes as a black-box reward, `shapes-clip` watched."""

    title = "Chunk-GRPO"
    notes = {REWARD: "trained", WATCHED: "watched", **dict.fromkeys(STYLE_MEASURES, "style")}

    def make_trainer(self, **settings: Any) -> "DiffusionTrainer":
        from peft import LoraConfig

        from .. import shapes
        from ..trainer.chunk_grpo_config import ChunkGRPOConfig
        from ..trainer.chunk_grpo_trainer import ChunkGRPOTrainer

        return ChunkGRPOTrainer(
            model="shapes",
            reward_funcs=shapes.attribute_share,
            args=ChunkGRPOConfig(**{**CONFIG, **settings}),
            train_dataset=shapes.load_dataset("train"),
            eval_dataset=shapes.load_dataset("test"),
            peft_config=LoraConfig(**LORA),
            watch_reward_funcs=[WATCHED],
        )

    def progress_line(self, logs: Mapping[str, float]) -> str | None:
        if "reward" not in logs:
            return None
        return (
            f"reward {logs['reward']:.3f}  std {logs['reward_std']:.3f}  {WATCHED} {logs[f'watch/{WATCHED}/mean']:.3f}"
        )

    def curve(self, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [
            {
                "step": logs["step"],
                "reward": logs["reward"],
                "reward_std": logs["reward_std"],
                WATCHED: logs[f"watch/{WATCHED}/mean"],
            }
            for logs in log_history
            if "reward" in logs
        ]

    def plot(self, curve: list[dict[str, float]], path: Path) -> None:
        plot_reward(curve, path)


def plot_reward(curve: list[dict[str, float]], path: Path) -> None:
    """Writes the training's curve: the reward with its spread, and the watched reward below."""
    from matplotlib.figure import Figure

    steps = np.array([point["step"] for point in curve])
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    reward = np.array([point["reward"] for point in curve])
    spread = np.array([point["reward_std"] for point in curve])
    above.fill_between(
        steps, reward - spread, reward + spread, color="tab:blue", alpha=0.12, linewidth=0, label="±1 std"
    )
    for axes, values, color in (
        (above, reward, "tab:blue"),
        (below, np.array([point[WATCHED] for point in curve]), "tab:orange"),
    ):
        axes.plot(steps, values, color=color, alpha=0.4, linewidth=1, label="each step")
        width = min(SMOOTHING, len(values) // 2 + 1)  # a short run still gets a curve
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=color, linewidth=2, label=f"mean of {width} steps")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    above.set_title("Reward during training (prompts of the training split, sampled with noise)")
    above.set_ylabel("share of right attributes")
    below.set_ylabel(f"{WATCHED}\n(watched, not trained)")
    below.set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def several(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 for an interval, got {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def main(arguments: Sequence[str]) -> int:
    parser = OneLineErrors(
        prog="trl-diffusion demo",
        description="Align a small built-in FLUX on this machine, without a download, and show what changed.",
    )
    parser.add_argument("trainer", choices=["chunk_grpo", "srpo"], help="what to align with")
    parser.add_argument("--output_dir", help="folder for the results (demo-chunk-grpo, demo-srpo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (%(default)s)")
    parser.add_argument("--learning_rate", type=positive_float, help="learning rate (the demo's own)")
    parser.add_argument(
        "--preference",
        choices=["relative", "absolute"],
        default="relative",
        help="srpo only: sharp pictures over blurred and pale ones, or the plain prompt (%(default)s)",
    )
    parser.add_argument("--max_steps", type=positive, help="optimizer steps (the demo's own)")
    parser.add_argument(
        "--num_eval_images",
        type=several,
        default=512,
        help="images of held-out prompts to measure before and after (%(default)s)",
    )
    parsed = parser.parse_args(arguments)

    # Remarks of the libraries about optional parts and coming releases, which a newcomer can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)

    if parsed.trainer == "srpo":
        demo = SRPODemo(parsed.preference)
    elif parsed.preference != "relative":
        parser.error(f"--preference {parsed.preference} is for srpo; chunk_grpo compares the images of a prompt.")
    else:
        demo = ChunkGRPODemo()
    output_dir = parsed.output_dir or f"demo-{parsed.trainer.replace('_', '-')}"
    with parser.user_errors():
        check_output_folder(output_dir)
    results = run(demo, output_dir, parsed.seed, parsed.max_steps, parsed.num_eval_images, parsed.learning_rate)
    print(f"\nHeld-out prompts, {parsed.num_eval_images} images each, mean and 95 % confidence interval:\n")
    print(format_table(results, demo.notes))
    for line in demo.remarks(results):
        print(f"\n{line}")
    print(
        f"\n{results['seconds']:.0f} s in all; {results['images_per_second']:.1f} training images a second.\nWritten:"
    )
    folder = Path(output_dir)
    for name, what in (
        ("before_after.png", "the same prompts and noise before and after"),
        ("reward.png", "the reward during training"),
        ("README.md", "the model card"),
        ("pytorch_lora_weights.safetensors", "the LoRA for pipe.load_lora_weights"),
        ("adapter_model.safetensors", "the LoRA for PEFT"),
        ("results.json", "all numbers"),
    ):
        print(f"  {folder / name}  {what}")
    return 0
