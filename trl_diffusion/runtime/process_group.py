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

"""The process group is taken down when the interpreter exits."""

import atexit
import functools
import os
import time

import torch.distributed
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Seconds in which the threads of gloo let go of what their last collectives held.
GRACE = 0.1


@functools.cache
def destroy_process_group_at_exit() -> None:
    """
    Let the interpreter destroy the default process group, whoever makes it and when, before it exits: at the end of a
    script, at `sys.exit` and after an exception. The exit status stays.

    Without it a process may abort after all is done, with "terminate called without an active exception": a thread of gloo
    that still holds a tensor of the last collective needs the interpreter to free it, and is ended when there is none.
    https://github.com/pytorch/pytorch/issues/190489
    """
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if not torch.distributed.is_available():
        return
    there_is_one = torch.distributed.is_initialized()
    if there_is_one:
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError as error:
            # After an error the communicator may be broken; what ended the script has been said.
            logger.warning(f"The process group could not be taken down: {error}")
    # That ends the threads only where nothing else holds the group, which DDP and DeepSpeed do, also of a group that the
    # script has destroyed itself. Sleeping releases the interpreter to those that wait for it.
    if there_is_one or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(GRACE)
