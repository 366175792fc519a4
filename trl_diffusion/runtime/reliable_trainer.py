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

"""A `transformers.Trainer` whose runs lose nothing, whatever happens to them."""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, save_fsdp_model, save_fsdp_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .checkpoints import (
    STAGING_NAME,
    STATE_NAME,
    last_whole_checkpoint,
    publish,
    recover,
    rotate,
    why_incomplete,
    write_manifest,
)
from .policies import AVERAGE, REFERENCE, Policies, warmed_up
from .resuming import BY_HISTORY, OptimizerSettings, is_function_of_the_step, refuse_changed, saved_state
from .sharding import held_weights
from .updates import FirstUpdate


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


logger = logging.get_logger(__name__)

# The exit status of a process that SIGTERM ends.
SIGTERM_STATUS = 128 + signal.SIGTERM
# Of a step whose gradient is bad, the message tells the rows of so many.
SHOWN_MICRO_BATCHES = 3
# Holds room on the disk for a small file that must not fail, whatever becomes of the others.
RESERVE_NAME, RESERVE_BYTES = "reserve", 2**16

# The weights at which an optimizer with modes trains; the other files of a checkpoint have those that it averages.
TRAINED_NAME = "trained.safetensors"


@runtime_checkable
class OptimizerWithModes(Protocol):
    """
    An optimizer that takes gradients at other weights, in train mode, than it is evaluated at, in eval mode, as
    [schedule-free](https://huggingface.co/papers/2405.15682) ones do.
    """

    def train(self) -> None: ...

    def eval(self) -> None: ...


class ElsewhereError(RuntimeError):
    """Another process of the run failed."""


