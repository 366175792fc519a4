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

"""A page that shows the images of a base model and its adapters side by side."""

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..data.videos import MILLISECONDS, SUFFIX, contact_sheet, evenly_spaced, load_video, save_video
from .comparison import format_interval, format_win_rate


SMALL = 128  # pixels; smaller images are shown enlarged, pixel by pixel
MAX_SIZE = 640  # pixels of the longer side in the page, which holds all images
MAX_VIDEO_SIZE, MAX_FRAMES = 320, 24  # the same of videos, of which it holds so many frames


@dataclass
class Comparison:
    """
    One prompt and noise, drawn by every model.

    Attributes:
        prompt (`str`): the prompt.
        seed (`int`): seed of the noise.
        images (`dict[str, str | os.PathLike]`): the file of each model's image, or of its video as
            [`~trl_diffusion.data.videos.save_video`] writes it; "base" first.
        scores (`dict[str, dict[str, float | None]]`): scores by reward and model, `None` where it does not apply.
    """

    prompt: str
    seed: int
    images: Mapping[str, str | os.PathLike]
    scores: Mapping[str, Mapping[str, float | None]]


def write_report(
    path: str | os.PathLike,
    model: str,
    adapters: Mapping[str, str],
    rewards: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Comparison],
    settings: Mapping[str, Any],
    confidence: float = 0.95,
    omitted: int = 0,
) -> None:
    """
    Write the page: one file that needs no other, with images, style and script inside.

    Args:
        path (`str` or `os.PathLike`):
            File to write.
        model (`str`):
            Name of the base model.
        adapters (`Mapping[str, str]`):
            Where each adapter comes from, by its name.
        rewards (`Mapping[str, Mapping]`):
            What [`compare`] says of each reward.
        comparisons (`Sequence[Comparison]`):
            What to show.
        settings (`Mapping[str, Any]`):
            Said of the images.
        confidence (`float`, *optional*, defaults to `0.95`):
            That of the intervals.
        omitted (`int`, *optional*, defaults to `0`):
            Comparisons that are not shown.
    """
    folder = files(__package__)
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    template = environment.from_string(folder.joinpath("report_template.html").read_text(encoding="utf-8"))
    names = list(adapters)
    several = len(names) > 1
    measures = [{"reward": reward, "adapter": name} for name in names for reward in rewards]
    page = template.render(
        title=f"{names[0]} against {model}" if not several else f"{len(names)} adapters against {model}",
        lead=f"The same prompts and the same noise, drawn by the base model and by {', '.join(names)}. "
        f"Ranges are {100 * confidence:.4g} % confidence intervals.",
        settings=list(settings.items()),
        tiles=[
            _tile(reward, name, rewards[reward], several or name != adapters[name])
            for name in names
            for reward in rewards
        ],
        measures=measures,
        several=several,
        cards=[_card(comparison, names, measures) for comparison in comparisons],
        card_width=340 if len(names) < 2 else 460,
        omitted=omitted,
        # Only this very script may run in the page, whatever a prompt says.
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    Path(path).write_text(page, encoding="utf-8")


def _tile(reward: str, name: str, models: Mapping[str, Any], with_name: bool) -> dict[str, Any]:
    base, aligned = models["base"], models[name]
    change = aligned["change"]
    tile = {
        "reward": reward,
        "adapter": name if with_name else "",
        "direction": _direction(change),
        "change": _number(change["mean"], "+"),
        "base": _number(base["mean"]),
        "aligned": _number(aligned["mean"]),
        "interval": f"change {format_interval(change, sign='+')}",
        "axis": None,
        "win_rate": None,
    }
    if change["low"] is not None:
        ends = [0.0, change["low"], change["high"]]
        low, width = min(ends), (max(ends) - min(ends)) or 1.0

        def place(value: float) -> float:
            return round(4 + 92 * (value - low) / width, 2)

        tile["axis"] = {
            "zero": place(0.0),
            "mean": place(change["mean"]),
            "low": place(change["low"]),
            "width": round(place(change["high"]) - place(change["low"]), 2),
        }
    if aligned["win_rate"] is not None:
        count = aligned["wins"] + aligned["ties"] + aligned["losses"]
        tile["win_rate"] = format_win_rate(aligned)
        tile["wins_percent"] = round(100 * aligned["wins"] / count, 2)
        tile["losses_percent"] = round(100 * aligned["losses"] / count, 2)
        tile["counts"] = f"{aligned['wins']} better, {aligned['ties']} equal, {aligned['losses']} worse"
    return tile


def _card(comparison: Comparison, names: list[str], measures: list[dict[str, str]]) -> dict[str, Any]:
    pictures = []
    for label in ["base", *names]:
        source, sheet, width, height = _embed(comparison.images[label])
        scores = []
        for reward, values in comparison.scores.items():
            change = None if label == "base" else _difference(values, label)
            scores.append(
                {
                    "reward": reward,
                    "value": _number(values[label]),
                    "change": None if change is None else _number(change, "+"),
                    "direction": "" if not change else "up" if change > 0 else "down",
                }
            )
        pictures.append(
            {"label": label, "source": source, "sheet": sheet, "width": width, "height": height, "scores": scores}
        )
    changes = [_difference(comparison.scores[measure["reward"]], measure["adapter"]) for measure in measures]
    return {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "pictures": pictures,
        "pixel": max(pictures[0]["width"], pictures[0]["height"]) <= SMALL,
        "changes": ["" if change is None else repr(change) for change in changes],
    }


def _embed(path: str | os.PathLike) -> tuple[str, str | None, int, int]:
    """An image or video as an address that holds it, that of a video's contact sheet, and the width and height."""
    path, buffer = Path(path), io.BytesIO()
    if path.suffix == SUFFIX:
        frames = load_video(path)
        shown = evenly_spaced(frames, MAX_FRAMES)
        milliseconds = round(MILLISECONDS * len(frames) / len(shown))
        for frame in shown:
            frame.thumbnail((MAX_VIDEO_SIZE, MAX_VIDEO_SIZE))
        save_video(shown, buffer, lossless=max(shown[0].size) <= SMALL, quality=80, milliseconds=milliseconds)
        return _address(buffer), _embed_picture(contact_sheet(shown)), *shown[0].size
    with Image.open(path) as image:
        picture = image.convert("RGB")
    return _embed_picture(picture), None, *picture.size


def _embed_picture(picture: Image.Image) -> str:
    """The address that holds a picture, which is made smaller, in place, where it is too large."""
    small = max(picture.size) <= SMALL
    picture.thumbnail((MAX_SIZE, MAX_SIZE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=small, quality=85)
    return _address(buffer)


def _address(buffer: io.BytesIO) -> str:
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _difference(values: Mapping[str, float | None], label: str) -> float | None:
    if values[label] is None or values["base"] is None:
        return None
    return values[label] - values["base"]


def _direction(change: Mapping[str, float | None]) -> str:
    """Whether the interval lies on one side of zero."""
    if change["low"] is None:
        return ""
    return "up" if change["low"] > 0 else "down" if change["high"] < 0 else ""


def _number(value: float | None, sign: str = "-") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"
