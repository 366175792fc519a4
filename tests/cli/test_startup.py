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

import json
import subprocess
import sys

import pytest


# What no option needs.
HEAVY = [
    "datasets", "deepspeed", "diffusers", "matplotlib", "peft", "torch._dynamo", "torchao", "transformers.modeling_utils",
    "trl_diffusion.hub", "trl_diffusion.models", "trl_diffusion.shapes", "trl_diffusion.trainer.base_trainer",
]  # fmt: skip
TRAINING = "--model_name_or_path shapes --dataset_name shapes --reward_funcs shapes-judge --output_dir unused"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("command", "status", "light"),
    [
        ("generate --help", 0, True),
        ("evaluate --help", 0, True),
        (f"chunk_grpo {TRAINING} --num_generations 3", 2, False),
        (f"srpo {TRAINING} --num_landings 0", 2, False),
        ("evaluate --model_name_or_path shapes --adapter a --prompts shapes --rewards hpsv9", 2, False),
    ],
)
def test_help_and_mistakes_load_what_they_need(command, status, light):
    code = f"""
import json, sys
from trl_diffusion.cli.main import main
try:
    main({command.split()})
except SystemExit as exit_:
    print("\\n" + json.dumps([exit_.code, sorted(sys.modules)]))
"""
    code, modules = json.loads(run(code).splitlines()[-1])
    assert code == status
    assert set(modules) & {*HEAVY, *(("torch", "transformers") if light else ())} == set()


def test_peft_is_itself_after_the_imports():
    code = """
import sys, gc
from trl_diffusion.cli.startup import quick_imports
with quick_imports():
    from transformers import trainer_utils
    assert "torch" in sys.modules
assert gc.isenabled() and "peft" not in sys.modules
from torch import nn
linear = nn.Sequential(nn.Linear(2, 2))
assert not trainer_utils._is_peft_model(linear)
from peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(linear, LoraConfig(target_modules=["0"]))
assert type(model) is PeftModel
assert trainer_utils._is_peft_model(model) and not trainer_utils._is_peft_model(linear)
assert trainer_utils.unwrap_peft_model(model) is linear
"""
    run(code)


def test_other_names_of_peft_come_from_peft():
    run("""
from trl_diffusion.cli.startup import quick_imports
with quick_imports():
    from peft import LoraConfig
import peft
assert LoraConfig is peft.LoraConfig and peft.__version__
""")


def test_the_collector_rests_while_a_trainer_is_imported():
    code = """
import gc, json
gc.set_threshold(700, 10, 10)
from trl_diffusion import trainer
before = gc.get_stats()[2]["collections"]
trainer.ChunkGRPOTrainer
count = gc.get_stats()[2]["collections"] - before
enabled = gc.isenabled()
gc.disable()
trainer.SRPOTrainer
print(json.dumps([count, enabled, gc.isenabled()]))
"""
    count, enabled, afterwards = json.loads(run(code).splitlines()[-1])
    # One may come of what was made, once it is over.
    assert count <= 1 and enabled and not afterwards


def test_nothing_is_collected_at_the_end_of_a_command():
    code = """
import atexit, gc
atexit.register(lambda: print(len(gc.get_objects())))
from trl_diffusion.cli.main import main
main(["env"])
"""
    assert int(run(code).splitlines()[-1]) < 1000
