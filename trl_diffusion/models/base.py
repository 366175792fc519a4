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

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor


def check_multiple(height: int, width: int, multiple: int, family: str) -> None:
    """Raise a `ValueError` that names the nearest possible sizes unless both are positive multiples of `multiple`."""
    for name, value in (("height", height), ("width", width)):
        lower = max(value // multiple, 1) * multiple
        if value != lower:
            nearest = f"{lower} and {lower + multiple}" if value > lower else f"{lower}"
            raise ValueError(
                f"{name}={value} is not possible with this {family}: it must be a positive multiple of {multiple}, "
                f"which is what the VAE and the packing divide by. Nearest: {nearest}."
            )


class FlowModel(ABC):
    """
    What a trainer needs of a text-to-image pipeline: the only seam between pipelines and trainers.

    Notation: x_s = (1 - s) x_0 + s e with s = sigma in [0, 1], 1 is noise; the network predicts v = e - x_0. Latents
    are what the network sees, always float32 outside of it. The VAE, the text encoders and the denoiser are put in
    eval mode and frozen; the trainer makes the denoiser, or its adapter, trainable again.

    A new family is one subclass, one entry of `FLOW_MODELS` and one row in the table of
    `tests/models/test_families.py`, which requires the very latents and images of the family's own pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Loaded pipeline of class `pipeline_class`.
        source (`str`, *optional*):
            What tells the text encoders from others, where that is known without their weights.
        load_text_encoders (`Callable`, *optional*):
            Loads the text encoders, by their name in the pipeline. Without it they are those of the pipeline.

    Attributes:
        text_encoders (`dict[str, torch.nn.Module]`):
            Text encoders by their name in the pipeline, as far as they are in memory.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizers by their name in the pipeline.
        transformer_config (`FrozenDict`):
            Configuration of the denoiser, whatever it is wrapped in later.
        dtype (`torch.dtype`):
            What latents and embeddings are cast to before the denoiser. That of its weights at construction; set it
            where an engine converts the weights afterwards (DeepSpeed with bf16).
        max_sequence_length (`int`):
            Tokens the T5 encoder sees of a prompt.

    Raises:
        `ValueError`: for another pipeline class, or a scheduler that does not integrate a flow.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_target_modules: ClassVar[list[str]]
    """Names of the attention layers, for [`~peft.LoraConfig`]."""
    shared_conditioning: ClassVar[tuple[str, ...]] = ()
    """Entries of the conditioning that are the same for every prompt: stored once by the prompt cache."""
    default_guidance_scale: float
    """Guidance of the family's pipeline where the user gives none; 1 is no guidance."""
    latent_downsample: int
    """Pixels along the side of one token: VAE factor times patch size."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        source: str | None = None,
        load_text_encoders: Callable[[], dict[str, torch.nn.Module]] | None = None,
    ):
        if type(pipeline) is not self.pipeline_class:
            raise ValueError(
                f"{type(self).__name__} needs a {self.pipeline_class.__name__}, got a {type(pipeline).__name__}. Use "
                "`load_flow_model` to find the right class."
            )
        if (
            not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
            or pipeline.scheduler.config.invert_sigmas
        ):
            raise ValueError(
                f"The pipeline's scheduler is a {type(pipeline.scheduler).__name__}; training needs a "
                "FlowMatchEulerDiscreteScheduler with invert_sigmas=False. Set `pipeline.scheduler = "
                "FlowMatchEulerDiscreteScheduler.from_config(...)` before training."
            )
        self.pipeline = pipeline
        self.source = source
        self._load_text_encoders = load_text_encoders
        self.vae = pipeline.vae
        components = pipeline.components
        self.text_encoders = {
            name: module
            for name, module in components.items()
            if name.startswith("text_encoder") and module is not None
        }
        self.tokenizers = {
            name: tokenizer
            for name, tokenizer in components.items()
            if name.startswith("tokenizer") and tokenizer is not None
        }
        self.transformer_config = pipeline.transformer.config
        self.dtype = pipeline.transformer.dtype
        for module in (self.vae, pipeline.transformer, *self.text_encoders.values()):
            module.requires_grad_(False)
            module.eval()

    @property
    def denoiser(self) -> torch.nn.Module:
        """The pipeline's transformer. `get_peft_model` wraps it in place, so it carries the adapter's layers then."""
        return self.pipeline.transformer

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pipeline's images where the user gives none."""
        size = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return size, size

    @property
    def max_size(self) -> int | None:
        """Largest height or width in pixels, where the family has one."""
        return None

    def check_size(self, height: int, width: int) -> None:
        """Raise a `ValueError` that names the nearest possible sizes unless `height` and `width`, in pixels, are."""
        check_multiple(height, width, self.latent_downsample, self.pipeline_class.__name__)
        for name, value in (("height", height), ("width", width)):
            if self.max_size is not None and value > self.max_size:
                raise ValueError(
                    f"{name}={value} is too large for this {self.pipeline_class.__name__}: its position embedding "
                    f"ends at {self.max_size} pixels. Use a multiple of {self.latent_downsample} up to {self.max_size}."
                )

    # ------------------------------------------------------------------------------------------------------- prompts
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Encode prompts, without gradient and outside of autocast (under which T5 can overflow).

        Args:
            prompts (`list[str]` of length B):
                Prompts.

        Returns:
            `dict[str, torch.Tensor]`: the denoiser's conditioning; the first dimension of every entry is B. On the
            text encoders' device and in their dtype.

        Raises:
            `RuntimeError`: if the text encoders were freed.
        """
        if not self.text_encoders:
            raise RuntimeError(
                "There are no text encoders to encode prompts with: they were freed, or the pipeline was loaded "
                "without them. Encode every prompt before `free_text_encoders()`, or load the whole pipeline."
            )
        device = next(iter(self.text_encoders.values())).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._encode_prompt(prompts, device)

    @abstractmethod
    def _encode_prompt(self, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]: ...

    @contextlib.contextmanager
    def text_encoders_on(self, device: torch.device) -> Iterator[None]:
        """
        Within this context the text encoders are on a device, for [`encode_prompt`]; they are loaded where they are not in
        memory, and wait on the CPU afterwards.

        Raises:
            `RuntimeError`: they were freed, and the pipeline was given loaded.
        """
        if not self.text_encoders:
            if self._load_text_encoders is None:
                raise RuntimeError(
                    "There are no text encoders to encode prompts with: they were freed, or the pipeline was loaded "
                    "without them. Load the whole pipeline, or pass its id or path instead of the pipeline."
                )
            self.text_encoders = self._load_text_encoders()
            for name, module in self.text_encoders.items():
                setattr(self.pipeline, name, module.requires_grad_(False).eval())
        for module in self.text_encoders.values():
            module.to(device)
        try:
            yield
        finally:
            for module in self.text_encoders.values():
                module.to("cpu")
            clear_device_cache()

    def free_text_encoders(self) -> None:
        """
        Drop the text encoders' weights from memory; tokenizers stay.

        A pipeline that was given loaded then generates from embeddings only, and its `save_pretrained` leaves the
        encoders out; one that was given by name loads them again where a prompt must be encoded.
        """
        for name in self.text_encoders:
            setattr(self.pipeline, name, None)
        self.text_encoders = {}
        clear_device_cache(garbage_collection=True)

    # ------------------------------------------------------------------------------------------- schedule and network
    def schedule(self, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
        """
        The pipeline's own noise schedule, with its shift, resolution-dependent where the scheduler is configured so.

        Args:
            num_inference_steps (`int`):
                Number of steps T.
            height (`int`), width (`int`):
                Image size in pixels.

        Returns:
            `torch.Tensor` of shape `(T + 1,)`: decreasing sigmas, float32, from about 1 to 0, on the CPU.
        """
        # A copy, because set_timesteps changes the scheduler, which may be in use.
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config = scheduler.config
        mu = None
        if config.use_dynamic_shifting:
            mu = calculate_shift(
                (height // self.latent_downsample) * (width // self.latent_downsample),
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        sigmas = self._unshifted_sigmas(num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device="cpu", sigmas=sigmas, mu=mu)
        return scheduler.sigmas

    def _unshifted_sigmas(self, num_inference_steps: int) -> Sequence[float] | None:
        """The sigmas the pipeline passes to its scheduler; `None`: the scheduler makes them."""
        return None

    def draw_noise(
        self,
        num: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """
        Standard normal latents, as the pipeline would draw them.

        Args:
            num (`int`):
                Number of samples B.
            height (`int`), width (`int`):
                Image size in pixels.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or one for each sample: then a sample's noise does not depend on the batch it is in.
            device (`torch.device`, *optional*, defaults to `"cpu"`):
                Where the result goes. With CPU generators the values are the same on every device.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: float32, in the layout the network sees.
        """
        if isinstance(generator, list) and len(generator) != num:
            raise ValueError(f"Got {len(generator)} generators for {num} samples: pass one, or one for each sample.")
        factor = self.pipeline.vae_scale_factor
        shape = (num, self.vae.config.latent_channels, height // factor, width // factor)
        noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        return self._pack(noise)

    @abstractmethod
    def velocity(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """
        The network's prediction v of e - x_0, differentiable, with guidance.

        Args:
            denoiser (`torch.nn.Module`):
                [`denoiser`], wrapped or not (PEFT, DDP, FSDP, DeepSpeed).
            latents (`torch.Tensor` of shape `(B, ...)`):
                Noisy latents, float32 (or float64, with weights in float64).
            sigma (`torch.Tensor` of shape `()` or `(B,)`):
                Noise level in [0, 1], the exact one of the schedule, neither rounded nor truncated.
            conditioning (`dict[str, torch.Tensor]`):
                Result of [`encode_prompt`], one row for each row of `latents`.
            guidance_scale (`float`):
                Guidance, embedded or classifier-free, as in the family's pipeline.
            height (`int`), width (`int`):
                Image size in pixels.

        Returns:
            `torch.Tensor` of the shape and dtype of `latents`.
        """

    @staticmethod
    def _rows(sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Sigma `()` or `(B,)` as float32 `(B,)` on the device of the latents."""
        return torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(latents.shape[0])

    def _to_network(self, tensor: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=latents.device, dtype=self.dtype)

    # ----------------------------------------------------------------------------------------------------------- VAE
    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        """From the VAE's layout `(B, C, h, w)` to the network's."""
        return latents

    def _unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """From the network's layout to the VAE's, `(B, C, h, w)`."""
        return latents

    def decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """
        Images of clean latents, differentiable (where the clamp is not active).

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`):
                Clean latents, as the network sees them, float32 (or float64, with a VAE in float64).
            height (`int`), width (`int`):
                Image size in pixels.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`: in [0, 1], in the dtype of the latents.
        """
        config = self.vae.config
        latents = self._unpack(latents, height, width) / config.scaling_factor + config.shift_factor
        images = self.vae.decode(latents.to(device=self.vae.device, dtype=self.vae.dtype), return_dict=False)[0]
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def encode_image(
        self, images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Latents of images.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [0, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Sample the VAE's posterior with it. By default its mode is taken.

        Returns:
            `torch.Tensor` of shape `(B, ...)`: float32 latents, as the network sees them.
        """
        self.check_size(*images.shape[-2:])
        config = self.vae.config
        images = (images * 2 - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return self._pack((latents.float() - config.shift_factor) * config.scaling_factor)

    def enable_vae_gradient_checkpointing(self) -> None:
        """
        Recompute the VAE's blocks in the backward pass of [`decode`] instead of keeping their activations.

        Unlike in transformers' models it works in eval mode: diffusers' blocks ask only whether gradients are enabled.
        """
        self.vae.enable_gradient_checkpointing()
