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

"""Whether a run changes the weights that it trains."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import held_weights


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# Steps in which an optimizer of another package than torch may leave the weights as they are: the first 5 of rectified Adam
# (https://huggingface.co/papers/1908.03265) do, where it does not fall back to SGD.
SILENT_STEPS = 10

# Of the elements of a tensor, integers as wide as the floating-point numbers.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

PASS_CLASS = "Pass optimizer_cls_and_kwargs=({name}, {{...}}) instead, and the trainer gives it the trained weights."


def check_optimizers(
    optimizers: tuple[torch.optim.Optimizer | None, Any],
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None,
    weights_exist: bool,
) -> None:
    """
    Check the optimizer that a user gives, before weights are loaded.

    Args:
        optimizers (`tuple`): optimizer and scheduler, or `None` for either.
        optimizer_cls_and_kwargs (`tuple`, *optional*): class of an optimizer and its arguments.
        weights_exist (`bool`): whether the weights to be trained exist already.

    Raises:
        `ValueError`: an optimizer that cannot hold the trained weights, a scheduler without its optimizer, both ways of
            giving an optimizer, or a class that is given parameters.
    """
    optimizer, scheduler = optimizers
    if optimizer_cls_and_kwargs is not None:
        if optimizer is not None:
            raise ValueError(
                "optimizers and optimizer_cls_and_kwargs both give an optimizer. Pass one of them; "
                "optimizer_cls_and_kwargs serves everywhere."
            )
        given = {"params", "model", "optimizer_dict"} & set(optimizer_cls_and_kwargs[1])
        if given:
            raise ValueError(
                f"optimizer_cls_and_kwargs gives {sorted(given)}, but the trainer gives the class the trained weights. "
                "Leave that out."
            )
    if optimizer is not None and not weights_exist:
        raise ValueError(
            f"optimizers has a {type(optimizer).__name__}, which cannot hold the weights that are trained: those of a LoRA, "
            f"and of a model that the trainer loads, are made later. {PASS_CLASS.format(name=type(optimizer).__name__)}"
        )
    if scheduler is not None and (optimizer is None or scheduler.optimizer is not optimizer):
        raise ValueError(
            f"optimizers has a {type(scheduler).__name__} of another optimizer than the one that trains, so it would change "
            "nothing. Pass both, or set lr_scheduler_type and lr_scheduler_kwargs."
        )


def check_optimizer_holds(optimizer: torch.optim.Optimizer | None, network: nn.Module) -> None:
    """
    Check that a network has weights to be trained, and that an optimizer of the user's has all of them.

    Raises:
        `ValueError`: if it has not; the message names the first of those that are missing.
    """
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    if not trained:
        raise ValueError("peft_config leaves nothing to train: no weight of the network requires a gradient.")
    if optimizer is None:
        return
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    missing = [name for name, weight in trained.items() if id(weight) not in held]
    if missing:
        raise ValueError(
            f"The {type(optimizer).__name__} in optimizers lacks {len(missing)} of the {len(trained)} weights that are "
            f"trained, as {missing[0]!r}. {PASS_CLASS.format(name=type(optimizer).__name__)}"
        )


class FirstUpdate:
    """
    Watches a run until a step has changed the weights that it trains.

    Costs two readings of the trained weights and 8 bytes a tensor where the first step changes them, and one more for
    each step that leaves them as they are with good reason: a learning rate of 0, as warm-up has it in its first step,
    a gradient of 0, a step that was skipped, or one of the first [`SILENT_STEPS`] of an optimizer of another package than
    torch.

    Args:
        network (`nn.Module`): that is trained, prepared for it.
        optimizer (`torch.optim.Optimizer`): that is to change them, without what wraps it.
        engine (`DeepSpeedEngine`, *optional*): that trains them.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, engine: "DeepSpeedEngine | None"):
        self.network = network
        self.optimizer = optimizer
        self.engine = engine
        self.seen = False
        self.unchanged = 0  # steps that should have changed the weights and have not
        self._silent_steps = 0 if type(optimizer).__module__.startswith("torch.optim") else SILENT_STEPS
        self._before = self._checksums()
        self._learning_rates = self._read_learning_rates()

    def check(self, skipped: bool, accelerator: Accelerator) -> None:
        """
        After a step; to be called on every process.

        Args:
            skipped (`bool`): whether the step was not applied.
            accelerator ([`~accelerate.Accelerator`]): of the run.

        Raises:
            `RuntimeError`: the step changed no weight, though gradient and learning rate were not 0 and the optimizer
                should not be silent any more, or there was no gradient at all.
        """
        if self.seen:
            return
        gradients = self._gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        facts = torch.tensor([self._checksums() != self._before, len(gradients) > 0, norm > 0], dtype=torch.float32)
        # The weights that change, or have a gradient, may be another process's.
        facts = accelerator.reduce(facts.to(accelerator.device), reduction="sum")
        self.seen, any_gradient, any_nonzero = (facts > 0).tolist()
        # By now DeepSpeed may have the next step's learning rate, and other runs have it later.
        before, self._learning_rates = self._learning_rates, self._read_learning_rates()
        learning_rate = max(map(min, before, self._learning_rates))
        if self.seen or skipped or learning_rate == 0:
            return
        if not any_gradient:
            raise RuntimeError(
                "The first optimizer step found no gradient on any of the trained weights, so nothing is trained and the "
                "run stops. A loss that does not depend on the trained weights does this, or an optimizer that takes the "
                "gradients away before the step."
            )
        if not any_nonzero:
            return
        self.unchanged += 1
        if self.unchanged > self._silent_steps:
            steps = "An optimizer step" if self.unchanged == 1 else f"{self.unchanged} optimizer steps"
            raise RuntimeError(
                f"{steps} with the learning rate {learning_rate:g} changed none of the trained weights, "
                "though their gradient is not 0, so the run stops. Either the optimizer holds other weights than those "
                "that are trained (pass optimizer_cls_and_kwargs, or compare its param_groups with "
                "trainer.model.parameters()), or learning_rate is too small for the precision of the weights."
            )

    def _read_learning_rates(self) -> list[float]:
        # Optimizers that find their own say None.
        return [1.0 if group["lr"] is None else float(group["lr"]) for group in self.optimizer.param_groups]

    @torch.no_grad()
    def _checksums(self) -> list[int]:
        """Of each tensor the sum of its elements read as integers, which any change of a weight changes."""
        sums = [
            weight.detach().view(_BITS[weight.element_size()]).sum(dtype=torch.int64)
            for weight in held_weights(self.network, self.engine).tensors().values()
        ]
        return torch.stack(sums).tolist() if sums else []

    def _gradients(self) -> list[torch.Tensor]:
        if self.engine is not None:  # which has dropped the gradients by now
            norm = self.engine.get_global_grad_norm()
            return [] if norm is None else [torch.as_tensor(norm)]
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
