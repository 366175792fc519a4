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

"""Every setting is documented where it is defined, and every logged number on the page of its trainer."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from tiny_models import tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.cli.training import ScriptArguments
from trl_diffusion.rewards import RewardModel
from trl_diffusion.trainer.base_config import DiffusionConfig


ROOT = Path(__file__).parents[1]
CLASSES = [ScriptArguments, DiffusionConfig, ChunkGRPOConfig, SRPOConfig]
ENTRY = re.compile(r"^ {4,8}(\w+) \((.+)\):\n(.+)", re.MULTILINE)


def own_fields(cls):
    """Names of the fields that the class itself defines, with those whose default or help it changes."""
    return {field.name for field in dataclasses.fields(cls)} & set(inspect.get_annotations(cls))


def entries(cls):
    """Name -> (what stands in parentheses, first line of the description)."""
    return {name: (kind, text.strip()) for name, kind, text in ENTRY.findall(cls.__doc__)}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_in_the_docstring_and_has_a_help(cls):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    documented = entries(cls)
    # A field of TrainingArguments may be documented as well, where the trainers treat it in their own way.
    assert not own_fields(cls) - set(documented) and set(documented) <= set(fields)
    for name, (_, text) in documented.items():
        assert len(fields[name].metadata["help"]) > 10, name
        assert len(text) > 10, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_documented_defaults_are_the_defaults(cls):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, (kind, _) in entries(cls).items():
        field = fields[name]
        if field.default is field.default_factory:  # none
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        stated = re.search(r"defaults to `(.+?)`", kind)
        if stated is None:
            assert default is None, f"{name}: the docstring states no default, but it is {default!r}"
        elif default is None:
            # What `__post_init__` puts there; the parser needs None where a field has several types.
            assert vars(cls(output_dir="out"))[name] == yaml.safe_load(stated[1]), name
        else:
            value = yaml.safe_load(stated[1])
            # YAML 1.1 reads 1e-4 as text.
            assert (float(value) if isinstance(default, float) else value) == default, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_is_optional_says_so(cls):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, (kind, _) in entries(cls).items():
        required = fields[name].default is fields[name].default_factory is dataclasses.MISSING
        assert ("*optional*" in kind) is not required, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_choices_are_in_the_docstring(cls):
    for field in dataclasses.fields(cls):
        if field.name in own_fields(cls):
            text = re.search(rf"^ +{field.name} \(.*?(?=^ +\w+ \(|\Z)", cls.__doc__, re.MULTILINE | re.DOTALL)[0]
            for choice in field.metadata.get("choices", []):
                assert f'"{choice}"' in text, (field.name, choice)


# ---- Logged metrics ----


class Warmth(RewardModel):
    """Red over blue."""

    name = "warmth"

    def score(self, images, prompts):
        return (images[:, 0] - images[:, 2]).mean((1, 2))


def brightness(images, prompts, **columns):
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]


def documented_metrics(page):
    """The names in the first column of the page's table of metrics, as regular expressions."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.search(r"^## Logged metrics\n(.+?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    names = [
        name for row in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall("`(.+?)`", row)
    ]
    assert len(names) > 10
    return {name: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(name))) for name in names}


def logged(trainer):
    trainer.train()
    return {name for record in trainer.state.log_history for name in record if name != "step"}


def prompts_dataset(**columns):
    return Dataset.from_dict({"prompt": ["a cat", "a dog", "a bird", "a fish"], **columns})


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_inference_steps": 4,
        "height": 16,
        "width": 16,
        "max_steps": 1,
        "num_eval_images": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "cache_prompt_embeds": False,
        "log_samples": False,
        **more,
    }


COMPILED = {"compile_denoiser": True, "torch_compile_backend": "eager"}


def run(trainer_class, config, dataset=None):
    dataset = prompts_dataset() if dataset is None else dataset
    trainer = trainer_class(
        tiny_flux_pipeline(), Warmth(), config, dataset, prompts_dataset(),
        peft_config=LoraConfig(r=2, target_modules=["to_q"]), watch_reward_funcs=brightness,
    )  # fmt: skip
    return logged(trainer)


def check(page, names):
    patterns = documented_metrics(page)
    unknown = {name for name in names if not any(pattern.fullmatch(name) for pattern in patterns.values())}
    assert not unknown, f"logged, and not in the table of docs/{page}"
    idle = {name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, names))}
    assert not idle, f"in the table of docs/{page}, and not logged"


def test_metrics_of_chunk_grpo(tmp_path):
    shared = settings(tmp_path, num_generations=4, chunk_sizes=[1, 2], beta=0.1)
    on_policy = run(ChunkGRPOTrainer, ChunkGRPOConfig(**shared))
    off_policy = run(ChunkGRPOTrainer, ChunkGRPOConfig(**shared, num_iterations=2))
    divergence = run(ChunkGRPOTrainer, ChunkGRPOConfig(**shared, trust_region="kl"))
    fast = run(ChunkGRPOTrainer, ChunkGRPOConfig(**shared, **COMPILED, overlap_rewards=True))
    check("chunk_grpo.md", on_policy | off_policy | divergence | fast)


def test_metrics_of_srpo(tmp_path):
    shared = settings(tmp_path, positive_words=["warm"], negative_words=["cold"])
    names = run(SRPOTrainer, SRPOConfig(**shared, **COMPILED))
    names |= run(SRPOTrainer, SRPOConfig(**shared, estimator="refl", sigma_range=[0.3, 0.9]))
    names |= run(SRPOTrainer, SRPOConfig(**shared, estimator="draft", preference="absolute"))
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green", "white")]
    features = Features({"prompt": Value("string"), "image": ImageFeature()})
    with_images = prompts_dataset(image=pictures).cast(features)
    names |= run(SRPOTrainer, SRPOConfig(**shared), with_images)
    check("srpo.md", names)
