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

"""Policies by name: kept, averaged as diffusers does, used in place of one another, saved."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_diffusion.runtime.policies import Policies, warmed_up
from trl_diffusion.runtime.sharding import held_weights


@pytest.fixture
def network():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def policies_of(network):
    return Policies(held_weights(network, None), network)


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def copied(network):
    return [parameter.detach().clone() for parameter in trained(network)]


def are(network, expected):
    return all(torch.equal(a, b) for a, b in zip(trained(network), expected, strict=True))


def change(network, step):
    with torch.no_grad():
        for parameter in trained(network):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_equals_diffusers(network, tmp_path, decay):
    theirs = EMAModel(trained(network), decay=decay)
    ours = policies_of(network)
    ours.keep("average")
    assert list(ours.copies["average"]) == ["0.weight", "1.weight", "1.bias"]
    for step in range(30):
        change(network, step)
        theirs.step(trained(network))
        ours.update("average", warmed_up(decay, ours.updates["average"]))
        if step == 11:
            # What takes over from a file goes on as before.
            ours.save(tmp_path / "policies.safetensors")
            ours = policies_of(network)
            ours.load(tmp_path / "policies.safetensors")
        for average, expected in zip(ours.copies["average"].values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


def test_the_network_is_each_policy_and_returns(network):
    policies = policies_of(network)
    states = {}
    for step, name in enumerate(("reference", "old", "current")):
        change(network, step)
        states[name] = copied(network)
        if name != "current":
            policies.keep(name)
    with pytest.raises(RuntimeError, match="within"), policies.use("old"):
        assert are(network, states["old"])
        for name in ("current", "reference", "old"):
            with policies.use(name):
                assert are(network, states[name])
                with policies.use("reference"):
                    assert are(network, states["reference"])
                assert are(network, states[name])
        assert are(network, states["old"])
        raise RuntimeError("within")
    assert are(network, states["current"])
    for name in states:
        with policies.use(name):
            assert are(network, states[name])


def test_the_reference_of_an_adapter_needs_no_copy(network):
    x = torch.randn(2, 3)
    before = network(x)
    network = get_peft_model(network, LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    policies = policies_of(network)
    first = network(x)
    policies.keep("old")
    change(network, 0)
    current = network(x)
    assert not torch.equal(first, before) and not torch.equal(first, current)
    with policies.use("old"):
        assert torch.equal(network(x), first)
        with policies.use("reference"):
            assert torch.equal(network(x), before)
            with policies.use("current"):
                assert torch.equal(network(x), current)
            with policies.use("old"):
                assert torch.equal(network(x), first)
        assert torch.equal(network(x), first)
    with policies.use("reference"):
        assert torch.equal(network(x), before)
    assert torch.equal(network(x), current)
    assert all(parameter.requires_grad for name, parameter in network.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match="cannot be kept as 'reference'"):
        policies.keep("reference")


def test_all_but_the_reference_is_in_one_file(network, tmp_path):
    policies = policies_of(network)
    policies.keep("reference")
    assert not policies.are_saved
    change(network, 0)
    policies.keep("old")
    old = copied(network)
    change(network, 1)
    policies.update("old", 0.25)
    expected = [0.25 * a + 0.75 * b for a, b in zip(old, trained(network), strict=True)]
    policies.save(tmp_path / "policies.safetensors")
    loaded = policies_of(network)
    loaded.load(tmp_path / "policies.safetensors")
    assert loaded.updates == {"old": 1}
    with loaded.use("old"):
        for weight, value in zip(trained(network), expected, strict=True):
            torch.testing.assert_close(weight.detach(), value.detach())
    with pytest.raises(ValueError, match=r"no policy 'reference'.*\['current', 'old'\]"), loaded.use("reference"):
        pass
    with pytest.raises(ValueError, match="no policy 'average'"):
        loaded.update("average", 0.5)
    with loaded.use("old"), pytest.raises(RuntimeError, match="policies.keep within policies.use"):
        loaded.keep("new")
