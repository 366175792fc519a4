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
Trainings that push to the Hub at `HF_ENDPOINT`, started by `test_push.py` in a process of its own, since the suite's is
offline. Writes what each has seen, as JSON.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, constants, get_session, hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_flux_pipeline
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, shapes
from trl_diffusion.hub import Publisher, inherited_license, push_model
from trl_diffusion.rewards import to_pil


BASE_MODEL = "black-forest-labs/FLUX.1-dev"
PROMPTS = ["a cat", 'a "red": dog\n---\n</code><script>alert(1)</script>', "a bird", "a fish", "a house", "rain"]


class Records(logging.Handler):
    """Keeps the warnings of the library."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


RECORDS = Records()
transformers_logging.get_logger("trl_diffusion").addHandler(RECORDS)


def redness(images, prompts, **columns):
    return [np.asarray(image)[..., 0].mean() / 255 for image in images]


def greenness(images, prompts, **columns):
    return [np.asarray(image)[..., 1].mean() / 255 for image in images]


def make_trainer(folder, eval_dataset=None, **settings):
    pipeline = tiny_flux_pipeline(seed=0)
    pipeline.register_to_config(_name_or_path=BASE_MODEL)
    config = ChunkGRPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "num_inference_steps": 4,
            "chunk_sizes": [1, 2],
            "height": 32,
            "width": 32,
            "max_steps": 2,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "cache_prompt_embeds": False,
            # Every push takes place, however long the last one takes.
            "hub_always_push": True,
            **settings,
        }
    )
    return ChunkGRPOTrainer(
        pipeline,
        redness,
        config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=eval_dataset,
        watch_reward_funcs=greenness if eval_dataset is not None else None,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]),
    )


@contextlib.contextmanager
def seen(results, name):
    """Notes the warnings and the error of what is done within."""
    RECORDS.messages.clear()
    results[name] = {"error": None}
    try:
        yield results[name]
    except (OSError, ValueError) as error:
        results[name]["error"] = f"{type(error).__name__}: {error}"
    results[name]["warnings"] = list(RECORDS.messages)


def strategy(folder, results, name, **settings):
    repository = name.replace("_", "-")
    with seen(results, name):
        trainer = make_trainer(
            folder / name, push_to_hub=True, hub_model_id=f"alice/{repository}", hub_strategy=name, **settings
        )
        trainer.train()
        trainer.push_to_hub(dataset_name="alice/prompts")


def resumed(folder, results):
    """A checkpoint of the Hub continues the training."""
    checkpoint = folder / "from-hub" / "checkpoint-1"
    names = [
        path.relative_to(folder / "all_checkpoints").as_posix()
        for path in (folder / "all_checkpoints").rglob("checkpoint-1/*")
    ]
    for name in names:
        if not name.endswith("training_args.bin"):
            hf_hub_download("alice/all-checkpoints", name, local_dir=folder / "from-hub")
    with seen(results, "resumed"):
        trainer = make_trainer(folder / "resumed", save_strategy="no")
        trainer.train(resume_from_checkpoint=str(checkpoint))
        trainer.save_model()


def broken(folder, results):
    """Pushes that break at different places; the training is none the worse."""
    # A seed of its own, so that the server does not have these weights from the other trainings.
    settings = {"max_steps": 4, "seed": 1}
    with seen(results, "broken") as result:
        trainer = make_trainer(folder / "broken", push_to_hub=True, hub_model_id="alice/broken", **settings)
        trainer.train()
        result["steps"] = trainer.state.global_step
        result["left"] = [path.name for path in (folder / "broken").glob(".push-*")]
        try:
            trainer.push_to_hub()
        except OSError as error:
            result["at_the_end"] = str(error)
        result["links"] = push_model(folder / "broken", "alice/broken").commit_url
    with seen(results, "undisturbed"):
        trainer = make_trainer(folder / "undisturbed", save_strategy="no", **settings)
        trainer.train()
        trainer.save_model()


def logins(folder, results):
    for name, token in (("no_token", None), ("wrong_token", "hf_wrong"), ("reading_token", "hf_reading")):
        if token is None:
            del os.environ["HF_TOKEN"]
        with seen(results, name):
            make_trainer(folder / name, push_to_hub=True, hub_model_id=f"alice/{name}", hub_token=token)
    with seen(results, "bad_name"):
        make_trainer(folder / "bad_name", push_to_hub=True, hub_model_id="alice/a b", hub_token="hf_writing")
    with seen(results, "foreign"):
        make_trainer(folder / "foreign", push_to_hub=True, hub_model_id="bob/model", hub_token="hf_writing")


def validation_errors(card):
    """As `ModelCard.validate`, which before huggingface_hub 2.2 asks huggingface.co whatever `HF_ENDPOINT` says."""
    body = {"repoType": "model", "content": card}
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    return [error["message"] for error in answer.json()["errors"]]


def later(folder, results):
    """A training that was not told to push, and then pushes; the token is an argument."""
    with seen(results, "later") as result:
        prompts = ["a hill", "snow"]
        trainer = make_trainer(
            folder / "Later-name",
            eval_dataset=Dataset.from_dict({"prompt": prompts}),
            save_strategy="no",
            max_steps=2,
            learning_rate=2.0,
            num_eval_images=4,
            num_samples_to_log=1,
        )
        trainer.train()
        trainer.create_model_card(images={"curve.png": "the reward"})
        Image.new("RGB", (8, 8)).save(folder / "Later-name" / "curve.png")
        trainer.push_to_hub(token="hf_writing", tags="red")
        # Again, by hand: the same prompts in order, the numbers of the images as seeds.
        for name, fraction in (("base", 0.0), ("aligned", 1.0)):
            images = to_pil(trainer.generate(prompts * 2, range(4), fraction))
            result[name] = [redness(images, None), greenness(images, None)]
        result["refused"] = [
            *validation_errors((folder / "Later-name" / "README.md").read_text(encoding="utf-8")),
            *validation_errors("---\nlicense: mine\n---\n"),
        ]
    with seen(results, "nothing_there"):
        push_model(folder / "nothing", "alice/nothing", token="hf_writing")
    with seen(results, "licences") as result:
        result["none_stated"] = inherited_license("someone/no-licence")
        result["plain"] = inherited_license("someone/apache")
        result["no_such_model"] = inherited_license("someone/gone")


def embedded(folder, results):
    """The card's example, as it stands, on the embedded model."""
    with seen(results, "embedded") as result:
        trainer = ChunkGRPOTrainer(
            "shapes",
            shapes.attribute_share,
            ChunkGRPOConfig(
                output_dir=str(folder / "embedded"),
                hub_model_id="alice/embedded",
                hub_token="hf_writing",
                per_device_train_batch_size=4,
                num_generations=4,
                num_inference_steps=4,
                chunk_sizes=[1, 2],
                num_samples_to_log=2,
                max_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                cache_prompt_embeds=False,
            ),
            train_dataset=shapes.load_dataset("train").select(range(4)),
        )
        trainer.train()
        trainer.push_to_hub()
        card = ModelCard.load(folder / "embedded" / "README.md")
        code = re.search(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL).group(1)
        names = {}
        exec(code, names)
        result["size"] = names["image"].size
        # The adapter that the example has loaded is the one that was trained.
        trained = load_file(folder / "embedded" / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(names["pipe"].transformer, adapter_name="default_0")
        result["weights"] = {
            name: torch.equal(tensor, loaded[name.removeprefix("base_model.model.")])
            for name, tensor in trained.items()
        }
        result["adapters"] = names["pipe"].get_active_adapters()


def two_processes(folder):
    """A training on two processes that evaluates; every process calls everything."""
    trainer = make_trainer(
        folder / "two",
        eval_dataset=Dataset.from_dict({"prompt": ["a hill", "snow", "sand"]}),
        push_to_hub=True,
        hub_model_id="alice/two",
        hub_strategy="checkpoint",
        per_device_train_batch_size=2,
        num_eval_images=3,
        num_samples_to_log=2,
        max_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()
    trainer.push_to_hub(commit_message="Once more", metrics={"base": {}, "aligned": {}})


def alone(folder, results):
    """A publisher without a trainer: a folder with a model, and what is known of it."""
    output = folder / "alone"
    output.mkdir()
    for path in (folder / "end").glob("*adapter*"):
        shutil.copy(path, output)
    args = TrainingArguments(str(output), hub_token="hf_writing", hub_model_id="alice/alone", use_cpu=True)
    facts = {"model_name": "x", "pipeline_class": "FluxPipeline", "base_model": BASE_MODEL, "call_arguments": {}}
    with seen(results, "alone"):
        publisher = Publisher(args, lambda: facts)
        publisher.create_repository()
        publisher.write_card(prompt="a lone cat")
        publisher.push("By itself")


def main(folder: Path) -> None:
    results = {}
    strategy(folder, results, "end")
    strategy(folder, results, "every_save", save_total_limit=1)
    strategy(folder, results, "checkpoint")
    strategy(folder, results, "all_checkpoints")
    resumed(folder, results)
    broken(folder, results)
    logins(folder, results)
    later(folder, results)
    embedded(folder, results)
    alone(folder, results)
    (folder / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        two_processes(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
