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

"""What a trainer refuses at its construction, before weights are loaded."""

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline, attention_backend
from diffusers.models import AttentionBackendName
from peft import PeftConfig

from ..data.prompts import CONDITION_IMAGE, check_prompts, column_names
from ..hub import check_lora_config
from ..models.quantization import check_quantization
from ..rewards import Reward, VideoRewardModel, check_reward, check_scores_apart, scores_generations
from ..runtime.reliable_trainer import OptimizerWithModes
from ..runtime.updates import check_optimizers
from .base_config import DiffusionConfig
from .process_checks import check_optimizer_with_modes


def check_args(args: Any, config_class: type[DiffusionConfig], trainer: str) -> None:
    """Refuse settings of another class."""
    if not isinstance(args, config_class):
        raise TypeError(
            f"args must be a {config_class.__name__} for {trainer}, got a {type(args).__name__}. "
            f"Pass the settings as {config_class.__name__}(output_dir=..., ...)."
        )


def check_arguments(
    args: DiffusionConfig,
    model: str | DiffusionPipeline,
    trained: Sequence[str | Reward],
    watched: Sequence[str | Reward],
    train_dataset: Any,
    eval_dataset: Any,
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
    peft_config: PeftConfig | bool | None,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
) -> None:
    """Refuse arguments of a trainer that do not go together; `trained` and `watched` are its rewards."""
    check_datasets(args, train_dataset, eval_dataset)
    check_rewards(args, trained, watched, train_dataset, eval_dataset)
    check_what_is_trained(args, model, peft_config, optimizers, optimizer_cls_and_kwargs)
    if args.attention_backend is not None:
        check_attention_backend(args.attention_backend)


