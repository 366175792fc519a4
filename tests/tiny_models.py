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

"""Tiny, untrained pipelines of the supported families, built from configs alone: no file, no network, under a second.

Their geometry is the real one in small: VAE of factor 2 with 4 latent channels, patches of 2, so one token is 4 x 4
pixels. Weights are random but fixed by `seed`.
"""

import inspect
import string
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


def clip_tokenizer(max_length: int = 64) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single bytes only, so every text tokenises."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)


def t5_tokenizer(max_length: int = 48) -> T5TokenizerFast:
    """A T5 tokenizer that knows single printable characters only; anything else becomes `<unk>`."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in string.digits + string.ascii_letters + string.punctuation]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


# The words of the template that QwenImagePipeline puts around a prompt: with these as tokens it begins with 34 of them, as
# with the published tokenizer.
_QWEN_TEMPLATE = (
    "system|Describe| the| image| by| detailing| color| shape| size| texture| quantity| text| spatial| relationships| of"
    "| objects| and| background|user|assistant"
).split("|")


# Likewise for the pipelines that edit, whose template begins with 64.
_QWEN_EDIT_TEMPLATE = (
    " the| key| features| of| input| image| (|'s|),| explain| how| user| instruction| should| alter| or| modify| Generate| a"
    "| new| that| meets| requirements| while| maintaining| consistency| with| original| where| appropriate| then"
).split("|")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer that knows single bytes and the words of the pipeline's template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    vocab = {token: index for index, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in _QWEN_TEMPLATE])
    return tokenizer


def qwen3_tokenizer() -> Qwen2Tokenizer:
    """That of [`qwen_tokenizer`] with the template of a chat, in which a reply may be asked for without thinking."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer with Mistral's template of a chat, that knows single bytes, and the system message of FLUX.2 as one token.

    The published FLUX.2-dev has a `PixtralProcessor` around such a tokenizer, which needs torchvision, for images. For
    text alone both answer the same.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    vocab = {token: index for index, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special[4:],
    )
    tokenizer.add_tokens([AddedToken(SYSTEM_MESSAGE, normalized=False)])
    tokenizer.chat_template = (
        "<s>{% for message in messages %}{% set name = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}[message.role] %}"
        "[{{ name }}]{{ message.content[0].text }}[/{{ name }}]{% endfor %}"
    )
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that knows single printable characters, and the lines of Sana's instruction as one token each."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = string.digits + string.ascii_letters + string.punctuation
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate([*special, "\u2581", *letters])})
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in instruction])
    return tokenizer


