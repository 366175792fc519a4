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

"""Images of set-aside prompts, scored, and compared with those of the base model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from ..data.prompt_images import Prompt, key_of, prompt_of, texts_of
from ..metrics import mean_interval
from ..metrics.win_rate import win_rate


# Scores `(N,)` of N images by name.
Scores = dict[str, torch.Tensor]


def evaluation_share(num_images: int, process: int, num_processes: int) -> list[int]:
    """
    The images of an evaluation that a process makes. Every process makes as many, since sharded models need all of them
    in every forward; those beyond `num_images` are left out of the scores.
    """
    share = -(-num_images // num_processes)
    return [process * share + i for i in range(share)]


@dataclass
class Evaluator:
    """
    Scores images of the prompts of a dataset, with the same seeds every time, and compares the model with its base, whose
    images are drawn and scored once a dataset.

    Args:
        draw (`Callable`): `(prompts, seeds, adapter_fraction)` to images `(B, 3, H, W)` in [0, 1]; with a fraction of 0
            those of the base model, with 1 those of the model. Prompts come with their images where the dataset has the
            column `condition_image`.
        score (`Callable`): `(images, prompts, columns)` to scores `(B,)` by name, NaN where one does not apply.
        read_columns (`Callable`): rows of a dataset to their columns besides the prompt, for `score`.
        num_images (`int`): images of an evaluation, N, over all processes; prompts are repeated where there are fewer.
        accelerator ([`~accelerate.Accelerator`]): of the run. All processes must evaluate together.
        has_base (`bool`): whether there is a base model to compare with.
    """

    draw: Callable[[list[Prompt], Sequence[int], float], torch.Tensor]
    score: Callable[[torch.Tensor, list[str], Mapping[str, list[Any]]], Scores]
    read_columns: Callable[[list[dict[str, Any]]], dict[str, list[Any]]]
    num_images: int
    accelerator: Accelerator
    has_base: bool
    _base_scores: dict[tuple[Prompt, ...], Scores] = field(default_factory=dict, init=False)

    def metrics(self, dataset: Dataset) -> dict[str, float]:
        """
        The means of the scores by name, and where there is a base model its own as `base/{name}`, and as
        `win_rate/{name}` the share of the images that are better than the base model's, ties by half.
        """
        prompts, scores, base = self.compare(dataset)
        metrics = {name: column.nanmean().item() for name, column in scores.items()}
        if base is not None:
            metrics |= {f"base/{name}": column.nanmean().item() for name, column in base.items()}
            for name, column in scores.items():
                rate = win_rate((column - base[name]).cpu().numpy(), prompts)["win_rate"]
                metrics[f"win_rate/{name.removesuffix('/mean')}"] = rate
        return metrics

    def intervals(
        self, dataset: Dataset, names: Mapping[str, str]
    ) -> dict[str, dict[str, tuple[float, float, float]]]:
        """
        Means with their 95 % confidence intervals, which take images of one prompt for dependent and are NaN for a single
        prompt.

        Args:
            dataset (`datasets.Dataset`): with a column "prompt".
            names (`Mapping[str, str]`): names in the result -> names of scores.

        Returns:
            `dict`: `{"base": {name: (mean, low, high)}, "aligned": {...}}`.
        """
        prompts, aligned, base = self.compare(dataset)
        return {
            model: {name: mean_interval(scores[metric].cpu().numpy(), prompts) for name, metric in names.items()}
            for model, scores in (("base", base), ("aligned", aligned))
        }

    def compare(self, dataset: Dataset) -> tuple[list[Prompt], Scores, Scores | None]:
        """
        Returns:
            The N prompts; the scores `(N,)` by name; and those of the base model, or `None` where there is none.
        """
        share = evaluation_share(self.num_images, self.accelerator.process_index, self.accelerator.num_processes)
        rows = [dataset[index % len(dataset)] for index in share]
        columns = self.read_columns(rows)
        prompts = [key_of(prompt_of(dataset[index % len(dataset)])) for index in range(self.num_images)]
        base = None
        if self.has_base:
            # Before the model's, so that a `score` that keeps the last scores keeps those.
            key = tuple(prompts)
            if key not in self._base_scores:
                self._base_scores[key] = self._scores(rows, share, columns, 0.0)
            base = self._base_scores[key]
        scores = self._scores(rows, share, columns, 1.0)
        return prompts, scores, base

    def _scores(
        self, rows: list[dict[str, Any]], seeds: list[int], columns: dict[str, list[Any]], adapter_fraction: float
    ) -> Scores:
        """Draw and score this process's images; returns the scores `(N,)` of those of all processes."""
        prompts = [prompt_of(row) for row in rows]
        # Where they were drawn to: all of them, videos above all, may be too many for the accelerator.
        images = self.draw(prompts, seeds, adapter_fraction)
        scores = self.score(images, texts_of(prompts), columns)
        columns_of_scores = torch.stack(list(scores.values()), 1).to(self.accelerator.device)
        gathered = self.accelerator.gather(columns_of_scores)[: self.num_images]
        return dict(zip(scores, gathered.unbind(1), strict=True))
