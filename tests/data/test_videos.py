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

import io

import numpy as np
import pytest
from PIL import Image

from trl_diffusion.data.videos import contact_sheet, evenly_spaced, load_video, save_video


def noise(count, width=24, height=16):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [0, 0, 0, 1, 1, 2], [0, 1, 0, 0], [0] * 5], ids=str)
def test_lossless_videos_come_back_to_the_last_bit(tmp_path, order):
    """Also frames that do not change, of which the format keeps one."""
    different = noise(4)
    frames = [different[index] for index in order]
    save_video(frames, tmp_path / "video.webp", lossless=True)
    back = load_video(tmp_path / "video.webp")
    assert [np.asarray(frame).tolist() for frame in back] == [np.asarray(frame).tolist() for frame in frames]


def test_a_browser_sees_a_picture_that_moves():
    buffer = io.BytesIO()
    save_video(noise(6), buffer)
    with Image.open(buffer) as picture:
        assert picture.format == "WEBP" and picture.is_animated and picture.n_frames == 6
        assert picture.info["loop"] == 0  # for ever


def test_contact_sheet_is_near_to_a_square():
    frames = noise(5)
    sheet = contact_sheet(frames)
    assert sheet.size == (3 * 24, 2 * 16)
    assert np.array_equal(np.asarray(sheet)[16:, 24:48], np.asarray(frames[4]))
    assert contact_sheet(noise(81)).size == (4 * 24, 4 * 16)
    assert contact_sheet(noise(1)).size == (24, 16)


def test_frames_are_evenly_spaced_from_the_first_to_the_last():
    assert evenly_spaced(range(5), 16) == [0, 1, 2, 3, 4]
    assert evenly_spaced(range(81), 5) == [0, 20, 40, 60, 80]
    assert evenly_spaced(range(9), 1) == [0]
