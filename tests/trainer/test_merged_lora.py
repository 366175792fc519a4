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

"""Rollouts with the LoRA in the weights of its layers."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from trl_diffusion.runtime.policies import REFERENCE
from trl_diffusion.runtime.term_trainer import merged_adapter


STRONG = LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_v"], init_lora_weights=False)


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.network.named_parameters()}


def forward(trainer):
    torch.manual_seed(0)
    latents = trainer.image_sampler.draw_noise([torch.Generator().manual_seed(i) for i in range(2)])
    conditioning = trainer.conditioning.get(["a cat", "a dog"])
    with torch.no_grad():
        return trainer.velocity(trainer.network, latents, torch.full((2,), 0.5), conditioning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_velocity_and_weights_return_bit_for_bit(make_trainer, dtype):
    trainer = make_trainer(peft_config=copy.deepcopy(STRONG))
    trainer.network.eval().to(dtype)
    trainer.flow.dtype = dtype
    before, expected = weights(trainer), forward(trainer)
    with trainer.adapter_off():
        base = forward(trainer)
    with merged_adapter(trainer.network):
        actual = forward(trainer)
        assert any(not torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    size = (expected - base).abs().max()
    assert (actual - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) * size
    after = weights(trainer)
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert torch.equal(forward(trainer), expected)


def test_an_error_leaves_nothing_behind(make_trainer):
    trainer = make_trainer(peft_config=copy.deepcopy(STRONG))
    trainer.network.eval()
    before, expected = weights(trainer), forward(trainer)
    with pytest.raises(KeyboardInterrupt), merged_adapter(trainer.network):
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    assert torch.equal(forward(trainer), expected)


def test_an_adapter_that_is_off_stays_off(make_trainer):
    trainer = make_trainer(peft_config=copy.deepcopy(STRONG))
    trainer.network.eval()
    with trainer.policies.use(REFERENCE):
        base = forward(trainer)
        with merged_adapter(trainer.network):
            assert torch.equal(forward(trainer), base)


@pytest.mark.parametrize(
    "settings",
    [{}, {"steps_per_generation": 4}, {"beta": 0.1}, {"ema_decay": 0.9}],
    ids=lambda s: ",".join(s) or "plain",
)
def test_trains_alike(make_trainer, tmp_path, settings):
    def trained(folder, **more):
        trainer = make_trainer(
            output_dir=str(tmp_path / folder), peft_config=copy.deepcopy(STRONG), max_steps=3, logging_steps=1,
            per_device_train_batch_size=2, **settings, **more,
        )  # fmt: skip
        seen = set()  # gradient, merged
        layer = trainer.network.base_model.model.transformer_blocks[0].attn.to_q
        layer.register_forward_hook(lambda layer, *_: seen.add((torch.is_grad_enabled(), layer.merged)))
        trainer.train()
        trainer.save_model()
        return load_file(tmp_path / folder / "adapter_model.safetensors"), trainer.state.log_history, seen

    plain, plain_log, seen = trained("plain")
    assert seen == {(False, False), (True, False)}
    actual, log, seen = trained("merged", rollout_merged_lora=True)
    # Old log-probabilities and those of the reference are of the network that is trained.
    assert seen == {(False, True), (True, False)} | (
        {(False, False)} if {"steps_per_generation", "beta"} & settings.keys() else set()
    )
    torch.testing.assert_close(actual, plain, rtol=0, atol=2e-3)
    assert log[0]["ratio/mean"] == 1 and log[0]["log_ratio/abs_max"] == 0
    assert log[0]["reward"] == pytest.approx(plain_log[0]["reward"], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"old_log_probs": "rollout"}, "old_log_probs='rollout': the merged network rounds otherwise"),
        ({"peft_config": False}, "with peft_config=False: there is no LoRA to merge"),
        ({"quantization": "int8", "model": "shapes"}, "with quantization='int8': a sum with quantised weights"),
    ],
)
def test_refused_where_there_is_nothing_to_merge_or_nothing_recomputed(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(rollout_merged_lora=True, **settings)
