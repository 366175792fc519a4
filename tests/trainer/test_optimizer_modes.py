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

"""Optimizers with train and eval modes: steps and rollouts in train mode, evaluations and exports in eval mode."""

import pytest
import torch
from campaigns.tiny_runs import PROMPTS, make_trainer
from safetensors.torch import load_file

from trl_diffusion import ChunkGRPOConfig

from .conftest import trainable


pytest.importorskip("schedulefree", reason="needs the package schedulefree")

SETTINGS = {"ema_decay": None, "max_steps": 3, "save_total_limit": None, "lr_scheduler_type": "constant"}


def run(kind, folder, optim, **settings):
    if optim.endswith("sgd"):
        settings["learning_rate"] = 1000  # gradients are about 1e-5
    if optim.endswith("radam"):
        settings["learning_rate"] = 1  # of which its first steps take little
        settings.setdefault("max_steps", 8)  # the first 5 change no weight
    trainer = make_trainer(kind, folder, **{**SETTINGS, "optim": optim, **settings})
    trainer.train(resume_from_checkpoint=(folder / "checkpoint-2").is_dir())
    return trainer


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


@pytest.mark.parametrize(
    ("kind", "optim"),
    [("chunk_grpo", "schedule_free_adamw"), ("srpo", "schedule_free_radam"), ("srpo", "schedule_free_sgd")],
)
def test_modes(tmp_path, kind, optim):
    whole = run(kind, tmp_path / "whole", optim)
    train = trainable(whole)

    # x of the paper, from y = (1 - beta) z + beta x; z is in the optimizer's state.
    (group,) = [group for group in whole.optimizer.param_groups if group["params"]]
    beta = group["momentum"] if optim.endswith("sgd") else group["betas"][0]
    z = {
        name: whole.optimizer.state[weight]["z"]
        for name, weight in whole.model.named_parameters()
        if weight.requires_grad
    }
    averaged = {name: (weight - (1 - beta) * z[name]) / beta for name, weight in train.items()}
    whole.save_model()
    exported = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for name, weight in averaged.items():
        torch.testing.assert_close(exported[name.replace(".default", "")], weight, rtol=1e-4, atol=1e-6)
    assert any((weight - train[name]).abs().max() > 1e-4 for name, weight in averaged.items())

    # Drawn with what is exported; the weights that are trained are the same bits afterwards.
    images = whole.generate(PROMPTS[:2], [0, 1])
    assert_equal(trainable(whole), train)
    plain = make_trainer(kind, tmp_path / "plain", **SETTINGS)
    with torch.no_grad():
        for name, weight in plain.model.named_parameters():
            if weight.requires_grad:
                weight.copy_(exported[name.replace(".default", "")])
    assert torch.equal(plain.generate(PROMPTS[:2], [0, 1]), images)

    # A run that is saved nowhere takes the same steps, and so does one that goes on from a checkpoint.
    assert_equal(trainable(run(kind, tmp_path / "unsaved", optim, save_strategy="no")), train)
    run(kind, tmp_path / "resumed", optim, max_steps=2)
    assert_equal(trainable(run(kind, tmp_path / "resumed", optim)), train)


def test_rollouts_are_of_the_weights_that_are_trained(tmp_path):
    trainer = run("chunk_grpo", tmp_path, "schedule_free_adamw", steps_per_generation=2, save_strategy="no")
    logs = [log for log in trainer.state.log_history if "rollout_logp_gap" in log]
    assert len(logs) == 3
    assert all(log["ratio/mean"] == 1 and log["rollout_logp_gap"] < 1e-5 for log in logs)


def test_a_checkpoint_without_the_trained_weights_is_refused(tmp_path):
    run("srpo", tmp_path, "adamw_torch", max_steps=1)
    trainer = make_trainer("srpo", tmp_path, **SETTINGS, optim="schedule_free_sgd")
    with pytest.raises(ValueError, match="checkpoint-1 .*: optim was 'adamw_torch' and is 'schedule_free_sgd'"):
        trainer.train(resume_from_checkpoint=True)
    run("srpo", tmp_path / "cut", "schedule_free_sgd", max_steps=1)
    (tmp_path / "cut" / "checkpoint-1" / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match="is no whole checkpoint: .*trained.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "schedule_free_adamw"}
    with pytest.raises(ValueError, match="averages the weights itself, so ema_decay=0.9 would average twice"):
        ChunkGRPOConfig(**settings, ema_decay=0.9)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="optim='schedule_free_adamw' has train and eval modes.*Use multi_gpu"):
        ChunkGRPOConfig(**settings)
