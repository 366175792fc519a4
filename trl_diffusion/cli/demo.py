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

Here is the command; `demo_chunk_grpo`, `demo_srpo` and `demo_vote` have the demos, `demo_run` what they share.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..paths import check_output_folder
from .demo_chunk_grpo import ChunkGRPODemo
from .demo_run import format_table, run
from .demo_srpo import SRPODemo
from .demo_vote import VOTERS, VoteDemo
from .errors import OneLineErrors


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
    parser.add_argument("trainer", choices=["chunk_grpo", "srpo", "vote"], help="what to align with: vote is you")
    parser.add_argument("--output_dir", help="folder for the results (demo-chunk-grpo, demo-srpo, demo-vote)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (%(default)s)")
    parser.add_argument("--learning_rate", type=positive_float, help="learning rate (the demo's own)")
    parser.add_argument(
        "--preference",
        choices=["relative", "absolute"],
        default="relative",
        help="srpo only: sharp pictures over blurred and pale ones, or the plain prompt (%(default)s)",
    )
    parser.add_argument(
        "--voter", choices=VOTERS, help="vote only: a script votes for what has more of this, in your place"
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

    if parsed.preference != "relative" and parsed.trainer != "srpo":
        parser.error(
            f"--preference {parsed.preference} is for srpo; {parsed.trainer} compares the images of a prompt."
        )
    if parsed.voter is not None and parsed.trainer != "vote":
        parser.error(f"--voter {parsed.voter} is for vote; {parsed.trainer} has a reward of its own.")
    if parsed.trainer == "srpo":
        demo = SRPODemo(parsed.preference)
    elif parsed.trainer == "vote":
        demo = VoteDemo(parsed.voter)
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
