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

import importlib.util
import json
import os
import re
import shutil

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)
from tiny_models import (
    tiny_chroma_pipeline,
    tiny_flux2_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_krea2_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from transformers import T5EncoderModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from trl_diffusion.models import (
    FLOW_MODELS,
    FluxFlowModel,
    QwenImageFlowModel,
    SD3FlowModel,
    load_flow_model,
    whole_weights,
)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def zero3():
    """The state that training arguments with ZeRO-3 leave behind in transformers."""

    class Zero3Config:
        config = {"zero_optimization": {"stage": 3}}

        def is_zero3(self):
            return True

    config = Zero3Config()  # transformers holds a weak reference only
    set_hf_deepspeed_config(config)
    yield config
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_loads_a_folder(flux_folder, as_type):
    flow_model = load_flow_model(as_type(flux_folder))
    assert type(flow_model) is FluxFlowModel
    assert flow_model.dtype == torch.float32
    original = tiny_flux_pipeline()
    assert flow_model.text_encoders == {}  # until a prompt must be encoded
    flow_model.encode_rows(["a"])
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(original, name).state_dict()
        actual = getattr(flow_model.pipeline, name).state_dict()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_torch_dtype_reaches_all_weights(flux_folder):
    flow_model = load_flow_model(flux_folder, torch_dtype=torch.bfloat16)
    flow_model.encode_rows(["a"])
    modules = [flow_model.denoiser, flow_model.vae, *flow_model.text_encoders.values()]
    assert flow_model.dtype == torch.bfloat16
    assert all(module.dtype == torch.bfloat16 for module in modules)


def test_arguments_reach_from_pretrained(flux_folder):
    flow_model = load_flow_model(flux_folder, text_encoder=None, text_encoder_2=None)
    assert flow_model.text_encoders == {}
    with pytest.raises(RuntimeError, match="no text encoders"):
        flow_model.encode_prompt(["a"])


def test_the_embedded_world():
    flow_model = load_flow_model("shapes")
    assert type(flow_model) is FluxFlowModel
    assert flow_model.default_size == (32, 32)
    assert flow_model.dtype == torch.float32
    flow_model.check_size(*flow_model.default_size)
    assert flow_model.max_sequence_length == 12
    images = torch.rand(1, 3, 32, 32)
    assert flow_model.decode(flow_model.encode_image(images)).shape == images.shape


def test_loads_a_folder_of_qwen_image(tmp_path):
    tiny_qwen_image_pipeline().save_pretrained(tmp_path)
    flow_model = load_flow_model(tmp_path, negative_prompt="dull")
    assert type(flow_model) is QwenImageFlowModel and flow_model.negative_prompt == "dull"
    actual, expected = (
        model.encode_prompt(["a cat"]) for model in (flow_model, load_flow_model(tiny_qwen_image_pipeline()))
    )
    assert torch.equal(actual["prompt_embeds"], expected["prompt_embeds"])
    assert actual["negative_prompt_embeds_mask"].sum() == expected["negative_prompt_embeds_mask"].sum() + len("dull")


def test_stable_diffusion_turbo_is_known_by_its_name(tmp_path):
    pipeline = tiny_sd3_pipeline()
    for name, undistilled in (("sd3.5-turbo", "stabilityai/stable-diffusion-3.5-large"), ("turbo", None)):
        folder = tmp_path / name if undistilled else tmp_path / "turbo" / "sd3.5-medium"
        pipeline.save_pretrained(folder)
        flow_model = load_flow_model(folder)
        assert flow_model.undistilled_model == undistilled and flow_model.distilled_model is None
        assert flow_model.has_guidance == (undistilled is None)
        assert flow_model.default_guidance_scale == (7.0 if undistilled is None else 1.0)
    pipeline.transformer.register_to_config(num_layers=38)
    assert load_flow_model(pipeline).distilled_model == "stabilityai/stable-diffusion-3.5-large-turbo"


def test_negative_prompt_is_refused_before_weights_load(flux_folder, tmp_path):
    message = "negative_prompt='dull' has no effect with a FluxPipeline"
    shutil.copytree(flux_folder, tmp_path / "flux")
    for weights in (tmp_path / "flux").rglob("*.safetensors"):
        weights.unlink()
    for model in (tmp_path / "flux", "shapes", tiny_flux_pipeline()):
        with pytest.raises(ValueError, match=message):
            load_flow_model(model, negative_prompt="dull")


def test_loaded_pipelines():
    assert type(load_flow_model(tiny_flux_pipeline())) is FluxFlowModel
    assert type(load_flow_model(tiny_sd3_pipeline())) is SD3FlowModel
    with pytest.raises(ValueError, match="'revision', 'torch_dtype'.*loaded pipeline"):
        load_flow_model(tiny_flux_pipeline(), torch_dtype=torch.bfloat16, revision="main")


@pytest.mark.parametrize("pipeline_class", [FluxImg2ImgPipeline, FluxInpaintPipeline, StableDiffusion3Img2ImgPipeline])
def test_unsupported_loaded_pipelines_are_refused(pipeline_class):
    base = tiny_sd3_pipeline() if "StableDiffusion3" in pipeline_class.__name__ else tiny_flux_pipeline()
    pipeline = pipeline_class(**base.components)
    with pytest.raises(ValueError, match=f"{pipeline_class.__name__} is not supported.*{', '.join(FLOW_MODELS)}"):
        load_flow_model(pipeline)


def test_unsupported_family_is_refused_before_weights_load(tmp_path):
    # No weights in the folder at all: loading them would be another error.
    config = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="StableDiffusionPipeline of .* is not supported.*FluxPipeline"):
        load_flow_model(tmp_path)


