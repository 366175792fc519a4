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

"""What every trainer of diffusion models shares: a `transformers.Trainer` whose step is a sequence of loss terms."""

import contextlib
import itertools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from peft import PeftConfig
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from ..data.columns import ColumnReader
from ..data.prompt_images import Prompt, prompt_of, prompts_in, texts_of
from ..data.prompts import CONDITION_IMAGE, check_prompts, column_names
from ..data.sampler import BucketSampler, GroupSampler, GroupStream
from ..evaluation import Evaluator
from ..hub import Publisher, hub_id
from ..models import whole_weights
from ..rewards import Reward, asks_for_column, load_rewards, to_pil
from ..rewards.calls import Scorer, shown
from ..runtime.offloading import FrozenModules
from ..runtime.policies import REFERENCE
from ..runtime.updates import check_optimizer_holds
from .base_config import DiffusionConfig
from .callbacks import EpochCallback, SampleImagesCallback
from .card import card_facts
from .construction import announce_plan, begin_conditioning, load_model, make_sampler
from .construction_checks import check_args, check_arguments, check_best_metric, check_frames, check_writable
from .evaluated_rewards import EvaluatedRewards
from .measures import RunningMetrics, Speed, lora_update_norm, mean_of_known
from .network import adapter_config, adapter_settings, compiled_graphs, load_network, save_network, trained_network
from .publishing import PublishingTrainer


