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

"""The folder of `trl-diffusion evaluate`: images, scores and results, of which what is there already is not made again."""

import contextlib
import gc
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .. import shapes
from ..data.columns import ColumnReader
from ..data.prompt_images import Prompt, prompt_of, texts_of, to_json
from ..data.videos import SUFFIX, load_video
from ..evaluation import Adapters, compare, markdown_table, write_report
from ..evaluation.report import Comparison
from ..models import Sampler
from ..rewards import REWARDS, asks_for_column, load_rewards, parse_spec, score_pictures, spec_text, to_pil
from .evaluate_arguments import BASE, EvaluateArguments
from .sampling import save_image, write_metadata, write_text


# What an image depends on, besides model, adapter, prompt and noise.
IMAGE_SETTINGS = (
    "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "sigma_shift", "dtype",
)  # fmt: skip
# And where the model makes videos.
VIDEO_SETTINGS = ("num_frames",)
SCORES_NAME = "scores.json"


class Evaluation:
    """
    One evaluation and its folder.

    Every image is named after a digest of all that it depends on, so one that is there already is the right one.

    Args:
        args ([`EvaluateArguments`]): what to compare.
        dataset (`Dataset`): the prompts; other columns are passed to black-box rewards.
        adapters (`dict[str, Path]`): file of each adapter.
    """

    def __init__(self, args: EvaluateArguments, dataset: Dataset, adapters: dict[str, Path]):
        self.args = args
        self.folder = Path(args.output_dir)
        self.adapters = adapters
        columns = ColumnReader(lambda column: any(asks_for_column(reward, column) for reward in args.rewards))
        rows = [row for row in columns.prepare(dataset, "prompts") for _ in range(args.num_images_per_prompt)]
        self.prompts: list[Prompt] = [prompt_of(row) for row in rows]
        self.texts = texts_of(self.prompts)
        self.columns = columns.read(rows)
        self.seeds = [args.seed + index for index in range(len(rows))]
        self.digests = {name: self._digests(name) for name in (BASE, *adapters)}
        self.scores: dict[str, dict[str, float | None]] = {}
        self._sampler: Sampler | None = None
        self._loaded: Adapters | None = None
        self.rewards: dict[str, str] = {}  # specification of each reward by the name that it goes by

    def path(self, model: str, index: int) -> Path:
        """The file of an image, or of a video where there is one."""
        file = self.folder / "images" / model / f"{self.digests[model][index]}.png"
        video = file.with_suffix(SUFFIX)
        return video if video.exists() else file

    def load(self) -> None:
        """Load the model and its adapters, if there are images to make."""
        if any(self._missing().values()):
            self._sampler, self._loaded = self.args.load_sampler(self.adapters, self.prompts)
            if self.args.frame_reduction != "mean" and self._sampler.num_frames is None:
                raise ValueError(
                    f"frame_reduction={self.args.frame_reduction!r} has no effect with this model, which makes images. Leave "
                    "frame_reduction unset."
                )

    def draw(self) -> None:
        """Make the images that are not there yet, and let go of the model."""
        missing = self._missing()
        total = sum(map(len, missing.values()))
        with tqdm(total=total, desc="Drawing", unit="image", disable=not total) as progress:
            for name, indices in missing.items():
                folder = self.folder / "images" / name
                folder.mkdir(parents=True, exist_ok=True)
                if indices:
                    self._draw(name, indices, progress)
                write_metadata(
                    folder,
                    [
                        {"file_name": self.path(name, index).name, "prompt": prompt, "seed": seed}
                        for index, (prompt, seed) in enumerate(zip(self.texts, self.seeds, strict=True))
                    ],
                )
        # The rewards may need the memory.
        self._sampler = self._loaded = None
        gc.collect()
        clear_device_cache()

    def _draw(self, name: str, indices: list[int], progress: tqdm) -> None:
        done = 0
        prompts, seeds = [self.prompts[index] for index in indices], [self.seeds[index] for index in indices]
        adapter_on, adapter_fraction = contextlib.nullcontext(), 1.0
        if name != BASE:
            adapter_on, adapter_fraction = self._loaded.use(name), self.args.adapter_fraction
        with adapter_on:
            for batch in self._sampler.draw_images(prompts, seeds, adapter_fraction=adapter_fraction):
                for image in to_pil(batch):
                    save_image(image, self.path(name, indices[done]))
                    done += 1
                progress.update(len(batch))

    def _missing(self) -> dict[str, list[int]]:
        """The images of each model that are not there yet."""
        return {
            name: [index for index in range(len(self.prompts)) if not self.path(name, index).exists()]
            for name in self.digests
        }

    def score(self) -> None:
        """Score the images; scores of the library's own rewards that are there already are taken."""
        file = self.folder / SCORES_NAME
        kept: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        for reward in self.args.rewards:
            spec = spec_text(reward)
            if self.args.frame_reduction != "mean":
                spec += f" ({self.args.frame_reduction})"
            own = parse_spec(reward).name not in REWARDS
            # The code of a user's own function may have changed.
            known = {} if own or spec not in kept else kept[spec]["scores"]
            todo = [
                (model, index)
                for model, digests in self.digests.items()
                for index, digest in enumerate(digests)
                if digest not in known
            ]
            name = self._score(reward, todo, known) if todo else kept[spec]["name"]
            clear_device_cache()  # one reward in memory at a time
            if not own:
                kept[spec] = {"name": name, "scores": known}
                write_text(file, json.dumps(kept))
            name = _distinct(name, self.rewards)
            self.rewards[name] = reward
            self.scores[name] = known

    def _score(self, spec: str | dict[str, Any], todo: list[tuple[str, int]], known: dict[str, float | None]) -> str:
        """Score the images `todo`, as model and index, into `known`, by their digest; returns the reward's name."""
        ((name, reward),) = load_rewards([spec]).items()
        device = PartialState().device
        if isinstance(reward, nn.Module):
            reward.to(device)
        size = self.args.reward_batch_size
        with tqdm(total=len(todo), desc=f"Scoring {name}", unit="image") as progress:
            for start in range(0, len(todo), size):
                part = todo[start : start + size]
                indices = [index for _, index in part]
                values = score_pictures(
                    reward,
                    [_picture(self.path(model, index)) for model, index in part],
                    [self.texts[index] for index in indices],
                    {column: [entries[index] for index in indices] for column, entries in self.columns.items()},
                    device=device,
                    batch_size=size,
                    frame_reduction=self.args.frame_reduction,
                )
                known |= {
                    self.digests[model][index]: value for (model, index), value in zip(part, values, strict=True)
                }
                progress.update(len(part))
        return name

    def write(self) -> dict[str, Any]:
        """Write `results.json`, `results.md` and `report.html`; returns what the first holds."""
        args = self.args
        by_reward = {
            reward: {model: [known[digest] for digest in digests] for model, digests in self.digests.items()}
            for reward, known in self.scores.items()
        }
        rewards = {
            reward: compare(
                scores[BASE], {name: scores[name] for name in self.adapters}, self.prompts, args.confidence
            )
            for reward, scores in by_reward.items()
        }
        sources = dict(zip(args.adapter_names, args.adapter, strict=True))
        settings = {
            name: value
            for name, value in asdict(args).items()
            if name in (*IMAGE_SETTINGS, *VIDEO_SETTINGS, "adapter_fraction", "num_images_per_prompt", "seed")
            and value is not None
        }
        results = {
            "model": args.model_name_or_path,
            "adapters": sources,
            "reward_specs": self.rewards,
            "prompts": args.prompts,
            "num_prompts": len(set(self.prompts)),
            "num_images": len(self.prompts),
            "confidence": args.confidence,
            "settings": settings,
            "rewards": rewards,
            "images": [
                {
                    "prompt": prompt,
                    "seed": self.seeds[index],
                    "files": {
                        model: self.path(model, index).relative_to(self.folder).as_posix() for model in self.digests
                    },
                    "scores": {
                        reward: {model: values[index] for model, values in scores.items()}
                        for reward, scores in by_reward.items()
                    },
                }
                for index, prompt in enumerate(self.texts)
            ],
        }
        write_text(self.folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False))
        write_text(self.folder / "results.md", markdown_table(rewards))
        shown = results["images"][: args.max_report_images]
        write_report(
            self.folder / "report.html",
            args.model_name_or_path,
            sources,
            rewards,
            [
                Comparison(
                    row["prompt"],
                    row["seed"],
                    {model: self.folder / file for model, file in row["files"].items()},
                    row["scores"],
                )
                for row in shown
            ],
            {"images": len(self.prompts), "prompts": results["num_prompts"], **settings},
            args.confidence,
            omitted=len(self.prompts) - len(shown),
        )
        return results

    def _digests(self, name: str) -> list[str]:
        args = self.args
        model = args.model_name_or_path
        source = [model, *_folder_state(shapes.pipeline_path() if model == "shapes" else Path(model))]
        if name != BASE:
            source += [hashlib.sha256(self.adapters[name].read_bytes()).hexdigest(), args.adapter_fraction]
        source += [getattr(args, setting) for setting in IMAGE_SETTINGS]
        source += [getattr(args, setting) for setting in VIDEO_SETTINGS if getattr(args, setting) is not None]
        return [
            hashlib.sha256(json.dumps([source, prompt, seed]).encode()).hexdigest()[:20]
            for prompt, seed in zip(to_json(self.prompts), self.seeds, strict=True)
        ]


def _picture(path: Path) -> Image.Image | list[Image.Image]:
    """A picture, or a video as a list of them."""
    return load_video(path) if path.suffix == SUFFIX else Image.open(path)


def _folder_state(folder: Path) -> list[Any]:
    """What tells one state of a local model's folder from another; nothing for a model of the Hub."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _distinct(name: str, taken: dict[str, Any]) -> str:
    """`name`, or with the next number where it is taken."""
    count = 1
    numbered = name
    while numbered in taken:
        count += 1
        numbered = f"{name}_{count}"
    return numbered
