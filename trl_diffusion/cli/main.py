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

"""The entry point of the command line: it finds the command and hands the remaining arguments to it."""

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from .errors import OneLineErrors
from .startup import quick_imports
from .threads import allowed_cores, set_thread_defaults, usable_cores


# Command -> what it does. Each is a module of this package with `main(arguments) -> exit status`, imported when it is
# called. Its imports are what its options and their checks need; `main` loads the libraries behind it, which takes
# seconds, once the options are right.
COMMANDS = {
    "chunk_grpo": "train a text-to-image model with Chunk-GRPO",
    "demo": "align a small built-in FLUX on this machine and show what changed",
    "env": "print versions and devices, for reports of bugs",
    "evaluate": "compare adapters with their base model: scores, win rates and a page of images",
    "export": "write an adapter for another program, as ComfyUI",
    "generate": "draw images with a model, its adapter, or a hybrid of both",
    "merge": "fold an adapter into a whole pipeline",
    "plan": "say whether a run will fit, how long it takes and what it costs, without an accelerator",
    "reward-server": "serve a reward over HTTP",
    "srpo": "train a text-to-image model with SRPO",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `trl-diffusion`.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Command line without the program's name. `None` takes `sys.argv`.

    Returns:
        `int`: exit status, 0 for success.
    """
    width = max(map(len, COMMANDS))
    parser = OneLineErrors(
        prog="trl-diffusion",
        usage="trl-diffusion {" + ",".join(COMMANDS) + "} ...",
        description="Reinforcement learning for flow-matching text-to-image models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\n'trl-diffusion COMMAND --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.error(f"give a command: {', '.join(COMMANDS)}.")
    parsed = parser.parse_args(arguments)

    # Rewards may be of a module in the current folder, which `python -m` looks into and an installed script does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # The processes of a launch share the cores, and their launcher gives each one thread.
    launches = any(argument.partition("=")[0] == "--accelerate_config" for argument in parsed.arguments)
    set_thread_defaults(os.environ, allowed_cores() if launches else usable_cores(), allowed_cores())
    # Python would look once more through all objects before it ends, which takes seconds and frees what ends anyway.
    atexit.register(gc.freeze)
    with quick_imports():
        command = importlib.import_module(f".{parsed.command.replace('-', '_')}", __package__)
    return command.main(parsed.arguments)


if __name__ == "__main__":
    sys.exit(main())
