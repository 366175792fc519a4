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

"""Runs on datasets that are longer than what is encoded at a time, and on streams."""

import itertools

import pytest
import torch
from datasets import Dataset, Image, IterableDataset
from PIL import Image as Picture
from tiny_models import tiny_flux_pipeline

from trl_diffusion import SRPOConfig, SRPOTrainer

from .conftest import redness, trainable
from .test_srpo_trainer import Brightness


PROMPTS = [f"a {name}" for name in ("cat", "dog", "bird", "fish", "fox", "owl", "bee", "ant", "elk", "hen")]


def rows():
    return Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])


def stream():
    return rows().to_iterable_dataset()


def weights_equal(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


class Seen:
    """A reward that notes the prompts of each image."""

    __name__ = "seen"

    def __init__(self):
        self.prompts = []

    def __call__(self, images, prompts):
        self.prompts += prompts
        return redness(images, prompts)


@pytest.fixture
def make_srpo_trainer(tmp_path):
    def make(train_dataset, **settings):
        config = SRPOConfig(
            output_dir=str(tmp_path / "srpo"),
            **{
                "per_device_train_batch_size": 2, "num_inference_steps": 4, "height": 32, "width": 32, "max_steps": 4,
                "learning_rate": 1e-2, "preference": "absolute", "reward_threshold": 10.0, "save_strategy": "no",
                "use_cpu": True, "disable_tqdm": True, **settings,
            },
        )  # fmt: skip
        return SRPOTrainer(tiny_flux_pipeline(seed=0), Brightness(), config, train_dataset)

    return make


class TestWindows:
    def test_the_result_does_not_depend_on_the_window(self, make_trainer):
        results = []
        for window in (1, 3, 128):
            trainer = make_trainer(train_dataset=rows(), prompt_window=window, eval_dataset=rows().select([8, 9]),
                                   num_eval_images=2, eval_strategy="steps", eval_steps=1, max_steps=7)  # fmt: skip
            trainer.train()
            results.append((trainable(trainer), [log for log in trainer.state.log_history if "eval_reward" in log]))
            # Where all fit, the encoders are gone.
            assert (trainer.flow.text_encoders == {}) == (window == 128)
        for weights, evaluations in results[1:]:
            assert weights_equal(results[0][0], weights)
            assert [log["eval_reward"] for log in evaluations] == [log["eval_reward"] for log in results[0][1]]

    def test_a_run_encodes_what_it_sees_and_each_prompt_once_an_epoch(self, make_trainer):
        trainer = make_trainer(train_dataset=rows(), prompt_window=4, max_steps=2)  # 2 prompts a generation
        calls = []
        trainer.flow.text_encoders["text_encoder_2"].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == 4
        trainer.args.max_steps = 5  # the whole epoch, again from its beginning, which the window still holds
        trainer.train()
        assert len(calls) <= 4 + 4 + 4

    def test_srpo(self, make_srpo_trainer):
        results = []
        for window in (1, 128):
            trainer = make_srpo_trainer(rows(), prompt_window=window)
            trainer.train()
            results.append(trainable(trainer))
        assert weights_equal(*results)


class TestStreams:
    def test_the_order_is_the_streams_and_a_resume_goes_on_in_it(self, make_trainer, tmp_path):
        seen = Seen()
        settings = {"train_dataset": stream(), "prompt_window": 3, "save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(reward_funcs=seen, max_steps=7, **settings)
        trainer.train()
        order = [prompt for prompt, _ in itertools.groupby(seen.prompts)]
        assert order == (PROMPTS + PROMPTS)[:14]  # it begins anew
        assert [len(list(images)) for _, images in itertools.groupby(seen.prompts)] == 14 * [4]

        resumed = Seen()
        again = make_trainer(reward_funcs=resumed, max_steps=7, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert resumed.prompts == seen.prompts[4 * 8 :]
        assert weights_equal(trainable(trainer), trainable(again))
        assert again.first_prompts(2) == PROMPTS[:2]

    def test_within_a_generation(self, make_trainer, tmp_path):
        settings = {
            "train_dataset": stream(), "num_iterations": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 5,
        }  # fmt: skip
        trainer = make_trainer(**settings)
        trainer.train()
        again = make_trainer(**settings)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert weights_equal(trainable(trainer), trainable(again))

    def test_srpo_on_a_generator_without_known_columns(self, make_srpo_trainer, tmp_path):
        def generate():
            yield from ({"prompt": prompt} for prompt in PROMPTS)

        settings = {"prompt_window": 3, "save_strategy": "steps", "save_steps": 3}
        trainer = make_srpo_trainer(IterableDataset.from_generator(generate), **settings, max_steps=6)
        assert trainer.train_dataset.stream.features is None
        trainer.train()
        again = make_srpo_trainer(IterableDataset.from_generator(generate), **settings, max_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "srpo" / "checkpoint-3"))
        assert weights_equal(trainable(trainer), trainable(again))

    def test_columns_reach_the_rewards(self, make_trainer):
        def known(images, prompts, number):
            assert number == [PROMPTS.index(prompt) for prompt in prompts]
            return redness(images, prompts)

        rows = [{"prompt": prompt, "number": index, "unused": "x"} for index, prompt in enumerate(PROMPTS)]
        make_trainer(reward_funcs=known, train_dataset=Dataset.from_list(rows).to_iterable_dataset()).train()

    @pytest.mark.parametrize(
        ("dataset", "settings", "message"),
        [
            (stream(), {"max_steps": -1}, "max_steps is -1, but train_dataset is a stream"),
            (stream(), {"dataloader_num_workers": 2}, "dataloader_num_workers=2, but train_dataset is a stream"),
            (
                stream(),
                {"eval_dataset": stream(), "eval_strategy": "epoch"},
                "eval_dataset must be a datasets.Dataset",
            ),
            (stream().rename_column("prompt", "text"), {}, r"has no column 'prompt', only \['text'\]"),
            (stream().filter(lambda row: False), {}, "train_dataset is an empty stream"),
        ],
        ids=["max_steps", "workers", "evaluation", "column", "empty"],
    )
    def test_refused_at_the_start(self, make_trainer, dataset, settings, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make_trainer(train_dataset=dataset, **settings)

    def test_bad_rows_are_told_when_they_come(self, make_trainer):
        dataset = Dataset.from_list([{"prompt": prompt} for prompt in ["a cat", "a dog", " "]]).to_iterable_dataset()
        trainer = make_trainer(train_dataset=dataset)
        with pytest.raises(ValueError, match="Row 2 of train_dataset has an empty prompt ' '"):
            trainer.train()

    def test_images_of_a_stream(self, make_srpo_trainer):
        dataset = Dataset.from_list([{"prompt": "a cat", "image": Picture.new("RGB", (32, 32))}] * 4)
        with pytest.raises(ValueError, match="a stream with images"):
            make_srpo_trainer(dataset.cast_column("image", Image()).to_iterable_dataset())
