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
How fast ChunkGRPOTrainer is, where its time goes, and the same work done one image at a time.

```bash
python examples/benchmarks/chunk_grpo.py                            # the embedded world
python examples/benchmarks/chunk_grpo.py --model random             # a random FLUX, small enough for a CPU
python examples/benchmarks/chunk_grpo.py --model random --flux_dev --height 720 --width 720 --images 24 \
    --num_generations 12 --batch_size 2 --num_inference_steps 17     # FLUX.1-dev's size, random weights, for a GPU
```

Both ways run in turn, in one process, on the same prompts: batched as configured, and one image at a time as released
research code does it (sampled, decoded, scored and trained image by image, step by step). Each is warmed up by one step.
"overhead" is all of a step that is not a forward, backward, decode or reward: data, noise, the algebra of the sampler,
advantages, the optimizer, logging.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time

import torch
import transformers
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, TrainerCallback

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes


PHASES = ("forward of rollout", "forward of update", "backward", "decode", "reward")


class TimedTrainer(ChunkGRPOTrainer):
    """A trainer that counts the seconds of its phases; on an accelerator it waits for each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        backward = self.accelerator.backward
        self.accelerator.backward = lambda *args, **kwargs: self.count("backward", backward, *args, **kwargs)
        score = self.scorer.score
        self.scorer.score = lambda *args, **kwargs: self.count("reward", score, *args, **kwargs)
        # The one forward of rollout and update.
        velocity = self.image_sampler.velocity
        self.image_sampler.velocity = lambda *args, **kwargs: self.count(
            "forward of update" if torch.is_grad_enabled() else "forward of rollout", velocity, *args, **kwargs
        )

    def synchronize(self):
        if self.args.device.type != "cpu":
            torch.get_device_module(self.args.device).synchronize()

    def count(self, phase, function, *args, **kwargs):
        self.synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        return result

    def decode(self, *args, **kwargs):
        return self.count("decode", super().decode, *args, **kwargs)


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, and of each phase of it."""

    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.synchronize()
        self.start, self.before = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.synchronize()
        end, after = self.now()
        self.steps.append({"total": end - self.start, **{name: after[name] - self.before[name] for name in PHASES}})

    def now(self):
        return time.perf_counter(), dict(self.trainer.seconds)


def random_flux(arguments: argparse.Namespace) -> FluxPipeline:
    """A FLUX pipeline of the given size with random weights; its text encoders are one thin layer of the right width."""
    torch.manual_seed(0)
    size = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128}
    rope, joint, channels = (16, 56, 56), 4096, (128, 256, 512, 512)
    if not arguments.flux_dev:
        size = {name: getattr(arguments, name) for name in size}
        eighth = size["attention_head_dim"] // 8
        rope, joint, channels = (2 * eighth, 3 * eighth, 3 * eighth), arguments.joint_attention_dim, (16, 32, 32, 32)
    default_dtype = torch.get_default_dtype()
    if torch.cuda.is_available():
        torch.set_default_dtype(torch.bfloat16)  # 12 B parameters are not made in float32 first
    world = shapes.load_pipeline()  # for its tokenizers
    transformer = FluxTransformer2DModel(
        in_channels=64, joint_attention_dim=joint, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=rope,
        **size,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=2 if arguments.flux_dev else 1, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32 if arguments.flux_dev else 8, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(world.tokenizer),
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                projection_dim=64,
                eos_token_id=world.tokenizer.eos_token_id,
            )  # fmt: skip
        ),
        tokenizer=world.tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(world.tokenizer_2), d_model=joint, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        ),
        tokenizer_2=world.tokenizer_2,
        transformer=transformer,
    )
    torch.set_default_dtype(default_dtype)
    return pipeline


def brightness(images, prompts, **columns):
    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in images]


