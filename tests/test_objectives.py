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

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_diffusion.flow import log_prob
from trl_diffusion.flow.direct_align import direct_align_pass
from trl_diffusion.objectives import (
    aggregate_advantages,
    chunk_ratio,
    clipped_surrogate,
    discount_at,
    group_advantages,
    guarded_log_probs,
    masked_surrogate,
    preference_loss,
    preference_weights,
    relative_preference,
    transition_kl,
)


TIGHT = {"rtol": 0, "atol": 1e-12}
NAN = float("nan")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# Group-relative advantages


def numpy_advantages(rewards, num_generations, scale, clip):
    """Group by group, from the definition; None does not apply."""
    applicable = [reward for reward in rewards if reward is not None]
    batch_std = np.std(applicable, ddof=1) if len(applicable) > 1 else 0.0
    advantages, stds = [], []
    for start in range(0, len(rewards), num_generations):
        group = rewards[start : start + num_generations]
        present = [reward for reward in group if reward is not None]
        mean = np.mean(present) if present else 0.0
        std = np.std(present, ddof=1) if len(present) > 1 and len(set(present)) > 1 else 0.0
        stds.append(std)
        divisor = {"group": std + 1e-8, "batch": batch_std + 1e-8, "none": 1.0}[scale]
        for reward in group:
            same = reward is None or len(set(present)) == 1
            advantages.append(0.0 if same else float(np.clip((reward - mean) / divisor, -clip, clip)))
    return advantages, stds


