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

"""What the card of a run says of it."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from ..data.prompt_images import text_of


if TYPE_CHECKING:
    from .base_trainer import DiffusionTrainer


def card_facts(trainer: "DiffusionTrainer") -> dict[str, Any]:
    """What is known of a run, by the arguments of [`~trl_diffusion.hub.build_model_card`]."""
    args = trainer.args
    names = {field.name for field in fields(trainer.config_class)} - {
        field.name for field in fields(TrainingArguments)
    }
    names |= {
        "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
        "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "lr_scheduler_type", "seed", "bf16",
    }  # fmt: skip
    # What a reader needs to repeat the training; no paths.
    settings = {name: value for name, value in args.to_dict().items() if name in names}
    settings |= {"height": trainer.height, "width": trainer.width, "guidance_scale": trainer.guidance_scale}
    settings["num_frames"] = trainer.num_frames
    if trainer.num_frames is None:
        del settings["frame_reduction"]
    if trainer.has_adapter:
        lora = trainer.network.peft_config["default"]
        settings |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
    settings = {name: value for name, value in settings.items() if value is not None}
    return {
        "model_name": trainer.method_name,
        "pipeline_class": type(trainer.flow.pipeline).__name__,
        "base_model": trainer.model_name,
        "trainer_name": type(trainer).__name__,
        "papers": trainer.papers,
        "rewards": dict(zip(trainer.rewards, trainer.reward_weights.tolist(), strict=True)),
        "watched_rewards": list(trainer.watched_rewards),
        "settings": settings | {"num_processes": trainer.accelerator.num_processes},
        "prompt": text_of(trainer.first_prompts(1)[0]),
        "takes_image": trainer.flow.takes_image,
        "fused_loras": sorted(trainer.flow.pipeline.fused_loras),
        "undistilled_model": trainer.flow.undistilled_model,
        "distilled_model": trainer.flow.distilled_model,
        "transformer_class": None if trainer.has_adapter else type(trainer.flow.denoiser).__name__,
        "call_arguments": {
            **trainer.flow.size_arguments(trainer.height, trainer.width),
            **({} if trainer.num_frames is None else {"num_frames": trainer.num_frames}),
            **trainer.flow.guidance_arguments(trainer.guidance_scale),
            "num_inference_steps": args.num_inference_steps,
            "max_sequence_length": trainer.flow.max_sequence_length,
        },
    }
