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

"""`trl-diffusion demo vote`: five minutes of clicking, and the embedded FLUX draws more of what was liked."""

import io
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_chunk_grpo import CONFIG as CHUNK_GRPO
from .demo_run import REWARD, STYLE_MEASURES, Demo, shapes_arguments


if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from ..trainer.base_trainer import DiffusionTrainer


VOTERS = (*STYLE_MEASURES, "attributes")  # measures of the judge

# With those of the Chunk-GRPO demo.
CONFIG = {
    **CHUNK_GRPO,
    "per_device_train_batch_size": 24,  # 3 prompts x 8 images a generation
    "max_steps": 20,  # 60 groups to vote on
    "lr_scheduler_type": "constant",
}


class VoteDemo(Demo):
    """
    People as the reward, or a script in their place.

    Args:
        voter (`str`, *optional*): one of `VOTERS`, a measure of the judge for which a script votes; `None` leaves the page to
            people.
    """

    title = "votes"

    def __init__(self, voter: str | None = None):
        self.voter = voter
        voted = {} if voter is None else {REWARD if voter == "attributes" else voter: "voted for"}
        self.notes = {**dict.fromkeys(STYLE_MEASURES, "style"), **voted}

    def make_trainer(self, **settings: Any) -> "DiffusionTrainer":
        from transformers import TrainerCallback

        from ..rewards.vote import VoteReward
        from ..trainer.chunk_grpo_config import ChunkGRPOConfig
        from ..trainer.chunk_grpo_trainer import ChunkGRPOTrainer

        people, voter = VoteReward(), self.voter

        class Script(TrainerCallback):
            def on_train_begin(self, *args, **kwargs) -> None:
                threading.Thread(target=vote, args=(people.address, voter), daemon=True).start()

        return ChunkGRPOTrainer(
            reward_funcs=people,
            args=ChunkGRPOConfig(**{**CONFIG, **settings}),
            callbacks=[] if voter is None else [Script()],
            watch_reward_funcs=list(map(measure_of_the_judge, VOTERS)),
            **shapes_arguments(),
        )

    def progress_line(self, logs: Mapping[str, float]) -> str | None:
        if "rewards/vote/mean" not in logs:
            return None
        return "  ".join(f"{name} {logs[f'watch/{name}/mean']:.3f}" for name in VOTERS)

    def curve(self, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [
            {
                "step": logs["step"],
                "votes": logs["rewards/vote/mean"],
                **{name: logs[f"watch/{name}/mean"] for name in VOTERS},
            }
            for logs in log_history
            if "rewards/vote/mean" in logs
        ]

    def plot(self, curve: list[dict[str, float]], path: Path) -> None:
        """
        Writes what the judge measures of the pictures of each step: votes compare the pictures of a prompt, so their mean
        says little.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 7), layout="constrained")
        panels = figure.subplots(len(VOTERS), 1, sharex=True)
        steps = [point["step"] for point in curve]
        for axes, name in zip(panels, VOTERS, strict=True):
            color = "tab:blue" if name == self.voter else "tab:gray"
            axes.plot(steps, [point[name] for point in curve], "o-", color=color)
            axes.set_ylabel(f"{name}\n(voted for)" if name == self.voter else name)
            axes.grid(alpha=0.3)
        panels[0].set_title("The pictures that were voted on")
        panels[-1].set_xlabel("optimizer step")
        figure.savefig(path, dpi=120)


def measure_of_the_judge(name: str) -> "Callable[..., list[float]]":
    """One measure of the judge, as a reward that is watched under its name."""

    def measured(images: "list[Image.Image]", prompts: list[str]) -> list[float]:
        from .. import shapes

        return shapes.judge(images, prompts)[name].tolist()

    measured.__name__ = name
    return measured


def vote(address: str, voter: str) -> None:
    """
    Vote over HTTP until the page is gone: of each group the best quarter by a measure is loved, the next liked.

    Args:
        address (`str`): of the page.
        voter (`str`): one of `VOTERS`.
    """
    import requests
    from PIL import Image

    from .. import shapes

    session = requests.Session()
    try:
        while True:
            state = session.get(f"{address}state", timeout=60).json()
            group = next((group for group in state["groups"] if group["state"] == "open"), None)
            if group is None:
                time.sleep(0.2)
                continue
            keys = [key for key, _ in group["images"]]
            contents = [session.get(f"{address}pictures/{key}", timeout=60).content for key in keys]
            pictures = [Image.open(io.BytesIO(content)) for content in contents]
            measured = shapes.judge(pictures, [group["prompt"]] * len(keys))[voter]
            for rank, index in enumerate(measured.argsort()[::-1][: len(keys) // 2]):
                score = 2 if rank < len(keys) // 4 else 1
                session.post(f"{address}vote", json={"group": group["id"], "image": keys[index], "score": score})
            session.post(f"{address}done", json={"group": group["id"]})
    except requests.ConnectionError:
        pass  # the training is over
