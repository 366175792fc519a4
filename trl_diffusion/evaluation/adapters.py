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

"""Several LoRAs beside each other in one base model."""

import contextlib
import os
from collections.abc import Iterator, Mapping

from ..hub.conversion import find_adapter, load_adapter
from ..models import FlowModel


class Adapters:
    """
    LoRAs in a base model, of which one at a time is on, and none at first.

    Args:
        flow_model ([`~trl_diffusion.models.FlowModel`]):
            The base model.
        adapters (`Mapping[str, str | os.PathLike]`):
            LoRAs by the name to call them: what [`~trl_diffusion.hub.conversion.find_adapter`] takes.

    Raises:
        `ValueError`: an adapter that is not there, or not of this base model.
    """

    def __init__(self, flow_model: FlowModel, adapters: Mapping[str, str | os.PathLike]):
        files = {name: find_adapter(adapter) for name, adapter in adapters.items()}
        self._denoiser = flow_model.denoiser
        # PEFT makes module names of them, which hold no dots.
        self._names = {name: f"adapter_{index}" for index, name in enumerate(files)}
        for name, file in files.items():
            load_adapter(flow_model.pipeline, file, self._names[name])
        if files:
            self._denoiser.disable_adapters()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Within this context the model is that with the adapter `name`, outside of it the base model."""
        if name not in self._names:
            raise ValueError(f"There is no adapter {name!r}, only {list(self._names)}.")
        self._denoiser.set_adapters(self._names[name])
        self._denoiser.enable_adapters()
        try:
            yield
        finally:
            self._denoiser.disable_adapters()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within this context, and inside of [`use`], the model is the base model: a [`Sampler`]'s `adapter_off`."""
        self._denoiser.disable_adapters()
        try:
            yield
        finally:
            self._denoiser.enable_adapters()
