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

"""The way to the Hub. One push is one commit, so a repository never shows half of a model."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..version import __version__
from .adapter import DIFFUSERS_WEIGHTS_NAME, PEFT_WEIGHTS_NAME


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
# What a push takes of a folder beside the card and the pictures that it shows. All else stays at home: optimizer
# states, logs, and `training_args.bin`, which holds local paths.
MODEL_FILES = (DIFFUSERS_WEIGHTS_NAME, PEFT_WEIGHTS_NAME, "adapter_config.json", "transformer/*")

_PICTURE = re.compile(r"!\[(?:\\.|[^\]\\])*\]\(([^)\s]+)\)")


def hub_client() -> HfApi:
    """A client of the Hub, or of the server that the environment variable `HF_ENDPOINT` names."""
    return HfApi(library_name="trl_diffusion", library_version=__version__)


def _explain(error: BaseException, token: str | None) -> str:
    """What went wrong on the way to the Hub, and what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # "Error while uploading ...", of the client
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and not (token or get_token())):
        return (
            "there is no token. Log in with `hf auth login`, set the environment variable HF_TOKEN, or set hub_token; "
            "https://huggingface.co/settings/tokens makes tokens. Or train with push_to_hub=False."
        )
    if status == 401:
        return (
            "the Hub does not know the token (401): it is wrong, expired or revoked. Make one with write permission at "
            "https://huggingface.co/settings/tokens and log in with `hf auth login`, or set HF_TOKEN or hub_token."
        )
    if status == 403:
        return (
            "the token may not write there (403). Use a token with write permission, or a hub_model_id in a namespace "
            "of yours. If this came in the middle of an upload, its address had expired: push again."
        )
    if status is not None:
        return f"the Hub answered {status}: {str(error).strip()}"
    return (
        f"{type(error).__name__}: {error}. Check the network, the environment variable HF_HUB_OFFLINE, and that "
        f"{constants.ENDPOINT} can be reached."
    )


