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
How fast SRPOTrainer is, and the same work done as released research code does it.

```bash
python examples/benchmarks/srpo.py                                   # the embedded world and its reward
python examples/benchmarks/srpo.py --reward hpsv2 --images 4         # a tower of HPSv2.1's size, random weights
python examples/benchmarks/srpo.py --model random                    # a random FLUX, small enough for a CPU
python examples/benchmarks/srpo.py --model flux-dev --device cuda --dtype bfloat16 --reward hpsv2 \\
    --height 720 --width 720 --images 8 --batch_size 2 --num_inference_steps 25    # FLUX.1-dev's full size
```

The ways run in turn, `--rounds` times, each in a process of its own, on the same prompts. "as released" takes one prompt at
a time, and calls the reward for the positive and for the negative words of each pass, which encodes the image twice and the
texts anew. "batched" has the same two calls; "one reward call" is the default, which encodes an image once. In each, an
image lands once in the denoising and once in the inversion branch.
"""

import argparse
import statistics
import tempfile
from typing import Any

import torch
from comparison import (
    DTYPES,
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
)
from transformers import CLIPModel

from trl_diffusion import SRPOConfig, SRPOTrainer, shapes
from trl_diffusion.rewards import RewardModel, TwoTowerReward, load_reward
from trl_diffusion.rewards.hpsv2 import OFFICIAL_SIZES, HPSv2Reward, clip_config


WAYS = {
    "as released": {"one_by_one": True, "two_calls": True},
    "batched": {"one_by_one": False, "two_calls": True},
    "one reward call": {"one_by_one": False, "two_calls": False},
}
PHASES = ("rollout", "decode", "reward", "update")


class TwoCalls(RewardModel):
    """A reward that keeps nothing between its calls."""

    name = "two-calls"

    def __init__(self, reward: TwoTowerReward):
        super().__init__()
        self.reward = reward

    def score(self, images, prompts):
        self.reward._text_cache.clear()
        return self.reward.score(images, prompts)


class RandomHPSv2(HPSv2Reward):
    """A network of HPSv2.1's size with random weights, and the tokenizer of the embedded world."""

    def __init__(self, dtype: torch.dtype):
        TwoTowerReward.__init__(self, dtype)
        self.tokenizer = shapes.load_pipeline().tokenizer
        text = {**OFFICIAL_SIZES["text"], "eos_token_id": self.tokenizer.eos_token_id}
        self.model = CLIPModel(clip_config({**OFFICIAL_SIZES, "text": text})).to(self.dtype)
        self.freeze()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps of a run in one of the ways, and the means of their phases, in seconds."""
    way = WAYS[arguments.way]
    reward = load_reward("shapes-clip") if arguments.reward == "shapes-clip" else RandomHPSv2(DTYPES[arguments.dtype])
    batch_size = 1 if way["one_by_one"] else arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        config = SRPOConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, rollout_batch_size=batch_size,
            gradient_accumulation_steps=arguments.images // batch_size, positive_words=["Realistic photo"],
            negative_words=["CG render"], **settings_of_a_run(arguments),
        )  # fmt: skip
        trainer = SRPOTrainer(
            model=pipeline(arguments),
            reward_funcs=TwoCalls(reward) if way["two_calls"] else reward,
            args=config,
            train_dataset=prompts(arguments),
            peft_config=lora(),
        )
        times = StepTimes(trainer.args.device)
        trainer.add_callback(times)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log][arguments.warm_up :]
    phases = {phase: statistics.mean(log[f"time/{phase}"] for log in logs) for phase in PHASES}
    return {"steps": [step["total"] for step in times.steps[arguments.warm_up :]], **phases, **facts(trainer)}


def table(arguments: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each way."""
    first = arguments.ways[0]
    header = [
        "way", "seconds a step: median (least to most)", f'times "{first}"', "rollout", "decode and reward", "update",
        "rest", "peak, GiB",
    ]  # fmt: skip
    rows, seconds, times = [], all_steps(rounds), speedups(rounds, first)
    for way, results in rounds.items():
        median, total = statistics.median(seconds[way]), statistics.mean(seconds[way])
        share = {phase: statistics.mean(result[phase] for result in results) / total for phase in PHASES}
        rows.append([
            way,
            f"{median:.2f} ({min(seconds[way]):.2f} to {max(seconds[way]):.2f})",
            f"{times[way]:.2f}",
            f"{share['rollout']:.0%}",
            f"{share['decode'] + share['reward']:.0%}",
            f"{share['update']:.0%}",
            f"{1 - sum(share.values()):.1%}",
            f"{max(result['peak_gib'] for result in results):.2f}",
        ])  # fmt: skip
    return markdown(header, rows)


def main() -> None:
    options = parser(__doc__, WAYS)
    options.add_argument("--reward", choices=["shapes-clip", "hpsv2"], default="shapes-clip")
    arguments = options.parse_args()
    compare(arguments, 24 if arguments.model == "shapes" else 4, measure, table)


if __name__ == "__main__":
    main()
