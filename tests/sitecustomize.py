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

"""
What the tests' processes need before anything is imported. Python imports this module by its name when it starts, where
this folder is in PYTHONPATH, as `conftest.py` puts it: in the processes of scripts and commands, too, that are started as
users start them.

FSDP2 on CPU processes, which the tests shard on and nobody trains on: accelerate has it for accelerators alone, and trains
with DDP where it is asked for it on a CPU, while PyTorch's runs on gloo as on NCCL.

ZeRO on CPU processes without DeepSpeed's reduction through shared memory, which every new checkout would compile for a minute:
its processes talk by gloo, as DDP's and FSDP2's do, and as where DeepSpeed has no such reduction.

The garbage collector looks through the 800,000 objects that the imports make, and that stay, neither again and again nor
once more at the end of the process: a third of the time of a short one.
"""

import atexit
import gc
import os


gc.set_threshold(100_000, 10, 10)
atexit.register(gc.freeze)

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__

    def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        """What `AcceleratorState` does for processes with accelerators, for those on the CPU as well."""
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialize_with_fsdp

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False
