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

"""What the methods share that make images, compare those of a prompt by their rewards, and train on what was made."""

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn

from ..data.prompt_images import Prompt, prompt_of, texts_of
from ..data.sampler import GroupSampler, GroupStream
from ..flow import Trajectory
from ..flow.sde import TransitionCoefficients
from ..objectives import aggregate_advantages
from ..rewards import Reward, scores_generations, to_pil
from ..rewards.calls import RewardError, Scorer, raise_failure
from ..rewards.vote import VoteReward, check_votes
from ..runtime.overlap import SideWork
from ..runtime.policies import CURRENT
from .base_trainer import DiffusionTrainer
from .generation import Generation
from .measures import duplicate_share, picture_digests
from .online_config import OnlineConfig


logger = get_logger(__name__)

# Streams of random numbers, each with its own seeds. A method's own begin with `METHOD_STREAM`.
_INITIAL_NOISE, _SAMPLING_NOISE, METHOD_STREAM = range(3)


class OnlineTrainer(DiffusionTrainer):
    """
    Base of the trainers that make generations of images: `num_generations` images of each prompt are sampled and scored,
    their rewards compared within the group, and the generation is trained in `steps_per_generation` micro-batches,
    `num_iterations` times over. A checkpoint within a generation holds it.

    A subclass defines `method_name`, [`make_micro_batches`] and [`loss_terms`]; `config_class` and `generation_class` where
    it has more settings, or more to keep of its images. See [`ChunkGRPOTrainer`] for the arguments, and
    [A method of your own](https://trl-diffusion.readthedocs.io/your_own_method/).
    """

    config_class = OnlineConfig
    generation_class: type[Generation] = Generation
    papers = ()
    _state_within_step = ("_images_trained", "_micro_batches")
    # Whether what the images of a group have in common is computed once; for tests, since results are the same.
    _computes_common_once = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._forwards = 0  # of this process, until they are logged
        self._micro_batches: list[Generation] | None = None
        self._columns_missing = False  # of micro-batches from a checkpoint
        self._voters = next((reward for reward in self.rewards.values() if isinstance(reward, VoteReward)), None)
        if self._voters is not None and self.num_frames is not None:
            raise ValueError("The reward 'vote' shows pictures, and the model makes videos. Use another reward.")

    # ---- What a subclass defines ----

    @abstractmethod
    def make_micro_batches(self, rows: list[dict[str, Any]], index: int) -> list[Generation]:
        """
        What is trained of a new generation: that of [`make_generation`], with what the method adds, split into micro-batches
        of `per_device_train_batch_size` images. Called on every process.

        Args:
            rows (`list[dict]`): this process's rows of the dataset, for [`make_generation`].
            index (`int`): number of the generation, from 0 on; a resumed run goes on counting.
        """

    def _make_sampler(
        self, args: OnlineConfig, train_dataset: Dataset | IterableDataset
    ) -> GroupSampler | GroupStream:
        layout = {
            "num_generations": args.num_generations,
            "batch_size": args.consecutive_images,
            "steps": args.per_device_train_batch_size * args.steps_per_generation // args.consecutive_images,
            "num_processes": args.world_size,
            "repeats": args.steps_per_generation * args.num_iterations,
        }
        if isinstance(train_dataset, IterableDataset):
            return GroupStream(train_dataset, **layout)
        seed = args.seed if args.data_seed is None else args.data_seed
        return GroupSampler(len(train_dataset), **layout, seed=seed)

    def _upcoming_rows(self) -> Iterator[int | dict[str, Any]]:
        generation = self._images_trained // self._images_per_generation
        return self._sampler.upcoming(generation, self.accelerator.process_index)

    # ---- People as the reward ----

    def _check_before_loading(
        self, args: OnlineConfig, train_dataset: Dataset | IterableDataset, reward_specs: list[str | Reward]
    ) -> None:
        together = next((spec for spec in reward_specs if scores_generations(spec)), None)
        if together is None:
            args.refuse_votes()
            return
        reason = f"The reward {together!r} scores whole generations"
        if args.world_size > 1:
            raise ValueError(f"{reason}, and with {args.world_size} processes none has one. Train on one process.")
        if args.overlap_rewards:
            raise ValueError(f"{reason}, and overlap_rewards=True scores parts of them. Leave it at False.")
        check_votes(self._votes_folder(args), args.vote_host, args.vote_port)

    def train(self, *args, **kwargs):
        if self._voters is None:
            return super().train(*args, **kwargs)
        # People take their time: SIGTERM ends the run while it waits for them.
        self._voters.open(
            self._votes_folder(self.args), self.args.vote_host, self.args.vote_port, meanwhile=self._stop_if_terminated
        )
        try:
            return super().train(*args, **kwargs)
        finally:
            self._voters.close()

    @staticmethod
    def _votes_folder(args: OnlineConfig) -> Path:
        return Path(args.output_dir) / "votes"

    def _tell_voters(self) -> None:
        """Where the training is, and the same pictures before it and now."""
        step, steps = self.state.global_step, self.state.max_steps
        strip = []
        prompts = self.first_prompts(self.args.vote_prompts)
        before = self._voters.pictures_before(texts_of(prompts))
        if prompts and before is None and (self.has_adapter or step == 0):
            before = to_pil(self.generate(prompts, range(len(prompts)), adapter_fraction=0.0))
            self._voters.keep_pictures_before(texts_of(prompts), before)
        if prompts and before is not None:
            now = to_pil(self.generate(prompts, range(len(prompts))))
            strip = list(zip(texts_of(prompts), before, now, strict=True))
        self._voters.show(f"Optimizer step {step + 1} of {steps}", step / steps, strip)

    # ---- Data ----

    def get_train_dataloader(self):
        # As in TRL, the loader is read once a micro-batch and gives a whole generation batch each time, of which only
        # the first in a row is used.
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    @property
    def _images_per_generation(self) -> int:
        """How many images a generation trains, over all processes and passes."""
        return self._images_per_micro_batch * self.args.steps_per_generation * self.args.num_iterations

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> Generation:
        index, position = divmod(self._images_trained, self._images_per_generation)
        if position == 0:
            self._micro_batches = self.make_micro_batches(inputs, index)
        elif self._columns_missing:
            columns = self._column_reader.read(inputs)
            size = self.args.per_device_train_batch_size
            for i, micro_batch in enumerate(self._micro_batches):
                micro_batch.columns = {name: rows[i * size : (i + 1) * size] for name, rows in columns.items()}
        self._columns_missing = False
        self._images_trained += self._images_per_micro_batch
        return self._micro_batches[position // self._images_per_micro_batch % self.args.steps_per_generation]

    def _prompts_of(self, inputs: Generation) -> list[str]:
        return texts_of(inputs.prompts)

    # ---- Generation ----

    def make_generation(
        self,
        rows: list[dict[str, Any]],
        index: int,
        transitions: TransitionCoefficients | None = None,
        keep: Collection[int] = (),
        policy: str = CURRENT,
    ) -> Generation:
        """
        Sample, decode, score and compare this process's images of a generation, and log rewards and samples. To be called
        on every process.

        Args:
            rows (`list[dict]`): rows of the dataset, each prompt `num_generations` times, as [`make_micro_batches`] gets
                them.
            index (`int`): number of the generation, on which the noise depends.
            transitions ([`~trl_diffusion.flow.sde.TransitionCoefficients`], *optional*): of the solver; Euler's by default.
            keep (`Collection[int]`, *optional*): transitions whose states are kept.
            policy (`str`, *optional*, defaults to `"current"`): name of the policy that samples.

        Raises:
            `ValueError`: no reward applies to any of the images.
        """
        args = self.args
        prompts = [prompt_of(row) for row in rows]
        texts = texts_of(prompts)
        columns = self._column_reader.read(rows)
        if self._voters is not None:
            self._tell_voters()
        with SideWork(args.device) if args.overlap_rewards else contextlib.nullcontext() as side_work:
            on_batch = None
            if side_work is not None:
                # Processes agree on a failure at the end, in the main thread, where all of them are.
                scorer = replace(self.scorer, agree=raise_failure)
                on_batch = partial(side_work.submit, self._judge, texts, columns, scorer, side_work.synchronize)
            with self.timed("rollout"), self.policies.use(policy), self._counted_forwards():
                trajectory = self._rollout(prompts, index, transitions, keep, on_batch)
            if side_work is None:
                judged = self._judge(texts, columns, self.scorer, None, slice(None), trajectory.clean)
            else:
                judged = self._judged_beside(side_work)
        images, scores, watched = judged
        advantages = self._advantages(scores, watched, texts, index)
        digests = self._gather_rows(picture_digests(images)).view(-1, args.num_generations)
        self._metrics["train"]["duplicate_images"].append(duplicate_share(digests).item())
        self._speed.images += len(prompts)
        names = [*self.rewards, *self.watched_rewards, "advantage"]
        values = torch.cat([scores, watched, advantages[:, None]], 1)
        self._keep_samples(images, texts, dict(zip(names, values.unbind(1), strict=True)))
        return self.generation_class(
            index=self._global_index(len(prompts)),
            prompts=prompts,
            clean=trajectory.clean,
            scores=scores,
            advantages=advantages,
            states=trajectory.states,
            log_probs=trajectory.log_probs,
            relative_changes=trajectory.relative_changes,
            columns=columns,
        )

    def _judge(
        self,
        prompts: list[str],
        columns: dict[str, list[Any]],
        scorer: Scorer,
        synchronize: Callable[[], None] | None,
        rows: slice,
        clean: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, scores and watched scores of some rows, by their clean latents; for `synchronize` see [`Speed.phase`]."""
        with self.timed("decode", synchronize):
            images = self.decode(clean)
        columns = {name: values[rows] for name, values in columns.items()}
        with self.timed("reward", synchronize):
            scores = scorer.score(self.rewards, images, prompts[rows], columns)
            watched = scorer.score(self.watched_rewards, images, prompts[rows], columns)
        return images, scores, watched

    def _judged_beside(self, side_work: SideWork) -> Iterator[torch.Tensor]:
        """What [`_judge`] has given of each batch, put together, on all processes or on none."""
        parts, failure = [], None
        with self.timed("overlap_wait"):
            try:
                parts = side_work.results()
            except (RewardError, TypeError, ValueError) as error:
                failure = error
        self.scorer.agree(failure)
        return (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _rollout(
        self,
        prompts: list[Prompt],
        generation: int,
        transitions: TransitionCoefficients | None,
        keep: Collection[int],
        on_batch: Callable[[slice, torch.Tensor], None] | None = None,
    ) -> Trajectory:
        """Trajectories of this process's rows, with the states of the transitions in `keep`."""
        args = self.args
        index = self._global_index(len(prompts))
        noise_index, shared = index, {}
        if args.shared_noise == "group":
            noise_index = self._groups(index)
            if self._computes_common_once:
                places = (self._global_index(len(prompts), process) for process in range(args.world_size))
                shared = {"groups": noise_index, "num_groups": max(len(set(self._groups(each))) for each in places)}
        initial = self.image_sampler.draw_noise(self.generators(_INITIAL_NOISE, generation, noise_index))
        sampling = self.generators(_SAMPLING_NOISE, generation, index)
        with self.rollout_model(self.args.rollout_merged_lora) as model:
            return self.image_sampler.rollout(
                prompts, initial, model, transitions, sampling, keep, on_batch=on_batch, **shared
            )

    def _groups(self, index: Sequence[int]) -> list[int]:
        """The group of each image, by its place among the images of all processes."""
        return [place // self.args.num_generations for place in index]

    def velocity(
        self, model: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        with self._counted_forwards():
            return super().velocity(model, latents, sigma, conditioning)

    @contextlib.contextmanager
    def _counted_forwards(self) -> Iterator[None]:
        """Count the forwards within this context to `forwards_per_image`, as those of an evaluation are not."""
        before = self.image_sampler.forwards
        yield
        self._forwards += self.image_sampler.forwards - before

    def _take_metrics(self) -> dict[str, float]:
        # Those of a generation that is trained beyond a log wait for the images of the next.
        if self._speed.images > 0:
            share = torch.tensor(self._forwards / self._speed.images, device=self.args.device)
            self._running_metrics.add({"forwards_per_image": share})
            self._forwards = 0
        return super()._take_metrics()

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The rows `(B, ...)` of all processes, a group behind the other."""
        # process, step, row -> step, process, row; see `GroupSampler`
        processes, size = self.accelerator.num_processes, self.args.consecutive_images
        gathered = self.accelerator.gather(values)
        return gathered.view(processes, -1, size, *values.shape[1:]).transpose(0, 1).flatten(0, 2)

    def _advantages(
        self, scores: torch.Tensor, watched: torch.Tensor, prompts: list[str], generation: int
    ) -> torch.Tensor:
        """Advantages `(B,)` of this process's rows, from the scores `(B, R)` of all processes; logs the rewards."""
        args = self.args
        processes, size = self.accelerator.num_processes, args.consecutive_images
        gathered = self._gather_rows(torch.cat([scores, watched], 1))
        rewards, watched = gathered.split([scores.shape[1], watched.shape[1]], 1)
        if rewards.isnan().all() and self._voters is not None:
            logger.warning(f"Every group of generation {generation} was skipped, so nothing is learnt of it.")
            return torch.zeros_like(scores[:, 0])
        if rewards.isnan().all():
            raise ValueError(
                f"Every reward of generation {generation} is None or NaN: none of the reward functions "
                f"{list(self.rewards)} applies to any of {len(rewards)} images (first prompt: {prompts[0]!r}). There "
                "is nothing to train on; check the reward functions and the prompts."
            )
        advantages, total, group_std = aggregate_advantages(
            rewards,
            self.reward_weights.to(rewards.device),
            args.num_generations,
            args.multi_objective_aggregation,
            args.scale_rewards,
            args.advantage_clip,
        )
        metrics = self._metrics["train"]
        metrics["reward"].append(total.nanmean().item())
        metrics["reward_std"].append(group_std.mean().item())
        metrics["frac_reward_zero_std"].append((group_std == 0).float().mean().item())
        for kind, names, columns in (("rewards", self.rewards, rewards), ("watch", self.watched_rewards, watched)):
            for name, column in zip(names, columns.unbind(1), strict=True):
                applicable = column[~column.isnan()]
                if len(applicable) > 1:
                    metrics[f"{kind}/{name}/mean"].append(applicable.mean().item())
                    metrics[f"{kind}/{name}/std"].append(applicable.std().item())
        return advantages.view(-1, processes, size)[:, self.accelerator.process_index].flatten()

    # ---- Saving and resuming ----

    def _fixed_settings(self) -> dict[str, Any]:
        args = self.args
        return {
            **super()._fixed_settings(),
            "num_generations": args.num_generations,
            "generation_batch_size": self._images_per_micro_batch * args.steps_per_generation,
            "num_iterations": args.num_iterations,
        }

    def _is_between_generations(self, state: dict[str, Any]) -> bool:
        return state["images_trained"] % self._images_per_generation == 0

    def _generation_file(self, folder: str, process: int) -> Path:
        return Path(folder) / f"generation_{process}.safetensors"

    def _save_process_state(self, folder: str) -> None:
        # A generation that will still be trained cannot be made again: the policy has moved on since.
        if self._images_trained % self._images_per_generation > 0:
            generation = self.generation_class.cat(self._micro_batches)
            generation.save(self._generation_file(folder, self.accelerator.process_index))

    def _load_process_state(self, folder: str) -> None:
        if self._images_trained % self._images_per_generation == 0:
            return
        size = self.args.per_device_train_batch_size
        # The file of this process has its rows, unless the images are now cut otherwise.
        own = self._generation_file(folder, self.accelerator.process_index)
        paths = list(dict.fromkeys([own, *sorted(Path(folder).glob("generation_*.safetensors"))]))
        wanted = self._global_index(size * self.args.steps_per_generation)
        generation = self.generation_class.load(paths, wanted, self.args.device)
        if self.flow.takes_image:
            # The file has no images. The rows of the generation are the next ones.
            upcoming = itertools.islice(self._upcoming_prompts(), len(wanted))
            with_images = {prompt: prompt for prompt in upcoming}
            generation.prompts = [with_images.get(prompt, prompt) for prompt in generation.prompts]
        self._micro_batches = generation.split(size)
        self._columns_missing = True
