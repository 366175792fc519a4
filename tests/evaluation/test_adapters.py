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

"""Several adapters in one model, against a pipeline with one of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_flux_pipeline

from trl_diffusion.evaluation import Adapters
from trl_diffusion.hub import save_adapter
from trl_diffusion.models import Sampler, load_flow_model


SIZE = {"num_inference_steps": 2, "height": 16, "width": 16}
LENGTH = 16


@pytest.fixture
def folders(tmp_path):
    """Folders of two adapters, by names that are no names of modules."""
    folders = {}
    for seed, name in enumerate(("step.100", "step.200")):
        pipeline = tiny_flux_pipeline()
        network = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in network.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        folders[name] = tmp_path / name
        save_adapter(network, type(pipeline), folders[name])
    return folders


def pipeline_image(folder=None):
    pipeline = tiny_flux_pipeline()
    if folder is not None:
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", generator=generator, output_type="pt", max_sequence_length=LENGTH, **SIZE).images


def test_one_at_a_time_and_none_at_first(folders):
    flow_model = load_flow_model(tiny_flux_pipeline())
    flow_model.max_sequence_length = LENGTH
    adapters = Adapters(flow_model, folders)
    sampler = Sampler.from_settings(flow_model, **SIZE, adapter_off=adapters.off)
    base, *adapted = (pipeline_image(folder) for folder in (None, *folders.values()))
    assert (base - adapted[0]).abs().max() > 1e-3 < (adapted[0] - adapted[1]).abs().max()

    def image(adapter_fraction=1.0):
        (image,) = sampler.draw_images(["a cat"], [0], adapter_fraction=adapter_fraction)
        return image

    def assert_draws(expected, **kwargs):
        torch.testing.assert_close(image(**kwargs), expected, rtol=0, atol=1e-5)

    assert_draws(base)
    for name, expected in zip(folders, adapted, strict=True):
        with adapters.use(name):
            assert_draws(base, adapter_fraction=0.0)
            assert_draws(expected)  # on again
    with pytest.raises(RuntimeError, match="the disk"), adapters.use("step.100"):
        raise RuntimeError("the disk is full")
    assert_draws(base)
    with pytest.raises(ValueError, match=r"no adapter 'step.300', only \['step.100', 'step.200'\]"):
        with adapters.use("step.300"):
            pass


def test_an_adapter_that_is_not_there_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="no pytorch_lora_weights"):
        (tmp_path / "empty").mkdir()
        Adapters(load_flow_model(tiny_flux_pipeline()), {**folders, "empty": tmp_path / "empty"})
