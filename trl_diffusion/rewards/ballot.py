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

"""What people have voted: on disk the moment it is cast, and found again by the pictures themselves."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .preprocessing import to_rgb


# Of a picture that nobody clicked, that was clicked, and that was clicked twice.
SCORES = (0, 1, 2)
VOTES_FILE, IMAGES_FOLDER, PAIRS_FOLDER = "votes.jsonl", "images", "pairs"


def picture_key(prompt: str, picture: Image.Image) -> str:
    """The name of a picture: of the same pixels for the same prompt it is the same, in every run."""
    digest = hashlib.sha256(prompt.encode())
    digest.update(f"\0{picture.width} {picture.height}\0".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:24]


@dataclass
class Group:
    """
    The pictures of a prompt that are judged together.

    Attributes:
        prompt (`str`): theirs.
        source (`str`, *optional*): key of the picture that the prompt edits.
        keys (`tuple[str, ...]`): of its pictures, each once.
        scores (`dict[str, int]`): what was voted, by key; those that are missing have 0.
        state (`str`): `"open"`, `"done"`, or `"skipped"`, so that nothing is learnt of it.
    """

    prompt: str
    source: str | None
    keys: tuple[str, ...]
    scores: dict[str, int] = field(default_factory=dict)
    state: str = "open"

    @property
    def id(self) -> str:
        return hashlib.sha256("\0".join([self.prompt, self.source or "", *self.keys]).encode()).hexdigest()[:24]


class Ballot:
    """
    The votes of a run, in a folder: `votes.jsonl`, one line an act, and `images/`, what was voted on. An act is on disk before
    it counts, so a run that is killed and resumed asks for no vote twice. It may be used from several threads.

    Args:
        folder (`str` or `Path`): made where it is missing.

    Raises:
        `ValueError`: `votes.jsonl` is not one of votes.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        (self.folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._acts: list[dict[str, Any]] = []
        self._is_complete = threading.Event()
        self.groups: list[Group] = []
        self._asked: list[tuple[Group, str]] = []
        self.version = 0
        self._read()

    def _read(self) -> None:
        path = self.folder / VOTES_FILE
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # a process was killed while it wrote the last line
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                act = json.loads(line)
                if act["act"] == "undo":
                    self._acts.pop()
                else:
                    self._acts.append(act)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"Line {number} of {path} is no vote: {line[:80]!r}. Move the file away to vote anew, or delete the line."
                ) from error

    # ---- The trainer's side ----

    def ask(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        sources: Sequence[Image.Image] | None = None,
    ) -> list[str]:
        """
        Ask for votes on a generation, and for [`scores`].

        Args:
            pictures (`Sequence[PIL.Image]` of length B): those of a prompt are one group.
            prompts (`Sequence[str]` of length B): theirs.
            sources (`Sequence[PIL.Image]` of length B, *optional*): what the prompts edit; a prompt and its source make a group.

        Returns:
            `list[str]` of length B: a key a picture.
        """
        keys = [self._kept(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        edited = [None] * len(keys) if sources is None else [self._kept(source, "") for source in sources]
        asked = list(zip(prompts, edited, strict=True))
        of_prompt = defaultdict(dict)
        for which, key in zip(asked, keys, strict=True):
            of_prompt[which][key] = None
        with self._lock:
            groups = {which: Group(*which, tuple(found)) for which, found in of_prompt.items()}
            self.groups = list(groups.values())
            self._asked = [(groups[which], key) for which, key in zip(asked, keys, strict=True)]
            by_id = {group.id: group for group in self.groups}
            for act in self._acts:
                if act["group"] in by_id:
                    self._apply(by_id[act["group"]], act)
            self._changed()
        return keys

    def wait(self, seconds: float) -> bool:
        """Whether every group is done or skipped, within so many seconds."""
        return self._is_complete.wait(seconds)

    def scores(self) -> list[float | None]:
        """The scores of the pictures of [`ask`]; None of a group that was skipped. The groups are closed with this."""
        with self._lock:
            self.groups = []
            self._changed()
        return [None if group.state == "skipped" else float(group.scores.get(key, 0)) for group, key in self._asked]

    def _kept(self, picture: Image.Image, prompt: str) -> str:
        """The key of a picture, which is on disk then."""
        picture = to_rgb(picture)
        key = picture_key(prompt, picture)
        path = self.picture_path(key)
        if not path.exists():
            write_whole(path, png(picture))
        return key

    # ---- People's side ----

    def vote(self, group: str, key: str, score: int) -> None:
        """Give a picture a score. As the other acts, it raises `KeyError` of what is not asked, or not any more."""
        if type(score) is not int or score not in SCORES:
            raise ValueError(f"A score must be one of {SCORES}, got {score!r}.")
        with self._lock:
            found = self._open_group(group)
            if key not in found.keys:
                raise KeyError(f"{key} is no picture of this group.")
            self._act(found, {"act": "vote", "image": key, "score": score})

    def close(self, group: str, skip: bool = False) -> None:
        """Be done with a group, or leave it out."""
        with self._lock:
            self._act(self._open_group(group), {"act": "skip" if skip else "done"})

    def undo(self) -> bool:
        """Take back the last act on what is asked now; whether there was one."""
        with self._lock:
            by_id = {group.id: group for group in self.groups}
            if not self._acts or self._acts[-1]["group"] not in by_id:
                return False
            self._append({"act": "undo"})
            undone = self._acts.pop()
            group = by_id[undone["group"]]
            group.scores, group.state = {}, "open"
            for act in self._acts:
                if act["group"] == group.id:
                    self._apply(group, act)
            self._changed()
            return True

    def snapshot(self) -> dict[str, Any]:
        """What is asked now and what was voted on it, as JSON; `version` is another whenever that has changed."""
        with self._lock:
            groups = [
                {
                    "id": group.id, "prompt": group.prompt, "source": group.source, "state": group.state,
                    "images": [[key, group.scores.get(key, 0)] for key in group.keys],
                }
                for group in self.groups
            ]  # fmt: skip
            return {"groups": groups, "version": self.version}

    def picture_path(self, key: str) -> Path:
        return self.folder / IMAGES_FOLDER / f"{key}.png"

    def _open_group(self, group: str) -> Group:
        found = next((each for each in self.groups if each.id == group), None)
        if found is None or found.state != "open":
            raise KeyError(f"The group {group} is not asked any more.")
        return found

    def _act(self, group: Group, act: dict[str, Any]) -> None:
        act = {**act, "group": group.id}
        if act["act"] == "done":  # what the pairs are made of
            act |= {"prompt": group.prompt, "scores": {key: group.scores.get(key, 0) for key in group.keys}}
        self._append(act)
        self._acts.append(act)
        self._apply(group, act)
        self._changed()

    @staticmethod
    def _apply(group: Group, act: dict[str, Any]) -> None:
        if act["act"] == "vote":
            group.scores[act["image"]] = act["score"]
        else:
            group.state = "skipped" if act["act"] == "skip" else "done"

    def _append(self, act: dict[str, Any]) -> None:
        with open(self.folder / VOTES_FILE, "ab") as file:
            file.write(json.dumps(act, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _changed(self) -> None:
        self.version += 1
        if self.groups and all(group.state != "open" for group in self.groups):
            self._is_complete.set()
        else:
            self._is_complete.clear()

    # ---- Afterwards ----

    def pairs(self) -> Iterator[dict[str, Any]]:
        """
        Each picture that was liked better than others of its group, with the one of these that is in the fewest pairs: prompt,
        chosen, rejected and their scores. All pairs of a group would have each picture many times.
        """
        with self._lock:
            done = [act for act in self._acts if act["act"] == "done"]
        for act in done:
            scores, uses = act["scores"], Counter()
            for better in sorted(scores, key=scores.get, reverse=True):
                worse = [key for key in scores if scores[key] < scores[better]]
                if worse:
                    other = min(worse, key=uses.__getitem__)
                    uses[other] += 1
                    yield {
                        "prompt": act["prompt"],
                        "chosen": {"path": None, "bytes": self.picture_path(better).read_bytes()},
                        "rejected": {"path": None, "bytes": self.picture_path(other).read_bytes()},
                        "chosen_score": scores[better],
                        "rejected_score": scores[other],
                    }


def save_pairs(folder: str | os.PathLike) -> Path | None:
    """
    Write what was voted as a dataset of pairs, `pairs/` in the folder of the votes, for `datasets.load_from_disk`: `prompt`,
    `chosen` and `rejected` (images), `chosen_score` and `rejected_score`, the columns of preference data in TRL.

    Args:
        folder (`str` or `Path`): of a [`Ballot`], `votes/` of a run.

    Returns:
        `Path` of the dataset; `None` where no picture was preferred to another.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    target = Path(folder) / PAIRS_FOLDER
    if next(_pairs(folder), None) is None:
        return None
    features = Features(
        {
            "prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature(),
            "chosen_score": Value("int64"), "rejected_score": Value("int64"),
        }
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".pairs-", dir=folder) as beside:
        # Pictures are read as they are written, and never all in memory.
        dataset = Dataset.from_generator(
            _pairs, features=features, gen_kwargs={"folder": os.fspath(folder)}, cache_dir=f"{beside}/cache"
        )
        dataset.save_to_disk(f"{beside}/pairs")
        shutil.rmtree(target, ignore_errors=True)
        Path(beside, "pairs").rename(target)
    return target


def _pairs(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    return Ballot(folder).pairs()


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file, compressed little: people wait for a generation of them."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
