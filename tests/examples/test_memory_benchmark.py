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

"""The formula of docs/memory.md against what one process, and one of two, really holds."""

import sys

import pytest
import torch

from examples.benchmarks import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [32, None])
def test_one_process(rank, dtype):
    size = memory.SIZES[0]
    found = memory.measure(size, rank, images=2, dtype=dtype, checkpointing=True)
    expected = memory.formula(size, rank, images=2, dtype=dtype)
    for name in ("parameters", "gradients", "optimizer"):
        assert found[name] == expected[name]
    if rank is not None and dtype == torch.float32:
        assert found["activations"] == pytest.approx(expected["activations"], rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc what is allocated")
@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
def test_two_processes(config):
    if config == "zero2":
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    size = next(size for size in memory.SIZES if size.name == "small")
    found, expected = memory.measure_sharded(config, size, None, torch.float32)
    assert found["parameters"] == expected["parameters"]
    # Step counters; and in ZeRO, gradients of weights that lie on both processes are whole.
    assert found["optimizer"] == pytest.approx(expected["optimizer"], rel=1e-4)
    assert found["gradients"] == pytest.approx(expected["gradients"], rel=0.06 if config == "zero2" else 1e-4)
    # All that the process has allocated: images, embeddings and the like of the tiny run are within 5 %.
    for moment in ("step", "terms"):
        assert expected[moment] < found[moment] < 1.05 * expected[moment]
