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

import itertools

import pytest
import torch
from transformers import CLIPImageProcessor

from trl_diffusion.shapes import ALL_SCENES, ATTRIBUTES, STYLES, Scene, draw, load_clip, preprocess


@pytest.fixture(scope="module")
def clip():
    return load_clip()


@pytest.fixture(scope="module")
def pictures():
    """Pictures of every scene in every style, with their scenes and styles."""
    scenes, styles = list(ALL_SCENES) * 3, [style for style in STYLES for _ in ALL_SCENES]
    return draw(scenes, styles, torch.Generator().manual_seed(21)), scenes, styles


def score(clip, images, texts):
    """The cosine of each image with its text."""
    model, tokenizer = clip
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    output = model(pixel_values=preprocess(images), **tokens)
    return (output.image_embeds * output.text_embeds).sum(-1)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("with_style", [False, True])
def test_the_right_caption_beats_one_wrong_word(clip, pictures, attribute, with_style):
    images, scenes, styles = pictures
    values = ATTRIBUTES[attribute]
    right, wrong = [], []
    for row, (scene, style) in enumerate(zip(scenes, styles, strict=True)):
        value = vars(scene)[attribute]
        others = [other for other in values if other != value]
        prefix = f"{style}. " if with_style else ""
        right.append(prefix + scene.caption)
        wrong.append(prefix + Scene(**{**vars(scene), attribute: others[row % len(others)]}).caption)
    with torch.no_grad():
        better = score(clip, images, right) > score(clip, images, wrong)
    assert better.float().mean() >= 0.95


@pytest.mark.parametrize(("style", "other"), list(itertools.permutations(STYLES, 2)))
def test_the_right_style_word_beats_a_wrong_one(clip, pictures, style, other):
    images, scenes, styles = pictures
    rows = [row for row, drawn in enumerate(styles) if drawn == style]
    captions = [scenes[row].caption for row in rows]
    with torch.no_grad():
        right = score(clip, images[rows], [f"{style}. {caption}" for caption in captions])
        wrong = score(clip, images[rows], [f"{other}. {caption}" for caption in captions])
    assert (right > wrong).float().mean() >= 0.95


def test_the_score_is_differentiable(clip):
    images = draw(ALL_SCENES[:4], "blurred", torch.Generator().manual_seed(22)).requires_grad_()
    score(clip, images, [scene.caption for scene in ALL_SCENES[:4]]).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


def test_following_the_gradient_raises_the_score(clip):
    scene = Scene("small", "red", "circle", "white")
    wrong = Scene("small", "blue", "circle", "white").caption
    images = draw([scene], jitter=False).requires_grad_()
    before = score(clip, images, [wrong])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    with torch.no_grad():
        after = score(clip, images + 0.01 * gradient / gradient.abs().max(), [wrong])
    assert after > before


def test_preprocess_is_what_clip_itself_does():
    images = draw(ALL_SCENES[:3], "sharp", torch.Generator().manual_seed(23))
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    expected = processor(list(images), return_tensors="pt").pixel_values
    torch.testing.assert_close(preprocess(images), expected)


def test_preprocess_resizes_with_gradient():
    color = torch.tensor([0.2, 0.5, 0.9])
    images = color[:, None, None].expand(2, 3, 48, 64).clone().requires_grad_()
    values = preprocess(images)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(values, ((color - mean) / std)[:, None, None].expand(2, 3, 32, 32))
    values.sum().backward()
    assert (images.grad > 0).all()


def test_preprocess_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        preprocess(torch.rand(32, 32, 3))


def test_control_words_fit(clip):
    _, tokenizer = clip
    text = f"Natural-lighting. {ALL_SCENES[0].caption}"
    ids = tokenizer(text, truncation=True).input_ids
    assert len(ids) < tokenizer.model_max_length
    assert ids[-9:-1] == tokenizer(ALL_SCENES[0].caption).input_ids[1:-1]
