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

"""The campaigns of long runs and of full width in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from campaigns import full_width, soak


TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", soak.TRAINERS)
def test_a_training_holds_no_more_at_its_end(kind, tmp_path):
    told = soak.train(kind, tmp_path, steps=16, settled=4, every=4, tolerance=50, limit=3)
    assert "files of samples at most 9" in told


def test_the_reward_server_under_32_clients():
    assert "200 requests of 399 images, all scores right" in soak.serve(200, 32, tolerance=50)


def test_two_runs_share_the_cache_of_prompts(tmp_path):
    command = [sys.executable, str(TESTS / "campaigns" / "soak.py"), "cache"]
    command += ["--steps", "8", "--kills", "1"]
    environment = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "1 kills, both runs equal bit for bit to those without a cache" in finished.stdout


@pytest.mark.parametrize(
    ("family", "kind", "size", "dtype"),
    [("flux", "srpo", "32x48", "bfloat16"), ("qwen_image", "chunk_grpo", "48x32", "bfloat16")],
)
def test_a_step_at_full_width_in_small(family, kind, size, dtype):
    assert full_width.check(family, kind, size, dtype, small=True)["update"] > 0


@pytest.mark.parametrize("inference", [False, True])
def test_products_are_accumulated_in_float32_and_rounded(inference):
    """Values and gradients are the float64 ones, rounded to bfloat16 once a product; where no product is, nothing changes."""
    generator = torch.Generator().manual_seed(0)
    latents, weight, kernel = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 4, 16, 16), (16, 16), (4, 4, 3, 3))
    )

    def computed(dtype):
        leaves = [tensor.to(dtype).requires_grad_(not inference) for tensor in (latents, weight, kernel)]
        values, matrix, filters = leaves
        hidden = F.linear(values, matrix)
        found = [
            hidden,
            F.conv2d(values, filters),
            hidden @ matrix,
            F.scaled_dot_product_attention(values, values, values),
        ]
        if inference:
            return found
        sum(part.sum() for part in found).backward()
        return [*found, *(leaf.grad for leaf in leaves)]

    with torch.inference_mode(inference):
        exact = computed(torch.float64)
        with full_width.AccumulateInFloat32():
            narrow = computed(torch.bfloat16)
            assert torch.equal(latents + latents, (latents.float() * 2).bfloat16())
            single = latents.float()
            assert (single @ single.mT).dtype == torch.float32
    for one, other in zip(narrow, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).abs().max() < 2**-6 * other.abs().max()
    # One product alone is rounded once: bit for bit what rounding the exact value gives.
    with full_width.AccumulateInFloat32():
        product = latents @ weight
    assert (product == (latents.double() @ weight.double()).bfloat16()).double().mean() > 0.995


def test_half_of_the_cases_have_each_pair_of_settings():
    chosen = full_width.FAMILIES, full_width.TRAINERS, full_width.SIZES, full_width.DTYPES
    cases = full_width.cases(*chosen, every=False)
    assert len(cases) == 8 and len(full_width.cases(*chosen, every=True)) == 16
    for one in range(4):
        for other in range(one):
            assert len({(case[one], case[other]) for case in cases}) == 4
