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
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from trl_diffusion.trainer.measures import (
    RunningMetrics,
    duplicate_share,
    lora_update_norm,
    mean_of_known,
    picture_digests,
)


def test_means_and_maxima_without_what_is_nan():
    metrics = RunningMetrics()
    rows = [(1.0, math.nan, 3.0), (2.0, 5.0, math.nan), (6.0, math.nan, -4.0)]
    for first, second, third in rows:
        metrics.add(
            {"first": torch.tensor(first), "second": torch.tensor(second)},
            maxima={"largest": torch.tensor(third), "never": torch.tensor(math.nan)},
        )
        metrics.add({"third": torch.tensor(third, dtype=torch.float64, requires_grad=True)})
    accelerator = Accelerator(cpu=True)
    taken = metrics.take(accelerator)
    assert math.isnan(taken.pop("never"))
    assert taken == {"first": 3.0, "second": 5.0, "third": -0.5, "largest": 3.0}
    assert metrics.take(accelerator) == {}
    metrics.add({"first": torch.tensor(math.inf), "second": torch.tensor(math.nan)})
    taken = metrics.take(accelerator)
    assert taken["first"] == math.inf and math.isnan(taken["second"]) and len(taken) == 2


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 3}, "rank_pattern": {"2": 5}}])
def test_norm_of_the_update_is_that_of_its_matrices(variant):
    network = nn.Sequential(nn.Linear(7, 6), nn.Conv2d(3, 5, kernel_size=2), nn.Linear(6, 9), nn.Linear(9, 2))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1", "2"], **variant)
    network = get_peft_model(network, config)
    assert lora_update_norm(network) == 0  # B is 0
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    whole = torch.cat([layer.get_delta_weight("default").double().flatten() for layer in layers])
    assert len(layers) == 3
    assert lora_update_norm(network) == pytest.approx(whole.norm().item(), rel=1e-6)
    assert lora_update_norm(network, "other") is None and lora_update_norm(nn.Linear(2, 2)) is None


def test_equal_pictures_of_a_group_are_counted():
    images = torch.rand(8, 3, 6, 4)
    images[1] = images[0]
    images[3] = images[2] = images[0] + 1e-4 * (images[0] * 255 % 1 < 0.4)  # the same in 8 bits
    images[7] = images[0]  # of another group
    images[6] = images[5]
    images[6, 2, 5, 3] = (images[5, 2, 5, 3] + 0.5) % 1  # but for one value
    digests = picture_digests(images)
    assert digests.shape == (8,) and digests.dtype == torch.int64
    as_bytes = [tuple((image * 255).round().int().flatten().tolist()) for image in images]
    for i in range(8):
        for j in range(8):
            assert (digests[i] == digests[j]) == (as_bytes[i] == as_bytes[j])
    assert duplicate_share(digests.view(2, 4)) == 0.5
    assert duplicate_share(digests.view(1, 8)) == 5 / 8
    assert duplicate_share(digests.view(4, 2)) == 0.5


def test_mean_of_what_is_known():
    assert mean_of_known([1.0, math.nan, 4.0]) == 2.5
    assert math.isnan(mean_of_known([math.nan, math.nan]))
