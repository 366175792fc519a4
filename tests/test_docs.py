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

"""
The documentation: the site builds without a warning, and what a reader can copy runs.

Blocks of a page run in their order, Python in one namespace, in an empty folder. A block that cannot run here says why in
a comment before it: `<!-- not run: needs FLUX.1-dev -->`. Trainings are cut to one step; all else is run as written.
"""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tiny_models import tiny_qwen_image_pipeline

from trl_diffusion.cli.main import main
from trl_diffusion.models import FLOW_MODELS, QwenImageFlowModel, load_flow_model


ROOT = Path(__file__).parents[1]
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "configs" / "README.md"]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?P<marker><!-- not run: [^\n]+? -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
RUN = {"python", "bash", "yaml"}


class Block(NamedTuple):
    language: str
    code: str
    line: int
    marked: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text[: match.start("code")].count("\n"), match["marker"] is not None)
        for match in FENCE.finditer(text)
    ]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in RUN and not block.marked]


def shortened(code: str) -> str:
    """A training of one step, whether written in Python, in YAML or on the command line."""
    return re.sub(r"(max_steps(?:=|: |\s+))\d+", r"\g<1>1", code)


def run_commands(code: str, where: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program, *arguments = words
        if program == "trl-diffusion":
            if arguments[0] == "demo":
                arguments += ["--max_steps", "1", "--num_eval_images", "16"]
            assert main(arguments) == 0, line
        elif program == "python" and arguments[0].startswith("examples/"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        else:
            pytest.fail(f"{where}: {program!r} is not run by this test. Mark the block: <!-- not run: reason -->")


def run_page(page: Path) -> dict:
    """Runs the blocks of a page in the current folder, and returns the names that its Python blocks have defined."""
    namespace = {"__name__": "__main__"}
    for block in runnable(page):
        where, code = f"{page.relative_to(ROOT)}:{block.line}", shortened(block.code)
        if block.language == "python":
            exec(compile("\n" * block.line + code, str(page), "exec"), namespace)
        elif block.language == "bash":
            run_commands(code, where)
        else:
            assert yaml.safe_load(code) is not None, where
            # A file says its name in its first line.
            if name := re.match(r"# (\S+\.yaml)\n", code):
                Path(name[1]).write_text(code, encoding="utf-8")
    return namespace


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder, and the families as they were afterwards: a page adds one."""
    monkeypatch.chdir(tmp_path)
    with unittest.mock.patch.dict(FLOW_MODELS):
        yield


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_blocks_run(page, reader):
    run_page(page)


def test_the_family_of_the_page_is_that_of_the_package(reader):
    page = ROOT / "docs" / "adding_a_family.md"
    assert inspect.getsource(QwenImageFlowModel) in page.read_text(encoding="utf-8")
    names = run_page(page)
    assert type(load_flow_model(tiny_qwen_image_pipeline())) is names["QwenImageFlowModel"]
    row = re.search(r"QWEN_IMAGE = \{.*?\n\}\n", page.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert row in (ROOT / "tests" / "models" / "test_families.py").read_text(encoding="utf-8")


def test_blocks_are_found():
    for name in ("README.md", "docs/index.md", "docs/chunk_grpo.md", "docs/srpo.md", "docs/command_line.md"):
        assert any(block.language in ("python", "bash") for block in runnable(ROOT / name)), name
    assert shortened("max_steps=50, max_steps: 50, --max_steps 50") == "max_steps=1, max_steps: 1, --max_steps 1"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_fences_and_markers_are_well_formed(page):
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(page)
    # A marker that stands anywhere else marks nothing; a fence in another form would not be found.
    assert text.count("<!-- not run") == sum(block.marked for block in blocks)
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks)
    # Blocks without a language are output and text.
    assert {block.language for block in blocks} <= RUN | {"", "html", "json", "mermaid"}


def test_site_builds_without_a_warning(tmp_path):
    """Pages in no menu, dead links and names that mkdocstrings cannot find are warnings, and errors with --strict."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ROOT.glob("docs/*.md"):
        assert (tmp_path / ("" if page.stem == "index" else page.stem) / "index.html").is_file(), page
    built = (tmp_path / "chunk_grpo" / "index.html").read_text(encoding="utf-8")
    # Equations, the API of the trainer, and the parameters of its configuration as a list.
    assert 'class="arithmatex"' in built
    assert 'id="trl_diffusion.trainer.chunk_grpo_trainer.ChunkGRPOTrainer"' in built
    assert (
        "<strong>num_generations</strong> (<code>int</code>, <em>optional</em>, defaults to <code>8</code>)" in built
    )


def test_numbers_of_the_readme_are_those_of_the_pages():
    measured = (ROOT / "README.md").read_text(encoding="utf-8").split("## Measured")[1]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| \[.+?\]\((docs/\w+\.md)\S*\) \|$", measured, re.MULTILINE)
    assert len(rows) >= 3
    for command, result, page in rows:
        text = (ROOT / page).read_text(encoding="utf-8")
        # The program and its first option: the page has the seeds of several runs in one table.
        assert command.split(" --seed")[0] in text, command
        for number in re.findall(r"\d+\.\d+", result):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), (number, page)


def test_links_outside_of_the_site_lead_somewhere():
    for page in OUTSIDE:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_changelog_keeps_its_form():
    """That of https://keepachangelog.com: versions, newest first, and in each the kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in text.split("\n## ")[1:]:
        found = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert set(found) <= kinds and len(set(found)) == len(found)
