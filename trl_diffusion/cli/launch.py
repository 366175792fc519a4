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

"""`--accelerate_config`: a training command on several processes, as TRL's command line does it."""

import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .errors import USER_ERROR_STATUS, OneLineErrors
from .parser import CommandParser, check_yaml


def config_path(name: str) -> Path:
    """
    The file of an accelerate configuration.

    Args:
        name (`str`):
            A path, or the name of one of the package's: "multi_gpu", "zero1", "zero2", "zero3" or "fsdp2".

    Raises:
        `ValueError`: if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("trl_diffusion"))) / "accelerate_configs"
    names = {path.stem: path for path in folder.glob("*.yaml")}
    if name not in names:
        raise ValueError(
            f"accelerate_config is {name!r}, which is neither a file nor one of {', '.join(map(repr, sorted(names)))}."
        )
    return names[name]


def launch(command: str, parser: CommandParser, arguments: Sequence[str]) -> int | None:
    """
    Start a training command with `accelerate launch`, if its arguments say so.

    Arguments that the training does not know go to `accelerate launch`, as `--num_processes 4`.

    Args:
        command (`str`):
            "chunk_grpo" or "srpo".
        parser ([`CommandParser`]):
            Parser of the training's arguments.
        arguments (`Sequence[str]`):
            Arguments of the command.

    Returns:
        `int`: exit status; `None` if there is no `--accelerate_config`, and nothing was started.
    """
    outer = OneLineErrors(prog=parser.prog, add_help=False, allow_abbrev=False)
    outer.add_argument("--accelerate_config")
    outer.add_argument("--config")
    ours, rest = outer.parse_known_args(arguments)
    if ours.accelerate_config is None or "--help" in rest or "-h" in rest:
        return None
    with parser.user_errors():
        config_file = config_path(ours.accelerate_config)
        if ours.config is not None:
            check_yaml(ours.config)
    # What is required may stand in the file; the processes check that.
    for action in parser._actions:
        action.required = False
    _, for_accelerate = parser.parse_known_args(rest)
    training = _without(rest, for_accelerate)
    if ours.config is not None:
        training = ["--config", ours.config, *training]

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch_parser = launch_command_parser()
    launch_parser.error = parser.error
    try:
        launch_command(
            launch_parser.parse_args(
                [
                    "--config_file",
                    str(config_file),
                    *for_accelerate,
                    "--module",
                    "trl_diffusion.cli",
                    command,
                    *training,
                ]
            )
        )
    except ChildFailedError as error:  # of several processes
        status = error.get_first_failure()[1].exitcode
        if status != USER_ERROR_STATUS:
            raise
        return status  # the processes have told why
    except subprocess.CalledProcessError as error:  # of one
        if error.returncode != USER_ERROR_STATUS:
            raise
        return error.returncode
    return 0


def _without(items: list[str], subsequence: list[str]) -> list[str]:
    """The items that remain when those of an ordered subsequence are taken out."""
    remaining = iter(subsequence)
    expected = next(remaining, None)
    kept = []
    for item in items:
        if item == expected:
            expected = next(remaining, None)
        else:
            kept.append(item)
    return kept
