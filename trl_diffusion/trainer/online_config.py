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

"""Settings of the methods that train on images of their own, compared within groups."""

import math
from dataclasses import dataclass, field, fields

from accelerate.utils import get_int_from_env

from .base_config import DiffusionConfig


# Where accelerate finds the number of processes.
_WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


@dataclass
class OnlineConfig(DiffusionConfig):
    r"""
    Configuration of an [`OnlineTrainer`]: what generations are, and how rewards become advantages. See
    [`DiffusionConfig`] and [`~transformers.TrainingArguments`] for the other parameters.

    Parameters:
        > Parameters that control generation

        num_generations (`int`, *optional*, defaults to `8`):
            Number of images per prompt (G in the paper), at least 2.
        generation_batch_size (`int`, *optional*):
            Number of images of one generation, over all processes. `None` derives it from `steps_per_generation`.
        steps_per_generation (`int`, *optional*):
            Number of micro-batches made from one generation. `None` takes `gradient_accumulation_steps`: one optimizer
            step per generation, strictly on-policy.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over each generation.

        overlap_rewards (`bool`, *optional*, defaults to `False`):
            Decode and score the images of one rollout batch while the next is sampled, in a thread and on an accelerator in
            a stream of its own, with the same result. Pays where rewards wait, as for a server, and where the accelerator
            has room beside the sampling. `time/decode` and `time/reward` then lie within `time/rollout`, but for what
            `time/overlap_wait` says.

        > Parameters that control votes, where people are the reward

        vote_host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address on which the page of `reward_funcs="vote"` is served. By default it is seen on this machine alone;
            `"0.0.0.0"` lets a phone in the same network vote, which needs the token of the printed address.
        vote_port (`int`, *optional*, defaults to `8765`):
            Its port; a free one where that is in use.
        vote_prompts (`int`, *optional*, defaults to `4`):
            Prompts whose picture before the training and now the page shows.

        > Parameters that control the advantages

        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Advantages are clamped to plus or minus this.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Divide centred rewards by the std of the group (`"group"`), of the batch (`"batch"`) or not (`"none"`).
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            Normalise the weighted sum of the rewards, or sum the normalised rewards (`"normalize_then_sum"`).
    """

    # Generation
    num_generations: int = field(default=8, metadata={"help": "Number of images per prompt, at least 2."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of images of one generation, over all processes. None derives it from steps_per_generation."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Number of micro-batches made from one generation. None takes gradient_accumulation_steps: one "
            "optimizer step per generation, strictly on-policy."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "Number of passes over each generation."})
    overlap_rewards: bool = field(
        default=False,
        metadata={"help": "Decode and score the images of one rollout batch while the next is sampled."},
    )

    # Votes
    vote_host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "Address on which the page of the reward 'vote' is served; 0.0.0.0 lets other machines vote."
        },
    )
    vote_port: int = field(default=8765, metadata={"help": "Its port; a free one where that is in use."})
    vote_prompts: int = field(
        default=4, metadata={"help": "Prompts whose picture before the training and now the page shows."}
    )

    # Advantages
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to plus or minus this."})
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Divide centred rewards by this std.", "choices": ["group", "batch", "none"]},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Normalise the weighted sum of the rewards, or sum the normalised rewards.",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )

    def _check_values(self) -> None:
        super()._check_values()
        self._check_choice("scale_rewards", ("group", "batch", "none"))
        self._check_choice("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum"))
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip must be above 0, got {self.advantage_clip}.")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, got {self.num_generations}: advantages compare the images of a "
                "prompt with each other."
            )
        if self.overlap_rewards and self.offload_frozen:
            raise ValueError(
                "overlap_rewards=True uses the VAE and the rewards while the network samples, and offload_frozen=True keeps "
                "them off the accelerator then. Set one of them."
            )
        if not 0 <= self.vote_port <= 65535:
            raise ValueError(f"vote_port must lie between 0 and 65535, got {self.vote_port}. 0 takes a free one.")
        if self.vote_prompts < 0:
            raise ValueError(f"vote_prompts must not be negative, got {self.vote_prompts}. 0 shows none.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {self.num_iterations}.")
        if get_int_from_env(_WORLD_SIZE_VARIABLES, 0) == 0:
            self._resolve_batches(1)  # no launcher: one process

    def refuse_votes(self) -> None:
        """Refuse settings of votes, for a run without any."""
        for each in fields(self):
            if each.name.startswith("vote_") and getattr(self, each.name) != each.default:
                raise ValueError(
                    f"{each.name}={getattr(self, each.name)!r} has no effect without the reward 'vote'. Add it to the rewards, or "
                    f"leave {each.name} unset."
                )

    def _check_processes(self) -> None:
        super()._check_processes()
        self._resolve_batches(self.world_size)

    def _resolve_batches(self, world_size: int) -> None:
        global_batch_size = self.per_device_train_batch_size * world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            if self.generation_batch_size != global_batch_size * self.steps_per_generation:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) and steps_per_generation "
                    f"({self.steps_per_generation}) contradict each other at {global_batch_size} images per "
                    "micro-batch over all processes. Set only one of them."
                )
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % global_batch_size:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be divisible by the images of a "
                    f"micro-batch over all processes ({global_batch_size})."
                )
            self.steps_per_generation = self.generation_batch_size // global_batch_size
        else:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = global_batch_size * self.steps_per_generation
        if self.steps_per_generation < 1:
            raise ValueError(f"steps_per_generation must be at least 1, got {self.steps_per_generation}.")
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations ({self.num_generations}) must divide the generation batch "
                f"({self.generation_batch_size} images = {self.per_device_train_batch_size} per device x "
                f"{world_size} processes x {self.steps_per_generation} micro-batches). Change num_generations, "
                "per_device_train_batch_size or gradient_accumulation_steps."
            )

    @property
    def consecutive_images(self) -> int:
        """
        Images of a process that follow one another in the order of all processes' images: those of an optimizer step, so
        that its images do not depend on the number of processes, and groups are on as few of them as can be.
        """
        return self.per_device_train_batch_size * math.gcd(self.gradient_accumulation_steps, self.steps_per_generation)

    @property
    def on_policy(self) -> bool:
        """Whether no generation outlives an optimizer step, so that the ratio is 1 in value."""
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0
