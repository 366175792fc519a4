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
import copy
import itertools
import json
import os
import tempfile
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import load_torch_model, save_torch_state_dict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import set_seed
from transformers.utils import logging as transformers_logging

from ..data.columns import ColumnReader
from ..data.prompts import check_prompts, column_names
from ..data.sampler import BucketSampler, GroupSampler, GroupStream
from ..hub import check_lora_config, check_names, hub_id, plain_network, save_adapter
from ..models import Conditioning, Sampler, load_flow_model, open_prompt_store, whole_weights
from ..models.quantization import check_quantization, quantization_config
from ..rewards import Reward, asks_for_column, check_reward, load_rewards, score_images
from ..rewards.calls import RewardError, call_reward, shown
from ..runtime.policies import REFERENCE
from ..runtime.reliable_trainer import OptimizerWithModes, ReliableTrainer
from ..runtime.sharding import keep_float32_inputs
from ..runtime.updates import check_optimizer_holds, check_optimizers
from .base_config import DiffusionConfig
from .callbacks import EpochCallback, SampleImagesCallback, Samples
from .evaluating import EvaluationMixin, evaluation_share
from .measures import RunningMetrics, lora_update_norm
from .publishing import PublishingMixin


logger = get_logger(__name__)

TRANSFORMER_SUBFOLDER = "transformer"
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"

# Of a LoRA's configuration, what its weights do not depend on.
FREE_LORA_SETTINGS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "revision")

# Of Flow-GRPO's LoRA for FLUX and Stable Diffusion 3.
DEFAULT_LORA = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian"}

T = TypeVar("T")

# A term of the loss, built when called: a scalar, and only then its graph.
LossTerm = Callable[[], torch.Tensor]


