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

from trl_diffusion.flow import (
    Trajectory,
    common_velocities,
    log_prob,
    relative_change,
    rollout,
    shifted_schedule,
    step,
    transition_coefficients,
    transition_mean,
)


STEPS = 6
SHAPE = (3, 4, 2)


def velocity(latents, sigma, i):
    """Nonlinear in the latents, and different at each sigma and transition."""
    return torch.sin(latents + i) * (1 + sigma.view(-1, 1, 1))


class CountedNoise:
    def __init__(self, seed=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = []

    def __call__(self):
        self.drawn.append(torch.randn(SHAPE, generator=self.generator, dtype=torch.float64))
        return self.drawn[-1]


def run(kind, keep=(), steps=STEPS, **kwargs):
    sigmas = shifted_schedule(steps)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw_noise = CountedNoise()
    coefficients = transition_coefficients(sigmas, kind, **kwargs)
    trajectory = rollout(velocity, noise, sigmas, coefficients, draw_noise, keep)
    return trajectory, draw_noise, noise, sigmas, coefficients


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_rollout_equals_a_hand_written_loop(kind):
    trajectory, draw_noise, x, sigmas, table = run(kind, keep=range(STEPS))
    path = [x]
    for i in range(STEPS):
        v = velocity(x, sigmas[i].expand(len(x)), i)
        mean = table.latents_scale[i] * x + table.velocity_scale[i] * v
        last = i == STEPS - 1
        x = mean if last else mean + table.std[i] * draw_noise.drawn[i]
        if last:
            assert trajectory.log_probs[:, i].isnan().all()
        else:
            expected = torch.distributions.Normal(mean, table.std[i]).log_prob(x).mean((1, 2))
            torch.testing.assert_close(trajectory.log_probs[:, i], expected, rtol=0, atol=1e-12)
        change = (x - path[-1]).abs().mean((1, 2)) / path[-1].abs().mean((1, 2))
        torch.testing.assert_close(trajectory.relative_changes[:, i], change, rtol=1e-7, atol=0)
        path.append(x)
    torch.testing.assert_close(trajectory.clean, x, rtol=0, atol=1e-12)
    assert sorted(trajectory.states) == list(range(STEPS + 1))
    for i, latents in enumerate(path):
        torch.testing.assert_close(trajectory.states[i], latents, rtol=0, atol=1e-12)
    assert trajectory.log_probs.shape == trajectory.relative_changes.shape == (len(x), STEPS)


@pytest.mark.parametrize(
    ("keep", "states"),
    [
        ([], []),
        ([0], [0, 1]),
        ([1, 4], [1, 2, 4, 5]),
        ([4, 1, 2], [1, 2, 3, 4, 5]),
        ({STEPS - 1}, [STEPS - 1, STEPS]),
    ],
)
def test_only_the_states_of_kept_transitions_are_kept(keep, states):
    everything = run("flow", keep=range(STEPS))[0]
    trajectory = run("flow", keep=keep)[0]
    assert sorted(trajectory.states) == states
    for i in states:
        assert torch.equal(trajectory.states[i], everything.states[i])
    assert torch.equal(trajectory.clean, everything.clean)


@pytest.mark.parametrize(("stochastic", "count"), [(None, 1), ([3, 4], 4), ([STEPS - 1], STEPS), ([], STEPS)])
def test_velocities_in_common_are_those_of_an_euler_path_to_the_first_noise(stochastic, count):
    sigmas = shifted_schedule(STEPS)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    table = transition_coefficients(sigmas, "flow", stochastic=stochastic)
    velocities = common_velocities(velocity, noise, sigmas, table)
    euler = rollout(velocity, noise, sigmas, transition_coefficients(sigmas, None), keep=range(STEPS))
    assert len(velocities) == count
    for i, ours in enumerate(velocities):
        assert torch.equal(ours, velocity(euler.states[i], sigmas[i].expand(len(noise)), i))


def test_forgetting_states_afterwards_equals_not_keeping_them():
    trajectory = run("flow", keep=[0, 1, 2, 4])[0]
    before = trajectory.states
    trajectory.keep([1, 4])
    assert sorted(trajectory.states) == [1, 2, 4, 5]
    assert all(trajectory.states[i] is before[i] for i in trajectory.states)


def test_noise_is_drawn_once_for_each_stochastic_transition():
    _, draw_noise, *_ = run("dance")
    assert len(draw_noise.drawn) == STEPS - 1
    _, draw_noise, *_ = run("dance", eta=0.0)
    assert len(draw_noise.drawn) == 0
    _, draw_noise, *_ = run(None)
    assert len(draw_noise.drawn) == 0


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_eta_zero_gives_the_path_of_the_euler_solver(kind):
    euler, without_noise = run(None, keep=range(STEPS))[0], run(kind, keep=range(STEPS), eta=0.0)[0]
    for i in range(STEPS + 1):
        torch.testing.assert_close(without_noise.states[i], euler.states[i], rtol=0, atol=1e-12)
    assert without_noise.log_probs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_log_probs_recomputed_in_one_batch_of_kept_states_are_those_of_the_rollout_bit_for_bit(kind, dtype):
    sigmas = shifted_schedule(STEPS)
    table = transition_coefficients(sigmas, kind)
    noise = torch.randn(SHAPE, dtype=dtype)
    trajectory = rollout(velocity, noise, sigmas, table, lambda: torch.randn(SHAPE, dtype=dtype), keep=[1, 2, 3])
    steps = torch.tensor([1, 2, 3])
    latents = torch.cat([trajectory.states[i] for i in (1, 2, 3)])
    next_latents = torch.cat([trajectory.states[i] for i in (2, 3, 4)])
    v = torch.cat([velocity(trajectory.states[i], sigmas.to(dtype)[i].expand(3), i) for i in (1, 2, 3)])
    rows = table.to(noise.device, dtype).rows(steps.repeat_interleave(3), noise.ndim)
    recomputed = log_prob(next_latents, transition_mean(latents, v, rows), rows.std)
    assert recomputed.dtype == dtype
    assert torch.equal(recomputed.view(3, 3).T, trajectory.log_probs[:, 1:4])


def test_network_sees_the_exact_sigma_of_each_transition_and_no_gradient_is_kept():
    seen = []
    weight = torch.tensor(0.5, requires_grad=True)

    def recorded(latents, sigma, i):
        seen.append((i, sigma))
        return weight * latents

    sigmas = shifted_schedule(STEPS)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    trajectory = rollout(recorded, noise, sigmas, transition_coefficients(sigmas, None), keep=[0])
    assert [i for i, _ in seen] == list(range(STEPS))
    for i, sigma in seen:
        assert torch.equal(sigma, sigmas[i].expand(SHAPE[0]))
    assert not trajectory.clean.requires_grad


def test_rollout_in_float32_stays_in_float32_with_a_half_precision_network():
    sigmas = shifted_schedule(STEPS)
    trajectory = rollout(
        lambda latents, sigma, i: latents.bfloat16(),
        torch.randn(SHAPE),
        sigmas,
        transition_coefficients(sigmas, "flow"),
        lambda: torch.randn(SHAPE),
        keep=[2],
    )
    for tensor in (trajectory.clean, *trajectory.states.values(), trajectory.log_probs, trajectory.relative_changes):
        assert tensor.dtype == torch.float32


def test_initial_noise_is_left_as_it_was():
    noise = torch.randn(SHAPE, dtype=torch.float64)
    before = noise.clone()
    sigmas = shifted_schedule(STEPS)
    rollout(velocity, noise, sigmas, transition_coefficients(sigmas, "flow"), CountedNoise(), keep=[0])
    assert torch.equal(noise, before)


def test_joined_trajectories_are_the_rollout_of_the_joined_batch():
    sigmas = shifted_schedule(STEPS)
    table = transition_coefficients(sigmas, "flow")
    noise = torch.randn(5, 4, 2, dtype=torch.float64)
    drawn = torch.randn(STEPS, 5, 4, 2, dtype=torch.float64)

    def part(rows):
        source = iter(drawn)
        return rollout(velocity, noise[rows], sigmas, table, lambda: next(source)[rows], keep=[1, 3])

    joined, whole = Trajectory.cat([part(slice(0, 2)), part(slice(2, 5))]), part(slice(0, 5))
    assert torch.equal(joined.clean, whole.clean)
    assert sorted(joined.states) == sorted(whole.states) == [1, 2, 3, 4]
    assert all(torch.equal(joined.states[i], whole.states[i]) for i in whole.states)
    torch.testing.assert_close(joined.log_probs, whole.log_probs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(joined.relative_changes, whole.relative_changes)


def test_stochastic_transitions_without_noise_source_are_an_error():
    sigmas = shifted_schedule(STEPS)
    with pytest.raises(ValueError, match="5 of the 6 transitions are stochastic, but draw_noise is None"):
        rollout(velocity, torch.randn(SHAPE), sigmas, transition_coefficients(sigmas, "flow"))


def test_step_and_rollout_share_the_relative_change():
    trajectory, draw_noise, noise, sigmas, table = run("flow", keep=[0])
    v = velocity(noise, sigmas[0].expand(len(noise)), 0)
    after, _ = step(noise, v, table.rows(torch.tensor([0]), noise.ndim), draw_noise.drawn[0])
    assert torch.equal(trajectory.relative_changes[:, 0], relative_change(noise, after))
