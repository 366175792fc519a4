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

import pytest

from trl_diffusion.paths import check_exists, check_output_folder, nearest, not_found


FILE_ENDINGS = (".csv", ".jsonl", ".txt")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "flux-dev").mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompts.jsnl", r"no file 'prompts\.jsnl'\. Did you mean 'prompts\.jsonl'\?"),
        ("promts.jsonl", r"no file .* Did you mean 'prompts\.jsonl'\?"),
        ("prompts.JSON", "Did you mean 'prompts.jsonl'"),
        ("other.csv", r"no file 'other\.csv'\.$"),
        ("./models/flux-de", r"no file or folder .* Did you mean 'models/flux-dev'\?"),
        ("./modles/flux-dev/transformer", "Did you mean 'models/flux-dev/transformer'"),
        ("../nowhere", r"'\.\./nowhere'\.$"),
        ("/nowhere/at/all", r"'/nowhere/at/all'\.$"),
        ("a/b/c", "'a/b/c'"),
        ("models\\\\flux-dev", "no file or folder"),
        ("~/nowhere", "'~/nowhere'"),
    ],
)
def test_paths_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        check_exists(name, FILE_ENDINGS)


@pytest.mark.parametrize(
    "name",
    [
        "prompts.jsonl",
        "./models",
        "models/flux-dev",
        "models/flux-pro",
        "black-forest-labs/FLUX.1-dev",
        "squad",
        "a.b",
    ],
)
def test_paths_that_are_there_and_ids_pass(name):
    check_exists(name, FILE_ENDINGS)


def test_a_path_object_is_no_id(folder):
    with pytest.raises(ValueError, match="Did you mean"):
        check_exists(folder / "models" / "flux-dex")


def test_home_is_not_expanded_and_told(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(ValueError, match=rf"Did you mean '{folder}/models'\?"):
        check_exists("~/models")


def test_the_answer_of_the_hub_stands_beside_the_nearest_name():
    assert nearest("models/flux-dev") == nearest("squad") == ""
    told = not_found("models/flux-deev", OSError("no connection"))
    assert "Did you mean 'models/flux-dev'?" in told and told.endswith("no connection")


def test_output_folder_that_is_a_file(folder):
    check_output_folder("new/folder")
    for name in ("prompts.jsonl", "prompts.jsonl/out"):
        with pytest.raises(ValueError, match=r"'prompts\.jsonl' is a file"):
            check_output_folder(name)
