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

"""What the demos of `trl-diffusion demo` share: train in the embedded world, measure before and after, show the change."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import torch

    from ..trainer.base_trainer import DiffusionTrainer


REWARD = "attribute_share"  # the judge's share of right attributes: what is trained
MEASURE = "all_attributes"  # every attribute right: what counts, on prompts that were not trained
WATCHED = "shapes-clip"  # measured during training, never trained
STYLE_MEASURES = ("contrast", "sharpness")
PREFERENCE = "preference"  # for sharp pictures over blurred and pale ones: what the SRPO demo trains
NUMBERS = (WATCHED, PREFERENCE, *STYLE_MEASURES)  # measures that are no shares

LORA = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    ],
}

# What the settings of all demos have in common: the built-in model, and no files but the results.
SETTINGS = {
    "height": 32,
    "width": 32,
    "guidance_scale": 3.5,
    "sigma_shift": 3.0,
    "weight_decay": 0.0,
    "activation_checkpointing": False,
    "cache_prompt_embeds": False,
    "log_samples": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": False,
    "dataloader_pin_memory": False,
}

REPORT_EVERY = 5  # steps between two lines of the reward
NUM_SHOWN = 8
SCALE = 8  # pictures of 32x32 pixels are too small to be looked at


class Demo(ABC):
    """One trainer at work in the embedded world: what it trains, and what is shown of that."""

    title: str
    notes: Mapping[str, str]
    """What is said of a measure in the table: trained, watched."""
    has_reference = False
    """Whether the results are compared with freshly drawn pictures."""

    @abstractmethod
    def make_trainer(self, **settings: Any) -> "DiffusionTrainer":
        """The trainer, with the demo's settings and those given."""

    def measure(self, images: "torch.Tensor", prompts: list[str]) -> dict[str, np.ndarray]:
        """What is measured of the images of held-out prompts, one number an image."""
        return measure(images, prompts)

    @abstractmethod
    def progress_line(self, logs: Mapping[str, float]) -> str | None:
        """What is said of logged numbers while the demo runs, if anything."""

    @abstractmethod
    def curve(self, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
        """What is kept of the logged numbers, one point an optimizer step."""

    @abstractmethod
    def plot(self, curve: list[dict[str, float]], path: Path) -> None:
        """Writes the curve as a picture."""

    def remarks(self, results: dict[str, Any]) -> list[str]:
        """What is said below the table."""
        return []


def shapes_arguments() -> dict[str, Any]:
    """What a demo's trainer is given besides its settings and rewards."""
    from peft import LoraConfig

    from .. import shapes

    return {
        "model": "shapes",
        "train_dataset": shapes.load_dataset("train"),
        "eval_dataset": shapes.load_dataset("test"),
        "peft_config": LoraConfig(**LORA),
    }


def measure(images: "torch.Tensor", prompts: list[str]) -> dict[str, np.ndarray]:
    """Every measure of the embedded world, one number an image: the judge's and the watched reward."""
    from .. import shapes
    from ..rewards import load_reward, score_images

    judged = shapes.judge(images, prompts)
    measures = {REWARD: judged.pop("attributes"), MEASURE: judged.pop(MEASURE), **judged}
    measures[WATCHED] = score_images(load_reward(WATCHED), images, prompts).cpu().numpy()
    return measures


def summarise(
    prompts: list[str],
    base: dict[str, np.ndarray],
    aligned: dict[str, np.ndarray],
    reference: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """
    Mean and confidence interval of each measure for both models, of the change, and of reference pictures where given.
    The change is of pairs: both models drew the same prompts from the same noise.
    """
    from ..metrics import mean_interval

    def intervals(measures: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        return {
            name: dict(zip(("mean", "low", "high"), mean_interval(values, prompts), strict=True))
            for name, values in measures.items()
        }

    summary = {
        "base": intervals(base),
        "aligned": intervals(aligned),
        "change": intervals({name: aligned[name] - base[name] for name in base}),
    }
    return summary if reference is None else {**summary, "reference": intervals(reference)}


def format_table(summary: dict[str, dict[str, dict[str, float]]], notes: Mapping[str, str]) -> str:
    """The summary as text, one measure a line, with what `notes` say of it. Shares are in per cent."""

    def cell(name: str, interval: dict[str, float], sign: str = "") -> str:
        if name in NUMBERS:
            return "{mean:{s}.3f} ({low:{s}.3f} to {high:{s}.3f})".format(s=sign, **interval)
        percent = {end: 100 * value for end, value in interval.items()}
        return "{mean:{s}.1f} % ({low:{s}.1f} to {high:{s}.1f})".format(s=sign, **percent)

    columns = [column for column in ("base", "aligned", "change", "reference") if column in summary]
    rows = [("measure", *columns)]
    for name in summary["base"]:
        label = f"{name} ({notes[name]})" if name in notes else name
        rows.append((label, *[cell(name, summary[c][name], "+" if c == "change" else "") for c in columns]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns) + 1)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(columns)), *lines[1:]])


