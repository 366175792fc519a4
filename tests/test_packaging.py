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

"""What is built and installed is what the repository holds."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def build(root, target, folder):
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return next(folder.glob("*.whl" if target == "wheel" else "*.tar.gz"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests are not in a source tree")
    return {target: build(ROOT, target, tmp_path_factory.mktemp(target)) for target in ("wheel", "sdist")}


def test_wheel_holds_every_file_of_the_package(built):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trl_diffusion").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names_in(built["wheel"]) == files
    for name in ("hub/model_card_template.md", "shapes/weights/pipeline/vae/diffusion_pytorch_model.safetensors"):
        assert f"trl_diffusion/{name}" in files


def test_wheel_says_how_it_is_installed(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "trl-diffusion = trl_diffusion.cli.main:main" in entry_points
    assert {"deepspeed", "dev", "rewards-server", "test"} <= set(metadata.get_all("Provides-Extra"))
    # A floor for everything that is needed.
    assert all(">=" in line or "extra ==" in line for line in metadata.get_all("Requires-Dist"))


def test_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    for name in ("tests/conftest.py", "docs/index.md", "examples/chunk_grpo_flux.py", "constraints.txt", "LICENSE"):
        assert (source / name).is_file()
    assert names_in(build(source, "wheel", tmp_path / "wheel")) == names_in(built["wheel"])
