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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..models import FlowModel
from ..models.base import add_negative


# Blocks of a list that are run at least: with the first and the last, one of those in between.
_FEWEST = 3


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


@contextmanager
def only_what_is_new_is_collected() -> Iterator[None]:
    """
    Within this context the garbage collector does not look through what was there before.

    A [`Tally`] on tensors without memory calls it at each peak, so looking would take longer than all that is counted.
    Around several of them, what stays is looked through once for all.
    """
    frozen_before = gc.get_freeze_count() > 0  # by someone else, who may rely on it
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


class Tally(TorchDispatchMode):
    """
    Counts the bytes of all storages that are made inside and still exist, their largest sum, and operations.

    PyTorch's `FlopCounterMode` would keep tensors alive and run composite operations in parts.

    Args:
        known (`Iterable[torch.Tensor]`): tensors that were there before, whose storages do not count.
        fake (`bool`, *optional*, defaults to `False`): whether tensors are without memory. These are in circles of
            references, unlike real ones, which go when they are done with.

    Attributes:
        now, peak (`int`): bytes that exist, and the most that existed at once.
        flops (`int`): by PyTorch's formulas.
    """

    def __init__(self, known: Iterable[torch.Tensor], fake: bool = False):
        super().__init__()
        self._fake = fake
        self.now = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._collector = only_what_is_new_is_collected() if fake else nullcontext()

    def __enter__(self):
        self._collector.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._collector.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in self._known:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, key)
        if self.now > self.peak:
            if self._fake:
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
        num_frames (`int`, *optional*): of videos.
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
        num_frames: int | None = None,
    ):
        self.flow_model = flow_model
        self.mode = mode
        self.network = network
        self.size = size
        self.guidance_scale = guidance_scale
        self.autocast = autocast
        self.num_frames = num_frames
        self.modules = [network, flow_model.vae, *rewards]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image or video, without its row."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return self.flow_model.latent_shape(*self.size, *frames)

    def forward(self, rows: int) -> Cost:
        """Of one step of a rollout of so many rows."""
        return self._by_blocks(lambda: self._counted(lambda latents: self._velocity(latents), rows, gradient=False))

    def update(self, rows: int) -> Cost:
        """Of the forward and backward of so many rows at one noise level each."""
        return self._by_blocks(
            lambda: self._counted(lambda latents: self._velocity(latents).square().mean().backward(), rows)
        )

    def decode(self, rows: int) -> Cost:
        """Of so many images of clean latents."""
        return self._counted(lambda latents: self.flow_model.decode(latents), rows, gradient=False)

    def align(self, rows: int, score: Callable[[torch.Tensor], torch.Tensor]) -> Cost:
        """Of one pass of SRPO: the network, the VAE and what `score` makes of images, forward and backward."""
        return self._by_blocks(
            lambda: self._counted(
                lambda latents: score(self.flow_model.decode(latents - self._velocity(latents))).sum().backward(), rows
            )
        )

    def score(self, rows: int, score: Callable[[torch.Tensor], torch.Tensor]) -> Cost:
        """Of the scores of so many images."""
        with self.mode:
            frames = () if self.num_frames is None else (self.num_frames,)
            images = torch.empty(rows, *frames, 3, *self.size)
        return self._measured(lambda: score(images), [images], gradient=False)

    def _by_blocks(self, measure: Callable[[], Cost]) -> Cost:
        """
        What a computation costs by what it costs with fewer blocks, since each further one costs the same: of 57 blocks
        of FLUX.1 a few are run.
        """
        lists = list(_lists_of_like_blocks(self.flow_model.denoiser))
        with ExitStack() as stack:
            for blocks in lists:
                stack.enter_context(_shortened(blocks, _FEWEST))
            total = fewest = measure()
        for blocks in lists:
            with ExitStack() as stack:
                for others in lists:
                    stack.enter_context(_shortened(others, _FEWEST + (others is blocks)))
                one_more = measure()
            times = len(blocks) - _FEWEST
            total = Cost(
                total.bytes + times * (one_more.bytes - fewest.bytes),
                total.flops + times * (one_more.flops - fewest.flops),
            )
        return total

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
            latents = torch.empty(rows, *self.latent_shape)
        return self._measured(lambda: compute(latents), [latents], gradient)

    def _measured(self, compute: Callable[[], Any], inputs: list[torch.Tensor], gradient: bool) -> Cost:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        known = [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]
        with self.mode, torch.set_grad_enabled(gradient):
            tally = Tally([*known, *inputs], fake=isinstance(self.mode, FakeTensorMode))
            # Gradients are counted beside the weights: from the second term on they are there before.
            hooks = [
                parameter.register_post_accumulate_grad_hook(lambda parameter: tally.forget(parameter.grad))
                for parameter in trained
            ]
            with tally:
                compute()
            for hook in hooks:
                hook.remove()
        for parameter in trained:
            parameter.grad = None
        return Cost(tally.peak, tally.flops)


def _lists_of_like_blocks(network: nn.Module) -> Iterator[nn.ModuleList]:
    """The longest lists of blocks in a network whose blocks are alike, but for the first and the last."""
    for module in network.children():
        if isinstance(module, nn.ModuleList) and len(module) > _FEWEST + 1:
            shapes = [[(name, tensor.shape) for name, tensor in block.named_parameters()] for block in module[1:-1]]
            if all(each == shapes[0] for each in shapes):
                yield module


@contextmanager
def _shortened(blocks: nn.ModuleList, length: int) -> Iterator[None]:
    """Within this context a list has so many blocks, the first and the last among them."""
    whole = blocks._modules
    kept = [*list(whole.values())[: length - 1], list(whole.values())[-1]]
    blocks._modules = {str(i): block for i, block in enumerate(kept)}
    try:
        yield
    finally:
        blocks._modules = whole
