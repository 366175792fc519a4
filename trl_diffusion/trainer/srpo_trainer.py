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

"""Direct-Align with semantic relative preference: a differentiable reward reaches any noise level in one forward."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from ..data.images import ImageBuckets
from ..data.prompt_images import Prompt, prompt_of, texts_of
from ..data.prompts import column_names
from ..data.sampler import BucketSampler, GroupStream
from ..flow import direct_align_pass, interpolate
from ..objectives import discount_at, preference_loss, relative_preference
from ..rewards import Reward, RewardModel, TwoTowerReward, VideoRewardModel, is_differentiable, usual_range
from ..rewards.frames import FRAMES_TOGETHER, reduce_frames, scored_frames
from ..runtime.term_trainer import LossTerm
from .base_trainer import DiffusionTrainer
from .callbacks import RewardHackingCallback
from .srpo_config import SRPOConfig


logger = get_logger(__name__)

# Streams of random numbers, each with its own seeds.
_INITIAL_NOISE, _FRESH_NOISE, _LANDINGS, _STEPS = range(3, 7)


@dataclass
class CleanBatch:
    """
    Clean images of B prompts, as latents, with the noise to align with.

    Attributes:
        prompts (`list[Prompt]` of length B): plain prompts, with the images that they edit.
        clean (`torch.Tensor` of shape `(B, ...)`): clean latents, float32.
        noise (`torch.Tensor` of shape `(B, ...)`): noise prior.
        sigmas (`torch.Tensor` of shape `(L, B)`): noise levels of the L landings.
        states (`dict[int, torch.Tensor]`): latents `(B, ...)` before the sampling steps that `"refl"` and `"draft"`
            start from.
        fresh_noise (`list[torch.Tensor]`): noise of `"draft"`'s re-noisings.
    """

    prompts: list[Prompt]
    clean: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    states: dict[int, torch.Tensor]
    fresh_noise: list[torch.Tensor]


class SRPOTrainer(DiffusionTrainer):
    """
    Trainer for [SRPO](https://huggingface.co/papers/2509.06942): Direct-Align with semantic relative preference. A
    differentiable reward is optimised at any noise level through one forward of the network, without backpropagation
    through sampling. [ReFL](https://huggingface.co/papers/2304.05977) and
    [DRaFT](https://huggingface.co/papers/2309.17400) are other estimators on the same trainer.

    ```python
    from datasets import load_dataset
    from trl_diffusion import SRPOConfig, SRPOTrainer

    trainer = SRPOTrainer(
        model="black-forest-labs/FLUX.1-dev",
        reward_funcs="hpsv2",
        args=SRPOConfig.preset("srpo_hpsv2", output_dir="flux-srpo"),
        train_dataset=load_dataset("...", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Id or path of a pipeline, `"shapes"` for the embedded world, or a loaded pipeline. A loaded pipeline loses
            its text encoders once all prompts of the run are encoded, where they fit into one window.
        reward_funcs (`str`, [`~trl_diffusion.rewards.RewardModel`], or a list of these):
            Differentiable rewards to maximise, see [`~trl_diffusion.rewards.load_reward`].
        args ([`SRPOConfig`], *optional*):
            Settings.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Prompts, in a column "prompt", and for a model that edits images these, in a column "condition_image". A stream
            needs `max_steps` and is trained in its own order. With a column "image" (`datasets.Image`) the images replace
            the rollout.
        eval_dataset (`datasets.Dataset`, *optional*):
            Prompts of the evaluations.
        callbacks (`list[TrainerCallback]`, *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use, for full fine-tuning of a loaded pipeline. The weights of a LoRA, and of a
            pipeline that the trainer loads, are made later than such an optimizer: pass `optimizer_cls_and_kwargs`.
        peft_config ([`~peft.LoraConfig`] or `False`, *optional*):
            Adapter; `None` is LoRA on the family's attention layers, `False` full fine-tuning.
        watch_reward_funcs (as `reward_funcs`, or callables, *optional*):
            Rewards that are evaluated and not trained. Reward hacking shows in them.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class of an optimizer and its arguments, as `(torch.optim.SGD, {"lr": 0.1})`, in place of `args.optim`; the
            trainer gives it the trained weights.
    """

    method_name = "SRPO"
    config_class = SRPOConfig

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: str | RewardModel | list[str | RewardModel],
        args: SRPOConfig | None = None,
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
        self._check_words()
        self._check_differentiable()
        if args.vae_gradient_checkpointing:
            self.flow.enable_vae_gradient_checkpointing()
        if args.vae_slicing:
            self.flow.vae.enable_slicing()
        if args.vae_tiling:
            self.flow.vae.enable_tiling()
        if args.reward_gradient_checkpointing:
            for reward in self.rewards.values():
                reward.enable_gradient_checkpointing()
        if self.images is not None:
            if self.num_frames is not None:
                raise ValueError(
                    f"train_dataset has a column 'image', and a {type(self.flow.pipeline).__name__} makes videos. Remove the "
                    "column: SRPO trains videos that it makes itself."
                )
            self.train_dataset = self.images.dataset
            sizes = self.images.sizes((self.height, self.width), self.flow.latent_downsample)
            for size in sizes.values():
                self.flow.check_size(*size)
            logger.info(f"Images of the dataset are trained at (height, width) {sorted(sizes.values())}.")
        self.rollout_sampler = self.image_sampler
        if args.rollout_guidance_scale is not None:
            self.rollout_sampler = replace(self.image_sampler, guidance_scale=args.rollout_guidance_scale)
        if args.estimator == "refl":
            low, high = args.sigma_range
            self._refl_steps = [i for i, sigma in enumerate(self.sigmas[:-1].tolist()) if low <= sigma <= high]
            if not self._refl_steps:
                raise ValueError(
                    f"No sampling step lies in sigma_range={args.sigma_range}; the schedule is "
                    f"{[round(sigma, 4) for sigma in self.sigmas.tolist()]}. Widen sigma_range or raise "
                    "num_inference_steps."
                )
        if self.watched_rewards and args.eval_strategy == "no":
            logger.warning(
                "watch_reward_funcs are scored when the trainer evaluates, and eval_strategy is 'no'. Set "
                "eval_strategy='steps', eval_steps and eval_dataset to see reward hacking."
            )
        self.hacking_callback = RewardHackingCallback(args.hacking_patience, args.stop_on_hacking)
        self.add_callback(self.hacking_callback)

    def _check_before_loading(
        self, args: SRPOConfig, train_dataset: Dataset, reward_specs: list[str | Reward]
    ) -> None:
        for spec in reward_specs:
            if not is_differentiable(spec):
                raise TypeError(
                    f"SRPO needs differentiable rewards, but {spec!r} is a black box. Use a RewardModel or the name "
                    "of one, or ChunkGRPOTrainer, which takes any reward."
                )
            self._check_scale(args, spec)
        has_images = "image" in column_names(train_dataset)
        if has_images and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "train_dataset is a stream with images, whose sizes must be known before the training. Remove the column "
                "'image', or load the dataset without streaming."
            )
        if has_images and args.estimator != "direct_align":
            raise ValueError(
                f"estimator={args.estimator!r} needs rollouts, but train_dataset has images. Remove the column "
                "'image', or use estimator='direct_align'."
            )
        if args.offline_steps is not None and not has_images:
            raise ValueError(
                f"offline_steps={args.offline_steps}, but train_dataset has no column 'image', only "
                f"{column_names(train_dataset)}. Add the images, or leave offline_steps unset."
            )
        if args.rollout_merged_lora and has_images and args.offline_steps is None:
            raise ValueError(
                "rollout_merged_lora=True cannot act: train_dataset has images and offline_steps is None, so there are no "
                "rollouts. Leave it at False."
            )
        self.images = ImageBuckets(train_dataset, args.process_index, args.world_size) if has_images else None

    @staticmethod
    def _check_scale(args: SRPOConfig, spec: str | Mapping[str, Any] | Reward) -> None:
        """Refuse a reward whose usual scores lie above the threshold in a pass: its loss would be 0 throughout."""
        scores = usual_range(spec)
        if scores is None:
            return
        for branch in args.branches if args.estimator == "direct_align" else ["denoise"]:
            share = active_share(args, scores, branch)
            if share == 0:
                raise ValueError(
                    f"The reward {spec!r} gives scores of about {scores[0]:g} to {scores[1]:g}, and with reward_threshold="
                    f"{args.reward_threshold} the loss of the pass {branch!r} would be 0: nothing would be trained. Scale the "
                    "reward (PickScore to near 1 by 'pickscore:scale=0.05'), or raise reward_threshold."
                )

    def _make_sampler(self, args: SRPOConfig, train_dataset: Dataset | IterableDataset) -> BucketSampler | GroupStream:
        if isinstance(train_dataset, IterableDataset):
            return GroupStream(
                train_dataset,
                num_generations=1,
                batch_size=args.per_device_train_batch_size,
                steps=1,
                num_processes=args.world_size,
                repeats=1,
            )
        return BucketSampler(
            [0] * len(train_dataset) if self.images is None else self.images.bucket_of_row,
            batch_size=args.per_device_train_batch_size,
            num_processes=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def _upcoming_rows(self) -> Iterator[int | dict[str, Any]]:
        batch = self._images_trained // self._images_per_micro_batch
        return self._sampler.upcoming(batch, self.accelerator.process_index)

    @property
    def papers(self) -> tuple[str, ...]:
        return ("srpo",) if self.args.estimator == "direct_align" else (self.args.estimator, "srpo")

    def _check_words(self) -> None:
        """Refuse words by reward that leave a reward out or name one that there is not."""
        args = self.args
        for setting, words in (("positive_words", args.positive_words), ("negative_words", args.negative_words)):
            if isinstance(words, dict) and set(words) != set(self.rewards):
                raise ValueError(
                    f"{setting} has words for the rewards {sorted(words)}, but those that are trained are "
                    f"{sorted(self.rewards)}. Give one list for each, or one list for all."
                )

    def _check_differentiable(self) -> None:
        """Refuse rewards that no gradient comes through, by asking them for one."""
        (prompt,) = texts_of(self.first_prompts(1))
        # Coloured patches: some rewards are flat at noise.
        num_frames = 1 if self.num_frames is None else self.num_frames
        patches = torch.rand(2 * num_frames, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        patches = torch.nn.functional.interpolate(patches, size=(64, 64), mode="bilinear").to(self.args.device)
        videos = patches.unflatten(0, (2, num_frames))
        for name, reward in self.rewards.items():
            images = (videos if isinstance(reward, VideoRewardModel) else patches[:2]).clone().requires_grad_()
            gradient = None
            with self.frozen.on_accelerator(reward):
                score = reward.score(images, [prompt] * len(images))
                if score.shape not in ((len(images),), (len(images), 1)):
                    raise ValueError(
                        f"The reward {name!r} gave scores of shape {tuple(score.shape)} for {len(images)} images. Return one "
                        "an image, of shape (B,)."
                    )
                if score.requires_grad:
                    (gradient,) = torch.autograd.grad(score.sum(), images, allow_unused=True)
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                raise ValueError(
                    f"The reward {name!r} is not differentiable: its score has no (finite, non-zero) gradient with "
                    "respect to the image. Do not score under torch.no_grad or through PIL in it, or use "
                    "ChunkGRPOTrainer, which needs no gradient."
                )

    # ---- Logging ----

    def _take_metrics(self) -> dict[str, float]:
        metrics = super()._take_metrics()
        for name, share in metrics.items():
            if name.endswith("/active") and share == 0:
                logger.warning(
                    f"{name} was 0 since the last log: the preference of every image is above reward_threshold="
                    f"{self.args.reward_threshold}, and this pass trains nothing. Scale the reward "
                    "('pickscore:scale=0.05'), or raise reward_threshold."
                )
        return metrics

    # ---- Data ----

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> CleanBatch:
        args = self.args
        index = self._global_index(len(rows))
        # Images are numbered over the whole run, so that micro-batches of any size draw the same noise.
        numbers = [self._images_trained + i for i in index]
        self._images_trained += self._images_per_micro_batch
        low, high = args.sigma_range
        uniform = [
            torch.rand(args.num_landings, generator=g, device=g.device) for g in self.generators(_LANDINGS, numbers)
        ]
        sigmas = low + (high - low) * torch.stack(uniform, 1)
        prompts = [prompt_of(row) for row in rows]
        offline = self.images is not None and (
            args.offline_steps is None or self.state.global_step < args.offline_steps
        )
        if offline:
            return self._offline_batch(rows, prompts, numbers, sigmas)
        return self._online_batch(prompts, numbers, sigmas)

    @torch.no_grad()
    def _offline_batch(
        self, rows: list[dict[str, Any]], prompts: list[Prompt], numbers: list[int], sigmas: torch.Tensor
    ) -> CleanBatch:
        """Images of the dataset, encoded, with fresh noise."""
        size = self.images.size(rows[0], (self.height, self.width), self.flow.latent_downsample)
        with self.timed("encode"), self.frozen.on_accelerator(self.flow.vae):
            images = self.images.load(rows, size).to(self.args.device)
            clean = self.flow.encode_image(images)
        noise = self.randn(self.generators(_FRESH_NOISE, numbers), clean)
        self._speed.images += len(rows)
        return CleanBatch(prompts, clean, noise, sigmas, {}, [])

    def _online_batch(self, prompts: list[Prompt], numbers: list[int], sigmas: torch.Tensor) -> CleanBatch:
        """Images of the current policy, with the noise they were made from."""
        args = self.args
        initial = self.image_sampler.draw_noise(self.generators(_INITIAL_NOISE, numbers))
        steps = self._start_steps()
        with self.timed("rollout"), self.rollout_model(args.rollout_merged_lora) as model:
            trajectory = self.rollout_sampler.rollout(prompts, initial, model, keep=steps)
        clean = trajectory.clean
        self._speed.images += len(prompts)
        self._score_rollout(clean, texts_of(prompts))

        fresh_generators = self.generators(_FRESH_NOISE, numbers)
        noise = initial if args.noise_prior == "rollout" else self.randn(fresh_generators, clean)
        renoisings = args.draft_renoisings - 1 if args.estimator == "draft" else 0
        fresh_noise = [self.randn(fresh_generators, clean) for _ in range(renoisings)]
        return CleanBatch(prompts, clean, noise, sigmas, trajectory.states, fresh_noise)

    def _start_steps(self) -> list[int]:
        """The sampling steps whose states the estimator starts from, the same on every process."""
        args = self.args
        if args.estimator == "draft":
            return [args.num_inference_steps - args.draft_steps]
        if args.estimator == "refl":
            # One draw an optimizer step: its micro-batches are one batch, however it is cut.
            (generator,) = self.generators(_STEPS, [self.state.global_step])
            drawn = torch.randint(
                len(self._refl_steps), (args.num_landings,), generator=generator, device=generator.device
            )
            return [self._refl_steps[i] for i in drawn.tolist()]
        return []

    def _score_rollout(self, clean: torch.Tensor, prompts: list[str]) -> None:
        """Log the rewards of the rollout's images, with their plain prompts."""
        with self.timed("decode"):
            images = self.decode(clean)
        with self.timed("reward"):
            scores = self.scorer.score(self.rewards, images, prompts, {})
        gathered = self.accelerator.gather(scores)
        metrics = self._metrics["train"]
        metrics["reward"].append((gathered * self.reward_weights.to(gathered.device)).sum(1).mean().item())
        for name, column in zip(self.rewards, gathered.unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"].append(column.mean().item())
        self._keep_samples(images, prompts, dict(zip(self.rewards, scores.unbind(1), strict=True)))

    # ---- Objective ----

    def _modules_of_update(self) -> list[nn.Module]:
        return [self.flow.vae, *self.rewards.values()]

    def loss_terms(self, model: nn.Module, batch: CleanBatch) -> Sequence[LossTerm]:
        """One term for each pass: a landing of a branch, a ReFL step, or a DRaFT pass. Memory holds one of them."""
        args = self.args
        if args.estimator == "direct_align":
            passes = [(sigma, branch) for sigma in batch.sigmas for branch in args.branches]
            return [
                lambda sigma=sigma, branch=branch: self._align_term(model, batch, sigma, branch, len(passes))
                for sigma, branch in passes
            ]
        if args.estimator == "refl":
            steps = self._start_steps()
            return [lambda step=step: self._refl_term(model, batch, step, len(steps)) for step in steps]
        noises = [None, *batch.fresh_noise]
        return [lambda noise=noise: self._draft_term(model, batch, noise, len(noises)) for noise in noises]

    def _align_term(
        self, model: nn.Module, batch: CleanBatch, sigma: torch.Tensor, branch: str, num_passes: int
    ) -> torch.Tensor:
        conditioning = self.conditioning.get(batch.prompts)

        def velocity(latents, sigma_in):
            return self.velocity(model, latents, sigma_in, conditioning)

        recovered = direct_align_pass(velocity, batch.clean, batch.noise, sigma, self.args.delta_sigma, branch)
        return self._preference_term(recovered, batch, sigma, branch, branch) / num_passes

    def _refl_term(self, model: nn.Module, batch: CleanBatch, step: int, num_passes: int) -> torch.Tensor:
        latents = batch.states[step]
        sigma = self.sigmas[step].to(latents).expand(len(latents))
        conditioning = self.conditioning.get(batch.prompts)
        predicted = one_step_prediction(latents, self.velocity(model, latents, sigma, conditioning), sigma)
        return self._preference_term(predicted, batch, sigma, "denoise", "refl") / num_passes

    def _draft_term(
        self, model: nn.Module, batch: CleanBatch, noise: torch.Tensor | None, num_passes: int
    ) -> torch.Tensor:
        conditioning = self.conditioning.get(batch.prompts)
        start = self.args.num_inference_steps - self.args.draft_steps
        sigmas = self.sigmas.to(batch.clean)
        latents = batch.states[start]
        if noise is not None:
            latents = interpolate(batch.clean, noise, sigmas[start])
        for i in range(start, self.args.num_inference_steps):
            velocity = self.velocity(model, latents, sigmas[i].expand(len(latents)), conditioning)
            latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
        # The discount is that of the clean end.
        sigma = latents.new_full((len(latents),), self.args.sigma_range[0])
        return self._preference_term(latents, batch, sigma, "denoise", "draft") / num_passes

    def _preference_term(
        self, recovered: torch.Tensor, batch: CleanBatch, sigma: torch.Tensor, branch: str, label: str
    ) -> torch.Tensor:
        """Loss of a pass, logged as `label`: the rewards' preference for the recovered images, mean over the batch."""
        args = self.args
        images = self.flow.decode(recovered)
        prompts = texts_of(batch.prompts)
        discount = discount_at(
            sigma, args.sigma_range, args.denoise_discount if branch == "denoise" else args.inversion_discount
        )
        losses = recovered.new_zeros(len(recovered))
        values = {}
        for (name, reward), weight in zip(self.rewards.items(), self.reward_weights.tolist(), strict=True):
            prompt_sets = self._reward_prompts(name, prompts)
            call = functools.partial(scores_of_prompt_sets, reward, images, prompt_sets, args.frame_reduction)
            positive, *negatives = self.scorer.call(name, prompts, call)
            negative = negatives[0] if negatives else None
            preference = relative_preference(positive, negative, discount, branch, args.preference)
            losses = losses + weight * preference_loss(preference, args.reward_threshold)
            values[f"{label}/{name}/positive"] = positive.mean()
            if negative is not None:
                values[f"{label}/{name}/negative"] = negative.mean()
                values[f"{label}/{name}/difference"] = (positive - negative).mean()
        loss = losses.mean()
        values[f"{label}/loss"] = loss
        values[f"{label}/active"] = (losses != 0).float().mean()
        values[f"{label}/recovery_error"] = (recovered - batch.clean).abs().mean()
        values[f"{label}/clamped"] = ((images <= 0) | (images >= 1)).float().mean()
        self._running_metrics.add(values)
        return loss

    def _reward_prompts(self, reward: str, prompts: list[str]) -> list[list[str]]:
        """The plain prompts for an absolute preference, else the positive and the negative ones of this step."""
        args, step = self.args, self.state.global_step
        if args.preference == "absolute":
            return [prompts]
        return [
            args.control_prompts(words, reward, step, prompts) for words in (args.positive_words, args.negative_words)
        ]

    def _prompts_of(self, inputs: CleanBatch) -> list[str]:
        return texts_of(inputs.prompts)

    # ---- Resuming ----

    def state_dict(self) -> dict[str, Any]:
        hacking = {"best": self.hacking_callback.best, "count": self.hacking_callback.count}
        return {**super().state_dict(), "hacking": hacking}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.hacking_callback.best = state["hacking"]["best"]
        self.hacking_callback.count = state["hacking"]["count"]

    # ---- Evaluation ----

    def _evaluation_metrics(self) -> list[str]:
        return ["objective", *super()._evaluation_metrics()]

    @torch.no_grad()
    def _evaluation_scores(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, torch.Tensor]:
        """As the base trainer's, and what is trained: the mean preference over all control words, without discount."""
        args = self.args
        scores = super()._evaluation_scores(images, prompts, columns)
        objective = torch.zeros_like(scores["reward"])
        for (name, reward), weight in zip(self.rewards.items(), self.reward_weights.tolist(), strict=True):
            if args.preference == "absolute":
                objective += weight * scores[f"rewards/{name}/mean"]
                continue
            for sign, words in ((1, args.positive_words), (-1, args.negative_words)):
                count = len(words[name] if isinstance(words, dict) else words)
                prompt_sets = [args.control_prompts(words, name, i, prompts) for i in range(count)]
                with self.frozen.on_accelerator(reward):
                    for start in range(0, len(prompts), self.scorer.batch_size):
                        part = slice(start, start + self.scorer.batch_size)
                        sets = [prompts_[part] for prompts_ in prompt_sets]
                        images_of_part = images[part].to(self.scorer.device)
                        call = functools.partial(
                            scores_of_prompt_sets, reward, images_of_part, sets, args.frame_reduction
                        )
                        parts = self.scorer.call(name, prompts[part], call)
                        objective[part] += sign * weight * torch.stack(parts).mean(0)
        scores = {"objective": objective, **scores}
        compared = [name for name in scores if name == "objective" or name.startswith("watch/")]
        gathered = self.accelerator.gather(torch.stack([scores[name] for name in compared], 1))
        gathered = gathered[: args.num_eval_images]
        self.hacking_callback.scores = dict(zip(compared, gathered.T.tolist(), strict=True))
        return scores


def active_share(args: SRPOConfig, scores: tuple[float, float], branch: str) -> float:
    """
    Share of the landings of a branch with a loss above 0, over the noise levels of `sigma_range` and scores in a range
    that are alike under both prompts, as those of a reward nearly are.
    """
    sigma, score = torch.meshgrid(
        torch.linspace(*args.sigma_range, 101, dtype=torch.float64),
        torch.linspace(*scores, 101, dtype=torch.float64),
        indexing="ij",
    )
    ends = args.denoise_discount if branch == "denoise" else args.inversion_discount
    preference = relative_preference(score, score, discount_at(sigma, args.sigma_range, ends), branch, args.preference)
    return (preference_loss(preference, args.reward_threshold) > 0).double().mean().item()


def one_step_prediction(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """ReFL's clean latents `(B, ...)`: one step from sigma `(B,)` to 0, x - sigma v."""
    return latents - sigma.view((-1,) + (1,) * (latents.ndim - 1)) * velocity


def scores_of_prompt_sets(
    reward: RewardModel, images: torch.Tensor, prompt_sets: list[list[str]], frame_reduction: str = "mean"
) -> list[torch.Tensor]:
    """
    Scores `(B,)` of the same images `(B, 3, H, W)`, or videos `(B, F, 3, H, W)`, with each of several lists of B prompts; a
    two-tower reward sees the images once. A reward of images scores frames, see
    [`~trl_diffusion.rewards.frames.reduce_frames`].
    """
    if images.ndim == 5 and not isinstance(reward, VideoRewardModel):
        return _scores_of_frames(reward, images, prompt_sets, frame_reduction)
    if isinstance(reward, TwoTowerReward):
        features = reward.encode_images(images)
        return [reward.score_features(features, reward.encode_texts(prompts)) for prompts in prompt_sets]
    # A column (B, 1) would be broadcast against the discounts (B,).
    return [reward.score(images, prompts).reshape(len(images)) for prompts in prompt_sets]


def _scores_of_frames(
    reward: RewardModel, videos: torch.Tensor, prompt_sets: list[list[str]], reduction: str
) -> list[torch.Tensor]:
    """As [`scores_of_prompt_sets`], by a reward of images."""
    frames = scored_frames(videos, reduction)
    num = frames.shape[1]
    frames = frames.flatten(0, 1)
    prompt_sets = [[prompt for prompt in prompts for _ in range(num)] for prompts in prompt_sets]
    parts = []
    for start in range(0, len(frames), FRAMES_TOGETHER):
        rows = slice(start, start + FRAMES_TOGETHER)
        arguments = reward, frames[rows], [prompts[rows] for prompts in prompt_sets]
        if len(frames) <= FRAMES_TOGETHER:
            parts.append(scores_of_prompt_sets(*arguments))
        else:
            # A video has many frames: those of one slice alone are in the reward at a time, also in the backward pass.
            parts.append(checkpoint(scores_of_prompt_sets, *arguments, use_reentrant=False))
    return [reduce_frames(torch.cat(scores).view(-1, num), reduction) for scores in zip(*parts, strict=True)]
