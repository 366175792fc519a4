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

"""Golden numbers, computed once with the released arithmetic of the papers."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The folder of the golden numbers; the environment variable `TRL_DIFFUSION_FIXTURES` names another one."""
    default = Path(__file__).parents[1] / "fixtures"
    return Path(os.environ.get("TRL_DIFFUSION_FIXTURES", default))
