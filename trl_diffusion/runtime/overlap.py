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

"""Work that is done beside that of the main thread."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class SideWork:
    """
    Within its context, does what it is given in a thread of its own, and on an accelerator in a stream of its own, one after
    the other, while the caller goes on.

    Args:
        device (`torch.device`): the accelerator that is current in the thread.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # Apple's has one stream.
        self._module = None if device.type in ("cpu", "mps") else torch.get_device_module(device)
        self._stream = None if self._module is None else self._module.Stream(device)
        self._queue: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._futures: list[Future] = []
        self._closed = False

    def __enter__(self) -> "SideWork":
        # A work that hangs does not keep the process from ending.
        threading.Thread(target=self._loop, name="side-work", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True  # what has not begun will not
        self._queue.put(None)

    def submit(self, work: Callable[..., Any], *args: Any) -> None:
        """Do `work(*args)` once what the caller has asked of the accelerator so far is done."""
        ready = None
        if self._module is not None:
            ready = self._module.Event()
            ready.record(self._module.current_stream(self.device))
        self._futures.append(Future())
        self._queue.put((self._futures[-1], ready, work, args))

    def results(self) -> list[Any]:
        """
        What each work has returned, in their order; waits for all.

        Raises:
            What the first work that failed has raised. Those behind it are not begun.
        """
        return [future.result() for future in self._futures]

    def synchronize(self) -> None:
        """Wait for what the work has asked of the accelerator so far. To be called by the work."""
        if self._stream is not None:
            self._stream.synchronize()

    def _loop(self) -> None:
        if self._module is not None:
            self._module.set_device(self.device)
            self._module.set_stream(self._stream)  # of this thread
        while (item := self._queue.get()) is not None:
            future, ready, work, args = item
            if self._closed:
                future.cancel()
                continue
            try:
                if ready is not None:
                    self._stream.wait_event(ready)
                result = work(*args)
                self.synchronize()
                future.set_result(result)
            except BaseException as error:  # handed to the caller's thread, whatever it is
                self._closed = True
                future.set_exception(error)
