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

"""The exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import HeldWeights


class WeightAverage:
    """
    Exponential moving average of weights, ema <- d ema + (1 - d) weights after each optimizer step. At step
    n = 0, 1, ... the decay d is min(decay, (1 + n) / (10 + n)), and 0 at the first, so that the start is soon forgotten:
    that of diffusers' [`~diffusers.training_utils.EMAModel`], which takes whole parameters, while here each process may
    keep the average of its part.

    Args:
        weights ([`HeldWeights`]): the trained weights, as far as this process holds them.
        decay (`float`): of the average, in (0, 1).
    """

    def __init__(self, weights: HeldWeights, decay: float):
        self.weights = weights
        self.decay = decay
        self.averages = {name: weight.detach().clone() for name, weight in weights.tensors().items()}
        self._steps = 0
        self._applied = False

    def step(self) -> None:
        """Take the weights into the average; after each optimizer step."""
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps)) if self._steps else 0.0
        weights = [weight.detach() for weight in self.weights.tensors().values()]
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), weights, self._steps)
        self._steps += 1

    def reset(self) -> None:
        """Make the weights as they are the average."""
        self._copy(self.averages, self.weights.tensors())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """
        Within this context, which may be nested, the weights are the average; afterwards they are as they were. To be
        entered on every process.
        """
        if self._applied:
            yield
            return
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._swap()
            self._applied = False

    @torch.no_grad()
    def _swap(self) -> None:
        # One by one, so that memory holds one tensor more and not all of them.
        for name, weight in self.weights.tensors().items():
            before = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(before)
        self.weights.changed()

    @staticmethod
    @torch.no_grad()
    def _copy(to: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
        for name, tensor in to.items():
            tensor.copy_(source[name])

    def save(self, path: Path) -> None:
        """
        Write the average, and the weights where no other file of the checkpoint has them; to be called outside of
        [`applied`].
        """
        tensors = {f"average.{name}": average for name, average in self.averages.items()}
        if not self.weights.sharded:
            tensors |= {f"trained.{name}": weight.detach() for name, weight in self.weights.tensors().items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"steps": str(self._steps)})

    def load(self, path: Path) -> None:
        """Restore what [`save`] wrote."""
        with safe_open(path, framework="pt") as file:
            self._copy(self.averages, {name: file.get_tensor(f"average.{name}") for name in self.averages})
            if not self.weights.sharded:
                weights = self.weights.tensors()
                self._copy(weights, {name: file.get_tensor(f"trained.{name}") for name in weights})
            self._steps = int(file.metadata()["steps"])
