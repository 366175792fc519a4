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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.flow import shifted_schedule


@given(num_steps=st.integers(1, 60), shift=st.floats(0.1, 10))
def test_schedule_falls_strictly_from_one_to_zero(num_steps, shift):
    sigmas = shifted_schedule(num_steps, shift)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_schedule_is_the_papers():
    expected = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(
        shifted_schedule(4, 3.0), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15
    )


@given(num_steps=st.integers(1, 60))
def test_shift_one_leaves_the_times_uniform(num_steps):
    expected = torch.tensor([1 - i / num_steps for i in range(num_steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(shifted_schedule(num_steps, 1.0), expected, rtol=0, atol=1e-15)


def test_shift_multiplies_the_odds_of_noise():
    # sigma / (1 - sigma) = shift * t / (1 - t), an equivalent form of the definition.
    uniform, shifted = shifted_schedule(17, 1.0)[1:-1], shifted_schedule(17, 3.0)[1:-1]
    torch.testing.assert_close(shifted / (1 - shifted), 3 * uniform / (1 - uniform), rtol=1e-13, atol=0)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_too_few_steps_are_an_error(num_steps):
    with pytest.raises(ValueError, match=f"num_inference_steps must be at least 1, got {num_steps}"):
        shifted_schedule(num_steps)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift):
    with pytest.raises(ValueError, match=f"shift must be above 0, got {shift}"):
        shifted_schedule(4, shift)
