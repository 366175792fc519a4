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
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import CLIPModel, TrainerCallback

from trl_diffusion import SRPOConfig, SRPOTrainer, shapes
from trl_diffusion.rewards import RewardModel, TwoTowerReward, load_reward
from trl_diffusion.rewards.hpsv2 import OFFICIAL_SIZES, HPSv2Reward, clip_config


sys.path.append(str(Path(__file__).parents[2]))

from examples.benchmarks.chunk_grpo import MODELS, random_flux  # noqa: E402


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


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[float] = []

    def now(self):
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.now() - self.start)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps of a run in one of the ways, in seconds, and the means of their phases."""
    way = WAYS[arguments.way]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    reward = load_reward("shapes-clip") if arguments.reward == "shapes-clip" else RandomHPSv2(dtype)
    batch_size = 1 if way["one_by_one"] else arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        config = SRPOConfig(
            output_dir=folder, height=arguments.height, width=arguments.width,
            num_inference_steps=arguments.num_inference_steps, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=arguments.images // batch_size, rollout_batch_size=batch_size,
            positive_words=["Realistic photo"], negative_words=["CG render"],
            max_steps=arguments.warm_up + arguments.steps, use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16", log_samples=False, save_strategy="no", logging_strategy="steps",
            logging_steps=1, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = SRPOTrainer(
            model="shapes" if arguments.model == "shapes" else random_flux(arguments.model, dtype),
            reward_funcs=TwoCalls(reward) if way["two_calls"] else reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": shapes.load_dataset("train")["prompt"]}),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        )
        device = trainer.args.device
        times = StepTimes(device)
        trainer.add_callback(times)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log][arguments.warm_up :]
    result: dict[str, Any] = {
        "steps": times.steps[arguments.warm_up :],
        **{phase: statistics.mean(log[f"time/{phase}"] for log in logs) for phase in PHASES},
        "parameters": sum(p.numel() for p in trainer.flow.denoiser.parameters()),
    }
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
        f'| way | seconds a step: median (least to most) | times "{arguments.ways[0]}" | rollout | decode and reward | '
        "update | rest | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seconds = {way: [s for result in results for s in result["steps"]] for way, results in rounds.items()}
    first = statistics.median(seconds[arguments.ways[0]])
    for way, results in rounds.items():
        total = statistics.mean(seconds[way])
        phases = {phase: statistics.mean(result[phase] for result in results) for phase in PHASES}
        cells = [
            way,
            f"{statistics.median(seconds[way]):.2f} ({min(seconds[way]):.2f} to {max(seconds[way]):.2f})",
            f"{first / statistics.median(seconds[way]):.2f}",
            f"{phases['rollout'] / total:.0%}",
            f"{(phases['decode'] + phases['reward']) / total:.0%}",
            f"{phases['update'] / total:.0%}",
            f"{1 - sum(phases.values()) / total:.1%}",
            f"{max(result['peak_gib'] for result in results):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", *MODELS], default="shapes")
    parser.add_argument("--reward", choices=["shapes-clip", "hpsv2"], default="shapes-clip")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--images", type=int, default=None, help="images of a step")
    parser.add_argument("--batch_size", type=int, default=None, help="images of a micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each round")
    parser.add_argument("--warm_up", type=int, default=1, help="steps of each round before those")
    parser.add_argument("--rounds", type=int, default=2, help="how often the ways take turns")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.height = arguments.height or {"shapes": 32, "random": 128}.get(arguments.model, 256)
    arguments.width = arguments.width or arguments.height
    arguments.images = arguments.images or (24 if arguments.model == "shapes" else 4)
    arguments.batch_size = arguments.batch_size or arguments.images
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
            median = statistics.median(rounds[way][-1]["steps"])
            print(f"round {number + 1}, {way}: {median:.2f} s a step", file=sys.stderr)
    one = rounds[arguments.ways[0]][0]
    print(
        f"{one['device']}, torch {torch.__version__}, {arguments.dtype}; {one['parameters'] / 1e6:.1f} M parameters, reward "
        f"{arguments.reward}, {arguments.images} images a step, {arguments.height}x{arguments.width}, "
        f"T = {arguments.num_inference_steps}, {arguments.rounds} x {arguments.steps} steps\n"
    )
    print(table(arguments, rounds))


if __name__ == "__main__":
    main()
