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
"""Memory, work, time and price of a run, and what would make it fit."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from ..flow.chunks import chunk_steps, equal_chunk_sizes
from ..rewards.frames import FRAMES_TOGETHER
from ..runtime.sharding import BUCKET_SIZES
from ..trainer import ChunkGRPOConfig, DiffusionConfig, SRPOConfig
from ..trainer.network import DEFAULT_LORA
from .configurations import Configurations, add_lora, fake_flow_model
from .counting import Cost, Counter
from .rewards import RewardSize, reward_size


GIB = 2**30
# Of what an accelerator has: its context, and what the allocator cannot use.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.07
# Bytes of a frozen weight.
QUANTISED = {"int8": 1.0, "nf4": 0.52}
SHARDINGS = ("none", "multi_gpu", "zero1", "zero2", "zero3", "fsdp2")
# Bytes that an optimizer keeps a trained weight.
_OPTIMIZERS = {"adamw": 8, "adam": 8, "sgd": 0, "adafactor": 0, "lion": 4, "rmsprop": 4}


@dataclass(frozen=True)
class Choices:
    """
    The settings that decide about memory.

    Attributes:
        batch_size (`int`): images of a micro-batch of one process.
        accumulation (`int`): micro-batches of an optimizer step.
        rollout_batch_size (`int`): images that are sampled together.
        checkpointing, streamed, offload, vae_checkpointing, reward_checkpointing (`bool`): settings of that sense.
        quantization (`str`, *optional*): of the frozen weights.
        sharding (`str`): one of `SHARDINGS`.
        processes (`int`): how many.
    """

    batch_size: int
    accumulation: int
    rollout_batch_size: int
    checkpointing: bool
    streamed: bool
    offload: bool
    vae_checkpointing: bool
    reward_checkpointing: bool
    quantization: str | None
    sharding: str
    processes: int


@dataclass(frozen=True)
class Remedy:
    """A setting that lowers the peak, with those before it in force."""

    settings: str
    cost: str
    peak: int


@dataclass
class Plan:
    """
    What a run needs, in bytes and floating-point operations.

    Attributes:
        model (`str`): what was read of the model.
        phases (`dict[str, dict[str, int]]`): bytes of one process by phase and part.
        remedies (`list[Remedy]`): settings that lower the peak, one after the other until it fits.
        disk, host (`dict[str, int]`): bytes on disk, and in the memory of one process's host.
        work (`dict[str, float]`): operations of an optimizer step of all processes, by phase.
        assumptions (`list[str]`): what was taken for granted.
        memory (`int`, *optional*): bytes of an accelerator.
        hours, price (`float`, *optional*): of the run.
    """

    model: str
    phases: dict[str, dict[str, int]]
    disk: dict[str, int]
    host: dict[str, int]
    work: dict[str, float]
    assumptions: list[str]
    memory: int | None = None
    remedies: list[Remedy] = field(default_factory=list)
    hours: float | None = None
    price: float | None = None

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def usable_memory(self) -> float | None:
        """Bytes of the accelerator's memory that tensors can have."""
        return None if self.memory is None else usable(self.memory)

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.usable_memory

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "fits": self.fits}


def usable(memory: int) -> float:
    """Bytes of an accelerator's memory that tensors can have."""
    return (memory - CONTEXT_BYTES) * (1 - FRAGMENTATION)


