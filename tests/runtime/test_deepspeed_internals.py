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

"""What the package uses of DeepSpeed beyond its public interface is there, in the installed release."""

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest


pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")

from torch import nn  # noqa: E402

from trl_diffusion.runtime import deepspeed_internals as internals  # noqa: E402
from trl_diffusion.runtime.policies import Policies  # noqa: E402
from trl_diffusion.runtime.sharding import held_weights  # noqa: E402


METHODS = [
    (kind, name, arguments) for kind, (methods, _) in internals.NAMES.items() for name, arguments in methods.items()
]
ATTRIBUTES = [(kind, name) for kind, (_, attributes) in internals.NAMES.items() for name in attributes]


def source_of(kind):
    return ast.parse(textwrap.dedent(inspect.getsource(kind)))


@pytest.mark.parametrize(("kind", "name", "arguments"), METHODS, ids=[f"{k.__name__}.{n}" for k, n, _ in METHODS])
def test_a_method_takes_what_it_is_given(kind, name, arguments):
    # DeepSpeed's decorators hide the signature.
    owner = next(base for base in kind.__mro__ if name in vars(base))
    (found,) = (node for node in source_of(owner).body[0].body if getattr(node, "name", None) == name)
    assert [argument.arg for argument in found.args.args] == ["self", *arguments]


@pytest.mark.parametrize(("kind", "name"), ATTRIBUTES, ids=[f"{k.__name__}.{n}" for k, n in ATTRIBUTES])
def test_an_attribute_is_set(kind, name):
    stored = [node for node in ast.walk(source_of(kind)) if isinstance(node, ast.Attribute)]
    stored = [node for node in stored if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)]
    assert name in {node.attr for node in stored if node.value.id == "self"}


def test_every_private_name_is_listed():
    tree = ast.parse(inspect.getsource(internals))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    private -= {"_errors_noted", "_release_reserve"}  # of our own class
    listed = {name for methods, attributes in internals.NAMES.values() for name in (*methods, *attributes)}
    assert private <= listed


@pytest.mark.parametrize("policy", ["average", "reference", "old"])
def test_policies_are_refused_where_weights_are_on_a_disk(policy):
    network, engine = nn.Linear(1, 1), SimpleNamespace(zero_nvme_offload_optimizer=lambda: True)
    with pytest.raises(ValueError, match="offloaded to NVMe.*Offload it to the CPU"):
        Policies(held_weights(network, engine), network).keep(policy)
