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

"""Settings of [`ChunkGRPOTrainer`]."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ..flow import DEFAULT_ETA, chunk_steps, equal_chunk_sizes
from ..planning.workload import Workload
from .online_config import OnlineConfig


# Settings that choose among chunks, which a window replaces, and those of a window.
_CHUNK_CHOICE = ("chunk_sizes", "chunk_sampling", "chunk_fraction", "num_chunks", "min_chunk_size")
_WINDOW = ("window_schedule", "window_interval", "window_stride", "window_chunk")

# The paper's layout, for T = 17.
PAPER_CHUNK_SIZES = [2, 3, 4, 7]

_FLUX_720 = {
    "height": 720,
    "width": 720,
    "num_inference_steps": 17,
    "sigma_shift": 3.0,
    "guidance_scale": 3.5,
    "num_generations": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 6,
    "steps_per_generation": 12,
    "weight_decay": 1e-4,
    "max_grad_norm": 0.01,
    "lr_scheduler_type": "constant",
}
_FLOW_GRPO = {**_FLUX_720, "sde_type": "flow", "eta": 0.7, "chunk_sizes": "equal:1", "learning_rate": 3e-4}


@dataclass
class ChunkGRPOConfig(OnlineConfig):
    r"""
    Configuration class for the [`ChunkGRPOTrainer`].

    Only the parameters specific to the method are listed here; see [`OnlineConfig`], [`DiffusionConfig`] and
    [`~transformers.TrainingArguments`] for the others.

    Parameters:
        > Parameters that control generation

        sde_type (`str`, *optional*, defaults to `"flow"`):
            Stochastic sampler: `"flow"` (Flow-GRPO), `"dance"` (DanceGRPO) or `"cps"` (coefficients-preserving).
        eta (`float`, *optional*):
            Noise level of the sampler. `None` takes the paper's value: 0.7 for flow, 0.3 for dance, 0.8 for cps.
        stochastic_steps (`str`, *optional*, defaults to `"all"`):
            Which transitions get noise: all but the last (`"all"`), or only those that the generation trains
            (`"trained"`, MixGRPO), between which the sampler is Euler's.

        > Parameters that control chunks

        chunk_sizes (`list[int]` or `str`, *optional*):
            Sizes of the chunks, the noisiest first, summing to `num_inference_steps - 1`; or `"equal:N"` for chunks of
            N steps; or `"temporal"` for the layout that follows the dynamics of the first rollout. `None` is the
            paper's `[2, 3, 4, 7]` for 17 steps and `"temporal"` for any other number. All ones is step-level GRPO.
        num_chunks (`int`, *optional*, defaults to `4`):
            Number of chunks K of a temporal layout.
        min_chunk_size (`int`, *optional*, defaults to `2`):
            Fewest steps of a chunk of a temporal layout.
        chunk_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the chunks that each trajectory trains; at least one.
        chunk_sampling (`str` or `list[int]`, *optional*, defaults to `"uniform"`):
            Which chunks train: drawn uniformly for each generation (`"uniform"`), drawn with the odds of their
            relative change (`"temporal"`, the paper's weighted sampling), or these indices every time (a list).
        chunk_gradient (`str`, *optional*, defaults to `"joint"`):
            `"joint"`: one forward and backward for all steps of a chunk; `"streamed"`: step by step, in the memory of
            one step. Both give the same gradient.

        > Parameters that control a training window, in place of `chunk_sizes`, `chunk_fraction` and `chunk_sampling`

        train_window (`int`, *optional*):
            Each generation trains so many consecutive transitions, all of them.
        window_schedule (`str`, *optional*, defaults to `"sliding"`):
            `"sliding"`: the window begins at the noisiest transition and moves on, and around; `"random"`: it is drawn
            for each generation, among the offsets of the noisier half.
        window_interval (`int`, *optional*, defaults to `25`):
            Generations after which a sliding window moves.
        window_stride (`int`, *optional*, defaults to `1`):
            Transitions by which it moves.
        window_chunk (`int`, *optional*, defaults to `1`):
            Transitions of a chunk of the window, from 1 (step-level) to `train_window` (one chunk).

        > Parameters that control the objective

        old_log_probs (`str`, *optional*, defaults to `"recompute"`):
            Where updates are not strictly on-policy, the sampling policy's log-probabilities are recomputed before the
            first update in the batch shapes of training (`"recompute"`) or taken from the rollout (`"rollout"`).
        trust_region (`str`, *optional*, defaults to `"clip"`):
            What bounds an update that is not on-policy: ratios are clipped (`"clip"`); images drop out of a chunk whose
            transitions have moved too far (`"kl"`, Flow-DPPO); or ratios are normalised over noise levels and clipped
            (`"guard"`, GRPO-Guard, with an `epsilon` of about 2e-6).
        kl_threshold (`float`, *optional*, defaults to `1e-5`):
            Divergence from the sampling policy, averaged over latent elements and the steps of a chunk, up to which
            `trust_region="kl"` goes on.
        loss_weighting (`str`, *optional*):
            `"inverse_chunk_size"`: step-level GRPO with the weights of chunks, in which each step has a ratio of its own
            and weighs 1 over the size of its chunk. It tells apart what chunks do by their ratio and by their weights.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence to the reference, the model without its adapter.
        epsilon (`float`, *optional*, defaults to `5e-5`):
            Clip range of the ratio below 1. It is small because log-probabilities are averaged over latent elements.
        epsilon_high (`float`, *optional*):
            Clip range of the ratio above 1. `None` takes `epsilon`.
    """

    _UNCHECKED_TYPES = ("chunk_sizes", "chunk_sampling")
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # https://huggingface.co/papers/2510.21583
        "chunk_grpo": {
            **_FLUX_720,
            "sde_type": "flow",
            "eta": 0.7,
            "chunk_sizes": PAPER_CHUNK_SIZES,
            "chunk_sampling": "temporal",
            "learning_rate": 1e-5,
            "max_steps": 300,
        },
        # https://huggingface.co/papers/2505.07818, the LoRA setting
        "dance_grpo": {**_FLUX_720, "sde_type": "dance", "eta": 0.3, "chunk_sizes": "equal:1", "learning_rate": 3e-4},
        # https://huggingface.co/papers/2505.05470 on the same schedule
        "flow_grpo": _FLOW_GRPO,
        # Its Flow-GRPO-Fast, on the same schedule
        "flow_grpo_fast": {
            **{name: value for name, value in _FLOW_GRPO.items() if name != "chunk_sizes"},
            "stochastic_steps": "trained",
            "train_window": 2,
            "window_schedule": "random",
        },
        # https://huggingface.co/papers/2507.21802
        "mix_grpo": {
            **_FLUX_720,
            "num_inference_steps": 25,
            "sde_type": "flow",
            "eta": 0.7,
            "stochastic_steps": "trained",
            "train_window": 4,
            "window_schedule": "sliding",
            "window_interval": 25,
            "window_stride": 1,
            "learning_rate": 1e-5,
        },
        # https://huggingface.co/papers/2510.22319 on Flow-GRPO
        "grpo_guard": {**_FLOW_GRPO, "trust_region": "guard", "epsilon": 2e-6},
        # https://huggingface.co/papers/2606.11025 on Flow-GRPO
        "flow_dppo": {**_FLOW_GRPO, "trust_region": "kl", "kl_threshold": 1e-5},
    }
    PRESET_REWARDS: ClassVar[dict[str, list[str]]] = {
        "chunk_grpo": ["hpsv3"],
        "dance_grpo": ["hpsv2"],
        "flow_grpo": ["pickscore"],
        "flow_grpo_fast": ["pickscore"],
        "mix_grpo": ["hpsv2"],
        "grpo_guard": ["pickscore"],
        "flow_dppo": ["pickscore"],
    }

    # Generation
    sde_type: str = field(
        default="flow", metadata={"help": "Stochastic sampler.", "choices": ["flow", "dance", "cps"]}
    )
    eta: float | None = field(
        default=None,
        metadata={"help": "Noise level. None takes the paper's value: 0.7 for flow, 0.3 for dance, 0.8 for cps."},
    )
    stochastic_steps: str = field(
        default="all",
        metadata={
            "help": "Which transitions get noise: all but the last, or only those that the generation trains.",
            "choices": ["all", "trained"],
        },
    )

    # Chunks
    chunk_sizes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sizes of the chunks, the noisiest first, summing to num_inference_steps - 1; or 'equal:N'; or "
            "'temporal'. None is the paper's 2 3 4 7 for 17 steps and 'temporal' for any other number."
        },
    )
    num_chunks: int = field(default=4, metadata={"help": "Number of chunks of a temporal layout."})
    min_chunk_size: int = field(default=2, metadata={"help": "Fewest steps of a chunk of a temporal layout."})
    chunk_fraction: float = field(
        default=0.5, metadata={"help": "Share of the chunks that each trajectory trains; at least one."}
    )
    chunk_sampling: list[str] | None = field(
        default=None,
        metadata={"help": "Which chunks train: 'uniform' (the default), 'temporal', or chunk indices."},
    )
    chunk_gradient: str = field(
        default="joint",
        metadata={
            "help": "'joint': one forward and backward a chunk; 'streamed': step by step, in the memory of one step.",
            "choices": ["joint", "streamed"],
        },
    )

    # Training window
    train_window: int | None = field(
        default=None,
        metadata={"help": "Consecutive transitions that each generation trains, in place of chunk_sizes."},
    )
    window_schedule: str = field(
        default="sliding",
        metadata={
            "help": "'sliding': from the noisiest transition on, and around; 'random': drawn for each generation in the "
            "noisier half.",
            "choices": ["sliding", "random"],
        },
    )
    window_interval: int = field(default=25, metadata={"help": "Generations after which a sliding window moves."})
    window_stride: int = field(default=1, metadata={"help": "Transitions by which a sliding window moves."})
    window_chunk: int = field(
        default=1, metadata={"help": "Transitions of a chunk of the window: 1 is step-level, train_window one chunk."}
    )

    # Objective
    old_log_probs: str = field(
        default="recompute",
        metadata={
            "help": "Where updates are not on-policy, recompute the sampling policy's log-probabilities or take the "
            "rollout's.",
            "choices": ["recompute", "rollout"],
        },
    )
    trust_region: str = field(
        default="clip",
        metadata={
            "help": "What bounds an update: clipped ratios, a threshold of the divergence from the sampling policy, or "
            "normalised and clipped ratios.",
            "choices": ["clip", "kl", "guard"],
        },
    )
    kl_threshold: float = field(
        default=1e-5, metadata={"help": "Divergence from the sampling policy up to which trust_region='kl' goes on."}
    )
    loss_weighting: str | None = field(
        default=None,
        metadata={
            "help": "Step-level ratios in which each step weighs 1 over the size of its chunk.",
            "choices": ["inverse_chunk_size"],
        },
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence to the reference."})
    epsilon: float = field(default=5e-5, metadata={"help": "Clip range of the ratio below 1."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Clip range of the ratio above 1. None takes epsilon."}
    )

    def _check_values(self) -> None:
        super()._check_values()
        self._check_choice("sde_type", tuple(DEFAULT_ETA))
        self._check_choice("chunk_gradient", ("joint", "streamed"))
        self._check_choice("old_log_probs", ("recompute", "rollout"))
        if self.eta is None:
            self.eta = DEFAULT_ETA[self.sde_type]
        if not 0 < self.eta <= (1 if self.sde_type == "cps" else float("inf")):
            raise ValueError(
                f"eta must be above 0{' and at most 1' if self.sde_type == 'cps' else ''}, got {self.eta}: without "
                "noise all images of a prompt are alike and there is nothing to compare."
            )
        self._check_choice("stochastic_steps", ("all", "trained"))
        self._check_trust_region()
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}.")
        if not 0 < self.chunk_fraction <= 1:
            raise ValueError(f"chunk_fraction must lie in (0, 1], got {self.chunk_fraction}.")
        if self.train_window is None:
            self._refuse_given(
                _WINDOW, "train_window is not set, so there is no window. Set train_window, or leave it"
            )
            self._resolve_chunk_sizes()
            self._resolve_chunk_sampling()
        else:
            self._check_window()
        if self.stochastic_steps == "trained" and "temporal" in (self.chunk_sizes, self.chunk_sampling):
            name = "chunk_sizes" if self.chunk_sizes == "temporal" else "chunk_sampling"
            raise ValueError(
                f"stochastic_steps='trained' cannot be used with {name}='temporal', which chooses what trains by a rollout "
                f"whose noise depends on it. Give {name} otherwise, set train_window, or leave stochastic_steps='all'."
            )
        if self.loss_weighting is not None:
            self._check_choice("loss_weighting", ("inverse_chunk_size",))
            if self.window_chunk == 1 if self.train_window is not None else set(self.chunk_sizes) == {1}:
                raise ValueError(
                    f"loss_weighting={self.loss_weighting!r} cannot act on chunks of one step. Set larger "
                    f"{'chunk_sizes' if self.train_window is None else 'window_chunk'}, or leave it at None."
                )

    def _check_trust_region(self) -> None:
        self._check_choice("trust_region", ("clip", "kl", "guard"))
        if self.trust_region == "kl":
            self._refuse_given(
                ("epsilon", "epsilon_high"), "trust_region='kl' clips no ratio. Set kl_threshold instead, and leave it"
            )
        else:
            self._refuse_given(
                ("kl_threshold",),
                f"trust_region={self.trust_region!r} clips ratios. Set epsilon instead, or trust_region='kl', and leave it",
            )
        if self.rollout_merged_lora and self.old_log_probs == "rollout":
            raise ValueError(
                "rollout_merged_lora=True cannot be used with old_log_probs='rollout': the merged network rounds otherwise "
                "than the one that is trained. Leave old_log_probs='recompute'."
            )
        if self.trust_region != "clip" and self.old_log_probs == "rollout":
            raise ValueError(
                f"trust_region={self.trust_region!r} cannot be used with old_log_probs='rollout': it needs the means of the "
                "sampling policy, which are computed with its log-probabilities. Leave old_log_probs='recompute'."
            )
        if self.epsilon_high is None and self.trust_region != "kl":
            self.epsilon_high = self.epsilon
        for name in ("epsilon", "epsilon_high", "kl_threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")

    def _check_window(self) -> None:
        self._refuse_given(
            _CHUNK_CHOICE, f"train_window={self.train_window} says what trains. Set only one of them: leave it"
        )
        self._check_choice("window_schedule", ("sliding", "random"))
        num_transitions = self.num_inference_steps - 1
        if not 1 <= self.train_window <= num_transitions:
            raise ValueError(
                f"train_window must lie between 1 and the {num_transitions} trainable transitions of "
                f"num_inference_steps={self.num_inference_steps} (the last step is never trained), got {self.train_window}."
            )
        if not 1 <= self.window_chunk <= self.train_window:
            raise ValueError(
                f"window_chunk must lie between 1 and train_window={self.train_window}, got {self.window_chunk}."
            )
        for name in ("window_interval", "window_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.window_schedule == "random":
            self._refuse_given(
                ("window_interval", "window_stride"), "window_schedule='random' draws each window anew. Leave it"
            )

    def _refuse_given(self, names: tuple[str, ...], reason: str) -> None:
        """Refuse settings that cannot act, where they differ from their default."""
        for each in fields(self):
            if each.name in names and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}={getattr(self, each.name)!r} cannot act: {reason} at {each.default!r}.")

    def _resolve_chunk_sizes(self) -> None:
        num_transitions = self.num_inference_steps - 1
        sizes = self.chunk_sizes
        if sizes is None:
            sizes = PAPER_CHUNK_SIZES if self.num_inference_steps == 17 else "temporal"
        if isinstance(sizes, list | tuple) and len(sizes) == 1 and isinstance(sizes[0], str):
            sizes = sizes[0]  # the command line always gives a list
        if isinstance(sizes, str):
            kind, _, size = sizes.partition(":")
            if kind == "equal" and size.isdecimal() and int(size) > 0:
                sizes = equal_chunk_sizes(num_transitions, int(size))
            elif sizes.isdecimal():
                sizes = [int(sizes)]
            elif sizes != "temporal":
                raise ValueError(f"chunk_sizes must be a list of sizes, 'equal:N' or 'temporal', got {sizes!r}.")
        if sizes == "temporal":
            if self.num_chunks < 1 or self.min_chunk_size < 1:
                raise ValueError(
                    f"num_chunks and min_chunk_size must be at least 1, got {self.num_chunks} and "
                    f"{self.min_chunk_size}."
                )
            if self.num_chunks * self.min_chunk_size > num_transitions:
                raise ValueError(
                    f"num_chunks={self.num_chunks} chunks of at least min_chunk_size={self.min_chunk_size} steps do "
                    f"not fit the {num_transitions} trainable transitions of num_inference_steps="
                    f"{self.num_inference_steps}. Lower one of them or raise num_inference_steps."
                )
        else:
            try:
                sizes = [int(size) for size in sizes]
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"chunk_sizes must be a list of sizes, 'equal:N' or 'temporal', got {self.chunk_sizes!r}."
                ) from error
            if any(size < 1 for size in sizes):
                raise ValueError(f"chunk_sizes must all be at least 1, got {sizes}.")
            if sum(sizes) != num_transitions:
                raise ValueError(
                    f"chunk_sizes {sizes} sum to {sum(sizes)}, but num_inference_steps={self.num_inference_steps} has "
                    f"{num_transitions} trainable transitions (the last step is never trained). Make the sizes sum "
                    f"to {num_transitions}, or use 'equal:N' or 'temporal'."
                )
        self.chunk_sizes = sizes

    def _resolve_chunk_sampling(self) -> None:
        sampling = "uniform" if self.chunk_sampling is None else self.chunk_sampling
        if isinstance(sampling, list | tuple) and len(sampling) == 1 and sampling[0] in ("uniform", "temporal"):
            sampling = sampling[0]
        if sampling not in ("uniform", "temporal"):
            num_chunks = self.num_chunks if self.chunk_sizes == "temporal" else len(self.chunk_sizes)
            try:
                indices = sorted(int(index) for index in sampling)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"chunk_sampling must be 'uniform', 'temporal' or a list of chunk indices, got {sampling!r}."
                ) from error
            if not indices or len(set(indices)) != len(indices) or not 0 <= indices[0] <= indices[-1] < num_chunks:
                raise ValueError(f"chunk_sampling {sampling!r} must name distinct chunks among 0 to {num_chunks - 1}.")
            sampling = indices
        self.chunk_sampling = sampling

    # ---- For a plan ----

    def workload(self) -> Workload:
        """
        What a run computes and holds. A generation trains what its chunk or window draws, each alike probable; its images have
        one input a group as long as their noise is the same.
        """
        draws = self._draws()
        trained_rows = sum(map(self._trained_rows, draws)) / len(draws)
        again = (self.beta > 0) + (not self.on_policy and self.old_log_probs == "recompute")
        temporal = "the longest chunk that a temporal layout can have is the one that is trained"
        return Workload(
            rollout_rows=sum(map(self._rollout_rows, draws)) / len(draws),
            trained_rows=trained_rows,
            other_rows=again * trained_rows,
            term_rows=self._longest_chunk(),
            held_latents=max(map(len, draws)) + 2,
            held_images=self.generation_batch_size,
            drawn=1 / self.num_iterations,
            has_reference=self.beta > 0,
            streamed=self.chunk_gradient == "streamed",
            on_policy=self.on_policy,
            notes=(temporal,) if self.train_window is None and self.chunk_sizes == "temporal" else (),
        )

    def _draws(self) -> list[Sequence[int]]:
        """The trained transitions of generations that are alike probable, and together all that there are."""
        if self.train_window is not None:
            offsets = self.num_inference_steps - self.train_window
            if self.window_schedule == "random":
                offsets = max(1, offsets // 2)
            return [range(offset, offset + self.train_window) for offset in range(offsets)]
        sizes = self.chunk_sizes
        if sizes == "temporal":  # of sizes that the run will find
            num_transitions = self.num_inference_steps - 1
            sizes = equal_chunk_sizes(num_transitions, num_transitions // self.num_chunks)
        steps = chunk_steps(sizes)
        if isinstance(self.chunk_sampling, list):
            draws = [tuple(steps[index] for index in self.chunk_sampling)]
        else:
            draws = itertools.combinations(steps, max(1, int(len(steps) * self.chunk_fraction)))
        return [sum(draw, []) for draw in draws]

    def _longest_chunk(self) -> int:
        if self.train_window is not None:
            return self.window_chunk
        if self.chunk_sizes == "temporal":
            return self.num_inference_steps - 1 - (self.num_chunks - 1) * self.min_chunk_size
        return max(self.chunk_sizes)

    def _trained_rows(self, steps: Sequence[int]) -> float:
        if self.shared_noise != "group":
            return len(steps)
        last = 0 if self.stochastic_steps == "all" else steps[0]
        common = sum(step <= last for step in steps)
        # On-policy, a group is trained together there, in however many micro-batches its images are.
        together = self.consecutive_images if self.on_policy and len(steps) > 1 else self.per_device_train_batch_size
        return len(steps) - common * (1 - 1 / min(self.num_generations, together))

    def _rollout_rows(self, steps: Sequence[int]) -> float:
        if self.shared_noise != "group":
            return self.num_inference_steps
        common = 1 if self.stochastic_steps == "all" else steps[0] + 1
        return self.num_inference_steps - common * (1 - 1 / min(self.num_generations, self.consecutive_images))
