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

"""The rooms of the package: what imports what, inside functions and by name as well."""

import ast
import re
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trl_diffusion


ROOT = Path(trl_diffusion.__file__).parent
# Rooms by their height: each imports rooms below it, those of the middle each other as well. What is not listed is new.
LEAVES = {"flow", "objectives", "data", "shapes", "paths", "version"}
MIDDLE = {"models", "rewards", "evaluation", "hub", "metrics", "runtime"}
HEIGHT = {**dict.fromkeys(LEAVES, 0), **dict.fromkeys(MIDDLE, 1), "planning": 2, "trainer": 3, "cli": 4}
EXCEPTIONS: set[tuple[str, str]] = set()
# "trl_diffusion.rewards.ocr:OCRReward" and ".trainer": modules that are imported by name.
DOTTED = re.compile(r"(trl_diffusion\.[\w.]+|\.\w[\w.]*)(:\w+)?")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in ROOT.rglob("*.py")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def named(text: str, package: str) -> str | None:
    """The module of the package that a text names, if any; of a dotted path to something in a module, the module."""
    match = DOTTED.fullmatch(text)
    if match is None:
        return None
    name = match[1] if match[1].startswith("trl_diffusion") else package + match[1]
    if name not in PATHS and match[1].startswith("trl_diffusion") and match[2] is None:
        name = name.rpartition(".")[0]
    return name if name in PATHS and name != "trl_diffusion" else None


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports or names, and the other packages that it imports."""
    package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    ours, others = set(), set()
    nodes = [ast.parse(PATHS[module].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if is_for_types(node):
            continue
        nodes += ast.iter_child_nodes(node)
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in PATHS else base for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [name for name in [named(node.value, package)] if name is not None]
        for name in found:
            if name.split(".")[0] == "trl_diffusion":
                ours.add(name)
            else:
                others.add(name.split(".")[0])
    return ours - {module}, others


GRAPH = {module: imports(module)[0] for module in PATHS}


def test_what_is_imported_is_found():
    # Above a function, inside of one, and in a table: were they overlooked, the other tests would show nothing.
    assert "trl_diffusion.flow" in GRAPH["trl_diffusion.trainer.chunk_grpo_trainer"]
    assert "trl_diffusion.trainer.srpo_trainer" in GRAPH["trl_diffusion.cli.demo_srpo"]
    assert {"trl_diffusion.shapes", "trl_diffusion.rewards.shapes_clip"} <= GRAPH["trl_diffusion.rewards"]
    assert "trl_diffusion.trainer" in GRAPH["trl_diffusion"]
    assert "trl_diffusion.runtime.policies" in GRAPH["trl_diffusion.runtime.reliable_trainer"]
    assert "trl_diffusion.trainer.chunk_grpo_trainer" in GRAPH["trl_diffusion.trainer"]


def test_modules_import_in_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_import_in_no_circle():
    rooms = defaultdict(set)
    for module, imported in GRAPH.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_dependencies_point_one_way():
    assert {room(module) for module in PATHS} - {""} <= HEIGHT.keys(), "a room without a place in the architecture"
    wrong = [
        f"{module} imports {other}"
        for module, imported in GRAPH.items()
        for other in imported
        if module != "trl_diffusion"  # which hands on what users import
        and room(other) != room(module)
        and not (
            room(other)
            and (HEIGHT[room(other)] < HEIGHT[room(module)] or {room(module), room(other)} <= MIDDLE - {"runtime"})
        )
    ]
    assert wrong == []


def test_the_runtime_knows_no_image_and_no_prompt():
    """It would do for another trainer of transformers."""
    for module, imported in GRAPH.items():
        if room(module) == "runtime":
            assert {room(other) for other in imported} <= {"runtime"}, module


def test_the_mathematics_imports_torch_alone():
    for module in PATHS:
        if room(module) in ("flow", "objectives"):
            assert imports(module)[1] - sys.stdlib_module_names <= {"torch"}, module