def _clip_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_encoder(tokenizer: T5TokenizerFast, hidden_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def _ready(pipeline_class: type[DiffusionPipeline], **parts: Any) -> DiffusionPipeline:
    """A pipeline as `from_pretrained` would return it: without dropout."""
    pipeline = pipeline_class(**parts)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline(
    guidance_embeds: bool = True, seed: int = 0, dynamic_shifting: bool | None = None
) -> FluxPipeline:
    """A FLUX.1 pipeline in small, float32, on the CPU.

    Args:
        guidance_embeds (`bool`, *optional*, defaults to `True`):
            `True` for the likeness of FLUX.1-dev, `False` for that of FLUX.1-schnell.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
        dynamic_shifting (`bool`, *optional*):
            Whether the schedule shifts with the resolution. As the two published models by default: dev does, schnell
            does not.
    """
    return _flux(FluxPipeline, guidance_embeds, seed, dynamic_shifting)


def tiny_flux_kontext_pipeline(guidance_embeds: bool = True, seed: int = 0) -> FluxKontextPipeline:
    """
    A FLUX.1 Kontext pipeline in small, float32, on the CPU. The sizes that it prefers for the images that it edits become
    small too, for all pipelines of this process.

    Args:
        guidance_embeds (`bool`, *optional*, defaults to `True`):
            Whether the network takes the guidance, as the published one does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(12, 22), (16, 16), (24, 12)]  # width, height
    return _flux(FluxKontextPipeline, guidance_embeds, seed)


def _flux(
    pipeline_class: type[DiffusionPipeline], guidance_embeds: bool, seed: int, dynamic_shifting: bool | None = None
) -> DiffusionPipeline:
    if dynamic_shifting is None:
        dynamic_shifting = guidance_embeds
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        text_encoder = CLIPTextModel(_clip_text_config(tokenizer))
        text_encoder_2 = _t5_encoder(tokenizer_2, hidden_size=32)
        vae = _vae()
    return _ready(
        pipeline_class,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dynamic_shifting else 1.0, use_dynamic_shifting=dynamic_shifting
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def tiny_chroma_pipeline(seed: int = 0, dynamic_shifting: bool = True) -> ChromaPipeline:
    """A Chroma pipeline in small, float32, on the CPU.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
        dynamic_shifting (`bool`, *optional*, defaults to `True`):
            Whether the schedule shifts with the resolution.
    """
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=64,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        text_encoder = _t5_encoder(tokenizer, hidden_size=32)
        vae = _vae()
    return _ready(
        ChromaPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def tiny_sana_pipeline(seed: int = 0) -> SanaPipeline:
    """A Sana 1.5 pipeline in small, with the published scheduler, float32, on the CPU. The VAE's factor is 4.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    tokenizer = gemma_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            qk_norm="rms_norm_across_heads",
        )
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        blocks = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in {
                "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                "block_out_channels": (8, 8, 16),
                "layers_per_block": (1, 1, 1),
                "qkv_multiscales": ((), (), (5,)),
            }.items()
        }
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41407,
            **blocks,
        )
    return _ready(
        SanaPipeline,
        scheduler=DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def tiny_sd3_pipeline(seed: int = 0, dynamic_shifting: bool = False) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3.5 pipeline in small (query-key norm, a block of dual attention), float32, on the CPU.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
        dynamic_shifting (`bool`, *optional*, defaults to `False`):
            Whether the schedule shifts with the resolution. The published models use a fixed shift of 3.
    """
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        text_encoder = CLIPTextModelWithProjection(_clip_text_config(tokenizer))
        text_encoder_2 = CLIPTextModelWithProjection(_clip_text_config(tokenizer_2))
        text_encoder_3 = _t5_encoder(tokenizer_3, hidden_size=64)
        vae = _vae()
    return _ready(
        StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7571, -0.7089, 0.1075, 0.9653],
        latents_std=[2.8184, 1.4541, 2.3275, 1.2196],
    )


def tiny_krea2_pipeline(seed: int = 0, is_distilled: bool = False) -> Krea2Pipeline:
    """A Krea 2 pipeline in small, with the published scheduler, float32, on the CPU.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
        is_distilled (`bool`, *optional*, defaults to `False`):
            `True` for the likeness of Turbo, `False` for that of Raw.
    """
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=32,
            text_hidden_dim=32,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=48,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )
        text_encoder = Qwen3VLModel(
            Qwen3VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "rope_parameters": {
                        "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 5e6,
                    },
                    "pad_token_id": tokenizer.pad_token_id,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
                vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
                vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
                image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
                video_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            )
        )  # fmt: skip
        vae = _qwen_image_vae()
    return _ready(
        Krea2Pipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
        is_distilled=is_distilled,
    )


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """A Qwen-Image pipeline in small, with the published scheduler, float32, on the CPU.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    return _qwen_image(QwenImagePipeline, qwen_tokenizer(), seed)


def tiny_qwen_image_edit_plus_pipeline(zero_cond_t: bool = False, seed: int = 0) -> QwenImageEditPlusPipeline:
    """
    A Qwen-Image-Edit pipeline of release 2509 or later in small, float32, on the CPU. The sizes of the images that it
    edits become small too, for all pipelines of this process.

    Args:
        zero_cond_t (`bool`, *optional*, defaults to `False`):
            Whether the network takes the image for clean, as that of release 2511 does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 32 * 32
    pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = 64 * 64
    return _qwen_image_edit(QwenImageEditPlusPipeline, seed, zero_cond_t)


def tiny_qwen_image_edit_pipeline(seed: int = 0) -> QwenImageEditPipeline:
    """
    A pipeline of the first release of Qwen-Image-Edit in small, float32, on the CPU. The size of the images that it edits
    becomes small too, for all pipelines of this process.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    pipeline_qwenimage_edit.calculate_dimensions = _small_dimensions
    return _qwen_image_edit(QwenImageEditPipeline, seed)


def _small_dimensions(area: int, ratio: float) -> tuple[int, int, None]:
    """As the pipeline's own, for a thousandth of the area."""
    return (*pipeline_qwenimage_edit_plus.calculate_dimensions(area / 1024, ratio), None)


class QwenImageOnlyProcessor(Qwen2VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen_image_edit(
    pipeline_class: type[DiffusionPipeline], seed: int, zero_cond_t: bool = False
) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in _QWEN_EDIT_TEMPLATE])
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=64 * 64)
    processor = QwenImageOnlyProcessor(image_processor, tokenizer)
    return _qwen_image(pipeline_class, tokenizer, seed, zero_cond_t, processor=processor)


