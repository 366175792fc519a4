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

"""The trainers' evaluation: images of set-aside prompts, scored, and compared with the base model's."""

from typing import Any, NoReturn

import torch
from datasets import Dataset

from ..data.prompts import check_prompts
from ..metrics import mean_interval
from ..metrics.win_rate import win_rate


def evaluation_share(num_images: int, process: int, num_processes: int) -> list[int]:
    """
    The images of an evaluation that a process makes. Every process makes as many, since sharded models need all of them
    in every forward; those beyond `num_images` are left out of the scores.
    """
    share = -(-num_images // num_processes)
    return [process * share + i for i in range(share)]


class EvaluationMixin:
    """What [`DiffusionTrainer`] puts in place of the evaluation of `transformers.Trainer`."""

    # Of the base model's images, by the prompts of their dataset.
    _base_scores: dict[tuple[str, ...], dict[str, torch.Tensor]]

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Score `num_eval_images` images of the evaluation prompts, with the same seeds every time.

        An adapter is compared with the base model, whose images of the same prompts and seeds are drawn and scored
        once, at the first evaluation.

        Returns:
            `dict[str, float]`: the means of `{prefix}_reward`, the weighted sum of the rewards, of each reward
            `{prefix}_rewards/{name}/mean` and of each watched one `{prefix}_watch/{name}/mean`. With an adapter besides
            those of the base model, `{prefix}_base/reward` and so on, and the share of the images that are better than
            the base model's, ties by half, `{prefix}_win_rate/reward`, `{prefix}_win_rate/rewards/{name}` and so on.
        """
        prompts, scores, base = self._compare_with_base(self.eval_dataset if eval_dataset is None else eval_dataset)

        def means(scores: dict[str, torch.Tensor], group: str = "") -> dict[str, float]:
            return {f"{metric_key_prefix}_{group}{name}": column.nanmean().item() for name, column in scores.items()}

        metrics = means(scores)
        if base is not None:
            metrics |= means(base, "base/")
            for name, column in scores.items():
                rate = win_rate((column - base[name]).cpu().numpy(), prompts)["win_rate"]
                metrics[f"{metric_key_prefix}_win_rate/{name.removesuffix('/mean')}"] = rate
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args, **kwargs) -> NoReturn:
        """
        Not of use here: there are no labels to predict.

        Raises:
            `NotImplementedError`: always; the message says what to call.
        """
        raise NotImplementedError(
            "predict() is for models with labels. To score images of prompts, call evaluate(eval_dataset); to draw images, "
            "call save_model() and load the result into a pipeline with load_lora_weights, or use `trl-diffusion generate`."
        )

    def _compare_with_base(
        self, dataset: Dataset
    ) -> tuple[list[str], dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """
        Score `num_eval_images` images of the prompts of `dataset`, N in all processes together.

        Returns:
            The N prompts; the scores `(N,)` by name; and those of the base model's images, which are drawn and scored
            once a dataset, or `None` where all weights are trained.
        """
        check_prompts(dataset, "eval_dataset")
        if dataset is not self.eval_dataset:
            dataset = self._column_reader.prepare(dataset, "eval_dataset")
        self.conditioning.check_available(dataset["prompt"])
        total = self.args.num_eval_images
        local = evaluation_share(total, self.accelerator.process_index, self.accelerator.num_processes)
        rows = [dataset[index % len(dataset)] for index in local]
        prompts = [row["prompt"] for row in rows]
        columns = self._column_reader.read(rows)
        base = None
        if self.has_adapter:
            # Before the adapter's, so that a subclass that keeps the last scores keeps those.
            key = tuple(dataset["prompt"])
            if key not in self._base_scores:
                self._base_scores[key] = self._score_evaluation(prompts, local, columns, total, adapter_fraction=0.0)
            base = self._base_scores[key]
        scores = self._score_evaluation(prompts, local, columns, total)
        return [dataset[index % len(dataset)]["prompt"] for index in range(total)], scores, base

    def _score_evaluation(
        self,
        prompts: list[str],
        seeds: list[int],
        columns: dict[str, list[Any]],
        total: int,
        adapter_fraction: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Draw this process's images; returns the scores `(total,)` of those of all processes, by name."""
        images = self.generate(prompts, seeds, adapter_fraction).to(self.args.device)
        scores = self._evaluation_scores(images, prompts, columns)
        gathered = self.accelerator.gather(torch.stack(list(scores.values()), 1))[:total]
        return dict(zip(scores, gathered.unbind(1), strict=True))

    def _evaluation_names(self) -> list[str]:
        """The names of what `_evaluation_scores` gives."""
        return [
            "reward",
            *(f"rewards/{name}/mean" for name in self.rewards),
            *(f"watch/{name}/mean" for name in self.watched_rewards),
        ]

    def _evaluation_scores(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, torch.Tensor]:
        """What an evaluation averages over its images, `(B,)` by name."""
        scores = self.score(self.rewards, images, prompts, columns)
        watched = self.score(self.watched_rewards, images, prompts, columns)
        return {
            "reward": (scores * self.reward_weights.to(scores.device)).nansum(1),
            **{f"rewards/{name}/mean": column for name, column in zip(self.rewards, scores.unbind(1), strict=True)},
            **{
                f"watch/{name}/mean": column
                for name, column in zip(self.watched_rewards, watched.unbind(1), strict=True)
            },
        }

    def compare_with_base(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """
        Score the base model and the trained one on the evaluation prompts, `num_eval_images` each, with the same seeds
        as [`evaluate`], which may have scored the base model already. To be called on every process, and for an adapter
        only.

        Returns:
            `dict`: `{"base": {reward: (mean, low, high)}, "aligned": {...}}` for the rewards and the watched ones; the
            95 % confidence interval takes images of one prompt for dependent, and is NaN for a single prompt.
        """
        prompts, aligned, base = self._compare_with_base(self.eval_dataset)
        names = {name: f"rewards/{name}/mean" for name in self.rewards}
        names |= {name: f"watch/{name}/mean" for name in self.watched_rewards}
        results = {}
        for model, scores in (("base", base), ("aligned", aligned)):
            results[model] = {
                name: mean_interval(scores[metric].cpu().numpy(), prompts) for name, metric in names.items()
            }
        return results