def sharded(
    sharding: str, frozen_bytes: float, trained: int, width: int, processes: int, optimizer_bytes: int = 8
) -> dict[str, int]:
    """
    Bytes of weights, gradients and optimizer of one process, by docs/memory.md.

    Args:
        sharding (`str`): one of `SHARDINGS`.
        frozen_bytes (`float`): of all frozen weights.
        trained (`int`): number of trained weights.
        width (`int`): bytes of a value in the dtype of the network: DeepSpeed has trained weights in it too.
        processes (`int`): how many share.
        optimizer_bytes (`int`, *optional*, defaults to `8`): bytes that the optimizer keeps a trained weight, without a
            copy of it.
    """
    n = processes
    bucket = BUCKET_SIZES["reduce_bucket_size"] * width
    if sharding in ("none", "multi_gpu"):
        copies = 4 * trained if sharding == "multi_gpu" else 0  # DDP's buckets
        parts = (frozen_bytes, 4 * trained, 4 * trained, optimizer_bytes * trained, copies)
    elif sharding == "fsdp2":
        parts = (frozen_bytes / n, 4 * trained / n, 4 * trained / n, optimizer_bytes * trained / n, 0)
    else:
        gradients = width * trained / (1 if sharding == "zero1" else n)
        states = (optimizer_bytes + 4) * trained / n  # with float32 master weights
        shared = n if sharding == "zero3" else 1
        parts = (frozen_bytes / shared, width * trained / shared, gradients, states, bucket)
    names = ("frozen weights", "trained weights", "gradients", "optimizer", "buffers")
    return {name: round(value) for name, value in zip(names, parts, strict=True)}


