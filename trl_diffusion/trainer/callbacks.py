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

"""Callbacks of the trainers."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ..data.sampler import GroupSampler
from ..data.videos import SUFFIX, contact_sheet, save_video
from ..rewards import to_pil, to_tensor


logger = get_logger(__name__)

_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins, also after a resume."""

    def __init__(self, sampler: GroupSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


@dataclass
class Samples:
    """
    Images to look at, with what is known about them.

    Attributes:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, of videos `(N, F, 3, H, W)`): in [0, 1], on the CPU.
        prompts (`list[str]` of length N): their prompts.
        values (`dict[str, list[float]]`): rewards by name and the advantage, one an image.
    """

    images: torch.Tensor
    prompts: list[str]
    values: dict[str, list[float]]


class TrackioSamplesCallback(TrackioCallback):
    """
    Transformers' callback of trackio, which logs the images in the attribute `images`, by name, in the row of the numbers.
    trackio makes a row of each call and adds to none later.
    """

    def __init__(self):
        super().__init__()
        self.images: dict[str, Any] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs, **kwargs):
        images, self.images = self.images, {}
        super().on_log(args, state, control, logs={**logs, **images}, **kwargs)


class SampleImagesCallback(TrainerCallback):
    """
    Writes sample images whenever the trainer logs: to `output_dir/samples/step_XXXXXX/` and to the reporting backends
    that show images (TensorBoard, Weights & Biases, trackio), in the row of the numbers of the step. A video is written as an
    animated picture, beside its contact sheet, which is what the backends show. `samples_total_limit` folders are kept.

    The trainer hands the samples to [`keep`]; they are written once.

    Args:
        handler (`CallbackHandler`): the trainer's. The callback puts itself before those that report, since Weights &
            Biases closes a row when the numbers come, and replaces that of trackio.
    """

    def __init__(self, handler: CallbackHandler):
        self.handler = handler
        self.samples: Samples | None = None
        reporting = [
            TrackioSamplesCallback() if type(callback) is TrackioCallback else callback
            for callback in handler.callbacks
        ]
        handler.callbacks = [self, *reporting]

    def keep(self, images: torch.Tensor, prompts: list[str], values: dict[str, torch.Tensor], count: int) -> None:
        """Keep the first `count` of images or videos `(B, ...)`, with one value `(B,)` a name, until they are written."""
        values = {name: column[:count].tolist() for name, column in values.items()}
        self.samples = Samples(images[:count].cpu(), prompts[:count], values)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.samples is None or not state.is_world_process_zero:
            return
        samples, self.samples = self.samples, None
        pictures, videos = to_pil(samples.images), None
        if samples.images.ndim == 5:
            videos = pictures
            pictures = [contact_sheet(video) for video in videos]
        captions = [
            f"{prompt} ({', '.join(f'{name} {values[i]:.3f}' for name, values in samples.values.items())})"
            for i, prompt in enumerate(samples.prompts)
        ]

        folder = Path(args.output_dir) / "samples" / f"step_{state.global_step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for i, (picture, prompt) in enumerate(zip(pictures, samples.prompts, strict=True)):
            file_name = f"{i:03d}.png"
            if videos is None:
                picture.save(folder / file_name)
            else:
                file_name = f"{i:03d}{SUFFIX}"
                save_video(videos[i], folder / file_name)
                picture.save(folder / f"{i:03d}_sheet.png")
            values = {name: values[i] for name, values in samples.values.items()}
            records.append({"file_name": file_name, "prompt": prompt, **values})
        # The layout of an image folder, which `datasets.load_dataset("imagefolder", data_dir=...)` reads.
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.utime(folder)  # written now; files that were there before would leave it the older time
        if args.samples_total_limit is not None:
            delete_old_samples(folder, args.samples_total_limit)

        for callback in self.handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                shown = samples.images if videos is None else to_tensor(pictures)
                callback.tb_writer.add_images("samples", shown, state.global_step)
                callback.tb_writer.add_text("samples/captions", "\n\n".join(captions), state.global_step)
            elif isinstance(callback, WandbCallback):
                import wandb

                images = [wandb.Image(picture, caption=text) for picture, text in zip(pictures, captions, strict=True)]
                # What does not end the row waits for the numbers, which come next.
                wandb.log({"samples": images}, commit=False)
            elif isinstance(callback, TrackioSamplesCallback):
                import trackio

                callback.images = {
                    f"samples/{i:03d}": trackio.Image(picture, caption=text)
                    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True))
                }


def delete_old_samples(written: Path, limit: int) -> None:
    """
    Delete what was written first of the folders `step_XXXXXX` until `limit` are left. That of the lowest step stays.

    Times count, not steps: a run may start anew where another one has left folders of later steps.

    Args:
        written (`Path`): the last one, which stays. The others lie beside it; nothing else there is touched.
        limit (`int`): at least 2.
    """
    steps = {path: int(match[1]) for path in written.parent.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))}
    found = [path for path in steps if path.is_dir() and not path.is_symlink()]
    stay = {written, min(found, key=steps.__getitem__)}
    by_age = sorted(set(found) - stay, key=lambda path: (path.stat().st_mtime_ns, steps[path]))
    for path in by_age[: max(len(found) - limit, 0)]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(f"The samples in {path} could not be deleted and stay: {error}.")


class RewardHackingCallback(TrainerCallback):
    """
    Warns when the trained objective has risen and a watched reward has fallen since the evaluation at which the watched
    one was best, evaluation after evaluation. So a slow decline counts as well, of which each step is within its noise.

    Evaluations draw the same prompts from the same noise, so their images are compared in pairs. A change counts where
    its mean exceeds `SIGNIFICANT` standard errors: the best of several evaluations is partly the luckiest.

    Args:
        patience (`int`): such evaluations in a row before the warning.
        stop (`bool`): whether to stop the training as well.

    Attributes:
        scores (`dict[str, list[float]]`): of the evaluation that is being made, by the name of its metric, one score
            an image; the trainer sets it. `"objective"` is what is trained, the others are watched.
        best (`dict[str, dict[str, list[float]]]`): for each watched reward, its scores and those of the objective at the
            evaluation at which its mean was highest.
        count (`dict[str, int]`): evaluations in a row at which the objective was higher and this one lower than then.
    """

    SIGNIFICANT = 2.5

    def __init__(self, patience: int, stop: bool):
        self.patience = patience
        self.stop = stop
        self.scores: dict[str, list[float]] = {}
        self.best: dict[str, dict[str, list[float]]] = {}
        self.count: dict[str, int] = {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics, **kwargs):
        if "eval_objective" not in metrics:
            return  # an evaluation of the user's own, under another prefix
        for name, scores in self.scores.items():
            if name != "objective":
                self._compare(name, {"objective": self.scores["objective"], "watched": scores})
            if self.count.get(name, 0) >= self.patience:
                logger.warning(
                    f"Reward hacking? At step {state.global_step} the trained objective has risen to "
                    f"{metrics['eval_objective']:.4g} while {name} has fallen to {metrics[f'eval_{name}']:.4g} from "
                    f"{np.nanmean(self.best[name]['watched']):.4g} at its best, for {self.count[name]} evaluations in a "
                    "row. Stop here, lower learning_rate, or resume from an earlier checkpoint."
                )
                control.should_training_stop = control.should_training_stop or self.stop

    def _compare(self, name: str, now: dict[str, list[float]]) -> None:
        best = self.best.get(name)
        comparable = best is not None and len(best["watched"]) == len(now["watched"])
        if not comparable or np.nanmean(now["watched"]) >= np.nanmean(best["watched"]):
            self.best[name], self.count[name] = now, 0
            return
        rises = self._change(best["objective"], now["objective"]) > 0
        falls = self._change(best["watched"], now["watched"]) < 0
        self.count[name] = self.count[name] + 1 if rises and falls else 0

    def _change(self, before: list[float], after: list[float]) -> float:
        """The mean change of paired scores where it is significant, else 0; NaN is "not applicable"."""
        changes = np.subtract(after, before)
        changes = changes[~np.isnan(changes)]
        if len(changes) < 2 or abs(changes.mean()) <= self.SIGNIFICANT * changes.std(ddof=1) / len(changes) ** 0.5:
            return 0.0
        return float(changes.mean())