class _SerializableConfig(FrozenDict):
    """A diffusers config with the two methods that transformers' reporting callbacks call on a model's config."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str, sort_keys=True)


class DiffusionTrainer(EvaluationMixin, PublishingMixin, ReliableTrainer):
    """
    Base of the trainers: loads a pipeline, encodes its prompts once, wraps the denoiser in an adapter, and takes
    training steps term by term.

    A subclass defines [`loss_terms`] and usually `_prepare_inputs`. See [`ChunkGRPOTrainer`] for the arguments.
    """

    method_name: str  # as the model card has it
    # Keys of `trl_diffusion.hub.model_card.PAPERS`, the method's first.
    papers: tuple[str, ...]
    config_class: type[DiffusionConfig]
    # `training_step` is our own and divides by the accumulation itself.
    loss_is_scaled_for_ga = True

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
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"args must be a {self.config_class.__name__} for {type(self).__name__}, got a {type(args).__name__}. "
                f"Pass the settings as {self.config_class.__name__}(output_dir=..., ...)."
            )
        if args.process_index > 0:
            # What all processes do is shown once.
            transformers_logging.disable_progress_bar()
            diffusers_logging.disable_progress_bar()
        # Everything that can be refused is refused before weights are loaded.
        check_prompts(train_dataset, "train_dataset", may_stream=True)
        if isinstance(train_dataset, IterableDataset):
            check_stream(args)
        if eval_dataset is not None:
            check_prompts(eval_dataset, "eval_dataset")
        elif args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value!r}, but there is no eval_dataset. Pass one, with a column "
                "'prompt', or set eval_strategy='no'."
            )
        reward_specs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        watch_specs = [] if watch_reward_funcs is None else watch_reward_funcs
        watch_specs = list(watch_specs) if isinstance(watch_specs, list | tuple) else [watch_specs]
        if not reward_specs:
            raise ValueError("reward_funcs is empty. Pass at least one reward.")
        columns = set(column_names(train_dataset)) - {"prompt"}
        if eval_dataset is not None:
            columns &= set(eval_dataset.column_names)
        for spec in [*reward_specs, *watch_specs]:
            check_reward(spec, columns)
        if args.reward_weights is not None and len(args.reward_weights) != len(reward_specs):
            raise ValueError(
                f"reward_weights has {len(args.reward_weights)} values for {len(reward_specs)} reward functions. Give "
                "one weight a reward function."
            )
        if isinstance(peft_config, PeftConfig):
            check_lora_config(peft_config)
        elif peft_config not in (None, False):
            raise TypeError(
                f"peft_config must be a peft.LoraConfig, None (LoRA on the attention layers) or False (full "
                f"fine-tuning), got {peft_config!r}."
            )
        full_fine_tuning = peft_config is False
        check_optimizers(
            optimizers, optimizer_cls_and_kwargs, full_fine_tuning and isinstance(model, DiffusionPipeline)
        )
        if args.quantization is not None:
            if full_fine_tuning:
                raise ValueError(
                    f"quantization={args.quantization!r} with peft_config=False: quantised weights cannot be trained. Train "
                    "a LoRA, or leave quantization unset."
                )
            if isinstance(model, DiffusionPipeline):
                raise ValueError(
                    f"quantization={args.quantization!r} is for a model that is still to be loaded. Pass its id or path, or "
                    "load the pipeline with diffusers' quantization_config and leave quantization unset."
                )
            check_quantization(args.quantization, args.device)
        if isinstance(optimizers[0], OptimizerWithModes):
            args.check_optimizer_with_modes(f"The optimizer {type(optimizers[0]).__name__}")
        self._check_before_loading(args, train_dataset, reward_specs)
        self._column_reader = ColumnReader(
            lambda column: any(asks_for_column(spec, column) for spec in [*reward_specs, *watch_specs]),
            args.process_index,
            args.world_size,
        )
        if isinstance(train_dataset, IterableDataset):
            train_dataset = self._column_reader.prepare(train_dataset, "train_dataset")
            self._sampler = self._make_sampler(args, train_dataset)
        else:
            self._sampler = self._make_sampler(args, train_dataset)
            train_dataset = self._column_reader.prepare(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = self._column_reader.prepare(eval_dataset, "eval_dataset")
        if args.should_save:
            _check_writable(args.output_dir)
        self._check_hub(args)

        name = model.config.get("_name_or_path") if isinstance(model, DiffusionPipeline) else model
        self.model_name = None if name is None else str(name)  # of a pipeline it may be a pathlib.Path
        if isinstance(model, DiffusionPipeline):
            self.flow = load_flow_model(model, negative_prompt=args.negative_prompt)
        else:
            # Full fine-tuning needs float32 master weights; a frozen base does not.
            self.flow = load_flow_model(
                model,
                torch_dtype=torch.bfloat16 if args.bf16 and not full_fine_tuning else torch.float32,
                size=(args.height, args.width),
                negative_prompt=args.negative_prompt,
                **(
                    {}
                    if args.quantization is None
                    else {"quantization_config": quantization_config(args.quantization)}
                ),
            )
        fused_loras = sorted(self.flow.pipeline.fused_loras)
        if fused_loras:
            logger.warning(
                f"The pipeline has {fused_loras} fused into its weights. What is trained goes on top of that, and the model "
                "card says so: whoever loads the new LoRA loads and fuses them first."
            )
        self.image_sampler = self._make_image_sampler(args, has_adapter=not full_fine_tuning)
        self.conditioning = self.image_sampler.conditioning
        self.sigmas = self.image_sampler.sigmas
        self.height, self.width = self.image_sampler.size
        self.guidance_scale = self.image_sampler.guidance_scale
        with whole_weights():
            self.rewards = load_rewards(reward_specs)
            self.watched_rewards = load_rewards(watch_specs)
        if args.metric_for_best_model is None and any(isinstance(c, EarlyStoppingCallback) for c in callbacks or []):
            args.metric_for_best_model, args.greater_is_better = args.BEST_METRIC, True
        self._check_best_metric(args, full_fine_tuning)
        weights = [1.0] * len(self.rewards) if args.reward_weights is None else args.reward_weights
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)

        if isinstance(train_dataset, IterableDataset):
            # Each process reads the stream and takes its rows of it; the trainer's loader would send tensors around.
            args.accelerator_config.dispatch_batches = False
            train_dataset = self._sampler
        self._prepare_conditioning(args, train_dataset, eval_dataset)
        if not args.offload_frozen:
            for module in self.frozen_modules:
                module.to(args.device)

        denoiser = self.flow.denoiser
        if full_fine_tuning and denoiser.config.get("quantization_config") is not None:
            raise ValueError(
                "peft_config=False, but the pipeline's transformer is quantised, and quantised weights cannot be trained. "
                "Train a LoRA, or load the pipeline without quantization_config."
            )
        denoiser._internal_dict = _SerializableConfig(denoiser.config)
        if args.activation_checkpointing:
            # A diffusers model has another method than the one Trainer would call. Older releases of transformers
            # read the old name.
            denoiser.enable_gradient_checkpointing()
            args.activation_checkpointing = args.gradient_checkpointing = False
        if full_fine_tuning:
            network = denoiser.requires_grad_(True)
        else:
            if peft_config is None:
                peft_config = self._default_peft_config()
            elif peft_config.target_modules is None:
                peft_config = copy.copy(peft_config)
                peft_config.target_modules = self.flow.lora_target_modules
            set_seed(args.seed)  # the adapter's start is random; Trainer sets the seed only later
            # ZeRO-3 partitions parameters of one dtype; elsewhere the adapter is trained in float32.
            network = get_peft_model(denoiser, peft_config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
        self.flow.freeze_unused(network)
        check_optimizer_holds(optimizers[0], network)

        self._card_arguments = {}
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._running_metrics = RunningMetrics()
        self._base_scores = {}
        self._seconds = defaultdict(float)
        self._images_since_log = 0
        self._last_log = (0, time.perf_counter())
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
        self.samples_callback = SampleImagesCallback(self.callback_handler) if args.log_samples else None
        # The data loader does not forward the epoch to a sampler inside accelerate's batch sampler.
        self.add_callback(EpochCallback(self._sampler))

    # ---- What a subclass defines ----

    @abstractmethod
    def loss_terms(self, model: nn.Module, inputs: Any) -> Sequence[LossTerm]:
        """
        The terms of the loss of one micro-batch; their sum is the loss.

        A term is called when its turn comes and its gradient is taken before the next is called, so memory holds the
        graph of one term. Every process must return the same number of terms with the same number of forwards.

        Args:
            model (`nn.Module`): the denoiser as wrapped for training.
            inputs: what `_prepare_inputs` returned.
        """

    @abstractmethod
    def _make_sampler(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset
    ) -> GroupSampler | BucketSampler | GroupStream:
        """The order of the training rows; made before weights are loaded, so that it can refuse the dataset."""

    def _check_before_loading(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset, reward_specs: list[str | Reward]
    ) -> None:
        """Checks of a subclass that need no weights."""

    # ---- Set-up ----

    def _check_best_metric(self, args: DiffusionConfig, full_fine_tuning: bool) -> None:
        if args.metric_for_best_model is None:
            return
        scores = self._evaluation_names()
        names = [*scores]
        if not full_fine_tuning:
            names += [f"base/{name}" for name in scores]
            names += [f"win_rate/{name.removesuffix('/mean')}" for name in scores]
        if args.metric_for_best_model.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} is not among the metrics of an evaluation. Choose "
                f"one of {', '.join(names)}."
            )

    def _default_peft_config(self) -> LoraConfig:
        return LoraConfig(**DEFAULT_LORA, target_modules=self.flow.lora_target_modules)

    def _make_image_sampler(self, args: DiffusionConfig, has_adapter: bool) -> Sampler:
        store = open_prompt_store(self.flow, args.prompt_cache_gib) if args.cache_prompt_embeds else None
        window = -(-args.prompt_window // args.world_size)
        conditioning = Conditioning(self.flow, args.device, window, store)
        conditioning.upcoming = self._upcoming_prompts
        return Sampler.from_settings(
            self.flow,
            args.num_inference_steps,
            args.height,
            args.width,
            args.guidance_scale,
            args.sigma_shift,
            conditioning,
            batch_size=args.rollout_batch_size or args.per_device_train_batch_size,
            generator_device=args.device,
            forward_context=self._forward_context,
            adapter_off=self.adapter_off if has_adapter else None,
        )

    def _prepare_conditioning(
        self, args: DiffusionConfig, train_dataset: Dataset | IterableDataset, eval_dataset: Dataset | None
    ) -> None:
        if isinstance(train_dataset, Dataset):
            datasets = [train_dataset] if eval_dataset is None else [eval_dataset, train_dataset]
            prompts: dict[str, None] = {}
            for prompt in itertools.chain.from_iterable(dataset["prompt"] for dataset in datasets):
                prompts[prompt] = None
                if len(prompts) > args.prompt_window:
                    break
            else:
                self.conditioning.keep_all(prompts)
                return
        if eval_dataset is not None:
            share = evaluation_share(args.num_eval_images, args.process_index, args.world_size)
            prompts = dict.fromkeys(eval_dataset[index % len(eval_dataset)]["prompt"] for index in share)
            if len(prompts) <= self.conditioning.window:
                self.conditioning.keep(prompts)

    @abstractmethod
    def _upcoming_rows(self) -> Iterator[int | dict[str, Any]]:
        """The rows that this process will train from now on, without end, as its sampler gives them."""

    def _upcoming_prompts(self) -> Iterator[str]:
        if isinstance(self._sampler, GroupStream):
            return (row["prompt"] for row in self._upcoming_rows())
        prompts = self.train_dataset.select_columns("prompt")
        return (prompts[row]["prompt"] for row in self._upcoming_rows())

    def first_prompts(self, count: int) -> list[str]:
        """The first distinct prompts to show, of the evaluation dataset where there is one."""
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, GroupStream):
            prompts = (row["prompt"] for row in dataset.stream)
        else:
            prompts = iter(dataset["prompt"])
        # Of a long dataset the beginning is enough.
        return list(dict.fromkeys(itertools.islice(prompts, 100 * count)))[:count]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        wants_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP") or self.args.fsdp_plugin_args is not None
        if wants_fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            raise ValueError(
                "FSDP2 is asked for on processes without accelerators, where accelerate does not shard. Use zero2 or "
                "zero3 to shard on CPUs, or multi_gpu, which copies the weights to each process."
            )
        if self.is_fsdp_enabled:
            keep_float32_inputs(self.accelerator.state.fsdp_plugin)

    def _set_signature_columns_if_needed(self) -> None:
        # The columns of the dataset are for the rewards; the model's forward knows none of them.
        if self._signature_columns is None:
            self._signature_columns = ["prompt"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupSampler | BucketSampler:
        return self._sampler

    @property
    def network(self) -> nn.Module:
        """The network that is trained, without what the training wraps around it: DDP, DeepSpeed, `torch.compile`."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return isinstance(self.network, PeftModel)

    # ---- Sampling ----

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Velocity `(B, ...)`, float32, at latents and sigma `(B,)`, by [`Sampler.velocity`], as in a rollout."""
        return self.image_sampler.velocity(model, latents, sigma, conditioning)

    @contextlib.contextmanager
    def _forward_context(self) -> Iterator[None]:
        """What each forward of the network runs in, in a rollout and in training."""
        # Once the training has begun, DeepSpeed has converted the weights and FSDP2 converts them; elsewhere autocast does.
        if self.deepspeed is not None:
            self.flow.dtype = next(self.deepspeed.module.parameters()).dtype
        elif (
            isinstance(self.model, FSDPModule)
            and self.accelerator.state.fsdp_plugin.mixed_precision_policy is not None
        ):
            self.flow.dtype = self.accelerator.state.fsdp_plugin.mixed_precision_policy.param_dtype
        with self.compute_loss_context_manager():
            yield

    def _global_index(self, count: int) -> list[int]:
        """The place among the images of all processes of each of this process's rows, see [`GroupSampler`]."""
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        rank = self.accelerator.process_index
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
        return [
            torch.Generator(self.args.device).manual_seed(
                int(np.random.SeedSequence([self.args.seed, *path, index]).generate_state(1, np.uint64)[0] >> 1)
            )
            for index in indices
        ]

    def randn(self, generators: list[torch.Generator], like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise like the latents `(B, ...)`, one generator a sample."""
        return randn_tensor(tuple(like.shape), generator=generators, device=like.device, dtype=like.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [0, 1], float32, without gradient, decoded `rollout_batch_size` at a time."""
        with self.on_accelerator(self.flow.vae):
            return self.image_sampler.decode(latents)

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The VAE and those rewards that are models, each once."""
        rewards = [*self.rewards.values(), *self.watched_rewards.values()]
        return [self.flow.vae, *dict.fromkeys(reward for reward in rewards if isinstance(reward, nn.Module))]

    @contextlib.contextmanager
    def on_accelerator(self, *modules: Any) -> Iterator[None]:
        """Within this context these frozen modules can be used; with `offload_frozen` they are on the CPU outside of it."""
        modules = [module for module in modules if isinstance(module, nn.Module)] if self.args.offload_frozen else []
        for module in modules:
            module.to(self.args.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")

    @property
    def rollout_batch_size(self) -> int:
        return self.image_sampler.batch_size

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        adapter_fraction: float = 1.0,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """
        Sample images deterministically (Euler) on the trainer's schedule, at its size and guidance, with the moving
        average of the weights where `ema_decay` is set.

        Args:
            prompts (`list[str]` of length B):
                Prompts, of the datasets given to the trainer.
            seeds (`Sequence[int]` of length B):
                Seed of each image's initial noise.
            adapter_fraction (`float`, *optional*, defaults to `1.0`):
                The adapter is on for this share of the steps, from the noisy end, and off for the rest: 1 is the
                trained model, 0 the base model, 0.6 the hybrid of [Chunk-GRPO](https://huggingface.co/papers/2510.21583).
            batch_size (`int`, *optional*):
                Images sampled together; `rollout_batch_size` by default.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, float32, in [0, 1], on the CPU.
        """
        sampler = self.image_sampler if batch_size is None else replace(self.image_sampler, batch_size=batch_size)
        with self.averaged_weights(), self.rollout_model() as model:
            clean = list(sampler.draw_latents(prompts, seeds, model, adapter_fraction))
        return torch.cat([self.decode(part).cpu() for part in clean])

    @contextlib.contextmanager
    def rollout_model(self) -> Iterator[nn.Module]:
        """The network to sample with, in eval mode (no dropout); the former mode returns afterwards."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        context = contextlib.nullcontext(model)
        if model is self.model and not isinstance(model, FSDPModule):
            # Until the training starts, the Trainer leaves the network of a sharded run on the CPU.
            model.to(self.args.device)
        elif self.deepspeed is not None and self.deepspeed.zero_optimization_partition_weights():
            if self.args.ds3_gather_for_rollout:
                from ..runtime.deepspeed_internals import gathered

                context = gathered(self.deepspeed)
        try:
            with context as whole:
                yield whole
        finally:
            model.train(was_training)

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model is the base model."""
        return self.policies.use(REFERENCE)

    def score(
        self, rewards: dict[str, Reward], images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> torch.Tensor:
        """Scores `(B, R)` of images, NaN where a reward does not apply; scored `rollout_batch_size` at a time."""
        size = self.rollout_batch_size
        scores = []
        for name, reward in rewards.items():
            parts = []
            with self.on_accelerator(reward):
                for start in range(0, len(prompts), size):
                    rows = slice(start, start + size)
                    columns_of_rows = {column: values[rows] for column, values in columns.items()}
                    call = partial(score_images, reward, images[rows], prompts[rows], columns_of_rows)
                    parts.append(self.call_reward(name, prompts[rows], call))
            scores.append(torch.cat(parts))
        return torch.stack(scores, 1) if scores else images.new_zeros((len(prompts), 0))

    def call_reward(self, name: str, prompts: Sequence[str], call: Callable[[], T]) -> T:
        """
        Call a reward under `reward_timeout` and `reward_retries`. During a training all processes must call this
        together: where it fails for good on one of them, all of them save a checkpoint and stop.
        """
        args = self.args
        result, failure = None, None
        try:
            result = call_reward(name, prompts, call, args.reward_timeout, args.reward_retries, args.device)
        except (RewardError, TypeError, ValueError) as error:
            failure = error
        self.stop_together(failure, "a reward")
        return result

    def _keep_samples(self, images: torch.Tensor, prompts: list[str], values: dict[str, torch.Tensor]) -> None:
        """Hand the first images, with one value `(B,)` a name, to the callback that writes them when next logging."""
        if self.samples_callback is None:
            return
        count = self.args.num_samples_to_log
        self.samples_callback.samples = Samples(
            images=images[:count].cpu(),
            prompts=prompts[:count],
            values={name: column[:count].tolist() for name, column in values.items()},
        )

    # ---- Training step ----

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        self._stop_if_terminated()
        model.train()
        inputs = self._prepare_inputs(inputs)
        prompts = self._prompts_of(inputs)
        self._step_losses.append(([], f"the prompts {shown(prompts)}"))
        kwargs = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        with self.timed("update"), self.on_accelerator(*self._modules_of_update()):
            terms = self.loss_terms(model, inputs)
            state = self.accelerator.gradient_state
            synchronize = state.sync_gradients
            total = torch.zeros((), device=self.args.device)
            for index, term in enumerate(terms):
                # Gradients are exchanged once, with the last term; DDP decides on that in the forward already.
                exchange = synchronize and index == len(terms) - 1
                with contextlib.nullcontext() if exchange else self._no_exchange(model):
                    state._set_sync_gradients(exchange)
                    loss = term()
                    self._note_loss(loss)
                    if exchange:
                        loss = self._spoil_bad_step(loss)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps, **kwargs)
                total += loss.detach()
            state._set_sync_gradients(synchronize)
        return total / self.current_gradient_accumulation_steps

    def _no_exchange(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context a backward pass keeps its gradients to this process, where that saves more than it costs."""
        if isinstance(model, FSDPModule):
            # FSDP2 holds gradients that are not exchanged whole, in float32, and the Trainer lets it do so in all
            # micro-batches but the last.
            model.set_requires_gradient_sync(True)
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def _modules_of_update(self) -> list[nn.Module]:
        """The frozen modules that the loss terms run through."""
        return []

    @abstractmethod
    def _prompts_of(self, inputs: Any) -> list[str]:
        """The prompts of a micro-batch, for messages."""

    # ---- Logging ----

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of a phase; on an accelerator its work is waited for."""
        start = time.perf_counter()
        yield
        if self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).synchronize()
        self._seconds[phase] += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._take_metrics(), **self._speed_and_memory(), "skipped_steps": self._skipped_steps}
        super().log(logs, start_time)

    def _take_metrics(self) -> dict[str, float]:
        """The metrics of the training since the last log; called on every process."""
        metrics = {name: _mean(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        metrics |= self._running_metrics.take(self.accelerator)
        norm = self._adapter_norm()
        return metrics if norm is None else metrics | {"adapter_norm": norm}

    def _adapter_norm(self) -> float | None:
        context = contextlib.nullcontext()
        if self.deepspeed is not None and self.deepspeed.zero_optimization_partition_weights():
            import deepspeed

            context = deepspeed.zero.GatheredParameters([p for p in self.model.parameters() if p.requires_grad])
        with context:
            return lora_update_norm(self.model)

    def _speed_and_memory(self) -> dict[str, float]:
        step, since = self._last_log
        now = time.perf_counter()
        steps = max(1, self.state.global_step - step)
        logs = {f"time/{phase}": seconds / steps for phase, seconds in self._seconds.items()}
        logs["images_per_second"] = self._images_since_log * self.accelerator.num_processes / (now - since)
        if self.args.device.type == "cpu":
            used = psutil.Process().memory_info().rss
        else:
            used = torch.get_device_module(self.args.device).max_memory_allocated()
        logs["memory/peak_gib"] = used / 2**30
        self._seconds.clear()
        self._images_since_log = 0
        self._last_log = (self.state.global_step, now)
        return logs

    # ---- Saving and resuming ----

    def _fixed_settings(self) -> dict[str, Any]:
        args = self.args
        settings = {
            **super()._fixed_settings(),
            "pipeline": type(self.flow.pipeline).__name__,
            "seed": args.seed,
            "data_seed": args.seed if args.data_seed is None else args.data_seed,
            **self._sampler.fixed_settings(),
            "peft_config": "LoRA" if self.has_adapter else False,
        }
        if self.has_adapter:
            for name, value in self.network.peft_config[self.network.active_adapter].to_dict().items():
                if name not in FREE_LORA_SETTINGS:
                    settings[f"peft_config.{name}"] = sorted(value) if isinstance(value, set) else value
        return settings

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.args.should_save:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        network, base_model = self.network, hub_id(self.model_name)
        if self.has_adapter:
            save_adapter(network, type(self.flow.pipeline), output_dir, state_dict=state_dict, base_model=base_model)
        else:
            folder = output_dir / TRANSFORMER_SUBFOLDER
            state_dict = network.state_dict() if state_dict is None else state_dict
            check_names(state_dict, plain_network(network).state_dict())
            network.save_config(folder)
            save_torch_state_dict(state_dict, folder, filename_pattern=WEIGHTS_PATTERN)
        torch.save(self.args.without_secrets(), output_dir / "training_args.bin")

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
            load_torch_model(
                self.network, Path(resume_from_checkpoint) / TRANSFORMER_SUBFOLDER, filename_pattern=WEIGHTS_PATTERN
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


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def _mean(values: list[float]) -> float:
    """The mean of what is not NaN; NaN where all is, as in a step whose loss is not finite."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _check_writable(folder: str) -> None:
    """Refuse an output folder that cannot be written, before a run that would lose its results."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {folder!r} is not writable: {error.strerror}. Choose another folder or change its permissions."
        ) from error
