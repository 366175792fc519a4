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

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from ..rewards import Reward
from ..rewards.frames import FRAMES_TOGETHER
from ..runtime.sharding import BUCKET_SIZES
from .configurations import Configurations, add_adapter, fake_flow_model
from .counting import Cost, Counter, only_what_is_new_is_collected
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
        checkpointing, streamed, encode_on_cpu, offload, vae_checkpointing, reward_checkpointing (`bool`): settings of that sense.
        quantization (`str`, *optional*): of the frozen weights.
        sharding (`str`): one of `SHARDINGS`.
        processes (`int`): how many.
    """

    batch_size: int
    accumulation: int
    rollout_batch_size: int
    checkpointing: bool
    streamed: bool
    encode_on_cpu: bool
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

    @property
    def summary(self) -> str:
        """The peak in one line."""
        phase = max(self.phases, key=lambda name: sum(self.phases[name].values()))
        peak = f"The peak is {self.peak / GIB:.1f} GiB, in the phase '{phase}'"
        if self.memory is None:
            return f"{peak}."
        word = "fits" if self.fits else "does not fit"
        return (
            f"{peak}: it {word} into {self.memory / GIB:g} GiB, of which {self.usable_memory / GIB:.1f} can be used."
        )

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
        args ([`~trl_diffusion.DiffusionConfig`]): settings of the run, for all processes.
        rewards (`Sequence`): the rewards or their specifications, those that are watched as well.
        peft_config ([`~peft.PeftConfig`] or `False`): the adapter, or `False` to train all weights.
        sharding (`str`, *optional*): one of `SHARDINGS`.
        processes (`int`, *optional*): of the run.

    Raises:
        `ValueError`: the method does not tell its workload, or a size that the model does not have.
    """

    def __init__(
        self,
        configurations: Configurations,
        args: TrainingArguments,
        rewards: Sequence[str | Mapping[str, Any] | Reward],
        peft_config: PeftConfig | Literal[False],
        sharding: str = "none",
        processes: int = 1,
    ):
        self.args = args
        self.workload = args.workload()
        if self.workload is None:
            raise ValueError(f"{type(args).__name__} does not tell its workload, so its runs cannot be planned.")
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
            config = copy.copy(peft_config)
            if config.target_modules is None:
                config.target_modules = self.flow_model.lora_target_modules
            self.network = add_adapter(self.flow_model, self.mode, config, torch.float32)
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
        # By the number of rows, and the update by its settings.
        self._forward, self._decode = cache(self.counter.forward), cache(self.counter.decode)
        self._score, self._update = cache(self._count_score), cache(self._count_update)
        self.choices = Choices(
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rollout_batch_size=args.rollout_batch_size or args.per_device_train_batch_size,
            checkpointing=bool(args.activation_checkpointing),
            streamed=bool(self.workload.streamed),
            encode_on_cpu=args.encode_on_cpu,
            offload=args.offload_frozen,
            vae_checkpointing=self.workload.through_rewards and args.vae_gradient_checkpointing,
            reward_checkpointing=self.workload.through_rewards and args.reward_gradient_checkpointing,
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
        with_remedies: bool = True,
    ) -> Plan:
        """
        The plan of the run.

        Args:
            memory (`int`, *optional*): bytes of an accelerator.
            tflops (`float`, *optional*): its speed in 10^12 operations a second.
            utilisation (`float`, *optional*, defaults to `0.4`): share of that speed that a training reaches.
            price (`float`, *optional*): of an accelerator an hour.
            with_remedies (`bool`, *optional*, defaults to `True`): look for what would make a run fit that does not.
        """
        with only_what_is_new_is_collected():
            plan = Plan(
                self.configurations.source, self._phases(self.choices), self._disk(), self._host(), self._work(),
                self._assumptions(), memory,
            )  # fmt: skip
            if plan.fits is False and with_remedies:
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
        states = self._held_images(choices) * self.workload.held_latents * 4 * math.prod(self.counter.latent_shape)
        images = self._held_images(choices) * self._image_bytes
        gathered = 0
        if choices.sharding == "zero3" and args.ds3_gather_for_rollout:
            whole = self._frozen_bytes(choices) + self.width * self.trained
            gathered = round(whole * (1 - 1 / choices.processes))
        encoders = 0 if choices.encode_on_cpu else sum(self.configurations.text_encoders.values()) * self.width
        phases = {
            "prompts": {**held, "text encoders": encoders},
            "rollout": {
                **held, "gathered weights": gathered, "activations": self._forward(rows).bytes, "latents": states,
            },
            "decode": {
                **held, "VAE": vae, "activations": self._decode(rows).bytes, "latents": states,
                "images": images if images > rows * self._image_bytes else 0,
            },
            "reward": {
                **held, "rewards": rewards, "activations": self._score(rows).bytes, "latents": states, "images": images,
            },
        }  # fmt: skip
        update = {**held, "gradients": gradients, "buffers": buffers, "latents": states}
        if self.workload.through_rewards:
            update |= {"VAE": vae, "rewards": rewards}
        update["activations"] = self._update_of(choices).bytes
        if self._rows_of_a_term(choices) > choices.batch_size and self.flow_model.is_guided(
            self.counter.guidance_scale
        ):
            # Of the micro-batch, with those of the negative prompt, beside those that a term repeats.
            update["embeddings"] = 2 * choices.batch_size * self._row_bytes
        phases["update"] = update
        return {phase: {part: value for part, value in parts.items() if value > 0} for phase, parts in phases.items()}

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
        if self.full and self.workload.has_reference:
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

    def _held_images(self, choices: Choices) -> int:
        images = self.workload.held_images
        return choices.batch_size if images is None else images // choices.processes

    @property
    def _image_bytes(self) -> int:
        return 4 * 3 * (self.num_frames or 1) * math.prod(self.size)

    def _rows_of_a_term(self, choices: Choices) -> int:
        return choices.batch_size * (1 if choices.streamed else self.workload.term_rows)

    # ---- What each computation costs ----

    def _count_score(self, rows: int) -> Cost:
        costs = [self.counter.score(rows, _scorer(reward)) for reward in self.rewards if reward.model is not None]
        times = max(1, (self.num_frames or 1) // FRAMES_TOGETHER)
        return Cost(max((cost.bytes for cost in costs), default=0), times * sum(cost.flops for cost in costs))

    def _update_of(self, choices: Choices) -> Cost:
        return self._update(
            choices.checkpointing,
            choices.vae_checkpointing,
            choices.reward_checkpointing,
            self._rows_of_a_term(choices),
        )

    def _count_update(
        self, checkpointing: bool, vae_checkpointing: bool, reward_checkpointing: bool, rows: int
    ) -> Cost:
        if checkpointing:
            self.flow_model.enable_gradient_checkpointing()
        else:
            self.flow_model.denoiser.disable_gradient_checkpointing()
        if not self.workload.through_rewards:
            return self.counter.update(rows)
        if vae_checkpointing:
            self.flow_model.enable_vae_gradient_checkpointing()
        scorers = [_scorer(reward, reward_checkpointing) for reward in self.rewards if reward.model is not None]
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
        choices, through_rewards = self.choices, self.workload.through_rewards
        steps: list[tuple[str, str, Callable[[Choices], Choices]]] = []

        def step(condition: bool, text: str, cost: str, **changes: Any) -> None:
            if condition:
                steps.append((text, cost, lambda choices: replace(choices, **changes)))

        step(
            self.workload.streamed is False, "chunk_gradient: streamed", "the same update, smaller forwards",
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
            through_rewards and not choices.vae_checkpointing, "vae_gradient_checkpointing: true", "a second decode",
            vae_checkpointing=True,
        )  # fmt: skip
        step(
            through_rewards and not choices.reward_checkpointing, "reward_gradient_checkpointing: true",
            "a second forward of the reward", reward_checkpointing=True,
        )  # fmt: skip
        step(not choices.offload, "offload_frozen: true", "transfers in each step", offload=True)
        step(not choices.encode_on_cpu, "encode_on_cpu: true", "prompts are encoded slowly", encode_on_cpu=True)
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

    def _work(self) -> dict[str, float]:
        choices, workload = self.choices, self.workload
        images = choices.batch_size * choices.accumulation * choices.processes
        drawn = images * workload.drawn
        # Row by row, the ratio of all of them is computed before, unless it is 1.
        ratios = choices.streamed and not workload.on_policy
        rows = choices.rollout_batch_size
        forward, update = (
            self._forward(rows).flops / rows,
            self._update_of(choices).flops / self._rows_of_a_term(choices),
        )
        return {
            "rollout": drawn * workload.rollout_rows * forward,
            "decode": drawn * self._decode(rows).flops / rows,
            "reward": drawn * self._score(rows).flops / rows,
            "old and reference": drawn * workload.other_rows * forward,
            "update": images * workload.trained_rows * (update + ratios * forward),
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
        return {
            "network while it loads": self.frozen_bytes or 4 * self.trained,
            "text encoders": sum(self.configurations.text_encoders.values()) * self.width,
            "embeddings": -(-self.args.prompt_window // self.choices.processes) * self._row_bytes,
        }

    @cached_property
    def _row_bytes(self) -> int:
        """Of the embeddings of a prompt."""
        with self.mode:
            return self.width * sum(tensor.numel() for tensor in self.flow_model.empty_row().values())

    def _assumptions(self) -> list[str]:
        lines = [
            f"an accelerator keeps {CONTEXT_BYTES / GIB:g} GiB for itself, and {FRAGMENTATION:.0%} of the rest cannot be used",
            "attention keeps no matrix of tokens by tokens, as PyTorch's own does",
            "mixed precision is that of the CPU; accelerators keep some more operations in float32",
            "work is that of products, convolutions and attention; memory of text encoders at work is not counted",
            "samples are counted as uncompressed pictures",
        ]
        lines += self.workload.notes
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
