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

import contextlib
import os
from collections.abc import Iterable, Iterator

import datasets
import diffusers
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..models import FlowModel
from ..models.base import add_negative


# Part of every fingerprint: raise it when the rows' content or layout changes.
_FORMAT = "2"
# One prompt a row. "conditioning" is the content of a safetensors file, which carries names, shapes and dtypes, bfloat16
# included, which Arrow does not know.
_FEATURES = Features({"prompt": Value("string"), "length": Value("int32"), "conditioning": Value("large_binary")})


class PromptCache:
    """
    The conditioning of every prompt of a run: text encoders run once for each distinct prompt, ever.

    The tensors lie in `datasets`' cache as a memory-mapped Arrow file; a lookup reads its rows only. A later
    [`build`] of the same prompts with the same text encoders finds the file and runs nothing. A build that is
    interrupted leaves no file behind that a later one would take for whole.

    Make one with [`build`].
    """

    def __init__(self, flow_model: FlowModel, dataset: Dataset, prompts: list[str]):
        self._dataset = dataset.with_format("arrow")
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._flow_model = flow_model
        # One length for all lookups: then no row depends on those beside it.
        self._length = max(dataset["length"])
        self._negative = None
        if flow_model.negative_prompt is not None:
            self._negative = flow_model.collate(self._read([self._row[flow_model.negative_prompt]]), self._length)

    @classmethod
    def build(
        cls,
        flow_model: FlowModel,
        prompts: Iterable[str],
        batch_size: int = 16,
        cache_dir: str | os.PathLike | None = None,
        in_memory_only: bool = False,
    ) -> "PromptCache":
        """
        Encode the distinct prompts, or find them encoded.

        With several processes the main one encodes and the others wait, and then read the same file (or, on machines
        with their own disks, one process of each machine encodes). In memory every process encodes for itself.

        Args:
            flow_model ([`~trl_diffusion.models.FlowModel`]):
                Model whose text encoders to use, on the device where they are.
            prompts (`Iterable[str]`):
                Prompts; repeated ones cost nothing.
            batch_size (`int`, *optional*, defaults to `16`):
                Prompts in one forward of the text encoders.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Folder for the files, that of `datasets` by default (`HF_DATASETS_CACHE`).
            in_memory_only (`bool`, *optional*, defaults to `False`):
                Keep the tensors in memory and write nothing.

        Returns:
            [`PromptCache`].

        Raises:
            `ValueError`: if there is no prompt, or one is not a string.
        """
        distinct = set(prompts)
        if not distinct:
            raise ValueError("There are no prompts to encode: the dataset's `prompt` column is empty.")
        for prompt in distinct:
            if not isinstance(prompt, str):
                raise ValueError(f"Prompts must be strings, got {prompt!r} of type {type(prompt).__name__}.")
        if flow_model.negative_prompt is not None:
            distinct.add(flow_model.negative_prompt)
        distinct = sorted(distinct)

        def rows() -> Iterator[dict[str, str | bytes | None]]:
            return _encode(flow_model, distinct, batch_size)

        if in_memory_only:
            return cls(flow_model, Dataset.from_list(list(rows()), features=_FEATURES), distinct)
        fingerprint = _fingerprint(flow_model, distinct)
        # datasets writes beside and renames, under a lock; so an interrupted or a concurrent build does no harm.
        with PartialState().main_process_first(), _silent_datasets():
            dataset = Dataset.from_generator(
                rows,
                features=_FEATURES,
                cache_dir=None if cache_dir is None else str(cache_dir),
                fingerprint=fingerprint,
                writer_batch_size=batch_size,
            )
        return cls(flow_model, dataset, distinct)

    def get(self, prompts: list[str], device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """
        The conditioning of prompts, as [`~trl_diffusion.models.FlowModel.encode_prompt`] gives it.

        Args:
            prompts (`list[str]` of length B):
                Prompts, in any order, repeated or not.
            device (`torch.device`, *optional*):
                Where the tensors go; the CPU by default.

        Returns:
            `dict[str, torch.Tensor]`: the first dimension of every entry is B.

        Raises:
            `KeyError`: for a prompt that was not in the build.
        """
        for prompt in prompts:
            if prompt not in self._row:
                raise KeyError(
                    f"The prompt {prompt!r} is not in the cache of {len(self)} prompts. Pass every prompt of the run "
                    "to `PromptCache.build`."
                )
        # Each distinct prompt is read and moved once; its G generations are copies on the device.
        distinct = list(dict.fromkeys(prompts))
        position = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([position[prompt] for prompt in prompts], device=device)
        rows = self._read([self._row[prompt] for prompt in distinct])
        conditioning = {
            name: tensor.to(device)[index] for name, tensor in self._flow_model.collate(rows, self._length).items()
        }
        if self._negative is None:
            return conditioning
        negative = {name: tensor.to(device) for name, tensor in self._negative.items()}
        return add_negative(conditioning, negative, len(prompts))

    def __getitem__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return self.get(prompts)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._row

    def __len__(self) -> int:
        return len(self._row)

    def _read(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        column = self._dataset[indices]["conditioning"]
        return [safetensors.torch.load(value.as_py()) for value in column]


def _encode(flow_model: FlowModel, prompts: list[str], batch_size: int) -> Iterator[dict[str, str | bytes | None]]:
    """Rows of the dataset, batch by batch."""
    starts = range(0, len(prompts), batch_size)
    disable = not PartialState().is_local_main_process
    for start in tqdm(starts, desc="Encoding prompts", unit="batch", disable=disable):
        batch = prompts[start : start + batch_size]
        for prompt, row in zip(batch, flow_model.encode_rows(batch), strict=True):
            content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in row.items()})
            yield {"prompt": prompt, "length": flow_model.row_length(row), "conditioning": content}


def _fingerprint(flow_model: FlowModel, prompts: list[str]) -> str:
    """
    Changes with whatever the rows depend on: prompts, tokenisation, text encoders (all of their weights, which take
    about a second for 10 GB, much less than to run them), and the code that runs them.
    """
    parts = [
        _FORMAT,
        transformers.__version__,
        diffusers.__version__,
        type(flow_model).__name__,
        repr(flow_model.max_sequence_length),
        repr(prompts),
    ]
    for name, tokenizer in flow_model.tokenizers.items():
        parts += [name, repr(tokenizer(prompts, padding=True, truncation=True)["input_ids"])]
    for name, module in flow_model.text_encoders.items():
        parts += [name, module.config.to_json_string()]
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            parts += [key, repr((tensor.dtype, tuple(tensor.shape))), Hasher.hash_bytes([content])]
    return Hasher.hash(parts)


@contextlib.contextmanager
def _silent_datasets() -> Iterator[None]:
    """Hide datasets' own progress bar, which counts rows without a total, while ours shows."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
