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
"""What forwards and backwards cost, counted on tensors that have shapes and no memory."""

import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..models import FlowModel
from ..models.base import add_negative


@dataclass(frozen=True)
class Cost:
    """
    Of a computation.

    Attributes:
        bytes (`int`): largest sum of the tensors that it makes and holds at once, without what is there before.
        flops (`int`): floating-point operations of its matrix products, convolutions and attentions, two an addition of
            a product, as PyTorch counts them.
    """

    bytes: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of all storages that are made inside and still exist, and their largest sum.

    Args:
        known (`Iterable[torch.Tensor]`): tensors that were there before, whose storages do not count.

    Attributes:
        now, peak (`int`): bytes that exist, and the most that existed at once.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in self._known:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, key)
        if self.now > self.peak:
            # Tensors without memory are in circles of references, unlike real ones, which go when they are done with.
            gc.collect()
            self.peak = max(self.peak, self.now)
        return result

    def forget(self, tensor: torch.Tensor) -> None:
        """Count a tensor's bytes no more, though it exists."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes:
            self._known.add(key)
            self._release(key)

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class Counter:
    """
    Counts what a flow model's computations cost.

    Args:
        flow_model ([`~trl_diffusion.models.FlowModel`]): of [`~trl_diffusion.planning.configurations.fake_flow_model`].
        mode (`FakeTensorMode`): in which it was made.
        network (`nn.Module`): its denoiser, with an adapter or without, as it is trained.
        size (`tuple[int, int]`): height and width of the images in pixels.
        guidance_scale (`float`): guidance.
        autocast (`torch.dtype`, *optional*): mixed precision.
        rewards (`Iterable[nn.Module]`, *optional*): what images are scored with.
    """

    def __init__(
        self,
        flow_model: FlowModel,
        mode: FakeTensorMode,
        network: nn.Module,
        size: tuple[int, int],
        guidance_scale: float,
        autocast: torch.dtype | None = None,
        rewards: Iterable[nn.Module] = (),
    ):
        self.flow_model = flow_model
        self.mode = mode
        self.network = network
        self.size = size
        self.guidance_scale = guidance_scale
        self.autocast = autocast
        self.modules = [network, flow_model.vae, *rewards]

    def forward(self, rows: int) -> Cost:
        """Of one step of a rollout of so many rows."""
        return self._counted(lambda latents: self._velocity(latents), rows, gradient=False)

    def update(self, rows: int) -> Cost:
        """Of the forward and backward of so many rows at one noise level each."""
        return self._counted(lambda latents: self._velocity(latents).square().mean().backward(), rows)

    def decode(self, rows: int) -> Cost:
        """Of so many images of clean latents."""
        return self._counted(lambda latents: self.flow_model.decode(latents), rows, gradient=False)

    def align(self, rows: int, score: Callable[[torch.Tensor], torch.Tensor]) -> Cost:
        """Of one pass of SRPO: the network, the VAE and what `score` makes of images, forward and backward."""
        return self._counted(
            lambda latents: score(self.flow_model.decode(latents - self._velocity(latents))).sum().backward(), rows
        )

    def score(self, rows: int, score: Callable[[torch.Tensor], torch.Tensor]) -> Cost:
        """Of the scores of so many images."""
        with self.mode:
            images = torch.empty(rows, 3, *self.size)
        return self._measured(lambda: score(images), [images], gradient=False)

    def _velocity(self, latents: torch.Tensor) -> torch.Tensor:
        flow_model, rows = self.flow_model, len(latents)
        length = flow_model.max_sequence_length
        row = flow_model.empty_row()
        conditioning = flow_model.collate([row] * rows, length)
        if flow_model.is_guided(self.guidance_scale):
            conditioning = add_negative(conditioning, flow_model.collate([row], length), rows)
        autocast = nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)
        with autocast:
            return flow_model.velocity(self.network, latents, torch.empty(rows), conditioning, self.guidance_scale)

    def _counted(self, compute: Callable[[torch.Tensor], Any], rows: int, gradient: bool = True) -> Cost:
        with self.mode:
            latents = torch.empty(rows, *self.flow_model.latent_shape(*self.size))
        return self._measured(lambda: compute(latents), [latents], gradient)

    def _measured(self, compute: Callable[[], Any], inputs: list[torch.Tensor], gradient: bool) -> Cost:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        known = [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]
        with self.mode, torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as flops:
            live = LiveBytes([*known, *inputs])
            # Gradients are counted beside the weights: from the second term on they are there before.
            hooks = [
                parameter.register_post_accumulate_grad_hook(lambda parameter: live.forget(parameter.grad))
                for parameter in trained
            ]
            gc.collect()
            gc.freeze()  # what is there already need not be looked through at each peak
            try:
                with live:
                    compute()
            finally:
                gc.unfreeze()
                for hook in hooks:
                    hook.remove()
        for parameter in trained:
            parameter.grad = None
        return Cost(live.peak, flops.get_total_flops())
