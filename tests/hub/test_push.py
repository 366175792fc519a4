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

"""Pushes of whole trainings, through the real client of the Hub, to a server of its calls on this machine."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub.hub_server import Hub, card_errors, serving
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file


# Two runs start at once, for the whole module: on a busy machine their imports alone take a minute.
pytestmark = pytest.mark.timeout(600)

TESTS = Path(__file__).resolve().parents[1]
ADAPTER = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
BASE_MODELS = {
    "black-forest-labs/FLUX.1-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "LICENSE.md",
    },
    "someone/no-licence": {"tags": ["text-to-image"]},
    "someone/apache": {"license": "apache-2.0"},
}


class Session:
    def __init__(self, hub, folder, results, output):
        self.hub, self.folder, self.results, self.output = hub, folder, results, output

    def repository(self, name):
        return self.hub.repositories[f"alice/{name}"]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub(BASE_MODELS)
    # Longer than a step takes: the checkpoint is deleted before its upload ends.
    hub.expect("alice/every-save", upload_seconds=0.5)
    hub.expect(
        "alice/broken",
        faults=[
            ("upload", "503"),  # the client itself tries again
            ("commit", "drop"),  # step 1: the connection breaks off after all files are there
            ("upload", "403"),  # step 2
            ("preupload", "401"),  # step 3: the token has been revoked
            ("commit", "pass"),  # step 4
            ("commit", "drop"),  # at the end
        ],
    )
    with serving(hub) as url:
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_writing", "HF_HOME": str(folder / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        command = [str(TESTS / "hub" / "hub_run.py"), str(folder)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        processes = [
            subprocess.Popen(
                [sys.executable, *options, *command],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for options in ([], launcher)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=540)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
        yield Session(hub, folder, json.loads((folder / "results.json").read_text()), "".join(outputs))


def card_of(files):
    return ModelCard(files["README.md"].decode())


def model_of(files):
    return {name for name in files if not name.startswith(("samples/", "checkpoint-", "last-checkpoint/"))}


def same_weights(content, path):
    pushed, wanted = load(content), load_file(path)
    return pushed.keys() == wanted.keys() and all(torch.equal(pushed[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategy_pushes_what_it_names(session, name):
    assert session.results[name] == {"error": None, "warnings": []}
    repository = session.repository(name.replace("_", "-"))
    steps = [] if name == "end" else ["Training in progress, step 1", "Training in progress, step 2"]
    assert repository.messages == [*steps, "End of training"]
    for _, files in repository.commits:
        assert model_of(files) == {"README.md", *ADAPTER}
    trained = session.folder / name / "adapter_model.safetensors"
    assert same_weights(repository.files["adapter_model.safetensors"], trained)
    if name != "end":
        assert not same_weights(repository.commits[0][1]["adapter_model.safetensors"], trained)

    checkpoints = {path.rpartition("/")[0] for path in repository.files if "checkpoint" in path}
    wanted = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert checkpoints == wanted.get(name, set())
    for folder in checkpoints:
        # Everything of the checkpoint but the arguments.
        local = session.folder / name / ("checkpoint-2" if folder == "last-checkpoint" else folder)
        pushed = {Path(path).name: content for path, content in repository.files.items() if path.startswith(folder)}
        assert {*pushed, "training_args.bin"} == {path.name for path in local.iterdir()}
        assert pushed["optimizer.pt"] == (local / "optimizer.pt").read_bytes()


def test_checkpoint_that_is_deleted_meanwhile_is_pushed_whole(session):
    """`save_total_limit=1` deletes the first checkpoint while the slow server still waits for it."""
    assert not (session.folder / "every_save" / "checkpoint-1").exists()
    first = session.repository("every-save").commits[0][1]
    other = session.folder / "all_checkpoints" / "checkpoint-1" / "adapter_model.safetensors"
    assert same_weights(first["adapter_model.safetensors"], other)


def test_pushed_checkpoint_continues_the_training(session):
    assert session.results["resumed"]["error"] is None
    resumed = load_file(session.folder / "resumed" / "adapter_model.safetensors")
    straight = load_file(session.folder / "all_checkpoints" / "adapter_model.safetensors")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_nothing_private_is_pushed_and_no_token_is_shown(session):
    for name, repository in session.hub.repositories.items():
        for path, content in repository.files.items():
            assert "training_args" not in path and "events.out" not in path
            for secret in (b"hf_writing", b"hf_wrong", str(session.folder).encode()):
                assert secret not in content, (name, path)
    assert "hf_writing" not in session.output and "hf_wrong" not in session.output
    assert "hf_writing" not in json.dumps(session.results) and "hf_wrong" not in json.dumps(session.results)


def test_gallery_shows_pictures_that_are_there(session):
    for name in ("end", "every-save", "embedded", "Later-name"):
        for message, files in session.repository(name).commits:
            card = card_of(files)
            assert "<Gallery />" in card.text.splitlines()
            urls = [example["output"]["url"] for example in card.data.widget]
            folder = "samples/gallery" if message == "End of training" else f"samples/step_00000{message[-1]}"
            assert urls and all(url.startswith(folder + "/") for url in urls)
            for url in urls:
                assert Image.open(io.BytesIO(files[url])).size == (32, 32)
    # One picture a prompt, with the prompt as it is, whatever it holds.
    prompts = [example["text"] for example in card_of(session.repository("end").files).data.widget]
    assert prompts[1] == 'a "red": dog\n---\n</code><script>alert(1)</script>' and len(set(prompts)) == 6


def test_card_names_base_model_licence_and_dataset(session):
    card = card_of(session.repository("end").files)
    data = card.data
    assert data.base_model == "black-forest-labs/FLUX.1-dev" and data.base_model_relation == "adapter"
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {"text-to-image", "lora", "trl", "chunk-grpo"} <= set(data.tags)
    assert data.license == "other" and data.license_name == "flux-1-dev-non-commercial-license"
    assert data.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert data.datasets == ["alice/prompts"]
    assert 'pipe.load_lora_weights("alice/end"' in card.text and "arXiv:2510.21583" in card.text


def test_licence_is_that_of_the_base_model_or_none(session):
    results = session.results["licences"]
    assert (results["none_stated"], results["plain"], results["no_such_model"]) == ({}, {"license": "apache-2.0"}, {})
    assert len(results["warnings"]) == 1 and "someone/gone could not be read" in results["warnings"][0]
    assert card_of(session.repository("embedded").files).data.license is None


def test_every_card_passes_the_validation_of_the_hub(session):
    # The client asks the server before it commits; it was asked as well, for a good and a bad card.
    assert session.results["later"]["error"] is None
    assert session.results["later"]["refused"] == ["license is not known"]
    cards = [files["README.md"].decode() for r in session.hub.repositories.values() for _, files in r.commits]
    assert len(cards) > 10 and all(card_errors(card) == [] for card in cards)


def test_card_shows_the_rewards_of_base_and_aligned(session):
    later = session.results["later"]
    card = card_of(session.repository("Later-name").files)
    for row, name in enumerate(("redness", "greenness")):
        cells = re.search(rf"^\| {name} \| (.*) \| (.*) \|$", card.text, flags=re.MULTILINE).groups()
        for cell, model in zip(cells, ("base", "aligned"), strict=True):
            mean, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cell).groups())
            scores = np.reshape(later[model][row], (2, 2))
            assert mean == pytest.approx(scores.mean(), rel=1e-3)
            # Two prompts of two images each: the error of the mean over prompts, and the normal quantile.
            error = scores.mean(0).std(ddof=1) / 2**0.5
            assert (high - low) / 2 == pytest.approx(1.96 * error, abs=2e-4)
        assert row == 1 or cells[0] != cells[1]  # only redness was trained
    assert "4 images of prompts that were set aside" in card.text
    # What was told before the push is kept.
    assert "![the reward](curve.png)" in card.text and "curve.png" in session.repository("Later-name").files
    assert "red" in card.data.tags


def test_broken_pushes_leave_the_training_alone(session):
    result = session.results["broken"]
    assert result["error"] is None and result["steps"] == 4 and result["left"] == []
    disturbed = load_file(session.folder / "broken" / "adapter_model.safetensors")
    undisturbed = load_file(session.folder / "undisturbed" / "adapter_model.safetensors")
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(disturbed[name], tensor, rtol=0, atol=0)
    first, second, third = result["warnings"]
    assert "Check the network" in first
    assert "(403)" in second and "push again" in second
    assert "(401)" in third and "hf auth login" in third
    assert all("The training goes on" in warning for warning in result["warnings"])
    assert session.repository("broken").faults == []


def test_repeated_push_is_complete_and_uploads_only_what_is_missing(session):
    repository, result = session.repository("broken"), session.results["broken"]
    # Step 4 went through; the end broke off, and said how to repeat it.
    assert repository.messages == ["Training in progress, step 4", "Upload model"]
    assert "push_model(" in result["at_the_end"] and "The model is saved" in result["at_the_end"]
    for _, files in repository.commits:  # never half of a model
        assert model_of(files) == {"README.md", *ADAPTER}
    folder = session.folder / "broken"
    for name in [*ADAPTER, "README.md"]:
        assert repository.files[name] == (folder / name).read_bytes()
    assert len(repository.uploads) == len(set(repository.uploads))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_token", "there is no token. Log in with `hf auth login`, set the environment variable HF_TOKEN"),
        ("wrong_token", "does not know the token (401)"),
        ("reading_token", "may not write there (403). Use a token with write permission"),
        ("foreign", "Creating the repository 'bob/model' failed: the token may not write there (403)"),
        ("bad_name", "'alice/a b'"),
        ("nothing_there", "There is no model in"),
    ],
)
def test_refusals_name_the_remedy(session, name, message):
    assert message in session.results[name]["error"]
    assert f"alice/{name}" not in session.hub.repositories


def test_the_cards_example_runs_as_it_stands(session):
    """On the embedded model: it downloads the adapter from the server, and draws."""
    result = session.results["embedded"]
    assert result["error"] is None and result["size"] == [32, 32] and result["adapters"] == ["default_0"]
    assert result["weights"] and all(result["weights"].values())


def test_two_processes_push_once(session):
    repository = session.repository("two")
    assert repository.messages == ["Training in progress, step 1", "End of training", "Once more"]
    files = repository.files
    assert {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"} <= files.keys()
    assert {example["output"]["url"] for example in card_of(files).data.widget} == {
        "samples/gallery/000.png",
        "samples/gallery/001.png",
    }
    assert "| redness |" in card_of(repository.commits[1][1]).text


def test_a_publisher_needs_no_trainer(session):
    assert session.results["alone"] == {"error": None, "warnings": []}
    repository = session.repository("alone")
    assert repository.messages == ["By itself"]
    assert set(repository.files) == {"README.md", "adapter_model.safetensors", "adapter_config.json"}
    assert card_errors(repository.files["README.md"].decode()) == []
    card = card_of(repository.files)
    assert "# alone" in card.text and "a lone cat" in card.text
    assert card.data.license_name == "flux-1-dev-non-commercial-license"
