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

"""Images of a dataset: all read before the training, those to align with sorted into aspect buckets and loaded at its size."""

import math
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, Value
from datasets import Image as ImageFeature
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import find_nearest_bucket
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from .prompts import CONDITION_IMAGE


# Width over height of the aspect buckets.
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
# Modes that become RGB without a decision about what is lost. Those with transparency must turn out opaque.
CONVERTIBLE_MODES = ("RGB", "L", "P", "CMYK", "1", "RGBA", "LA", "PA")
# Threads of a process that read images. Pillow decodes outside of Python's global lock.
NUM_READERS = 8

_ROW = "image_row"
# How a picture is turned upright, by its EXIF orientation. All other values, as a text or 0, say nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def open_picture(value: dict[str, Any]) -> Image.Image:
    """
    The picture of an undecoded value of a column of type [`~datasets.Image`], upright, in the mode of its file. Of
    several frames it is the first.

    Of the EXIF data the orientation alone is read, and data that cannot be read has none: cameras and phones write what
    `PIL.ImageOps.exif_transpose`, and with it the decoding of `datasets`, ends on.

    Args:
        value (`dict`): the bytes of a file under "bytes", or else its path under "path".

    Raises:
        `ValueError`: the file cannot be read to its end.
    """
    try:
        with Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
            # First, because of some formats (TIFF) Pillow turns the pixels itself and takes the orientation away.
            image.load()
            if 0 in image.size:
                raise ValueError(f"it is {image.width} pixels wide and {image.height} high")
            turn = _TURNS.get(_orientation(image))
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # on a broken file Pillow raises whatever its reader stumbles over
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (struct.error, SyntaxError, ValueError):  # no EXIF data in spite of its name
        return None


def read_all(
    dataset: Dataset, column: str, read: Callable[[int, Any], T], process_index: int = 0, num_processes: int = 1
) -> list[T]:
    """
    What `read` makes of each value of a column, in the order of the rows: in threads, each process its share, with a
    progress bar. To be called by all processes.

    Args:
        dataset (`datasets.Dataset`): of N rows.
        column (`str`): to be read; of type [`~datasets.Image`], undecoded.
        read (`Callable[[int, Any], T]`): of a row's number and value; raises `ValueError` if it is no good.
        process_index, num_processes (`int`): this process, and how many there are.

    Returns:
        `list[T]` of length N.

    Raises:
        `ValueError`: on every process, the error of the first row that is no good, with the numbers of all such rows.
    """
    rows = range(process_index, len(dataset), num_processes)

    def attempt(row: int) -> tuple[int, T | None, str | None]:
        try:
            return row, read(row, dataset[row][column]), None
        except ValueError as error:
            return row, None, str(error)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        results = list(
            tqdm(pool.map(attempt, rows), "Reading images", len(rows), unit="image", disable=process_index > 0)
        )
    if num_processes > 1:
        results = sorted(gather_object(results), key=lambda result: result[0])
    failures = {row: error for row, _, error in results if error is not None}
    if failures:
        bad = list(failures)
        message = failures[bad[0]]
        if len(bad) > 1:
            shown = ", ".join(map(str, bad[:20])) + (", ..." if len(bad) > 20 else "")
            message += f" In all, {len(bad)} rows have images that cannot be used: {shown}."
        raise ValueError(message)
    return [result for _, result, _ in results]


def check_pictures(dataset: Dataset, column: str, name: str, process_index: int = 0, num_processes: int = 1) -> None:
    """
    Read all images of a column, as [`read_all`]; rows without an image are allowed.

    Args:
        dataset (`datasets.Dataset`), column (`str`), process_index, num_processes (`int`): as for [`read_all`].
        name (`str`): what the caller calls the dataset, for the message.

    Raises:
        `ValueError`: a file that cannot be read, e.g. a truncated one; the message names its row.
    """

    def read(row: int, value: dict[str, Any] | None) -> None:
        if value is not None:
            try:
                open_picture(value)
            except ValueError as error:
                raise ValueError(_unreadable(row, error, f"column {column!r} of {name}")) from error

    read_all(dataset, column, read, process_index, num_processes)