def check_datasets(args: DiffusionConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets without prompts, and settings that they do not go with."""
    check_prompts(train_dataset, "train_dataset", may_stream=True)
    if isinstance(train_dataset, IterableDataset):
        check_stream(args)
    if CONDITION_IMAGE in column_names(train_dataset) and args.shards_weights:
        for name in ("per_device_train_batch_size", "rollout_batch_size"):
            # Images of different size go through the network one after the other.
            if (vars(args)[name] or 1) > 1:
                raise ValueError(
                    f"{name}={vars(args)[name]} with a column {CONDITION_IMAGE!r} and ZeRO-3 or FSDP, which need equally many "
                    "forwards on all processes; a batch whose images to edit differ in size takes several. Set "
                    f"{name}=1 and raise gradient_accumulation_steps, or use multi_gpu, ZeRO-1 or ZeRO-2."
                )
    if eval_dataset is not None:
        check_prompts(eval_dataset, "eval_dataset")
        with_images = [CONDITION_IMAGE in column_names(dataset) for dataset in (train_dataset, eval_dataset)]
        if with_images[0] != with_images[1]:
            names = ("train_dataset", "eval_dataset") if with_images[0] else ("eval_dataset", "train_dataset")
            raise ValueError(
                f"{names[0]} has a column {CONDITION_IMAGE!r} and {names[1]} has none. Add the images to edit to both, or "
                "to none."
            )
    elif args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value!r}, but there is no eval_dataset. Pass one, with a column "
            "'prompt', or set eval_strategy='no'."
        )


def check_stream(args: DiffusionConfig) -> None:
    """Refuse settings that a streamed dataset does not go with."""
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, but train_dataset is a stream, which does not tell its length. Set max_steps."
        )
    if args.dataloader_num_workers > 0:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers}, but train_dataset is a stream, which is read ahead in "
            "the process that trains, so that its prompts are encoded in time. Set it to 0."
        )


def check_rewards(
    args: DiffusionConfig,
    trained: Sequence[str | Reward],
    watched: Sequence[str | Reward],
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None,
) -> None:
    """Refuse rewards that cannot be loaded, or ask for columns that the datasets do not have."""
    if not trained:
        raise ValueError("reward_funcs is empty. Pass at least one reward.")
    columns = set(column_names(train_dataset)) - {"prompt"}
    if eval_dataset is not None:
        columns &= set(eval_dataset.column_names)
    for spec in [*trained, *watched]:
        check_reward(spec, columns)
    for spec in watched:
        check_scores_apart(spec)
    if args.eval_strategy != "no" and not watched and all(map(scores_generations, trained)):
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value!r}, but {trained[0]!r} scores generations of the training alone, so "
            "there is nothing to evaluate with. Add another reward, one in watch_reward_funcs, or set eval_strategy='no'."
        )
    if args.reward_weights is not None and len(args.reward_weights) != len(trained):
        raise ValueError(
            f"reward_weights has {len(args.reward_weights)} values for {len(trained)} reward functions. Give "
            "one weight a reward function."
        )


def check_what_is_trained(
    args: DiffusionConfig,
    model: str | DiffusionPipeline,
    peft_config: PeftConfig | bool | None,
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
) -> None:
    """Refuse adapters that cannot be exported, optimizers of other weights, and quantised weights to be trained."""
    if isinstance(peft_config, PeftConfig):
        check_lora_config(peft_config)
    elif peft_config not in (None, False):
        raise TypeError(
            f"peft_config must be a peft.LoraConfig, None (LoRA on the attention layers) or False (full "
            f"fine-tuning), got {peft_config!r}."
        )
    is_loaded = isinstance(model, DiffusionPipeline)
    check_optimizers(optimizers, optimizer_cls_and_kwargs, peft_config is False and is_loaded)
    if args.quantization is not None:
        if peft_config is False:
            raise ValueError(
                f"quantization={args.quantization!r} with peft_config=False: quantised weights cannot be trained. Train "
                "a LoRA, or leave quantization unset."
            )
        if is_loaded:
            raise ValueError(
                f"quantization={args.quantization!r} is for a model that is still to be loaded. Pass its id or path, or "
                "load the pipeline with diffusers' quantization_config and leave quantization unset."
            )
        check_quantization(args.quantization, args.device)
    if args.rollout_merged_lora and peft_config is False:
        raise ValueError(
            "rollout_merged_lora=True with peft_config=False: there is no LoRA to merge. Leave it at False."
        )
    if args.rollout_merged_lora and args.quantization is not None:
        raise ValueError(
            f"rollout_merged_lora=True with quantization={args.quantization!r}: a sum with quantised weights is not what is "
            "trained. Leave one of them unset."
        )
    if isinstance(optimizers[0], OptimizerWithModes):
        check_optimizer_with_modes(args, f"The optimizer {type(optimizers[0]).__name__}")


def check_attention_backend(name: str) -> None:
    """Refuse a backend that diffusers does not know, or that is not installed."""
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"attention_backend={name!r} is not known to diffusers. Choose one of {', '.join(names)}.")
    try:
        with attention_backend(name):
            pass
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"attention_backend={name!r} cannot be used here: {error} Or leave attention_backend unset."
        ) from error


def check_frames(
    args: DiffusionConfig, rewards: Mapping[str, Reward], num_frames: int | None, pipeline_name: str
) -> None:
    """Refuse what is of videos where the model makes images; `num_frames` are those of its videos."""
    if num_frames is not None:
        return
    if args.frame_reduction != "mean":
        raise ValueError(
            f"frame_reduction={args.frame_reduction!r} has no effect with a {pipeline_name}, which makes images. Leave "
            "frame_reduction unset."
        )
    for name, reward in rewards.items():
        if isinstance(reward, VideoRewardModel):
            raise ValueError(
                f"The reward {name!r} is a VideoRewardModel, which scores videos, and a {pipeline_name} makes images. Use a "
                "RewardModel, or a model that makes videos."
            )


def check_best_metric(metric: str | None, scores: Collection[str], has_base: bool) -> None:
    """Refuse a `metric_for_best_model` that no evaluation gives."""
    names = [*scores]
    if has_base:
        names += [f"base/{name}" for name in scores]
        names += [f"win_rate/{name.removesuffix('/mean')}" for name in scores]
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise ValueError(
            f"metric_for_best_model={metric!r} is not among the metrics of an evaluation. Choose "
            f"one of {', '.join(names)}."
        )


def check_writable(folder: str) -> None:
    """Refuse an output folder that cannot be written, before a run that would lose its results."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {folder!r} is not writable: {error.strerror}. Choose another folder or change its permissions."
        ) from error
