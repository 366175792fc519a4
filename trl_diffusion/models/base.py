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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from ..data.prompt_images import Prompt
from ..data.prompts import CONDITION_IMAGE
from .vae_gradients import recomputed


_NEGATIVE = "negative_"


def add_negative(
    conditioning: dict[str, torch.Tensor], negative: dict[str, torch.Tensor], num: int
) -> dict[str, torch.Tensor]:
    """A conditioning of B rows, with those of negative prompts, one for all or B, as B more entries `negative_{name}`."""
    expanded = {f"{_NEGATIVE}{name}": tensor.expand(num, *tensor.shape[1:]) for name, tensor in negative.items()}
    return {**conditioning, **expanded}


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
    What a trainer needs of a text-to-image or text-to-video pipeline: the only seam between pipelines and trainers.

    Notation: x_s = (1 - s) x_0 + s e with s = sigma in [0, 1], 1 is noise; the network predicts v = e - x_0. Latents
    are the VAE's, normalised: `(B, C, h, w)`, or `(B, C, F, h, w)` with frames, always float32. How the network wants
    them (packed, patched, as a list), and the time, and in which sign it answers, is known to the family's `forward`
    alone; so the size of an image follows from its latents. The VAE, the text encoders and the denoiser are put in
    eval mode and frozen; the trainer makes the denoiser, or its adapter, trainable again. A family that edits an image is
    an [`~trl_diffusion.models.editing.EditingFlowModel`].

    A new family is one subclass with `encode` and `forward`, one entry of `FLOW_MODELS` and one row in the table of
    `tests/models/test_families.py`, which requires the very latents and images of the family's own pipeline. What it
    inherits it overrides where its pipeline differs.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Loaded pipeline of class `pipeline_class`.

    Attributes:
        text_encoders (`dict[str, torch.nn.Module]`):
            Text encoders by their name in the pipeline, as far as they are in memory.
        source (`str` or `None`):
            What tells the text encoders from others without their weights, where [`load_flow_model`] has loaded the
            pipeline by name.
        load_text_encoders (`Callable` or `None`):
            Loads the text encoders, by their name in the pipeline; set likewise.
        tokenizers (`dict[str, PreTrainedTokenizerBase]`):
            Tokenizers by their name in the pipeline.
        transformer_config (`FrozenDict`):
            Configuration of the denoiser, whatever it is wrapped in later.
        dtype (`torch.dtype`):
            What latents and embeddings are cast to before the denoiser. That of its weights at construction; set it
            where an engine converts the weights afterwards (DeepSpeed with bf16).
        negative_prompt (`str` or `None`):
            What true guidance leads away from, the empty prompt unless set; `None` where guidance is not true.
        max_sequence_length (`int`):
            Tokens of a prompt that the network sees at most.

    Raises:
        `ValueError`: for another pipeline class, or a scheduler that does not integrate a flow.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    # By their last name, so that the second attention of Stable Diffusion 3.5 medium (`attn2`) is among them.
    lora_target_modules: list[str] = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ]
    """Names of the attention layers, for [`~peft.LoraConfig`]: those of diffusers' joint attention."""
    true_guidance: bool = False
    """Whether guidance is a second forward with a negative prompt, and not a number that the network takes."""
    has_guidance: bool = True
    """Whether there is guidance at all: a network may be distilled to do without."""
    unguided_scale: ClassVar[float] = 1.0
    """Guidance scale of the family's pipeline at which there is none."""
    undistilled_model: str | None = None
    """Hub id of the model that this one is distilled from, which is the one to train."""
    distilled_model: str | None = None
    """Hub id of the model that is distilled from this one, on which its adapters run too."""
    negative_mark: ClassVar[str] = ""
    """What [`encode`] sees before the negative prompt, where the pipeline encodes it in another way than a prompt."""
    variable_length: ClassVar[tuple[str, ...]] = ()
    """Entries of a prompt's conditioning whose first dimension is the prompt's length: padded, with a mask."""
    patch_size: int = 2
    """Latent pixels along the side of one token."""
    takes_image: ClassVar[bool] = False
    """Whether a prompt comes with an image that it edits, as a [`~trl_diffusion.data.prompt_images.PromptWithImage`]."""
    default_num_frames: ClassVar[int | None] = None
    """Frames of the pipeline's videos where the user gives no number; `None`: it makes images."""
    temporal_downsample: ClassVar[int] = 4
    """Frames of a video that one latent frame stands for, but for the first, which stands for one."""
    default_guidance_scale: float
    """Guidance of the family's pipeline where the user gives none."""
    max_sequence_length: int

    def __init__(self, pipeline: DiffusionPipeline):
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
        self.source: str | None = None
        self.load_text_encoders: Callable[[], dict[str, torch.nn.Module]] | None = None
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
        self._negative_prompt = "" if self.true_guidance else None
        for module in (self.vae, pipeline.transformer, *self.text_encoders.values()):
            module.requires_grad_(False)
            module.eval()

    @property
    def negative_prompt(self) -> str | None:
        return self._negative_prompt

    @negative_prompt.setter
    def negative_prompt(self, negative_prompt: str) -> None:
        self.check_negative_prompt(negative_prompt)
        if not self.has_guidance:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect with this {self.pipeline_class.__name__}, which is "
                "distilled to do without guidance. Leave negative_prompt unset."
            )
        self._negative_prompt = negative_prompt

    @property
    def marked_negative_prompt(self) -> str | None:
        """The negative prompt as [`encode`] takes it."""
        return None if self.negative_prompt is None else self.negative_mark + self.negative_prompt

    def negative_of(self, prompt: Prompt) -> Prompt | None:
        """What guidance leads away from at a prompt, as [`encode`] takes it: the same for all prompts without images."""
        return self.marked_negative_prompt

    @classmethod
    def check_negative_prompt(cls, negative_prompt: str | None) -> None:
        """Raise a `ValueError` if there is a negative prompt where no guidance would use it."""
        if negative_prompt is not None and not cls.true_guidance:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect with a {cls.pipeline_class.__name__}, whose guidance "
                "is embedded in the network. Leave negative_prompt unset."
            )

    def check_guidance_scale(self, guidance_scale: float) -> None:
        """Raise a `ValueError` if there is guidance with a network that has none."""
        if guidance_scale > self.unguided_scale and not self.has_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale} does not fit this {self.pipeline_class.__name__}, which is distilled to "
                f"do without guidance. Leave guidance_scale unset, or set it to {self.unguided_scale}."
            )

    @classmethod
    def check_condition_image(cls, has_image: bool) -> None:
        """Raise a `ValueError` where prompts come with images and the family edits none, or the other way round."""
        name = cls.pipeline_class.__name__
        if has_image and not cls.takes_image:
            raise ValueError(
                f"There is a {CONDITION_IMAGE}, but a {name} draws from prompts alone. Remove it, of a dataset by "
                f"dataset.remove_columns({CONDITION_IMAGE!r}), or use a model that edits images."
            )
        if cls.takes_image and not has_image:
            raise ValueError(
                f"A {name} edits images, and there is no {CONDITION_IMAGE}. Add the images to edit to the dataset, in a "
                f"column {CONDITION_IMAGE!r} of type datasets.Image or of paths."
            )

    def set_distilled(self, undistilled_model: str) -> None:
        """Say that the network was distilled, from the model of this Hub id, to do without true guidance."""
        self.undistilled_model = undistilled_model
        self.has_guidance = self.true_guidance = False
        self.default_guidance_scale = self.unguided_scale
        self._negative_prompt = None

    @classmethod
    def check_pipeline(cls, config: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the family cannot use a pipeline of this configuration, before anything is loaded."""
        return

    @property
    def denoiser(self) -> torch.nn.Module:
        """The pipeline's transformer. `get_peft_model` wraps it in place, so it carries the adapter's layers then."""
        return self.pipeline.transformer

    def is_unused(self, name: str) -> bool:
        """Whether the network's output does not depend on the parameter of this name."""
        return False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's blocks in the backward pass instead of keeping their activations."""
        self.denoiser.enable_gradient_checkpointing()

    def freeze_unused(self, network: torch.nn.Module) -> None:
        """Freeze parameters that no gradient reaches, of the denoiser as it is or with an adapter: DDP waits for them."""
        for name, parameter in network.named_parameters():
            if self.is_unused(name):
                parameter.requires_grad_(False)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pipeline's images where the user gives none."""
        size = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return size, size

    @property
    def latent_downsample(self) -> int:
        """Pixels along the side of one token: sizes must be multiples of it."""
        return self.pipeline.vae_scale_factor * self.patch_size

    @classmethod
    def vae_downsample(cls, vae_config: dict[str, Any]) -> int:
        """Pixels along the side of one latent pixel, from the VAE's configuration, before anything is loaded."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

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

    @classmethod
    def check_num_frames(cls, num_frames: int | None) -> None:
        """
        Raise a `ValueError` that names the nearest possible numbers unless videos can have so many frames; of a family that
        makes images, unless it is `None` or 1.
        """
        name = cls.pipeline_class.__name__
        if cls.default_num_frames is None:
            if num_frames not in (None, 1):
                raise ValueError(
                    f"num_frames={num_frames} does not fit a {name}, which makes images. Leave num_frames unset."
                )
            return
        step = cls.temporal_downsample
        if num_frames is not None and (num_frames < 1 or (num_frames - 1) % step):
            lower = max((num_frames - 1) // step, 0) * step + 1
            nearest = f"{lower} and {lower + step}" if num_frames > lower else f"{lower}"
            raise ValueError(
                f"num_frames={num_frames} is not possible with this {name}: its VAE makes one frame, and then {step} of each "
                f"further latent frame, so it must be {step} k + 1. Nearest: {nearest}."
            )

    # ------------------------------------------------------------------------------------------------------- prompts
    @abstractmethod
    def encode(self, prompts: list[Prompt], device: torch.device) -> list[dict[str, torch.Tensor]]:
        """
        The family's: the conditioning of each prompt, by the pipeline's own method, so that a prompt means what it
        means in the pipeline.

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, with images where the family edits them.
            device (`torch.device`):
                Where the text encoders are.

        Returns:
            `list[dict[str, torch.Tensor]]` of length B: tensors without a dimension for the batch, those named in
            `variable_length` without padding.
        """

    def encode_rows(self, prompts: list[Prompt]) -> list[dict[str, torch.Tensor]]:
        """
        The conditioning of each prompt, without gradient and outside of autocast (under which T5 can overflow).

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, with images where the family edits them.

        Returns:
            `list[dict[str, torch.Tensor]]` of length B: one row for [`collate`] for each prompt. On the text encoders'
            device and in their dtype.

        Raises:
            `RuntimeError`: if the text encoders were freed and cannot be loaded again.
        """
        self._need_text_encoders()
        device = next(iter(self.text_encoders.values())).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.encode(prompts, device)

    def empty_row(self) -> dict[str, torch.Tensor]:
        """
        Tensors of the shapes and dtypes of a prompt's conditioning at its longest, with any content: what a network is
        counted with, from its configuration alone.
        """
        return {"prompt_embeds": torch.empty(self.max_sequence_length, self.transformer_config.joint_attention_dim)}

    def row_lengths(self, mask: torch.Tensor) -> list[int]:
        """Length of each row of a batch by its mask `(B, L)`."""
        return mask.sum(1).tolist()

    def row_length(self, row: dict[str, torch.Tensor]) -> int:
        """Length of a prompt's conditioning; 0 where the family's all have the same."""
        return max((len(row[name]) for name in self.variable_length), default=0)

    def collate(self, rows: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
        """
        Rows of [`encode_rows`] as a batch.

        Args:
            rows (`list[dict[str, torch.Tensor]]` of length B):
                Rows.
            length (`int`, *optional*):
                What entries of variable length are padded to; the longest row's by default. Give one length for a whole
                run, and no row depends on the rows beside it, to the last bit.

        Returns:
            `dict[str, torch.Tensor]`: the first dimension of every entry is B. Entries of variable length have a mask
            beside them, `{name}_mask` `(B, length)`, `bool`, true where a row has content.
        """
        if length is None:
            length = max(self.row_length(row) for row in rows)
        batch = {}
        for name in rows[0]:
            tensors = [row[name] for row in rows]
            if name in self.variable_length:
                lengths = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
                batch[f"{name}_mask"] = torch.arange(length, device=lengths.device) < lengths[:, None]
                tensors = [F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, length - len(tensor))) for tensor in tensors]
            batch[name] = torch.stack(tensors)
        return batch

    def encode_prompt(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """
        The denoiser's conditioning of prompts as a batch, with that of the negative prompt where guidance needs it.

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, with images where the family edits them.

        Returns:
            `dict[str, torch.Tensor]`: the first dimension of every entry is B; the negative prompt's entries are named
            `negative_{name}`. On the text encoders' device and in their dtype.

        Raises:
            `RuntimeError`: if the text encoders were freed and cannot be loaded again.
        """
        if self.negative_prompt is None:
            return self.collate(self.encode_rows(prompts))
        negatives = [self.negative_of(prompt) for prompt in prompts]
        distinct = list(dict.fromkeys(negatives))
        batch = self.collate(self.encode_rows([*prompts, *distinct]))
        rows = [len(prompts) + distinct.index(negative) for negative in negatives]
        conditioning = {name: tensor[: len(prompts)] for name, tensor in batch.items()}
        return add_negative(conditioning, {name: tensor[rows] for name, tensor in batch.items()}, len(prompts))

    @property
    def can_encode(self) -> bool:
        """Whether the text encoders are in memory or can be loaded."""
        return bool(self.text_encoders) or self.load_text_encoders is not None

    def _need_text_encoders(self) -> None:
        if not self.can_encode:
            raise RuntimeError(
                "There are no text encoders to encode prompts with: they were freed, or the pipeline was loaded without "
                "them. Load the whole pipeline, or pass its id or path instead of the pipeline."
            )
        if not self.text_encoders:
            self.text_encoders = self.load_text_encoders()
            for name, module in self.text_encoders.items():
                setattr(self.pipeline, name, module.requires_grad_(False).eval())

    @contextlib.contextmanager
    def text_encoders_on(self, device: torch.device) -> Iterator[None]:
        """
        Within this context the text encoders are on a device, for [`encode_prompt`]; they are loaded where they are not in
        memory, and wait on the CPU afterwards.

        Raises:
            `RuntimeError`: they were freed, and the pipeline was given loaded.
        """
        self._need_text_encoders()
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
        num_tokens = (height // self.latent_downsample) * (width // self.latent_downsample)
        mu = self.schedule_shift(num_tokens, num_inference_steps) if scheduler.config.use_dynamic_shifting else None
        sigmas = self.unshifted_sigmas(num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device="cpu", sigmas=sigmas, mu=mu)
        if not scheduler.sigmas.isfinite().all():
            # shift_terminal stretches the sigmas between the first and the last, which are one here.
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is not possible with this pipeline's schedule. Raise it, or "
                "set sigma_shift."
            )
        return scheduler.sigmas

    def schedule_shift(self, num_tokens: int, num_inference_steps: int) -> float:
        """The mu that the pipeline passes to a scheduler with dynamic shifting."""
        config = self.pipeline.scheduler.config
        return calculate_shift(
            num_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )

    def unshifted_sigmas(self, num_inference_steps: int) -> Sequence[float] | None:
        """The sigmas that the pipeline passes to its scheduler; `None`: the scheduler makes them."""
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """
        Shape `(C, h, w)`, or `(C, F, h, w)`, of the latents of an image of a size in pixels. A family that makes videos takes
        `num_frames` as well, their number of frames, or `None` for the default.
        """
        factor = self.pipeline.vae_scale_factor
        return (self.vae.config.latent_channels, height // factor, width // factor)

    def draw_noise(
        self,
        num: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | str = "cpu",
        num_frames: int | None = None,
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
            num_frames (`int`, *optional*):
                Frames of a video; the family's default if `None`. Not for images.

        Returns:
            `torch.Tensor` of shape `(B, C, [F,] h, w)`: float32.
        """
        if isinstance(generator, list) and len(generator) != num:
            raise ValueError(f"Got {len(generator)} generators for {num} samples: pass one, or one for each sample.")
        self.check_num_frames(num_frames)
        size = (height, width) if self.default_num_frames is None else (height, width, num_frames)
        shape = (num, *self.latent_shape(*size))
        return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)

    @abstractmethod
    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        """
        The family's: one forward of the network.

        Args:
            denoiser (`torch.nn.Module`):
                The network to call, which may be wrapped, and not the pipeline's.
            latents (`torch.Tensor` of shape `(B, C, [F,] h, w)`):
                Noisy latents, in the network's dtype.
            sigma (`torch.Tensor` of shape `(B,)`):
                Noise levels, float32, not to be rounded: rollout and training must tell the network the same.
            conditioning (`dict[str, torch.Tensor]`):
                Rows of [`encode`], collated, in the network's dtype.
            guidance_scale (`float`):
                For a network in which guidance is embedded.

        Returns:
            `torch.Tensor` of the shape of `latents`: the prediction of e - x_0, in any dtype.
        """

    def velocity(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        """
        The network's prediction v of e - x_0, differentiable, with guidance.

        Args:
            denoiser (`torch.nn.Module`):
                [`denoiser`], wrapped or not (PEFT, DDP, FSDP, DeepSpeed).
            latents (`torch.Tensor` of shape `(B, C, [F,] h, w)`):
                Noisy latents, float32 (or float64, with weights in float64).
            sigma (`torch.Tensor` of shape `()` or `(B,)`):
                Noise level in [0, 1], the exact one of the schedule, neither rounded nor truncated.
            conditioning (`dict[str, torch.Tensor]`):
                Result of [`encode_prompt`], one row for each row of `latents`.
            guidance_scale (`float`):
                Guidance, embedded or true, as in the family's pipeline.

        Returns:
            `torch.Tensor` of the shape and dtype of `latents`.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(latents.shape[0])
        hidden_states = latents.to(self.dtype)
        positive, negative = {}, {}
        for name, tensor in conditioning.items():
            tensor = tensor.to(latents.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            if name.startswith(_NEGATIVE):
                negative[name.removeprefix(_NEGATIVE)] = tensor
            else:
                positive[name] = tensor
        if not self.is_guided(guidance_scale):
            return self.forward(denoiser, hidden_states, sigma, positive, guidance_scale).to(latents.dtype)
        # One doubled batch, the negative prompt first.
        velocity = self.forward(
            denoiser,
            torch.cat([hidden_states, hidden_states]),
            torch.cat([sigma, sigma]),
            {name: torch.cat([negative[name], positive[name]]) for name in positive},
            guidance_scale,
        )
        negative, positive = velocity.to(latents.dtype).chunk(2)
        return self.guide(positive, negative, guidance_scale)

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether this guidance takes a second forward, with the negative prompt."""
        return self.true_guidance and guidance_scale > self.unguided_scale

    def size_arguments(self, height: int, width: int) -> dict[str, int]:
        """What the pipeline's own call is told for a size in pixels."""
        return {"height": height, "width": width}

    def guidance_arguments(self, guidance_scale: float) -> dict[str, Any]:
        """What the pipeline's own call is told for this guidance."""
        negative = {"negative_prompt": self.negative_prompt} if self.negative_prompt else {}
        return {"guidance_scale": guidance_scale, **negative}

    def guide(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """
        [Classifier-free guidance](https://huggingface.co/papers/2207.12598) of two velocities `(B, C, [F,] h, w)`, that
        of the prompts and that of the negative prompt.
        """
        return negative + guidance_scale * (positive - negative)

    # ----------------------------------------------------------------------------------------------------------- VAE
    def latent_statistics(self, like: torch.Tensor) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """
        Shift and scale between what the VAE encodes, z, and latents: `latents = (z - shift) * scale`. Numbers, or tensors
        that broadcast with latents, on the device and in the dtype of `like`.
        """
        return self.vae.config.shift_factor, self.vae.config.scaling_factor

    def patchify(self, z: torch.Tensor) -> torch.Tensor:
        """What the VAE encodes, `(B, C, h, w)`, in the layout of latents."""
        return z

    def unpatchify(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of [`patchify`]."""
        return z

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Images or videos of clean latents, differentiable (where the clamp is not active). Their size follows from the
        latents'.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)` or `(B, C, F, h, w)`):
                Clean latents, float32 (or float64, with a VAE in float64); F is 1 where the family makes images.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`: in [0, 1], in the dtype of the latents.
        """
        shift, scale = self.latent_statistics(latents)
        z = self.unpatchify(latents / scale + shift)
        images = self.vae.decode(z.to(device=self.vae.device, dtype=self.vae.dtype), return_dict=False)[0]
        if self.default_num_frames is not None:
            images = images.transpose(1, 2)
        elif images.ndim == 5:  # a VAE of videos, with one frame
            images = images.squeeze(2)
        return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def encode_image(
        self, images: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Latents of images or videos.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, of videos `(B, F, 3, H, W)`):
                Images in [0, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Sample the VAE's posterior with it. By default its mode is taken.

        Returns:
            `torch.Tensor` of shape `(B, C, [F,] h, w)`: float32 latents.
        """
        height, width = images.shape[-2:]
        self.check_size(height, width)
        if self.default_num_frames is not None:
            if images.ndim != 5:
                raise ValueError(
                    f"{type(self).__name__} encodes videos of shape (B, F, 3, H, W), got {tuple(images.shape)}. Give an image "
                    "as a video of one frame."
                )
            self.check_num_frames(images.shape[1])
            images = images.transpose(1, 2)
        elif len(self.latent_shape(height, width)) == 4:  # a VAE of videos
            images = images.unsqueeze(2)
        images = (images * 2 - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.patchify(self.encode_pixels(images, generator).float())
        shift, scale = self.latent_statistics(latents)
        return (latents - shift) * scale

    def encode_pixels(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """What the VAE makes of pixels in [-1, 1]: the mode of its posterior, or a sample if there is a generator."""
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mode() if generator is None else posterior.sample(generator)

    def enable_vae_gradient_checkpointing(self) -> None:
        """
        Recompute the VAE's blocks in the backward pass of [`decode`] instead of keeping their activations.

        Unlike in transformers' models it works in eval mode: diffusers' blocks ask only whether gradients are enabled.
        The blocks of a VAE that diffusers does not recompute are recomputed by [`torch.utils.checkpoint`].
        """
        if self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        else:
            for block in (self.vae.decoder.mid_block, *self.vae.decoder.up_blocks):
                block.forward = recomputed(block.forward)
