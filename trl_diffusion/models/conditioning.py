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

"""The embeddings of the prompts that a run will see next, and of no others."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import cached_assets_path
from tqdm.auto import tqdm

from ..data.prompt_images import Prompt, key_of
from ..data.prompt_store import PromptStore
from .base import FlowModel, add_negative


Row = dict[str, torch.Tensor]

# Prompts of each process.
EXCHANGED_TOGETHER = 8
# Part of every key: raise it when the content or layout of entries changes.
_FORMAT = "2"


def open_prompt_store(flow_model: FlowModel, max_gib: float) -> PromptStore:
    """
    The store of a model's embeddings, in the folder of assets of `huggingface_hub`, shared by all runs of this user.

    Its key changes with whatever embeddings depend on besides the prompt: the text encoders and tokenizers, their dtype,
    and the code that runs them. Nothing of a model that is loaded by name is read for it; the weights of a pipeline that
    is given loaded are hashed once.

    Args:
        flow_model ([`FlowModel`]): text encoders of a pipeline that was given loaded are in memory.
        max_gib (`float`): size in GiB that the folder is kept below.
    """
    source = flow_model.source or _hash_of_weights(flow_model)
    parts = [
        _FORMAT, transformers.__version__, diffusers.__version__, type(flow_model).__name__,
        flow_model.max_sequence_length, source,
    ]  # fmt: skip
    folder = cached_assets_path("trl_diffusion", "prompts", "embeddings")
    return PromptStore(folder, json.dumps(parts), max_gib)


def _hash_of_weights(flow_model: FlowModel) -> str:
    """Of text encoders in memory, of the VAE where it encodes images, and of what tokenizers are saved as."""
    digest = hashlib.sha256()
    parts = [(name, module, module.config) for name, module in flow_model.text_encoders.items()]
    if flow_model.takes_image:
        parts.append(("vae", flow_model.vae, flow_model.vae))  # which writes its configuration itself
    for name, module, config in parts:
        digest.update(f"{name} {config.to_json_string()}".encode())
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for name, tokenizer in flow_model.tokenizers.items():
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(f"{name} {path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


class Conditioning:
    """
    The conditioning of prompts, encoded in windows: where a prompt is asked for that is not there, it is encoded together
    with those that come next, and those before are let go. So neither the memory nor the time to the first step
    depends on the size of the dataset. The text encoders are on the accelerator while a window is encoded, and
    elsewhere on the CPU. Where prompts come with images to edit, these are encoded with them.

    Each process encodes what its own images need. Prompts are encoded one by one, so that embeddings depend neither on
    the prompts beside nor on where a window begins; text encoders of real size are busy with one.

    Args:
        flow_model ([`FlowModel`]):
            Model whose text encoders to use.
        device (`torch.device`):
            Where the conditioning goes.
        window (`int`, *optional*, defaults to `128`):
            Prompts of a window. One prompt of FLUX.1 takes 4 MiB of host memory in bfloat16.
        store ([`~trl_diffusion.data.prompt_store.PromptStore`], *optional*):
            Where embeddings are looked up before, and kept.
        encoder_device (`torch.device`, *optional*):
            Where the text encoders run; `device` by default.

    Attributes:
        upcoming (`Callable`):
            Gives the prompts that this process will ask for from now on; windows that [`get`] begins follow it.
    """

    def __init__(
        self,
        flow_model: FlowModel,
        device: torch.device,
        window: int = 128,
        store: PromptStore | None = None,
        encoder_device: torch.device | None = None,
    ):
        self.flow_model = flow_model
        self.device = device
        self.encoder_device = device if encoder_device is None else encoder_device
        self.window = window
        self.store = store
        self.upcoming: Callable[[], Iterable[Prompt]] = tuple
        self._kept: dict[Prompt, Row] = {}
        self._window: dict[Prompt, Row] = {}
        # What entries of variable length are padded to, so that no row depends on the rows beside it.
        self._length = flow_model.max_sequence_length

    def keep_all(self, prompts: Iterable[Prompt]) -> None:
        """
        Encode all the prompts of a run, each process its share, keep them in memory on every process, and free the text
        encoders. To be called on every process.

        Args:
            prompts (`Iterable[Prompt]`): the same on every process; repeated ones cost nothing.
        """
        prompts = list(dict.fromkeys(prompts))
        distinct = list(dict.fromkeys([*prompts, *self._negatives(prompts)]))
        state = PartialState()
        mine = self._encoded(distinct[state.process_index :: state.num_processes])
        # In small parts: NCCL exchanges objects in the accelerator's memory.
        share = list(mine.items())
        rounds = -(-len(distinct) // state.num_processes)
        for start in range(0, rounds, EXCHANGED_TOGETHER):
            self._kept |= dict(gather_object(share[start : start + EXCHANGED_TOGETHER]))
        self._length = max(map(self.flow_model.row_length, self._kept.values()))
        self.flow_model.free_text_encoders()

    def keep(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts and keep them in memory on this process."""
        prompts = list(dict.fromkeys(prompts))
        needed = dict.fromkeys([*prompts, *self._negatives(prompts)])
        self._kept |= self._encoded([prompt for prompt in needed if prompt not in self._kept])

    def _negatives(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """What guidance leads away from at each prompt; nothing where there is no guidance by a negative prompt."""
        negatives = [self.flow_model.negative_of(prompt) for prompt in prompts]
        return [negative for negative in negatives if negative is not None]

    def check_available(self, prompts: Iterable[Prompt]) -> None:
        """Refuse prompts that are not there and cannot be encoded any more."""
        if self.flow_model.can_encode:
            return
        for prompt in prompts:
            if prompt not in self._kept and prompt not in self._window:
                raise ValueError(
                    f"The prompt {prompt!r} was not among the datasets that were given, and the text encoders of the "
                    "pipeline were freed by now. Pass its dataset at construction, as eval_dataset to a trainer, or the "
                    "id or path of the pipeline instead of the loaded one."
                )

    def get(self, prompts: list[Prompt], ahead: Iterable[Prompt] | None = None) -> dict[str, torch.Tensor]:
        """
        The conditioning of prompts, on the device.

        Args:
            prompts (`list[Prompt]` of length B):
                Prompts, in any order, repeated or not.
            ahead (`Iterable[Prompt]`, *optional*):
                What will be asked for after these; `upcoming()` by default.

        Returns:
            `dict[str, torch.Tensor]`: as [`FlowModel.encode_prompt`] gives it; the first dimension of every entry is B.

        Raises:
            `ValueError`: a prompt must be encoded, and the text encoders are gone.
        """
        self.check_available(prompts)
        negatives = self._negatives(prompts)
        needed = list(dict.fromkeys([*prompts, *negatives]))
        if any(prompt not in self._kept and prompt not in self._window for prompt in needed):
            self._advance(list(dict.fromkeys(prompts)), self.upcoming() if ahead is None else ahead)
        rows = {prompt: self._kept[prompt] if prompt in self._kept else self._window[prompt] for prompt in needed}
        # Prompts and negative prompts of one batch have one length.
        length = max(self._length, *map(self.flow_model.row_length, rows.values()))
        conditioning = self._batch(prompts, rows, length)
        if not negatives:
            return conditioning
        return add_negative(conditioning, self._batch(negatives, rows, length), len(prompts))

    def _batch(self, prompts: list[Prompt], rows: dict[Prompt, Row], length: int) -> Row:
        # Each distinct prompt is moved once; its G generations are copies on the device.
        distinct = list(dict.fromkeys(prompts))
        position = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([position[prompt] for prompt in prompts], device=self.device)
        batch = self.flow_model.collate([rows[prompt] for prompt in distinct], length)
        return {name: tensor.to(self.device)[index] for name, tensor in batch.items()}

    def _advance(self, prompts: list[Prompt], ahead: Iterable[Prompt]) -> None:
        wanted = dict.fromkeys(prompt for prompt in prompts if prompt not in self._kept)
        # A dataset may have fewer prompts than a window, and `ahead` no end: it is followed for so long only.
        for prompt in itertools.islice(ahead, 4 * self.window):
            if len(wanted) >= self.window:
                break
            if prompt not in self._kept:
                wanted[prompt] = None
        negatives = [prompt for prompt in self._negatives([*prompts, *wanted]) if prompt not in self._kept]
        wanted |= dict.fromkeys(negatives)
        self._window = {prompt: self._window[prompt] for prompt in wanted if prompt in self._window}
        self._window |= self._encoded([prompt for prompt in wanted if prompt not in self._window])

    def _encoded(self, prompts: list[Prompt]) -> dict[Prompt, Row]:
        """The embeddings of distinct prompts, from the store or of the text encoders, on the CPU."""
        found: dict[Prompt, Row] = {}
        if self.store is not None:
            found = {key_of(prompt): row for prompt in prompts if (row := self.store.get(prompt)) is not None}
        missing = [prompt for prompt in prompts if prompt not in found]
        if not missing:
            return found
        hidden = not PartialState().is_local_main_process
        with self.flow_model.text_encoders_on(self.encoder_device):
            for prompt in tqdm(missing, desc="Encoding prompts", unit="prompt", leave=False, disable=hidden):
                (row,) = self.flow_model.encode_rows([prompt])
                # A copy, which keeps no memory of the encoders' alive.
                row = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in row.items()}
                found[key_of(prompt)] = row
                if self.store is not None:
                    self.store.put(prompt, row)
        if self.store is not None:
            self.store.trim()
        return found
