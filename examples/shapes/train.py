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
Trains the embedded world of `trl_diffusion.shapes` from nothing, on the CPU, in about half an hour on two cores:

    python examples/shapes/train.py --output_dir shapes-weights

Stages: "encoder" (of the factor-4 autoencoder; written down, not trained), "decoder", "flux" and "refine" (transformer
and text encoders, jointly, on latents with captions that are wrong at random), "clip" (the reward `shapes-clip`) and "report"
(measures everything by the judge, writes `report.json` and a grid of samples beside this script). The transformer
needs the encoder alone, so it trains beside decoder and reward, each process on one core. Seeds are fixed. Without
`--output_dir` the weights in the package are replaced.
"""

import argparse
import copy
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from trl_diffusion.metrics import mean_interval
from trl_diffusion.shapes import ALL_SCENES, ATTRIBUTES, STYLES, draw, judge, load_dataset, pipeline_path, preprocess


WRONG_CAPTIONS = 0.27  # chance that one attribute of a caption is replaced by another value
TEXT_LENGTH = 12  # tokens of both of the pipeline's text encoders
CLIP_TEXT_LENGTH = 32  # tokens of shapes-clip, which also reads control words
LATENTS = 12  # channels of the autoencoder
WIDTH = 64  # of every text encoder
SIGMA_SHIFT = 3.0


def world_words() -> list[str]:
    words = {word for scene in ALL_SCENES for word in scene.caption.split()}
    return sorted(words | set(STYLES))


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer in which each word of the world is one token; other words fall into pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer_tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    trainer_tokenizer.train_from_iterator(world_words(), trainer)
    merges = [tuple(merge) for merge in json.loads(trainer_tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [token + "</w>" for token in alphabet] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int) -> T5TokenizerFast:
    """A T5 tokenizer with one piece per word of the world; any other word becomes the unknown token."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    vocab += [(f"▁{word}", -1.0) for word in world_words()]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(TEXT_LENGTH), t5_tokenizer(TEXT_LENGTH)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENTS,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # Blocks that start as the identity train faster.
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SIGMA_SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def draw_world(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`number` pictures (uint8, to save memory), their scenes (indices into ALL_SCENES) and styles (into STYLES)."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randint(len(ALL_SCENES), (number,), generator=generator)
    styles = torch.randint(len(STYLES), (number,), generator=generator)
    images = []
    for start in tqdm(range(0, number, 256), desc="drawing"):
        rows = slice(start, start + 256)
        drawn = draw([ALL_SCENES[i] for i in scenes[rows]], [STYLES[i] for i in styles[rows]], generator)
        images.append((drawn * 255).round().to(torch.uint8))
    return torch.cat(images), scenes, styles


def learning_rate(step: int, num_steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


@torch.no_grad()
def write_linear_encoder(vae: AutoencoderKL, images: Tensor) -> None:
    """
    Write a linear encoder into the autoencoder: the principal components of 4x4 patches, each scaled to the square root
    of its standard deviation (strong components stay stronger, so a generator can draw them first).

    No training finds sharper latents of so few channels, and there is nothing to wait for: the transformer can be
    trained on them at once. The strided convolutions gather pixels into channels, the residual branches are zero. What
    remains is the norm and the SiLU before the last convolution: pairs of channels x and -x next to a large constant
    pass the norm unchanged (to one part in a thousand), and SiLU(x) - SiLU(-x) = x.
    """
    patches = functional.pixel_unshuffle(functional.pixel_unshuffle(images, 2), 2).movedim(1, -1).flatten(0, -2)
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    variance, components = torch.linalg.eigh(covariance.double())
    variance, components = variance.flip(0)[:LATENTS].float(), components.flip(1)[:, :LATENTS].float()
    project = components / variance.clamp(min=1e-8).pow(0.25)  # (48, LATENTS)

    encoder = vae.encoder
    for block in [*encoder.down_blocks, encoder.mid_block]:
        for resnet in block.resnets:
            resnet.conv2.weight.zero_()
            resnet.conv2.bias.zero_()
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight.zero_()
                resnet.conv_shortcut.bias.zero_()

    def identity(weight: Tensor, channels: int) -> None:
        center = weight.shape[-1] // 2
        weight[torch.arange(channels), torch.arange(channels), center, center] = 1

    encoder.conv_in.weight.zero_()
    encoder.conv_in.bias.zero_()
    identity(encoder.conv_in.weight, 3)
    for block, channels in zip(encoder.down_blocks, (3, 12), strict=False):
        conv = block.downsamplers[0].conv
        conv.weight.zero_()
        conv.bias.zero_()
        for channel in range(channels):
            for y in range(2):
                for x in range(2):
                    # The padding is on the right and below, so the window starts at the pixel itself.
                    conv.weight[4 * channel + 2 * y + x, channel, y, x] = 1
    identity(encoder.down_blocks[1].resnets[0].conv_shortcut.weight, 12)

    constant, groups = 30.0, encoder.conv_norm_out.num_groups
    shortcut = encoder.down_blocks[2].resnets[0].conv_shortcut
    size, share = shortcut.out_channels // groups, LATENTS // groups
    conv_out = encoder.conv_out
    conv_out.weight.zero_()
    conv_out.bias.zero_()
    conv_out.bias[LATENTS:] = -10.0  # log-variance: the encoder is all but deterministic
    for latent in range(LATENTS):
        group, place = divmod(latent, share)
        for offset, sign in ((0, 1.0), (1, -1.0)):
            channel = group * size + 2 * place + offset
            shortcut.weight[channel, :, 0, 0] = sign * project[:, latent]
            shortcut.bias[channel] = -sign * mean @ project[:, latent]
            conv_out.weight[latent, channel, 1, 1] = sign
    for group in range(groups):
        for offset, sign in ((1, 1.0), (2, -1.0)):
            shortcut.bias[(group + 1) * size - offset] = sign * constant
    encoder.conv_norm_out.weight.fill_(constant * math.sqrt(2 / size))
    encoder.conv_norm_out.bias.zero_()
    encoder.requires_grad_(False)

    latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def world_images(number: int, seed: int) -> Tensor:
    """Pictures in [-1, 1], as the autoencoder takes them."""
    return draw_world(number, seed)[0] / 127.5 - 1


def write_encoder(output_dir: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    write_linear_encoder(vae, world_images(4096, seed=1))
    vae.save_pretrained(output_dir / "pipeline" / "vae")


def train_decoder(output_dir: Path, num_steps: int, num_images: int, batch_size: int = 32) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(output_dir / "pipeline" / "vae")
    images = world_images(num_images, seed=1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(256)])
    spread = latents.std(dim=(0, 2, 3), keepdim=True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, num_steps))
    progress = tqdm(range(num_steps), desc="decoder")
    for step in progress:
        rows = torch.randint(len(images), (batch_size,))
        # Decoding slightly wrong latents keeps the decoder smooth around the data, where a generator will land.
        noise = 0.05 * torch.rand(batch_size, 1, 1, 1) * spread * torch.randn_like(latents[rows])
        error = vae.decode(latents[rows] + noise).sample - images[rows]
        # Slopes count as well as levels, for sharp edges.
        slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + slopes
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            progress.set_postfix(l1=f"{error.abs().mean().item():.4f}")
    vae.half().save_pretrained(output_dir / "pipeline" / "vae")
    forget_paths(output_dir / "pipeline" / "vae")


def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 images to scaled latents as the transformer sees them, shape (B, 16, 4 * LATENTS)."""
    latents = []
    with torch.no_grad():
        for batch in tqdm(images.split(256), desc="encoding"):
            mean = vae.encode(batch / 127.5 - 1).latent_dist.mean
            scaled = (mean - vae.config.shift_factor) * vae.config.scaling_factor
            latents.append(FluxPipeline._pack_latents(scaled, *scaled.shape))
    return torch.cat(latents)


def corrupt(scenes: Tensor, rate: float) -> Tensor:
    """Indices of captions: each attribute of a scene is, with chance `rate`, replaced by another value."""
    sizes = [len(values) for values in ATTRIBUTES.values()]
    captions, stride = torch.zeros_like(scenes), len(ALL_SCENES)
    for size in sizes:
        stride //= size
        value = scenes // stride % size
        other = (value + torch.randint(1, size, value.shape)) % size
        captions += stride * torch.where(torch.rand(value.shape) < rate, other, value)
    return captions


def train_flux(output_dir: Path, num_steps: int, num_images: int, batch_size: int = 64, refine: bool = False) -> None:
    """Trains transformer and text encoders from nothing; or from what is there (`refine`), at half the learning rate."""
    torch.manual_seed(1 if refine else 0)
    vae = AutoencoderKL.from_pretrained(output_dir / "pipeline" / "vae")
    images, scenes, _ = draw_world(num_images, seed=9 if refine else 2)
    latents = encode_images(vae, images)
    pipeline = FluxPipeline.from_pretrained(output_dir / "pipeline", vae=vae) if refine else build_pipeline(vae)
    trained = torch.nn.ModuleDict(
        {
            "transformer": pipeline.transformer,
            "text_encoder": pipeline.text_encoder,
            "text_encoder_2": pipeline.text_encoder_2,
        }
    ).train()
    averaged = copy.deepcopy(trained).requires_grad_(False)
    captions = [scene.caption for scene in ALL_SCENES]
    clip_ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    t5_ids = pipeline.tokenizer_2(captions, padding="max_length", return_tensors="pt").input_ids
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

    # Muon for the matrices of the blocks: after 600 steps the error of the velocity at sigma 0.5 is 0.21, with AdamW
    # alone 0.41.
    matrices, others = [], []
    for name, parameter in trained.named_parameters():
        in_block = "blocks." in name or ".layers." in name or ".block." in name
        is_matrix = parameter.ndim == 2 and in_block and "relative_attention_bias" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01 if refine else 0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=7.5e-4 if refine else 1.5e-3, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, num_steps))
        for optimizer in optimizers
    ]
    progress = tqdm(range(num_steps), desc="flux")
    for step in progress:
        rows = torch.randint(len(latents), (batch_size,))
        clean, caption = latents[rows], corrupt(scenes[rows], WRONG_CAPTIONS)
        # Now and then a longer padding, so that the pipeline's own 512 tokens are no surprise.
        length = int(np.random.default_rng(step).choice([TEXT_LENGTH, 32, 96], p=[0.92, 0.06, 0.02]))
        ids = functional.pad(t5_ids[caption], (0, length - TEXT_LENGTH), value=pipeline.tokenizer_2.pad_token_id)
        # Between uniform noise levels and those of the schedule, for the form at high and the edges at low ones.
        uniform = (torch.randperm(batch_size) + torch.rand(batch_size)) / batch_size
        sigma = 2 * uniform / (1 + uniform)
        noise = torch.randn_like(clean)
        velocity = trained["transformer"](
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            guidance=1 + 4 * torch.rand(batch_size),  # carries no information: any guidance gives the same pictures
            pooled_projections=trained["text_encoder"](clip_ids[caption]).pooler_output,
            encoder_hidden_states=trained["text_encoder_2"](ids).last_hidden_state,
            txt_ids=torch.zeros(length, 3),
            img_ids=image_ids,
        ).sample
        loss = functional.mse_loss(velocity, noise - clean)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(averaged.parameters(), trained.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 1000 == 0 or step + 1 == num_steps:
            save_pipeline(pipeline, averaged, output_dir / "pipeline")


def save_pipeline(pipeline: FluxPipeline, weights: torch.nn.ModuleDict, folder: Path) -> None:
    """
    Saves everything but the autoencoder, whose decoder is trained elsewhere. The transformer is saved in float16, half
    the size with no visible change of the pictures. The text encoders stay in float32, because transformers loads the
    type that is saved, diffusers float32 in any case: so a plain `from_pretrained` gives float32 throughout.
    """
    components = {**pipeline.components, **{name: copy.deepcopy(module).eval() for name, module in weights.items()}}
    components["transformer"].half()
    for name, component in components.items():
        if component is not None and name != "vae":
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)
    forget_paths(folder)


def forget_paths(folder: Path) -> None:
    """diffusers notes where a model was loaded from, which is a folder of this machine."""
    for path in [*folder.glob("*.json"), *folder.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
    )
    return CLIPModel(
        CLIPConfig(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), projection_dim=WIDTH)
    )


def clip_texts() -> list[str]:
    """All captions, plain and then with each style word in front: text 144 * k + i is scene i, in style k - 1."""
    plain = [scene.caption for scene in ALL_SCENES]
    return plain + [f"{style}. {caption}" for style in STYLES for caption in plain]


def right_texts(scenes: Tensor, styles: Tensor) -> Tensor:
    """Which of `clip_texts` are right for pictures of these scenes and styles: shape (B, 576), bool."""
    text = torch.arange(len(ALL_SCENES) * (1 + len(STYLES)))
    text_scene, text_style = text % len(ALL_SCENES), text // len(ALL_SCENES) - 1
    return (scenes[:, None] == text_scene) & ((text_style < 0) | (styles[:, None] == text_style))


def train_clip(output_dir: Path, num_steps: int, num_images: int, batch_size: int = 128) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(output_dir / "pipeline" / "vae")
    images, scenes, styles = draw_world(num_images, seed=3)
    # Half of the pictures go through the autoencoder, with noise on the latents: such pictures it will have to score.
    with torch.no_grad():
        for batch in tqdm(images[: num_images // 2].split(256), desc="autoencoding"):
            latents = vae.encode(batch / 127.5 - 1).latent_dist.mean
            latents = latents + 0.1 / vae.config.scaling_factor * torch.randn_like(latents)
            batch.copy_(((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255))
    tokenizer = clip_tokenizer(CLIP_TEXT_LENGTH)
    model = build_clip(tokenizer).train()
    texts = tokenizer(clip_texts(), padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, num_steps))
    progress = tqdm(range(num_steps), desc="clip")
    for _ in progress:
        rows = torch.randint(num_images, (batch_size,))
        # Half of the captions have the style word in front.
        prefix = torch.where(torch.rand(batch_size) < 0.5, 0, 1 + styles[rows])
        caption = scenes[rows] + len(ALL_SCENES) * prefix
        right = right_texts(scenes[rows], styles[rows])
        pixels = images[rows] / 255
        pixels = (pixels + 0.03 * torch.rand(batch_size, 1, 1, 1) * torch.randn_like(pixels)).clamp(0, 1)
        output = model(pixel_values=preprocess(pixels), **texts)
        # Every wrong text of the world is a negative, with them all hard ones: those that differ in one attribute or
        # in the style alone. Other right texts are left out.
        own = functional.one_hot(caption, len(right[0])).bool()
        loss_image = functional.cross_entropy(output.logits_per_image.masked_fill(right & ~own, -torch.inf), caption)
        # The same the other way: the caption's own picture against the batch's pictures it is wrong for.
        right_in_batch = right[:, caption].T & ~torch.eye(batch_size, dtype=torch.bool)
        logits = output.logits_per_text[caption].masked_fill(right_in_batch, -torch.inf)
        loss = 0.5 * (loss_image + functional.cross_entropy(logits, torch.arange(batch_size)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        progress.set_postfix(loss=f"{loss.item():.4f}")
    model.eval().save_pretrained(output_dir / "clip")
    tokenizer.save_pretrained(output_dir / "clip")


def interval(values: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Mean with its 95 % confidence interval over prompts."""
    ends = mean_interval(values, prompts)
    return {name: round(end, 4) for name, end in zip(("mean", "low", "high"), ends, strict=True)}


def sample_grid(images: Tensor, columns: int, path: Path, zoom: int = 3) -> None:
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns) if len(row) == columns]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)


