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

"""Modules that a training uses and does not train: on the accelerator, or there only while they are used."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


class FrozenModules:
    """
    Puts modules where they are used.

    Args:
        modules (`Iterable[nn.Module]`): the modules, moved to the accelerator for good unless `offload`.
        device (`torch.device`): the accelerator.
        offload (`bool`, *optional*, defaults to `False`): whether to keep them on the CPU while they are not used.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, offload: bool = False):
        self.device = device
        self.offload = offload
        if not offload:
            for module in modules:
                module.to(device)

    @contextlib.contextmanager
    def on_accelerator(self, *modules: Any) -> Iterator[None]:
        """Within this context these of the modules can be used; what is no module, as a function, needs nothing."""
        moved = [module for module in modules if isinstance(module, nn.Module)] if self.offload else []
        for module in moved:
            module.to(self.device)
        try:
            yield
        finally:
            for module in moved:
                module.to("cpu")
