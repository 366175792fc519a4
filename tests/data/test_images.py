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

"""Images of a dataset: which can be used, how they are sorted, and the pixels that come of them."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from trl_diffusion.data.images import RATIOS, ImageBuckets


def dataset_of(images, **columns):
    features = {"prompt": Value("string"), "image": ImageFeature(), **{name: Value("int64") for name in columns}}
    rows = {"prompt": [f"picture {i}" for i in range(len(images))], "image": images, **columns}
    return Dataset.from_dict(rows, features=Features(features))


def pixels(width, height, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width=40, height=40, seed=0):
    return Image.fromarray(pixels(width, height, seed))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def loaded(buckets, size=(32, 32)):
    return buckets.load([buckets.dataset[i] for i in range(len(buckets.dataset))], size)


class TestModes:
    @pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
    def test_modes_that_become_rgb(self, mode):
        # Smooth, so that few colours serve.
        ramp = np.linspace(0, 255, 32, dtype=np.uint8)
        image = Image.fromarray(np.stack([np.tile(ramp, (32, 1))] * 3, -1)).convert(mode)
        buckets = ImageBuckets(dataset_of([encoded(image, "TIFF" if mode == "CMYK" else "PNG")]))
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        assert torch.equal(loaded(buckets)[0], expected)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
    def test_an_opaque_alpha_channel_is_dropped(self, mode):
        grey = Image.fromarray(pixels(32, 32, channels=1)[..., 0])
        opaque = grey.convert(mode) if mode != "PA" else grey.convert("P").convert("PA")
        buckets = ImageBuckets(dataset_of([encoded(opaque, "TIFF" if mode == "PA" else "PNG")]))
        expected = torch.from_numpy(np.array(grey)).float() / 255
        assert torch.equal(loaded(buckets)[0], expected.expand(3, 32, 32))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_is_refused(self, mode):
        image = picture().convert("RGBA")
        image.putpixel((3, 4), (0, 0, 0, 254))
        options = {}
        if mode == "P":
            image, options = picture().convert("P"), {"transparency": 0}
            image.putpixel((3, 4), 0)
        images = [encoded(picture()), encoded(image if mode == "P" else image.convert(mode), **options)]
        with pytest.raises(
            ValueError, match="Row 1 of train_dataset has an image with transparent pixels.*save it as"
        ):
            ImageBuckets(dataset_of(images))

    def test_a_transparent_colour_that_no_pixel_has_is_no_transparency(self):
        image = Image.fromarray(np.full((8, 8, 3), 7, np.uint8))
        buckets = ImageBuckets(dataset_of([encoded(image, transparency=(1, 2, 3))]))
        assert torch.equal(loaded(buckets, (8, 8)), torch.full((1, 3, 8, 8), 7 / 255))

    @pytest.mark.parametrize("mode", ["I;16", "F"])
    def test_modes_of_unknown_range_are_refused(self, mode):
        values = np.arange(64).reshape(8, 8).astype(np.uint16 if mode == "I;16" else np.float32)
        images = [encoded(picture()), encoded(picture()), encoded(Image.fromarray(values), "TIFF")]
        with pytest.raises(ValueError, match=f"Row 2 of train_dataset has an image of mode '{mode}'.*save it as RGB"):
            ImageBuckets(dataset_of(images))


class TestFiles:
    def test_broken_file_names_its_row(self):
        images = [encoded(picture()), {"bytes": b"no image", "path": None}]
        with pytest.raises(ValueError, match="The image in row 1 of train_dataset cannot be read: Unidentified"):
            ImageBuckets(dataset_of(images))

    def test_file_that_is_gone_names_its_row(self, tmp_path):
        path = tmp_path / "image.png"
        picture().save(path)
        dataset = Dataset.from_dict({"prompt": ["a", "b"], "image": [str(path), str(tmp_path / "gone.png")]})
        with pytest.raises(
            ValueError, match=r"The image in row 1 of train_dataset cannot be read: FileNotFound.*gone"
        ):
            ImageBuckets(dataset.cast_column("image", ImageFeature()))

    def test_missing_image_names_its_row(self):
        with pytest.raises(ValueError, match="Row 1 of train_dataset has no image"):
            ImageBuckets(dataset_of([encoded(picture()), None]))

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_truncated_file_names_its_row_when_it_is_loaded(self, format):
        whole = encoded(picture(200, 200), format)
        cut = {"bytes": whole["bytes"][: len(whole["bytes"]) // 2], "path": None}
        buckets = ImageBuckets(dataset_of([whole, whole, cut]))
        assert buckets.load([buckets.dataset[1]], (32, 32)).shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match="The image in row 2 of train_dataset cannot be read: OSError"):
            buckets.load([buckets.dataset[1], buckets.dataset[2]], (32, 32))

    def test_files_on_disk(self, tmp_path):
        picture(32, 32).save(tmp_path / "image.png")
        dataset = Dataset.from_dict({"prompt": ["a"], "image": [str(tmp_path / "image.png")]})
        buckets = ImageBuckets(dataset.cast_column("image", ImageFeature()))
        assert torch.equal(loaded(buckets)[0], torch.from_numpy(pixels(32, 32)).permute(2, 0, 1) / 255)

    def test_column_of_another_type_is_refused(self):
        dataset = Dataset.from_dict({"prompt": ["a"], "image": ["a.png"]})
        with pytest.raises(ValueError, match=r"must be of type datasets.Image, got Value.*cast_column"):
            ImageBuckets(dataset)

    def test_other_columns_are_left_out(self):
        buckets = ImageBuckets(dataset_of([encoded(picture())] * 2, likes=[1, 2]))
        assert set(buckets.dataset.column_names) == {"prompt", "image", "image_row"}
        assert buckets.dataset["prompt"][:] == ["picture 0", "picture 1"]

    def test_rows_are_those_of_the_dataset_as_given(self):
        whole = encoded(picture(200, 200))
        cut = {"bytes": whole["bytes"][:1000], "path": None}
        dataset = dataset_of([cut, whole, whole]).select([1, 0, 2])
        buckets = ImageBuckets(dataset)
        with pytest.raises(ValueError, match="row 1 of"):
            loaded(buckets)


class TestBuckets:
    def test_one_aspect_is_trained_at_the_training_size(self):
        buckets = ImageBuckets(dataset_of([encoded(picture(80, 40)), encoded(picture(160, 80))]))
        assert len(set(buckets.bucket_of_row)) == 1
        assert {buckets.size(row, (32, 48), 16) for row in buckets.dataset} == {(32, 48)}

    def test_several_aspects(self):
        sizes = [(100, 100), (150, 100), (100, 150), (178, 100), (103, 100), (1000, 100)]
        buckets = ImageBuckets(dataset_of([encoded(picture(*size)) for size in sizes]))
        assert [RATIOS[bucket] for bucket in buckets.bucket_of_row] == [1, 3 / 2, 2 / 3, 16 / 9, 1, 2]
        trained = [buckets.size(row, (512, 512), 16) for row in buckets.dataset]
        assert trained[0] == trained[4] == (512, 512)
        assert trained[1] == trained[2][::-1] == (416, 624)
        for (height, width), bucket in zip(trained, buckets.bucket_of_row, strict=True):
            assert height % 16 == width % 16 == 0
            assert height * width == pytest.approx(512 * 512, rel=0.05)
            assert width / height == pytest.approx(RATIOS[bucket], rel=0.05)

    def test_an_image_on_its_side_counts_as_it_is_shown(self):
        exif = Image.Exif()
        exif[274] = 6  # to be turned by 90 degrees clockwise
        lying = encoded(picture(64, 32), "JPEG", exif=exif, quality=100, subsampling=0)
        buckets = ImageBuckets(dataset_of([lying]))
        assert RATIOS[buckets.bucket_of_row[0]] == 1 / 2
        shown = picture(64, 32).transpose(Image.Transpose.ROTATE_270)
        expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
        assert (loaded(buckets, (64, 32))[0] - expected).abs().mean() < 0.02  # JPEG; the wrong way round it is 0.33


class TestPixels:
    def test_short_side_is_resized_and_the_middle_kept(self):
        """A wide picture of three squares: what is left is the one in the middle."""
        squares = np.zeros((60, 180, 3), np.uint8)
        squares[:, 60:120] = (10, 200, 30)
        buckets = ImageBuckets(dataset_of([encoded(Image.fromarray(squares))]))
        images = loaded(buckets, (20, 20))
        assert images.shape == (1, 3, 20, 20) and images.dtype == torch.float32
        expected = torch.tensor([10, 200, 30]).view(3, 1, 1) / 255
        torch.testing.assert_close(images[0, :, :, 2:-2], expected.expand(3, 20, 16), rtol=0, atol=1 / 255)

    def test_downscaling_is_antialiased(self):
        """A chequered board of single pixels becomes grey, not a pattern."""
        board = np.indices((128, 128)).sum(0) % 2 * 255
        image = Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8))
        images = loaded(ImageBuckets(dataset_of([encoded(image)])), (16, 16))
        assert (images - 0.5).abs().max() < 0.02

    def test_small_images_are_enlarged(self):
        images = loaded(ImageBuckets(dataset_of([encoded(picture(8, 8))])), (32, 32))
        assert images.shape == (1, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
