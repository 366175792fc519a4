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

"""DiffusionNFT (https://huggingface.co/papers/2509.16117) on the built-in world: a method of one's own.

```bash
python examples/diffusion_nft.py --output_dir nft
accelerate launch --config_file trl_diffusion/accelerate_configs/multi_gpu.yaml --num_processes 2 examples/diffusion_nft.py
python examples/diffusion_nft.py --output_dir nft --resume_from_checkpoint True
```
"""

from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from trl import TrlParser

from trl_diffusion import shapes
from trl_diffusion.trainer import Generation, OnlineConfig, OnlineTrainer
from trl_diffusion.trainer.online_trainer import METHOD_STREAM


# Attention and feed-forward layers, as the demos train.
LAYERS = r"(.*\.)?(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
SETTINGS = {
    "output_dir": "diffusion-nft", "height": 32, "width": 32, "num_inference_steps": 6, "sigma_shift": 3.0,
    "guidance_scale": 3.5, "shared_noise": "none", "num_generations": 8, "per_device_train_batch_size": 48,
    "learning_rate": 3e-4, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 120,
    "logging_steps": 10, "save_steps": 40, "gradient_checkpointing": False,
    # Advantages are (reward - mean of the group) / std of the batch, clipped to [-1, 1].
    "scale_rewards": "batch", "advantage_clip": 1.0, "num_eval_images": 512,
}  # fmt: skip


@dataclass
class NFTConfig(OnlineConfig):
    num_sigmas: int = field(default=3, metadata={"help": "Noise levels of the schedule that a generation trains."})
    strength: float = field(default=1.0, metadata={"help": "How far the implicit policies are apart (b)."})


@dataclass(kw_only=True)
class NFTGeneration(Generation):
    # By step of the schedule, as the noised latents in `states`: the true velocities and those of the old policy.
    targets: dict[int, torch.Tensor] = field(default_factory=dict)
    old: dict[int, torch.Tensor] = field(default_factory=dict)


class NFTTrainer(OnlineTrainer):
    """Trains by the forward process: good images attract the velocity, bad ones repel it; no log-probabilities."""

    method_name = "DiffusionNFT"
    papers = ("diffusion_nft",)
    config_class = NFTConfig
    generation_class = NFTGeneration

    def make_micro_batches(self, rows, index):
        # Before the first generation, and not after a resume, which brings it.
        if "old" not in self.policies:
            self.policies.keep("old")
        elif index > 0:
            self.policies.update("old", min(0.001 * index, 0.5))
        generation = self.make_generation(rows, index, policy="old")

        (draw,) = self.generators(METHOD_STREAM, index, [0])
        steps = torch.randperm(self.args.num_inference_steps, generator=draw, device=draw.device)[
            : self.args.num_sigmas
        ]
        for step in sorted(steps.tolist()):
            sigma = self.sigmas[step].item()
            noise = self.image_sampler.draw_noise(self.generators(METHOD_STREAM, index, 1 + step, generation.index))
            generation.states[step] = (1 - sigma) * generation.clean + sigma * noise
            generation.targets[step] = noise - generation.clean

        batches = generation.split(self.args.per_device_train_batch_size)
        with torch.no_grad(), self.policies.use("old"), self.rollout_model() as model:
            for batch in batches:
                batch.old = {step: self.velocity_at(model, batch, step) for step in batch.states}
        return batches

    def velocity_at(self, model, batch, step):
        latents = batch.states[step]
        sigma = self.sigmas[step].to(latents.device).expand(len(latents))
        return self.velocity(model, latents, sigma, self.conditioning.get(batch.prompts))

    def loss_terms(self, model, batch):
        return [lambda step=step: self.loss_at(model, batch, step) / len(batch.states) for step in batch.states]

    def loss_at(self, model, batch, step):
        old, target, strength = batch.old[step], batch.targets[step], self.args.strength
        new = self.velocity_at(model, batch, step)
        positive = (1 - strength) * old + strength * new
        negative = (1 + strength) * old - strength * new
        optimality = 0.5 + 0.5 * batch.advantages
        to_positive, to_negative = ((v - target).square().flatten(1).mean(1) for v in (positive, negative))
        return (optimality * to_positive + (1 - optimality) * to_negative).mean()


if __name__ == "__main__":
    parser = TrlParser(NFTConfig, allow_abbrev=False)
    parser.set_defaults(**SETTINGS)
    (args,) = parser.parse_args_and_config()
    trainer = NFTTrainer(
        "shapes", shapes.attribute_share, args, shapes.load_dataset("train"), shapes.load_dataset("test"),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS), watch_reward_funcs="shapes-clip",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
