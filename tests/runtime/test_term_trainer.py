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

"""The trainer of terms by itself: with a model of transformers' kind that knows no image, against transformers' own."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from trl_diffusion.runtime.offloading import FrozenModules
from trl_diffusion.runtime.term_trainer import TermTrainer


@dataclass
class Settings(TrainingArguments):
    """The settings that the runtime reads besides those of transformers."""

    ema_decay: float | None = None
    max_bad_steps: int = 3
    on_save_error: str = "raise"


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x, labels):
        return {"loss": sum(term(self, x, labels) for term in (squared_error, size))}


def squared_error(model, x, labels):
    return (model.layer(x) - labels).square().mean()


def size(model, x, labels):
    return 0.1 * model.layer(x).abs().mean()


class LineTrainer(TermTrainer):
    def _prepare_inputs(self, inputs):
        self._images_trained += len(inputs["x"])
        return inputs

    def _describe(self, inputs):
        return f"{len(inputs['x'])} rows"

    def loss_terms(self, model, inputs):
        return [functools.partial(term, model, **inputs) for term in (squared_error, size)]


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(3, generator=generator), "labels": torch.randn(2, generator=generator)} for _ in range(12)
    ]


def train(trainer_class, folder, resume=None, **settings):
    args = Settings(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "max_steps": 3, "learning_rate": 0.1, "save_steps": 1, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, **settings,
        }
    )  # fmt: skip
    trainer = trainer_class(Line(), args, train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [parameter.detach() for parameter in trainer.network.parameters()]


def test_terms_train_as_their_sum_does_in_transformers(tmp_path):
    ours = train(LineTrainer, tmp_path / "ours")
    theirs = train(Trainer, tmp_path / "theirs")
    torch.testing.assert_close(weights(ours), [p.detach() for p in theirs.model.parameters()], rtol=1e-6, atol=1e-7)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_step_with_one_gradient_that_is_not_finite_is_left_out(tmp_path, name):
    """Of either group of the optimizer. Spoiled after the Trainer's clipping, which multiplies all by a norm that is not finite."""
    before_each = []

    class Spoiled(LineTrainer):
        def _skip_bad_step(self):
            before_each.append([weight.clone() for weight in weights(self)])
            if self.state.global_step == 1:
                getattr(self.network.layer, name).grad[0] = torch.inf
            super()._skip_bad_step()

    trainer = train(Spoiled, tmp_path)
    assert len(trainer.optimizer.param_groups) == 2 and trainer._skipped_steps == 1
    first, second, third, last = *before_each, weights(trainer)
    for index in range(2):
        assert torch.equal(second[index], third[index])
        assert not torch.equal(first[index], second[index]) and not torch.equal(third[index], last[index])


def test_a_resumed_run_ends_at_the_same_weights(tmp_path):
    whole = train(LineTrainer, tmp_path / "whole", ema_decay=0.5)
    resumed = train(LineTrainer, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-1"), ema_decay=0.5)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    trained = weights(whole)[0].clone()
    with whole.averaged_weights(), resumed.averaged_weights():
        assert all(map(torch.equal, weights(whole), weights(resumed)))
        assert not torch.equal(weights(whole)[0], trained)


def test_the_rollout_model_is_in_eval_mode_and_returns_to_its_own(tmp_path):
    trainer = train(LineTrainer, tmp_path)
    for mode in (True, False):
        trainer.model_wrapped.train(mode)
        with trainer.rollout_model() as model:
            assert not model.training
        assert trainer.model_wrapped.training is mode


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "what a new wrapper wraps"])
def test_a_network_that_is_given_in_eval_mode_is_trained_in_training_mode(tmp_path, whole):
    """As pipelines are loaded. A wrapper that was just made, as of PEFT, is in training mode, whatever it wraps."""
    trainer = train(LineTrainer, tmp_path)
    inputs = {name: torch.stack([row[name] for row in rows()]) for name in ("x", "labels")}
    (trainer.model if whole else trainer.model.layer).eval()
    modes = []
    trainer.model.layer.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    trainer.training_step(trainer.model, inputs)
    assert modes == [True, True]


def test_a_network_that_is_elsewhere_is_moved_for_a_rollout(tmp_path):
    """To where there are no weights to bring: torch refuses by name. One that is in its place is left alone."""
    trainer = train(LineTrainer, tmp_path)
    with trainer.rollout_model() as model:
        assert model is trainer.model
    trainer.model.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"), trainer.rollout_model():
        pass


class Moved(nn.Linear):
    """Notes where it is moved, since there may be no accelerator here."""

    def __init__(self):
        super().__init__(1, 1)
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self


@pytest.mark.parametrize("offload", [True, False])
def test_frozen_modules_are_on_the_accelerator_while_they_are_used(offload):
    used, unused = Moved(), Moved()
    frozen = FrozenModules([used, unused], torch.device("cuda"), offload)
    with pytest.raises(RuntimeError, match="inside"):
        with frozen.on_accelerator(used, len):  # a function, as rewards may be, needs no place
            assert used.places == ["cuda"]
            raise RuntimeError("inside")
    assert used.places == (["cuda", "cpu"] if offload else ["cuda"])
    assert unused.places == ([] if offload else ["cuda"])
