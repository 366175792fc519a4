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

"""Nothing that is written or logged holds a secret, and nothing that is read is run."""

import ast
import http.server
import itertools
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from campaigns import configs
from campaigns.tiny_runs import make_trainer
from huggingface_hub import ModelCard
from PIL import Image

from trl_diffusion.rewards import RemoteReward
from trl_diffusion.runtime.checkpoints import MANIFEST_NAME, write_manifest


PACKAGE = Path(__file__).parents[1] / "trl_diffusion"
SECRETS = {name: f"hf_planted{name.lower()}Zq7" for name in ("HUB", "HF_TOKEN", "TRL_DIFFUSION_REWARD_TOKEN")}

# Prompts that people or attackers write.
PROMPTS = {
    "long": "x" * 10_000,
    "control characters": "a\x00b\x07c\x1b[31md\r\ne\tf",
    "right to left": "\u202eקוט של חתול\u202c قطة صغيرة",
    "emoji": "a \N{CAT FACE} \N{FAMILY}\u200d\N{HEAVY BLACK HEART}\ufe0f",
    "special tokens": "<|startoftext|>a<|endoftext|></s><pad><unk>",
    "braces": "{prompt} {control} {0} {{x}} %s %(a)s ${HOME}",
    "markup": "</script><script>alert(1)</script> ```\n---\nlicense: mit\n--- | <img src=x onerror=alert(1)> [a](b)",
    "surrogate": "half a pair is no text: \N{REPLACEMENT CHARACTER}",
}


@pytest.fixture
def everything_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    return caplog


def files_with(folder: Path, text: str) -> list[Path]:
    """The files under a folder that hold a text, in UTF-8 or UTF-16, or carry it in their name."""
    needles = [text.encode(), text.encode("utf-16-le")]
    return [
        path
        for path in folder.rglob("*")
        if text in path.name or (path.is_file() and any(needle in path.read_bytes() for needle in needles))
    ]


def test_tokens_are_nowhere(tmp_path, monkeypatch, everything_logged, capfd):
    for name in ("HF_TOKEN", "TRL_DIFFUSION_REWARD_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
    everything_logged.clear()
    trainer = make_trainer(
        "chunk_grpo", tmp_path, max_steps=2, hub_token=SECRETS["HUB"], log_samples=True, report_to="tensorboard"
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    logging.getLogger("test").info(f"{trainer.args} {trainer.args.to_json_string()}")
    # The search finds what is there.
    assert files_with(tmp_path, "lora_alpha") and (tmp_path / "training_args.bin").exists()
    assert (tmp_path / "checkpoint-2" / "training_args.bin").exists() and list(tmp_path.rglob("events.out*"))
    printed = "".join(capfd.readouterr())
    for secret in SECRETS.values():
        assert files_with(tmp_path, secret) == []
        assert secret not in everything_logged.text and secret not in printed
    # Only what is written is without it.
    assert trainer.args.hub_token == SECRETS["HUB"]
    restored = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert restored.hub_token is None and restored.max_steps == 2


def test_a_server_that_repeats_the_token_does_not_bring_it_into_messages(everything_logged):
    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(503 if self.server.answers.pop() else 400)
            self.end_headers()
            self.wfile.write(f"you said {self.headers['Authorization']}".encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Echo)
    server.answers = [False, True]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reward = RemoteReward(f"http://127.0.0.1:{server.server_port}", token="planted-secret", retries=1, backoff=0)
    with pytest.raises(RuntimeError, match="you said Bearer") as caught:
        reward([Image.new("RGB", (8, 8))], ["a"])
    server.shutdown()
    assert "planted-secret" not in str(caught.value)
    assert "you said Bearer" in everything_logged.text and "planted-secret" not in everything_logged.text


def test_card_names_no_folder_and_no_user(tmp_path):
    home = tmp_path / "home" / "someusername" / "runs"
    trainer = make_trainer("srpo", home, max_steps=1, save_strategy="no", run_name="someusername-run")
    trainer.model_name = str(home / "model")
    trainer.create_model_card(dataset_name=str(home / "prompts"))
    trainer.save_model()
    for name in ("README.md", "adapter_config.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        content = (home / name).read_bytes()
        assert b"someusername" not in content and str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("kind", ["chunk_grpo", "srpo"])
def test_unusual_prompts_train_and_are_written(tmp_path, kind):
    prompts = list(PROMPTS.values())
    trainer = make_trainer(
        kind, tmp_path, prompts=prompts, max_steps=2, log_samples=True, save_strategy="no", num_samples_to_log=8,
        per_device_train_batch_size=4, report_to="tensorboard",
    )  # fmt: skip
    trainer.train()
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.isfinite(weight).all() for weight in weights)
    for lines in tmp_path.rglob("metadata.jsonl"):
        shown = [json.loads(line)["prompt"] for line in lines.read_text(encoding="utf-8").split("\n")[:-1]]
        assert shown and set(shown) <= set(prompts)
    images = trainer.generate(prompts, range(len(prompts)))
    assert torch.isfinite(images).all()
    # Longer prompts are cut where the encoders end, and are prompts of their own all the same.
    embeddings = [trainer.conditioning.get([prompt])["prompt_embeds"] for prompt in prompts]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(embeddings, 2))


@pytest.mark.parametrize("prompt", list(PROMPTS.values()), ids=list(PROMPTS))
def test_no_prompt_breaks_the_card(tmp_path_factory, prompt, one_trainer):
    one_trainer.create_model_card(prompt=prompt, images={"a.png": prompt}, metrics_note=prompt)
    text = (Path(one_trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.license is None
    assert text.count("\n---\n") == 1  # the end of the metadata
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert " ".join(prompt.split()) in strings
    outside = card.text.replace(code, "")
    assert "<script" not in outside and "<img" not in outside and "\x1b" not in outside and "\x00" not in outside


@pytest.fixture(scope="module")
def one_trainer(tmp_path_factory):
    return make_trainer("srpo", tmp_path_factory.mktemp("card"), save_strategy="no")


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_empty_prompts_are_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match="Row 1 of train_dataset has an empty prompt"):
        make_trainer("chunk_grpo", tmp_path, prompts=["a cat", prompt])


def calls_of_package():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node


def test_nothing_that_is_read_is_run():
    """Every `torch.load` says weights_only=True, nothing unpickles, and remote code is never trusted."""
    loads = 0
    for path, call in calls_of_package():
        name = ast.unparse(call.func)
        where = f"{path.relative_to(PACKAGE)}:{call.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            loads += 1
            assert keywords.get("weights_only") == "True", where
        assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "joblib.load"), where
        if name == "np.load" or name == "numpy.load":
            assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("trust_remote_code", "False") == "False", where
    assert loads > 0


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_cannot_run_code(tmp_path, name):
    trainer = make_trainer("srpo", tmp_path / "out", max_steps=1)
    trainer.train()
    checkpoint, trap = tmp_path / "out" / "checkpoint-1", tmp_path / "trap"
    torch.save({"state": Malice(trap)}, checkpoint / name)
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)  # an attacker would, too
    resumed = make_trainer("srpo", tmp_path / "out", max_steps=2)
    if name == "training_args.bin":  # never read
        resumed.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(Exception, match="(?i)weights.only"):
            resumed.train(resume_from_checkpoint=True)
    assert not trap.exists()


def test_random_settings_are_accepted_or_refused():
    """The campaign of `make campaigns` in short."""
    count = configs.campaign(200)
    assert count.total() >= 200 and count["accepted"] > 20 and count["refused"] > 20
