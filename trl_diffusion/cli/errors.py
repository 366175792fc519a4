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

"""How commands tell what is wrong with what they were given: one line, and exit status 2."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import yaml


USER_ERROR_STATUS = 2  # as argparse's

# Set, to see where an error that is told in one line was raised.
TRACEBACK_VARIABLE = "TRL_DIFFUSION_TRACEBACK"

# What wrong settings, files, names and answers of the Hub are told by; all else is a fault of the program.
USER_ERRORS = (ImportError, OSError, TypeError, ValueError, yaml.YAMLError)

# Seconds for which the other processes of a run leave it to the first to tell an error that all of them meet.
OTHERS_WAIT = 10


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage: `trl-diffusion COMMAND: error: ...`."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")) > 0:
            # The launcher ends all when one has ended, which must not be before the first process has told why.
            time.sleep(OTHERS_WAIT)
        self.exit(USER_ERROR_STATUS, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def user_errors(self) -> Iterator["SetUp"]:
        """
        Tell the errors of [`USER_ERRORS`] that are raised inside, until the set-up is over, as those of the command line.
        """
        set_up = SetUp()
        try:
            yield set_up
        except USER_ERRORS as error:
            if set_up.over or os.environ.get(TRACEBACK_VARIABLE):
                raise
            if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
                self.error(f"{error.filename}: {error.strerror}")  # without its number
            self.error(str(error) or type(error).__name__)


@dataclass
class SetUp:
    """
    What a command does before its work: it reads its arguments, and loads and checks what they name.

    Args:
        over (`bool`): from there on, errors keep their traceback.
    """

    over: bool = False
