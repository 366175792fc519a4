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

"""Videos: numbers of frames, pipelines that cannot be trained, and what the table of families does not say of Wan."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_models import tiny_flux_pipeline, tiny_qwen_image_pipeline, tiny_wan_pipeline

from trl_diffusion.models import Sampler, WanFlowModel, load_flow_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    tiny_wan_pipeline().save_pretrained(path)
    return path


def without_weights(folder, target):
    """A copy of a pipeline's folder of which no weights can be loaded."""
    for path in folder.rglob("*.json"):
        copied = target / path.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_defaults_are_those_of_the_pipelines_call():
    flow_model = load_flow_model(tiny_wan_pipeline())
    assert flow_model.default_guidance_scale == 5.0
    assert flow_model.default_size == (480, 832)
    assert flow_model.default_num_frames == 81
    assert flow_model.max_sequence_length == 512
    assert flow_model.negative_prompt == ""
    assert flow_model.latent_downsample == 16
    assert flow_model.latent_shape(480, 832) == (4, 21, 60, 104)
    assert load_flow_model(tiny_wan_pipeline(expand_timesteps=True)).latent_downsample == 32


@pytest.mark.parametrize("expand_timesteps", [False, True])
def test_a_folder_and_its_published_scheduler(tmp_path, expand_timesteps):
    pipeline = tiny_wan_pipeline(expand_timesteps=expand_timesteps)
    assert type(pipeline.scheduler) is UniPCMultistepScheduler
    pipeline.save_pretrained(tmp_path)
    if not expand_timesteps:  # as the files of Wan 2.1, which are older than these settings
        path = tmp_path / "vae" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in ("scale_factor_spatial", "scale_factor_temporal", "is_residual", "patch_size"):
            del config[name]
        path.write_text(json.dumps(config), encoding="utf-8")
    flow_model = load_flow_model(tmp_path, size=(32, 64), num_frames=5)
    assert type(flow_model) is WanFlowModel
    scheduler = flow_model.pipeline.scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config.shift == pipeline.scheduler.config.flow_shift == (5.0 if expand_timesteps else 3.0)
    assert flow_model.pipeline.config.expand_timesteps is expand_timesteps
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, flow_model.denoiser.state_dict()[name])


def test_the_static_shift_gives_the_published_sigmas():
    """`sigma_shift` makes the noise levels of UniPC with this `flow_shift`, but for its smallest unshifted one, 1 / 1000."""
    pipeline = tiny_wan_pipeline()
    published = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    sampler = Sampler.from_settings(load_flow_model(pipeline), 17, 16, 16, sigma_shift=3.0, num_frames=5)
    published.set_timesteps(17)
    torch.testing.assert_close(sampler.sigmas[:-1], published.sigmas[:-1].float(), rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("num_frames", "message"),
    [
        (80, "num_frames=80 is not possible with this WanPipeline.* 4 k \\+ 1. Nearest: 77 and 81"),
        (2, "num_frames=2 .* Nearest: 1 and 5"),
        (8, "num_frames=8 .* Nearest: 5 and 9"),
        (0, "num_frames=0 .* Nearest: 1\\."),
        (-4, "num_frames=-4 .* Nearest: 1\\."),
    ],
)
def test_impossible_numbers_of_frames_name_the_nearest(folder, tmp_path, num_frames, message):
    flow_model = load_flow_model(folder)
    with pytest.raises(ValueError, match=message):
        flow_model.check_num_frames(num_frames)
    with pytest.raises(ValueError, match=message):
        Sampler.from_settings(flow_model, 4, 16, 16, num_frames=num_frames)
    with pytest.raises(ValueError, match=message):
        flow_model.draw_noise(1, 16, 16, num_frames=num_frames)
    with pytest.raises(ValueError, match=message):
        load_flow_model(without_weights(folder, tmp_path), num_frames=num_frames)


@pytest.mark.parametrize("build", [tiny_flux_pipeline, tiny_qwen_image_pipeline])
def test_frames_are_refused_by_models_of_images(build):
    pipeline = build()
    name = type(pipeline).__name__
    with pytest.raises(ValueError, match=f"num_frames=5 does not fit a {name}, which makes images. Leave num_frames"):
        load_flow_model(pipeline, num_frames=5)
    flow_model = load_flow_model(pipeline)
    with pytest.raises(ValueError, match="num_frames=5 does not fit"):
        Sampler.from_settings(flow_model, 4, 16, 16, num_frames=5)
    # One frame is an image.
    assert Sampler.from_settings(flow_model, 4, 16, 16, num_frames=1).num_frames is None


def test_two_experts_are_refused_by_name(folder, tmp_path):
    message = "two experts .*boundary_ratio=0.875.*Wan-AI/Wan2.1-T2V-1.3B-Diffusers.*Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    pipeline = tiny_wan_pipeline()
    pipeline.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match=message):
        load_flow_model(pipeline)
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(transformer_2=tiny_wan_pipeline(seed=1).transformer)
    with pytest.raises(ValueError, match="two experts .*transformer_2"):
        load_flow_model(pipeline)
    target = without_weights(folder, tmp_path)
    edit(target / "model_index.json", boundary_ratio=0.875, transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(ValueError, match=message):
        load_flow_model(target)


def test_sampler_draws_videos_that_do_not_depend_on_their_batch():
    flow_model = load_flow_model(tiny_wan_pipeline())
    prompts = ["a cat", "a dog on a hill in the rain", "a fish"]
    settings = {"num_inference_steps": 3, "height": 16, "width": 32, "num_frames": 9}
    alone, together = (
        torch.cat(list(Sampler.from_settings(flow_model, **settings, batch_size=size).draw_images(prompts, [0, 1, 2])))
        for size in (1, 3)
    )
    assert alone.shape == (3, 9, 3, 16, 32) and alone.min() >= 0 and alone.max() <= 1
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_videos_are_encoded_as_videos():
    flow_model = load_flow_model(tiny_wan_pipeline())
    with pytest.raises(ValueError, match=r"encodes videos of shape \(B, F, 3, H, W\), got \(2, 3, 16, 16\)"):
        flow_model.encode_image(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="num_frames=6 is not possible .* Nearest: 5 and 9"):
        flow_model.encode_image(torch.rand(2, 6, 3, 16, 16))
    assert (
        flow_model.encode_image(torch.rand(2, 9, 3, 16, 32)).shape
        == flow_model.draw_noise(2, 16, 32, num_frames=9).shape
    )


def test_a_saturated_pixel_of_a_video_can_come_back():
    flow_model = load_flow_model(tiny_wan_pipeline())
    with torch.no_grad():
        flow_model.vae.decoder.conv_out.bias += 5  # every pixel is white
    latents = flow_model.draw_noise(1, 16, 16, num_frames=5).requires_grad_()
    videos = flow_model.decode(latents)
    assert (videos == 1).all()
    (darker,) = torch.autograd.grad(videos.sum(), latents, retain_graph=True)
    (brighter,) = torch.autograd.grad(-videos.sum(), latents)
    # Of both latent frames.
    assert darker.abs().amax((0, 1, 3, 4)).all() and not brighter.any()
