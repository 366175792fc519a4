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

"""
Parity with numbers computed by the released arithmetic.

That arithmetic has two habits of precision that ours has not: it takes log(sqrt(2*pi)) in float32, and for `dance`
the whole log-probability is float32. Both are repeated here, so that the fixture checks our mean and std as closely
as its own digits allow. The constant cancels in a ratio. The last transition is left out: with us it is deterministic
and never trained.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from trl_diffusion.flow import log_prob, shifted_schedule, transition_coefficients, transition_mean
from trl_diffusion.flow.direct_align import direct_align_pass, interpolate, recover
from trl_diffusion.objectives import chunk_ratio, clipped_surrogate


TIGHT = {"rtol": 0, "atol": 1e-10}
VELOCITIES = {"log_prob": "velocity", "new_log_prob": "new_velocity"}
LOG_NORMALISER_FLOAT32 = torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))


@pytest.fixture(scope="module")
def grpo(fixtures_dir):
    folder = fixtures_dir / "algorithms"
    return json.loads((folder / "grpo.json").read_text()), load_file(folder / "grpo.safetensors")


@pytest.fixture(scope="module")
def direct_align(fixtures_dir):
    return load_file(fixtures_dir / "algorithms" / "direct_align.safetensors")


def trained_transitions(grpo, sde_type, velocity_name):
    """(next latents, mean, std) of each transition but the last."""
    description, numbers = grpo
    table = transition_coefficients(numbers["sigmas"], sde_type, description["eta"][sde_type])
    latents, velocity = numbers[f"{sde_type}_latents"], numbers[f"{sde_type}_{velocity_name}"]
    for i in range(description["num_steps"] - 1):
        coefficients = table.rows(torch.tensor([i]), latents[:, i].ndim)
        yield latents[:, i + 1], transition_mean(latents[:, i], velocity[:, i], coefficients), coefficients.std


def our_log_probs(grpo, sde_type, name):
    steps = trained_transitions(grpo, sde_type, VELOCITIES[name])
    return torch.stack([log_prob(next_latents, mean, std) for next_latents, mean, std in steps], 1)


def chunk_columns(grpo):
    sizes = grpo[0]["chunk_sizes"]
    return torch.arange(sum(sizes)).split(sizes)


def test_schedule(grpo):
    description, numbers = grpo
    torch.testing.assert_close(
        shifted_schedule(description["num_steps"], description["shift"]), numbers["sigmas"], **TIGHT
    )


@pytest.mark.parametrize("name", VELOCITIES)
def test_flow_log_prob_with_the_released_normaliser(grpo, name):
    correction = math.log(math.sqrt(2 * math.pi)) - LOG_NORMALISER_FLOAT32.double()
    ours = our_log_probs(grpo, "flow", name) + correction
    torch.testing.assert_close(ours, grpo[1][f"flow_{name}"][:, :-1], **TIGHT)


@pytest.mark.parametrize("name", VELOCITIES)
def test_dance_log_prob_with_the_released_arithmetic_on_our_mean_and_std(grpo, name):
    columns = []
    for next_latents, mean, std in trained_transitions(grpo, "dance", VELOCITIES[name]):
        std = std.squeeze()  # a scalar does not raise the float32 of the difference to its own float64
        element = -((next_latents.float() - mean.float()) ** 2) / (2 * std**2) - std.log() - LOG_NORMALISER_FLOAT32
        columns.append(element.mean(dim=(1, 2)))
    ours = torch.stack(columns, 1)
    assert ours.dtype == torch.float32
    # One unit in the last place of float32: the order in which a machine sums the elements decides it.
    torch.testing.assert_close(ours.double(), grpo[1][f"dance_{name}"][:, :-1], rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("name", VELOCITIES)
@pytest.mark.parametrize("sde_type", ["flow", "dance"])
def test_log_prob_is_the_released_one_up_to_its_precision(grpo, sde_type, name):
    released = grpo[1][f"{sde_type}_{name}"][:, :-1]
    torch.testing.assert_close(our_log_probs(grpo, sde_type, name), released, rtol=0, atol=5e-7)


@pytest.mark.parametrize("sde_type", ["flow", "dance"])
def test_chunk_ratio_of_the_released_log_probs(grpo, sde_type):
    numbers = grpo[1]
    new, old = numbers[f"{sde_type}_new_log_prob"], numbers[f"{sde_type}_log_prob"]
    ours = torch.stack([chunk_ratio(new[:, chunk], old[:, chunk]) for chunk in chunk_columns(grpo)], 1)
    torch.testing.assert_close(ours, numbers[f"{sde_type}_chunk_ratio"], **TIGHT)


@pytest.mark.parametrize(("sde_type", "tolerance"), [("flow", 1e-10), ("dance", 5e-7)])
def test_chunk_ratio_of_our_log_probs(grpo, sde_type, tolerance):
    new, old = our_log_probs(grpo, sde_type, "new_log_prob"), our_log_probs(grpo, sde_type, "log_prob")
    ours = torch.stack([chunk_ratio(new[:, chunk], old[:, chunk]) for chunk in chunk_columns(grpo)], 1)
    torch.testing.assert_close(ours, grpo[1][f"{sde_type}_chunk_ratio"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("sde_type", ["flow", "dance"])
def test_chunk_loss(grpo, sde_type):
    description, numbers = grpo
    advantages, epsilon = numbers[f"{sde_type}_advantages"], description["epsilon"]
    ratios = numbers[f"{sde_type}_chunk_ratio"].unbind(1)
    losses = torch.stack([clipped_surrogate(ratio, advantages, epsilon, epsilon) for ratio in ratios])
    clipped = torch.stack([(ratio - 1).abs() > epsilon for ratio in ratios])
    assert clipped.any()  # else the fixture would not check the clipping
    torch.testing.assert_close(losses.mean().reshape(1), numbers[f"{sde_type}_chunk_loss"], **TIGHT)


def test_flow_chunk_loss_from_latents_and_velocities(grpo):
    description, numbers = grpo
    new, old = our_log_probs(grpo, "flow", "new_log_prob"), our_log_probs(grpo, "flow", "log_prob")
    losses = [
        clipped_surrogate(
            chunk_ratio(new[:, chunk], old[:, chunk]),
            numbers["flow_advantages"],
            description["epsilon"],
            description["epsilon"],
        )
        for chunk in chunk_columns(grpo)
    ]
    torch.testing.assert_close(torch.stack(losses).mean().reshape(1), numbers["flow_chunk_loss"], **TIGHT)


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_direct_align_recovers_the_released_image(direct_align, branch):
    clean, noise, velocity = direct_align["x0"], direct_align["noise"], direct_align["velocity"]
    sigma_in, sigma_out = direct_align[f"{branch}_sigmas"]
    released = direct_align[f"{branch}_recovered"]
    by_hand = recover(interpolate(clean, noise, sigma_in), velocity, noise, sigma_in, sigma_out)
    torch.testing.assert_close(by_hand, released, **TIGHT)
    delta = float((sigma_in - sigma_out).abs())
    one_pass = direct_align_pass(lambda latents, sigma: velocity, clean, noise, sigma_out, delta, branch)
    torch.testing.assert_close(one_pass, released, **TIGHT)
