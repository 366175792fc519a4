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

"""A small run of the trainer, on tiny models."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_models import (
    tiny_chroma_pipeline,
    tiny_flux2_klein_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_krea2_pipeline,
    tiny_qwen_image_edit_plus_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer


PROMPTS = ["a cat", "a dog", "a bird", "a fish", "a house on a hill", "rain"]
PIPELINES = {
    "flux": tiny_flux_pipeline,
    "sd3": tiny_sd3_pipeline,
    "qwen-image": tiny_qwen_image_pipeline,
    "flux2-klein": tiny_flux2_klein_pipeline,
    "z-image": tiny_z_image_pipeline,
    "chroma": tiny_chroma_pipeline,
    "sana": tiny_sana_pipeline,
    "krea2": tiny_krea2_pipeline,
    "flux-kontext": tiny_flux_kontext_pipeline,
    "qwen-image-edit-plus": tiny_qwen_image_edit_plus_pipeline,
    "wan": tiny_wan_pipeline,
}
EDITING = ("flux-kontext", "qwen-image-edit-plus")


def redness(images, prompts, **columns):
    """Mean of the red channel: the images of a group differ in it."""
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]


def picture(index, size=None):
    """One of the pictures to edit, of different sizes."""
    width, height = size or [(40, 21), (33, 34), (20, 44)][index % 3]
    pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def dataset_of(family):
    """Prompts, with images to edit where the family does."""
    images = {"condition_image": [picture(i) for i in range(len(PROMPTS))]} if family in EDITING else {}
    return Dataset.from_dict({"prompt": PROMPTS, **images})


@pytest.fixture
def train_dataset():
    return dataset_of("flux")


@pytest.fixture
def make_trainer(tmp_path):
    """Builds a trainer of a tiny model; keyword arguments are settings, and some of the trainer's own."""

    def make(family="flux", reward_funcs=redness, **settings):
        arguments = {
            name: settings.pop(name)
            for name in (
                "peft_config",
                "watch_reward_funcs",
                "eval_dataset",
                "callbacks",
                "train_dataset",
                "model",
                "optimizers",
                "optimizer_cls_and_kwargs",
            )  # fmt: skip
            if name in settings
        }
        if "peft_config" not in arguments:
            # B away from zero, so that the adapter does something from the first step on.
            arguments["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "num_inference_steps": 6,
            "chunk_sizes": [2, 3],
            "height": 32,
            "width": 32,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "cache_prompt_embeds": False,
        }
        config = ChunkGRPOConfig(**{**defaults, **settings})
        arguments.setdefault("train_dataset", dataset_of(family))
        model = arguments.pop("model", None) or PIPELINES[family](seed=0)
        return ChunkGRPOTrainer(model, reward_funcs, config, **arguments)

    return make


def trainable(trainer):
    """Copies of the trained weights, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def generation(trainer, prompts=("a cat", "a dog")):
    """One generation of a trainer that has not trained yet."""
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(trainer.args.num_generations)]
    return trainer.make_micro_batches(rows, 0)


def perturb(trainer, scale=0.02, seed=0):
    """Move the adapter away from its start, where its second matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def gradients(trainer, micro_batch, losses=None):
    """Gradients of the trained weights by one micro-batch, in float64; adds the losses of its terms to a list."""
    trainer.model.zero_grad()
    trainer.model.train()
    for term in trainer.loss_terms(trainer.model, micro_batch):
        loss = term()
        loss.backward()
        if losses is not None:
            losses.append(loss.item())
    return torch.cat([p.grad.flatten().double() for p in trainer.model.parameters() if p.requires_grad])


def in_float64(trainer, *micro_batches):
    """From here on the trainer computes in float64, with what these have of their rollout."""
    trainer.model.double()
    trainer.flow.dtype = torch.float64
    trainer._transitions_on_device = trainer.transitions
    for batch in micro_batches:
        batch.states = {i: latents.double() for i, latents in batch.states.items()}
        batch.advantages, batch.log_probs = batch.advantages.double(), batch.log_probs.double()


def off_policy_in_float64(trainer, prompts=("a cat", "a dog")):
    """A micro-batch in float64 whose old policy is known, and the policy moved on."""
    perturb(trainer)
    batch = generation(trainer, prompts)[0]
    in_float64(trainer, batch)
    trainer._add_old_policy(trainer.model, batch)
    perturb(trainer, seed=1)
    return batch
