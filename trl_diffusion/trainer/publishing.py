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

"""The trainers' side of the Hub: the card, the gallery, and the pushes during and after a training."""

import json
import os
import shutil
import tempfile
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..hub import (
    CARD_NAME,
    build_model_card,
    check_login,
    create_repository,
    files_of,
    hub_client,
    hub_id,
    inherited_license,
    model_files,
    push_files,
    shown_files,
)
from ..rewards import to_pil
from .base_config import DiffusionConfig


logger = logging.get_logger(__name__)

GALLERY_FOLDER = "samples/gallery"
# Folders of links to the files of a push that is under way, in `output_dir`.
PUSH_PREFIX = ".push-"


class PublishingMixin:
    """
    What [`DiffusionTrainer`] puts in place of the Hub methods of `transformers.Trainer`.

    Every push is one commit, holds the model, the card and the pictures that the card shows, and nothing else but the
    checkpoint where `hub_strategy` asks for it. A push during the training that fails is reported and costs the
    training nothing.
    """

    # What the user told `create_model_card`; later cards keep it.
    _card_arguments: dict[str, Any]
    _license: dict[str, str] | None = None
    _hub: HfApi

    # ---- The card ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, and beside it its card, as the last [`create_model_card`] described it. To be called on every
        process.

        The Hub is not asked: the card states the licence of the base model if an earlier card did.

        Args:
            output_dir (`str`, *optional*):
                Folder, `args.output_dir` by default.
        """
        super().save_model(output_dir, _internal_call)
        home = Path(self.args.output_dir)
        folder = home if output_dir is None else Path(output_dir)
        is_home = folder.absolute() == home.absolute()
        if _internal_call or (is_home and self.args.push_to_hub):
            return  # a checkpoint, whose card a push writes; or pushed, with a card that tells more
        card = {"license": self._license, "samples": self._newest_samples(), **self._card_arguments}
        if not is_home:
            for name in {"images", "samples"} & card.keys():
                card[name] = {path: text for path, text in card[name].items() if (folder / path).is_file()}
        self._write_card(card, folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **card,
    ) -> None:
        """
        Write the model card `README.md` into `output_dir`. What is given here is kept for the cards of later pushes.

        The card states the licence of the base model if the Hub can be asked for it.

        Args:
            model_name (`str`, *optional*):
                Title; the name of the repository or of the method by default.
            dataset_name (`str`, *optional*):
                Dataset of the prompts.
            tags (`str` or `list[str]`, *optional*):
                More tags.
            **card:
                Passed to [`~trl_diffusion.hub.build_model_card`], as `prompt`, `metrics`, `images`, `license` or
                `samples`; the last are by default the newest sample images of the training, one a prompt.
        """
        given = {"model_name": model_name, "dataset_name": dataset_name, **card}
        given |= {"tags": [tags] if isinstance(tags, str) else tags}
        card = {**self._card_arguments, **{name: value for name, value in given.items() if value is not None}}
        self._write_card({"samples": self._newest_samples(), **card}, Path(self.args.output_dir))
        self._card_arguments = card

    def _write_card(self, card: dict[str, Any], folder: Path) -> None:
        if not self.is_world_process_zero():
            return
        args = self.args
        repository = self.hub_model_id or args.hub_model_id
        call = {
            "height": self.height,
            "width": self.width,
            **self.flow.guidance_arguments(self.guidance_scale),
            "num_inference_steps": args.num_inference_steps,
            "max_sequence_length": self.flow.max_sequence_length,
        }
        defaults = {
            "model_name": self.method_name if repository is None else repository.rpartition("/")[2],
            "prompt": self.first_prompts(1)[0],
            "license": self._base_license() if "license" not in card else None,
        }
        build_model_card(
            pipeline_class=type(self.flow.pipeline).__name__,
            base_model=self.model_name,
            hub_model_id=repository,
            trainer_name=type(self).__name__,
            papers=self.papers,
            rewards=dict(zip(self.rewards, self.reward_weights.tolist(), strict=True)),
            watched_rewards=list(self.watched_rewards),
            settings=self._card_settings(),
            fused_loras=sorted(self.flow.pipeline.fused_loras),
            transformer_class=type(self.flow.denoiser).__name__ if not self.has_adapter else None,
            **{**defaults, **card, "call_arguments": {**call, **card.get("call_arguments", {})}},
        ).save(folder / CARD_NAME)

    def _base_license(self) -> dict[str, str]:
        if self._license is None:
            base_model = hub_id(self.model_name)
            self._license = {} if base_model is None else inherited_license(base_model, self.args.hub_token)
        return self._license

    def _card_settings(self) -> dict[str, Any]:
        """What a reader needs to repeat the training; no paths."""
        names = {field.name for field in fields(self.config_class)} - {
            field.name for field in fields(TrainingArguments)
        }
        names |= {
            "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "lr_scheduler_type", "seed", "bf16",
        }  # fmt: skip
        values = {name: value for name, value in self.args.to_dict().items() if name in names}
        values |= {"height": self.height, "width": self.width, "guidance_scale": self.guidance_scale}
        if self.has_adapter:
            config = self.network.peft_config["default"]
            values |= {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        return {name: value for name, value in values.items() if value is not None} | {
            "num_processes": self.accelerator.num_processes
        }

    # ---- Pictures ----

    def _newest_samples(self) -> dict[str, str]:
        """Of the newest sample images of the training one a prompt: path relative to the card -> prompt."""
        folder = Path(self.args.output_dir)
        found = sorted(folder.glob("samples/step_*/metadata.jsonl"))
        if not found:
            return {}
        by_prompt = {}
        for line in found[-1].read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            by_prompt.setdefault(record["prompt"], (found[-1].parent / record["file_name"]).relative_to(folder))
        return {path.as_posix(): prompt for prompt, path in by_prompt.items()}

    def _draw_gallery(self) -> dict[str, str]:
        """
        Draw an image of each of the first prompts, of the evaluation dataset where there is one, and write them to
        `output_dir/samples/gallery`. To be called on every process.

        Returns:
            `dict[str, str]`: path relative to the card -> prompt.
        """
        prompts = self.first_prompts(self.args.num_samples_to_log)
        images = self.generate(prompts, range(len(prompts)))
        samples = {f"{GALLERY_FOLDER}/{index:03d}.png": prompt for index, prompt in enumerate(prompts)}
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / GALLERY_FOLDER).mkdir(parents=True, exist_ok=True)
            for name, picture in zip(samples, to_pil(images), strict=True):
                picture.save(Path(self.args.output_dir) / name)
        return samples

    # ---- Pushes ----

    @staticmethod
    def _check_hub(args: DiffusionConfig) -> None:
        """Refuse a run that could not push its results, before weights are loaded."""
        if args.push_to_hub and args.process_index == 0:
            check_login(_repository_name(args), args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository `args.hub_model_id`, or one with the name of `output_dir`, where there is none.

        Args:
            token (`str`, *optional*): token with write permission, `args.hub_token` by default.
            private (`bool`, *optional*): whether a new repository is private, `args.hub_private_repo` by default.

        Raises:
            `OSError`: if the Hub refuses or cannot be reached, with the remedy.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        self._hub = hub_client()
        self.hub_model_id = create_repository(
            _repository_name(args),
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
        )
        self.push_in_progress = None
        for leftover in Path(args.output_dir).glob(f"{PUSH_PREFIX}*"):
            shutil.rmtree(leftover)  # of a process that was killed while it pushed

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | Future | None:
        """
        Save the model to `output_dir`, write its card, and push both in one commit. To be called on every process.

        Unless `log_samples` is off, new images are drawn for the card's gallery, `num_samples_to_log` of them. If there
        is an evaluation dataset and no `metrics` were given, the card shows the rewards of the base model and of the
        trained one, see [`compare_with_base`].

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                What the commit says.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the push.
            token (`str`, *optional*):
                Token with write permission, `args.hub_token` by default.
            revision (`str`, *optional*):
                Branch, `args.hub_revision` by default.
            private (`bool`, *optional*):
                Whether a new repository is private, `args.hub_private_repo` by default.
            **card:
                Passed to [`create_model_card`], as `dataset_name`, `metrics` or `images`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, or its `Future` if `blocking=False`; `None` on other processes
            than the main one.

        Raises:
            `OSError`: if the Hub refuses or cannot be reached, with the remedy. The model is saved in `output_dir` by
            then.
        """
        args = self.args
        token = args.hub_token if token is None else token
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        drawn = {"samples": self._draw_gallery()} if args.log_samples else {}
        if self.eval_dataset is not None and self.has_adapter and "metrics" not in {**self._card_arguments, **card}:
            drawn["metrics"] = self.compare_with_base()
            drawn["metrics_note"] = (
                f"Measured on {args.num_eval_images} images of prompts that were set aside for evaluation, with the same "
                "prompts and noise for both."
            )
        repository = self.hub_model_id or _repository_name(args)
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            self._finish_current_push()
            self.create_model_card(**card)
            self._write_card({**drawn, **self._card_arguments}, Path(args.output_dir))
            if not self.is_world_process_zero():
                return None
            push = (
                self.hub_model_id,
                files_of(Path(args.output_dir)),
                commit_message,
                token,
                args.hub_revision if revision is None else revision,
            )
            return push_files(*push) if blocking else self._hub.run_as_future(push_files, *push)
        except OSError as error:
            raise OSError(
                f"{error} The model is saved in {args.output_dir!r}. Call trainer.push_to_hub() again, or in a new "
                f"process trl_diffusion.hub.push_model({args.output_dir!r}, {repository!r})."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        # `Trainer._save_checkpoint` calls this too early: the folder would be renamed during the upload.
        if self._staging is not None or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not args.hub_always_push:
            logger.info(f"The checkpoint of step {self.state.global_step} is not pushed: the last push is under way.")
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        step = self.state.global_step
        staging = None
        try:
            self.create_model_card()
            staging = Path(tempfile.mkdtemp(prefix=PUSH_PREFIX, dir=args.output_dir))
            files = self._stage(Path(checkpoint_folder), staging)
        except OSError as error:
            logger.warning(f"The push of step {step} failed: {error}. The training goes on, and the next save pushes.")
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            return
        job = self._hub.run_as_future(self._push_staged, staging, files, step)
        if pushing:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

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
        output_dir = Path(self.args.output_dir)
        shutil.copyfile(output_dir / CARD_NAME, staging / CARD_NAME)  # the next push writes a new one
        files[CARD_NAME] = staging / CARD_NAME
        return files | shown_files(ModelCard.load(staging / CARD_NAME), output_dir)

    def _push_staged(self, staging: Path, files: dict[str, Path], step: int) -> None:
        args = self.args
        try:
            push_files(
                self.hub_model_id, files, f"Training in progress, step {step}", args.hub_token, args.hub_revision
            )
        except Exception as error:
            # Whatever it is, nobody looks at the results of this thread, and the training is worth more.
            logger.warning(f"{error} The training goes on, and the next push brings all that is missing.")
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _repository_name(args: DiffusionConfig) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
