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
`trl-diffusion plan`: whether a run will fit, how long it will take and what it will cost, before it is started.

```bash
trl-diffusion plan chunk_grpo --config run.yaml --memory 24GB
trl-diffusion plan srpo --config run.yaml --accelerate_config zero2 --num_processes 8 --memory 80GB --tflops 990 --price 2.5
```

It reads configurations only and needs no accelerator. Exit status 0 where the run fits, or no memory was given; 3 where it
does not.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..trainer import ChunkGRPOConfig, DiffusionConfig, OnlineConfig, SRPOConfig
from . import training
from .errors import OneLineErrors
from .launch import config_path


if TYPE_CHECKING:
    from ..planning.plan import Plan


DOES_NOT_FIT_STATUS = 3
METHODS = {"chunk_grpo": (ChunkGRPOConfig, "Chunk-GRPO"), "srpo": (SRPOConfig, "SRPO")}
_UNITS = {"GB": 2**30, "GIB": 2**30, "MB": 2**20, "MIB": 2**20, "": 2**30}


def memory_size(text: str) -> int:
    """Bytes of "24GB", "24" or "80 GiB": GB is taken for GiB, as makers of accelerators do."""
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a memory. Write it as 24GB.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0.")
    return value


def make_parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="trl-diffusion plan",
        usage="trl-diffusion plan {chunk_grpo,srpo} [--memory 24GB] [--tflops 400] [--price 2.5] [--json FILE] --config FILE.yaml "
        "[options of the training]",
        description="Say from configurations alone whether a run fits, how long it takes and what it costs.",
        allow_abbrev=False,
    )
    parser.add_argument("method", choices=list(METHODS), help="what is trained with")
    parser.add_argument("--memory", type=memory_size, help="of one accelerator, as 24GB")
    parser.add_argument(
        "--tflops", type=_above_0, help="its speed in the dtype of the training, in 10^12 operations a second"
    )
    parser.add_argument(
        "--utilisation",
        type=_above_0,
        default=0.4,
        help="share of that speed that the training reaches (default: 0.4)",
    )
    parser.add_argument("--price", type=_above_0, help="of one accelerator an hour")
    parser.add_argument("--json", help="file for all the numbers; '-' prints them instead of the table")
    parser.add_argument("--accelerate_config", help="as of the training: a name of the package's, or a file")
    parser.add_argument(
        "--num_processes", type=int, help="how many accelerators; those of the configuration by default"
    )
    return parser


def planned(config_class: type[DiffusionConfig], processes: int) -> type[DiffusionConfig]:
    """The class of a configuration that is resolved as on so many processes, on a machine that has none of them."""

    def resolve_batches(self, world_size: int) -> None:
        config_class._resolve_batches(self, processes)

    attributes = {"__doc__": config_class.__doc__, "world_size": property(lambda self: processes)}
    if issubclass(config_class, OnlineConfig):
        attributes["_resolve_batches"] = resolve_batches
    return type(config_class.__name__, (config_class,), attributes)


def sharding_of(name: str) -> tuple[str, int]:
    """How a configuration of accelerate shards, as [`~trl_diffusion.planning.plan.SHARDINGS`] has it, and on how many."""
    config = yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
    kind = str(config.get("distributed_type", "NO"))
    processes = int(config.get("num_processes", 1))
    if kind == "DEEPSPEED":
        stage = int(config.get("deepspeed_config", {}).get("zero_stage", 2))
        return (f"zero{stage}" if stage else "multi_gpu"), processes
    if kind == "FSDP":
        return "fsdp2", processes
    return ("multi_gpu" if processes > 1 else "none"), processes


def main(arguments: Sequence[str]) -> int:
    parser = make_parser()
    ours, rest = parser.parse_known_args(arguments)
    with parser.user_errors():
        sharding, processes = "none", 1
        if ours.accelerate_config is not None:
            sharding, processes = sharding_of(ours.accelerate_config)
        processes = processes if ours.num_processes is None else ours.num_processes
        if processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {processes}.")
        sharding = "multi_gpu" if sharding == "none" and processes > 1 else sharding
        config_class, method = METHODS[ours.method]
        training_parser = training.make_parser(planned(config_class, processes), ours.method, method)
        # As on an accelerator: this machine need not have one.
        training_parser.set_defaults(bf16=True, use_cpu=True)
        script_args, args = training_parser.parse_args_and_config(rest)

        from peft import LoraConfig

        from ..planning.configurations import read_configurations
        from ..planning.plan import Planner
        from ..trainer.network import DEFAULT_LORA

        rewards = [*script_args.reward_funcs, *(script_args.watch_reward_funcs or ())]
        configurations = read_configurations(script_args.model_name_or_path)
        peft_config = script_args.peft_config()
        if peft_config is None:
            peft_config = LoraConfig(**DEFAULT_LORA)
        planner = Planner(configurations, args, rewards, peft_config, sharding, processes)
        plan = planner.plan(ours.memory, ours.tflops, ours.utilisation, ours.price)
    numbers = json.dumps(plan.as_dict(), indent=2)
    if ours.json == "-":
        print(numbers)
    else:
        print(as_text(plan))
        if ours.json is not None:
            Path(ours.json).write_text(numbers + "\n", encoding="utf-8")
    sys.stdout.flush()
    return DOES_NOT_FIT_STATUS if plan.fits is False else 0


def as_text(plan: "Plan") -> str:
    """The plan as tables."""
    parts = list(dict.fromkeys(part for values in plan.phases.values() for part in values))
    lines = [f"The model is known from {plan.model}.", "", "Memory of one accelerator, GiB"]
    width = max(map(len, [*parts, "sum"]))
    lines.append(" " * width + "".join(f"{phase:>10}" for phase in plan.phases))
    rows = [(part, [values.get(part, 0) for values in plan.phases.values()]) for part in parts]
    rows.append(("sum", [sum(values.values()) for values in plan.phases.values()]))
    lines += [f"{name:{width}}" + "".join(f"{value / 2**30:10.2f}" for value in values) for name, values in rows]
    lines += ["", plan.summary]
    if plan.remedies:
        lines += ["", "What would lower it, each with those above it:"]
        lines += [f"  {remedy.settings}: {remedy.peak / 2**30:.1f} GiB ({remedy.cost})" for remedy in plan.remedies]
        if plan.remedies[-1].peak > plan.usable_memory:
            lines.append("  Even these are not enough.")
    lines += ["", "Work of an optimizer step, 10^12 operations"]
    lines += [f"  {name}: {value / 1e12:,.1f}" for name, value in plan.work.items() if value > 0]
    if plan.hours is not None:
        price = "" if plan.price is None else f", price {plan.price:,.2f}"
        lines += ["", f"The run: {plan.hours:,.1f} hours{price}"]
    for title, values in (("Disk", plan.disk), ("Memory of a process's host", plan.host)):
        lines += ["", f"{title}, GiB", *(f"  {name}: {value / 2**30:.2f}" for name, value in values.items())]
    return "\n".join([*lines, "", "Assumed", *(f"  {line}" for line in plan.assumptions)])
