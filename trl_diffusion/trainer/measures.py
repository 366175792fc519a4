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

"""Numbers that the trainers log beside the loss."""

import contextlib
import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor


class RunningMetrics:
    """
    Means and maxima of scalars that stay on their device until they are logged: a loss term waits for no other process
    and not for the device, and a log for both once. NaN is left out, and logged where there is nothing else.

    Every process must add the same names in the same order.
    """

    def __init__(self):
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # names -> (2, N): the sums and the counts
        self._maxima: dict[str, torch.Tensor] = {}

    def add(
        self,
        means: Mapping[str, torch.Tensor],
        maxima: Mapping[str, torch.Tensor] | None = None,
        weight: float = 1.0,
    ) -> None:
        """
        Args:
            means (`Mapping[str, torch.Tensor]`): scalars that are averaged, over calls and processes.
            maxima (`Mapping[str, torch.Tensor]`, *optional*): scalars of which the largest is kept.
            weight (`float`, *optional*, defaults to `1.0`): of this call in the means.
        """
        values = torch.stack([value.detach().float() for value in means.values()])
        sums = weight * torch.stack([values.nan_to_num(0.0, torch.inf, -torch.inf), (~values.isnan()).float()])
        names = tuple(means)
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        for name, value in (maxima or {}).items():
            value = value.detach().float()
            self._maxima[name] = torch.fmax(self._maxima[name], value) if name in self._maxima else value

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all processes; every process must call this."""
        if not self._sums:
            return {}
        names = [name for group in self._sums for name in group]
        maxima = list(self._maxima)
        sums = torch.cat(list(self._sums.values()), 1)
        gathered = accelerator.gather(
            torch.cat([sums.flatten(), *(self._maxima[name][None] for name in maxima)])[None]
        )
        total, largest = gathered[:, : sums.numel()].sum(0), gathered[:, sums.numel() :]
        total, count = total.view(2, -1)
        values = [total / count]
        if maxima:
            values.append(functools.reduce(torch.fmax, largest))
        self._sums, self._maxima = {}, {}
        return dict(zip(names + maxima, torch.cat(values).tolist(), strict=True))


class Speed:
    """
    Seconds of each phase, images a second and memory between two logs.

    Args:
        device (`torch.device`): the accelerator, whose work is waited for at the end of a phase.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.images = 0  # made by this process since the last log
        self._seconds: dict[str, float] = defaultdict(float)
        self._last = 0, time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str, synchronize: Callable[[], None] | None = None) -> Iterator[None]:
        """Count the seconds within this context to a phase; `synchronize` waits for the work, by default all there is."""
        start = time.perf_counter()
        yield
        if synchronize is not None:
            synchronize()
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        self._seconds[name] += time.perf_counter() - start

    def take(self, step: int, num_processes: int) -> dict[str, float]:
        """Since the last call: `time/{phase}` an optimizer step, `images_per_second` of all processes, and memory."""
        last_step, since = self._last
        now = time.perf_counter()
        steps = max(1, step - last_step)
        logs = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
        logs["images_per_second"] = self.images * num_processes / (now - since)
        if self.device.type == "cpu":
            used = psutil.Process().memory_info().rss
        else:
            used = torch.get_device_module(self.device).max_memory_allocated()
        logs["memory/peak_gib"] = used / 2**30
        self._seconds.clear()
        self.images = 0
        self._last = step, now
        return logs


def lora_update_norm(network: nn.Module, adapter_name: str = "default") -> float | None:
    r"""
    Frobenius norm of what a LoRA adds to the weights of its layers, all of them together:
    $\sqrt{\sum_l \lVert s_l B_l A_l \rVert_F^2}$ with the scale $s = \alpha / r$. 0 at the start, where B is 0.

    $\lVert BA \rVert_F^2 = \operatorname{tr}\big((B^\top B)(A A^\top)\big)$ needs matrices of r x r alone.

    Args:
        network (`nn.Module`):
            With the LoRA; parameters may be sharded by FSDP2, then every process must call this. Those of ZeRO-3 must be
            gathered.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter.

    Returns:
        `float`, or `None` where there is no such adapter.
    """
    squares = []
    for layer in network.modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        weights = [matrices[adapter_name].weight.detach() for matrices in (layer.lora_A, layer.lora_B)]
        # A is (r, in) and B (out, r), with the kernel's sides behind where the layer is a convolution.
        a, b = ((w.full_tensor() if isinstance(w, DTensor) else w).flatten(1).float() for w in weights)
        squares.append(layer.scaling[adapter_name] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
    if not squares:
        return None
    return torch.stack(squares).sum().clamp(min=0).sqrt().item()


def picture_digests(images: torch.Tensor) -> torch.Tensor:
    """
    One number for each image, the same for those that are the same picture of 8 bits a channel.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`): in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, int64, on the device of the images.
    """
    # One after the other: videos are large.
    pictures = ((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy() for image in images)
    digests = [hashlib.blake2b(picture.tobytes(), digest_size=8).digest() for picture in pictures]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=images.device)


def duplicate_share(digests: torch.Tensor) -> torch.Tensor:
    """
    Share of the images that are equal to another one of their group: 0 where all differ, 1 where each has its like.

    Args:
        digests (`torch.Tensor` of shape `(groups, G)`): from [`picture_digests`].

    Returns:
        `torch.Tensor`, a scalar, float32.
    """
    equal = digests[:, :, None] == digests[:, None, :]
    return (equal.sum(2) > 1).float().mean()


def mean_of_known(values: list[float]) -> float:
    """The mean of what is not NaN; NaN where all is, as in a step whose loss is not finite."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