class Planner:
    """
    Plans a run.

    Args:
        configurations ([`Configurations`]): of the model.
        args ([`~trl_diffusion.ChunkGRPOConfig`] or [`~trl_diffusion.SRPOConfig`]): settings of the run, for all processes.
        rewards (`Sequence`): specifications of the rewards, those that are watched as well.
        peft_config ([`~peft.LoraConfig`] or `False`, *optional*): as for a trainer.
        sharding (`str`, *optional*): one of `SHARDINGS`.
        processes (`int`, *optional*): of the run.
    """

    def __init__(
        self,
        configurations: Configurations,
        args: DiffusionConfig,
        rewards: Sequence[str | Mapping[str, Any]],
        peft_config: LoraConfig | bool | None = None,
        sharding: str = "none",
        processes: int = 1,
    ):
        self.args = args
        self.configurations = configurations
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.full = peft_config is False
        dtype = torch.bfloat16 if args.bf16 and not self.full else torch.float32
        self.width = 2 if args.bf16 else 4
        self.flow_model = fake_flow_model(configurations, self.mode, dtype)
        self.network = self.flow_model.denoiser
        self.frozen = 0 if self.full else sum(parameter.numel() for parameter in self.network.parameters())
        self.frozen_bytes = 0 if self.full else _bytes(self.network)
        if self.full:
            self.network.requires_grad_(True)
        else:
            config = peft_config or LoraConfig(**DEFAULT_LORA, target_modules=self.flow_model.lora_target_modules)
            if config.target_modules is None:
                config.target_modules = self.flow_model.lora_target_modules
            self.network = add_lora(self.flow_model, self.mode, config, torch.float32)
        self.flow_model.freeze_unused(self.network)
        self.trained = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
        self.rewards: list[RewardSize] = [reward_size(spec, self.mode) for spec in rewards]
        self.size = tuple(
            default if value is None else value
            for value, default in zip((args.height, args.width), self.flow_model.default_size, strict=True)
        )
        self.flow_model.check_size(*self.size)
        self.flow_model.check_num_frames(args.num_frames)
        self.num_frames = args.num_frames or self.flow_model.default_num_frames
        if self.flow_model.default_num_frames is None:
            self.num_frames = None
        guidance = self.flow_model.default_guidance_scale if args.guidance_scale is None else args.guidance_scale
        self.flow_model.check_guidance_scale(guidance)
        self.counter = Counter(
            self.flow_model, self.mode, self.network, self.size, guidance, torch.bfloat16 if args.bf16 else None,
            [reward.model for reward in self.rewards if reward.model is not None], self.num_frames,
        )  # fmt: skip
        self._updates: dict[tuple[bool, bool, bool, int], Cost] = {}
        is_srpo = isinstance(args, SRPOConfig)
        self.choices = Choices(
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rollout_batch_size=args.rollout_batch_size or args.per_device_train_batch_size,
            checkpointing=bool(args.activation_checkpointing),
            streamed=not is_srpo and args.chunk_gradient == "streamed",
            offload=args.offload_frozen,
            vae_checkpointing=is_srpo and args.vae_gradient_checkpointing,
            reward_checkpointing=is_srpo and args.reward_gradient_checkpointing,
            quantization=None if self.full else args.quantization,
            sharding=sharding,
            processes=processes,
        )

    def plan(
        self,
        memory: int | None = None,
        tflops: float | None = None,
        utilisation: float = 0.4,
        price: float | None = None,
    ) -> Plan:
        """
        The plan of the run.

        Args:
            memory (`int`, *optional*): bytes of an accelerator.
            tflops (`float`, *optional*): its speed in 10^12 operations a second.
            utilisation (`float`, *optional*, defaults to `0.4`): share of that speed that a training reaches.
            price (`float`, *optional*): of an accelerator an hour.
        """
        plan = Plan(
            self.configurations.source, self._phases(self.choices), self._disk(), self._host(), self._work(),
            self._assumptions(), memory,
        )  # fmt: skip
        if plan.fits is False:
            plan.remedies = self._remedies(memory, plan.peak)
        if tflops is not None:
            rate = tflops * 1e12 * utilisation * self.choices.processes
            plan.assumptions.append(f"{tflops:g} TFLOPS, of which a training reaches {utilisation:.0%}")
            if self.args.max_steps > 0:
                plan.hours = sum(plan.work.values()) * self.args.max_steps / rate / 3600
                plan.price = None if price is None else plan.hours * price * self.choices.processes
            else:
                plan.assumptions.append("max_steps is not set, so there are no hours: the dataset is not read")
        return plan

    # ---- Memory ----

    def _phases(self, choices: Choices) -> dict[str, dict[str, int]]:
        args = self.args
        resident = self._resident(choices)
        gradients, buffers = resident.pop("gradients"), resident.pop("buffers")
        if choices.sharding in ("zero3",):
            resident["buffers"] = buffers
        vae, rewards = _bytes(self.flow_model.vae), sum(reward.bytes for reward in self.rewards)
        beside = {} if choices.offload else {"VAE": vae, "rewards": rewards}
        held = {**resident, **beside}
        rows = choices.rollout_batch_size
        states = self._states_of_a_generation(choices)
        gathered = 0
        if choices.sharding == "zero3" and args.ds3_gather_for_rollout:
            whole = self._frozen_bytes(choices) + self.width * self.trained
            gathered = round(whole * (1 - 1 / choices.processes))
        encoders = sum(self.configurations.text_encoders.values()) * self.width
        phases = {
            "prompts": {**held, "text encoders": encoders},
            "rollout": {
                **held, "gathered weights": gathered, "activations": rows * self._forward.bytes, "latents": states,
            },
            "decode": {**held, "VAE": vae, "activations": rows * self._decode.bytes, "latents": states},
            "reward": {**held, "rewards": rewards, "activations": rows * self._score.bytes, "latents": states},
        }  # fmt: skip
        update = {**held, "gradients": gradients, "buffers": buffers, "latents": states}
        if isinstance(args, SRPOConfig):
            update |= {"VAE": vae, "rewards": rewards}
        update["activations"] = self._activations_of_update(choices)
        phases["update"] = update
        return {phase: {part: value for part, value in parts.items() if value > 0} for phase, parts in phases.items()}

    def _activations_of_update(self, choices: Choices) -> int:
        rows = self._rows_of_a_term(choices)
        if not self.full or rows == 1:
            return rows * self._update(choices).bytes
        # Gradients of weights on their way do not grow with the rows.
        one, two = self._update(choices).bytes, self._update(choices, rows=2).bytes
        return one + (rows - 1) * (two - one)

    def _frozen_bytes(self, choices: Choices) -> float:
        if choices.quantization is None:
            return self.frozen_bytes
        return self.frozen * QUANTISED[choices.quantization]

    def _resident(self, choices: Choices) -> dict[str, int]:
        parts = sharded(
            choices.sharding, self._frozen_bytes(choices), self.trained, self.width, choices.processes,
            self._optimizer_bytes,
        )  # fmt: skip
        copies = 4 * self.trained * (self.args.ema_decay is not None)
        if self.full and getattr(self.args, "beta", 0) > 0:
            copies += 4 * self.trained
        if copies:
            parts["other policies"] = copies // (1 if choices.sharding in ("none", "multi_gpu") else choices.processes)
        return parts

    @property
    def _optimizer_bytes(self) -> int:
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if "8bit" in name:
            return 2
        return next((size for start, size in _OPTIMIZERS.items() if name.startswith(start)), 8)

    def _states_of_a_generation(self, choices: Choices) -> int:
        latents = 4 * math.prod(self.counter.latent_shape)
        if isinstance(self.args, SRPOConfig):
            return choices.batch_size * 3 * latents
        images = self.args.generation_batch_size // choices.processes
        return images * (max(map(len, self._draws)) + 2) * latents

    def _rows_of_a_term(self, choices: Choices) -> int:
        args = self.args
        if isinstance(args, SRPOConfig) or choices.streamed:
            return choices.batch_size
        if args.train_window is not None:
            return choices.batch_size * args.window_chunk
        if args.chunk_sizes == "temporal":
            longest = args.num_inference_steps - 1 - (args.num_chunks - 1) * args.min_chunk_size
            return choices.batch_size * longest
        return choices.batch_size * max(args.chunk_sizes)

    # ---- One row of each computation ----

    @cached_property
    def _forward(self) -> Cost:
        return self.counter.forward(1)

    @cached_property
    def _decode(self) -> Cost:
        return self.counter.decode(1)

    @cached_property
    def _score(self) -> Cost:
        costs = [self.counter.score(1, _scorer(reward)) for reward in self.rewards if reward.model is not None]
        times = max(1, (self.num_frames or 1) // FRAMES_TOGETHER)
        return Cost(max((cost.bytes for cost in costs), default=0), times * sum(cost.flops for cost in costs))

    def _update(self, choices: Choices, rows: int = 1) -> Cost:
        key = choices.checkpointing, choices.vae_checkpointing, choices.reward_checkpointing, rows
        if key not in self._updates:
            self._updates[key] = self._count_update(choices, rows)
        return self._updates[key]

    def _count_update(self, choices: Choices, rows: int) -> Cost:
        if choices.checkpointing:
            self.flow_model.enable_gradient_checkpointing()
        else:
            self.flow_model.denoiser.disable_gradient_checkpointing()
        if not isinstance(self.args, SRPOConfig):
            return self.counter.update(rows)
        if choices.vae_checkpointing:
            self.flow_model.enable_vae_gradient_checkpointing()
        scorers = [
            _scorer(reward, choices.reward_checkpointing) for reward in self.rewards if reward.model is not None
        ]
        costs = [self.counter.align(rows, scorer) for scorer in scorers or [lambda images: images.flatten(1).mean(1)]]
        return Cost(max(cost.bytes for cost in costs), max(cost.flops for cost in costs))

    # ---- What would make it fit ----

    def _remedies(self, memory: int, peak: int) -> list[Remedy]:
        found: list[Remedy] = []
        choices = self.choices
        for text, cost, changed in self._steps_down():
            changed_choices = changed(choices)
            new_peak = max(sum(parts.values()) for parts in self._phases(changed_choices).values())
            if new_peak < peak:
                choices, peak = changed_choices, new_peak
                found.append(Remedy(text, cost, peak))
            if peak <= usable(memory):
                break
        return found

    def _steps_down(self) -> list[tuple[str, str, Callable[[Choices], Choices]]]:
        """Settings that save memory, in the order of what they cost."""
        choices, is_srpo = self.choices, isinstance(self.args, SRPOConfig)
        steps: list[tuple[str, str, Callable[[Choices], Choices]]] = []

        def step(condition: bool, text: str, cost: str, **changes: Any) -> None:
            if condition:
                steps.append((text, cost, lambda choices: replace(choices, **changes)))

        step(
            not is_srpo and not choices.streamed, "chunk_gradient: streamed", "the same update, smaller forwards",
            streamed=True,
        )  # fmt: skip
        step(choices.rollout_batch_size > 1, "rollout_batch_size: 1", "smaller forwards", rollout_batch_size=1)
        batch = choices.batch_size
        while batch > 1 and batch % 2 == 0:
            batch //= 2
            steps.append(
                (
                    f"per_device_train_batch_size: {batch}, gradient_accumulation_steps: "
                    f"{choices.accumulation * choices.batch_size // batch}",
                    "the same update, smaller forwards",
                    partial(self._with_batch, batch=batch),
                )
            )
        step(not choices.checkpointing, "activation_checkpointing: true", "a third more work", checkpointing=True)
        step(
            is_srpo and not choices.vae_checkpointing, "vae_gradient_checkpointing: true", "a second decode",
            vae_checkpointing=True,
        )  # fmt: skip
        step(
            is_srpo and not choices.reward_checkpointing, "reward_gradient_checkpointing: true",
            "a second forward of the reward", reward_checkpointing=True,
        )  # fmt: skip
        step(not choices.offload, "offload_frozen: true", "transfers in each step", offload=True)
        if not self.full and choices.quantization is None and choices.sharding not in ("zero3", "fsdp2"):
            step(True, "quantization: int8", "another base model, slower", quantization="int8")
        if not self.full and choices.quantization != "nf4" and choices.sharding not in ("zero3", "fsdp2"):
            step(True, "quantization: nf4", "another base model, slower", quantization="nf4")
        for processes in (2, 4, 8):
            if processes > choices.processes and choices.quantization is None:
                step(
                    True, f"--accelerate_config fsdp2 --num_processes {processes}", "more accelerators",
                    sharding="fsdp2", processes=processes, quantization=None,
                )  # fmt: skip
        return steps

    def _with_batch(self, choices: Choices, batch: int) -> Choices:
        """The same images of an optimizer step in smaller micro-batches, which rollouts have too unless they have their own."""
        rollout = choices.rollout_batch_size
        return replace(
            choices,
            batch_size=batch,
            accumulation=choices.accumulation * choices.batch_size // batch,
            rollout_batch_size=min(rollout, batch) if self.args.rollout_batch_size is None else rollout,
        )

    # ---- Work ----

    @cached_property
    def _draws(self) -> list[list[int]]:
        """The trained transitions of generations that are alike probable, and together all that there are."""
        args = self.args
        if args.train_window is not None:
            offsets = args.num_inference_steps - args.train_window
            if args.window_schedule == "random":
                offsets = max(1, offsets // 2)
            return [[offset + step for step in range(args.train_window)] for offset in range(offsets)]
        sizes = args.chunk_sizes
        if sizes == "temporal":  # of sizes that the run will find
            sizes = equal_chunk_sizes(args.num_inference_steps - 1, (args.num_inference_steps - 1) // args.num_chunks)
        steps = chunk_steps(sizes)
        if isinstance(args.chunk_sampling, list):
            draws = [tuple(steps[index] for index in args.chunk_sampling)]
        else:
            draws = itertools.combinations(steps, max(1, int(len(steps) * args.chunk_fraction)))
        return [sum(draw, []) for draw in draws]

    @property
    def trained_rows_per_image(self) -> float:
        """
        Rows of the network that an update computes, divided by its images: one a trained transition, and one a group of a
        micro-batch as long as its images have one input.
        """
        args = self.args
        rows = []
        for steps in self._draws:
            common = 0
            if args.shared_noise == "group":
                last = 0 if args.stochastic_steps == "all" else steps[0]
                common = sum(step <= last for step in steps)
            rows.append(len(steps) - common * (1 - 1 / min(args.num_generations, self.choices.batch_size)))
        return sum(rows) / len(rows)

    @property
    def forwards_per_image(self) -> float:
        """Rows of the network that a rollout computes, divided by its images: until their noise differs, a group has one."""
        args = self.args
        if isinstance(args, SRPOConfig) or args.shared_noise != "group":
            return args.num_inference_steps
        shared_by = min(args.num_generations, args.consecutive_images)
        common = [1 if args.stochastic_steps == "all" else steps[0] + 1 for steps in self._draws]
        return args.num_inference_steps - sum(common) / len(common) * (1 - 1 / shared_by)

    def _work(self) -> dict[str, float]:
        args, choices = self.args, self.choices
        images = choices.batch_size * choices.accumulation * choices.processes
        update = self._update(choices).flops
        if isinstance(args, SRPOConfig):
            passes = args.num_landings * len(args.branches)
            return {
                "rollout": images * args.num_inference_steps * self._forward.flops,
                "decode": images * self._decode.flops,
                "reward": images * self._score.flops,
                "update": images * passes * update,
            }
        drawn = images / args.num_iterations
        again = (args.beta > 0) + (not args.on_policy and args.old_log_probs == "recompute")
        # Step by step, the ratio of a whole chunk is computed before, unless it is 1.
        ratios = choices.streamed and not args.on_policy
        return {
            "rollout": drawn * self.forwards_per_image * self._forward.flops,
            "decode": drawn * self._decode.flops,
            "reward": drawn * self._score.flops,
            "old and reference": drawn * again * self.trained_rows_per_image * self._forward.flops,
            "update": images * self.trained_rows_per_image * (update + ratios * self._forward.flops),
        }

    # ---- Disk and host ----

    def _disk(self) -> dict[str, int]:
        args = self.args
        checkpoint = (4 + self._optimizer_bytes + 4 * (args.ema_decay is not None)) * self.trained
        saves = 1
        if args.save_strategy == "steps" and args.max_steps > 0 and args.save_steps >= 1:
            saves = args.max_steps // int(args.save_steps)
        kept = min(saves, args.save_total_limit or saves)
        disk = {"checkpoints": checkpoint * max(kept, 1)}
        if args.log_samples and args.max_steps > 0 and args.logging_steps >= 1:
            logs = args.max_steps // int(args.logging_steps)
            pictures = min(logs, args.samples_total_limit or logs) * args.num_samples_to_log
            disk["samples"] = pictures * (self.num_frames or 1) * self.size[0] * self.size[1] * 3
        if args.cache_prompt_embeds:
            disk["embeddings, at most"] = round(args.prompt_cache_gib * GIB)
        return disk

    def _host(self) -> dict[str, int]:
        row = sum(tensor.numel() for tensor in self._empty_row.values()) * self.width
        return {
            "network while it loads": self.frozen_bytes or 4 * self.trained,
            "text encoders": sum(self.configurations.text_encoders.values()) * self.width,
            "embeddings": -(-self.args.prompt_window // self.choices.processes) * row,
        }

    @cached_property
    def _empty_row(self) -> dict[str, torch.Tensor]:
        with self.mode:
            return self.flow_model.empty_row()

    def _assumptions(self) -> list[str]:
        lines = [
            f"an accelerator keeps {CONTEXT_BYTES / GIB:g} GiB for itself, and {FRAGMENTATION:.0%} of the rest cannot be used",
            "attention keeps no matrix of tokens by tokens, as PyTorch's own does",
            "mixed precision is that of the CPU; accelerators keep some more operations in float32",
            "work is that of products, convolutions and attention; memory of text encoders at work is not counted",
            "samples are counted as uncompressed pictures",
        ]
        if isinstance(self.args, ChunkGRPOConfig) and self.args.chunk_sizes == "temporal":
            lines.append("the longest chunk that a temporal layout can have is the one that is trained")
        lines += [f"not counted: {reward.note}" for reward in self.rewards if reward.note is not None]
        return lines


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _scorer(reward: RewardSize, checkpointing: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    if checkpointing:
        reward.model.enable_gradient_checkpointing()

    def score(images: torch.Tensor) -> torch.Tensor:
        # The frames of a video are scored some at a time, and those before are computed again for a gradient.
        frames = images if images.ndim == 4 else images.flatten(0, 1)[:FRAMES_TOGETHER]
        return reward.model.score(frames, ["a prompt"] * len(frames))

    return score