def _qwen_image(
    pipeline_class: type[DiffusionPipeline],
    tokenizer: Qwen2Tokenizer,
    seed: int,
    zero_cond_t: bool = False,
    **parts: Any,
) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
                    "bos_token_id": tokenizer.pad_token_id,
                    "eos_token_id": tokenizer.pad_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [0],
                },
                vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
                vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
                image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
                video_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            )
        )
        vae = _qwen_image_vae()
    return _ready(
        pipeline_class,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        **parts,
    )


def _flux2_parts(guidance_embeds: bool, joint_attention_dim: int) -> dict[str, torch.nn.Module]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint_attention_dim,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _qwen3_config(tokenizer: Qwen2Tokenizer, num_hidden_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_flux2_pipeline(guidance_embeds: bool = True, seed: int = 0) -> Flux2Pipeline:
    """A FLUX.2 dev pipeline in small, float32, on the CPU. Its text encoder has as many layers as the pipeline reads.

    Args:
        guidance_embeds (`bool`, *optional*, defaults to `True`):
            Whether the network takes the guidance, as the published one does.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    tokenizer = mistral_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _flux2_parts(guidance_embeds, joint_attention_dim=48)
        text_encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config={
                    "model_type": "mistral",
                    "vocab_size": len(tokenizer),
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 30,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 8,
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "head_dim": 8,
                    "image_size": 28,
                    "patch_size": 14,
                },
            )
        )
    return _ready(Flux2Pipeline, text_encoder=text_encoder, tokenizer=tokenizer, **parts)


def tiny_flux2_klein_pipeline(is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """A FLUX.2 klein pipeline in small, float32, on the CPU. Its text encoder has as many layers as the pipeline reads.

    Args:
        is_distilled (`bool`, *optional*, defaults to `False`):
            `False` for the likeness of FLUX.2-klein-base, `True` for that of FLUX.2-klein.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    tokenizer = qwen3_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _flux2_parts(guidance_embeds=False, joint_attention_dim=48)
        text_encoder = Qwen3ForCausalLM(_qwen3_config(tokenizer, num_hidden_layers=27))
    return _ready(
        Flux2KleinPipeline, text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=is_distilled, **parts
    )


def tiny_z_image_pipeline(shift: float = 6.0, seed: int = 0) -> ZImagePipeline:
    """A Z-Image pipeline in small, float32, on the CPU.

    Args:
        shift (`float`, *optional*, defaults to `6.0`):
            Shift of the schedule: 6 for the likeness of Z-Image, 3 for that of Z-Image-Turbo.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
    """
    tokenizer = qwen3_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[640, 64, 64],
        )
        for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(pad_token)
        text_encoder = Qwen3Model(_qwen3_config(tokenizer, num_hidden_layers=2))
        vae = _vae()
    return _ready(
        ZImagePipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def tiny_wan_pipeline(seed: int = 0, expand_timesteps: bool = False) -> WanPipeline:
    """A Wan pipeline in small, with the published scheduler, float32, on the CPU. The VAE's factors are the real ones.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights. The global generator is left as it was.
        expand_timesteps (`bool`, *optional*, defaults to `False`):
            `False` for the likeness of Wan 2.1, `True` for that of Wan2.2-TI2V-5B, whose VAE is another.
    """
    tokenizer = t5_tokenizer()
    residual = {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
        )
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.7571, -0.7089, 0.1075, 0.9653],
            latents_std=[2.8184, 1.4541, 2.3275, 1.2196],
            **(residual if expand_timesteps else {}),
        )
    return _ready(
        WanPipeline,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if expand_timesteps else 3.0
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        expand_timesteps=expand_timesteps,
    )
