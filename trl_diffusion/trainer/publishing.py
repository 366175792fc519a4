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

"""The methods of `transformers.Trainer` that publish a run."""

from abc import abstractmethod
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..hub import Publisher
from ..runtime.term_trainer import TermTrainer


class PublishingTrainer(TermTrainer):
    """Hands what `transformers.Trainer` does with the Hub to a [`Publisher`], which a subclass makes."""

    publisher: Publisher

    @abstractmethod
    def _results_for_card(self, with_metrics: bool) -> dict[str, Any]:
        """Images, and metrics where asked for, that are made for the card; called on every process."""

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
        folder = self.publisher.output_dir if output_dir is None else Path(output_dir)
        is_pushed = self.args.push_to_hub and folder.absolute() == self.publisher.output_dir.absolute()
        # A push writes cards that tell more, that of a checkpoint as well.
        if not (_internal_call or is_pushed):
            self.publisher.write_saved_card(folder)

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
        tags = [tags] if isinstance(tags, str) else tags
        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags, **card}
        card = {**self.publisher.told, **{name: value for name, value in given.items() if value is not None}}
        self.publisher.write_card(**card)
        self.publisher.told = card

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, see [`~trl_diffusion.hub.Publisher.create_repository`]."""
        self.hub_model_id = self.publisher.create_repository(token, private)

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
        trained one.

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
        publisher = self.publisher
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        drawn = self._results_for_card(with_metrics="metrics" not in {**publisher.told, **card})
        with publisher.telling_where_the_model_is():
            if publisher.repository is None:
                self.init_hf_repo(token=token, private=private)
            publisher.finish()
            self.create_model_card(**card)
            publisher.write_card(**{**drawn, **publisher.told})
            return publisher.push(commit_message, blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        step = self.state.global_step
        # `Trainer._save_checkpoint` calls this too early: the folder would be renamed during the upload.
        if self._staging is None and self.publisher.takes_checkpoint(step):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.publisher.push_checkpoint(Path(checkpoint_folder), step, self.create_model_card)

    def _finish_current_push(self) -> None:
        self.publisher.finish()
