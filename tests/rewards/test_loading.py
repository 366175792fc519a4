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

"""Specifications, and weights that are missing, broken, dangerous or of another model."""

import functools
import json
import os
import re
import shutil
import sys

import pytest
import torch
from reward_folders import aesthetic_folder, clip_folder, hpsv2_folder, hpsv3_folder, image_reward_folder
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from trl_diffusion.rewards import (
    REWARDS,
    RewardModel,
    asks_for_column,
    check_reward,
    load_reward,
    load_rewards,
    parse_spec,
    reward_name,
    usual_range,
)


FOLDERS = {
    "aesthetic": (aesthetic_folder, "sac+logos+ava1-l14-linearMSE.pth", "layers.4.weight"),
    "hpsv2": (hpsv2_folder, "HPS_v2.1_compressed.pt", "visual.ln_post.weight"),
    "hpsv3": (hpsv3_folder, "HPSv3.safetensors", "model.layers.1.mlp.up_proj.weight"),
    "image_reward": (image_reward_folder, "ImageReward.pt", "mlp.layers.2.bias"),
}


def read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, weights_only=True)
    return state.get("state_dict", state)


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if path.name.startswith("HPS") else state, path)


def read_texts(images):
    return ["" for _ in images]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hps", "Unknown reward 'hps'.*'hpsv2', 'hpsv3', 'image_reward'"),
        ("hps:/somewhere", "Unknown reward"),
        ("my.module:thing", "Unknown reward"),
        ("hpsv2:", "names no weights"),
        ("hpsv2:/no/such/folder", "the folder '/no/such/folder', which does not exist"),
        ("remote", "needs the address of a server"),
        ("remote:127.0.0.1:8000", "no address of a reward server.*http://127.0.0.1:8000"),
        ("remote:ftp://host", "no address"),
        ("remote:http://user:secret@host", "'host' holds a user or a password"),
        ("ocr", "needs the dotted path of a recogniser"),
        ("ocr:reader", "needs the dotted path of a recogniser"),
        ("shapes-clip:/weights", "takes nothing after a colon but options"),
    ],
)
def test_specifications_that_are_refused_without_loading(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_reward(spec)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_specifications_that_pass(tmp_path):
    for spec in [
        *(REWARDS.keys() - {"remote", "ocr"}),
        "remote:https://host/path",
        "ocr:re.findall",
        f"clip:{tmp_path}",
    ]:
        check_reward(spec)
    check_reward("clip:openai/clip-vit-base-patch32")


def test_the_recogniser_is_found():
    reward = load_reward("ocr:re.findall")
    assert reward_name(reward) == "ocr" and reward.recognizer is re.findall
    with pytest.raises(ValueError, match="no 'nothing' in the module 're'"):
        load_reward("ocr:re.nothing")


@pytest.mark.parametrize(
    ("spec", "asks"),
    [
        (lambda images, prompts: [], False),
        (lambda images, prompts, photo: [], True),
        (lambda images, prompts, *, photo=None: [], True),
        (lambda images, prompts, **columns: [], True),
        (functools.partial(lambda images, prompts, photo, scale: [], scale=2), True),
        (max, True),
        ("hpsv2", False),
        ("shapes-judge", False),
        ("ocr:re.findall", False),
        ("vqa", False),
        ("remote:http://127.0.0.1:8000", True),
    ],
)
def test_columns_that_a_reward_asks_for(spec, asks):
    assert asks_for_column(spec, "photo") == asks


TUNED = """
from trl_diffusion.rewards import RewardModel

class Tuned(RewardModel):
    def __init__(self, strength: float, steps: int | None = 3, negated: bool = False, label="x"):
        super().__init__()
        self.options = (strength, steps, negated, label)

def read_texts(images):
    return []
"""


@pytest.fixture
def tuned_module(tmp_path, monkeypatch):
    """A module of the user's, for options by dotted path."""
    (tmp_path / "tuned_rewards.py").write_text(TUNED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tuned_rewards", raising=False)


@pytest.mark.parametrize(
    ("spec", "place", "options"),
    [
        ("pickscore", None, {}),
        ("pickscore:scale=0.05", None, {"scale": "0.05"}),
        ("hpsv2:/path", "/path", {}),
        ("hpsv2:/path,scale=2,dtype=bfloat16", "/path", {"scale": "2", "dtype": "bfloat16"}),
        ("hpsv2:/runs/lr=1e-4,b/w", "/runs/lr=1e-4,b/w", {}),
        ("clip:openai/clip-vit-base-patch32,scale=2", "openai/clip-vit-base-patch32", {"scale": "2"}),
        ("remote:http://host:1?x=y", "http://host:1?x=y", {}),
        ("remote:http://host:1/?x=y,timeout=5", "http://host:1/?x=y,timeout=5", {}),
        ("remote:http://host:1,timeout=5,name=far", "http://host:1", {"timeout": "5", "name": "far"}),
        (
            "vqa:question=Is it {prompt}, yes or no?,name=v",
            None,
            {"question": "Is it {prompt}, yes or no?", "name": "v"},
        ),
        ({"name": "hpsv2:/path", "scale": 2}, "/path", {"scale": 2}),
        ({"name": "remote:http://h?x=y,z=1", "timeout": 5}, "http://h?x=y,z=1", {"timeout": 5}),
        ({"name": "pickscore:dtype=float32", "scale": 0.05}, None, {"dtype": "float32", "scale": 0.05}),
    ],
    ids=str,
)
def test_the_parts_of_a_specification(spec, place, options):
    parsed = parse_spec(spec)
    assert (parsed.place, parsed.options) == (place, options)


def test_a_folder_that_looks_like_options_is_a_folder(tmp_path):
    folder = tmp_path / "a,scale=3"
    folder.mkdir()
    parsed = parse_spec(f"hpsv2:{folder},scale=2")
    assert (parsed.place, parsed.options) == (str(folder), {"scale": "2"})
    check_reward(f"hpsv2:{folder},scale=2")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pickscore:scal=0.05", "no option 'scal'. It has dtype, reward_batch_size, scale"),
        ("pickscore:scale=big", "'scale' .* must be of type float, got 'big'"),
        ({"name": "pickscore", "scale": "big"}, "'scale' .* must be of type float, got 'big'"),
        ({"name": "pickscore", "scale": True}, "must be of type float, got True"),
        ({"name": "pickscore", "scale": [1]}, r"must be of type float, got \[1\]"),
        ("hpsv2:reward_batch_size=1.5", "must be of type int or None, got '1.5'"),
        ("hpsv2:dtype=float16", "must be float32 or bfloat16 or None, got 'float16'"),
        ("pickscore:scale=1,scale=2", "'scale' twice"),
        ({"name": "pickscore:scale=1", "scale": 2}, "'scale' twice"),
        ({"scale": 2}, "has no name"),
        ("remote:http://host,url=x", "no option 'url'. It has token, batch_size"),
        ("shapes-judge:scale=2", "is a function and takes no options"),
        ("tuned_rewards.read_texts:scale=2", "is a function and takes no options"),
        ("tuned_rewards.Tuned:power=2", "no option 'power'. It has strength, steps, negated, label"),
        ("tuned_rewards.Tuned:strength=2,negated=maybe", "must be of type bool, got 'maybe'"),
        ("hpsv2:/no/such/folder,scale=2", "'/no/such/folder', which does not exist"),
    ],
    ids=str,
)
def test_options_that_are_refused_without_loading(spec, message, tuned_module):
    for check in (check_reward, load_reward):
        with pytest.raises(ValueError, match=message):
            check(spec)


