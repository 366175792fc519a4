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

"""`trl-diffusion demo chunk_grpo`: a judge's share of right attributes makes the embedded FLUX draw what is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .demo_run import REWARD, SETTINGS, STYLE_MEASURES, WATCHED, Demo, shapes_arguments


if TYPE_CHECKING:
    from ..trainer.base_trainer import DiffusionTrainer


# The settings of the Chunk-GRPO demo, in one place.
CONFIG = {
    **SETTINGS,
    "num_inference_steps": 6,  # = T
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
    "max_grad_norm": 1.0,
}

SMOOTHING = 10  # steps of the moving average in the curve


class ChunkGRPODemo(Demo):
    """The judge's share of right attributes as a black-box reward, `shapes-clip` watched."""

    title = "Chunk-GRPO"
    notes = {REWARD: "trained", WATCHED: "watched", **dict.fromkeys(STYLE_MEASURES, "style")}

    def make_trainer(self, **settings: Any) -> "DiffusionTrainer":
        from .. import shapes
        from ..trainer.chunk_grpo_config import ChunkGRPOConfig
        from ..trainer.chunk_grpo_trainer import ChunkGRPOTrainer

        return ChunkGRPOTrainer(
            reward_funcs=shapes.attribute_share,
            args=ChunkGRPOConfig(**{**CONFIG, **settings}),
            watch_reward_funcs=[WATCHED],
            **shapes_arguments(),
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
