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

"""The definition of a supported family: the very latents and images, or videos, of its own diffusers pipeline."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from tiny_models import (
    tiny_chroma_pipeline,
    tiny_flux2_klein_pipeline,
    tiny_flux2_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_krea2_pipeline,
    tiny_qwen_image_edit_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from trl_diffusion.data.prompt_images import with_image
from trl_diffusion.models import (
    ChromaFlowModel,
    FlowModel,
    Flux2FlowModel,
    Flux2KleinFlowModel,
    FluxFlowModel,
    FluxKontextFlowModel,
    Krea2FlowModel,
    QwenImageEditFlowModel,
    QwenImageEditPlusFlowModel,
    QwenImageFlowModel,
    Sampler,
    SanaFlowModel,
    SD3FlowModel,
    WanFlowModel,
    ZImageFlowModel,
    load_flow_model,
)
from trl_diffusion.models.vae_gradients import clamp_with_inward_gradient
from trl_diffusion.trainer.network import compile_blocks


PROMPTS = ["a small red circle on white", "a large blue square on black, seen from afar"]
NUM_STEPS = 5


def picture(width, height, colour):
    """A disc on a ground, with a corner of another colour, so that no turn of it is the same."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((2, 2, width - 3, height - 3), fill=colour)
    draw.rectangle((0, 0, width // 4, height // 4), fill="black")
    return image


# Of different aspects, so that the networks see images of different sizes.
PICTURES = [picture(40, 21, "red"), picture(33, 34, "blue")]


def edited(flow_model, prompts=PROMPTS, pictures=PICTURES):
    """The prompts with the images that they edit, where the model edits images."""
    if not flow_model.takes_image:
        return prompts
    return [with_image(prompt, pictures[i % len(pictures)]) for i, prompt in enumerate(prompts)]


def packed(pipeline, latents):
    """Latents of the VAE as tokens of 2 x 2."""
    return pipeline._pack_latents(latents, *latents.shape[:2], *latents.shape[-2:])


def flux2_packed(pipeline, latents):
    return pipeline._pack_latents(latents)


def flux2_decodable(pipeline, latents):
    """As its VAE takes them: scaled by the statistics of its batch norm, in 2 x 2 pixels."""
    norm = pipeline.vae.bn
    scale = (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
    return pipeline._unpatchify_latents(latents * scale + norm.running_mean.view(1, -1, 1, 1))


def as_lists(conditioning):
    """Each row of the embeddings without its padding."""
    return {
        name: [row[mask] for row, mask in zip(tensor, conditioning[f"{name}_mask"], strict=True)]
        for name, tensor in conditioning.items()
        if not name.endswith("_mask")
    }


def krea2_without_padding(inputs):
    """What its pipeline gives the network, without the padding between a prompt and the end of the template."""
    kept = inputs["encoder_attention_mask"]
    embeds = [row[mask] for row, mask in zip(inputs["encoder_hidden_states"], kept, strict=True)]
    lengths = kept.sum(1)
    return {
        **inputs,
        "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True),
        "encoder_attention_mask": torch.arange(lengths.max()) < lengths[:, None],
        "position_ids": inputs["position_ids"][kept.shape[1] - lengths.max() :],  # those of text are all 0
    }


@dataclass(frozen=True)
class Family:
    """A tiny pipeline with what its own call is told, and how its latents lie."""

    build: Callable
    model_class: type[FlowModel]
    guidance_scale: float
    height: int
    width: int
    arguments: dict[str, Any] = field(default_factory=dict)
    guided: bool = True  # whether guidance makes a difference
    unguided_scale: float = 1.0
    takes_negative_prompt: bool = False
    undistilled_model: str | None = None
    num_steps: int = 5
    comfyui: bool = True  # whether ComfyUI knows an adapter by its names
    guidance_argument: str = "guidance_scale"
    call: dict[str, Any] = field(default_factory=dict)
    layout: Callable = lambda pipeline, latents: latents
    answer_layout: Callable | None = None  # of the latents that the pipeline gives, where not that of those it takes
    inputs: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")  # latents, time and text
    time: Callable = lambda sigma: sigma
    pipeline_inputs: Callable = lambda inputs: inputs  # of the network, as far as they differ from ours
    embeddings: Callable = lambda conditioning: conditioning  # as the pipeline's call takes them
    card: dict[str, str] = field(
        default_factory=dict
    )  # changes of a card's example, to draw by the solver of a training
    passes_sigmas: bool = False  # whether the call needs them, because the scheduler makes others
    samples_images: bool = True  # whether images have a distribution of latents
    vae_block: Callable = lambda vae: vae.decoder.mid_block.resnets[0]
    frames: bool = False  # whether the VAE takes and gives videos
    num_frames: int | None = None  # of the videos that the pipeline makes
    max_sequence_length: int = 16  # short, to be quick
    size_call: Callable = lambda height, width: {"height": height, "width": width}

    @property
    def shape(self):
        """Of an image, or a video."""
        frames = () if self.num_frames is None else (self.num_frames,)
        return (*frames, 3, self.height, self.width)

    @property
    def results(self):
        """The name of images or videos in what the pipeline returns."""
        return "images" if self.num_frames is None else "frames"

    def result(self, output):
        return getattr(output, self.results)

    @property
    def runs_of_vae_block(self):
        """Each latent frame is decoded by itself."""
        return 1 if self.num_frames is None else (self.num_frames - 1) // 4 + 1


FLUX = {"build": tiny_flux_pipeline, "model_class": FluxFlowModel, "layout": packed}
SCHNELL = {**FLUX, "arguments": {"guidance_embeds": False}, "guided": False}
SD3 = {
    "build": tiny_sd3_pipeline,
    "model_class": SD3FlowModel,
    "time": lambda sigma: 1000 * sigma,
    "takes_negative_prompt": True,
}
QWEN_IMAGE = {
    "build": tiny_qwen_image_pipeline,
    "model_class": QwenImageFlowModel,
    "layout": packed,
    "guidance_argument": "true_cfg_scale",
    "call": {"negative_prompt": ""},
    "takes_negative_prompt": True,
    "frames": True,
    "max_sequence_length": 64,  # prompts keep their different lengths
}
CHROMA = {
    "build": tiny_chroma_pipeline,
    "model_class": ChromaFlowModel,
    "layout": packed,
    "takes_negative_prompt": True,
    "max_sequence_length": 48,
}
SANA = {
    "build": tiny_sana_pipeline,
    "model_class": SanaFlowModel,
    "time": lambda sigma: 1000 * sigma,
    "takes_negative_prompt": True,
    "call": {"negative_prompt": "", "use_resolution_binning": False},
    "embeddings": lambda conditioning: {**conditioning, "negative_prompt": None, "use_resolution_binning": False},
    "comfyui": False,
    "card": {
        "image = pipe(\n": "pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)\n"
        "image = pipe(\n    sigmas=[1.0, 0.75, 0.5, 0.25],\n"
    },
    "passes_sigmas": True,
    "samples_images": False,
    "vae_block": lambda vae: vae.decoder.up_blocks[2][0],
    "max_sequence_length": 64,
}
KREA2 = {
    "build": tiny_krea2_pipeline,
    "model_class": Krea2FlowModel,
    "layout": packed,
    "unguided_scale": 0.0,
    "takes_negative_prompt": True,
    "pipeline_inputs": krea2_without_padding,
    "frames": True,
    "max_sequence_length": 64,
}
KREA2_TURBO = {
    **KREA2,
    "arguments": {"is_distilled": True},
    "guided": False,
    "takes_negative_prompt": False,
    "undistilled_model": "krea/Krea-2-Raw",
}
FLUX2 = {
    "build": tiny_flux2_pipeline,
    "model_class": Flux2FlowModel,
    "answer_layout": flux2_packed,
    "max_sequence_length": 64,
}
KLEIN = {
    "build": tiny_flux2_klein_pipeline,
    "model_class": Flux2KleinFlowModel,
    "answer_layout": flux2_decodable,
    "max_sequence_length": 64,
}
KLEIN_DISTILLED = {
    **KLEIN,
    "arguments": {"is_distilled": True},
    "guided": False,
    "undistilled_model": "black-forest-labs/FLUX.2-klein-base-9B",
}
Z_IMAGE = {
    "build": tiny_z_image_pipeline,
    "model_class": ZImageFlowModel,
    "unguided_scale": 0.0,
    "takes_negative_prompt": True,
    "inputs": ("x", "t", "cap_feats"),
    "time": lambda sigma: 1 - sigma,
    "embeddings": as_lists,
    "max_sequence_length": 64,
}
Z_IMAGE_TURBO = {
    **Z_IMAGE,
    "arguments": {"shift": 3.0},
    "guided": False,
    "takes_negative_prompt": False,
    "undistilled_model": "Tongyi-MAI/Z-Image",
}
KONTEXT = {
    "build": tiny_flux_kontext_pipeline,
    "model_class": FluxKontextFlowModel,
    "layout": packed,
    "size_call": lambda height, width: {"height": height, "width": width, "max_area": height * width},
}
QWEN_IMAGE_EDIT_PLUS = {
    **QWEN_IMAGE,
    "build": tiny_qwen_image_edit_plus_pipeline,
    "model_class": QwenImageEditPlusFlowModel,
}
QWEN_IMAGE_EDIT = {
    **QWEN_IMAGE,
    "build": tiny_qwen_image_edit_pipeline,
    "model_class": QwenImageEditFlowModel,
}
WAN = {
    "build": tiny_wan_pipeline,
    "model_class": WanFlowModel,
    "time": lambda sigma: 1000 * sigma,
    "takes_negative_prompt": True,
    "call": {"negative_prompt": ""},
    "card": {
        "video = pipe(\n": "pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)\nvideo = pipe(\n",
        'export_to_video(video, "video.mp4", fps=16)': "",  # with a package that is not needed here
    },
    "frames": True,
    "max_sequence_length": 48,
}
WAN_5B = {
    **WAN,
    "arguments": {"expand_timesteps": True},
    "card": {
        **WAN["card"],
        "video = pipe(\n": "pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)\nvideo = pipe(\n",
    },
}

FAMILIES = {
    "flux-dev": Family(**FLUX, guidance_scale=3.5, height=16, width=16),
    "flux-dev-wide": Family(**FLUX, guidance_scale=3.5, height=16, width=24),
    "flux-dev-static-shift": Family(
        **FLUX, guidance_scale=2.0, height=24, width=16, arguments={"dynamic_shifting": False}
    ),
    "flux-schnell": Family(**SCHNELL, guidance_scale=1.0, height=16, width=16),
    "flux-schnell-wide": Family(**SCHNELL, guidance_scale=1.0, height=8, width=24),
    "sd3": Family(**SD3, guidance_scale=1.0, height=16, width=16),
    "sd3-guided": Family(**SD3, guidance_scale=5.0, height=16, width=16),
    "sd3-guided-wide": Family(**SD3, guidance_scale=5.0, height=16, width=24),
    "sd3-dynamic-shift": Family(**SD3, guidance_scale=5.0, height=24, width=16, arguments={"dynamic_shifting": True}),
    "qwen-image": Family(**QWEN_IMAGE, guidance_scale=1.0, height=16, width=16),
    "qwen-image-guided": Family(**QWEN_IMAGE, guidance_scale=4.0, height=16, width=24),
    "qwen-image-guided-high": Family(**QWEN_IMAGE, guidance_scale=4.0, height=24, width=16),
    "chroma": Family(**CHROMA, guidance_scale=1.0, height=16, width=16),
    "chroma-guided-wide": Family(**CHROMA, guidance_scale=5.0, height=16, width=24, num_steps=8),
    "chroma-static-shift": Family(
        **CHROMA, guidance_scale=5.0, height=24, width=16, arguments={"dynamic_shifting": False}
    ),
    "sana": Family(**SANA, guidance_scale=1.0, height=32, width=32),
    "sana-guided-wide": Family(**SANA, guidance_scale=4.5, height=32, width=64, num_steps=8),
    "krea2-raw": Family(**KREA2, guidance_scale=0.0, height=16, width=16),
    "krea2-raw-guided": Family(**KREA2, guidance_scale=4.5, height=16, width=24, num_steps=8),
    "krea2-raw-guided-high": Family(**KREA2, guidance_scale=0.5, height=24, width=16),
    "krea2-turbo": Family(**KREA2_TURBO, guidance_scale=0.0, height=24, width=16, num_steps=3),
    "flux2-dev": Family(**FLUX2, guidance_scale=4.0, height=16, width=24),
    "flux2-dev-high": Family(**FLUX2, guidance_scale=2.5, height=24, width=16, num_steps=8),
    "flux2-klein-base": Family(**KLEIN, guidance_scale=1.0, height=16, width=16),
    "flux2-klein-base-guided": Family(**KLEIN, guidance_scale=4.0, height=16, width=24, num_steps=8),
    "flux2-klein": Family(**KLEIN_DISTILLED, guidance_scale=1.0, height=24, width=16, num_steps=3),
    "z-image": Family(**Z_IMAGE, guidance_scale=0.0, height=24, width=16),
    "z-image-guided": Family(**Z_IMAGE, guidance_scale=5.0, height=16, width=24, num_steps=8),
    "z-image-guided-little": Family(**Z_IMAGE, guidance_scale=0.5, height=16, width=16),
    "z-image-turbo": Family(**Z_IMAGE_TURBO, guidance_scale=0.0, height=24, width=16, num_steps=4),
    "flux-kontext": Family(**KONTEXT, guidance_scale=3.5, height=16, width=24),
    "flux-kontext-high": Family(**KONTEXT, guidance_scale=1.0, height=24, width=16, num_steps=8),
    "flux-kontext-unguided": Family(
        **KONTEXT, guidance_scale=1.0, height=16, width=16, arguments={"guidance_embeds": False}, guided=False
    ),
    "qwen-image-edit-plus": Family(**QWEN_IMAGE_EDIT_PLUS, guidance_scale=1.0, height=16, width=16),
    "qwen-image-edit-plus-guided": Family(**QWEN_IMAGE_EDIT_PLUS, guidance_scale=4.0, height=16, width=24),
    "qwen-image-edit-plus-zero": Family(
        **QWEN_IMAGE_EDIT_PLUS, guidance_scale=4.0, height=24, width=16, arguments={"zero_cond_t": True}
    ),
    "qwen-image-edit": Family(**QWEN_IMAGE_EDIT, guidance_scale=4.0, height=24, width=16),
    "wan": Family(**WAN, guidance_scale=1.0, height=16, width=32, num_frames=9),
    "wan-guided-high": Family(**WAN, guidance_scale=5.0, height=32, width=16, num_frames=5),
    "wan-guided-image": Family(**WAN, guidance_scale=5.0, height=16, width=32, num_frames=1),
    "wan-5b-guided": Family(**WAN_5B, guidance_scale=5.0, height=32, width=64, num_frames=5),
}
# One row of each family, where the guidance and the size make no difference.
ONE_OF_EACH = [
    "flux-dev", "flux-schnell", "sd3-guided", "qwen-image-guided", "flux2-dev", "flux2-klein-base-guided", "flux2-klein",
    "z-image-guided", "z-image-turbo",
    "chroma-guided-wide", "sana-guided-wide", "krea2-raw-guided", "krea2-turbo", "flux-kontext",
    "qwen-image-edit-plus-guided", "wan-guided-high", "wan-5b-guided",
]  # fmt: skip


@pytest.fixture
def row(request):
    return FAMILIES[request.node.callspec.params["family"]]


@pytest.fixture(params=FAMILIES)
def family(request):
    row = FAMILIES[request.param]
    flow_model = load_flow_model(row.build(**row.arguments))
    assert type(flow_model) is row.model_class
    flow_model.max_sequence_length = row.max_sequence_length
    if row.num_frames is not None:
        flow_model.default_num_frames = row.num_frames
    return flow_model, row.guidance_scale, row.height, row.width


def one_of_each(function):
    return pytest.mark.parametrize("family", ONE_OF_EACH, indirect=True)(function)


def run_pipeline(row, flow_model, output_type="latent", num_inference_steps=None, guidance_scale=None, **source):
    """The pipeline's own latents (as tokens, where it packs them) or images."""
    if "latents" in source:
        source["latents"] = row.layout(flow_model.pipeline, source["latents"])
    steps = row.num_steps if num_inference_steps is None else num_inference_steps
    if row.passes_sigmas:
        source["sigmas"] = flow_model.unshifted_sigmas(steps)

    def run(prompts, **source):
        call = row.call
        if "negative_prompt" in call:  # some pipelines want as many as prompts
            call = {**call, "negative_prompt": [call["negative_prompt"]] * len(prompts)}
        if row.num_frames is not None:
            source["num_frames"] = row.num_frames
        output = flow_model.pipeline(
            prompt=list(prompts),  # some pipelines change the list
            **row.size_call(row.height, row.width),
            num_inference_steps=steps,
            max_sequence_length=flow_model.max_sequence_length,
            output_type=output_type,
            **{row.guidance_argument: row.guidance_scale if guidance_scale is None else guidance_scale, **call},
            **source,
        )
        return row.result(output)

    if not flow_model.takes_image:
        return run(PROMPTS, **source)
    # The pipelines take one prompt, or give all images the size of the first.
    parts = []
    for i, prompt in enumerate(PROMPTS):
        own = {**source, "latents": source["latents"][i : i + 1]} if "latents" in source else source
        parts.append(run([prompt], image=PICTURES[i], **own))
    return torch.cat(parts)


def run_euler(flow_model, denoiser, latents, guidance_scale, height, width, num_steps=NUM_STEPS):
    sigmas = flow_model.schedule(num_steps, height, width)
    conditioning = flow_model.encode_prompt(edited(flow_model))
    for i in range(num_steps):
        velocity = flow_model.velocity(denoiser, latents, sigmas[i], conditioning, guidance_scale)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    return latents


def network_inputs(flow_model, run):
    """The tensors that the network is called with first, and the lists of them."""
    calls = []
    signature = inspect.signature(flow_model.denoiser.forward)
    handle = flow_model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(signature.bind(*args, **kwargs).arguments), with_kwargs=True
    )
    with torch.no_grad():
        run()
    handle.remove()
    # Before a network changes its lists.
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in calls[0].items()
        if isinstance(value, torch.Tensor | list)
    }


@torch.no_grad()
def test_rollout_and_image_are_those_of_the_pipeline(family, row):
    flow_model, guidance_scale, height, width = family
    flow_model.check_size(height, width)
    noise = flow_model.draw_noise(len(PROMPTS), height, width, torch.Generator().manual_seed(0))
    assert noise.shape == (len(PROMPTS), *flow_model.latent_shape(height, width))
    latents = run_euler(flow_model, flow_model.denoiser, noise, guidance_scale, height, width, row.num_steps)
    images = flow_model.decode(latents)

    expected_latents = run_pipeline(row, flow_model, latents=noise)
    expected_images = run_pipeline(row, flow_model, "pt", latents=noise)
    assert latents.dtype == images.dtype == torch.float32
    assert images.shape == (len(PROMPTS), *row.shape)
    layout = row.answer_layout or row.layout
    packed_noise, packed_latents = (layout(flow_model.pipeline, tensor) for tensor in (noise, latents))
    assert (expected_latents - packed_noise).abs().max() > 0.1, (
        "the pipeline did nothing: the test would prove nothing"
    )
    torch.testing.assert_close(packed_latents, expected_latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(images, expected_images, rtol=0, atol=1e-5)


@torch.no_grad()
def test_noise_is_that_of_the_pipeline(family, row):
    flow_model, _, height, width = family
    with_latents, with_generator = (
        run_pipeline(row, flow_model, num_inference_steps=2, **source)
        for source in (
            {"latents": flow_model.draw_noise(2, height, width, torch.Generator().manual_seed(3))},
            {"generator": torch.Generator().manual_seed(3)},
        )
    )
    assert torch.equal(with_latents, with_generator)


def test_noise_of_a_sample_does_not_depend_on_its_batch(family):
    flow_model, _, height, width = family
    together = flow_model.draw_noise(4, height, width, [torch.Generator().manual_seed(i) for i in range(4)])
    alone = [flow_model.draw_noise(1, height, width, [torch.Generator().manual_seed(i)]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="3 generators for 4 samples"):
        flow_model.draw_noise(4, height, width, [torch.Generator() for _ in range(3)])


@torch.no_grad()
def test_rows_of_different_sigma_equal_separate_calls(family):
    flow_model, guidance_scale, height, width = family
    latents = flow_model.draw_noise(2, height, width)
    conditioning = flow_model.encode_prompt(edited(flow_model))
    sigma = torch.tensor([0.913, 0.127])
    together = flow_model.velocity(flow_model.denoiser, latents, sigma, conditioning, guidance_scale)
    for i in range(2):
        # Encoded alone: of its own length.
        alone = flow_model.encode_prompt(edited(flow_model)[i : i + 1])
        velocity = flow_model.velocity(flow_model.denoiser, latents[i : i + 1], sigma[i], alone, guidance_scale)
        torch.testing.assert_close(together[i : i + 1], velocity, rtol=0, atol=1e-5)
    swapped = flow_model.velocity(flow_model.denoiser, latents, sigma.flip(0), conditioning, guidance_scale)
    assert (swapped - together).abs().max() > 1e-3


@one_of_each
@torch.no_grad()
def test_the_network_gets_the_exact_sigma(family, row):
    flow_model, guidance_scale, height, width = family
    sigma = torch.tensor(0.9876543)
    latents = flow_model.draw_noise(2, height, width)
    conditioning = flow_model.encode_prompt(edited(flow_model))
    seen = network_inputs(
        flow_model, lambda: flow_model.velocity(flow_model.denoiser, latents, sigma, conditioning, guidance_scale)
    )[row.inputs[1]]
    assert seen.dtype == torch.float32
    assert torch.equal(seen, row.time(sigma).expand(seen.shape))


@torch.no_grad()
def test_guidance_reaches_the_network_only_where_the_family_has_it(family, row):
    flow_model, _, height, width = family
    latents = flow_model.draw_noise(2, height, width)
    conditioning = flow_model.encode_prompt(edited(flow_model))
    low, high = (
        flow_model.velocity(flow_model.denoiser, latents, torch.tensor(0.5), conditioning, guidance_scale)
        for guidance_scale in (row.unguided_scale, 5.0)
    )
    assert torch.equal(low, high) != row.guided


@one_of_each
def test_guidance_is_refused_where_there_is_none(family, row):
    flow_model, guidance_scale, height, width = family
    settings = {"num_inference_steps": 4, "height": height, "width": width}
    assert Sampler.from_settings(flow_model, **settings).guidance_scale == flow_model.default_guidance_scale
    if row.guided:
        assert Sampler.from_settings(flow_model, guidance_scale=5.0, **settings).guidance_scale == 5.0
        return
    assert flow_model.default_guidance_scale == row.unguided_scale
    with pytest.raises(ValueError, match=f"guidance_scale=5.0 does not fit this .* set it to {row.unguided_scale}"):
        Sampler.from_settings(flow_model, guidance_scale=5.0, **settings)


@one_of_each
def test_a_distilled_model_names_the_one_to_train(family, row):
    assert family[0].undistilled_model == row.undistilled_model


@one_of_each
def test_the_network_gets_what_the_pipeline_gives_it(family, row):
    flow_model, _, height, width = family
    # Those with images of different sizes go through the network one by one, as they do in their pipelines.
    count = 1 if flow_model.takes_image else len(PROMPTS)
    conditioning = flow_model.encode_prompt(edited(flow_model)[:count])
    assert not any(tensor.requires_grad for tensor in conditioning.values())
    noise = flow_model.draw_noise(2, height, width)
    sigma = flow_model.schedule(NUM_STEPS, height, width)[0]
    actual = network_inputs(
        flow_model,
        lambda: flow_model.velocity(flow_model.denoiser, noise[:count], sigma, conditioning, row.unguided_scale),
    )
    expected = network_inputs(
        flow_model,
        lambda: run_pipeline(
            row, flow_model, num_inference_steps=NUM_STEPS, latents=noise, guidance_scale=row.unguided_scale
        ),
    )
    if count == 1:  # a mask that lets everything through is none
        assert all(actual.pop(name).all() for name in actual.keys() - expected.keys())
    assert actual.keys() == expected.keys() >= set(row.inputs)
    for name, tensor in row.pipeline_inputs(expected).items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, check_dtype=False)
    if count > 1:
        first, second = actual[row.inputs[2]]
        assert first.shape != second.shape or not torch.equal(first, second)
    # Autocast must not reach the text encoders.
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = flow_model.encode_prompt(edited(flow_model)[:count])
    assert under_autocast.keys() == conditioning.keys()
    for name, tensor in conditioning.items():
        assert torch.equal(under_autocast[name], tensor)


def test_encode_and_decode_invert_each_others_layout(family, row):
    flow_model, _, height, width = family
    images = torch.rand(2, *row.shape, generator=torch.Generator().manual_seed(0))
    latents = flow_model.encode_image(images)
    assert latents.dtype == torch.float32
    assert latents.shape == flow_model.draw_noise(2, height, width).shape

    # Truth: the VAE and the image processor of the pipeline, used by hand.
    is_video = row.num_frames is not None
    vae = flow_model.vae
    processor = flow_model.pipeline.video_processor if is_video else flow_model.pipeline.image_processor
    with torch.no_grad():
        pixels = processor.normalize(images)
        if row.frames:
            pixels = pixels.transpose(1, 2) if is_video else pixels.unsqueeze(2)
        encoded = vae.encode(pixels)
        raw = encoded.latent_dist.mode() if row.samples_images else encoded.latent
        restored = vae.decode(raw).sample
        if row.frames:
            restored = restored.transpose(1, 2) if is_video else restored.squeeze(2)
        expected = processor.denormalize(restored)
        decoded = flow_model.decode(latents)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)

    sampled = [flow_model.encode_image(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0], sampled[2]) != row.samples_images
    assert torch.equal(sampled[0], latents) != row.samples_images


@one_of_each
def test_gradient_through_decode(family):
    flow_model, _, height, width = family
    latents = flow_model.draw_noise(1, height, width).requires_grad_()
    images = flow_model.decode(latents)
    free = ((images > 0.05) & (images < 0.95)).detach()  # of the clamp, which has a kink
    assert free.float().mean() > 0.9
    images[free].mean().backward()
    # Along the gradient itself, where a finite difference is largest.
    direction = latents.grad / latents.grad.norm()
    step = 1e-2
    with torch.no_grad():
        plus, minus = (flow_model.decode(latents + sign * step * direction)[free].double().mean() for sign in (1, -1))
    torch.testing.assert_close((plus - minus) / (2 * step), latents.grad.norm().double(), rtol=1e-2, atol=0)
    assert all(parameter.grad is None for parameter in flow_model.vae.parameters())


@one_of_each
def test_vae_gradient_checkpointing_recomputes_and_gives_the_same_gradient(family, row):
    flow_model, _, height, width = family
    latents = flow_model.draw_noise(1, height, width)
    calls = []
    row.vae_block(flow_model.vae).register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient():
        calls.clear()
        leaf = latents.clone().requires_grad_()
        flow_model.decode(leaf).square().sum().backward()
        return leaf.grad, len(calls)

    expected, once = gradient()
    flow_model.enable_vae_gradient_checkpointing()
    actual, twice = gradient()
    assert not flow_model.vae.training
    assert (once, twice) == (row.runs_of_vae_block, 2 * row.runs_of_vae_block)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@one_of_each
def test_gradient_checkpointing_changes_nothing(family):
    """Neither the velocity nor, where several forwards wait for one backward, the gradient."""
    flow_model, guidance_scale, height, width = family
    flow_model.denoiser.requires_grad_(True)
    latents = flow_model.draw_noise(len(PROMPTS), height, width, torch.Generator().manual_seed(0))
    prompts = edited(flow_model)
    conditionings = [flow_model.encode_prompt(part) for part in (prompts, prompts[::-1])]

    def velocity_and_gradient():
        flow_model.denoiser.zero_grad()
        velocities = [
            flow_model.velocity(flow_model.denoiser, latents, torch.tensor(0.5), conditioning, guidance_scale)
            for conditioning in conditionings
        ]
        torch.cat(velocities).square().sum().backward()
        gradients = [p.grad.flatten() for p in flow_model.denoiser.parameters() if p.grad is not None]
        return torch.cat(velocities), torch.cat(gradients)

    expected = velocity_and_gradient()
    flow_model.enable_gradient_checkpointing()
    assert flow_model.denoiser.is_gradient_checkpointing
    for tensor, plain in zip(velocity_and_gradient(), expected, strict=True):
        torch.testing.assert_close(tensor, plain, rtol=1e-5, atol=1e-6)


@one_of_each
def test_adapter_wraps_every_attention_layer_and_trains(family):
    flow_model, guidance_scale, height, width = family
    linear = {
        name
        for name, module in flow_model.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and {"attn", "attn1", "attn2", "attention"} & set(name.split("."))
    }
    noise = flow_model.draw_noise(len(PROMPTS), height, width)
    with torch.no_grad():
        before = run_euler(flow_model, flow_model.denoiser, noise, guidance_scale, height, width)
    model = get_peft_model(flow_model.denoiser, LoraConfig(r=2, target_modules=flow_model.lora_target_modules))
    flow_model.freeze_unused(model)
    assert {name.removeprefix("base_model.model.") for name in model.targeted_module_names} == linear
    after = run_euler(flow_model, model, noise, guidance_scale, height, width)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # B is zero at the start
    assert_every_trainable_parameter_gets_a_gradient(model, after)


@one_of_each
def test_every_parameter_trains(family):
    flow_model, guidance_scale, height, width = family
    flow_model.freeze_unused(flow_model.denoiser.requires_grad_(True))
    noise = flow_model.draw_noise(len(PROMPTS), height, width)
    after = run_euler(flow_model, flow_model.denoiser, noise, guidance_scale, height, width)
    assert_every_trainable_parameter_gets_a_gradient(flow_model.denoiser, after)


def assert_every_trainable_parameter_gets_a_gradient(model, output):
    """DDP would wait for one that gets none."""
    output.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def test_only_unused_parameters_are_taken_for_unused(family):
    """Whatever they hold, the network answers the same."""
    flow_model, guidance_scale, height, width = family
    latents = flow_model.draw_noise(2, height, width)
    conditioning = flow_model.encode_prompt(edited(flow_model))
    arguments = (flow_model.denoiser, latents, torch.tensor(0.5), conditioning, guidance_scale)
    before = flow_model.velocity(*arguments)
    for name, parameter in flow_model.denoiser.named_parameters():
        if flow_model.is_unused(name):
            parameter += 1
    assert torch.equal(flow_model.velocity(*arguments), before)


@one_of_each
@torch.no_grad()
def test_bfloat16_network_keeps_latents_in_float32(family):
    flow_model, guidance_scale, height, width = family
    noise = flow_model.draw_noise(len(PROMPTS), height, width)
    expected = run_euler(flow_model, flow_model.denoiser, noise, guidance_scale, height, width)
    half = load_flow_model(copy.deepcopy(flow_model.pipeline).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    latents = run_euler(half, half.denoiser, noise, guidance_scale, height, width)
    images = half.decode(latents)
    assert latents.dtype == images.dtype == half.encode_image(images).dtype == torch.float32
    # Random weights make much of rounding, and guidance more; other latents would be a distance of 1.4 apart.
    assert 0 < (latents - expected).norm() / expected.norm() < 0.5


@one_of_each
def test_the_blocks_are_compiled(family):
    denoiser = family[0].denoiser
    names = list(denoiser.state_dict())
    compile_blocks(denoiser)
    compiled = {type(module).__name__ for module in denoiser.modules() if module._compiled_call_impl is not None}
    # Stable Diffusion 3 and Sana do not tell diffusers which are repeated.
    assert compiled >= set(denoiser._repeated_blocks or denoiser._no_split_modules[:1])
    assert list(denoiser.state_dict()) == names


def test_a_network_without_blocks_is_not_compiled_in_silence():
    with pytest.raises(ValueError, match="compile_denoiser=True has no effect on a Linear"):
        compile_blocks(torch.nn.Linear(1, 1))


def test_everything_is_frozen_and_in_eval_mode(family):
    flow_model, *_ = family
    modules = [part for part in flow_model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 2 + len(flow_model.text_encoders) > 2
    assert not any(module.training for module in modules)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


@one_of_each
def test_free_text_encoders(family, row):
    flow_model, guidance_scale, height, width = family
    conditioning = flow_model.encode_prompt(edited(flow_model))
    flow_model.free_text_encoders()
    left = {name for name, module in flow_model.pipeline.components.items() if isinstance(module, torch.nn.Module)}
    assert left == {"transformer", "vae"}
    with pytest.raises(RuntimeError, match="freed"):
        flow_model.encode_prompt(edited(flow_model))
    # What sample images need still works: the pipeline, from embeddings.
    guided = guidance_scale > row.unguided_scale
    arguments = {name: tensor for name, tensor in conditioning.items() if guided or "neg" not in name}
    frames = {} if row.num_frames is None else {"num_frames": row.num_frames}

    def images_of(embeddings, **image):
        output = flow_model.pipeline(
            **row.embeddings(embeddings),
            **{row.guidance_argument: guidance_scale},
            **row.size_call(height, width),
            **image,
            **frames,
            num_inference_steps=2,
            output_type="pt",
        )
        return row.result(output)

    if flow_model.takes_image:
        own = {name: tensor for name, tensor in arguments.items() if "image" not in name}
        images = torch.cat(
            [
                images_of({name: tensor[i : i + 1] for name, tensor in own.items()}, image=picture)
                for i, picture in enumerate(PICTURES)
            ]
        )
    else:
        images = images_of(arguments)
    assert images.shape == (2, *row.shape)


@one_of_each
@torch.no_grad()
@pytest.mark.parametrize("num_steps", [2, 9])
def test_schedule_is_that_of_the_pipeline(family, row, num_steps):
    flow_model, _, height, width = family
    run_pipeline(row, flow_model, num_inference_steps=num_steps)
    assert torch.equal(flow_model.pipeline.scheduler.sigmas, flow_model.schedule(num_steps, height, width))


@one_of_each
def test_schedule_leaves_the_pipelines_scheduler_alone(family):
    flow_model, _, height, width = family
    scheduler = flow_model.pipeline.scheduler
    scheduler.set_timesteps(3, mu=0.5 if scheduler.config.use_dynamic_shifting else None)
    before = scheduler.sigmas.clone()
    sigmas = flow_model.schedule(7, height, width)
    assert torch.equal(scheduler.sigmas, before)
    assert sigmas.shape == (8,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@torch.no_grad()
def test_negative_prompt_is_that_of_the_pipeline(family, row):
    flow_model, guidance_scale, height, width = family
    if not row.takes_negative_prompt:
        pipeline_name = type(flow_model.pipeline).__name__
        before = flow_model.negative_prompt
        with pytest.raises(ValueError, match=f"negative_prompt='dull' has no effect with (a|this) {pipeline_name}"):
            flow_model.negative_prompt = "dull"
        assert flow_model.negative_prompt == before
        return
    noise = flow_model.draw_noise(len(PROMPTS), height, width, torch.Generator().manual_seed(0))
    arguments = (flow_model, flow_model.denoiser, noise, guidance_scale, height, width, row.num_steps)
    without = run_euler(*arguments)
    flow_model.negative_prompt = "dull, longer than the longest of the prompts by far"
    latents = run_euler(*arguments)
    call = flow_model.guidance_arguments(guidance_scale)
    expected = run_pipeline(replace(row, call=call), flow_model, latents=noise)
    torch.testing.assert_close(row.layout(flow_model.pipeline, latents), expected, rtol=0, atol=1e-5)
    assert torch.equal(without, latents) == (guidance_scale == row.unguided_scale)


@torch.no_grad()
def test_padding_changes_nothing():
    """A row in a longer batch is the row alone; at one length it is so to the last bit."""
    flow_model = load_flow_model(tiny_qwen_image_pipeline())
    rows = flow_model.encode_rows(["a cat", "a cat on a hill in the rain", ""])
    assert [flow_model.row_length(row) for row in rows] == [10, 29, 5]
    latents = flow_model.draw_noise(3, 16, 24, torch.Generator().manual_seed(0))

    def velocity(part, length=None):
        conditioning = flow_model.collate(rows[part], length)
        return flow_model.velocity(flow_model.denoiser, latents[part], torch.tensor(0.5), conditioning, 1.0)

    together = velocity(slice(0, 3))
    for i in range(3):
        torch.testing.assert_close(velocity(slice(i, i + 1)), together[i : i + 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(velocity(slice(i, i + 1), 40), together[i : i + 1], rtol=0, atol=1e-5)
    assert torch.equal(velocity(slice(0, 2), 29), velocity(slice(0, 2)))


def test_clamp_lets_the_gradient_through_that_leads_back_inside():
    x = torch.tensor([-2.0, -2.0, -1.0, 0.5, 0.5, 1.0, 3.0, 3.0], requires_grad=True)
    gradient = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    clamped = clamp_with_inward_gradient(x, -1, 1)
    assert clamped.tolist() == [-1, -1, -1, 0.5, 0.5, 1, 1, 1]
    clamped.backward(gradient)
    # A step goes against the gradient: from -2 upwards, from 3 downwards, and anywhere from within.
    assert x.grad.tolist() == [0, -1, 1, 1, -1, -1, 1, 0]


def test_a_saturated_pixel_can_come_back():
    """The VAE clamps in its own decode; its gradient is what leads pixels back inside, and nothing else."""
    flow_model = load_flow_model(tiny_qwen_image_pipeline())
    with torch.no_grad():
        flow_model.vae.decoder.conv_out.bias += 5  # every pixel is white
    latents = flow_model.draw_noise(1, 16, 16).requires_grad_()
    images = flow_model.decode(latents)
    assert (images == 1).all()
    (darker,) = torch.autograd.grad(images.sum(), latents, retain_graph=True)
    (brighter,) = torch.autograd.grad(-images.sum(), latents)
    assert darker.any() and not brighter.any()


def test_defaults():
    dev, schnell = load_flow_model(tiny_flux_pipeline()), load_flow_model(tiny_flux_pipeline(guidance_embeds=False))
    sd3, qwen_image = load_flow_model(tiny_sd3_pipeline()), load_flow_model(tiny_qwen_image_pipeline())
    models = (dev, schnell, sd3, qwen_image)
    assert [model.default_guidance_scale for model in models] == [3.5, 1.0, 7.0, 4.0]
    assert [model.negative_prompt for model in models] == [None, None, "", ""]
    assert [model.latent_downsample for model in models] == [4, 4, 4, 4]
    assert qwen_image.max_sequence_length == 512
    assert qwen_image.default_size == (256, 256)
    assert dev.max_sequence_length == dev.tokenizers["tokenizer_2"].model_max_length == 48
    assert sd3.max_sequence_length == 256
    assert dev.default_size == (256, 256)  # as FluxPipeline: 128 latents of 2 pixels here, of 8 in the real one
    assert sd3.default_size == (16, 16)
    flux2, klein, z_image = map(
        load_flow_model, (tiny_flux2_pipeline(), tiny_flux2_klein_pipeline(), tiny_z_image_pipeline())
    )
    assert [model.default_guidance_scale for model in (flux2, klein, z_image)] == [4.0, 4.0, 5.0]
    assert [model.negative_prompt for model in (flux2, klein, z_image)] == [None, "", ""]
    assert [model.max_sequence_length for model in (flux2, klein, z_image)] == [512, 512, 512]
    assert [model.default_size for model in (flux2, klein, z_image)] == [(256, 256), (256, 256), (1024, 1024)]
    assert [model.latent_downsample for model in (flux2, klein, z_image)] == [4, 4, 4]
    assert [model.distilled_model for model in (klein, z_image)] == [
        "black-forest-labs/FLUX.2-klein-9B", "Tongyi-MAI/Z-Image-Turbo",
    ]  # fmt: skip
    chroma, sana, krea2 = map(load_flow_model, (tiny_chroma_pipeline(), tiny_sana_pipeline(), tiny_krea2_pipeline()))
    assert [model.default_guidance_scale for model in (chroma, sana, krea2)] == [5.0, 4.5, 4.5]
    assert [model.max_sequence_length for model in (chroma, sana, krea2)] == [512, 300, 512]
    assert [model.default_size for model in (chroma, sana, krea2)] == [(256, 256), (32, 32), (1024, 1024)]
    assert [model.latent_downsample for model in (chroma, sana, krea2)] == [4, 4, 4]
    assert krea2.distilled_model == "krea/Krea-2-Turbo"


@pytest.mark.parametrize(
    ("build", "height", "width", "message"),
    [
        (tiny_flux_pipeline, 18, 16, "height=18 .* multiple of 4.* Nearest: 16 and 20"),
        (tiny_flux_pipeline, 16, 3, "width=3 .* Nearest: 4"),
        (tiny_flux_pipeline, 0, 16, "height=0 .* Nearest: 4"),
        (tiny_qwen_image_pipeline, 16, 18, "width=18 .* Nearest: 16 and 20"),
        (tiny_sd3_pipeline, 16, -8, "width=-8 .* Nearest: 4"),
        (tiny_sd3_pipeline, 36, 16, "height=36 is too large .* 32 pixels"),
        (tiny_flux2_pipeline, 16, 18, "width=18 .* Nearest: 16 and 20"),
        (tiny_sana_pipeline, 16, 18, "width=18 .* Nearest: 16 and 20"),
        (tiny_z_image_pipeline, 260, 16, "height=260 is too large .* 256 pixels"),
    ],
)
def test_impossible_sizes_name_the_value_and_the_nearest(build, height, width, message):
    flow_model = load_flow_model(build())
    with pytest.raises(ValueError, match=message):
        flow_model.check_size(height, width)
    if height > 0 and width > 0:
        with pytest.raises(ValueError, match=message):
            flow_model.encode_image(torch.rand(1, 3, height, width))


def test_largest_size_works():
    flow_model = load_flow_model(tiny_sd3_pipeline())
    assert flow_model.max_size == 32
    flow_model.check_size(32, 32)
    latents = flow_model.draw_noise(1, 32, 32)
    conditioning = flow_model.encode_prompt(["a"])
    velocity = flow_model.velocity(flow_model.denoiser, latents, torch.tensor(0.5), conditioning, 1.0)
    assert velocity.shape == latents.shape


@pytest.mark.parametrize(
    "family", [name for name in ONE_OF_EACH if FAMILIES[name].model_class.takes_image], indirect=True
)
@torch.no_grad()
def test_each_row_sees_its_own_image(family):
    """Of any size, whatever images the rows beside have, and in whatever order."""
    flow_model, guidance_scale, height, width = family
    pictures = [*PICTURES, picture(20, 20, "red"), PICTURES[0]]
    prompts = edited(flow_model, 4 * ["a"], pictures)
    latents = flow_model.draw_noise(1, height, width).expand(4, *flow_model.latent_shape(height, width))

    def velocity(rows):
        conditioning = flow_model.encode_prompt([prompts[row] for row in rows])
        return flow_model.velocity(
            flow_model.denoiser, latents[: len(rows)], torch.tensor(0.5), conditioning, guidance_scale
        )

    together = velocity(range(4))
    assert torch.equal(together[0], together[3])
    assert min((together[0] - together[i]).abs().max() for i in (1, 2)) > 1e-3
    for row in range(4):
        torch.testing.assert_close(velocity([row])[0], together[row], rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity([2, 0, 1]), together[[2, 0, 1]], rtol=0, atol=1e-5)


def test_a_family_says_whether_it_edits_images():
    kontext, flux = tiny_flux_kontext_pipeline(), tiny_flux_pipeline()
    assert load_flow_model(kontext, has_condition_image=True).takes_image
    with pytest.raises(ValueError, match="A FluxKontextPipeline edits images, and there is no condition_image. Add"):
        load_flow_model(kontext, has_condition_image=False)
    with pytest.raises(ValueError, match="There is a condition_image, but a FluxPipeline draws from prompts alone"):
        load_flow_model(flux, has_condition_image=True)