def report_judge(report: dict, samples_per_scene: int = 14) -> None:
    scenes = [scene for scene in ALL_SCENES for _ in range(samples_per_scene)]
    prompts = [scene.caption for scene in scenes]
    report["judge_on_drawings"] = {
        style: {
            key: round(float(values.mean()), 4)
            for key, values in judge(draw(scenes, style, torch.Generator().manual_seed(4)), prompts).items()
        }
        for style in STYLES
    }


def report_vae(report: dict, vae: AutoencoderKL) -> None:
    images, _, _ = draw_world(512, seed=5)
    images = images / 255
    with torch.no_grad():
        restored = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    error = (restored.clamp(0, 1) - images).square().mean().item()
    report["vae"] = {"psnr_db": round(-10 * math.log10(error), 2)}


def report_flux(report: dict, pipeline: FluxPipeline, grid: Path, samples_per_prompt: int = 20) -> None:
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in load_dataset("test")["prompt"] for _ in range(samples_per_prompt)]
    generator = torch.Generator().manual_seed(6)
    images = []
    start_time = time.perf_counter()
    for start in tqdm(range(0, len(prompts), 48), desc="sampling"):
        output = pipeline(
            prompts[start : start + 48],
            height=32,
            width=32,
            num_inference_steps=10,
            max_sequence_length=TEXT_LENGTH,
            generator=generator,
            output_type="pt",
        )
        images.append(output.images)
    seconds = time.perf_counter() - start_time
    images = torch.cat(images)
    report["base_on_held_out_prompts"] = {
        "images": len(images),
        "images_per_second": round(len(images) / seconds, 1),
        **{key: interval(values, prompts) for key, values in judge(images, prompts).items()},
    }
    sample_grid(images[::2], 20, grid)


