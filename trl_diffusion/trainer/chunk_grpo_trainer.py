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

"""Group-relative policy optimisation of chunks of sampling steps."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from ..flow import (
    chunk_steps,
    draw_chunks,
    equal_chunk_sizes,
    log_prob,
    temporal_chunk_sizes,
    temporal_chunk_weights,
    train_window_offset,
    transition_coefficients,
    transition_mean,
)
from ..objectives import chunk_ratio, clipped_surrogate, guarded_log_probs, masked_surrogate, transition_kl
from ..rewards import Reward
from ..runtime.checkpoints import checkpoints, why_incomplete
from ..runtime.policies import REFERENCE
from ..runtime.resuming import as_saved, refuse_changed, saved_state
from ..runtime.term_trainer import LossTerm
from .chunk_grpo_config import ChunkGRPOConfig
from .generation import Generation, beginning_groups, not_kept, shared
from .online_trainer import METHOD_STREAM, OnlineTrainer


logger = get_logger(__name__)

# The stream of random numbers that draws chunks and windows.
_CHUNKS = METHOD_STREAM


@dataclass(kw_only=True)
class MicroBatch(Generation):
    """
    A [`Generation`] with what chunks need of it.

    Attributes:
        chunks (`list[list[int]]`): the transitions of each trained chunk.
        divisors (`list[int]`): of each chunk's loss, so that their sum is the loss of a sample.
        old_log_probs (`torch.Tensor` of shape `(m, T)` or `None`): of the sampling policy; `None` where the update is
            strictly on-policy.
        old_means (`dict[int, torch.Tensor]`): means `(m, ...)` of each trained transition under the sampling policy; empty
            where the trust region needs none, or the update is strictly on-policy.
        reference_means (`dict[int, torch.Tensor]`): means `(m, ...)` of each trained transition under the reference; empty
            without a KL term.
        common_step (`int`, *optional*): a transition that is not trained with the images of each micro-batch, but with all
            of a group, where it begins; see [`ChunkGRPOTrainer._train_common_step_once`].
        beginning (`MicroBatch`, *optional*): the images that train `common_step` in this micro-batch.
    """

    chunks: list[list[int]] = shared()
    divisors: list[int] = shared()
    old_log_probs: torch.Tensor | None = None
    old_means: dict[int, torch.Tensor] = field(default_factory=dict)
    reference_means: dict[int, torch.Tensor] = field(default_factory=dict)
    common_step: int | None = not_kept()
    beginning: "MicroBatch | None" = not_kept()


class ChunkGRPOTrainer(OnlineTrainer):
    """
    Trainer for [Chunk-GRPO](https://huggingface.co/papers/2510.21583): online reinforcement learning of flow-matching
    text-to-image models that optimises chunks of consecutive sampling steps. Chunks of one step are step-level GRPO
    ([DanceGRPO](https://huggingface.co/papers/2505.07818), [Flow-GRPO](https://huggingface.co/papers/2505.05470)); a
    window of noisy steps is [MixGRPO](https://huggingface.co/papers/2507.21802); other trust regions are those of
    [GRPO-Guard](https://huggingface.co/papers/2510.22319) and [Flow-DPPO](https://huggingface.co/papers/2606.11025).

    ```python
    from datasets import load_dataset
    from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer


    def reward(images, prompts, **columns):
        return [float(image.resize((1, 1)).getpixel((0, 0))[0]) for image in images]


    trainer = ChunkGRPOTrainer(
        model="black-forest-labs/FLUX.1-dev",
        reward_funcs=reward,
        args=ChunkGRPOConfig(output_dir="flux-chunk-grpo"),
        train_dataset=load_dataset("...", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Id or path of a pipeline, `"shapes"` for the embedded world, or a loaded pipeline. A loaded pipeline loses
            its text encoders once all prompts of the run are encoded, where they fit into one window.
        reward_funcs (`str`, [`~trl_diffusion.rewards.RewardModel`], `Callable`, or a list of these):
            Rewards to maximise, see [`~trl_diffusion.rewards.load_reward`]. A callable gets `(images: list[PIL.Image],
            prompts: list[str], **columns)` with the dataset's other columns, and returns a list of float or None.
        args ([`ChunkGRPOConfig`], *optional*):
            Settings.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Prompts, in a column "prompt", and for a model that edits images these, in a column "condition_image". A stream
            needs `max_steps` and is trained in its own order.
        eval_dataset (`datasets.Dataset`, *optional*):
            Prompts of the evaluations.
        callbacks (`list[TrainerCallback]`, *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use, for full fine-tuning of a loaded pipeline. The weights of a LoRA, and of a
            pipeline that the trainer loads, are made later than such an optimizer: pass `optimizer_cls_and_kwargs`.
        peft_config ([`~peft.LoraConfig`] or `False`, *optional*):
            Adapter; `None` is LoRA on the family's attention layers, `False` full fine-tuning.
        watch_reward_funcs (as `reward_funcs`, *optional*):
            Rewards that are logged and not trained, to see reward hacking.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class of an optimizer and its arguments, as `(torch.optim.SGD, {"lr": 0.1})`, in place of `args.optim`; the
            trainer gives it the trained weights.
    """

    method_name = "Chunk-GRPO"
    config_class = ChunkGRPOConfig
    generation_class = MicroBatch
    _state_within_step = ("_images_trained", "_micro_batches", "chunk_sizes")

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: str | Reward | list[str | Reward],
        args: ChunkGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | bool | None = None,
        watch_reward_funcs: str | Reward | list[str | Reward] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ):
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, callbacks, optimizers, peft_config,
            watch_reward_funcs, optimizer_cls_and_kwargs,
        )  # fmt: skip
        args = self.args
        device = args.device
        self.transitions = transition_coefficients(self.sigmas, args.sde_type, args.eta)
        self._transitions_on_device = self.transitions.to(device, torch.float32)
        self._sigmas_on_device = self.sigmas.to(device)
        self._step_lengths = (self.sigmas[:-1] - self.sigmas[1:]).tolist()
        self.chunk_sizes = None if args.chunk_sizes == "temporal" else args.chunk_sizes

    @property
    def papers(self) -> tuple[str, ...]:
        used = {
            "mix_grpo": self.args.train_window is not None,
            "grpo_guard": self.args.trust_region == "guard",
            "flow_dppo": self.args.trust_region == "kl",
        }
        return ("chunk_grpo", "dance_grpo", "flow_grpo", *(paper for paper, is_used in used.items() if is_used))

    def _needs_copy_of_reference(self) -> bool:
        return self.args.beta > 0 and not self.has_adapter

    # ---- Generation ----

    def make_micro_batches(self, rows: list[dict[str, Any]], index: int) -> list[MicroBatch]:
        """A generation whose trained transitions are cut into chunks."""
        args = self.args
        # Which chunks train is known before the rollout, unless it depends on the rollout's dynamics.
        drawn = None
        if args.train_window is not None or (self.chunk_sizes is not None and args.chunk_sampling != "temporal"):
            drawn = self._draw_chunks(index, None)
        keep = range(args.num_inference_steps - 1) if drawn is None else sum(drawn, [])
        transitions = self.transitions
        if args.stochastic_steps == "trained":
            transitions = transition_coefficients(self.sigmas, args.sde_type, args.eta, stochastic=keep)
        generation = self.make_generation(rows, index, transitions, keep)

        if drawn is None:
            changes = generation.relative_changes.mean(0)[:-1]
            changes = self.accelerator.reduce(changes, reduction="mean").cpu()
            if self.chunk_sizes is None:
                self.chunk_sizes = temporal_chunk_sizes(changes, args.num_chunks, args.min_chunk_size)
                logger.info(f"Temporal chunk layout of this run, the noisiest first: {self.chunk_sizes}")
            drawn = self._draw_chunks(index, changes)
        needed = {state for chunk in drawn for i in chunk for state in (i, i + 1)}
        generation.states = {i: latents for i, latents in generation.states.items() if i in needed}
        # Every chunk weighs the same, whatever its size.
        if args.loss_weighting == "inverse_chunk_size":
            generation.chunks = [[step] for chunk in drawn for step in chunk]
            generation.divisors = [len(chunk) * len(drawn) for chunk in drawn for _ in chunk]
        else:
            generation.chunks, generation.divisors = drawn, [len(drawn)] * len(drawn)

        micro_batches = generation.split(args.per_device_train_batch_size)
        if args.on_policy:
            self._train_common_step_once(generation, micro_batches)
        else:
            with self.timed("old_log_probs"), self.rollout_model() as model:
                for micro_batch in micro_batches:
                    self._add_old_policy(model, micro_batch)
        if args.beta > 0:
            self._add_reference_means(micro_batches)
        return micro_batches

    def _train_common_step_once(self, generation: MicroBatch, micro_batches: list[MicroBatch]) -> None:
        """
        Where the images of a group are in several micro-batches, and one optimizer step trains them all: let the first of
        these train the transition whose input they have in common, for the whole group by one forward.

        That is possible where the update is on-policy: the ratio of a chunk is 1, and the gradient of one of its transitions
        needs none of the others.
        """
        args, step = self.args, self._last_common(generation)
        steps = sum(generation.chunks, [])
        if step not in steps or len(steps) == 1:  # a micro-batch that trains nothing has no loss
            return
        groups = [
            self._groups(self._global_index(len(generation.prompts), process)) for process in range(args.world_size)
        ]
        # Decided alike on all processes, which must call a network that is sharded equally often.
        beginning = beginning_groups(groups, args.per_device_train_batch_size)
        if beginning is None:
            return
        for micro_batch, rows in zip(micro_batches, beginning[self.accelerator.process_index], strict=True):
            micro_batch.common_step = step
            micro_batch.beginning = None if rows is None else generation.part(rows)

    def _last_common(self, generation: MicroBatch) -> int:
        """The last transition whose input is the same for all images of a group, -1 if there is none."""
        if self.args.shared_noise != "group" or not self._computes_common_once:
            return -1
        return 0 if self.args.stochastic_steps == "all" else min(map(min, generation.chunks))

    def _draw_chunks(self, generation: int, relative_changes: torch.Tensor | None) -> list[list[int]]:
        """The transitions of each chunk that trains in this generation, the same on every process."""
        args = self.args
        seed = int(np.random.SeedSequence([args.seed, _CHUNKS, generation]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        if args.train_window is not None:
            offset = train_window_offset(
                args.num_inference_steps - 1, args.train_window, generation, args.window_schedule,
                args.window_interval, args.window_stride, generator,
            )  # fmt: skip
            steps = chunk_steps(equal_chunk_sizes(args.train_window, args.window_chunk))
            return [[offset + step for step in chunk] for chunk in steps]
        steps = chunk_steps(self.chunk_sizes)
        if isinstance(args.chunk_sampling, list):
            return [steps[index] for index in args.chunk_sampling]
        weights = None
        if args.chunk_sampling == "temporal":
            weights = temporal_chunk_weights(relative_changes, self.chunk_sizes)
        return [steps[index] for index in draw_chunks(len(steps), args.chunk_fraction, weights, generator)]

    # ---- Objective ----

    def _transition(
        self, model: nn.Module, micro_batch: MicroBatch, steps: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The transitions `steps` of a micro-batch in one forward: log-probabilities `(m, S)`, means and std, the latter
        two step by step along the batch `(S * m, ...)`.
        """
        m = len(micro_batch.prompts)
        latents = torch.cat([micro_batch.states[i] for i in steps])
        following = torch.cat([micro_batch.states[i + 1] for i in steps])
        index = torch.tensor(steps, device=latents.device).repeat_interleave(m)
        rows, places = self._inputs(micro_batch, steps)
        conditioning = self.conditioning.get([micro_batch.prompts[row % m] for row in rows])
        distinct, places = (torch.tensor(numbers, device=latents.device) for numbers in (rows, places))
        velocity = self.velocity(model, latents[distinct], self._sigmas_on_device[index[distinct]], conditioning)
        velocity = velocity[places]  # adds up the gradients of a group
        coefficients = self._transitions_on_device.rows(index, latents.ndim)
        mean = transition_mean(latents, velocity, coefficients)
        return log_prob(following, mean, coefficients.std).view(len(steps), m).T, mean, coefficients.std

    def _inputs(self, micro_batch: MicroBatch, steps: list[int]) -> tuple[list[int], list[int]]:
        """
        Of the rows of a forward, step by step along the batch, those with distinct inputs, and the place among them of
        every row: until their noise differs, the images of a group have one input.
        """
        last_common = self._last_common(micro_batch)
        rows, distinct, places, known = 0, [], [], {}
        for step in steps:
            keys = self._groups(micro_batch.index) if step <= last_common else micro_batch.index
            for key in keys:
                if (step, key) not in known:
                    known[step, key] = len(distinct)
                    distinct.append(rows)
                places.append(known[step, key])
                rows += 1
        return distinct, places

    def _forwards_of(self, micro_batch: MicroBatch) -> list[tuple[MicroBatch, int, list[int]]]:
        """The forwards of an update: of which images, of which trained chunk, at which of its transitions."""
        forwards = []
        for index, chunk in enumerate(micro_batch.chunks):
            own = [step for step in chunk if step != micro_batch.common_step]
            if len(own) < len(chunk) and micro_batch.beginning is not None:
                forwards.append((micro_batch.beginning, index, [micro_batch.common_step]))
            if self.args.chunk_gradient == "streamed":
                forwards += [(micro_batch, index, [step]) for step in own]
            elif own:
                forwards.append((micro_batch, index, own))
        return forwards

    @torch.no_grad()
    def _add_reference_means(self, micro_batches: list[MicroBatch]) -> None:
        # Once a generation, since another policy cannot be used between a forward and its backward; in the batch shapes of
        # training.
        with self.timed("reference"), self.policies.use(REFERENCE), self.rollout_model() as model:
            for images, _, steps in itertools.chain.from_iterable(map(self._forwards_of, micro_batches)):
                mean = self._transition(model, images, steps)[1]
                images.reference_means |= dict(zip(steps, mean.split(len(images.prompts)), strict=True))

    def _add_old_policy(self, model: nn.Module, micro_batch: MicroBatch) -> None:
        """What the objective needs of the sampling policy at the trained transitions, in the batch shapes of training."""
        micro_batch.old_log_probs = micro_batch.log_probs.clone()
        if self.args.old_log_probs == "rollout":
            return
        for _, _, steps in self._forwards_of(micro_batch):
            # What is compiled for a gradient rounds otherwise than what is compiled without.
            with torch.set_grad_enabled(self.args.compile_denoiser), self._no_exchange(model):
                log_probs, mean, _ = self._transition(model, micro_batch, steps)
            micro_batch.old_log_probs[:, steps] = log_probs.detach()
            if self.args.trust_region != "clip":
                means = mean.detach().split(len(micro_batch.prompts))
                micro_batch.old_means |= dict(zip(steps, means, strict=True))

    def loss_terms(self, model: nn.Module, micro_batch: MicroBatch) -> Sequence[LossTerm]:
        """
        One term for each trained chunk (`chunk_gradient="joint"`), or for each of its steps (`"streamed"`), and one for the
        step that the images of a group have in common, where it is trained for all of them at once.

        The loss is the mean over images and trained chunks of the surrogate within its trust region, plus `beta` times
        the KL divergence to the reference; every chunk weighs the same, whatever its size.
        """
        terms = []
        weights = defaultdict(dict)  # of a chunk, computed by its first term and used by all
        for images, index, steps in self._forwards_of(micro_batch):
            chunk, divisor = micro_batch.chunks[index], micro_batch.divisors[index]
            if self.args.chunk_gradient == "joint" and images is micro_batch and steps == chunk:
                terms.append(partial(self._joint_term, model, images, chunk, divisor))
            else:
                # Of the chunk's loss on the micro-batch, which is a mean over as many images as it has, whichever they are.
                share = len(images.prompts) / len(micro_batch.prompts) * len(steps) / len(chunk)
                of_chunk = weights[index, images is micro_batch]
                terms.append(partial(self._term_of_steps, model, images, chunk, divisor, steps, share, of_chunk))
        return terms

    def _compared(
        self, micro_batch: MicroBatch, steps: list[int], log_probs: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        What [`_transition`] has given of `steps`, against the sampling policy: the log-probabilities of both that make the
        ratio, and the divergence, each `(m, S)`; the divergence is 0 where the trust region does not ask for it.
        """
        on_policy = micro_batch.old_log_probs is None
        old_log_probs = log_probs.detach() if on_policy else micro_batch.old_log_probs[:, steps]
        if self.args.trust_region == "clip":
            return log_probs, old_log_probs, torch.zeros_like(old_log_probs)
        old_mean = mean.detach() if on_policy else torch.cat([micro_batch.old_means[step] for step in steps])
        divergence = transition_kl(mean, old_mean, std).view(len(steps), -1).T
        if self.args.trust_region == "guard":
            std = std.view(len(steps), -1).T
            return *guarded_log_probs(log_probs, old_log_probs, divergence, std), divergence
        return log_probs, old_log_probs, divergence

    def _surrogate(
        self, chunk: list[int], ratio: torch.Tensor, advantages: torch.Tensor, divergence: torch.Tensor
    ) -> torch.Tensor:
        """The loss `(m,)` of a chunk, by its ratio `(m,)` and its mean divergence `(m,)`."""
        args = self.args
        if args.trust_region == "kl":
            return masked_surrogate(ratio, advantages, divergence, args.kl_threshold)
        loss = clipped_surrogate(ratio, advantages, args.epsilon, args.epsilon_high)
        if args.trust_region == "guard":
            # The gradient of a long step would be larger than that of a short one.
            loss = loss / np.mean([self._step_lengths[step] for step in chunk])
        return loss

    def _joint_term(self, model: nn.Module, micro_batch: MicroBatch, chunk: list[int], divisor: int) -> torch.Tensor:
        log_probs, mean, std = self._transition(model, micro_batch, chunk)
        new, old, divergence = self._compared(micro_batch, chunk, log_probs, mean, std)
        divergence = divergence.detach().mean(1)
        surrogate = self._surrogate(chunk, chunk_ratio(new, old), micro_batch.advantages, divergence)
        self._record_ratio(micro_batch, chunk, log_probs, new, old, divergence)
        return (surrogate.mean() + self._kl_term(micro_batch, chunk, mean, std)) / divisor

    def _term_of_steps(
        self,
        model: nn.Module,
        micro_batch: MicroBatch,
        chunk: list[int],
        divisor: int,
        steps: list[int],
        share: float,
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The share of some of a chunk's steps in its loss and gradient, the ratio of the whole chunk being known."""
        advantages = micro_batch.advantages
        if not weights:
            ratio, divergence = torch.ones_like(advantages), torch.zeros_like(advantages)
            if micro_batch.old_log_probs is not None:
                ratio, divergence = self._ratio_of_chunk(model, micro_batch, chunk)
            ratio.requires_grad_()
            value = self._surrogate(chunk, ratio, advantages, divergence)
            (gradient,) = torch.autograd.grad(value.sum(), ratio)
            # The derivative by the mean of the steps' log-probabilities.
            weights["log_prob"], weights["value"] = gradient * ratio.detach(), value.detach()
        log_probs, mean, std = self._transition(model, micro_batch, steps)
        new, old, divergence = self._compared(micro_batch, steps, log_probs, mean, std)
        if micro_batch.old_log_probs is None:
            self._record_ratio(micro_batch, steps, log_probs, new, old, divergence.mean(1), share)
        weighted = weights["log_prob"] * new.mean(1)
        # The gradient is that of `weighted`, the value that of the chunk's loss.
        loss = (weighted - weighted.detach() + weights["value"]).mean()
        return (loss + self._kl_term(micro_batch, steps, mean, std, share)) * (share / divisor)

    @torch.no_grad()
    def _ratio_of_chunk(
        self, model: nn.Module, micro_batch: MicroBatch, chunk: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ratio and the mean divergence of a chunk, `(m,)` each, step by step."""
        steps = []
        for step in chunk:
            log_probs, mean, std = self._transition(model, micro_batch, [step])
            steps.append((log_probs, *self._compared(micro_batch, [step], log_probs, mean, std)))
        log_probs, new, old, divergence = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
        divergence = divergence.mean(1)
        self._record_ratio(micro_batch, chunk, log_probs, new, old, divergence)
        return chunk_ratio(new, old), divergence

    def _kl_term(
        self, micro_batch: MicroBatch, steps: list[int], mean: torch.Tensor, std: torch.Tensor, share: float = 1.0
    ) -> torch.Tensor | float:
        if self.args.beta == 0:
            return 0.0
        reference_mean = torch.cat([micro_batch.reference_means[step] for step in steps])
        kl = transition_kl(mean, reference_mean, std).mean()
        self._running_metrics.add({"kl": kl}, weight=share)
        return self.args.beta * kl

    @torch.no_grad()
    def _record_ratio(
        self,
        micro_batch: MicroBatch,
        steps: list[int],
        log_probs: torch.Tensor,
        new: torch.Tensor,
        old: torch.Tensor,
        divergence: torch.Tensor,
        share: float = 1.0,
    ) -> None:
        """
        Add the ratios of a chunk, or of some of its steps, to the metrics: the log-probabilities of training, those that
        [`_compared`] makes of both policies, `(m, cs)` each, and the mean divergence `(m,)`; with their share in the chunk.
        """
        args, advantages = self.args, micro_batch.advantages
        log_ratio = (new - old).mean(1)
        ratio = log_ratio.exp()
        # Off-policy, the policy has moved on by now; the gap is between the two ways to have the old log-probabilities.
        of_training = log_probs if micro_batch.old_log_probs is None else micro_batch.old_log_probs[:, steps]
        gap = (of_training - micro_batch.log_probs[:, steps]).abs()
        if args.trust_region == "kl":
            beyond = divergence > args.kl_threshold
            low, high = beyond & (ratio < 1), beyond & (ratio > 1)
        else:
            low, high = ratio < 1 - args.epsilon, ratio > 1 + args.epsilon_high
        self._running_metrics.add(
            {
                "ratio/mean": ratio.mean(),
                "frac_off_policy": (log_ratio.abs() > 0).float().mean(),
                "clip_ratio/low_mean": (low & (advantages < 0)).float().mean(),
                "clip_ratio/high_mean": (high & (advantages > 0)).float().mean(),
                "rollout_logp_gap": gap.mean(),
                **({} if args.trust_region == "clip" else {"divergence/mean": divergence.mean()}),
            },
            maxima={"log_ratio/abs_max": log_ratio.abs().max()},
            weight=share,
        )

    def _take_metrics(self) -> dict[str, float]:
        metrics = super()._take_metrics()
        gap, epsilon = metrics.get("rollout_logp_gap", 0.0), self.args.epsilon
        if gap > epsilon:
            logger.warning_once(
                f"Log-probabilities of the rollout and of training differ by {gap:.1e} on average, more than "
                f"epsilon={epsilon:.1e}: forwards depend on the batch shape. Keep old_log_probs='recompute', or "
                "set rollout_batch_size=per_device_train_batch_size and chunk_gradient='streamed'."
            )
        return metrics

    # ---- Saving and resuming ----

    def _rollout_settings(self) -> dict[str, Any]:
        """Settings that the states of a generation and the dynamics of a rollout depend on."""
        args = self.args
        names = (
            "num_inference_steps", "sigma_shift", "sde_type", "eta", "stochastic_steps", "chunk_sizes", "train_window"
        )  # fmt: skip
        settings = {name: vars(args)[name] for name in names}
        settings |= {"height": self.height, "width": self.width, "guidance_scale": self.guidance_scale}
        if self.num_frames is not None:  # checkpoints of images say nothing of it
            settings["num_frames"] = self.num_frames
        temporal = args.chunk_sizes == "temporal"
        settings["num_chunks"] = args.num_chunks if temporal else None
        settings["min_chunk_size"] = args.min_chunk_size if temporal else None
        return settings

    def _generation_settings(self) -> dict[str, Any]:
        """Further settings that what is kept of a generation depends on."""
        return {"trust_region": self.args.trust_region, "shared_noise": self.args.shared_noise}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "chunk_sizes": self.chunk_sizes,
            "rollout_settings": self._rollout_settings(),
            "generation_settings": self._generation_settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.chunk_sizes = None if self.args.chunk_sizes == "temporal" else self.args.chunk_sizes
        if self.chunk_sizes is None and state["rollout_settings"] == as_saved(self._rollout_settings()):
            self.chunk_sizes = state["chunk_sizes"]  # as measured

    def _check_settings(self, checkpoint: Path, state: dict[str, Any]) -> None:
        super()._check_settings(checkpoint, state)
        if self._is_between_generations(state):
            return
        ends = [
            path
            for path in checkpoints(checkpoint.parent)
            if why_incomplete(path) is None and self._is_between_generations(saved_state(path))
        ]
        remedy = f"resume from {ends[-1]}, which is at the end of a generation" if ends else "start a new run"
        refuse_changed(
            checkpoint,
            state["rollout_settings"] | state["generation_settings"],
            self._rollout_settings() | self._generation_settings(),
            "It was written within a generation, whose images were made and cut into chunks with the former settings.",
            remedy,
        )

    def _load_process_state(self, folder: str) -> None:
        super()._load_process_state(folder)
        if self._images_trained % self._images_per_generation > 0:
            if self.args.beta > 0 and not self._micro_batches[0].reference_means:
                self._add_reference_means(self._micro_batches)  # they were made without a KL term
