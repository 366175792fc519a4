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
Draws random settings: each configuration is accepted, or refused by a ValueError that says why.

```bash
PYTHONPATH=tests python tests/campaigns/configs.py --configs 2000
```
"""

import argparse
import collections
import math
import sys
from dataclasses import MISSING, fields

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from trl_diffusion import ChunkGRPOConfig, SRPOConfig
from trl_diffusion.trainer.config_checks import INHERITED


CONFIGS = (ChunkGRPOConfig, SRPOConfig)
OTHERS = ("lr_scheduler_type", "optim", "save_strategy", "eval_strategy", "logging_strategy", "bf16", "fp16")

WORDS = (
    "flow", "dance", "cps", "temporal", "uniform", "equal:2", "equal:0", "equal:x", "joint", "streamed", "recompute",
    "rollout", "fresh", "group", "batch", "none", "direct_align", "refl", "draft", "relative", "difference", "absolute",
    "interpolated", "denoise", "inversion", "stop", "continue", "no", "steps", "epoch", "best", "constant", "cosine",
    "adamw_torch", "{control}. {prompt}", "{prompt}", "", " ", "3", "nan", "\N{PILE OF POO}", "a\x00b",
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, 1, 2, 4, 8, 16, 17, 32, 512, 10**30, -(10**30)]),
    st.floats(-2, 2, allow_nan=False),
    st.sampled_from([0.0, 0.5, 1.0, 0.75, 0.964, 1e-5, math.inf, -math.inf, math.nan]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS))
VALUES = st.one_of(
    SCALARS,
    SCALARS,
    st.lists(NUMBERS, max_size=4),
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(WORDS), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=2),
    st.just(object()),
)


def names_of(config_class) -> list[str]:
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(TrainingArguments)}
    return [*sorted(own), *INHERITED, *OTHERS]


@st.composite
def drawn_settings(draw):
    """A class and up to four settings, most of them of the kind that the default has and within a usual range."""
    config_class = draw(st.sampled_from(CONFIGS))
    drawn = {}
    of_name = {field.name: field for field in fields(config_class)}
    for name in draw(st.lists(st.sampled_from(names_of(config_class)), min_size=1, max_size=4, unique=True)):
        # Chosen by a number, because hypothesis would join alternatives within alternatives into one list.
        usual = draw(st.integers(0, 9)) < 8
        drawn[name] = draw(usual_values(of_name[name]) if usual else VALUES)
    return config_class, drawn


def usual_values(field) -> st.SearchStrategy:
    kind = str(field.type)
    if "choices" in field.metadata:
        return st.sampled_from(field.metadata["choices"])
    if isinstance(field.default, bool):
        return st.booleans()
    if "list" in kind:
        return st.none() if field.default is None else st.just(field.default_factory())
    if "int" in kind:
        return st.integers(1, 16)
    if "float" in kind:
        return st.floats(0.01, 0.99)
    return SCALARS if field.default is MISSING else st.just(field.default)


def check(config_class, drawn) -> str:
    """
    Build a configuration.

    Returns:
        `str`: "accepted" or "refused".

    Raises:
        `AssertionError`: an error of another kind, or without a message.
    """
    try:
        config_class(output_dir="out", use_cpu=True, **drawn)
    except ValueError as error:
        assert len(str(error)) > 15, f"{config_class.__name__}({drawn}): the message {str(error)!r} says nothing"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{config_class.__name__}({drawn}): {type(error).__name__}: {error}") from error
    return "accepted"


def campaign(configs: int, derandomize: bool = True) -> collections.Counter:
    """Draw and build so many configurations; returns how many were accepted and refused."""
    count = collections.Counter()

    @settings(
        max_examples=configs, derandomize=derandomize, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn_settings())
    def build(drawn):
        count[check(*drawn)] += 1

    build()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--random", action="store_true", help="other settings in every run")
    arguments = parser.parse_args()
    count = campaign(arguments.configs, derandomize=not arguments.random)
    print(f"{count.total()} configurations: {count['accepted']} accepted, {count['refused']} refused by a ValueError")
    return 0


if __name__ == "__main__":
    sys.exit(main())
