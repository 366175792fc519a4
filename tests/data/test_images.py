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
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from trl_diffusion.data.images import RATIOS, ImageBuckets, check_pictures, open_picture


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


def exif_block(*entries):
    """EXIF data with entries (tag, type, count, value), as a camera might write them, well or not."""
    values, directory = b"", struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        if len(value) > 4:
            value, values = struct.pack("<L", 8 + 2 + 12 * len(entries) + 4 + len(values)), values + value
        directory += struct.pack("<HHL", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", 0) + values


ON_ITS_SIDE = (274, 3, 1, struct.pack("<H", 6))  # to be turned by 90 degrees clockwise
RESOLUTION = (282, 10, 1, struct.pack("<ll", -1, 0))  # a signed rational that is no number; it ends exif_transpose


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

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
    def test_file_that_is_cut_inside_its_pixels_is_found_at_the_start(self, format):
        whole = encoded(picture(200, 200), format)
        cut = {"bytes": whole["bytes"][: len(whole["bytes"]) // 2], "path": None}
        assert len(ImageBuckets(dataset_of([whole])).bucket_of_row) == 1
        with pytest.raises(ValueError, match="The image in row 2 of train_dataset cannot be read: .*Replace the file"):
            ImageBuckets(dataset_of([whole, whole, cut]))

    def test_all_rows_that_cannot_be_used_are_named(self):
        whole, cut = encoded(picture()), {"bytes": encoded(picture())["bytes"][:200], "path": None}
        with pytest.raises(ValueError, match="in row 1 of .* In all, 3 rows have images that cannot be used: 1, 3, 4"):
            ImageBuckets(dataset_of([whole, cut, whole, {"bytes": b"", "path": None}, None, whole]))

    def test_file_that_breaks_during_the_training_names_its_row(self, tmp_path):
        path = tmp_path / "image.png"
        picture(200, 200).save(path)
        dataset = Dataset.from_dict({"prompt": ["a"], "image": [str(path)]}).cast_column("image", ImageFeature())
        buckets = ImageBuckets(dataset)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match="The image in row 0 of train_dataset cannot be read: OSError"):
            loaded(buckets)

    def test_picture_of_too_many_pixels_names_its_row(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
        with pytest.raises(ValueError, match="The image in row 0 of .* cannot be read: DecompressionBombError"):
            ImageBuckets(dataset_of([encoded(picture(40, 40))]))

    def test_images_for_rewards_are_read_and_may_be_missing(self):
        cut = {"bytes": encoded(picture())["bytes"][:200], "path": None}
        dataset = dataset_of([encoded(picture()), None, cut]).cast_column("image", ImageFeature(decode=False))
        check_pictures(dataset.select([0, 1]), "image", "eval_dataset")
        with pytest.raises(ValueError, match="The image in row 2 of column 'image' of eval_dataset cannot be read"):
            check_pictures(dataset, "image", "eval_dataset")

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
        with pytest.raises(ValueError, match="row 1 of"):
            ImageBuckets(dataset_of([cut, whole, whole]).select([1, 0, 2]))

    @pytest.mark.parametrize("format", ["torch", "numpy"])
    def test_the_format_of_the_dataset_does_not_matter(self, format):
        buckets = ImageBuckets(dataset_of([encoded(picture(32, 32))]).with_format(format))
        assert torch.equal(loaded(buckets)[0], torch.from_numpy(pixels(32, 32)).permute(2, 0, 1) / 255)


class TestPhotographs:
    """What cameras, phones and scanners write."""

    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "MPO"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, format, orientation):
        """The first row and column of the file are shown at these sides (EXIF 2.32, 4.6.4)."""
        array = pixels(64, 32)
        if format == "MPO":
            array = np.kron(pixels(4, 2), np.ones((16, 16, 1), np.uint8))  # survives JPEG
        exif = Image.Exif()
        exif[274] = orientation
        options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100, "subsampling": 0}}.get(format, {})
        buckets = ImageBuckets(dataset_of([encoded(Image.fromarray(array), format, exif=exif, **options)]))
        shown = array.transpose(1, 0, 2) if orientation >= 5 else array
        if orientation in (3, 4, 7, 8):  # the first row is at the bottom, or the first column's
            shown = shown[::-1]
        if orientation in (2, 3, 6, 7):
            shown = shown[:, ::-1]
        assert RATIOS[buckets.bucket_of_row[0]] == (1 / 2 if orientation >= 5 else 2)
        images = loaded(buckets, shown.shape[:2])
        expected = torch.from_numpy(shown.copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(images[0], expected, rtol=0, atol=0.02 if format == "MPO" else 1e-6)

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_a_rational_that_is_no_number_does_no_harm(self, format):
        if format == "TIFF":  # whose own directory has the resolution, and which Pillow does not write so
            image = encoded(picture(64, 32), format, exif=exif_block(ON_ITS_SIDE), dpi=(72, 72))
            entry = image["bytes"].index(struct.pack("<HHL", *RESOLUTION[:1], 5, 1))
            (value,) = struct.unpack_from("<L", image["bytes"], entry + 8)
            file = bytearray(image["bytes"])
            file[entry + 2 : entry + 4], file[value : value + 8] = struct.pack("<H", 10), RESOLUTION[3]
            image["bytes"] = bytes(file)
        else:
            image = encoded(picture(64, 32), format, exif=exif_block(ON_ITS_SIDE, RESOLUTION))
        buckets = ImageBuckets(dataset_of([image]))
        assert RATIOS[buckets.bucket_of_row[0]] == 1 / 2
        shown = picture(64, 32).transpose(Image.Transpose.ROTATE_270)
        expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
        # In the lossy formats, noise; the wrong way round it is 0.33.
        assert (loaded(buckets, (64, 32))[0] - expected).abs().mean() < 0.2

    @pytest.mark.parametrize(
        "exif",
        [
            exif_block((274, 2, 2, b"6\0")),
            exif_block((274, 2, 20, b"Horizontal (normal)\0")),
            exif_block((274, 3, 1, b"\0\0")),
            exif_block((274, 3, 1, b"\x09\0")),
            exif_block((274, 5, 1, bytes(8))),
            exif_block((274, 7, 1, b"\6")),
            exif_block((274, 99, 1, b"\6")),
            exif_block((274, 3, 0, b"")),
            exif_block(ON_ITS_SIDE)[:16],
            b"Exif\0\0no EXIF at all",
            b"Exif\0\0II*\0\1",
        ],
        ids=["text", "words", "0", "9", "0/0", "bytes", "kind", "none", "cut", "other", "short"],
    )
    def test_an_orientation_that_says_nothing(self, exif):
        buckets = ImageBuckets(dataset_of([encoded(picture(64, 32), "PNG", exif=exif)]))
        assert RATIOS[buckets.bucket_of_row[0]] == 2
        expected = torch.from_numpy(pixels(64, 32)).permute(2, 0, 1) / 255
        assert torch.equal(loaded(buckets, (32, 64))[0], expected)

    @pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
    def test_of_several_frames_the_first(self, format):
        frames = [Image.new("RGB", (32, 32), color) for color in ((200, 0, 0), (0, 200, 0))]
        options = {"lossless": True} if format == "WEBP" else {}
        image = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        images = loaded(ImageBuckets(dataset_of([image])))
        torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([200, 0, 0]) / 255, rtol=0, atol=0.02)

    def test_cmyk_jpeg_as_pillow_shows_it(self):
        image = encoded(Image.new("RGB", (32, 32), (200, 40, 10)).convert("CMYK"), "JPEG", quality=100)
        images = loaded(ImageBuckets(dataset_of([image])))
        torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([200, 40, 10]) / 255, rtol=0, atol=0.02)

    def test_colour_profiles_are_not_applied(self):
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        buckets = ImageBuckets(dataset_of([encoded(picture(32, 32), icc_profile=profile)]))
        assert torch.equal(loaded(buckets)[0], torch.from_numpy(pixels(32, 32)).permute(2, 0, 1) / 255)

    def test_a_picture_for_a_reward_keeps_its_mode(self):
        image = picture(64, 32).convert("LA")
        shown = open_picture(encoded(image, "PNG", exif=exif_block(ON_ITS_SIDE, RESOLUTION)))
        assert shown.mode == "LA" and shown.size == (32, 64)
        assert np.array_equal(np.array(shown), np.array(image.transpose(Image.Transpose.ROTATE_270)))