@st.composite
def grouped_rewards(draw):
    num_generations, num_groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    # Few distinct values, so that groups of equal rewards occur; thirds, so that means round.
    reward = st.one_of(st.none(), st.integers(-4, 4).map(lambda n: n / 3), st.just(100.0))
    size = num_generations * num_groups
    return draw(st.lists(reward, min_size=size, max_size=size)), num_generations


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(case=grouped_rewards())
def test_advantages_equal_the_definition_in_numpy(scale, case):
    rewards, num_generations = case
    tensor = double([NAN if reward is None else reward for reward in rewards])
    advantages, std = group_advantages(tensor, num_generations, scale, advantage_clip=5.0)
    expected, expected_std = numpy_advantages(rewards, num_generations, scale, clip=5.0)
    torch.testing.assert_close(advantages, double(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, double(expected_std), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(value=st.floats(-1e3, 1e3, width=32), num_generations=st.integers(2, 12))
def test_equal_rewards_give_an_advantage_of_exactly_zero(scale, dtype, value, num_generations):
    rewards = torch.cat([torch.full((num_generations,), value, dtype=dtype), torch.arange(num_generations)])
    advantages, std = group_advantages(rewards, num_generations, scale)
    assert (advantages[:num_generations] == 0).all()
    assert (advantages[num_generations:] != 0).any()
    assert std[0] == 0


def test_rewards_that_do_not_apply_leave_the_statistics():
    advantages, std = group_advantages(double([1.0, NAN, 3.0, NAN, NAN, NAN, 5.0, NAN, NAN]), 3)
    half = math.sqrt(0.5)
    torch.testing.assert_close(advantages, double([-half, 0, half, 0, 0, 0, 0, 0, 0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(std, double([math.sqrt(2), 0, 0]), **TIGHT)


def test_equal_rewards_with_missing_ones_give_exactly_zero():
    advantages, std = group_advantages(double([0.1, NAN, 0.1, 0.1]), 4)
    assert (advantages == 0).all()
    assert std[0] == 0


def test_a_batch_without_any_reward_has_no_advantage():
    for scale in ("group", "batch", "none"):
        advantages, std = group_advantages(double([NAN] * 4), 2, scale)
        assert (advantages == 0).all()
        assert (std == 0).all()


def test_advantages_are_clamped_on_both_sides():
    rewards = double([100.0] + [0.0] * 30 + [0.0] * 30 + [-100.0])
    unclipped, _ = group_advantages(rewards, 31, advantage_clip=None)
    assert unclipped[0] > 5.3
    assert unclipped[-1] < -5.3
    clipped, _ = group_advantages(rewards, 31, advantage_clip=5.0)
    assert clipped[0] == 5
    assert clipped[-1] == -5
    assert torch.equal(clipped[1:-1], unclipped[1:-1])


def test_unknown_scaling_is_an_error():
    with pytest.raises(ValueError, match="scale_rewards must be 'group', 'batch' or 'none', got 'std'"):
        group_advantages(double([1.0, 2.0]), 2, "std")


REWARDS = [[0.0, 10.0], [1.0, NAN], [4.0, -20.0], [NAN, NAN], [2.0, 2.0], [2.0, 3.0], [2.0, 5.0], [NAN, 7.0]]


def test_sum_then_normalize_is_the_advantage_of_the_weighted_sum():
    advantages, total, std = aggregate_advantages(double(REWARDS), double([1.0, 0.5]), 4)
    sums = [5.0, 1.0, -6.0, None, 3.0, 3.5, 4.5, 3.5]
    expected, expected_std = numpy_advantages(sums, 4, "group", clip=5.0)
    torch.testing.assert_close(total, double([NAN if value is None else value for value in sums]), equal_nan=True)
    torch.testing.assert_close(advantages, double(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, double(expected_std), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_normalize_then_sum_is_the_weighted_sum_of_the_advantages(scale):
    advantages, total, _ = aggregate_advantages(
        double(REWARDS), double([1.0, 0.5]), 4, "normalize_then_sum", scale, advantage_clip=2.0
    )
    columns = [[None if math.isnan(row[i]) else row[i] for row in REWARDS] for i in range(2)]
    first, second = (numpy_advantages(column, 4, scale, clip=math.inf)[0] for column in columns)
    # The clamp comes last, on the sum.
    expected = [float(np.clip(a + 0.5 * b, -2, 2)) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(advantages, double(expected), rtol=1e-9, atol=1e-9)
    assert total[3].isnan()
    assert not total.isnan()[[0, 1, 2, 4, 5, 6, 7]].any()


def test_normalize_then_sum_does_not_let_a_large_reward_drown_a_small_one():
    # The small reward orders the pair one way, the large one the other way.
    rewards = double([[1.0, 0.0], [0.0, 100.0]])
    weights = double([2.0, 1.0])
    summed = aggregate_advantages(rewards, weights, 2, "sum_then_normalize")[0]
    normalized = aggregate_advantages(rewards, weights, 2, "normalize_then_sum")[0]
    assert summed[1] > summed[0]
    assert normalized[0] > normalized[1]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_one_reward_is_the_plain_advantage_whatever_the_aggregation(aggregation):
    rewards = double([1.0, 2.0, 4.0, NAN, 0.0, 0.0, 0.0, 0.0])
    expected, expected_std = group_advantages(rewards, 4)
    advantages, _, std = aggregate_advantages(rewards.unsqueeze(1), double([1.0]), 4, aggregation)
    assert torch.equal(advantages, expected)
    assert torch.equal(std, expected_std)


def test_unknown_aggregation_is_an_error():
    with pytest.raises(ValueError, match="multi_objective_aggregation must be .* got 'sum'"):
        aggregate_advantages(double([[1.0], [2.0]]), double([1.0]), 2, "sum")


# The clipped chunk surrogate


EPSILON, EPSILON_HIGH = 0.05, 0.08


def chunk_loss(new, old, advantages):
    return clipped_surrogate(chunk_ratio(new, old), advantages, EPSILON, EPSILON_HIGH).mean()


def test_chunk_ratio_is_the_geometric_mean_of_the_step_ratios():
    new, old = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    step_ratios = np.exp(new.numpy()) / np.exp(old.numpy())
    expected = np.prod(step_ratios, axis=1) ** (1 / 4)
    torch.testing.assert_close(chunk_ratio(new, old), torch.from_numpy(expected), rtol=1e-12, atol=0)


@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9))
def test_on_policy_ratio_is_exactly_one(values):
    log_probs = torch.tensor([values])
    assert chunk_ratio(log_probs, log_probs.clone()).item() == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.16),  # good and already likelier: held at 1.08
        (0.9, 2.0, -1.8),
        (0.9, -2.0, 1.9),  # bad and already less likely: held at 0.95
        (1.1, -2.0, 2.2),
        (1.1, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss):
    ours = clipped_surrogate(double([ratio]), double([advantage]), EPSILON, EPSILON_HIGH)
    assert ours.item() == pytest.approx(loss, abs=1e-12)


# Ratios away from the bounds, where the loss is smooth, on every side of them.
OFFSETS = double([-0.2, -0.02, 0.0, 0.03, 0.2])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunk_gradient_equals_finite_differences(chunk_size, sign):
    old = torch.randn(5, chunk_size, dtype=torch.float64)
    new = old + OFFSETS[:, None] + torch.linspace(-0.01, 0.01, chunk_size, dtype=torch.float64)
    new = new - (new - old - OFFSETS[:, None]).mean(1, keepdim=True)
    advantages = sign * double([1.5, 0.3, 2.0, 0.7, 1.0])
    leaf = new.clone().requires_grad_()
    chunk_loss(leaf, old, advantages).backward()
    step = 1e-6
    for row in range(5):
        for column in range(chunk_size):
            moved = torch.zeros_like(new)
            moved[row, column] = step
            difference = chunk_loss(new + moved, old, advantages) - chunk_loss(new - moved, old, advantages)
            assert leaf.grad[row, column].item() == pytest.approx(difference.item() / (2 * step), abs=1e-8)
    clipped = (leaf.grad == 0).all(1).tolist()
    assert clipped == [sign < 0, False, False, False, sign > 0]


BOUNDS = [1 - EPSILON, 1 + EPSILON_HIGH]


def clipped_derivative(ratio, advantages):
    """Of the clipped loss by a chunk's mean log-probability, as PPO has it: a ratio exactly at a bound is not clipped."""
    clipped = ((advantages > 0) & (ratio > 1 + EPSILON_HIGH)) | ((advantages < 0) & (ratio < 1 - EPSILON))
    return torch.where(clipped, 0.0, -advantages * ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize(
    "ratio", [0.5, 0.9499, BOUNDS[0], 0.9501, 1.0, 1.0799, BOUNDS[1], 1.0801, 3.0], ids=lambda ratio: f"{ratio:.4f}"
)
def test_derivative_of_the_clipped_loss(ratio, advantage, dtype):
    ratio, advantages = torch.tensor([ratio], dtype=dtype), torch.tensor([advantage], dtype=dtype)
    # d ratio / d mean log-probability = ratio; the leaf is the ratio itself, so that it sits exactly on the bounds.
    leaf = ratio.clone().requires_grad_()
    clipped_surrogate(leaf, advantages, EPSILON, EPSILON_HIGH).sum().backward()
    expected = clipped_derivative(ratio, advantages)
    torch.testing.assert_close(leaf.grad * ratio, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


# Other trust regions


def moved_transitions(steps=3, drift=0.3):
    """Transitions of an old policy with the noise that it drew, and the means of a policy that has moved."""
    generator = torch.Generator().manual_seed(0)
    noise, old_mean, shift = torch.randn(3, 5, steps, 40, generator=generator, dtype=torch.float64)
    std = torch.linspace(0.5, 0.1, steps, dtype=torch.float64)[:, None]
    return noise, old_mean, old_mean + drift * shift, std


def guarded_ratio(noise, old_mean, mean, std):
    """Log-ratio (B, steps) of GRPO-Guard, and the plain one, from the library's own log-probabilities."""
    following = old_mean + std * noise
    new, old = (
        log_prob(following.flatten(0, 1), m.flatten(0, 1), std.repeat(5, 1)).view(5, -1) for m in (mean, old_mean)
    )
    divergence = transition_kl(mean.flatten(0, 1), old_mean.flatten(0, 1), std.repeat(5, 1)).view(5, -1)
    guarded = guarded_log_probs(new, old, divergence, std[:, 0])
    return guarded[0] - guarded[1], new - old, divergence


def test_guarded_log_ratio_is_linear_in_the_move_of_the_mean():
    """For x = mu_old + std z it is mean((mu - mu_old) z), and its gradient mean(z d mu)."""
    noise, old_mean, mean, std = moved_transitions()
    mean.requires_grad_()
    guarded, _, _ = guarded_ratio(noise, old_mean, mean, std)
    torch.testing.assert_close(guarded, ((mean - old_mean) * noise).mean(2), **TIGHT)
    guarded.sum().backward()
    torch.testing.assert_close(mean.grad, noise / 40, **TIGHT)


def test_guarded_log_ratio_has_the_mean_zero_whatever_the_drift():
    noise, old_mean, mean, std = moved_transitions(drift=3.0)
    one, other = (guarded_ratio(sign * noise, old_mean, mean, std) for sign in (1, -1))
    torch.testing.assert_close((one[0] + other[0]) / 2, torch.zeros_like(one[0]), rtol=0, atol=1e-10)
    # The plain one has the mean of minus the divergence.
    torch.testing.assert_close((one[1] + other[1]) / 2, -one[2], rtol=1e-10, atol=0)
    assert one[2].min() > 1


def test_guarded_ratio_of_a_policy_that_has_not_moved_is_one_with_the_gradient_of_the_plain_one_times_std():
    noise, old_mean, _, std = moved_transitions()
    mean = old_mean.clone().requires_grad_()
    guarded, plain, divergence = guarded_ratio(noise, old_mean, mean, std)
    assert (guarded == 0).all() and (divergence == 0).all()
    gradients = [torch.autograd.grad(ratio.sum(), mean, retain_graph=True)[0] for ratio in (guarded, plain)]
    torch.testing.assert_close(gradients[0], gradients[1] * std, **TIGHT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "divergence", "loss"),
    [
        (1.1, 2.0, 2e-5, 0.0),  # good, already likelier, and too far
        (1.1, 2.0, 1e-5, -2.2),  # as far as it may go
        (0.9, 2.0, 2e-5, -1.8),  # good and less likely: it goes back
        (0.9, -2.0, 2e-5, 0.0),
        (0.9, -2.0, 0.0, 1.8),
        (1.1, -2.0, 2e-5, 2.2),
        (1.0, 2.0, 2e-5, -2.0),  # neither on nor back
        (1.0, -2.0, 2e-5, 2.0),
        (1.1, 0.0, 2e-5, 0.0),
    ],
)
def test_masked_surrogate_by_hand(ratio, advantage, divergence, loss):
    leaf = double([ratio]).requires_grad_()
    ours = masked_surrogate(leaf, double([advantage]), double([divergence]), 1e-5)
    assert ours.item() == pytest.approx(loss, abs=1e-12)
    ours.backward()
    assert leaf.grad.item() == pytest.approx(0 if loss == 0 else -advantage, abs=1e-12)


def test_masked_surrogate_with_an_infinite_threshold_is_the_unclipped_one():
    ratio = double([0.1, 0.9, 1.0, 1.2, 7.0]).requires_grad_()
    advantages = double([1.0, -2.0, 3.0, -1.0, 0.5])
    ours = masked_surrogate(ratio, advantages, double([1.0] * 5), math.inf)
    assert torch.equal(ours, -advantages * ratio)
    assert torch.equal(torch.autograd.grad(ours.sum(), ratio)[0], -advantages)
    assert torch.equal(ours, clipped_surrogate(ratio, advantages, math.inf, math.inf))


def policy(parameters, states):
    """Log-probabilities (B, steps) of a small nonlinear policy."""
    return -torch.tanh(states @ parameters).square()


@pytest.mark.parametrize("chunk_sizes", [[6], [2, 4], [1, 2, 3]])
def test_streamed_gradient_equals_joint_gradient(chunk_sizes):
    torch.manual_seed(3)
    states = torch.randn(16, 6, 8, dtype=torch.float64)
    start = torch.randn(8, dtype=torch.float64)
    old = policy(start, states).detach()
    advantages = torch.randn(16, dtype=torch.float64)

    joint = (start + 0.1).requires_grad_()
    ends = np.cumsum(chunk_sizes).tolist()
    chunks = [list(range(end - size, end)) for size, end in zip(chunk_sizes, ends, strict=True)]
    for chunk in chunks:
        chunk_loss(policy(joint, states)[:, chunk], old[:, chunk], advantages).backward()

    streamed = (start + 0.1).requires_grad_()
    clipped = 0
    for chunk in chunks:
        with torch.no_grad():
            ratio = chunk_ratio(policy(streamed, states)[:, chunk], old[:, chunk])
        weight = clipped_derivative(ratio, advantages)
        clipped += int((weight == 0).sum())
        for i in chunk:
            (weight * policy(streamed, states[:, i])).mean().div(len(chunk)).backward()

    assert 0 < clipped < 16 * len(chunks)  # both cases take part
    torch.testing.assert_close(streamed.grad, joint.grad, **TIGHT)


def test_on_policy_chunk_gradient_is_the_step_gradient_weighted_by_one_over_the_chunk_size():
    chunk_sizes = [2, 3, 4, 7]
    log_probs = torch.randn(5, 16, dtype=torch.float64)
    advantages = torch.randn(5, dtype=torch.float64)

    by_chunk = log_probs.clone().requires_grad_()
    for chunk in by_chunk.split(chunk_sizes, dim=1):
        chunk_loss(chunk, chunk.detach(), advantages).backward(retain_graph=True)

    by_step = log_probs.clone().requires_grad_()
    size_of_step = [size for size in chunk_sizes for _ in range(size)]
    for i, size in enumerate(size_of_step):
        ratio = (by_step[:, i] - by_step[:, i].detach()).exp()
        (clipped_surrogate(ratio, advantages, EPSILON, EPSILON_HIGH).mean() / size).backward()

    torch.testing.assert_close(by_chunk.grad, by_step.grad, **TIGHT)
    expected = -advantages[:, None] / 5 / double(size_of_step)
    torch.testing.assert_close(by_chunk.grad, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_of_one_step_are_the_step_level_loss_and_gradient_bit_for_bit(dtype):
    old = torch.randn(7, 16, dtype=dtype)
    new = old + 0.1 * torch.randn(7, 16, dtype=dtype)
    advantages = torch.randn(7, dtype=dtype)

    by_chunk = new.clone().requires_grad_()
    chunks = zip(by_chunk.split([1] * 16, 1), old.split([1] * 16, 1), strict=True)
    chunk_loss_sum = sum(chunk_loss(chunk, before, advantages) for chunk, before in chunks)
    chunk_loss_sum.backward()

    by_step = new.clone().requires_grad_()
    step_loss_sum = 0
    for i in range(16):
        ratio = torch.exp(by_step[:, i] - old[:, i])
        unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
        step_loss_sum = step_loss_sum + torch.max(unclipped, clipped).mean()
    step_loss_sum.backward()

    assert chunk_loss_sum.item() == step_loss_sum.item()
    assert torch.equal(by_chunk.grad, by_step.grad)


def test_transition_kl_is_that_of_two_normal_distributions():
    mean, reference = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    std = double([0.3, 1.0, 2.5]).view(3, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).mean((1, 2))
    torch.testing.assert_close(transition_kl(mean, reference, std), expected, rtol=1e-12, atol=0)


# Semantic relative preference


RANGE = (0.75, 0.964)
FORMS = ["relative", "difference", "absolute", "interpolated"]


def test_discount_is_linear_between_the_ends_of_the_range():
    sigma = double([0.75, 0.857, 0.964, 0.75 + 0.214 / 4])
    expected = double([0.10, 0.175, 0.25, 0.1375])
    torch.testing.assert_close(discount_at(sigma, RANGE, (0.10, 0.25)), expected, **TIGHT)
    falling = double([0.30, 0.155, 0.01, 0.2275])
    torch.testing.assert_close(discount_at(sigma, RANGE, (0.30, 0.01)), falling, **TIGHT)


@pytest.mark.parametrize("sigma_range", [(0.9, 0.9), (0.9, 0.8)])
def test_discount_range_that_does_not_ascend_is_an_error(sigma_range):
    with pytest.raises(ValueError, match="sigma_range must ascend from the clean to the noisy end, got"):
        discount_at(double(0.9), sigma_range, (0.1, 0.2))


@pytest.mark.parametrize(
    ("preference", "branch", "expected"),
    [
        # Scores 0.5 (positive) and 0.2 (negative), k = 0.1.
        ("relative", "denoise", 1.1 * 0.5 - 0.2),
        ("relative", "inversion", 1.1 * 0.2 - 0.5),
        ("difference", "denoise", 0.5 - 0.2),
        ("difference", "inversion", 0.2 - 0.5),
        ("absolute", "denoise", 0.5),
        ("absolute", "inversion", -0.5),
        ("interpolated", "denoise", 0.9 * 0.2 + 0.1 * 0.5),
        ("interpolated", "inversion", -(0.9 * 0.2 + 0.1 * 0.5)),
    ],
)
def test_preference_by_hand(preference, branch, expected):
    ours = relative_preference(double([0.5]), double([0.2]), double([0.1]), branch, preference)
    assert ours.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
@pytest.mark.parametrize("preference", FORMS)
def test_combined_text_features_score_as_two_calls_do(preference, branch):
    image, positive, negative = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    discount = torch.rand(4, dtype=torch.float64)
    two_calls = relative_preference((image * positive).sum(1), (image * negative).sum(1), discount, branch, preference)
    positive_weight, negative_weight = preference_weights(discount, branch, preference)
    text = positive_weight[:, None] * positive + negative_weight[:, None] * negative
    torch.testing.assert_close((image * text).sum(1), two_calls, **TIGHT)


def test_absolute_preference_needs_no_negative_scores_and_the_others_do():
    scores, discount = double([0.5]), double([0.1])
    assert relative_preference(scores, None, discount, "denoise", "absolute").item() == 0.5
    for preference in ("relative", "difference", "interpolated"):
        with pytest.raises(ValueError, match=f"preference='{preference}' needs scores under a negative prompt"):
            relative_preference(scores, None, discount, "denoise", preference)


def test_unknown_branch_and_preference_are_errors():
    with pytest.raises(ValueError, match="branch must be 'denoise' or 'inversion', got 'both'"):
        preference_weights(double(0.1), "both")
    with pytest.raises(ValueError, match="preference must be .* got 'ratio'"):
        preference_weights(double(0.1), "denoise", "ratio")


def test_preference_loss_pushes_below_the_threshold_only():
    preference = double([0.5, 0.9, -1.0]).requires_grad_()
    loss = preference_loss(preference, threshold=0.7)
    torch.testing.assert_close(loss.detach(), double([0.2, 0.0, 1.7]), **TIGHT)
    loss.sum().backward()
    assert preference.grad.tolist() == [-1.0, 0.0, -1.0]


def pass_gradient(branch, judged_as, preference, discount):
    """
    Gradient of a pass's loss with respect to the network's velocity, under a reward that is linear in the image; the
    pass goes through `branch`, its reward through the formula of `judged_as`.
    """
    generator = torch.Generator().manual_seed(5)
    clean, noise, velocity, positive, negative = (
        torch.randn(2, 12, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    velocity.requires_grad_()
    image = direct_align_pass(lambda x, s: velocity, clean, noise, double(0.8), 0.02, branch)
    reward = relative_preference(
        (image * positive).sum(1), (image * negative).sum(1), double(discount), judged_as, preference
    )
    preference_loss(reward, threshold=1e3).sum().backward()
    return velocity.grad


def cosine(first, second):
    return torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).item()


@pytest.mark.parametrize("preference", FORMS)
def test_both_branches_push_the_same_way(preference):
    denoise = pass_gradient("denoise", "denoise", preference, 0.1)
    inversion = pass_gradient("inversion", "inversion", preference, 0.1)
    if preference == "relative":  # the discount favours the other prompt
        assert cosine(denoise, inversion) > 0.98
    else:
        torch.testing.assert_close(inversion, denoise, **TIGHT)


@pytest.mark.parametrize("preference", FORMS)
def test_branches_cancel_where_the_reward_is_not_turned_around_with_the_gradient(preference):
    denoise = pass_gradient("denoise", "denoise", preference, 0.1)
    unturned = pass_gradient("inversion", "denoise", preference, 0.1)
    torch.testing.assert_close(denoise + unturned, torch.zeros_like(denoise), **TIGHT)


def test_branches_nearly_cancel_with_the_discounts_of_their_own_too():
    denoise = pass_gradient("denoise", "denoise", "relative", 0.175)
    unturned = pass_gradient("inversion", "denoise", "relative", 0.155)
    assert (denoise + unturned).norm() < 0.03 * denoise.norm()
    turned = pass_gradient("inversion", "inversion", "relative", 0.155)
    assert (denoise + turned).norm() > 1.9 * denoise.norm()
