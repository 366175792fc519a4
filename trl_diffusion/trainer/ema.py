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
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


# Both the trained weights and their average: the other files of a checkpoint hold the average alone.
EMA_NAME = "ema.safetensors"


class WeightAverage:
    """
    Exponential moving average of weights, ema <- d ema + (1 - d) weights after each optimizer step, by diffusers'
    [`~diffusers.training_utils.EMAModel`]: at step n = 0, 1, ... the decay d is min(decay, (1 + n) / (10 + n)), and 0
    at the first, so that the start is soon forgotten.

    Args:
        parameters (`dict[str, nn.Parameter]`): the trained weights by name; they keep their place in memory.
        decay (`float`): of the average, in (0, 1).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters = parameters
        self._ema = EMAModel(parameters.values(), decay=decay, foreach=True)
        self._applied = False

    def step(self) -> None:
        """Take the weights into the average; after each optimizer step."""
        self._ema.step(self.parameters.values())

    def reset(self) -> None:
        """Make the weights as they are the average."""
        self._ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters.values()]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context, which may be nested, the weights are the average; afterwards they are as they were."""
        if self._applied:
            yield
            return
        self._ema.store(self.parameters.values())
        self._ema.copy_to(self.parameters.values())
        self._applied = True
        try:
            yield
        finally:
            self._ema.restore(self.parameters.values())
            self._applied = False

    def save(self, path: Path) -> None:
        """Write weights and average; to be called outside of [`applied`]."""
        averages = dict(zip(self.parameters, self._ema.shadow_params, strict=True))
        tensors = {f"trained.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average.{name}": average for name, average in averages.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"optimization_step": str(self._ema.optimization_step)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Restore what [`save`] wrote, weights and average."""
        with safe_open(path, framework="pt") as file:
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"trained.{name}"))
            averages = [
                file.get_tensor(f"average.{name}").to(parameter.device) for name, parameter in self.parameters.items()
            ]
            step = int(file.metadata()["optimization_step"])
        self._ema.load_state_dict({"shadow_params": averages, "optimization_step": step})