class StepCallback(TrainerCallback):
    """Tells a [`ReliableTrainer`] where in a step it is."""

    def __init__(self, trainer: "ReliableTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer._begin_run()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer._skip_bad_step()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer._after_optimizer_step()


class ReliableTrainer(Trainer):
    """
    What a run needs to survive: checkpoints that are whole or not there, a resume that passes over broken ones, a
    checkpoint on SIGTERM, steps with a non-finite loss or gradient left out, foreign code that fails, a full disk, and
    other policies than the current one, see [`Policies`].

    All processes agree on each of these, so that none waits for another that has stopped.
    """

    # Attributes that change between two optimizer steps and belong into a checkpoint.
    _state_within_step: tuple[str, ...] = ("_images_trained",)

    def __init__(self, *args, **kwargs):
        # Images of all processes that were trained so far, each as often as it was: the same number however they are cut
        # into processes and micro-batches.
        self._images_trained = 0
        self._staging: Path | None = None  # where a checkpoint is being written
        self._save_error: Exception | None = None
        self._fresh_state: str | None = None  # what a run begins with
        self._saved_step: int | None = None  # of the last checkpoint of this run
        self._terminated = False
        # Of the micro-batches of this step the losses of their terms, which stay on their device, and what the messages
        # call their rows.
        self._step_losses: list[tuple[list[torch.Tensor], str]] = []
        self._bad_steps_in_a_row = 0
        self._skipped_steps = 0
        self._last_skip = ""
        self._first_update: FirstUpdate | None = None
        self._in_train_mode = False  # whether the weights are those at which an optimizer with modes trains
        super().__init__(*args, **kwargs)
        self.policies = Policies(held_weights(self.model, None), self.model)
        self._optimizer_name = self._name_of_optimizer()
        self.add_callback(StepCallback(self))

    @property
    def deepspeed(self) -> "DeepSpeedEngine | None":
        """The engine that trains, once it is made."""
        return self._deepspeed

    @deepspeed.setter
    def deepspeed(self, engine: "DeepSpeedEngine | None") -> None:
        # Between making the engine and loading a checkpoint with it, the Trainer sets this and calls nothing else.
        if engine is not None:
            from .deepspeed_internals import make_checkpoints_safe

            make_checkpoints_safe(engine, self._save_errors_noted, self._release_reserve)
        self._deepspeed = engine
        if engine is not None and self.is_in_train:
            self._bind_policies()

    # ---- What a subclass defines ----

    def state_dict(self) -> dict[str, Any]:
        """What a run carries over a restart beyond the Trainer's own state, as JSON."""
        return {
            "images_trained": self._images_trained,
            "bad_steps_in_a_row": self._bad_steps_in_a_row,
            "skipped_steps": self._skipped_steps,
            "fixed_settings": self._fixed_settings(),
            "schedule": self._schedule_settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the settings stay those of the run."""
        self._images_trained = state["images_trained"]
        self._bad_steps_in_a_row = state["bad_steps_in_a_row"]
        self._skipped_steps = state["skipped_steps"]

    def _fixed_settings(self) -> dict[str, Any]:
        """Settings that cannot change within a run, by name, as JSON; all others can."""
        args = self.args
        sharding = None
        if self.is_deepspeed_enabled:
            sharding = f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        elif self.is_fsdp_enabled:
            sharding = "FSDP2"
        settings = {
            "optim": self._optimizer_name,
            "optim_args": args.optim_args,
            "ema_decay": args.ema_decay,
            "fp16": args.fp16,
            "sharding": sharding,
            "per_device_train_batch_size x processes x gradient_accumulation_steps": (
                args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
            ),
        }
        # FSDP2 writes the optimizer's states whole; DeepSpeed, and policies of sharded weights, a file a process.
        a_file_a_process = self.is_deepspeed_enabled or (self.is_fsdp_enabled and args.ema_decay is not None)
        settings["processes"] = args.world_size if a_file_a_process else None
        settings["bf16"] = None if sharding is None else args.bf16
        return settings

    def _schedule_settings(self) -> dict[str, Any]:
        """Settings that can change unless the learning rate depends on what happened before."""
        args = self.args
        names = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
        return {name: vars(args)[name] for name in names}

    def _check_settings(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint, whose `state_dict` this is, with settings that cannot act."""
        saved, current = state["fixed_settings"], self._fixed_settings()
        if saved["ema_decay"] is not None and current["ema_decay"] is not None:
            current["ema_decay"] = saved["ema_decay"]  # an average goes on with any decay
        refuse_changed(
            checkpoint,
            saved,
            current,
            "They cannot change within a run, because the position in the data or the optimizer's states depend on them.",
            "start a new run in another output_dir",
        )
        if not {state["schedule"]["lr_scheduler_type"], self._schedule_settings()["lr_scheduler_type"]}.isdisjoint(
            BY_HISTORY
        ):
            self._check_schedule(checkpoint, state)

    def _check_schedule(self, checkpoint: str | Path, state: dict[str, Any]) -> None:
        refuse_changed(
            checkpoint,
            state["schedule"],
            self._schedule_settings(),
            "They cannot change where the learning rate depends on what happened before.",
            "start a new run in another output_dir",
        )

    def _name_of_optimizer(self) -> str:
        if self.optimizer is not None:
            return type(self.optimizer).__name__
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs[0].__name__
        return OptimizerNames(self.args.optim).value

    def _needs_copy_of_reference(self) -> bool:
        """Whether the run needs the policy "reference" and has no adapter to switch off."""
        return False

    def _save_process_state(self, folder: str) -> None:
        """Write what each process must keep for itself into the folder of a checkpoint."""

    def _load_process_state(self, folder: str) -> None:
        """Restore what `_save_process_state` wrote; called after `load_state_dict`."""

    # ---- A run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        run_folder = Path(self.args.output_dir)
        if self.args.should_save:
            recover(run_folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(run_folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no whole checkpoint in {str(run_folder)!r} to resume from. Train without "
                    "resume_from_checkpoint, or give the folder of a checkpoint."
                )
            resume_from_checkpoint = str(resume_from_checkpoint)
            logger.info(f"Resuming from {resume_from_checkpoint}.")
        elif resume_from_checkpoint:
            reason = why_incomplete(Path(resume_from_checkpoint))
            if reason is not None:
                raise ValueError(
                    f"resume_from_checkpoint {str(resume_from_checkpoint)!r} is no whole checkpoint: {reason}. Give "
                    "another one, or True for the last whole one of output_dir."
                )
        if self._fresh_state is None:
            self._fresh_state = json.dumps(self.state_dict())
        self.load_state_dict(json.loads(self._fresh_state))
        if resume_from_checkpoint:
            self._check_settings(Path(resume_from_checkpoint), saved_state(resume_from_checkpoint))
        self._saved_step = None
        self._in_train_mode = False
        self._step_losses = []
        for name in self.policies.copies.keys() - {REFERENCE}:
            self.policies.drop(name)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._bind_policies()
        try:
            with self._sigterm_handled():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # `Trainer` leaves it set where a run ends early
        update = self._first_update
        if update is not None and update.unchanged > 0 and not update.seen and self.is_world_process_zero():
            logger.warning(
                f"The run has ended after {update.unchanged} optimizer steps that changed none of the trained weights, so "
                f"nothing is trained. {type(self._own_optimizer).__name__} may be silent in its first steps: train for more."
            )
        return output

    def _begin_run(self) -> None:
        if self._optimizer_with_modes is not None:
            self._optimizer_with_modes.train()
            self._in_train_mode = True
        self._bind_policies()
        if self.args.ema_decay is not None and AVERAGE not in self.policies:
            self.policies.keep(AVERAGE)
        self._first_step = self.state.global_step
        # A checkpoint has those of its own time.
        self.state.compute_steps(self.args, self.state.max_steps)
        # Weights that are offloaded to NVMe are not in memory after a step.
        in_memory = self.deepspeed is None or not self.deepspeed.zero_nvme_offload_optimizer()
        self._first_update = FirstUpdate(self.model, self._own_optimizer, self.deepspeed) if in_memory else None
        self._remember_step()
        if self._nothing_left() and self.is_world_process_zero():
            logger.warning(
                f"The checkpoint is of step {self.state.global_step}, and the run ends after step "
                f"{self.state.max_steps}: nothing is left to train. Raise max_steps or num_train_epochs to go on."
            )

    def _nothing_left(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer looks only after a step whether it was the last.
        if self._nothing_left():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # The end of an optimizer step, and of an epoch. The state is kept before as well: an evaluation may fail.
        self._remember_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._remember_step()
        if self._bad_steps_in_a_row >= self.args.max_bad_steps:
            count, self._bad_steps_in_a_row = self._bad_steps_in_a_row, 0
            raise FloatingPointError(
                f"{self._last_skip} That was step {count} of {count} in a row, so the run stops "
                f"(max_bad_steps={self.args.max_bad_steps}). Lower learning_rate or max_grad_norm, or check what "
                f"the loss is made of. {self._save_last_step()}"
            )
        self._stop_if_terminated()

    def _remember_step(self) -> None:
        """Keep what changes before the next optimizer step, besides weights and optimizer."""
        random_state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if self.args.device.type != "cpu":
            module = torch.get_device_module(self.args.device)
            random_state["device"] = module.get_rng_state(self.args.device)
        self._last_step = {name: vars(self)[name] for name in self._state_within_step}, random_state

    def _save_last_step(self) -> str:
        """
        Save the state after the last optimizer step, from anywhere within the next; to be called by all processes, and
        to be followed by the end of the run. Returns a sentence that says where it is.
        """
        step = self.state.global_step
        if step == self._first_step:
            return "This run has taken no step yet, so there is nothing to save."
        folder = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self._saved_step != step:
            attributes, random_state = self._last_step
            vars(self).update(attributes)
            random.setstate(random_state["python"])
            np.random.set_state(random_state["numpy"])
            torch.set_rng_state(random_state["cpu"])
            if self.args.device.type != "cpu":
                module = torch.get_device_module(self.args.device)
                module.set_rng_state(random_state["device"], self.args.device)
            self.model.zero_grad()
            self._save_checkpoint(self.model, None)
        return f"Step {step} is saved in {folder}; resume with resume_from_checkpoint=True."

    def _any_process(self, flag: bool) -> bool:
        """Whether `flag` is set on any process; all processes must call this."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(float(flag), device=self.args.device)
        return self.accelerator.reduce(count, reduction="sum").item() > 0

    # ---- SIGTERM ----

    @contextlib.contextmanager
    def _sigterm_handled(self) -> Iterator[None]:
        """A first SIGTERM ends the run after a checkpoint; a second one does what it would do otherwise."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets the main thread alone set handlers
            return

        previous = signal.getsignal(signal.SIGTERM)

        def handle(number, frame):
            self._terminated = True
            signal.signal(signal.SIGTERM, previous)

        self._terminated = False
        signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _stop_if_terminated(self) -> None:
        """Where a process has got SIGTERM, save and leave; called at each micro-batch and at the end of a step."""
        if self._any_process(self._terminated):
            where = self._save_last_step()
            if self.is_world_process_zero():
                logger.warning(f"SIGTERM: the run ends with exit status {SIGTERM_STATUS}. {where}")
            raise SystemExit(SIGTERM_STATUS)

    # ---- Steps that are not finite ----

    def _note_loss(self, loss: torch.Tensor) -> None:
        """
        Note the loss of a term; nothing waits for its value before the step. The gradient of one that is not finite is
        taken all the same, since other processes take theirs.
        """
        losses, _ = self._step_losses[-1]
        losses.append(loss.detach().float())

    def _bad_losses(self) -> list[str]:
        """The losses of this step that are not finite, in words."""
        return [
            f"the loss of term {index + 1} of {len(losses)} is {value} on {rows}"
            for losses, rows in self._step_losses
            for index, value in enumerate(torch.stack(losses).tolist())
            if not math.isfinite(value)
        ]

    def _spoil_bad_step(self, loss: torch.Tensor) -> torch.Tensor:
        """
        The last loss of a step, as it is to be backpropagated. DeepSpeed takes the step within that backward pass, so it
        cannot be left out afterwards, but leaves it out itself where the gradient is not finite on any process.
        """
        if self.deepspeed is None:
            return loss
        finite = torch.stack([loss for losses, _ in self._step_losses for loss in losses]).isfinite().all()
        # A factor, since the gradient of what `torch.where` leaves out is 0 times NaN.
        return loss * torch.where(finite, 1.0, torch.nan)

    def _skip_bad_step(self) -> None:
        """Before an optimizer step: take the gradients away where one of them, or a loss, is not finite."""
        bad_losses = self._bad_losses()
        bad = bool(bad_losses)
        # With float16 the scaler leaves out steps that overflow, and such steps are usual.
        if self.deepspeed is not None:
            bad = bad or not (self.deepspeed.fp16_enabled() or self.deepspeed.was_step_applied())
        elif self.accelerator.scaler is None:
            parameters = itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
            gradients = [p.grad for p in parameters if p.grad is not None]
            gradients = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
            # Not finite where an element is not, or the norm overflows: such a gradient cannot be used either.
            bad = bad or not torch.nn.utils.get_total_norm(gradients).isfinite()
        bad = self._any_process(bad)
        if bad:
            reports = gather_object(bad_losses)
            if not reports:
                rows = dict.fromkeys(gather_object([rows for _, rows in self._step_losses]))
                reports = [f"the gradient is not finite on {', '.join(itertools.islice(rows, SHOWN_MICRO_BATCHES))}"]
            # An optimizer passes over parameters without a gradient: weights and its state stay as they are.
            self.model.zero_grad(set_to_none=True)
            self._skipped_steps += 1
            self._bad_steps_in_a_row += 1
            self._last_skip = f"Optimizer step {self.state.global_step + 1} was not applied: {'; '.join(reports)}."
            if self.is_world_process_zero():
                logger.warning(self._last_skip)
        else:
            self._bad_steps_in_a_row = 0
        self._step_losses = []

    # ---- Foreign code that fails ----

    def stop_together(self, failure: Exception | None, what: str) -> None:
        """
        Where code that is called on all processes has failed on one of them: during a training all of them save a
        checkpoint and raise. To be called by all processes; outside of a training a failure is raised where it is.

        Args:
            failure (`Exception`, *optional*): this process's.
            what (`str`): what failed, for the log.

        Raises:
            `failure`, or [`ElsewhereError`] where it is another process's.
        """
        if not self.is_in_train:
            if failure is not None:
                raise failure
            return
        if self._any_process(failure is not None):
            messages = gather_object([] if failure is None else [str(failure)])
            where = self._save_last_step()
            if self.is_world_process_zero():
                logger.error(f"The run stops, because {what} failed: {messages[0]}. {where}")
            raise ElsewhereError(f"On another process: {messages[0]}") if failure is None else failure

    # ---- Policies ----

    def _bind_policies(self) -> None:
        """Once the network is prepared: before a checkpoint is loaded, where that comes later, and when the run begins."""
        network = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        self.policies.bind(held_weights(self.model, self.deepspeed), network)
        if self._needs_copy_of_reference() and REFERENCE not in self.policies:
            self.policies.keep(REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled and self.is_in_train:
            self._bind_policies()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _policies_file(self, checkpoint: str | Path) -> Path:
        """Where a checkpoint has the policies; where weights are sharded, each process has a file."""
        index = f"_{self.args.process_index}" if self.is_deepspeed_enabled or self.is_fsdp_enabled else ""
        return Path(checkpoint) / f"policies{index}.safetensors"

    def _after_optimizer_step(self) -> None:
        if self._first_update is not None:
            skipped = self._bad_steps_in_a_row > 0 or self.accelerator.optimizer_step_was_skipped
            self._first_update.check(skipped, self.accelerator)
        if self.args.ema_decay is not None and self._bad_steps_in_a_row == 0:
            self.policies.update(AVERAGE, warmed_up(self.args.ema_decay, self.policies.updates[AVERAGE]))

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """
        Within this context the weights are their moving average, where `ema_decay` is set, or those of the eval mode of an
        optimizer that has modes.
        """
        if AVERAGE in self.policies:
            return self.policies.use(AVERAGE)
        return self._eval_mode() if self._in_train_mode else contextlib.nullcontext()

    @property
    def _optimizer_with_modes(self) -> OptimizerWithModes | None:
        """The optimizer, where it has modes."""
        optimizer = self._own_optimizer
        return optimizer if isinstance(optimizer, OptimizerWithModes) else None

    @property
    def _own_optimizer(self) -> Optimizer | None:
        """The optimizer without what wraps it; accelerate's wrapper has the methods of modes whatever is in it."""
        if self.deepspeed is not None:
            return self.deepspeed.basic_optimizer
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    @contextlib.contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Within this context an optimizer with modes is in eval mode; afterwards the weights are as they were."""
        weights = held_weights(self.model, self.deepspeed).tensors()
        # The way to the other weights and back rounds, and a run must not depend on when it was evaluated or saved.
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        self._optimizer_with_modes.eval()
        self._in_train_mode = False
        try:
            yield
        finally:
            self._optimizer_with_modes.train()
            self._in_train_mode = True
            _copy_weights(weights, before)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.averaged_weights(), self._save_errors_noted():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restart_average()

    def _restart_average(self) -> None:
        """After the best model was loaded: let the average be that of its checkpoint, which was evaluated."""
        self._in_train_mode = False  # the file has the weights of the eval mode
        if AVERAGE not in self.policies:
            return
        if self.policies.weights.sharded:
            # DeepSpeed and FSDP have loaded the weights that were trained; elsewhere the average was loaded.
            self.policies.load(self._policies_file(self.state.best_model_checkpoint))
        else:
            self.policies.keep(AVERAGE)

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    @contextlib.contextmanager
    def _save_errors_noted(self) -> Iterator[None]:
        """While a checkpoint is written, errors wait: other processes are still on their way to the next barrier."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if self._staging is None:
                raise
            # Its traceback would keep what was to be written in memory.
            self._save_error = self._save_error or error.with_traceback(None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # transformers writes file by file, so a process killed meanwhile would leave a broken newest checkpoint.
        args = self.args
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_folder / STAGING_NAME
        best_before = self.state.best_model_checkpoint
        self._save_error = None
        self._staging = staging
        try:
            if args.should_save:
                with self._save_errors_noted():
                    self._begin_checkpoint(staging / name)
            failed = self._any_process(self._save_error is not None)
            if not failed:
                with self._save_errors_noted():
                    super()._save_checkpoint(model, trial)
                failed = self._any_process(self._save_error is not None)
            if not failed:
                # The Trainer has looked for the best one where this one is being written.
                best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                is_there = best.name == name or best.exists()
                self.state.best_model_checkpoint = str(best) if is_there else best_before
            if args.should_save and not failed:
                with self._save_errors_noted():
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                    write_manifest(staging / name)
                    publish(staging / name, run_folder / name)
            failed = failed or self._any_process(self._save_error is not None)
        finally:
            self._staging = None
        free = shutil.disk_usage(run_folder).free
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        if failed:
            self.state.best_model_checkpoint = best_before
            self._report_save_error(run_folder, name, free)
            return
        self._saved_step = self.state.global_step
        if args.should_save:
            keep = {run_folder / name}
            if self.state.best_model_checkpoint is not None:
                keep.add(Path(self.state.best_model_checkpoint))
            rotate(run_folder, args.save_total_limit, keep)
        if args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))

    def _begin_checkpoint(self, folder: Path) -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        if not self.args.save_only_model:
            (folder / STATE_NAME).write_text(json.dumps(self.state_dict(), indent=2), encoding="utf-8")
        if self.deepspeed is not None:
            (folder.parent / RESERVE_NAME).write_bytes(bytes(RESERVE_BYTES))

    def _release_reserve(self) -> None:
        if self.args.should_save and self._staging is not None:
            (self._staging / RESERVE_NAME).unlink(missing_ok=True)

    def _report_save_error(self, run_folder: Path, name: str, free: int) -> None:
        last = last_whole_checkpoint(run_folder)
        reasons = gather_object([] if self._save_error is None else [str(self._save_error)])
        message = (
            f"The checkpoint {name} could not be written to {str(run_folder)!r}, which had {free / 2**20:.1f} MiB free: "
            f"{reasons[0]}. "
            + ("There is no whole checkpoint yet." if last is None else f"The last whole checkpoint is {last.name}.")
        )
        if self.args.on_save_error == "continue":
            if self.is_world_process_zero():
                logger.error(f"{message} The run goes on (on_save_error='continue').")
            return
        raise OSError(
            f"{message} Free some space and resume with resume_from_checkpoint=True, or set "
            "on_save_error='continue' to go on without checkpoints until there is space."
        ) from self._save_error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._any_process(self._save_error is not None):
            return
        if not self.is_fsdp_enabled:
            with self._save_errors_noted():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        # As the Trainer does, but the optimizer's states are gathered from all processes whether or not one of them could
        # write the weights.
        plugin = self.accelerator.state.fsdp_plugin
        with self._save_errors_noted():
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        with self._save_errors_noted():
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            with self._save_errors_noted():
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_scaler(self, output_dir: str) -> None:
        with self._save_errors_noted():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every process, once the folder of the checkpoint exists.
        policies = self.policies
        with self._save_errors_noted():
            super()._save_rng_state(output_dir)
            if policies.are_saved and (policies.weights.sharded or self.args.should_save):
                policies.save(self._policies_file(output_dir))
            if self._in_train_mode and self.args.should_save:
                weights = held_weights(self.model, self.deepspeed).tensors()
                weights = {name: weight.detach().contiguous() for name, weight in weights.items()}
                save_file(weights, os.path.join(output_dir, TRAINED_NAME))
            self._save_process_state(output_dir)

    def _load_policies(self, checkpoint: str) -> None:
        path = self._policies_file(checkpoint)
        if path.is_file():
            self.policies.load(path)
        elif any(Path(checkpoint).glob("policies*.safetensors")):
            raise ValueError(
                f"{checkpoint} has no {path.name}, but policies of other processes: sharded weights, and their copies, are "
                "one file a process. Resume with as many processes as it was written with, and copy the files of all."
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # The last call before a checkpoint is loaded, under DeepSpeed as well.
        self._optimizer_settings = OptimizerSettings(self.optimizer if optimizer is None else optimizer, scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = saved_state(checkpoint)
        if not is_function_of_the_step(self.lr_scheduler):
            self._check_schedule(checkpoint, state)
        self._optimizer_settings.apply(self.optimizer, self.lr_scheduler)
        self.load_state_dict(state)
        self._bind_policies()
        self._load_process_state(checkpoint)
        if self._optimizer_with_modes is not None:
            weights = held_weights(self.model, self.deepspeed).tensors()
            _copy_weights(weights, load_file(Path(checkpoint) / TRAINED_NAME))
        self._load_policies(checkpoint)


@torch.no_grad()
def _copy_weights(to: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(source[name])
