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
Where the time of a step of ChunkGRPOTrainer goes besides the network, the VAE and the reward.

```bash
python examples/benchmarks/overhead.py                                                  # the embedded world, T = 6
python examples/benchmarks/overhead.py --way mix_grpo --images 24 --batch_size 1        # micro-batches of one image
```

It takes the options of `chunk_grpo.py`, for one way. Milliseconds a step of the main thread (`time.thread_time`), which other
work on the machine does not change; each part without the parts that it calls.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from accelerate.optimizer import AcceleratedOptimizer
from chunk_grpo import images_of_a_step, make_trainer, options
from comparison import markdown, set_sizes
from transformers import TrainerCallback

from trl_diffusion import ChunkGRPOTrainer
from trl_diffusion.trainer import base_trainer, online_trainer


WORK = ("forwards", "backward", "decode", "reward")


class Parts:
    """Seconds of the main thread by part, each without the parts that it calls, while `counting`."""

    def __init__(self, clock: Callable[[], float] = time.thread_time):
        self._clock = clock
        self.seconds: Counter[str] = Counter()
        self.counting = False
        self._inner = [0.0]  # of the parts that are running, what those that they called took

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            start = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = self._clock() - start
                own = seconds - self._inner.pop()
                self._inner[-1] += seconds
                if self.counting:
                    self.seconds[part] += own

        return wrapper


@contextlib.contextmanager
def counted_parts(trainer: ChunkGRPOTrainer, parts: Parts) -> Iterator[None]:
    """Within this context the functions of the parts are counted."""
    functions = {
        "forwards": [(trainer.image_sampler, "velocity")],
        "backward": [(trainer.accelerator, "backward")],
        "decode": [(trainer.image_sampler, "decode")],
        "reward": [(trainer.scorer, "score")],
        "noise and algebra of the sampler": [(trainer.image_sampler, "rollout")],
        "seeds, gathering, advantages": [(trainer, "make_micro_batches")],
        "digests of the pictures": [(online_trainer, "picture_digests")],
        "modes and place of the network": [(trainer.model, "train"), (trainer.model, "to")],
        "objective": [(trainer, "training_step")],
        "clipping, gradients that are not finite": [
            (trainer.accelerator, "clip_grad_norm_"),
            (trainer, "_skip_bad_step"),
        ],
        "optimizer": [(AcceleratedOptimizer, "step"), (trainer.model, "zero_grad")],
        "norm of the LoRA": [(base_trainer, "lora_update_norm")],
        "logging": [(trainer, "log")],
    }
    with contextlib.ExitStack() as patches:
        for part, places in functions.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, parts.counted(part, getattr(owner, name))))
        yield


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the main thread a step, by part, the total besides."""
    parts = Parts()

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == arguments.warm_up:
                parts.counting, self.start = True, time.thread_time()

        def on_train_end(self, args, state, control, **kwargs):
            parts.counting, self.total = False, time.thread_time() - self.start

    with tempfile.TemporaryDirectory() as folder:
        trainer, steps = make_trainer(arguments, folder), Steps()
        trainer.add_callback(steps)
        with counted_parts(trainer, parts):
            trainer.train()
    seconds = {**parts.seconds, "all else": steps.total - sum(parts.seconds.values()), "total": steps.total}
    return {part: value / arguments.steps for part, value in seconds.items()}


def table(seconds: dict[str, float]) -> str:
    overhead = {part: value for part, value in seconds.items() if part not in (*WORK, "total")}
    rows = sorted(overhead.items(), key=lambda item: -item[1])
    rows += [("overhead", sum(overhead.values())), *((part, seconds[part]) for part in (*WORK, "total"))]
    return markdown(
        ["part", "ms a step", "share"],
        [[part, f"{1000 * value:.1f}", f"{value / seconds['total']:.1%}"] for part, value in rows],
    )


def main() -> None:
    parser = options()
    parser.set_defaults(way="shared forwards")
    arguments = parser.parse_args()
    set_sizes(arguments, images_of_a_step(arguments.model))
    print(table(measure(arguments)))


if __name__ == "__main__":
    main()