@pytest.mark.parametrize("content", [None, "not json", "{}"])
def test_folder_without_a_pipeline_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(tmp_path))}.*Supported: FluxPipeline"):
        load_flow_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/path/here", "There is no file or folder 'no/such/path/here'"),
        ("no-owner/no-model", "(?s)'no-owner/no-model'.*Supported: FluxPipeline, StableDiffusion3Pipeline"),
    ],
)
def test_wrong_path_or_id_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        load_flow_model(model)


def test_scheduler_must_integrate_a_flow():
    pipeline = tiny_flux_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.*FlowMatchEulerDiscreteScheduler"):
        load_flow_model(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas=False"):
        load_flow_model(pipeline)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("num_steps", [2, 7, 20])
@pytest.mark.parametrize(
    ("scheduler_class", "first", "last"), [(DPMSolverMultistepScheduler, 0.999, 0), (UniPCMultistepScheduler, 1, 1e-3)]
)
def test_solvers_of_several_steps_become_euler_with_their_shift(tmp_path, scheduler_class, first, last, num_steps):
    """Their sigmas before the shift go from `first` to `last` (and then to 0); Euler's from 1 to 0."""
    pipeline = tiny_sana_pipeline()
    pipeline.scheduler = scheduler_class(**FLOW)
    pipeline.save_pretrained(tmp_path)
    flow_model = load_flow_model(tmp_path)
    assert type(flow_model.pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    sigmas = flow_model.schedule(num_steps, 32, 32)[:-1].double()
    pipeline.scheduler.set_timesteps(num_steps)
    unshifted = sigmas / (3 - 2 * sigmas)
    torch.testing.assert_close(unshifted, 1 - torch.arange(num_steps).double() / num_steps, rtol=0, atol=1e-6)
    theirs = last + (first - last) * unshifted
    theirs = 3 * theirs / (1 + 2 * theirs)
    torch.testing.assert_close(pipeline.scheduler.sigmas[:-1].double(), theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(sigmas, theirs, rtol=0, atol=3e-3)  # of the published sigmas


@pytest.mark.parametrize(
    "change", [{"prediction_type": "epsilon"}, {"use_flow_sigmas": False}, {"use_dynamic_shifting": True}]
)
def test_solvers_of_no_flow_and_of_another_shift_are_refused(change):
    pipeline = tiny_sana_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(**{**FLOW, **change})
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler.*FlowMatchEulerDiscreteScheduler"):
        load_flow_model(pipeline)


def test_a_flow_model_of_the_wrong_class_is_refused():
    with pytest.raises(ValueError, match="SD3FlowModel needs a StableDiffusion3Pipeline, got a FluxPipeline"):
        SD3FlowModel(tiny_flux_pipeline())


def test_zero3_does_not_partition_frozen_models(flux_folder, zero3):
    flow_model = load_flow_model(flux_folder)
    flow_model.encode_rows(["a"])
    assert is_deepspeed_zero3_enabled()  # restored
    original = tiny_flux_pipeline().text_encoder_2.state_dict()
    actual = flow_model.text_encoders["text_encoder_2"].state_dict()
    assert all(torch.equal(original[key], actual[key]) for key in original)
    # What the context prevents: transformers hands the model to DeepSpeed. Without it installed, that is an error.
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ImportError, match="deepspeed"):
            T5EncoderModel.from_pretrained(flux_folder, subfolder="text_encoder_2")


def test_whole_weights_restores_what_was(zero3, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(KeyError), whole_weights():
        assert not is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        raise KeyError
    assert is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_whole_weights_without_deepspeed():
    unset_hf_deepspeed_config()
    with whole_weights():
        assert not is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    "make",
    [
        tiny_flux_pipeline, tiny_sd3_pipeline, tiny_qwen_image_pipeline, tiny_flux2_pipeline, tiny_z_image_pipeline,
        tiny_chroma_pipeline, tiny_sana_pipeline, tiny_krea2_pipeline, tiny_flux_kontext_pipeline,
        tiny_qwen_image_edit_plus_pipeline,
    ],
)  # fmt: skip
def test_an_impossible_size_is_refused_before_weights_load(make, tmp_path):
    make().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="width=30 is not possible .* multiple of 4.*Nearest: 28 and 32"):
        load_flow_model(tmp_path, size=(None, 30))
