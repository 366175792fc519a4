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

"""The sampler, used alone: against the families' own pipelines, and against its own algorithm by hand."""

import contextlib
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from trl_diffusion.flow import log_prob, transition_coefficients, transition_mean
from trl_diffusion.models import Sampler, load_flow_model


# Of different length, and three of them in batches of two.
PROMPTS = ["a small red circle on white", "a large blue square on black, seen from afar", "rain"]
SEEDS = [7, 3, 11]
NUM_STEPS = 4
# What builds a tiny pipeline, and what a user tells the pipeline's own call.
FAMILIES = {
    "flux": (tiny_flux_pipeline, {"guidance_scale": 3.0}),
    "sd3": (tiny_sd3_pipeline, {"guidance_scale": 3.0, "negative_prompt": "a blurred picture"}),
    "qwen-image": (tiny_qwen_image_pipeline, {"true_cfg_scale": 3.0, "negative_prompt": "a blurred picture"}),
    "z-image": (tiny_z_image_pipeline, {"guidance_scale": 3.0, "negative_prompt": "a blurred picture"}),
}


def make_sampler(pipeline, negative_prompt=None, **settings):
    flow_model = load_flow_model(pipeline, negative_prompt=negative_prompt)
    flow_model.max_sequence_length = 64
    defaults = {"num_inference_steps": NUM_STEPS, "height": 16, "width": 24, "guidance_scale": 3.0, "batch_size": 2}
    return Sampler.from_settings(flow_model, **{**defaults, **settings})


def pipeline_images(pipeline, **arguments):
    """What diffusers draws, one image at a time."""
    images = [
        pipeline(
            prompt, height=16, width=24, num_inference_steps=NUM_STEPS, max_sequence_length=64, output_type="pt",
            generator=torch.Generator().manual_seed(seed), **arguments,
        ).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]  # fmt: skip
    return torch.cat(images)


@pytest.fixture
def sampler():
    return make_sampler(tiny_flux_pipeline())


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_pipeline(family):
    build, arguments = FAMILIES[family]
    sampler = make_sampler(build(), arguments.get("negative_prompt"))
    batches = list(sampler.draw_images(PROMPTS, SEEDS))
    assert [batch.shape for batch in batches] == [(2, 3, 16, 24), (1, 3, 16, 24)]
    expected = pipeline_images(build(), **arguments)
    torch.testing.assert_close(torch.cat(batches), expected, rtol=0, atol=1e-5)
    # Another network in the pipeline's place.
    other = build(seed=1)
    assert (pipeline_images(other, **arguments) - expected).abs().max() > 1e-3
    expected = build()
    expected.transformer = other.transformer
    images = torch.cat(list(sampler.draw_images(PROMPTS, SEEDS, network=other.transformer)))
    torch.testing.assert_close(images, pipeline_images(expected, **arguments), rtol=0, atol=1e-5)


