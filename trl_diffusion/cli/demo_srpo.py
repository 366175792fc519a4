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

"""`trl-diffusion demo srpo`: the differentiable `shapes-clip` makes the embedded FLUX draw sharper pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .demo_run import MEASURE, PREFERENCE, REWARD, SETTINGS, STYLE_MEASURES, WATCHED, Demo, measure, shapes_arguments


if TYPE_CHECKING:
    import torch

    from ..trainer.base_trainer import DiffusionTrainer


POSITIVE_WORDS = ["sharp"]
NEGATIVE_WORDS = ["blurred", "pale"]

# The settings of the demo, in one place.
CONFIG = {
    **SETTINGS,
    "num_inference_steps": 10,  # = T
    "preference": "relative",
    "positive_words": POSITIVE_WORDS,
    "negative_words": NEGATIVE_WORDS,
    "sigma_range": [0.6, 0.95],
    "delta_sigma": 0.05,
    "per_device_train_batch_size": 24,
    "max_steps": 40,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.1,
    "vae_gradient_checkpointing": False,
    "rollout_batch_size": 72,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "eval_on_start": True,
    "num_eval_images": 144,
}
# What differs without control words: the plain prompt is rewarded.
ABSOLUTE = {
    "preference": "absolute",
    "sigma_range": [0.75, 0.964],
    "delta_sigma": None,
    "learning_rate": 5e-4,
    "max_steps": 70,
}


class SRPODemo(Demo):
    """
    `shapes-clip` as a differentiable reward: of prompts with the word "sharp" over those with "blurred" and "pale", or
    of the plain prompt. The judge is watched on held-out prompts.

    Args:
        preference (`str`, *optional*, defaults to `"relative"`): `"relative"` or `"absolute"`.
    """

    has_reference = True

    def __init__(self, preference: str = "relative"):
        self.preference = preference
        self.title = "SRPO" if preference == "relative" else "Direct-Align"
        trained = PREFERENCE if preference == "relative" else WATCHED
        self.notes = {trained: "trained", REWARD: "watched", **dict.fromkeys(STYLE_MEASURES, "style")}

    def make_trainer(self, **settings: Any) -> "DiffusionTrainer":
        from .. import shapes
        from ..trainer.srpo_config import SRPOConfig
        from ..trainer.srpo_trainer import SRPOTrainer

        form = ABSOLUTE if self.preference == "absolute" else {}
        return SRPOTrainer(
            reward_funcs="shapes-clip",
            args=SRPOConfig(**{**CONFIG, **form, **settings}),
            watch_reward_funcs=[shapes.attribute_share],
            **shapes_arguments(),
        )

    def measure(self, images: "torch.Tensor", prompts: list[str]) -> dict[str, np.ndarray]:
        """As the other demo's, and how much `shapes-clip` prefers the image as a sharp one."""
        from ..rewards import load_reward, score_images

        reward = load_reward("shapes-clip")
        scores = {
            word: score_images(reward, images, [f"{word}. {prompt}" for prompt in prompts]).cpu().numpy()
            for word in (*POSITIVE_WORDS, *NEGATIVE_WORDS)
        }
        positive, negative = (
            np.mean([scores[word] for word in words], axis=0) for words in (POSITIVE_WORDS, NEGATIVE_WORDS)
        )
        return {**measure(images, prompts), PREFERENCE: positive - negative}

    def progress_line(self, logs: Mapping[str, float]) -> str | None:
        if "eval_objective" in logs:
            return (
                f"held out: objective {logs['eval_objective']:.3f}  right attributes "
                f"{100 * logs[f'eval_watch/{REWARD}/mean']:.1f} %"
            )
        if "reward" in logs:
            return f"training: loss {logs['loss']:.3f}  {WATCHED} {logs['reward']:.3f}"
        return None

    def curve(self, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
        points = {logs["step"]: {"step": logs["step"]} for logs in log_history}
        for logs in log_history:
            if "eval_objective" in logs:
                evaluation = {"objective": logs["eval_objective"], REWARD: logs[f"eval_watch/{REWARD}/mean"]}
                points[logs["step"]].update(evaluation)
            elif "reward" in logs:
                points[logs["step"]].update(loss=logs["loss"], reward=logs["reward"])
        return list(points.values())

    def plot(self, curve: list[dict[str, float]], path: Path) -> None:
        """Writes the objective and what is watched, on held-out prompts, and the loss of each step."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 7), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True)
        evaluated = [point for point in curve if "objective" in point]
        steps = [point["step"] for point in evaluated]
        above.plot(steps, [point["objective"] for point in evaluated], "o-", color="tab:blue")
        middle.plot(steps, [100 * point[REWARD] for point in evaluated], "o-", color="tab:orange")
        trained = [point for point in curve if "loss" in point]
        below.plot([point["step"] for point in trained], [point["loss"] for point in trained], color="tab:gray")
        above.set_title("Training, measured on held-out prompts")
        above.set_ylabel("objective\n(trained)")
        middle.set_ylabel("right attributes in %\n(watched, not trained)")
        below.set_ylabel("loss of each step")
        below.set_xlabel("optimizer step")
        for axes in (above, middle, below):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)

    def remarks(self, results: dict[str, Any]) -> list[str]:
        """How far the style went, and what it cost."""
        gains = []
        for name in STYLE_MEASURES:
            base, aligned, reference = (results[column][name]["mean"] for column in ("base", "aligned", "reference"))
            gains.append(f"{name} went {100 * (aligned - base) / (reference - base):.0f} %")
        change = 100 * results["change"][MEASURE]["mean"]
        return [
            f"{' and '.join(gains)} of the way from the base to freshly drawn sharp pictures (reference); {MEASURE} "
            f"changed by {change:+.1f} points."
        ]