class TestBuckets:
    def test_one_aspect_is_trained_at_the_training_size(self):
        buckets = ImageBuckets(dataset_of([encoded(picture(80, 40)), encoded(picture(160, 80))]))
        assert len(set(buckets.bucket_of_row)) == 1
        assert {buckets.size(row, (32, 48), 16) for row in buckets.dataset} == {(32, 48)}

    def test_several_aspects(self):
        sizes = [(100, 100), (150, 100), (100, 150), (178, 100), (103, 100), (1000, 100)]
        buckets = ImageBuckets(dataset_of([encoded(picture(*size)) for size in sizes]))
        assert [RATIOS[bucket] for bucket in buckets.bucket_of_row] == [1, 3 / 2, 2 / 3, 16 / 9, 1, 2]
        # 27 / 44 lies nearer to 9 / 16 by its difference, and to 2 / 3 by its quotient.
        near = ImageBuckets(dataset_of([encoded(picture(27, 44)), encoded(picture(44, 27))]))
        assert [RATIOS[bucket] for bucket in near.bucket_of_row] == [2 / 3, 3 / 2]
        trained = [buckets.size(row, (512, 512), 16) for row in buckets.dataset]
        assert trained[0] == trained[4] == (512, 512)
        assert trained[1] == trained[2][::-1] == (416, 624)
        for (height, width), bucket in zip(trained, buckets.bucket_of_row, strict=True):
            assert height % 16 == width % 16 == 0
            assert height * width == pytest.approx(512 * 512, rel=0.05)
            assert width / height == pytest.approx(RATIOS[bucket], rel=0.05)


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