def measure(arguments: argparse.Namespace, one_by_one: bool) -> dict[str, float]:
    """Medians over steps of a run, in seconds, after one step of warm-up."""
    batch_size = 1 if one_by_one else arguments.batch_size
    world = arguments.model == "shapes"
    with tempfile.TemporaryDirectory() as folder:
        config = ChunkGRPOConfig(
            output_dir=folder,
            height=arguments.height,
            width=arguments.width,
            num_inference_steps=arguments.num_inference_steps,
            num_generations=arguments.num_generations,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=arguments.images // batch_size,
            rollout_batch_size=1 if one_by_one else arguments.rollout_batch_size,
            chunk_sizes=arguments.chunk_sizes,
            chunk_gradient="streamed" if one_by_one else arguments.chunk_gradient,
            activation_checkpointing=arguments.activation_checkpointing,
            max_steps=1 + arguments.steps,
            cache_prompt_embeds=False,
            log_samples=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        dataset = shapes.load_dataset("train")
        trainer = TimedTrainer(
            model="shapes" if world else random_flux(arguments),
            reward_funcs=shapes.attribute_share if world else brightness,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": dataset["prompt"]}),
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        )
        times = StepTimes(trainer)
        trainer.add_callback(times)
        trainer.train()
    steps = times.steps[1:]
    result = {name: statistics.median(step[name] for step in steps) for name in ("total", *PHASES)}
    result["overhead"] = statistics.median(step["total"] - sum(step[phase] for phase in PHASES) for step in steps)
    result["lowest"], result["highest"] = min(s["total"] for s in steps), max(s["total"] for s in steps)
    result["parameters"] = sum(p.numel() for p in trainer.flow.denoiser.parameters())
    device = trainer.args.device
    if device.type != "cpu":
        result["peak_gib"] = torch.get_device_module(device).max_memory_allocated() / 2**30
        torch.get_device_module(device).reset_peak_memory_stats()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", "random"], default="shapes")
    parser.add_argument("--flux_dev", action="store_true", help="FLUX.1-dev's size, for --model random")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_single_layers", type=int, default=8)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--attention_head_dim", type=int, default=32)
    parser.add_argument("--joint_attention_dim", type=int, default=256)
    parser.add_argument("--height", type=int, default=None)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--chunk_sizes", nargs="+", default=None)
    parser.add_argument("--chunk_gradient", choices=["joint", "streamed"], default="joint")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--images", type=int, default=None, help="images of a step")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=None, help="images of a micro-batch")
    parser.add_argument("--rollout_batch_size", type=int, default=None)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each round")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two ways take turns")
    parser.add_argument("--output", default=None, help="JSON file for the numbers")
    arguments = parser.parse_args()
    world = arguments.model == "shapes"
    arguments.height = arguments.height or (32 if world else 128)
    arguments.width = arguments.width or (32 if world else 128)
    arguments.images = arguments.images or (48 if world else 8)
    arguments.batch_size = arguments.batch_size or arguments.images
    if arguments.chunk_sizes is None and arguments.num_inference_steps == 10:
        arguments.chunk_sizes = [1, 2, 2, 4]
    transformers.logging.set_verbosity_error()

    rounds = [
        (measure(arguments, one_by_one=False), measure(arguments, one_by_one=True)) for _ in range(arguments.rounds)
    ]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    print(f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}; {arguments.images} images a step, "
          f"{arguments.height}x{arguments.width}, T = {arguments.num_inference_steps}, "
          f"{rounds[0][0]['parameters'] / 1e6:.1f} M parameters")  # fmt: skip
    for i, (batched, single) in enumerate(rounds):
        print(f"\nround {i + 1}{'':18}{'batched':>20}{'one by one':>20}")
        for name in (*PHASES, "overhead", "total"):
            cells = [f"{r[name]:8.3f} s {100 * r[name] / r['total']:5.1f} %" for r in (batched, single)]
            print(f"  {name:24}{cells[0]:>20}{cells[1]:>20}")
        print(f"  {'spread of total':24}" + "".join(
            f"{r['lowest']:.3f} to {r['highest']:.3f} s".rjust(20) for r in (batched, single)))  # fmt: skip
        print(f"  {'images a second':24}" + "".join(
            f"{arguments.images / r['total']:20.2f}" for r in (batched, single)))  # fmt: skip
        if "peak_gib" in batched:
            print(f"  {'peak memory, GiB':24}" + "".join(f"{r['peak_gib']:20.2f}" for r in (batched, single)))
        print(f"  batched is {single['total'] / batched['total']:.2f} times as fast")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"arguments": vars(arguments), "device": card, "rounds": rounds}, file, indent=2)


if __name__ == "__main__":
    main()
