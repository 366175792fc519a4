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

"""The arguments of `trl-diffusion evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path

from ..paths import check_output_folder
from .sampling import SamplingArguments
from .startup import quick_imports


BASE = "base"  # the base model among the names of the adapters


@dataclass(kw_only=True)
class EvaluateArguments(SamplingArguments):
    """
    What to compare.

    Args:
        > What to compare

        adapter (`list[str]`):
            LoRAs: trainers' output folders, checkpoints in them, .safetensors files, or Hub ids.
        rewards (`list[str]`):
            Rewards to measure: names, or dotted paths of callables.
        prompts (`str`):
            Prompts: a Hub id, a local folder, a file (.txt with one prompt a line, .csv, .json, .jsonl, .parquet), or
            `"shapes"`.
        adapter_names (`list[str]`, *optional*):
            What to call the adapters. `None` takes the last part of each path.
        output_dir (`str`, *optional*, defaults to `"evaluation"`):
            Folder for the results. Images that it holds already are not made again.
        reward_batch_size (`int`, *optional*, defaults to `8`):
            Images scored together.
        frame_reduction (`str`, *optional*, defaults to `"mean"`):
            How a reward of images scores a video: the `"mean"` of its frames' scores, that of the `"first"` frame, or the
            `"min"`, that of the worst one.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the intervals.
        max_report_images (`int`, *optional*, defaults to `200`):
            Prompts shown in `report.html`; the numbers are of all.
    """

    adapter: list[str] = field(
        metadata={"help": "LoRAs: trainers' output folders, checkpoints, .safetensors files, or Hub ids."}
    )
    rewards: list[str] = field(
        metadata={"help": "Rewards to measure: names of rewards, or dotted paths of callables."}
    )
    prompts: str = field(
        metadata={"help": "Prompts: a Hub id, a local folder, a file (.txt, .csv, .json, .jsonl, .parquet), 'shapes'."}
    )
    adapter_names: list[str] | None = field(
        default=None, metadata={"help": "What to call the adapters. None takes the last part of each path."}
    )
    output_dir: str = field(
        default="evaluation", metadata={"help": "Folder for the results; images it holds are not made again."}
    )
    reward_batch_size: int = field(default=8, metadata={"help": "Images scored together."})
    frame_reduction: str = field(
        default="mean",
        metadata={
            "help": "How a reward of images scores a video: the 'mean' of its frames' scores, that of the 'first' frame, or "
            "the 'min', that of the worst one.",
            "choices": ["mean", "first", "min"],
        },
    )
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    max_report_images: int = field(
        default=200, metadata={"help": "Prompts shown in report.html; the numbers are of all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}.")
        for name in ("reward_batch_size", "max_report_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_output_folder(self.output_dir)
        if isinstance(self.rewards, dict):  # one mapping in a YAML file
            self.rewards = [self.rewards]
        names = self.adapter_names or [Path(adapter).name or adapter for adapter in self.adapter]
        if len(names) != len(self.adapter):
            raise ValueError(f"adapter_names has {len(names)} names for {len(self.adapter)} adapters.")
        if len(set(names)) < len(names) or BASE in names:
            raise ValueError(
                f"The adapters would be called {names}, but names must differ from each other and from {BASE!r}. Give "
                "--adapter_names."
            )
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{name!r} in adapter_names cannot be the name of a folder.")
        self.adapter_names = names

        with quick_imports():
            from ..rewards import check_scores_apart
        for reward in self.rewards:
            check_scores_apart(reward)