def test_options_of_a_class_of_the_users(tuned_module):
    text = load_reward("tuned_rewards.Tuned:strength=2,steps=none,negated=true,label=7")
    assert text.options == (2.0, None, True, "7")
    assert load_reward({"name": "tuned_rewards.Tuned", "strength": 2}).options == (2.0, 3, False, "x")


def test_options_in_text_mapping_and_python_are_the_same(tmp_path):
    folder = clip_folder(tmp_path)
    images = torch.full((1, 3, 30, 30), 0.3)
    plain = load_reward(f"pickscore:{folder}").score(images, ["a"])
    scaled = load_reward(f"pickscore:{folder},scale=0.05,dtype=float32")
    torch.testing.assert_close(scaled.score(images, ["a"]), plain * 0.05)
    assert load_reward({"name": f"pickscore:{folder}", "scale": 0.05, "dtype": "float32"}) is scaled
    assert load_reward(f"pickscore:{folder}", scale=0.05, dtype=torch.float32) is scaled
    assert usual_range(f"pickscore:{folder},scale=0.05") == usual_range(scaled) == pytest.approx((0.9, 1.2))
    assert usual_range("shapes-clip") is usual_range(read_texts) is None


def test_a_module_of_the_users_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needy_rewards.py").write_text("import no_such_package\n")
    (tmp_path / "broken_rewards.py").write_text("def warmth(images, prompts)\n    return 1\n")
    for spec, message in [
        ("needy_rewards.warmth", "'needy_rewards' raises ModuleNotFoundError when it is imported: .*no_such_package"),
        ("broken_rewards.warmth", "'broken_rewards' raises SyntaxError"),
        ("absent_rewards.warmth", "there is no module 'absent_rewards'. Modules are looked for in the current folder"),
        ("needy_rewards.sub.warmth", "'needy_rewards.sub' raises ModuleNotFoundError .*no_such_package"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_reward(spec)


def test_options_need_a_name():
    with pytest.raises(ValueError, match=r"\['dtype'\] only apply to a reward that is given by name"):
        load_reward(read_texts, dtype=torch.float32)
    with pytest.raises(ValueError, match="is a function and takes no"):
        load_reward("trl_diffusion.shapes.attribute_share", scale=2.0)


def test_names_of_several(tmp_path):
    folder = clip_folder(tmp_path)
    rewards = load_rewards([f"clip:{folder}", f"pickscore:{folder}", "remote:http://host", "remote:http://other"])
    assert list(rewards) == ["clip", "pickscore", "remote", "remote_2"]
    assert rewards["remote_2"].url == "http://other/score"


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


def test_a_model_of_ten_lines():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    reward = load_reward(Brightness())
    reward.score(images, ["a", "b"]).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 48))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_the_weights(name, tmp_path):
    make, filename, _ = FOLDERS[name]
    folder = make(tmp_path)
    (folder / filename).unlink()
    # The CLIP model of the aesthetic score is not taken for its head.
    with pytest.raises(ValueError, match=re.escape(f"{str(folder)!r} holds no weights {filename!r}")):
        load_reward(f"{name}:{folder}")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_weights(name, share, tmp_path):
    make, filename, _ = FOLDERS[name]
    path = make(tmp_path) / filename
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*truncated"):
        load_reward(f"{name}:{tmp_path}")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(
    ("change", "word"), [("missing", "Missing key"), ("added", "Unexpected key"), ("reshaped", "size mismatch")]
)
def test_weights_that_do_not_fit(name, change, word, tmp_path):
    make, filename, key = FOLDERS[name]
    path = make(tmp_path) / filename
    state = read(path)
    if change == "missing":
        del state[key]
    elif change == "added":
        state["extra.weight"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(*state[key].shape, 2)
    write(path, state)
    ours = {"visual.ln_post.weight": "post_layernorm.weight", "model.layers.1.mlp.up_proj.weight": "layers.1.mlp"}
    shown = "extra.weight" if change == "added" else ours.get(key, key)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{word}.*{re.escape(shown)}"):
        load_reward(f"{name}:{tmp_path}")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_of_another_model(name, tmp_path):
    make, filename, _ = FOLDERS[name]
    path = make(tmp_path) / filename
    write(path, {"model.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_reward(f"{name}:{tmp_path}")


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("name", ["aesthetic", "hpsv2", "image_reward"])
def test_pickles_that_hold_code_are_refused(name, tmp_path, monkeypatch):
    make, filename, _ = FOLDERS[name]
    path = make(tmp_path) / filename
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, path)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*refused because they can run code"):
        load_reward(f"{name}:{tmp_path}")
    assert not (tmp_path / "harmed").exists()


def test_the_level_of_the_official_pickle(tmp_path):
    path = hpsv2_folder(tmp_path) / "HPS_v2.1_compressed.pt"
    torch.save(read(path), path)
    with pytest.raises(ValueError, match="has no entry 'state_dict'"):
        load_reward(f"hpsv2:{tmp_path}")
    torch.save({"state_dict": [1, 2]}, path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        load_reward(f"hpsv2:{tmp_path}")


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_safetensors_are_preferred(name, tmp_path):
    make, filename, _ = FOLDERS[name]
    path = make(tmp_path) / filename
    expected = load_reward(f"{name}:{tmp_path}").score(torch.full((1, 3, 60, 60), 0.3), ["a"])
    save_file({key: value.contiguous() for key, value in read(path).items()}, path.with_suffix(".safetensors"))
    path.write_bytes(b"")  # would fail
    actual = load_reward(f"{name}:{tmp_path}", scale=1.0).score(torch.full((1, 3, 60, 60), 0.3), ["a"])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ('{"text": {}}', r"lacks \['projection_dim', 'vision'\]")]
)
def test_broken_sizes(content, message, tmp_path):
    (hpsv2_folder(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        load_reward(f"hpsv2:{tmp_path}")


def test_without_sizes_the_official_ones_are_expected(tmp_path):
    (hpsv2_folder(tmp_path) / "config.json").unlink()
    with pytest.raises(ValueError, match=r"Missing key.* \.\.\. Download the official file again") as refused:
        load_reward(f"hpsv2:{tmp_path}")
    assert len(str(refused.value)) < 1500  # of some hundred keys


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_clip_checkpoints_of_another_model(name, tmp_path):
    folder = (aesthetic_folder if name == "aesthetic" else clip_folder)(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Missing: visual_projection.weight. Download"):
        load_reward(f"{name}:{folder}")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_reward(f"{name}:{folder}")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(folder)
    with pytest.raises(ValueError, match="of the type 'bert', not 'clip'"):
        load_reward(f"{name}:{folder}")


def test_older_clip_checkpoints_with_saved_positions(tmp_path):
    folder = clip_folder(tmp_path)
    expected = load_reward(f"clip:{folder}").score(torch.full((1, 3, 30, 30), 0.3), ["a"])
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    actual = load_reward(f"clip:{folder}", scale=1.0).score(torch.full((1, 3, 30, 30), 0.3), ["a"])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["clip", "hpsv2", "image_reward", "hpsv3"])
def test_the_tokenizer_is_needed(name, tmp_path):
    make = clip_folder if name == "clip" else FOLDERS[name][0]
    folder = make(tmp_path)
    for file in [*folder.glob("token*"), *folder.glob("special_tokens*")]:
        file.unlink()
    with pytest.raises(ValueError, match="(?s)tokenizer could not be loaded from '.*'.*save the tokenizer"):
        load_reward(f"{name}:{folder}")


def test_a_tokenizer_that_is_too_large_for_the_model(tmp_path):
    folder = hpsv3_folder(tmp_path)
    path = folder / "HPSv3.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:300]
    save_file(state, path)
    with pytest.raises(ValueError, match="tokenizer has 320 tokens, but .* of 300"):
        load_reward(f"hpsv3:{folder}")


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "hpsv3", "aesthetic", "clip"])
def test_what_is_not_on_the_hub_is_named(name):
    with pytest.raises(ValueError, match="(?s)'nobody/nothing'.*(Check|give)"):
        load_reward(f"{name}:nobody/nothing")


def test_a_recogniser_and_a_copy_of_the_weights_share_nothing(tmp_path):
    folder = clip_folder(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    assert load_reward(f"clip:{folder}") is not load_reward(f"clip:{tmp_path / 'two'}")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
