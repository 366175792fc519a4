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
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from trl_diffusion.shapes import (
    ALL_SCENES,
    MAX_SEQUENCE_LENGTH,
    draw,
    judge,
    load_dataset,
    load_pipeline,
    pipeline_path,
)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompts, seed=0, **kwargs):
    arguments = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 10,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "pt",
        **kwargs,
    }
    return pipeline(prompts, **arguments).images


def test_all_weights_fit_into_8_mib():
    folder = pipeline_path().parent
    assert {path.name for path in folder.iterdir()} == {"pipeline", "clip"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8 * 2**20


def test_it_is_an_ordinary_flux_pipeline():
    pipeline = FluxPipeline.from_pretrained(pipeline_path())
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert set(modules) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for name, module in modules.items():
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}, name
    assert 1e6 <= sum(parameter.numel() for parameter in pipeline.transformer.parameters()) <= 1.6e6
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.vae_scale_factor == 4
    assert pipeline.vae.config.latent_channels == 12
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == MAX_SEQUENCE_LENGTH


def test_the_schedule_is_shifted_by_three(pipeline):
    sample(pipeline, ["a small red circle on a white background"])
    t = torch.linspace(1, 0, 11)
    torch.testing.assert_close(pipeline.scheduler.sigmas, 3 * t / (1 + 2 * t))


def test_each_word_of_the_world_is_one_token(pipeline):
    for prompt in load_dataset("test")["prompt"]:
        assert len(pipeline.tokenizer(prompt).input_ids) == 8 + 2
        ids = pipeline.tokenizer_2(prompt).input_ids
        assert len(ids) == 8 + 1
        assert pipeline.tokenizer_2.unk_token_id not in ids


def test_other_words_are_unknown_but_harmless(pipeline):
    ids = pipeline.tokenizer_2("a small zebra").input_ids
    assert pipeline.tokenizer_2.unk_token_id in ids
    images = sample(pipeline, ["", "Ein Zebra, 100 % natürlich! " * 20], num_inference_steps=2)
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()


def test_latents_are_scaled_to_unit_variance(pipeline):
    images = draw(ALL_SCENES, "sharp", torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
        restored = pipeline.vae.decode(latents).sample / 2 + 0.5
    scaled = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.2)
    assert scaled.std().item() == pytest.approx(1, abs=0.2)
    measures = judge(restored.clamp(0, 1), [scene.caption for scene in ALL_SCENES])
    assert measures["all_attributes"].mean() >= 0.97
    assert (restored - images).square().mean() < 1e-3


def test_the_base_model_binds_attributes_imperfectly(pipeline):
    prompts = list(load_dataset("test")["prompt"]) * 12
    images = torch.cat([sample(pipeline, prompts[start : start + 72], seed=start) for start in range(0, 432, 72)])
    measures = judge(images, prompts)
    # Between 20 % and 50 %, as far as 432 images can tell: two standard errors are 4 %.
    right = measures["all_attributes"]
    error = right.std(ddof=1) / len(right) ** 0.5
    assert 0.20 - 2 * error <= right.mean() <= 0.50 + 2 * error
    chance = {"background": 1 / 3, "color": 1 / 6, "size": 1 / 2, "shape": 1 / 4}
    for attribute, share in chance.items():
        assert share + 0.15 <= measures[attribute].mean() <= 0.95, attribute


def test_sampling_is_reproducible(pipeline):
    prompts = load_dataset("train")["prompt"][:4]
    first, second, other = (sample(pipeline, prompts, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_guidance_and_padding_are_harmless(pipeline):
    # The embedded guidance carries no information in this world, and padding up to FluxPipeline's own 512 tokens
    # was seen in training, in part: neither may ruin the pictures.
    prompts = list(load_dataset("test")["prompt"])
    usual = judge(sample(pipeline, prompts), prompts)["attributes"].mean()
    for arguments in ({"guidance_scale": 1.0}, {"max_sequence_length": 128}):
        changed = judge(sample(pipeline, prompts, **arguments), prompts)["attributes"].mean()
        assert changed >= usual - 0.15, arguments
