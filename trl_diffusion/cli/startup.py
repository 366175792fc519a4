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

"""What a command's options need of the libraries, loaded without what they do not need."""

import contextlib
import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _Deferred(type):
    """Stands for a class of peft in `isinstance`; as long as peft is not loaded, nothing is an instance of it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        peft = sys.modules.get("peft")
        return peft is not None and isinstance(instance, getattr(peft, cls.__name__))


class _Stub(ModuleType):
    PeftModel = _Deferred("PeftModel", (), {})
    PeftMixedModel = _Deferred("PeftMixedModel", (), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for what a module may have
            raise AttributeError(name)
        if sys.modules.get("peft") is self:
            del sys.modules["peft"]
        return getattr(importlib.import_module("peft"), name)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """
    Imports inside take a third of the time.

    `transformers.trainer_utils` imports `PeftModel` and `PeftMixedModel` for an `isinstance`, and peft in turn the
    modelling code of transformers and the compiler of torch. Inside, these two names stand for themselves; whatever asks
    peft for another name gets peft. Outside, and where peft is loaded already, nothing is different.

    The garbage collector does not look through the hundreds of thousands of objects that imports make and that stay,
    neither inside nor afterwards.
    """
    collects = gc.isenabled()
    gc.disable()
    stub = None
    if "peft" not in sys.modules:
        stub = _Stub("peft")
        stub.__spec__ = importlib.util.find_spec("peft")  # for those who ask whether there is peft
        sys.modules["peft"] = stub
    try:
        yield
    finally:
        if stub is not None and sys.modules.get("peft") is stub:
            del sys.modules["peft"]
        gc.freeze()
        if collects:
            gc.enable()
