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

"""The denoiser's attention by another backend of diffusers, in rollouts and in training."""

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from safetensors.torch import load_file


def trained(make_trainer, folder, **settings):
    trainer = make_trainer(max_steps=1, output_dir=str(folder), logging_steps=1, **settings)
    trainer.train()
    trainer.save_model()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return load_file(folder / "adapter_model.safetensors"), log


def test_another_backend_trains_alike(make_trainer, tmp_path, monkeypatch):
    used = []

    def noting(query, *args, backend=None, **kwargs):
        used.append((torch.is_grad_enabled(), backend))
        return dispatch_attention_fn(query, *args, backend=backend, **kwargs)

    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.dispatch_attention_fn", noting)
    plain, _ = trained(make_trainer, tmp_path / "plain")
    assert {backend for _, backend in used} == {None}
    used.clear()
    other, log = trained(make_trainer, tmp_path / "other", attention_backend="_native_math")
    assert set(used) == {(False, "_native_math"), (True, "_native_math")}
    assert log["ratio/mean"] == 1
    # The same mathematics in another order.
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-4)
    # Other models of this process keep theirs.
    used.clear()
    trained(make_trainer, tmp_path / "later")
    assert {backend for _, backend in used} == {None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash-attention", r"'flash-attention' is not known to diffusers. Choose one of flash,.* native,"),
        ("sage", r"'sage' cannot be used here: .*sageattention.*leave attention_backend unset"),
    ],
)
def test_what_is_not_there_is_refused_before_weights_are_loaded(make_trainer, monkeypatch, name, message):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never)
    with pytest.raises(ValueError, match=message):
        make_trainer(attention_backend=name)


def test_a_network_without_backends_is_named(make_trainer):
    with pytest.raises(ValueError, match="'native' has no effect on a SD3Transformer2DModel"):
        make_trainer("sd3", attention_backend="native")