def test_settings_that_are_not_given_are_the_pipelines():
    pipeline = tiny_flux_pipeline()
    flow_model = load_flow_model(pipeline)
    sampler = Sampler.from_settings(flow_model)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    assert sampler.size == (side, side) and sampler.guidance_scale == 3.5 and len(sampler.sigmas) == 29
    assert torch.equal(sampler.sigmas, flow_model.schedule(28, side, side))
    shifted = Sampler.from_settings(flow_model, 2, sigma_shift=3.0)
    assert shifted.sigmas.tolist() == [1, 0.75, 0]  # 3 t / (1 + 2 t)


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
def test_stochastic_rollout_is_the_algorithm_by_hand(sampler, sde_type):
    noise = sampler.draw_noise([torch.Generator().manual_seed(seed) for seed in SEEDS])
    table = transition_coefficients(sampler.sigmas, sde_type)
    generators = [torch.Generator().manual_seed(100 + seed) for seed in SEEDS]
    trajectory = sampler.rollout(PROMPTS, noise, transitions=table, generators=generators, keep=range(NUM_STEPS))
    assert torch.equal(trajectory.states[0], noise) and torch.equal(trajectory.states[NUM_STEPS], trajectory.clean)
    conditioning = sampler.conditioning.get(PROMPTS)
    generators = [torch.Generator().manual_seed(100 + seed) for seed in SEEDS]
    for i in range(NUM_STEPS):
        latents = trajectory.states[i]
        with torch.no_grad():
            velocity = sampler.velocity(sampler.flow_model.denoiser, latents, sampler.sigmas[i], conditioning)
        rows = table.to("cpu", torch.float32).rows(torch.tensor([i]), latents.ndim)
        mean = transition_mean(latents, velocity, rows)
        following = mean
        if i < NUM_STEPS - 1:  # the last transition is deterministic
            z = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            following = mean + rows.std * z
            expected = log_prob(following, mean, rows.std)
            torch.testing.assert_close(trajectory.log_probs[:, i], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(trajectory.states[i + 1], following, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stochastic", [None, [2], []], ids=["all", "trained", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_group_has_in_common_is_computed_once(family, stochastic):
    """Against one trajectory a row, in float64; and the rows that went through the network, by hand."""
    build, arguments = FAMILIES[family]
    sampler = make_sampler(build(), arguments.get("negative_prompt"))
    sampler.flow_model.denoiser.double()
    sampler.flow_model.dtype = torch.float64
    table = transition_coefficients(sampler.sigmas, "flow", stochastic=stochastic)
    groups = [7, 3, 3, 3, 7, 9]
    prompts = [PROMPTS[{7: 0, 3: 1, 9: 1}[group]] for group in groups]
    noise = sampler.draw_noise([torch.Generator().manual_seed(group) for group in groups]).double()

    def drawn(batch_size, **common):
        sized = replace(sampler, batch_size=batch_size)
        generators = [torch.Generator().manual_seed(100 + row) for row in range(6)]
        return sized.rollout(prompts, noise, None, table, generators, range(NUM_STEPS), **common), sized.forwards

    plain, forwards = drawn(4)
    rows_of_an_image = 1 if family == "flux" else 2  # with the negative prompt
    assert forwards == 6 * NUM_STEPS * rows_of_an_image
    in_common = {None: 1, (2,): 3, (): NUM_STEPS}[stochastic if stochastic is None else tuple(stochastic)]
    for batch_size, num_groups in ((1, 0), (4, 0), (6, 5)):
        trajectory, forwards = drawn(batch_size, groups=groups, num_groups=num_groups)
        distinct = max(3, num_groups)
        assert forwards == (distinct * in_common + 6 * (NUM_STEPS - in_common)) * rows_of_an_image
        for i in range(NUM_STEPS + 1):
            torch.testing.assert_close(trajectory.states[i], plain.states[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(trajectory.clean, plain.clean, rtol=0, atol=1e-12)
        torch.testing.assert_close(trajectory.log_probs, plain.log_probs, rtol=0, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(trajectory.relative_changes, plain.relative_changes, rtol=0, atol=1e-12)


def test_adapter_is_on_for_a_share_of_the_steps(sampler):
    network = get_peft_model(sampler.flow_model.denoiser, LoraConfig(r=2, target_modules=["to_q"]))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    sampler = replace(sampler, adapter_off=network.disable_adapter, batch_size=3)
    noise = sampler.draw_noise([torch.Generator().manual_seed(seed) for seed in SEEDS])
    conditioning = sampler.conditioning.get(PROMPTS)
    expected = {}
    for num_steps in (0, 1, 4):
        latents = noise
        for i in range(NUM_STEPS):
            context = contextlib.nullcontext() if i < num_steps else network.disable_adapter()
            with context, torch.no_grad():
                velocity = sampler.velocity(network, latents, sampler.sigmas[i], conditioning)
            latents = latents + (sampler.sigmas[i + 1] - sampler.sigmas[i]) * velocity
        expected[num_steps] = latents
    assert (expected[0] - expected[1]).abs().max() > 1e-2 < (expected[1] - expected[4]).abs().max()
    for fraction, num_steps in ((0.0, 0), (0.3, 1), (1.0, 4)):
        (latents,) = sampler.draw_latents(PROMPTS, SEEDS, network, fraction)
        torch.testing.assert_close(latents, expected[num_steps], rtol=0, atol=1e-5)


def test_rollout_and_training_share_a_forward_and_its_context(sampler):
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    lower = replace(sampler, forward_context=context, batch_size=3)
    noise = sampler.draw_noise([torch.Generator().manual_seed(seed) for seed in SEEDS])
    trajectory = lower.rollout(PROMPTS, noise, keep=[0])
    assert len(entered) == NUM_STEPS
    conditioning, denoiser = sampler.conditioning.get(PROMPTS), sampler.flow_model.denoiser.requires_grad_(True)
    velocity = lower.velocity(denoiser, noise, sampler.sigmas[0], conditioning)
    expected = noise + (sampler.sigmas[1] - sampler.sigmas[0]) * velocity
    assert torch.equal(trajectory.states[1], expected)  # with a gradient, to the last bit
    velocity.sum().backward()
    assert next(denoiser.parameters()).grad.any()
    assert not torch.equal(velocity, sampler.velocity(denoiser, noise, sampler.sigmas[0], conditioning))


def test_images_do_not_depend_on_the_batches(sampler):
    drawn = [torch.cat(list(replace(sampler, batch_size=size).draw_images(PROMPTS, SEEDS))) for size in (1, 3)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    assert not torch.equal(*drawn[0][:2])


@pytest.mark.parametrize("build", [tiny_flux_pipeline, tiny_qwen_image_pipeline, tiny_wan_pipeline])
def test_images_of_several_batches_are_the_batches_one_behind_the_other(build):
    """In one layout in memory, on which the last bits of sums depend."""
    flow_model = load_flow_model(build())
    frames = None if flow_model.default_num_frames is None else 5
    sampler = Sampler.from_settings(flow_model, NUM_STEPS, 32, 48, 3.0, batch_size=2, num_frames=frames)
    latents = sampler.draw_noise([torch.Generator().manual_seed(seed) for seed in range(5)])
    expected = torch.cat([flow_model.decode(part) for part in latents.split(2)])
    images = sampler.decode(latents)
    assert torch.equal(images, expected)
    assert images.is_contiguous() and sampler.decode(latents[:2]).is_contiguous()


def test_bad_input(sampler):
    noise = sampler.draw_noise([torch.Generator()] * 3)
    for call, message in (
        (lambda: list(sampler.draw_images(PROMPTS, [1, 2])), "2 seeds for 3 prompts"),
        (lambda: sampler.rollout(PROMPTS, noise[:2]), "noise of 2 rows for 3 prompts"),
        (lambda: sampler.rollout(PROMPTS, noise, generators=[torch.Generator()]), "generators of 1 rows for 3"),
        (lambda: sampler.rollout(PROMPTS, noise, groups=[0, 0]), "groups of 2 rows for 3"),
        (lambda: sampler.rollout(PROMPTS, noise, adapter_fraction=-0.1), r"must lie in \[0, 1\], got -0.1"),
        (lambda: sampler.rollout(PROMPTS, noise, adapter_fraction=0.5), "0.5 needs an adapter to switch off"),
        (
            lambda: sampler.rollout(PROMPTS, noise, transitions=transition_coefficients(sampler.sigmas, "flow")),
            "are stochastic",
        ),
        (lambda: replace(sampler, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: replace(sampler, size=(16, 18)), "width=18 is not possible"),
        (lambda: Sampler.from_settings(sampler.flow_model, 0), "num_inference_steps must be at least 1, got 0"),
        (lambda: Sampler.from_settings(sampler.flow_model, height=15), "height=15 is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
