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

"""What a resumed run takes from its settings, what from the checkpoint, and what it refuses."""

import json
import logging
import math
import shutil

import pytest
from campaigns.tiny_runs import make_trainer
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion.runtime.checkpoints import MANIFEST_NAME, STATE_NAME, write_manifest
from trl_diffusion.runtime.resuming import saved_state


PROMPTS = [f"a {color} circle" for color in ("red", "green", "blue", "white", "black", "brown")]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]}


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def make(kind, folder, **settings):
    """Without dropout, whose draws depend on how images are cut, as do the last bits of Adam's smallest gradients."""
    defaults = {
        "prompts": PROMPTS, "peft_config": LoraConfig(**LORA), "ema_decay": None, "save_total_limit": None,
        "adam_epsilon": 1e-6, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return make_trainer(kind, folder, **{**defaults, **settings})


def resume(kind, checkpoint, folder, **settings):
    trainer = make(kind, folder, save_strategy="no", **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def relist(checkpoint):
    """Let the list of files of a checkpoint be true again."""
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of four steps with a checkpoint each; Chunk-GRPO's generations are trained in two steps."""
    runs = {}
    for kind in ("chunk_grpo", "srpo"):
        folder = tmp_path_factory.mktemp(kind)
        trainer = make(kind, folder, max_steps=4)
        trainer.train()
        runs[kind] = folder, trained(trainer)
    return runs


@pytest.fixture(autouse=True)
def messages(caplog, monkeypatch):
    # The loggers of transformers, which ours are, do not propagate by themselves.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


class Hyperparameters(TrainerCallback):
    """Sets the optimizer's values by hand from a step on, before each step."""

    def __init__(self, first, learning_rate, **values):
        self.first, self.learning_rate, self.values = first, learning_rate, values

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step >= self.first:
            for group in optimizer.param_groups:
                group.update(self.values, lr=self.learning_rate(state.global_step))


class TestSettingsWin:
    @pytest.mark.parametrize("kind", ["chunk_grpo", "srpo"])
    def test_optimizer_and_schedule(self, whole, tmp_path, kind):
        truth = make(kind, tmp_path / "truth", save_strategy="no", max_steps=5)
        lr = [2e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
        truth.add_callback(Hyperparameters(2, lr.__getitem__, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-5))
        truth.train()
        resumed = resume(
            kind, whole[kind][0] / "checkpoint-2", tmp_path / "resumed", learning_rate=2e-3,
            lr_scheduler_type="cosine", max_steps=5, adam_beta1=0.5, adam_beta2=0.9, weight_decay=0.1,
            adam_epsilon=1e-5,
        )  # fmt: skip
        assert largest_difference(trained(truth), trained(resumed)) < 1e-8
        logged = [log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log]
        assert logged == pytest.approx([1e-2, 1e-2, *lr[2:]])
        # The bound means something.
        unchanged = resume(kind, whole[kind][0] / "checkpoint-2", tmp_path / "unchanged", max_steps=5)
        assert largest_difference(trained(truth), trained(unchanged)) > 1e-3

    def test_intervals(self, whole, tmp_path):
        trainer = make("srpo", tmp_path, max_steps=4, save_steps=2, logging_steps=2)
        trainer.train(resume_from_checkpoint=str(whole["srpo"][0] / "checkpoint-1"))
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 4]

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_inference_steps": 3, "chunk_sizes": [1, 1], "chunk_sampling": [1]},
            {"chunk_sizes": [3], "chunk_sampling": [0], "eta": 0.3},
            {"chunk_sizes": "temporal", "num_chunks": 3, "min_chunk_size": 1},
            {"chunk_sizes": None, "train_window": 2, "stochastic_steps": "trained", "trust_region": "kl"},
            {"sde_type": "dance", "height": 32, "sigma_shift": None, "beta": 0.0},
            {"epsilon": 1e-3, "chunk_fraction": 1.0, "scale_rewards": "none", "chunk_gradient": "streamed"},
        ],
        ids=["fewer-steps", "one-chunk", "temporal", "window", "size", "objective"],
    )
    def test_between_generations_all_of_sampling_can_change(self, whole, tmp_path, settings):
        folder, _ = whole["chunk_grpo"]
        trainer = resume("chunk_grpo", folder / "checkpoint-2", tmp_path, max_steps=3, **settings)
        (log,) = (log for log in trainer.state.log_history if log.get("step") == 3 and "loss" in log)
        assert log["skipped_steps"] == 0 and log["grad_norm"] > 0
        # On-policy, as the new generation was made and trained with the same settings.
        assert log["ratio/mean"] == 1 and log["rollout_logp_gap"] < 1e-5
        sizes = settings.get("chunk_sizes", [1, 2])
        assert trainer.chunk_sizes == sizes or (sizes == "temporal" and trainer.chunk_sizes == [1, 1, 1])
        states = {step for micro_batch in trainer._micro_batches for step in micro_batch.states}
        assert max(states) <= trainer.args.num_inference_steps - 1

    def test_a_measured_layout_is_the_checkpoints_while_it_means_the_same(self, tmp_path):
        temporal = {"chunk_sizes": "temporal", "num_inference_steps": 6, "num_chunks": 2, "min_chunk_size": 1}
        first = make("chunk_grpo", tmp_path / "first", max_steps=2, save_steps=2, **temporal)
        first.train()
        checkpoint = tmp_path / "first" / "checkpoint-2"
        other = [1, 4] if first.chunk_sizes != [1, 4] else [4, 1]
        state = saved_state(checkpoint)
        assert state["chunk_sizes"] == first.chunk_sizes
        # A layout that this run would not measure.
        (checkpoint / STATE_NAME).write_text(json.dumps({**state, "chunk_sizes": other}))
        relist(checkpoint)
        same = resume("chunk_grpo", checkpoint, tmp_path / "same", max_steps=3, **temporal, epsilon=1e-3)
        assert same.chunk_sizes == other
        changed = resume("chunk_grpo", checkpoint, tmp_path / "eta", max_steps=3, **temporal, eta=0.71)
        assert changed.chunk_sizes == first.chunk_sizes

    def test_a_second_training_begins_anew(self, tmp_path):
        trainer = make("chunk_grpo", tmp_path, save_strategy="no", max_steps=1)
        trainer.train()
        trainer.train()
        assert trainer._images_trained == 4


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "settings", "message"),
        [
            ("chunk_grpo", {"optim": "sgd"}, "optim was 'adamw_torch.*' and is 'sgd'"),
            ("srpo", {"optim": "rmsprop", "optim_args": "alpha=0.9"}, "optim_args was None and is 'alpha=0.9'"),
            ("srpo", {"ema_decay": 0.9}, "ema_decay was None and is 0.9"),
            ("chunk_grpo", {"seed": 7}, "seed was 42 and is 7"),
            ("chunk_grpo", {"data_seed": 7}, "data_seed was 42 and is 7"),
            (
                "srpo",
                {"gradient_accumulation_steps": 4},
                "per_device_train_batch_size x processes x gradient_accumulation_steps was 4 and is 8",
            ),
            ("chunk_grpo", {"steps_per_generation": 2}, "generation_batch_size was 8 and is 4"),
            ("chunk_grpo", {"num_generations": 2}, "num_generations was 4 and is 2"),
            ("chunk_grpo", {"num_iterations": 2}, "num_iterations was 1 and is 2"),
            ("chunk_grpo", {"prompts": PROMPTS[:4]}, "rows of train_dataset was 6 and is 4"),
            ("srpo", {"prompts": PROMPTS[:4]}, "rows of train_dataset was 6 and is 4"),
            (
                "srpo",
                {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
                "rows of an epoch, in whole batches of per_device_train_batch_size x processes was 6 and is 4",
            ),
            ("chunk_grpo", {"peft_config": LoraConfig(**{**LORA, "r": 8})}, "peft_config.r was 4 and is 8"),
            (
                "srpo",
                {"peft_config": LoraConfig(**{**LORA, "target_modules": ["to_k"]})},
                r"peft_config.target_modules was \['to_q', 'to_v'\] and is \['to_k'\]",
            ),
            ("srpo", {"peft_config": False}, "peft_config was 'LoRA' and is False"),
        ],
    )  # fmt: skip
    def test_what_cannot_change_within_a_run(self, whole, tmp_path, kind, settings, message):
        trainer = make(kind, tmp_path, **settings)
        before = trained(trainer)
        with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed with these settings: .*{message}"):
            trainer.train(resume_from_checkpoint=str(whole[kind][0] / "checkpoint-2"))
        assert largest_difference(before, trained(trainer)) == 0  # nothing was loaded

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"num_inference_steps": 3, "chunk_sizes": [1, 1]},
                r"num_inference_steps was 4 and is 3; chunk_sizes was \[1, 2\] and is \[1, 1\]",
            ),
            ({"chunk_sizes": "temporal", "num_chunks": 1}, r"chunk_sizes was \[1, 2\] and is 'temporal'"),
            ({"eta": 0.5}, "eta was 0.7 and is 0.5"),
            ({"sde_type": "cps"}, "sde_type was 'flow' and is 'cps'"),
            ({"guidance_scale": 2.0}, "guidance_scale was 3.5 and is 2.0"),
            ({"width": 32}, "width was 16 and is 32"),
            ({"sigma_shift": 1.0}, "sigma_shift was 3.0 and is 1.0"),
            ({"stochastic_steps": "trained"}, "stochastic_steps was 'all' and is 'trained'"),
            ({"trust_region": "kl"}, "trust_region was 'clip' and is 'kl'"),
            ({"shared_noise": "none"}, "shared_noise was 'group' and is 'none'"),
            ({"train_window": 2, "chunk_sizes": None}, "train_window was None and is 2"),
        ],
    )
    def test_within_a_generation_what_made_it(self, whole, tmp_path, settings, message):
        folder, _ = whole["chunk_grpo"]
        remedy = f"resume from {folder}/checkpoint-4, which is at the end of a generation"
        with pytest.raises(ValueError, match=f"checkpoint-3 cannot be .*{message}.* within a generation.*{remedy}"):
            resume("chunk_grpo", folder / "checkpoint-3", tmp_path, **settings)

    def test_another_rate_of_a_schedule_with_a_history(self, tmp_path):
        settings = {
            "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
            "metric_for_best_model": "reward", "num_eval_images": 1,
            "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:1]}),
        }  # fmt: skip
        whole = make("srpo", tmp_path, max_steps=2, **settings)
        whole.train()
        checkpoint = tmp_path / "checkpoint-1"
        resumed = resume("srpo", checkpoint, tmp_path / "same", max_steps=2, **settings)
        assert largest_difference(trained(whole), trained(resumed)) == 0
        with pytest.raises(ValueError, match="learning_rate was 0.01 and is 0.001.* what happened before"):
            resume("srpo", checkpoint, tmp_path / "other", max_steps=2, learning_rate=1e-3, **settings)
        with pytest.raises(ValueError, match="lr_scheduler_type was 'reduce_lr_on_plateau' and is 'constant'"):
            resume("srpo", checkpoint, tmp_path / "kind", **{**settings, "lr_scheduler_type": "constant"})


