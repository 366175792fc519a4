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

"""Real images to align with: checked before training, sorted into aspect buckets, loaded at the training size."""

import math
from io import BytesIO
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps


# Width over height of the aspect buckets.
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
# Modes that become RGB without a decision about what is lost. Those with transparency must turn out opaque.
CONVERTIBLE_MODES = ("RGB", "L", "P", "CMYK", "1", "RGBA", "LA", "PA")

_ROW = "image_row"
_ORIENTATION = 274  # EXIF tag; 5 to 8 are lying on their side
_READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageBuckets:
    """
    The images of a dataset, each in the bucket of the nearest aspect.

    The header of every image is read at construction, so that a broken file or a mode that cannot become RGB ends the
    run before it begins; the pixels are read when they are needed.

    Args:
        dataset (`datasets.Dataset`):
            Prompts, in a column "prompt", and images, in a column "image" of type [`~datasets.Image`].

    Attributes:
        dataset (`datasets.Dataset`):
            The prompts with their undecoded images and the numbers of their rows; what is to be loaded by [`load`].
        bucket_of_row (`list[int]`):
            Bucket of each row, an index of `RATIOS`.

    Raises:
        `ValueError`: another type of column, a row without an image, a file that cannot be read, a mode other than
        `CONVERTIBLE_MODES`, transparent pixels. The message names the row.
    """

    def __init__(self, dataset: Dataset):
        feature = dataset.features["image"]
        if not isinstance(feature, ImageFeature):
            raise ValueError(
                f"The column 'image' of train_dataset must be of type datasets.Image, got {feature}. Turn paths or "
                "bytes into images with dataset.cast_column('image', datasets.Image()), or rename the column."
            )
        dataset = dataset.select_columns(["prompt", "image"]).cast_column("image", ImageFeature(decode=False))
        self.bucket_of_row = []
        for row, value in enumerate(dataset["image"]):
            width, height = _displayed_size(row, value)
            aspect = math.log(width / height)
            self.bucket_of_row.append(min(range(len(RATIOS)), key=lambda i: abs(math.log(RATIOS[i]) - aspect)))
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
            `ValueError`: a file that cannot be read, e.g. a truncated one; the message names its row.
        """
        height, width = size
        pictures = []
        for row in rows:
            try:
                with _open(row["image"]) as image:
                    picture = ImageOps.exif_transpose(image).convert("RGB")
            except _READ_ERRORS as error:
                raise ValueError(_unreadable(row[_ROW], error)) from error
            pictures.append(np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _open(value: dict[str, Any]) -> Image.Image:
    """The image of an undecoded value; only its header is read."""
    return Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"]))


def _displayed_size(row: int, value: dict[str, Any] | None) -> tuple[int, int]:
    """Width and height of an image as it is shown, after the checks that need no more than its header."""
    if value is None:
        raise ValueError(
            f"Row {row} of train_dataset has no image. Filter such rows: "
            "dataset.filter(lambda row: row['image'] is not None)."
        )
    try:
        with _open(value) as image:
            mode, (width, height) = image.mode, image.size
            # PIL would read all of a PNG to find EXIF data behind the pixels, where it seldom is.
            has_exif = image.format != "PNG" or "exif" in image.info
            on_its_side = has_exif and image.getexif().get(_ORIENTATION, 1) >= 5
            # An alpha channel says little, most are opaque: that shows in the pixels.
            transparent = (
                mode in CONVERTIBLE_MODES
                and image.has_transparency_data
                and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
            )
    except _READ_ERRORS as error:
        raise ValueError(_unreadable(row, error)) from error
    if mode not in CONVERTIBLE_MODES:
        raise ValueError(
            f"Row {row} of train_dataset has an image of mode {mode!r}, whose range of values is not known. Rescale "
            f"it to 8 bits and save it as RGB, or drop the row; {', '.join(CONVERTIBLE_MODES)} can be used."
        )
    if transparent:
        raise ValueError(
            f"Row {row} of train_dataset has an image with transparent pixels, and what is behind them is not known. "
            "Lay it on a background (PIL.Image.alpha_composite) and save it as RGB, or drop the row."
        )
    return (height, width) if on_its_side else (width, height)


def _unreadable(row: int, error: Exception) -> str:
    return (
        f"The image in row {row} of train_dataset cannot be read: {type(error).__name__}: {error}. Replace the file, "
        f"or drop the row: dataset.select(i for i in range(len(dataset)) if i != {row})."
    )