@contextlib.contextmanager
def explained(action: str, token: str | None) -> Iterator[None]:
    """
    Within this context the errors of the Hub's client become an `OSError` that says what to do.

    Args:
        action (`str`): what is being done, for the message.
        token (`str`, *optional*): as passed to the client; `None` is the token of the environment or of the login.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        raise OSError(f"{action} failed: {_explain(error, token)}") from error


def check_login(repository: str, token: str | None) -> None:
    """
    Asks the Hub who the owner of the token is, and checks the repository's name. To be called before training.

    Args:
        repository (`str`): name or id of the repository that will be pushed to.
        token (`str`, *optional*): token; `None` takes that of the environment or of the login.

    Raises:
        `ValueError`: if `repository` cannot be the name of one.
        `OSError`: if there is no token, the Hub does not know it, or the Hub cannot be reached.
    """
    validate_repo_id(repository)
    with explained(f"Logging in to push to {repository!r}", token):
        hub_client().whoami(token)


def create_repository(repository: str, token: str | None = None, private: bool | None = None) -> str:
    """
    Creates a repository for a model where there is none.

    Args:
        repository (`str`): `"owner/name"`, or `"name"` for one of the token's owner.
        token (`str`, *optional*): token; `None` takes that of the environment or of the login.
        private (`bool`, *optional*): whether a new repository is private; `None` is the owner's default.

    Returns:
        `str`: its id, `"owner/name"`.

    Raises:
        `OSError`: if the Hub refuses or cannot be reached, with the remedy.
    """
    with explained(f"Creating the repository {repository!r}", token):
        return hub_client().create_repo(repository, token=token, private=private, exist_ok=True).repo_id


def model_files(folder: Path) -> dict[str, Path]:
    """The model in a folder, path in the repository -> file: the adapter in both formats, or the transformer."""
    files = [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in files}


def shown_files(card: ModelCard, folder: Path) -> dict[str, Path]:
    """The pictures in a folder that a card shows, in its gallery or its text; path in the repository -> file."""
    names = [example["output"]["url"] for example in card.data.get("widget") or []]
    names += [unquote(name) for name in _PICTURE.findall(card.text)]
    return {
        name: folder / name
        for name in dict.fromkeys(names)
        if not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and (folder / name).is_file()
    }


def files_of(folder: Path) -> dict[str, Path]:
    """The model in a folder, its card, and the pictures that the card shows; path in the repository -> file."""
    files = model_files(folder)
    card = folder / CARD_NAME
    if card.is_file():
        files |= {CARD_NAME: card, **shown_files(ModelCard.load(card), folder)}
    return files


def push_files(
    repository: str,
    files: Mapping[str, Path],
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """
    Pushes files in one commit: either all of them appear in the repository, or none. What was uploaded before a push
    broke off is not uploaded again when it is repeated, and files that have not changed are left out.

    Args:
        repository (`str`): `"owner/name"`; it must exist.
        files (`Mapping[str, Path]`): path in the repository -> file.
        commit_message (`str`): what the commit says.
        token (`str`, *optional*): token; `None` takes that of the environment or of the login.
        revision (`str`, *optional*): branch; `None` is the main one.

    Raises:
        `OSError`: if the Hub refuses or cannot be reached, with the remedy.
        `ValueError`: if the Hub finds the card's metadata invalid.
    """
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    with explained(f"The push to {repository!r}", token):
        # `upload_folder` may make several commits; a reader could then load half of a model.
        return hub_client().create_commit(
            repository, operations, commit_message=commit_message, token=token, revision=revision
        )


def push_model(
    folder: str | Path,
    repository: str,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """
    Pushes a model that a trainer has saved: the adapter's files or the transformer, the card, and the pictures that the
    card shows. It does later what [`~DiffusionTrainer.push_to_hub`] does at the end of a training.

    Args:
        folder (`str` or `Path`): the training's `output_dir`.
        repository (`str`): `"owner/name"`, or `"name"` for one of the token's owner; made where there is none.
        commit_message (`str`, *optional*, defaults to `"Upload model"`): what the commit says.
        token (`str`, *optional*): token; `None` takes that of the environment or of the login.
        private (`bool`, *optional*): whether a new repository is private; `None` is the owner's default.
        revision (`str`, *optional*): branch; `None` is the main one.

    Raises:
        `ValueError`: if there is no saved model in `folder`, or the Hub finds the card's metadata invalid.
        `OSError`: if the Hub refuses or cannot be reached, with the remedy.
    """
    folder = Path(folder)
    if not model_files(folder):
        raise ValueError(
            f"There is no model in {str(folder)!r}: it has none of {', '.join(MODEL_FILES)}. Pass the output_dir of a "
            "training, after `trainer.save_model()`."
        )
    return push_files(create_repository(repository, token, private), files_of(folder), commit_message, token, revision)


def inherited_license(base_model: str, token: str | None = None) -> dict[str, str]:
    """
    The licence of a model on the Hub, as metadata for the card of a model made from it.

    Args:
        base_model (`str`): id of the base model, `"owner/name"`.
        token (`str`, *optional*): token; `None` takes that of the environment or of the login.

    Returns:
        `dict[str, str]`: `license`, and for a licence of its own (`"other"`) `license_name` and `license_link`, a full
        address. Empty, with a warning, if the Hub cannot be asked; empty if the base model states no licence.
    """
    try:
        data = hub_client().model_info(base_model, token=token, timeout=constants.DEFAULT_REQUEST_TIMEOUT).card_data
    except (HTTPError, OSError) as error:
        logger.warning(
            f"The card will state no licence, because that of {base_model} could not be read: "
            f"{type(error).__name__}. Add it to the card by hand."
        )
        return {}
    values = {} if data is None else data.to_dict()
    fields = {name: values[name] for name in ("license", "license_name", "license_link") if values.get(name)}
    link = fields.get("license_link")
    if link is not None and "://" not in link:
        # A file of the base model's repository, as in FLUX.1-dev; the adapter's has none of this name.
        fields["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return fields
