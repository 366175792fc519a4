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
A run on two processes, sharded or not, in which the second breaks in a given way, started by
`test_reliability.py`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from campaigns.tiny_runs import Warmth, make_trainer


class Faulty(Warmth):
    """
    At the steps given for it the reward of the second process is NaN ("nan"), has an infinite gradient ("gradient"),
    raises ("raise") or ends its process ("die"), and from the step given for it on that of all processes takes its time
    ("slow").
    """

    def __init__(self, faults):
        super().__init__()
        self.faults = faults
        self.trainer = None

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        if self.trainer is None:
            return scores
        step = self.trainer.state.global_step
        if step >= self.faults.get("slow", step + 1):
            (Path(self.trainer.args.output_dir) / "slow").touch()
            time.sleep(0.1)
        if self.trainer.args.process_index == 1:
            if step == self.faults.get("nan") and images.requires_grad:
                return scores + torch.nan  # whose gradient is finite
            if step == self.faults.get("gradient") and images.requires_grad:
                return (scores - scores).sqrt()
            if step == self.faults.get("raise"):
                raise ConnectionError("the reward is out of order")
            if step == self.faults.get("die"):
                sys.stderr.write("The second process dies now.\n")
                os.kill(os.getpid(), signal.SIGKILL)
        return scores


def main(kind: str, output: str, faults: dict[str, int], settings: dict) -> None:
    reward = Faulty(faults)
    trainer = make_trainer(kind, output, reward=reward, per_device_train_batch_size=1, **settings)
    reward.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
