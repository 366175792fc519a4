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

"""The moving average of the weights, against diffusers' own."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from trl_diffusion.runtime.ema import WeightAverage
from trl_diffusion.runtime.sharding import held_weights


@pytest.fixture
def network():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def change(network, step):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_equals_diffusers(network, tmp_path, decay):
    theirs = EMAModel(trained(network), decay=decay)
    ours = WeightAverage(held_weights(network, None), decay)
    assert list(ours.averages) == ["0.weight", "1.weight", "1.bias"]
    for step in range(30):
        change(network, step)
        theirs.step(trained(network))
        ours.step()
        if step == 11:
            # A new average that takes over from a file goes on as the old one.
            ours.save(tmp_path / "average.safetensors")
            ours = WeightAverage(held_weights(network, None), decay)
            ours.load(tmp_path / "average.safetensors")
        for average, expected in zip(ours.averages.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


def test_weights_and_average_change_places_and_return(network):
    average = WeightAverage(held_weights(network, None), 0.9)
    for step in range(3):
        change(network, step)
        average.step()
    weights = [parameter.clone() for parameter in trained(network)]
    averages = [tensor.clone() for tensor in average.averages.values()]
    assert not any(torch.equal(a, b) for a, b in zip(weights, averages, strict=True))

    def are(expected):
        return all(torch.equal(a, b) for a, b in zip(trained(network), expected, strict=True))

    with pytest.raises(RuntimeError, match="within"), average.applied():
        assert are(averages)
        with average.applied():
            assert are(averages)
        assert are(averages)
        raise RuntimeError("within")
    assert are(weights)
