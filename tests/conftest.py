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

"""Every test runs offline, in temporary caches, with few threads and fixed seeds."""

import gc
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path


# Read when the Hugging Face libraries are imported, so set before any of them is.
_CACHE = tempfile.mkdtemp(prefix="trl_diffusion_tests_")
os.environ.update(
    HF_HOME=os.path.join(_CACHE, "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_CACHE=os.path.join(_CACHE, "datasets"),
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=os.path.join(_CACHE, "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
)
# Processes that tests start import this checkout, and `sitecustomize.py` when they start.
_TESTS = Path(__file__).parent
_PATHS = [str(_TESTS), str(_TESTS.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(_PATHS))

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


# The models are tiny: more threads cost more than they give, and disturb the processes of distributed tests.
torch.set_num_threads(1)

# The same examples in every run, no time limit on a slow machine, and nothing left in the folder.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def collector_looks_at_what_is_new():
    """
    A trainer that lets its text encoders go has the garbage collected, which looks through the 800,000 objects that the
    imports made and that stay: a quarter of a second each time, up to half of a file's. What a module of tests leaves is
    still looked through, once.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def modules_of_a_test_are_forgotten(tmp_path_factory):
    """So that a module which a test writes and imports is not that of another test of the same name."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if str(vars(sys.modules[name]).get("__file__")).startswith(folder):
            del sys.modules[name]
