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

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.flow import (
    DEFAULT_ETA,
    log_prob,
    shifted_schedule,
    step,
    transition_coefficients,
    transition_mean,
)


KINDS = ["flow", "dance", "cps"]
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def states(batch_size=3, dtype=torch.float64):
    return torch.randn(batch_size, 5, 2, dtype=dtype), torch.randn(batch_size, 5, 2, dtype=dtype)


def transition(x, v, sigmas, i, kind, eta):
    """(mean, std) of transition i by the package."""
    coefficients = transition_coefficients(sigmas, kind, eta).rows(torch.tensor([i]), x.ndim)
    return transition_mean(x, v, coefficients), coefficients.std.item()


@pytest.mark.parametrize("kind", KINDS)
@given(num_steps=st.integers(1, 40), shift=st.floats(0.3, 6))
def test_eta_zero_is_euler(kind, num_steps, shift):
    sigmas = shifted_schedule(num_steps, shift)
    table = transition_coefficients(sigmas, kind, 0.0)
    torch.testing.assert_close(table.latents_scale, torch.ones(num_steps, dtype=torch.float64), **ROUNDING)
    torch.testing.assert_close(table.velocity_scale, sigmas.diff(), **ROUNDING)
    assert (table.std == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_some_transitions_are_stochastic(kind):
    sigmas = shifted_schedule(7)
    euler, noisy = transition_coefficients(sigmas, None), transition_coefficients(sigmas, kind)
    mixed = transition_coefficients(sigmas, kind, stochastic=[1, 2, 6])
    for i in range(7):
        # The last one is Euler's whatever is asked for.
        expected = noisy if i in (1, 2) else euler
        assert all(torch.equal(ours[i], table[i]) for ours, table in zip(mixed, expected, strict=True)), i
    assert ((mixed.std > 0).nonzero().flatten()).tolist() == [1, 2]


def test_no_kind_is_euler():
    sigmas = shifted_schedule(7)
    x, v = states()
    for i in range(7):
        mean, std = transition(x, v, sigmas, i, None, None)
        torch.testing.assert_close(mean, x + (sigmas[i + 1] - sigmas[i]) * v, **ROUNDING)
        assert std == 0


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_equals_its_released_form(eta):
    # With the std of the whole step's noise rate, and the clamp of the first denominator, as released.
    sigmas = shifted_schedule(17)
    x, v = states()
    for i in range(16):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        rate = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * eta
        mean = x * (1 + rate**2 / (2 * sigma) * dt) + v * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
        ours, std = transition(x, v, sigmas, i, "flow", eta)
        torch.testing.assert_close(ours, mean, **ROUNDING)
        assert std == pytest.approx(float(rate * torch.sqrt(-dt)), rel=1e-12)


@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
def test_dance_equals_its_released_form(eta):
    # Released with the score in the drift: Euler, minus half of eta squared times the score.
    sigmas = shifted_schedule(17)
    x, v = states()
    for i in range(16):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        x0_hat = x - sigma * v
        score = -(x - x0_hat * (1 - sigma)) / sigma**2
        mean = x + dt * v - 0.5 * eta**2 * score * dt
        ours, std = transition(x, v, sigmas, i, "dance", eta)
        torch.testing.assert_close(ours, mean, **ROUNDING)
        assert std == pytest.approx(eta * math.sqrt(-float(dt)), rel=1e-12)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
def test_cps_equals_its_definition(eta):
    sigmas = shifted_schedule(17)
    x, v = states()
    for i in range(16):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        std = sigma_next * math.sin(eta * math.pi / 2)
        x0_hat, noise_hat = x - sigma * v, x + (1 - sigma) * v
        mean = x0_hat * (1 - sigma_next) + noise_hat * torch.sqrt(sigma_next**2 - std**2)
        ours, our_std = transition(x, v, sigmas, i, "cps", eta)
        # The root of a difference of equal squares has half the digits.
        torch.testing.assert_close(ours, mean, rtol=0, atol=1e-7)
        assert our_std == pytest.approx(float(std), rel=1e-12)


def test_flow_at_sigma_one_takes_the_second_sigma_in_the_denominator():
    # By hand: sigmas (1, 0.75, 0), eta 0.7: g^2 = 0.49 / (1 - 0.75) = 1.96, dt = -0.25, so the factor of x is
    # 1 - 1.96 * 0.25 / 2 = 0.755, that of v is dt since 1 - s = 0, and std = 1.4 * 0.5 = 0.7.
    table = transition_coefficients(torch.tensor([1.0, 0.75, 0.0]), "flow", 0.7)
    assert table.latents_scale[0].item() == pytest.approx(0.755, abs=1e-15)
    assert table.velocity_scale[0].item() == pytest.approx(-0.25, abs=1e-15)
    assert table.std[0].item() == pytest.approx(0.7, abs=1e-15)


@pytest.mark.parametrize("first", [1 - 2**-24, 1 + 2**-23])
def test_flow_takes_a_first_sigma_that_misses_one_by_rounding_as_one(first):
    rounded = transition_coefficients(torch.tensor([first, 0.75, 0.0]), "flow", 0.7)
    exact = transition_coefficients(torch.tensor([1.0, 0.75, 0.0]), "flow", 0.7)
    for ours, expected in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_flow_below_one_takes_its_own_sigma():
    # By hand: sigmas (0.75, 0.5, 0), eta 1: g^2 = 0.75 / 0.25 = 3, dt = -0.25: x 1 - 0.75 / 1.5 = 0.5,
    # v (1 + 3 * 0.25 / 1.5) * -0.25 = -0.375, std sqrt(0.75).
    table = transition_coefficients(torch.tensor([0.75, 0.5, 0.0]), "flow", 1.0)
    assert table.latents_scale[0].item() == pytest.approx(0.5, abs=1e-15)
    assert table.velocity_scale[0].item() == pytest.approx(-0.375, abs=1e-15)
    assert table.std[0].item() == pytest.approx(math.sqrt(0.75), abs=1e-15)


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_last_transition_is_the_predicted_clean_image_without_noise(kind, num_steps):
    sigmas = shifted_schedule(num_steps)
    x, v = states()
    mean, std = transition(x, v, sigmas, num_steps - 1, kind, None)
    torch.testing.assert_close(mean, x - sigmas[-2] * v, rtol=0, atol=0)
    assert std == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_transition_is_stochastic(kind):
    assert (transition_coefficients(shifted_schedule(17), kind).std[:-1] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_default_eta_is_the_papers(kind):
    assert {"flow": 0.7, "dance": 0.3, "cps": 0.8} == DEFAULT_ETA
    sigmas = shifted_schedule(17)
    for ours, given_eta in zip(
        transition_coefficients(sigmas, kind), transition_coefficients(sigmas, kind, DEFAULT_ETA[kind]), strict=True
    ):
        assert torch.equal(ours, given_eta)


def variance_errors(kind, data_std, sigmas, eta=None):
    """
    Relative errors of the latents' variance after each step, in closed form.

    For data N(0, c^2) the exact velocity is linear, E[e - x0 | x] = x (s - (1-s) c^2) / var(s) with
    var(s) = (1-s)^2 c^2 + s^2, so a step maps a variance P to (a + b k)^2 P + std^2.
    """
    variance = (1 - sigmas) ** 2 * data_std**2 + sigmas**2
    slope = (sigmas - (1 - sigmas) * data_std**2) / variance
    table = transition_coefficients(sigmas, kind, eta)
    current, errors = variance[0], []
    for i in range(len(sigmas) - 1):
        gain = table.latents_scale[i] + table.velocity_scale[i] * slope[i]
        current = gain**2 * current + table.std[i] ** 2
        errors.append((current / variance[i + 1] - 1).abs().item())
    return errors


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", [None, "dance"])
def test_exact_velocity_keeps_the_marginal_variance_with_an_error_of_order_one_over_steps(kind, data_std):
    errors = [max(variance_errors(kind, data_std, shifted_schedule(num_steps))) for num_steps in (200, 400, 800)]
    assert errors[0] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_keeps_the_marginal_variance_where_its_noise_is_finite(eta, data_std):
    # Its noise rate diverges at sigma 1, so the schedule begins below.
    errors = [
        max(variance_errors("flow", data_std, 0.9 * shifted_schedule(num_steps), eta))
        for num_steps in (400, 800, 1600)
    ]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_flow_forgets_the_error_of_its_clamped_first_step(data_std):
    # At sigma 1 the step is eta^2 of noise however many steps there are: variance (1 - eta^2/2)^2 + eta^2, 6 % too
    # much before the velocity's part. What is left of it in the image vanishes as T grows.
    errors = [variance_errors("flow", data_std, shifted_schedule(num_steps)) for num_steps in (50, 400, 3200)]
    assert all(0.05 < steps[0] < 0.11 for steps in errors)
    assert errors[0][-1] < 0.07
    assert errors[1][-1] < 0.015
    assert errors[2][-1] < 0.004


def test_flow_first_step_adds_a_fixed_variance():
    # Towards many steps the velocity's part vanishes and (1 - 0.245)^2 + 0.49 = 1.060025 remains.
    table = transition_coefficients(shifted_schedule(1_000_000), "flow", 0.7)
    assert (table.latents_scale[0] ** 2 + table.std[0] ** 2).item() == pytest.approx(1.060025, abs=1e-5)


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("num_steps", [2, 5, 17])
def test_cps_keeps_both_coefficients_of_the_marginal_exactly(num_steps, eta):
    # Of the latents (1-s) x0 + s e, with the velocity e - x0, a step makes (1-s') x0 + s' e' with e' again standard
    # normal: the factor of x0 is 1 - s', and that of e and the new noise add up to s' in quadrature.
    sigmas = shifted_schedule(num_steps)
    table = transition_coefficients(sigmas, "cps", eta)
    clean = table.latents_scale * (1 - sigmas[:-1]) - table.velocity_scale
    noise = table.latents_scale * sigmas[:-1] + table.velocity_scale
    torch.testing.assert_close(clean, 1 - sigmas[1:], **ROUNDING)
    torch.testing.assert_close(noise**2 + table.std**2, sigmas[1:] ** 2, **ROUNDING)


@given(std=st.floats(0.01, 3.0), shape=st.sampled_from([(1, 1), (3, 4), (2, 5, 3), (2, 3, 2, 2)]))
def test_log_prob_is_the_mean_of_the_normal_distributions(std, shape):
    mean = torch.randn(shape, dtype=torch.float64)
    next_latents = mean + std * torch.randn(shape, dtype=torch.float64)
    std = torch.tensor(std, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(next_latents).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(next_latents, mean, std), expected, **ROUNDING)


def test_log_prob_has_no_gradient_through_the_next_latents():
    mean = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    next_latents = mean * 3 + 1  # would carry a gradient of its own
    log_prob(next_latents, mean, torch.tensor(0.5)).sum().backward()
    # d/dmean of -(x - mean)^2 / (2 std^2) / D = (1 - 0) / 0.25 / 4 = 1.
    torch.testing.assert_close(mean.grad, torch.ones_like(mean), **ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_transitions_step_as_each_alone(kind):
    sigmas = shifted_schedule(9)
    x, v = states(batch_size=4)
    z = torch.randn_like(x)
    index = torch.tensor([5, 0, 7, 2])
    table = transition_coefficients(sigmas, kind)
    together, log_probs = step(x, v, table.rows(index, x.ndim), z)
    for row, i in enumerate(index):
        one = slice(row, row + 1)
        alone, log_prob_alone = step(x[one], v[one], table.rows(i.view(1), x.ndim), z[one])
        assert torch.equal(together[one], alone)
        assert torch.equal(log_probs[one], log_prob_alone)


def test_step_adds_scaled_noise_and_reports_its_log_prob():
    x, v = states()
    z = torch.randn_like(x)
    coefficients = transition_coefficients(shifted_schedule(9), "dance").rows(torch.tensor([3]), x.ndim)
    next_latents, log_probs = step(x, v, coefficients, z)
    mean = transition_mean(x, v, coefficients)
    torch.testing.assert_close((next_latents - mean) / coefficients.std, z, rtol=0, atol=1e-12)
    # Of its own noise z: -z^2 / 2 - log std - log sqrt(2 pi).
    expected = -(z**2).mean((1, 2)) / 2 - math.log(coefficients.std) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)


def test_step_without_noise_is_the_mean():
    x, v = states()
    coefficients = transition_coefficients(shifted_schedule(9), "dance").rows(torch.tensor([3]), x.ndim)
    next_latents, log_probs = step(x, v, coefficients, None)
    assert torch.equal(next_latents, transition_mean(x, v, coefficients))
    assert log_probs is None


def test_step_takes_a_half_precision_velocity_in_the_precision_of_the_latents():
    x, _ = states(dtype=torch.float32)
    v = torch.randn(x.shape, dtype=torch.bfloat16)
    z = torch.randn_like(x)
    table = transition_coefficients(shifted_schedule(9), "flow").to(x.device, x.dtype)
    coefficients = table.rows(torch.tensor([3]), x.ndim)
    next_latents, log_probs = step(x, v, coefficients, z)
    expected, expected_log_probs = step(x, v.float(), coefficients, z)
    assert next_latents.dtype == log_probs.dtype == torch.float32
    assert torch.equal(next_latents, expected)
    assert torch.equal(log_probs, expected_log_probs)


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.0], [0.0, 1.0]])
def test_schedule_that_does_not_decrease_is_an_error(sigmas):
    with pytest.raises(ValueError, match="sigmas must decrease strictly, got"):
        transition_coefficients(torch.tensor(sigmas), "flow")


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="sde_type must be one of .* got 'euler'"):
        transition_coefficients(shifted_schedule(4), "euler")


@pytest.mark.parametrize(("kind", "eta"), [("flow", -0.1), ("dance", -1.0), ("cps", -0.1), ("cps", 1.1)])
def test_eta_out_of_range_is_an_error(kind, eta):
    with pytest.raises(ValueError, match=f"eta must .*got {eta}"):
        transition_coefficients(shifted_schedule(4), kind, eta)