class DiffusionTrainer(PublishingTrainer):
    """
    Base of the trainers: loads a pipeline, encodes its prompts as they come, wraps the denoiser in an adapter, and takes
    training steps term by term.

    A subclass defines [`loss_terms`] and usually `_prepare_inputs`. See [`ChunkGRPOTrainer`] for the arguments.

    Attributes:
        flow ([`FlowModel`]): the pipeline that is trained.
        image_sampler ([`Sampler`]): what draws, at the size and guidance of the run; `conditioning` is its.
        rewards, watched_rewards (`dict[str, Reward]`): by name; `reward_weights` are of the first, shape `(R,)`.
        scorer ([`~trl_diffusion.rewards.calls.Scorer`]): scores images by them. During a training all processes must
            call it together: where a reward fails for good on one of them, all of them save a checkpoint and stop.
        frozen ([`FrozenModules`]): VAE and rewards, to be used within `frozen.on_accelerator(...)`.
        evaluator ([`Evaluator`]), publisher ([`Publisher`]): do what their names say.
    """

    method_name: str  # as the model card has it
    # Keys of `trl_diffusion.hub.model_card.PAPERS`, the method's first; a property where they depend on the settings.
    papers: tuple[str, ...]
    config_class: type[DiffusionConfig]

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: str | Reward | list[str | Reward],
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | bool | None = None,
        watch_reward_funcs: str | Reward | list[str | Reward] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        if args is None:
            args = self.config_class(output_dir=f"trainer_output/{self.method_name.lower().replace(' ', '-')}")
        check_args(args, self.config_class, type(self).__name__)
        if args.process_index > 0:
            # What all processes do is shown once.
            transformers_logging.disable_progress_bar()
            diffusers_logging.disable_progress_bar()

        # Everything that can be refused is refused before weights are loaded.
        reward_specs, watch_specs = _as_list(reward_funcs), _as_list(watch_reward_funcs)
        check_arguments(
            args, model, reward_specs, watch_specs, train_dataset, eval_dataset, optimizers, peft_config,
            optimizer_cls_and_kwargs,
        )  # fmt: skip
        self._check_before_loading(args, train_dataset, reward_specs)
        self._column_reader = ColumnReader(
            lambda column: any(asks_for_column(spec, column) for spec in [*reward_specs, *watch_specs]),
            args.process_index,
            args.world_size,
        )
        has_condition_image = CONDITION_IMAGE in column_names(train_dataset)
        train_dataset, eval_dataset = self._prepare_datasets(args, train_dataset, eval_dataset)
        if args.should_save:
            check_writable(args.output_dir)
        self.publisher = Publisher(args, partial(card_facts, self))
        self.publisher.check()

        has_adapter = peft_config is not False
        name = model.config.get("_name_or_path") if isinstance(model, DiffusionPipeline) else model
        self.model_name = None if name is None else str(name)  # of a pipeline it may be a pathlib.Path
        self.flow = load_model(args, model, not has_adapter, has_condition_image)
        self.image_sampler = make_sampler(
            self.flow,
            args,
            self._upcoming_prompts,
            forward_context=self._forward_context,
            adapter_off=self.adapter_off if has_adapter else None,
        )
        self.conditioning = self.image_sampler.conditioning
        self.sigmas = self.image_sampler.sigmas
        self.height, self.width = self.image_sampler.size
        self.num_frames = self.image_sampler.num_frames
        self.guidance_scale = self.image_sampler.guidance_scale
        with whole_weights():
            self.rewards = load_rewards(reward_specs)
            self.watched_rewards = load_rewards(watch_specs)
        pipeline_name = type(self.flow.pipeline).__name__
        check_frames(args, {**self.watched_rewards, **self.rewards}, self.num_frames, pipeline_name)
        weights = [1.0] * len(self.rewards) if args.reward_weights is None else args.reward_weights
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        self.evaluated_rewards = EvaluatedRewards(self.rewards, self.reward_weights, self.watched_rewards)
        if args.metric_for_best_model is None and any(isinstance(c, EarlyStoppingCallback) for c in callbacks or []):
            args.metric_for_best_model, args.greater_is_better = args.BEST_METRIC, True
        check_best_metric(args.metric_for_best_model, self._evaluation_metrics(), has_adapter)

        begin_conditioning(self.conditioning, args, train_dataset, eval_dataset)
        rewards = [*self.rewards.values(), *self.watched_rewards.values()]
        modules = [self.flow.vae, *dict.fromkeys(reward for reward in rewards if isinstance(reward, nn.Module))]
        self.frozen = FrozenModules(modules, args.device, args.offload_frozen)
        self.scorer = Scorer(
            self.image_sampler.batch_size,
            args.device,
            args.reward_timeout,
            args.reward_retries,
            self.frozen.on_accelerator,
            agree=lambda failure: self.stop_together(failure, "a reward"),
            frame_reduction=args.frame_reduction,
        )
        peft_config = adapter_config(self.flow, peft_config)
        announce_plan(self.flow, args, [*reward_specs, *watch_specs], peft_config)
        network = trained_network(self.flow, args, peft_config)
        check_optimizer_holds(optimizers[0], network)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._running_metrics = RunningMetrics()
        self._speed = Speed(args.device)
        super().__init__(
            model=network,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.evaluator = Evaluator(
            self.generate,
            self._evaluation_scores,
            self._column_reader.read,
            args.num_eval_images,
            self.accelerator,
            has_base=has_adapter,
        )
        self.samples_callback = SampleImagesCallback(self.callback_handler) if args.log_samples else None
        # The data loader does not forward the epoch to a sampler inside accelerate's batch sampler.
        self.add_callback(EpochCallback(self._sampler))

    # ---- What a subclass defines, besides `loss_terms` ----

    @abstractmethod
    def _make_sampler(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset
    ) -> GroupSampler | BucketSampler | GroupStream:
        """The order of the training rows; made before weights are loaded, so that it can refuse the dataset."""

    @abstractmethod
    def _upcoming_rows(self) -> Iterator[int | dict[str, Any]]:
        """The rows that this process will train from now on, without end, as its sampler gives them."""

    @abstractmethod
    def _prompts_of(self, inputs: Any) -> list[str]:
        """The prompts of a micro-batch, for messages."""

    def _check_before_loading(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset, reward_specs: list[str | Reward]
    ) -> None:
        """Checks of a subclass that need no weights."""

    def _modules_of_update(self) -> list[nn.Module]:
        """The frozen modules that the loss terms run through."""
        return []

    # ---- Set-up ----

    def _prepare_datasets(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset, eval_dataset: Dataset | None
    ) -> tuple[Dataset | GroupStream, Dataset | None]:
        """The datasets as they are read, of a stream its rows in groups; sets the sampler."""
        if isinstance(train_dataset, IterableDataset):
            # Each process reads the stream and takes its rows of it; the trainer's loader would send tensors around.
            args.accelerator_config.dispatch_batches = False
            stream = self._column_reader.prepare(train_dataset, "train_dataset")
            train_dataset = self._sampler = self._make_sampler(args, stream)
        else:
            self._sampler = self._make_sampler(args, train_dataset)
            train_dataset = self._column_reader.prepare(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = self._column_reader.prepare(eval_dataset, "eval_dataset")
        return train_dataset, eval_dataset

    def _upcoming_prompts(self) -> Iterator[Prompt]:
        if isinstance(self._sampler, GroupStream):
            return map(prompt_of, self._upcoming_rows())
        columns = [name for name in ("prompt", CONDITION_IMAGE) if name in self.train_dataset.column_names]
        prompts = self.train_dataset.select_columns(columns)
        return (prompt_of(prompts[row]) for row in self._upcoming_rows())

    def first_prompts(self, count: int) -> list[Prompt]:
        """The first distinct prompts to show, of the evaluation dataset where there is one."""
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, GroupStream):
            prompts = map(prompt_of, dataset.stream)
        else:
            prompts = prompts_in(dataset)
        # Of a long dataset the beginning is enough.
        return list(dict.fromkeys(itertools.islice(prompts, 100 * count)))[:count]

    def _set_signature_columns_if_needed(self) -> None:
        # The columns of the dataset are for the rewards; the model's forward knows none of them.
        if self._signature_columns is None:
            self._signature_columns = ["prompt"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupSampler | BucketSampler:
        return self._sampler

    # ---- Sampling ----

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Velocity `(B, ...)`, float32, at latents and sigma `(B,)`, by [`Sampler.velocity`], as in a rollout."""
        return self.image_sampler.velocity(model, latents, sigma, conditioning)

    @contextlib.contextmanager
    def _forward_context(self) -> Iterator[None]:
        """What each forward of the network runs in, in a rollout and in training."""
        self.flow.dtype = self._converted_dtype() or self.flow.dtype
        with self.compute_loss_context_manager():
            yield

    def _global_index(self, count: int, process: int | None = None) -> list[int]:
        """The place among the images of all processes of each row of a process, by default this, see [`GroupSampler`]."""
        size, processes = self.args.consecutive_images, self.accelerator.num_processes
        rank = self.accelerator.process_index if process is None else process
        return [(row // size * processes + rank) * size + row % size for row in range(count)]

    @property
    def _images_per_micro_batch(self) -> int:
        """Over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def generators(self, *key: int | Sequence[int]) -> list[torch.Generator]:
        """
        One generator for each entry of the last element of `key`, seeded from the run's seed and the key: independent
        streams that do not depend on the number of processes or the size of batches.
        """
        *path, indices = key
        device, seed = self.args.device, self.args.seed
        return [
            torch.Generator(device).manual_seed(
                int(np.random.SeedSequence([seed, *path, index]).generate_state(1, np.uint64)[0] >> 1)
            )
            for index in indices
        ]

    def randn(self, generators: list[torch.Generator], like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise like the latents `(B, ...)`, one generator a sample."""
        return randn_tensor(tuple(like.shape), generator=generators, device=like.device, dtype=like.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, or videos, in [0, 1] as [`Sampler.decode`] gives them, `rollout_batch_size` at a time."""
        with self.frozen.on_accelerator(self.flow.vae):
            return self.image_sampler.decode(latents)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        seeds: Sequence[int],
        adapter_fraction: float = 1.0,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Sample images deterministically (Euler) on the trainer's schedule, at its size and guidance, with the moving
        average of the weights where `ema_decay` is set.

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, of the datasets given to the trainer; of an editing model with their images, see
                [`~trl_diffusion.data.prompt_images.with_image`].
            seeds (`Sequence[int]` of length B):
                Seed of each image's initial noise.
            adapter_fraction (`float`, *optional*, defaults to `1.0`):
                The adapter is on for this share of the steps, from the noisy end, and off for the rest: 1 is the
                trained model, 0 the base model, 0.6 the hybrid of [Chunk-GRPO](https://huggingface.co/papers/2510.21583).
            batch_size (`int`, *optional*):
                Images sampled together; `rollout_batch_size` by default.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`, float32, in [0, 1], on the CPU.
        """
        sampler = self.image_sampler if batch_size is None else replace(self.image_sampler, batch_size=batch_size)
        with self.averaged_weights(), self.rollout_model() as model:
            clean = list(sampler.draw_latents(prompts, seeds, model, adapter_fraction))
        return torch.cat([self.decode(part).cpu() for part in clean])

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model is the base model."""
        return self.policies.use(REFERENCE)

    def _keep_samples(self, images: torch.Tensor, prompts: list[str], values: dict[str, torch.Tensor]) -> None:
        """Hand the first images, with one value `(B,)` a name, to the callback that writes them when next logging."""
        if self.samples_callback is not None:
            self.samples_callback.keep(images, prompts, values, self.args.num_samples_to_log)

    # ---- Steps and logging ----

    @contextlib.contextmanager
    def _update_context(self) -> Iterator[None]:
        with self.timed("update"), self.frozen.on_accelerator(*self._modules_of_update()):
            yield

    def _describe(self, inputs: Any) -> str:
        return f"the prompts {shown(self._prompts_of(inputs))}"

    def timed(
        self, phase: str, synchronize: Callable[[], None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Count the seconds of a phase; on an accelerator its work is waited for, by `synchronize` where given."""
        return self._speed.phase(phase, synchronize)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            metrics = self._take_metrics()
            speed = self._speed.take(self.state.global_step, self.accelerator.num_processes)
            logs = {**logs, **metrics, **speed, "skipped_steps": self._skipped_steps}
        super().log(logs, start_time)

    def _take_metrics(self) -> dict[str, float]:
        """The metrics of the training since the last log; called on every process."""
        metrics = {name: mean_of_known(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        metrics |= self._running_metrics.take(self.accelerator)
        if self.args.compile_denoiser:
            metrics["compiled_graphs"] = compiled_graphs()
        with self._trained_weights_gathered():
            norm = lora_update_norm(self.model)
        return metrics if norm is None else metrics | {"adapter_norm": norm}

    # ---- Evaluation ----

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
            `dict[str, float]`: the means of `{prefix}_reward`, the weighted sum of the rewards that score single images, of each
            of these `{prefix}_rewards/{name}/mean` and of each watched one `{prefix}_watch/{name}/mean`. With an adapter besides
            those of the base model, `{prefix}_base/reward` and so on, and the share of the images that are better than
            the base model's, ties by half, `{prefix}_win_rate/reward`, `{prefix}_win_rate/rewards/{name}` and so on.
        """
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        check_prompts(eval_dataset, "eval_dataset")
        if eval_dataset is not self.eval_dataset:
            eval_dataset = self._column_reader.prepare(eval_dataset, "eval_dataset")
        self.flow.check_condition_image(CONDITION_IMAGE in eval_dataset.column_names)
        self.conditioning.check_available(prompts_in(eval_dataset))
        scores = self.evaluator.metrics(eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_metrics(self) -> list[str]:
        """The names of what `_evaluation_scores` gives."""
        return self.evaluated_rewards.metrics

    def _evaluation_scores(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, torch.Tensor]:
        """What an evaluation averages over its images, `(B,)` by name."""
        return self.evaluated_rewards.scores(self.scorer, images, prompts, columns)

    def _results_for_card(self, with_metrics: bool) -> dict[str, Any]:
        args, results = self.args, {}
        if args.log_samples:
            prompts = self.first_prompts(args.num_samples_to_log)
            images = self.generate(prompts, range(len(prompts)))
            results["samples"] = self.publisher.save_gallery(to_pil(images), texts_of(prompts))
        if self.eval_dataset is not None and self.has_adapter and with_metrics:
            results["metrics"] = self.evaluator.intervals(self.eval_dataset, self.evaluated_rewards.metric_of)
            results["metrics_note"] = (
                f"Measured on {args.num_eval_images} images of prompts that were set aside for evaluation, with the same "
                "prompts and noise for both."
            )
        return results

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

    # ---- Saving and resuming ----

    def _fixed_settings(self) -> dict[str, Any]:
        args = self.args
        return {
            **super()._fixed_settings(),
            "pipeline": type(self.flow.pipeline).__name__,
            "seed": args.seed,
            "data_seed": args.seed if args.data_seed is None else args.data_seed,
            **self._sampler.fixed_settings(),
            **adapter_settings(self.network),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_network(self.network, folder, state_dict, type(self.flow.pipeline), hub_id(self.model_name))
            torch.save(self.args.without_secrets(), folder / "training_args.bin")

    def _load_best_model(self) -> None:
        # The Trainer looks for a whole model under other names.
        if not self.has_adapter and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
            self._restart_average()
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.has_adapter or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_network(self.network, resume_from_checkpoint)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows
