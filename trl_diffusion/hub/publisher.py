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

"""A run on the Hub: its card, the gallery, and the pushes during and after the training."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from PIL import Image
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..data.videos import SUFFIX, save_video
from .model_card import build_model_card, hub_id
from .push import (
    CARD_NAME,
    check_login,
    create_repository,
    files_of,
    hub_client,
    inherited_license,
    model_files,
    push_files,
    shown_files,
)


logger = logging.get_logger(__name__)

GALLERY_FOLDER = "samples/gallery"
# Folders of links to the files of a push that is under way, in `output_dir`.
PUSH_PREFIX = ".push-"


class Publisher:
    """
    Writes the cards of a run and pushes its results.

    Every push is one commit, holds the model, the card and the pictures that the card shows, and nothing else but the
    checkpoint where `hub_strategy` asks for it. A push during the training that fails is reported and costs the
    training nothing.

    Args:
        args (`TrainingArguments`): `output_dir`, the settings of the Hub, and which process this is: the main one acts, the
            others do nothing.
        facts (`Callable`): what [`build_model_card`] is to be told of the run as it stands; called for each card.

    Attributes:
        repository (`str` or `None`): id of the repository, once it is created.
        told (`dict`): what later cards keep saying: arguments of [`build_model_card`] from the user.
        push_in_progress (`PushInProgress` or `None`): the last push during the training.
    """

    def __init__(self, args: TrainingArguments, facts: Callable[[], dict[str, Any]]):
        self.args = args
        self.facts = facts
        self.output_dir = Path(args.output_dir)
        self.is_main = args.process_index == 0
        self.repository: str | None = None
        self.told: dict[str, Any] = {}
        self.push_in_progress: PushInProgress | None = None
        self._license: dict[str, str] | None = None
        self._hub: HfApi = hub_client()

    @property
    def name(self) -> str:
        """Of the repository; the Hub adds the user where it has none."""
        return self.repository or self.args.hub_model_id or self.output_dir.absolute().name

    def check(self) -> None:
        """Refuse a run that could not push its results: `OSError`, with the remedy."""
        if self.args.push_to_hub and self.is_main:
            check_login(self.name, self.args.hub_token)

    # ---- The card ----

    def write_card(self, folder: Path | None = None, **card: Any) -> None:
        """
        Write the card, of the newest samples unless told otherwise.

        Args:
            folder (`Path`, *optional*): `output_dir` by default. In another one the card shows those pictures that are
                there.
            **card: arguments of [`build_model_card`], before those of `facts`.
        """
        if not self.is_main:
            return
        folder = self.output_dir if folder is None else folder
        card = {"samples": self._newest_samples(), **card}
        if folder.absolute() != self.output_dir.absolute():
            for name in {"images", "samples"} & card.keys():
                card[name] = {path: text for path, text in card[name].items() if (folder / path).is_file()}
        facts = {"license": self._base_license() if "license" not in card else None, **self.facts()}
        if self.repository or self.args.hub_model_id:
            facts |= {"hub_model_id": self.name, "model_name": self.name.rpartition("/")[2]}
        call_arguments = {**facts["call_arguments"], **card.get("call_arguments", {})}
        build_model_card(**{**facts, **card, "call_arguments": call_arguments}).save(folder / CARD_NAME)

    def write_saved_card(self, folder: Path) -> None:
        """Write the card of a model that was saved without the Hub, which is not asked: what is known, and what was told."""
        self.write_card(folder, **{"license": self._license, **self.told})

    def _base_license(self) -> dict[str, str]:
        if self._license is None:
            base_model = hub_id(self.facts()["base_model"])
            self._license = {} if base_model is None else inherited_license(base_model, self.args.hub_token)
        return self._license

    # ---- Pictures ----

    def _newest_samples(self) -> dict[str, str]:
        """Of the newest sample images of the training one a prompt: path relative to the card -> prompt."""
        found = sorted(self.output_dir.glob("samples/step_*/metadata.jsonl"))
        if not found:
            return {}
        by_prompt = {}
        for line in found[-1].read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            path = (found[-1].parent / record["file_name"]).relative_to(self.output_dir)
            by_prompt.setdefault(record["prompt"], path)
        return {path.as_posix(): prompt for prompt, path in by_prompt.items()}

    def save_gallery(
        self, pictures: Sequence[Image.Image] | Sequence[list[Image.Image]], prompts: Sequence[str]
    ) -> dict[str, str]:
        """
        Write one picture a prompt, or one video, a list of pictures, to `output_dir/samples/gallery`; path relative to the
        card -> prompt.
        """
        suffix = SUFFIX if isinstance(pictures[0], list) else ".png"
        samples = {f"{GALLERY_FOLDER}/{index:03d}{suffix}": prompt for index, prompt in enumerate(prompts)}
        if self.is_main:
            (self.output_dir / GALLERY_FOLDER).mkdir(parents=True, exist_ok=True)
            for name, picture in zip(samples, pictures, strict=True):
                if isinstance(picture, list):
                    save_video(picture, self.output_dir / name)
                else:
                    picture.save(self.output_dir / name)
        return samples

    # ---- Pushes ----

    def create_repository(self, token: str | None = None, private: bool | None = None) -> str | None:
        """
        Create the repository where there is none.

        Args:
            token (`str`, *optional*): token with write permission, `args.hub_token` by default.
            private (`bool`, *optional*): whether a new repository is private, `args.hub_private_repo` by default.

        Returns:
            `str`: its id; `None` on other processes than the main one.

        Raises:
            `OSError`: the Hub refuses or cannot be reached; the message has the remedy.
        """
        if not self.is_main:
            return None
        args = self.args
        self.repository = create_repository(
            self.name,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
        )
        for leftover in self.output_dir.glob(f"{PUSH_PREFIX}*"):
            shutil.rmtree(leftover)  # of a process that was killed while it pushed
        return self.repository

    def finish(self) -> None:
        """Wait for the push that is under way."""
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()

    @contextlib.contextmanager
    def telling_where_the_model_is(self) -> Iterator[None]:
        """Errors within this context say that the model is saved, and how to push it later."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{error} The model is saved in {self.args.output_dir!r}. Call trainer.push_to_hub() again, or in a new "
                f"process trl_diffusion.hub.push_model({self.args.output_dir!r}, {self.name!r})."
            ) from error

    def push(
        self, commit_message: str | None, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | Future | None:
        """Push what is in `output_dir`; see [`~trl_diffusion.DiffusionTrainer.push_to_hub`]."""
        if not self.is_main:
            return None
        args = self.args
        push = (
            self.repository,
            files_of(self.output_dir),
            commit_message,
            args.hub_token if token is None else token,
            args.hub_revision if revision is None else revision,
        )
        return push_files(*push) if blocking else self._hub.run_as_future(push_files, *push)

    def takes_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of this step is to be pushed now."""
        if not self.is_main or self.args.hub_strategy == HubStrategy.END:
            return False
        if self._is_pushing() and not self.args.hub_always_push:
            logger.info(f"The checkpoint of step {step} is not pushed: the last push is under way.")
            return False
        return True

    def push_checkpoint(self, checkpoint: Path, step: int, write_card: Callable[[], None]) -> None:
        """Push a checkpoint, with the card that `write_card` puts into `output_dir`, in the background."""
        staging = None
        try:
            write_card()
            staging = Path(tempfile.mkdtemp(prefix=PUSH_PREFIX, dir=self.output_dir))
            files = self._stage(checkpoint, staging)
        except OSError as error:
            logger.warning(f"The push of step {step} failed: {error}. The training goes on, and the next save pushes.")
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            return
        job = self._hub.run_as_future(self._push_staged, staging, files, step)
        if self._is_pushing():
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _stage(self, checkpoint: Path, staging: Path) -> dict[str, Path]:
        """
        Link what a push takes of a checkpoint into a folder of its own, since `save_total_limit` may delete the
        checkpoint while it is being uploaded; path in the repository -> file.
        """
        sources = model_files(checkpoint)
        strategy = self.args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            for path in sorted(checkpoint.rglob("*")):
                # A resume does not read the arguments, and they hold local paths.
                if path.is_file() and path.name != TRAINING_ARGS_NAME:
                    sources[f"{name}/{path.relative_to(checkpoint).as_posix()}"] = path
        files = {}
        for name, path in sources.items():
            files[name] = staging / name
            files[name].parent.mkdir(parents=True, exist_ok=True)
            if path.name == TRAINER_STATE_NAME:
                state = json.loads(path.read_text(encoding="utf-8"))
                if state["best_model_checkpoint"] is not None:  # a local path
                    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
                files[name].write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            else:
                _link(path, files[name])
        shutil.copyfile(self.output_dir / CARD_NAME, staging / CARD_NAME)  # the next push writes a new one
        files[CARD_NAME] = staging / CARD_NAME
        return files | shown_files(ModelCard.load(staging / CARD_NAME), self.output_dir)

    def _push_staged(self, staging: Path, files: dict[str, Path], step: int) -> None:
        args = self.args
        try:
            push_files(self.repository, files, f"Training in progress, step {step}", args.hub_token, args.hub_revision)
        except Exception as error:
            # Whatever it is, nobody looks at the results of this thread, and the training is worth more.
            logger.warning(f"{error} The training goes on, and the next push brings all that is missing.")
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
