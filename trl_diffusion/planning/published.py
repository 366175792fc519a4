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
Sizes of the published models, for a plan without a network: configurations of transformer and VAE, and the number of
weights of each text encoder. What is not given is the class's default. Where the files of a model can be read, they count.
"""

from typing import Any


_FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
_SD3_VAE = {**_FLUX_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_SANA_VAE = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "scaling_factor": 0.41407,
}
_EULER = "FlowMatchEulerDiscreteScheduler"
_CLIP_L, _CLIP_G, _T5 = 123_060_480, 694_659_840, 4_762_310_656


def _model(
    pipeline_class: str,
    transformer: tuple[str, dict[str, Any]],
    vae: tuple[str, dict[str, Any]],
    text_encoders: dict[str, int],
    pipeline: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "pipeline_class": pipeline_class,
        "parts": {
            "transformer": transformer,
            "vae": vae,
            "scheduler": (_EULER, scheduler or {"shift": 3.0, "use_dynamic_shifting": True}),
        },
        "text_encoders": text_encoders,
        "pipeline": pipeline or {},
    }


def _flux(**transformer: Any) -> dict[str, Any]:
    return _model(
        "FluxPipeline",
        ("FluxTransformer2DModel", {"guidance_embeds": True, **transformer}),
        ("AutoencoderKL", _FLUX_VAE),
        {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
    )


def _sd3(**transformer: Any) -> dict[str, Any]:
    return _model(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", {"sample_size": 128, "out_channels": 16, "pos_embed_max_size": 192, **transformer}),
        ("AutoencoderKL", _SD3_VAE),
        {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
    )


def _sd35_medium() -> dict[str, Any]:
    return _sd3(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
        dual_attention_layers=list(range(13)), pos_embed_max_size=384,
    )  # fmt: skip


def _sd35_large() -> dict[str, Any]:
    return _sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")


def _klein(transformer: dict[str, Any], text_encoder: int, is_distilled: bool) -> dict[str, Any]:
    return _model(
        "Flux2KleinPipeline",
        ("Flux2Transformer2DModel", {"guidance_embeds": False, **transformer}),
        ("AutoencoderKLFlux2", {}),
        {"text_encoder": text_encoder},
        {"is_distilled": is_distilled},
    )


_KLEIN_4B = (
    {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}, 4_022_468_096,
)  # fmt: skip
_KLEIN_9B = (
    {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}, 8_190_735_360,
)  # fmt: skip
_QWEN_IMAGE = _model(
    "QwenImagePipeline",
    ("QwenImageTransformer2DModel", {}),
    ("AutoencoderKLQwenImage", {}),
    {"text_encoder": 8_292_166_656},
)
_UMT5 = 5_680_910_336
_WAN_5B_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


def _wan(
    transformer: dict[str, Any], vae: dict[str, Any] | None = None, pipeline: dict[str, Any] | None = None
) -> dict[str, Any]:
    return _model(
        "WanPipeline", ("WanTransformer3DModel", transformer), ("AutoencoderKLWan", vae or {}), {"text_encoder": _UMT5},
        pipeline,
    )  # fmt: skip


def _z_image(shift: float) -> dict[str, Any]:
    return _model(
        "ZImagePipeline",
        ("ZImageTransformer2DModel", {}),
        ("AutoencoderKL", _FLUX_VAE),
        {"text_encoder": 4_022_468_096},
        scheduler={"shift": shift},  # by which the distilled one is known
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": _flux(),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance_embeds=False),
    "black-forest-labs/FLUX.1-Krea-dev": _flux(),
    "black-forest-labs/FLUX.1-Kontext-dev": {**_flux(), "pipeline_class": "FluxKontextPipeline"},
    "stabilityai/stable-diffusion-3.5-medium": _sd35_medium(),
    "stabilityai/stable-diffusion-3.5-large": _sd35_large(),
    "Qwen/Qwen-Image": _QWEN_IMAGE,
    "Qwen/Qwen-Image-2512": _QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": {**_QWEN_IMAGE, "pipeline_class": "QwenImageEditPipeline"},
    "Qwen/Qwen-Image-Edit-2509": {**_QWEN_IMAGE, "pipeline_class": "QwenImageEditPlusPipeline"},
    "lodestones/Chroma1-HD": _model(
        "ChromaPipeline",
        ("ChromaTransformer2DModel", {}),
        ("AutoencoderKL", _FLUX_VAE),
        {"text_encoder": _T5},
    ),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": _model(
        "SanaPipeline",
        ("SanaTransformer2DModel", {"qk_norm": "rms_norm_across_heads"}),
        ("AutoencoderDC", _SANA_VAE),
        {"text_encoder": 2_614_341_888},
    ),
    "krea/Krea-2-Raw": _model(
        "Krea2Pipeline",
        ("Krea2Transformer2DModel", {}),
        ("AutoencoderKLQwenImage", {}),
        {"text_encoder": 4_437_815_808},
    ),
    "black-forest-labs/FLUX.2-dev": _model(
        "Flux2Pipeline",
        ("Flux2Transformer2DModel", {}),
        ("AutoencoderKLFlux2", {}),
        {"text_encoder": 24_011_361_280},
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(*_KLEIN_4B, False),
    "black-forest-labs/FLUX.2-klein-4B": _klein(*_KLEIN_4B, True),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(*_KLEIN_9B, False),
    "black-forest-labs/FLUX.2-klein-9B": _klein(*_KLEIN_9B, True),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan({}),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        _WAN_5B_VAE,
        {"expand_timesteps": True},
    ),
    "Tongyi-MAI/Z-Image": _z_image(6.0),
    "Tongyi-MAI/Z-Image-Turbo": _z_image(3.0),
}
"""Hub id: pipeline class, parts as (class, configuration), weights of text encoders, and arguments of the pipeline."""
