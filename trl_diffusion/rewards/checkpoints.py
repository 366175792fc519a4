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

"""Official checkpoints: found on the Hub or in a folder, read without running code, loaded without a gap."""

import json
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models import whole_weights


def find_file(location: str | Path, official: str, stem_only: bool = False) -> Path:
    """
    The weight file in a folder or, where `location` is no folder, in that repository of the Hub.

    In a folder it may also have been converted to safetensors, which is preferred: under the same stem or, unless
    `stem_only`, as `model.safetensors` or `weights.safetensors`.

    Raises:
        `ValueError`: there is none; the message names the place and the file.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        names = [f"{Path(official).stem}.safetensors", official]
        for filename in names if stem_only else [names[0], "model.safetensors", "weights.safetensors", names[1]]:
            if (folder / filename).is_file():
                return folder / filename
        raise ValueError(
            f"The folder {str(location)!r} holds no weights {official!r} (nor a safetensors version of it). Download "
            "the official file into it."
        )
    try:
        return Path(hf_hub_download(str(location), official))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{str(location)!r} is no folder, and {official!r} could not be had from a Hub repository of that name: "
            f"{error} Check the name and the network, or download the file and give its folder."
        ) from error


def read_sizes(location: str | Path, official: dict[str, Any]) -> dict[str, Any]:
    """The sizes of the model: those of `config.json` where the weights are in a folder with one, else the official."""
    path = Path(location).expanduser() / "config.json"
    if not path.is_file():
        return official
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    missing = sorted(official.keys() - sizes.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {missing}. Give the sizes of the model under these keys, or remove it for official weights."
        )
    return sizes


def read_weights(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """
    The tensors of a `.safetensors` file or of a pickle; a pickle is only read as far as it holds tensors.

    Args:
        path (`Path`): the file.
        key (`str`, *optional*): entry of a pickle that holds the tensors. safetensors files have no such level.

    Raises:
        `ValueError`: the file is truncated, holds code, or has another content.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}). It may be truncated: download it again.") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors ({error}) Either it is truncated: download it again. Or it holds "
            "Python objects, which are refused because they can run code: convert it to safetensors if you trust it."
        ) from error
    if key is not None:
        if not isinstance(state, dict) or key not in state:
            raise ValueError(f"{path} has no entry {key!r}; it is not the official file.")
        state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors; it is not the official file.")
    return state


def build_and_load(build: Callable[[], nn.Module], state: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """
    Make a model of weights that are in its own key names already: every one there, none left over, all of its shape.

    Args:
        build (`Callable`): makes the model; its parameters are never allocated twice.
        state (`dict[str, torch.Tensor]`): the weights. They become the parameters, in their dtype.
        path (`Path`): where they come from, for messages.

    Raises:
        `ValueError`: missing or left-over keys or other shapes; the message names the file and the keys.
    """
    with whole_weights(), init_empty_weights(include_buffers=False):
        model = build()
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(_mismatch(path, shorten(str(error), 1000, placeholder=" ..."))) from error
    return model


def load_transformers_model(
    model_class: type[PreTrainedModel],
    model_types: Collection[str],
    location: str | Path,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """
    `from_pretrained` that refuses another architecture, missing and left-over weights.

    Args:
        model_class (`type`): a transformers model or auto class.
        model_types (`Collection[str]`): the architectures to accept, as `config.json` names them; all if empty.
        location (`str` or `Path`): id on the Hub or folder.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights.

    Raises:
        `ValueError`: as said; the message names the place and the keys.
    """
    try:
        config = AutoConfig.from_pretrained(location)
        if model_types and config.model_type not in model_types:
            raise ValueError(f"it is a model of the type {config.model_type!r}, not {_either(sorted(model_types))}.")
        with whole_weights():
            model, report = model_class.from_pretrained(location, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"No model could be loaded from {str(location)!r}: {error} Check the name and the network, or give the "
            "folder of a complete download."
        ) from error
    # Other shapes it has refused itself. Earlier releases of transformers saved the positions, which are constants.
    unexpected = {key for key in report["unexpected_keys"] if not key.endswith("position_ids")}
    found = {"Missing": sorted(report["missing_keys"]), "Unexpected": sorted(unexpected)}
    told = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in found.items() if keys)
    if told:
        raise ValueError(_mismatch(location, shorten(f"{told}.", 1000, placeholder=" ...")))
    return model


def load_tokenizer(
    tokenizer_class: type[PreTrainedTokenizerBase], location: str | Path, official: str
) -> PreTrainedTokenizerBase:
    """
    The tokenizer from the folder of the weights where it has one, else the official one from the Hub.

    Raises:
        `ValueError`: there is none in either place.
    """
    folder = Path(location).expanduser()
    source = folder if (folder / "tokenizer_config.json").is_file() else official
    try:
        tokenizer = tokenizer_class.from_pretrained(source)
        # Where transformers finds no files, it may return a tokenizer of its special tokens, without a word.
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise OSError("there are no tokenizer files.")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer could not be loaded from {str(source)!r}: {error} Check the network, or save the "
            f"tokenizer of {official!r} (tokenizer.save_pretrained) into the folder of the weights and give it."
        ) from error
    return tokenizer


def _mismatch(place: str | Path, report: str) -> str:
    return (
        f"The weights in {str(place)!r} are not those of this model: {report} Download the official file again; for other "
        "sizes give them in config.json beside it."
    )


def _either(names: Collection[str]) -> str:
    return " or ".join(map(repr, names))
