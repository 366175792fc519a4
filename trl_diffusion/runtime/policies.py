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

"""Another policy than the one that is trained is a name: the reference, the moving average, the one that sampled."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import HeldWeights


# The weights that are trained, as they are.
CURRENT = "current"
# What the run started from: the network with its adapter off or, where all weights are trained, a copy.
REFERENCE = "reference"
# The exponential moving average.
AVERAGE = "average"


def warmed_up(decay: float, updates: int) -> float:
    """
    Decay of a moving average at its update n = 0, 1, ...: min(decay, (1 + n) / (10 + n)), and 0 at the first, so that the
    start is soon forgotten. That of diffusers' [`~diffusers.training_utils.EMAModel`].
    """
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


class Policies:
    """
    Copies of the trained weights by name, in the place of which the network can be put.

    Each process has copies of the part of the weights that it holds: the same under DDP, ZeRO and FSDP2, for adapters and
    for all weights. What changes or saves copies is to be called outside of [`use`].

    ```python
    policies.keep("old")
    with policies.use("old"):
        ...  # the network is the policy as it was
    policies.update("old", 0.9)  # old <- 0.9 old + 0.1 current
    ```

    Args:
        weights ([`HeldWeights`]): the trained weights, as far as this process holds them.
        network (`nn.Module`): that has them; a [`~peft.PeftModel`] has a policy "reference" without a copy.
    """

    def __init__(self, weights: HeldWeights, network: nn.Module):
        self.bind(weights, network)
        self.copies: dict[str, dict[str, torch.Tensor]] = {}
        self.updates: dict[str, int] = {}  # how often each was updated
        self._active = CURRENT  # what the network is
        self._swapped = CURRENT  # whose weights the network has; the copy of that name has the current ones

    def bind(self, weights: HeldWeights, network: nn.Module) -> None:
        """Take weights and network as they are now that they are prepared; copies stay."""
        self.weights = weights
        self.network = network

    def __contains__(self, name: str) -> bool:
        return name in (CURRENT, *self.copies) or (name == REFERENCE and isinstance(self.network, PeftModel))

    def keep(self, name: str) -> None:
        """
        Let a name stand for the weights as they are now.

        Raises:
            `ValueError`: the name is "current", has a dot, or is "reference" where that is the network without its adapter.
        """
        self._refuse_within_use("keep")
        if name == CURRENT or "." in name or (name == REFERENCE and isinstance(self.network, PeftModel)):
            raise ValueError(f"A policy cannot be kept as {name!r}. Choose another name, without a dot.")
        self.copies[name] = {key: weight.detach().clone() for key, weight in self.weights.tensors().items()}
        self.updates[name] = 0

    def drop(self, name: str) -> None:
        """Forget a copy, if there is one."""
        self._refuse_within_use("drop")
        self.copies.pop(name, None)
        self.updates.pop(name, None)

    def update(self, name: str, decay: float) -> None:
        """
        Take the weights into a copy: copy <- decay copy + (1 - decay) weights.

        Args:
            name (`str`): of a copy.
            decay (`float`): in [0, 1].
        """
        self._refuse_within_use("update")
        self._check(name, self.copies)
        weights = [weight.detach() for weight in self.weights.tensors().values()]
        get_ema_multi_avg_fn(decay)(list(self.copies[name].values()), weights, self.updates[name])
        self.updates[name] += 1

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """
        Within this context the network is the policy of this name; afterwards it is what it was. Contexts can be nested.
        To be entered on every process, and not between a forward with gradient and its backward.

        Raises:
            `ValueError`: there is no such policy; names those there are.
        """
        if name not in self:
            self._check(name, {CURRENT: None, **self.copies})
        before = self._active
        self._become(name)
        try:
            yield
        finally:
            self._become(before)

    def _become(self, name: str) -> None:
        if name == self._active:
            return
        without_adapter = name == REFERENCE and name not in self.copies
        if without_adapter:
            self._switch_adapter(False)
        elif self._active == REFERENCE and REFERENCE not in self.copies:
            self._switch_adapter(True)
        # Without its adapter a network is the same whichever weights the adapter has.
        if not without_adapter and name != self._swapped:
            for copy in (self._swapped, name):
                if copy != CURRENT:
                    self._swap(self.copies[copy])
            self.weights.changed()
            self._swapped = name
        self._active = name

    def _switch_adapter(self, on: bool) -> None:
        tuner = self.network.base_model
        # PEFT also decides what requires a gradient, which ZeRO-3 looks at whenever it registers its hooks anew.
        trained = {weight: weight.requires_grad for weight in self.network.parameters()}
        (tuner.enable_adapter_layers if on else tuner.disable_adapter_layers)()
        for weight, requires_grad in trained.items():
            weight.requires_grad_(requires_grad)

    @torch.no_grad()
    def _swap(self, copy: dict[str, torch.Tensor]) -> None:
        # One by one, so that memory holds one tensor more and not all of them.
        for name, weight in self.weights.tensors().items():
            before = weight.clone()
            weight.copy_(copy[name])
            copy[name].copy_(before)

    def _refuse_within_use(self, what: str) -> None:
        if self._active != CURRENT:
            raise RuntimeError(f"policies.{what} within policies.use({self._active!r}). Leave that context first.")

    @staticmethod
    def _check(name: str, known: dict) -> None:
        if name not in known:
            raise ValueError(
                f"There is no policy {name!r}. Keep it first with policies.keep; there are {sorted(known)}."
            )

    def save(self, path: Path) -> None:
        """
        Write the copies, but for the reference, which every run has from the model that it starts with; and, beside an
        average, the weights, where no other file of the checkpoint has them.
        """
        self._refuse_within_use("save")
        kept = {name: copy for name, copy in self.copies.items() if name != REFERENCE}
        if AVERAGE in kept and not self.weights.sharded:
            kept[CURRENT] = self.weights.tensors()
        tensors = {
            f"{name}.{key}": tensor.detach().contiguous()
            for name, copy in kept.items()
            for key, tensor in copy.items()
        }
        updates = {name: self.updates[name] for name in kept if name != CURRENT}
        save_file(tensors, path, metadata={"updates": json.dumps(updates)})

    @property
    def are_saved(self) -> bool:
        """Whether [`save`] has anything to write."""
        return not self.copies.keys() <= {REFERENCE}

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Restore what [`save`] wrote."""
        self._refuse_within_use("load")
        weights = self.weights.tensors()
        with safe_open(path, framework="pt") as file:
            updates = json.loads(file.metadata()["updates"])
            for name in updates:
                self.copies[name] = {
                    key: torch.empty_like(weight, requires_grad=False).copy_(file.get_tensor(f"{name}.{key}"))
                    for key, weight in weights.items()
                }
            if AVERAGE in updates and not self.weights.sharded:
                for key, weight in weights.items():
                    weight.copy_(file.get_tensor(f"{CURRENT}.{key}"))
        self.updates |= updates