class TestNothingLeft:
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("chunk_grpo", {"max_steps": 4}),
            ("chunk_grpo", {"max_steps": 3}),
            ("srpo", {"max_steps": -1, "num_train_epochs": 2}),
            ("srpo", {"max_steps": -1, "num_train_epochs": 1.5}),
        ],
        ids=["end", "beyond", "epochs", "part-of-an-epoch"],
    )
    def test_no_step_and_the_model_of_the_checkpoint(self, whole, tmp_path, messages, kind, settings):
        folder, weights = whole[kind]
        resumed = resume(kind, folder / "checkpoint-4", tmp_path, **settings)
        assert largest_difference(weights, trained(resumed)) == 0
        assert resumed.state.global_step == 4
        assert sum("nothing is left to train" in record.message for record in messages.records) == 1
        resumed.save_model()
        exported = load_file(tmp_path / "adapter_model.safetensors")
        assert largest_difference(exported, load_file(folder / "checkpoint-4" / "adapter_model.safetensors")) == 0


class TestOtherCuts:
    """The same images in micro-batches of another size: the run goes on as if nothing had happened."""

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_chunk_grpo_also_within_a_generation(self, whole, tmp_path, step):
        folder, weights = whole["chunk_grpo"]
        for size, accumulation in ((1, 4), (4, 1)):
            resumed = resume(
                "chunk_grpo", folder / f"checkpoint-{step}", tmp_path / str(size), max_steps=4,
                per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                steps_per_generation=2 * accumulation,
            )  # fmt: skip
            assert largest_difference(weights, trained(resumed)) < 1e-5

    def test_srpo(self, whole, tmp_path):
        folder, weights = whole["srpo"]
        resumed = resume(
            "srpo", folder / "checkpoint-2", tmp_path, max_steps=4, per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        assert largest_difference(weights, trained(resumed)) < 1e-5
        beginning = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
        assert largest_difference({n.replace(".default", ""): w for n, w in weights.items()}, beginning) > 1e-3

    def test_images_of_a_generation_that_are_nowhere(self, whole, tmp_path):
        copy = tmp_path / "checkpoint-3"
        shutil.copytree(whole["chunk_grpo"][0] / "checkpoint-3", copy)
        (copy / "generation_0.safetensors").unlink()
        relist(copy)
        with pytest.raises(ValueError, match="8 of the 8 images that this process is to train are in none of"):
            resume("chunk_grpo", copy, tmp_path / "out")