def plot_before_after(
    before: "torch.Tensor", after: "torch.Tensor", prompts: list[str], right: np.ndarray, path: Path
) -> None:
    """
    Writes the pictures of both models in two rows.

    Args:
        before, after (`torch.Tensor`):
            Images of shape (N, 3, H, W), in [0, 1].
        prompts (`list[str]`):
            Their prompts, as titles.
        right (`np.ndarray`):
            Share of right attributes, shape (2, N), written below each picture.
        path (`Path`):
            File to write.
    """
    import textwrap

    from matplotlib.figure import Figure

    number, _, height, width = before.shape
    figure = Figure(figsize=(width * SCALE * number / 120 + 1, height * SCALE * 2 / 120 + 1.5), layout="constrained")
    axes = figure.subplots(2, number, squeeze=False)
    for row, (label, images) in enumerate((("base", before), ("aligned", after))):
        for column in range(number):
            panel = axes[row, column]
            panel.imshow(images[column].permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"{round(4 * right[row, column])} of 4 right", fontsize=9)
            if row == 0:
                panel.set_title("\n".join(textwrap.wrap(prompts[column], 18)), fontsize=10)
        axes[row, 0].set_ylabel(label, fontsize=13)
    figure.savefig(path, dpi=120)


def run(
    demo: Demo,
    output_dir: str,
    seed: int = 0,
    max_steps: int | None = None,
    num_eval_images: int = 512,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """
    Runs a demo.

    Args:
        demo ([`Demo`]):
            What to train and to show.
        output_dir (`str`):
            Folder for the results; created if missing.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the training. The measured prompts and noises are the same for every seed.
        max_steps (`int`, *optional*):
            Optimizer steps. `None` takes the demo's setting.
        num_eval_images (`int`, *optional*, defaults to `512`):
            Images measured before and after.
        learning_rate (`float`, *optional*):
            Learning rate. `None` takes the demo's setting.

    Returns:
        `dict`: what is written to `results.json`.
    """
    import diffusers
    import transformers
    from tqdm import tqdm
    from transformers import ProgressCallback

    from .. import shapes

    class RewardLine(ProgressCallback):
        """The progress bar, with a line of the reward every few steps in place of all logged numbers at every step."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            line = demo.progress_line(logs)
            if line is not None and state.is_world_process_zero and state.global_step % REPORT_EVERY == 0:
                tqdm.write(f"step {state.global_step:4d}  {line}")

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    settings = {"output_dir": output_dir, "seed": seed, "max_steps": max_steps, "learning_rate": learning_rate}
    trainer = demo.make_trainer(**{name: value for name, value in settings.items() if value is not None})
    config = trainer.args
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardLine)

    held_out = list(shapes.load_dataset("test")["prompt"])
    prompts = [held_out[index % len(held_out)] for index in range(num_eval_images)]
    seeds = list(range(num_eval_images))

    print(f"1/3 Drawing {num_eval_images} images of {len(set(prompts))} held-out prompts with the base model")
    before = trainer.generate(prompts, seeds, adapter_fraction=0.0)
    print(f"2/3 Training for {config.max_steps} steps on {len(trainer.train_dataset)} other prompts")
    trained = trainer.train()
    print(f"3/3 Drawing the same {num_eval_images} images with the aligned model")
    after = trainer.generate(prompts, seeds)

    base, aligned = demo.measure(before, prompts), demo.measure(after, prompts)
    reference = demo.measure(shapes.reference(prompts), prompts) if demo.has_reference else None
    summary = summarise(prompts, base, aligned, reference)
    curve = demo.curve(trainer.state.log_history)

    folder = Path(output_dir)
    trainer.save_model(output_dir)
    demo.plot(curve, folder / "reward.png")
    # Spread over the held-out prompts, the first image of each: not chosen by how they look.
    num_shown = min(NUM_SHOWN, len(held_out), num_eval_images)
    shown = [index * min(len(held_out), num_eval_images) // num_shown for index in range(num_shown)]
    plot_before_after(
        before[shown],
        after[shown],
        [prompts[index] for index in shown],
        np.stack([base[REWARD][shown], aligned[REWARD][shown]]),
        folder / "before_after.png",
    )
    trainer.create_model_card(
        model_name=f"FLUX of the shapes world, aligned with {demo.title}",
        dataset_name="shapes",
        prompt=held_out[0],
        call_arguments={"max_sequence_length": shapes.MAX_SEQUENCE_LENGTH},
        metrics={
            model: {name: tuple(interval.values()) for name, interval in summary[model].items()}
            for model in ("base", "aligned")
        },
        metrics_note=f"Measured on {num_eval_images} images of {len(set(prompts))} prompts that were not trained; "
        "images of one prompt are not taken for independent.",
        images={
            "before_after.png": "Same prompts and same noise: base above, aligned below.",
            "reward.png": "Reward during training.",
        },
    )

    seconds = time.perf_counter() - started
    num_images = trainer.state.global_step * config.per_device_train_batch_size * config.gradient_accumulation_steps
    results = {
        **summary,
        "seconds": seconds,
        "images_per_second": num_images / trained.metrics["train_runtime"],
        "seed": seed,
        "max_steps": trainer.state.global_step,
        "learning_rate": config.learning_rate,
        "num_eval_images": num_eval_images,
        "reward_curve": curve,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results
