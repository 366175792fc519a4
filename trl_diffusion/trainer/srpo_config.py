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

"""Settings of [`SRPOTrainer`]."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..planning.workload import Workload
from .base_config import DiffusionConfig


_FLUX_720 = {
    "height": 720,
    "width": 720,
    "num_inference_steps": 25,
    "sigma_shift": 3.0,
    "guidance_scale": 3.5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-6,
    "weight_decay": 1e-4,
    "max_grad_norm": 0.1,
    "lr_scheduler_type": "constant",
    "max_steps": 20,
    "reward_threshold": 0.7,
    "reward_gradient_checkpointing": True,
}


@dataclass
class SRPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`SRPOTrainer`].

    Only the parameters specific to the method are listed here; see [`DiffusionConfig`] and
    [`~transformers.TrainingArguments`] for the others.

    Parameters:
        > Parameters that control the estimator

        estimator (`str`, *optional*, defaults to `"direct_align"`):
            How the reward's gradient reaches the denoiser: `"direct_align"` (one forward at any noise level),
            `"refl"` (one-step prediction at a late step) or `"draft"` (through the last sampling steps).
        branches (`list[str]`, *optional*, defaults to `["denoise", "inversion"]`):
            Branches of Direct-Align.
        num_landings (`int`, *optional*, defaults to `1`):
            Noise levels drawn for each sample and optimizer step; their losses are averaged.
        sigma_range (`list[float]`, *optional*, defaults to `[0.75, 0.964]`):
            Lowest and highest noise level. For `"refl"` it selects the sampling steps whose prediction is scored.
        delta_sigma (`float`, *optional*):
            Length of the step of a pass. `None` takes a tenth of the width of `sigma_range`.
        draft_steps (`int`, *optional*, defaults to `1`):
            Last sampling steps that carry a gradient (K of DRaFT-K).
        draft_renoisings (`int`, *optional*, defaults to `1`):
            Passes averaged by the low-variance estimator of DRaFT: the first through the sampled image, the others
            through its re-noisings. Needs `draft_steps=1`.

        > Parameters that control the preference

        preference (`str`, *optional*, defaults to `"relative"`):
            `"relative"`, `"difference"` (no discount), `"absolute"` (the plain prompt) or `"interpolated"`.
        denoise_discount (`list[float]`, *optional*, defaults to `[0.1, 0.25]`):
            Discount of the denoise branch at the clean and the noisy end of `sigma_range`.
        inversion_discount (`list[float]`, *optional*, defaults to `[0.3, 0.01]`):
            Discount of the inversion branch at the clean and the noisy end of `sigma_range`.
        reward_threshold (`float`, *optional*, defaults to `0.7`):
            The loss of a pass is `relu(reward_threshold - r)`.
        positive_words (`list[str]` or `dict[str, list[str]]`, *optional*):
            Control words of the positive prompt; the word used cycles with the optimizer step. A dict gives each
            reward its own list, by the name under which it is logged. `None` takes the paper's words.
        negative_words (`list[str]` or `dict[str, list[str]]`, *optional*):
            Control words of the negative prompt, likewise; they cycle by their own number.
        control_template (`str`, *optional*, defaults to `"{control}. {prompt}"`):
            How the reward's prompt is made of control word and prompt. The generator sees the plain prompt.

        > Parameters that control images

        rollout_guidance_scale (`float`, *optional*):
            Guidance of the rollout. `None` takes `guidance_scale`.
        noise_prior (`str`, *optional*, defaults to `"rollout"`):
            `"rollout"`: the noise that the rollout started from; `"fresh"`: new noise. Images of the dataset always
            get fresh noise.
        offline_steps (`int`, *optional*):
            With a dataset that has images: train on them for this many optimizer steps and on rollouts afterwards.
            `None` trains on the images throughout.

        > Parameters that control memory

        vae_gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Recompute the activations of the VAE in the backward pass.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Decode the images of a batch one by one.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Decode each image in tiles, for sizes that do not fit in memory; tiles may show at their seams.
        reward_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute the activations of the reward models in the backward pass.

        > Parameters that control reward hacking

        hacking_patience (`int`, *optional*, defaults to `2`):
            Warn when, for this many evaluations in a row, the trained objective is higher and a watched reward lower than
            when the watched one was best. Images are compared in pairs; changes within 2.5 standard errors do not count.
        stop_on_hacking (`bool`, *optional*, defaults to `False`):
            Stop the training then.

        > Parameters whose defaults differ from those of [`DiffusionConfig`]

        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Initial learning rate of AdamW. The default suits LoRA; the paper trains all weights with 5e-6.
        max_grad_norm (`float`, *optional*, defaults to `0.1`):
            Gradients are clipped to this norm, the paper's value.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Number of sampling steps T of the rollout.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DiffusionConfig._VALID_DICT_FIELDS, "positive_words", "negative_words"]

    _UNCHECKED_TYPES = ("positive_words", "negative_words")
    BEST_METRIC = "objective"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # https://huggingface.co/papers/2509.06942
        "srpo_hpsv2": {
            **_FLUX_720,
            "sigma_range": [0.75, 0.964],
            "rollout_guidance_scale": 1.0,
            "denoise_discount": [0.10, 0.25],
            "inversion_discount": [0.30, 0.01],
        },
        "srpo_pickscore": {
            **_FLUX_720,
            "sigma_range": [0.667, 0.964],
            "rollout_guidance_scale": 2.0,
            "denoise_discount": [0.10, 0.50],
            "inversion_discount": [0.60, 0.01],
        },
    }
    PRESET_REWARDS: ClassVar[dict[str, list[str]]] = {
        "srpo_hpsv2": ["hpsv2"],
        "srpo_pickscore": ["pickscore:scale=0.05"],  # the paper divides by 20
    }

    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "The initial learning rate for AdamW. The default suits LoRA; the paper trains all weights "
                  "with 5e-6."},
    )  # fmt: skip
    max_grad_norm: float = field(default=0.1, metadata={"help": "Gradient clipping, the paper's value."})
    num_inference_steps: int = field(default=25, metadata={"help": "Number of sampling steps T."})

    estimator: str = field(
        default="direct_align",
        metadata={
            "help": "How the reward's gradient reaches the denoiser.",
            "choices": ["direct_align", "refl", "draft"],
        },
    )
    branches: list[str] = field(
        default_factory=lambda: ["denoise", "inversion"], metadata={"help": "Branches of Direct-Align."}
    )
    num_landings: int = field(default=1, metadata={"help": "Noise levels drawn for each sample and optimizer step."})
    sigma_range: list[float] = field(
        default_factory=lambda: [0.75, 0.964], metadata={"help": "Lowest and highest noise level."}
    )
    delta_sigma: float | None = field(
        default=None,
        metadata={"help": "Length of the step of a pass. None takes a tenth of the width of sigma_range."},
    )
    draft_steps: int = field(default=1, metadata={"help": "Last sampling steps that carry a gradient."})
    draft_renoisings: int = field(
        default=1, metadata={"help": "Passes averaged by DRaFT's low-variance estimator; needs draft_steps=1."}
    )

    preference: str = field(
        default="relative",
        metadata={
            "help": "Form of the reward of a pass.",
            "choices": ["relative", "difference", "absolute", "interpolated"],
        },
    )
    denoise_discount: list[float] = field(
        default_factory=lambda: [0.1, 0.25],
        metadata={"help": "Discount of the denoise branch at the clean and the noisy end of sigma_range."},
    )
    inversion_discount: list[float] = field(
        default_factory=lambda: [0.3, 0.01],
        metadata={"help": "Discount of the inversion branch at the clean and the noisy end of sigma_range."},
    )
    reward_threshold: float = field(
        default=0.7, metadata={"help": "The loss of a pass is relu(reward_threshold - r)."}
    )
    positive_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Control words of the positive prompt; the word used cycles with the optimizer step. None takes "
            "the paper's. In a YAML file, a mapping gives each reward its own list."
        },
    )
    negative_words: list[str] | None = field(
        default=None, metadata={"help": "Control words of the negative prompt, likewise."}
    )
    control_template: str = field(
        default="{control}. {prompt}", metadata={"help": "How the reward's prompt is made of control word and prompt."}
    )

    rollout_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of the rollout. None takes guidance_scale."}
    )
    noise_prior: str = field(
        default="rollout",
        metadata={"help": "The noise that the rollout started from, or fresh noise.", "choices": ["rollout", "fresh"]},
    )
    offline_steps: int | None = field(
        default=None,
        metadata={
            "help": "With a dataset that has images: train on them for this many optimizer steps and on rollouts "
            "afterwards. None trains on the images throughout."
        },
    )

    vae_gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute the activations of the VAE in the backward pass."}
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Decode the images of a batch one by one."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode each image in tiles."})
    reward_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the activations of reward models in the backward pass."}
    )

    hacking_patience: int = field(
        default=2,
        metadata={
            "help": "Warn when, for this many evaluations in a row, the trained objective is higher and a watched "
            "reward lower than when the watched one was best."
        },
    )
    stop_on_hacking: bool = field(default=False, metadata={"help": "Stop the training then."})

    def _guidance_scales(self) -> list[float | None]:
        return [self.guidance_scale, *([] if self.rollout_guidance_scale is None else [self.rollout_guidance_scale])]

    def __post_init__(self):
        if self.positive_words is None:
            self.positive_words = ["Natural-lighting", "Detail", "Detailed", "Real"]
        if self.negative_words is None:
            self.negative_words = ["Concept art", "Painting", "Anime", "Flat", "Oil"]
        super().__post_init__()

    def _check_values(self) -> None:
        super()._check_values()
        self._check_choice("estimator", ("direct_align", "refl", "draft"))
        self._check_choice("preference", ("relative", "difference", "absolute", "interpolated"))
        self._check_choice("noise_prior", ("rollout", "fresh"))
        if (
            not self.branches
            or not set(self.branches) <= {"denoise", "inversion"}
            or len(set(self.branches)) != len(self.branches)
        ):
            raise ValueError(f"branches must be 'denoise', 'inversion' or both, got {self.branches!r}.")
        for name in ("num_landings", "draft_steps", "draft_renoisings", "hacking_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("sigma_range", "denoise_discount", "inversion_discount"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must have two values, clean end and noisy end, got {getattr(self, name)!r}.")
        self._check_sigmas()
        self._check_words()
        if self.draft_steps > self.num_inference_steps:
            raise ValueError(
                f"draft_steps={self.draft_steps} exceeds the num_inference_steps={self.num_inference_steps} sampling "
                "steps."
            )
        if self.draft_renoisings > 1 and self.draft_steps > 1:
            raise ValueError(
                f"draft_renoisings={self.draft_renoisings} needs draft_steps=1, got draft_steps={self.draft_steps}: "
                "the low-variance estimator goes through one step."
            )
        if self.offline_steps is not None and self.offline_steps < 1:
            raise ValueError(f"offline_steps must be at least 1, got {self.offline_steps}. Use None to train offline.")

    def _check_sigmas(self) -> None:
        low, high = self.sigma_range
        if not 0 < low < high < 1:
            raise ValueError(
                f"sigma_range must ascend inside (0, 1), got {self.sigma_range}. The paper uses [0.75, 0.964]."
            )
        if self.delta_sigma is None:
            self.delta_sigma = (high - low) / 10
        # Where the passes start: above the landing in the denoise branch, below it in the inversion branch.
        start_high = high + self.delta_sigma if "denoise" in self.branches else high
        start_low = low - self.delta_sigma if "inversion" in self.branches else low
        if self.estimator == "direct_align" and not (self.delta_sigma > 0 and start_low >= 0 and start_high <= 1):
            raise ValueError(
                f"delta_sigma={self.delta_sigma} leads from sigma_range={self.sigma_range} to noise levels between "
                f"{start_low:.4g} and {start_high:.4g}; they must stay inside [0, 1] and delta_sigma above 0. Narrow "
                "sigma_range or lower delta_sigma."
            )

    def _check_words(self) -> None:
        for name in ("positive_words", "negative_words"):
            words = getattr(self, name)
            lists = list(words.values()) if isinstance(words, dict) else [words]
            if not all(
                isinstance(words_, list | tuple) and all(isinstance(word, str) for word in words_) for words_ in lists
            ):
                raise ValueError(f"{name} must be a list of words, or a dict of lists by reward, got {words!r}.")
            if self.preference != "absolute" and not (lists and all(lists)):
                raise ValueError(
                    f"{name} is empty ({words!r}), but preference={self.preference!r} compares prompts with control "
                    "words. Give at least one word, or use preference='absolute'."
                )
            blank = [word for words_ in lists for word in words_ if not word.strip()]
            if blank:
                raise ValueError(f"{name} has the empty word {blank[0]!r}. Remove it.")
        for placeholder in ("{control}", "{prompt}"):
            if placeholder not in self.control_template:
                raise ValueError(
                    f"control_template must contain {placeholder}, got {self.control_template!r}. The paper uses "
                    "'{control}. {prompt}'."
                )

    def control_prompts(self, words: list[str] | dict[str, list[str]], reward: str, step: int, prompts: list[str]):
        """The prompts that a reward sees at an optimizer step; braces in a user's prompt stay as they are."""
        choices = words[reward] if isinstance(words, dict) else words
        control = choices[step % len(choices)]
        return [self.control_template.replace("{control}", control).replace("{prompt}", prompt) for prompt in prompts]

    def workload(self) -> Workload:
        """What a run that draws its images computes and holds: each landing is one pass a branch, and a pass is a term."""
        notes = ()
        if self.estimator == "draft":
            notes = (f"each pass of estimator='draft' is counted as one step, and goes through {self.draft_steps}",)
        return Workload(
            rollout_rows=self.num_inference_steps,
            trained_rows=self.num_landings * len(self.branches),
            term_rows=1,
            held_latents=3,
            through_rewards=True,
            notes=notes,
        )