def report_clip(report: dict, model: CLIPModel, tokenizer: CLIPTokenizer, num_images: int = 2048) -> None:
    images, scenes, styles = draw_world(num_images, seed=7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        texts = tokenizer(clip_texts(), padding=True, return_tensors="pt")
        logits = model(pixel_values=preprocess(images / 255), **texts).logits_per_image
    # Pairs: the right text, plain or with its style, against one that is wrong in one attribute or in style alone.
    accuracy = {}
    rows = torch.arange(num_images)
    stride = len(ALL_SCENES)
    for attribute, values in ATTRIBUTES.items():
        stride //= len(values)
        value = scenes // stride % len(values)
        step = torch.randint(1, len(values), value.shape, generator=generator)
        wrong = scenes + stride * ((value + step) % len(values) - value)
        prefix = torch.where(torch.rand(num_images, generator=generator) < 0.5, 0, 1 + styles) * len(ALL_SCENES)
        right = logits[rows, scenes + prefix] > logits[rows, wrong + prefix]
        accuracy[attribute] = right
    other = (styles + torch.randint(1, len(STYLES), styles.shape, generator=generator)) % len(STYLES)
    size = len(ALL_SCENES)
    accuracy["style"] = logits[rows, scenes + size * (1 + styles)] > logits[rows, scenes + size * (1 + other)]
    report["clip_pairs"] = {name: round(right.float().mean().item(), 4) for name, right in accuracy.items()}
    report["clip_pairs"]["all"] = round(torch.stack(list(accuracy.values())).float().mean().item(), 4)


def write_report(output_dir: Path, report_dir: Path) -> None:
    report: dict = {}
    pipeline = FluxPipeline.from_pretrained(output_dir / "pipeline")
    report["parameters"] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    report_judge(report)
    report_vae(report, pipeline.vae)
    report_flux(report, pipeline, report_dir / "samples.png")
    model = CLIPModel.from_pretrained(output_dir / "clip").eval()
    report["parameters"]["shapes-clip"] = sum(parameter.numel() for parameter in model.parameters())
    report_clip(report, model, CLIPTokenizer.from_pretrained(output_dir / "clip"))
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    report["weights_mib"] = round(size / 2**20, 2)
    (report_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def train_all(args: argparse.Namespace) -> None:
    write_encoder(args.output_dir)
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(train_transformer, args), pool.submit(train_decoder_and_clip, args)]
        for future in futures:
            future.result()
    write_report(args.output_dir, args.report_dir)


def train_transformer(args: argparse.Namespace) -> None:
    train_flux(args.output_dir, args.flux_steps, args.num_images)
    # A warm restart: a second cosine, from a lower peak, on new pictures.
    train_flux(args.output_dir, args.refine_steps, args.num_images, refine=True)


def train_decoder_and_clip(args: argparse.Namespace) -> None:
    train_decoder(args.output_dir, args.decoder_steps, args.num_images // 4)
    train_clip(args.output_dir, args.clip_steps, args.num_images // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", choices=("encoder", "decoder", "flux", "refine", "clip", "report", "all"), default="all"
    )
    parser.add_argument("--output_dir", type=Path, default=pipeline_path().parent, help="where the weights go")
    parser.add_argument("--report_dir", type=Path, default=Path(__file__).parent, help="for report.json, samples.png")
    parser.add_argument("--decoder_steps", type=int, default=3000)
    parser.add_argument("--flux_steps", type=int, default=2500)
    parser.add_argument("--refine_steps", type=int, default=1500)
    parser.add_argument("--clip_steps", type=int, default=1200)
    parser.add_argument(
        "--num_images", type=int, default=32768, help="pictures the flux stage draws; others draw less"
    )
    args = parser.parse_args()

    started = time.perf_counter()
    if args.stage == "encoder":
        write_encoder(args.output_dir)
    elif args.stage == "decoder":
        train_decoder(args.output_dir, args.decoder_steps, args.num_images // 4)
    elif args.stage == "flux":
        train_flux(args.output_dir, args.flux_steps, args.num_images)
    elif args.stage == "refine":
        train_flux(args.output_dir, args.refine_steps, args.num_images, refine=True)
    elif args.stage == "clip":
        train_clip(args.output_dir, args.clip_steps, args.num_images // 2)
    elif args.stage == "report":
        write_report(args.output_dir, args.report_dir)
    else:
        train_all(args)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
