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

"""Videos as files that need no player: animated WebP pictures, with a contact sheet of their frames beside."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image


FRAMES_PER_SECOND = 16  # as Wan's
MILLISECONDS = 1000 // FRAMES_PER_SECOND  # of a frame, which the format counts in whole ones
SUFFIX = ".webp"


def save_video(
    frames: Sequence[Image.Image],
    file: Path | BinaryIO,
    lossless: bool = False,
    quality: int = 90,
    milliseconds: int = MILLISECONDS,
) -> None:
    """
    Write an animated picture that repeats for ever.

    Args:
        frames (`Sequence[PIL.Image]`): RGB, of one size.
        file (`Path` or `BinaryIO`): where to write; the format is WebP whatever the name.
        lossless (`bool`, *optional*, defaults to `False`): keep the very pixels, for several times the size.
        quality (`int`, *optional*, defaults to `90`): from 0 to 100, where pixels may change.
        milliseconds (`int`, *optional*): that a frame is shown; [`load_video`] reads files with the default.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = str(len(frames))
    frames[0].save(
        file,
        "WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=milliseconds,
        loop=0,
        exif=exif,
        lossless=lossless,
        # Of a lossless picture it is the effort, and the smallest is quick.
        quality=0 if lossless else quality,
        method=0 if lossless else 2,
    )


def load_video(path: Path) -> list[Image.Image]:
    """The frames of a file of [`save_video`], RGB. Equal ones in a row are one in the file, shown for longer."""
    frames = []
    with Image.open(path) as picture:
        if picture.n_frames == 1:  # a still picture, of which the format keeps no time
            return [picture.convert("RGB")] * int(picture.getexif()[ExifTags.Base.ImageDescription])
        for index in range(picture.n_frames):
            picture.seek(index)
            frame = picture.convert("RGB")
            frames += [frame] * round(picture.info["duration"] / MILLISECONDS)
    return frames


def contact_sheet(frames: Sequence[Image.Image], max_frames: int = 16) -> Image.Image:
    """Frames of a video beside each other in a grid that is as near to a square as possible: all, or evenly spaced."""
    frames = evenly_spaced(frames, max_frames)
    columns = math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % columns * width, index // columns * height))
    return sheet


def evenly_spaced(frames: Sequence[Image.Image], count: int) -> list[Image.Image]:
    """At most `count` of the frames, from the first to the last."""
    if len(frames) <= count:
        return list(frames)
    return [frames[round(index * (len(frames) - 1) / max(count - 1, 1))] for index in range(count)]
