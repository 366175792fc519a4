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

from trl_diffusion.flow.direct_align import direct_align_pass, interpolate, recover


SHAPE = (3, 5, 2)
BRANCHES = {"denoise": 1, "inversion": -1}
TIGHT = {"rtol": 0, "atol": 1e-12}


def latents(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_interpolation_has_clean_and_noise_at_its_ends():
    clean, noise = latents(0), latents(1)
    assert torch.equal(interpolate(clean, noise, torch.tensor(0.0)), clean)
    assert torch.equal(interpolate(clean, noise, torch.tensor(1.0)), noise)


def test_interpolation_and_recovery_take_a_sigma_for_each_sample():
    clean, noise, velocity = latents(0), latents(1), latents(2)
    sigma_in, sigma_out = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.8, 0.6, 0.3])
    together = recover(interpolate(clean, noise, sigma_in), velocity, noise, sigma_in, sigma_out)
    for row in range(len(clean)):
        one = slice(row, row + 1)
        x = interpolate(clean[one], noise[one], sigma_in[row])
        alone = recover(x, velocity[one], noise[one], sigma_in[row], sigma_out[row])
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("branch", BRANCHES)
@given(sigma=st.floats(0.1, 0.95), delta=st.floats(0.001, 0.05), seed=st.integers(0, 1000))
def test_recovery_has_the_closed_form(branch, sigma, delta, seed):
    clean, noise, velocity = latents(seed), latents(seed + 1), latents(seed + 2)
    recovered = direct_align_pass(
        lambda x, s: velocity, clean, noise, torch.tensor(sigma, dtype=torch.float64), delta, branch
    )
    expected = clean + BRANCHES[branch] * delta / (1 - sigma) * (noise - clean - velocity)
    torch.testing.assert_close(recovered, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("branch", BRANCHES)
@given(sigma=st.floats(0.1, 0.95), delta=st.floats(0.001, 0.05))
def test_right_velocity_recovers_the_image_at_every_noise_level(branch, sigma, delta):
    clean, noise = latents(0), latents(1)
    sigma = torch.tensor(sigma, dtype=torch.float64)
    recovered = direct_align_pass(lambda x, s: noise - clean, clean, noise, sigma, delta, branch)
    torch.testing.assert_close(recovered, clean, rtol=0, atol=1e-12)


def test_inversion_turns_the_gradient_around_and_delta_scales_it():
    clean, noise, direction = latents(0), latents(1), latents(3)
    sigma = torch.tensor([0.7, 0.8, 0.9], dtype=torch.float64)

    def gradient(branch, delta):
        velocity = latents(2).requires_grad_()
        recovered = direct_align_pass(lambda x, s: velocity, clean, noise, sigma, delta, branch)
        (recovered * direction).sum().backward()
        return velocity.grad

    denoise = gradient("denoise", 0.02)
    torch.testing.assert_close(denoise, -0.02 / (1 - sigma).view(-1, 1, 1) * direction, **TIGHT)
    torch.testing.assert_close(gradient("inversion", 0.02), -denoise, **TIGHT)
    torch.testing.assert_close(gradient("denoise", 0.04), 2 * denoise, **TIGHT)


@pytest.mark.parametrize(("branch", "sigma_in"), [("denoise", [0.75, 0.85, 0.55]), ("inversion", [0.65, 0.75, 0.45])])
def test_network_sees_the_noised_image_at_the_sigma_before_the_step(branch, sigma_in):
    clean, noise = latents(0), latents(1)
    sigma_in = torch.tensor(sigma_in, dtype=torch.float64)
    seen = []

    def velocity(x, sigma):
        seen.append((x, sigma))
        return x

    direct_align_pass(velocity, clean, noise, torch.tensor([0.7, 0.8, 0.5], dtype=torch.float64), 0.05, branch)
    [(x, sigma)] = seen
    torch.testing.assert_close(sigma, sigma_in, **TIGHT)
    level = sigma_in.view(-1, 1, 1)
    torch.testing.assert_close(x, level * noise + (1 - level) * clean, **TIGHT)


def test_one_sigma_for_all_reaches_the_network_once_for_each_sample():
    clean, noise = latents(0), latents(1)
    sigmas = []

    def velocity(x, sigma):
        sigmas.append(sigma)
        return x

    direct_align_pass(velocity, clean, noise, torch.tensor(0.7), 0.05, "denoise")
    assert sigmas[0].shape == (len(clean),)


def test_gradient_goes_through_the_velocity_alone():
    clean, noise = latents(0).requires_grad_(), latents(1)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.8, dtype=torch.float64)
    inputs = []

    def velocity(x, s):
        inputs.append(x)
        return weight * x

    direct_align_pass(velocity, clean, noise, sigma, 0.02, "denoise").sum().backward()
    assert clean.grad is None
    torch.testing.assert_close(weight.grad, -0.02 / 0.2 * inputs[0].sum(), rtol=1e-12, atol=0)


def test_half_precision_network_and_double_sigmas_leave_the_latents_in_float32():
    clean, noise = latents(0, torch.float32), latents(1, torch.float32)
    sigma = torch.tensor(0.8, dtype=torch.float64)
    sigmas = []

    def velocity(x, s):
        sigmas.append(s)
        return x.bfloat16()

    assert direct_align_pass(velocity, clean, noise, sigma, 0.02, "denoise").dtype == torch.float32
    assert sigmas[0].dtype == torch.float32
    assert interpolate(clean, noise, sigma).dtype == torch.float32


def test_unknown_branch_is_an_error():
    with pytest.raises(ValueError, match="branch must be 'denoise' or 'inversion', got 'invert'"):
        direct_align_pass(lambda x, s: x, latents(0), latents(1), torch.tensor(0.8), 0.02, "invert")
