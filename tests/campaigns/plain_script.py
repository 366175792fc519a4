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
A script as users write it, started by `exits.py`: everything is global, and nothing takes the process group down.

```bash
accelerate launch --num_processes 2 plain_script.py FOLDER ENDING
```

ENDING is "return", "raise" or "exit".
"""

import sys

from campaigns.tiny_runs import make_trainer


trainer = make_trainer(
    "srpo", sys.argv[1], per_device_train_batch_size=1, max_steps=1, ema_decay=None, save_strategy="no"
)
trainer.train()
trainer.save_model()
if sys.argv[2] == "raise":
    raise LookupError("an error of the script")
if sys.argv[2] == "exit":
    sys.exit(3)