class ImageBuckets:
    """
    The images of a dataset, each in the bucket of the nearest aspect.

    All images are read at construction, so that a broken file or a mode that cannot become RGB ends the run before it
    begins; they are read again when they are trained on. To be made by all processes, each of which reads its share.

    Args:
        dataset (`datasets.Dataset`):
            Prompts, in a column "prompt", and images, in a column "image" of type [`~datasets.Image`].
        process_index (`int`, *optional*, defaults to `0`):
            This process.
        num_processes (`int`, *optional*, defaults to `1`):
            How many processes there are.

    Attributes:
        dataset (`datasets.Dataset`):
            The prompts with their undecoded images, those that they edit, and the numbers of their rows; what is to be
            loaded by [`load`].
        bucket_of_row (`list[int]`):
            Bucket of each row, an index of `RATIOS`.

    Raises:
        `ValueError`: another type of column, a row without an image, a file that cannot be read to its end, a mode
        other than `CONVERTIBLE_MODES`, transparent pixels. The message names the row.
    """

    def __init__(self, dataset: Dataset, process_index: int = 0, num_processes: int = 1):
        feature = dataset.features["image"]
        if not isinstance(feature, ImageFeature):
            raise ValueError(
                f"The column 'image' of train_dataset must be of type datasets.Image, got {feature}. Turn paths or "
                "bytes into images with dataset.cast_column('image', datasets.Image()), or rename the column."
            )
        columns = [column for column in dataset.column_names if column in ("prompt", "image", CONDITION_IMAGE)]
        dataset = dataset.with_format(None).select_columns(columns)
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
        if CONDITION_IMAGE in columns:
            dataset = undecoded_condition_images(dataset, "train_dataset")
        sizes = read_all(dataset, "image", lambda row, value: _rgb(row, value).size, process_index, num_processes)
        # Of one area, so that the nearest is the one whose aspect is the least times larger or smaller.
        buckets = [(1 / math.sqrt(ratio), math.sqrt(ratio)) for ratio in RATIOS]
        self.bucket_of_row = [find_nearest_bucket(height, width, buckets) for width, height in sizes]
        self.dataset = dataset.add_column(_ROW, list(range(len(dataset))))

    def sizes(self, training_size: tuple[int, int], multiple: int) -> dict[int, tuple[int, int]]:
        """
        Height and width of the images of each bucket.

        Where all images are of one aspect, the training size. Else about as many pixels as the training size, in the
        bucket's aspect.

        Args:
            training_size (`tuple[int, int]`): height and width in pixels.
            multiple (`int`): of which every height and width must be a multiple.
        """
        used = sorted(set(self.bucket_of_row))
        if len(used) == 1:
            return {used[0]: training_size}
        side = math.sqrt(training_size[0] * training_size[1])

        def nearest(length: float) -> int:
            return max(1, round(length / multiple)) * multiple

        return {i: (nearest(side / math.sqrt(RATIOS[i])), nearest(side * math.sqrt(RATIOS[i]))) for i in used}

    def size(self, row: dict[str, Any], training_size: tuple[int, int], multiple: int) -> tuple[int, int]:
        """Height and width at which a row of `dataset` is trained, see [`sizes`]."""
        return self.sizes(training_size, multiple)[self.bucket_of_row[row[_ROW]]]

    def load(self, rows: list[dict[str, Any]], size: tuple[int, int]) -> torch.Tensor:
        """
        Read the images of rows of `dataset`: upright, resized (antialiased) to cover `size`, and centre-cropped.

        Args:
            rows (`list[dict]` of length B): rows of `dataset`.
            size (`tuple[int, int]`): height and width in pixels.

        Returns:
            `torch.Tensor` of shape `(B, 3, height, width)`, float32, in [0, 1].

        Raises:
            `ValueError`: a file that is no longer what it was at construction; the message names its row.
        """
        height, width = size
        pictures = [
            ImageOps.fit(_rgb(row[_ROW], row["image"]), (width, height), Image.Resampling.LANCZOS) for row in rows
        ]
        return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(pictures))


def _rgb(row: int, value: dict[str, Any] | None, column: str = "image", name: str = "train_dataset") -> Image.Image:
    """The upright picture of a row as RGB; `ValueError` where that is not possible without a decision of the user."""
    if value is None:
        raise ValueError(
            f"Row {row} of {name} has no image. Filter such rows: "
            f"dataset.filter(lambda row: row['{column}'] is not None)."
        )
    try:
        picture = open_picture(value)
    except ValueError as error:
        raise ValueError(_unreadable(row, error, name)) from error
    return plain_rgb(picture, f"Row {row} of {name}")


def plain_rgb(picture: Image.Image, name: str) -> Image.Image:
    """
    A picture as RGB.

    Args:
        picture (`PIL.Image`): upright.
        name (`str`): what has it, for the message.

    Raises:
        `ValueError`: a mode other than `CONVERTIBLE_MODES`, transparent pixels.
    """
    if picture.mode not in CONVERTIBLE_MODES:
        raise ValueError(
            f"{name} has an image of mode {picture.mode!r}, whose range of values is not known. "
            f"Rescale it to 8 bits and save it as RGB, or drop the row; {', '.join(CONVERTIBLE_MODES)} can be used."
        )
    # An alpha channel says little, most are opaque: that shows in the pixels.
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise ValueError(
            f"{name} has an image with transparent pixels, and what is behind them is not known. "
            "Lay it on a background (PIL.Image.alpha_composite) and save it as RGB, or drop the row."
        )
    return picture.convert("RGB")


def undecoded_condition_images(dataset: AnyDataset, name: str) -> AnyDataset:
    """
    The dataset with the images that prompts edit undecoded, from images or from their paths.

    Raises:
        `ValueError`: a column of another type.
    """
    feature = dataset.features[CONDITION_IMAGE]
    if not isinstance(feature, ImageFeature) and feature != Value("string"):
        raise ValueError(
            f"The column {CONDITION_IMAGE!r} of {name} must be of type datasets.Image or hold paths, got {feature}. Turn "
            f"arrays into pictures with PIL.Image.fromarray, and bytes into images with "
            f"dataset.cast_column({CONDITION_IMAGE!r}, datasets.Image())."
        )
    return dataset.cast_column(CONDITION_IMAGE, ImageFeature(decode=False))


def check_condition_images(dataset: Dataset, name: str, process_index: int = 0, num_processes: int = 1) -> None:
    """
    Read all images that prompts edit, undecoded, as [`read_all`]: every row must have one that can become RGB.

    Raises:
        `ValueError`: the message names the row.
    """
    name = f"column {CONDITION_IMAGE!r} of {name}"

    def read(row: int, value: dict[str, Any] | None) -> None:
        _rgb(row, value, CONDITION_IMAGE, name)

    read_all(dataset, CONDITION_IMAGE, read, process_index, num_processes)


def _unreadable(row: int, error: Exception, name: str) -> str:
    return (
        f"The image in row {row} of {name} cannot be read: {error}. Replace the file, "
        f"or drop the row: dataset.select(i for i in range(len(dataset)) if i != {row})."
    )
