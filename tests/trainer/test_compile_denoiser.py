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

"""Blocks of the denoiser that are compiled, in rollouts, updates and evaluations alike."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_sana_pipeline

from trl_diffusion import ChunkGRPOConfig
from trl_diffusion.models import Sampler, load_flow_model
from trl_diffusion.trainer.network import compile_blocks, compiled_graphs


# A pass through a generation after the update of the one before, rollouts and updates of other batch sizes.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 4,
    "rollout_batch_size": 3,
    "chunk_sampling": [0, 1],
    "logging_steps": 1,
}


@pytest.fixture(autouse=True)
def graphs_are_of_one_test():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.timeout(900)  # tracing is slow
def test_trains_alike(make_trainer, train_dataset, tmp_path):
    """With PyTorch's tracing and its own kernels; the compiler of the kernels has a test of its own."""

    def trained(folder, checkpoint=None, **settings):
        trainer = make_trainer(
            output_dir=str(tmp_path / folder), max_steps=5, **SETTINGS, eval_dataset=train_dataset,
            eval_strategy="steps", eval_steps=2, num_eval_images=3, save_strategy="steps", save_steps=1, **settings,
        )  # fmt: skip
        transition, gradients = trainer._transition, set()
        trainer._transition = lambda *args: gradients.add(torch.is_grad_enabled()) or transition(*args)
        trainer.train(resume_from_checkpoint=checkpoint)
        # Old log-probabilities come from the very graph of the update.
        assert gradients == ({True} if "compile_denoiser" in settings else {True, False})
        trainer.save_model()
        return [log for log in trainer.state.log_history if "loss" in log]

    plain = trained("plain")
    compiled = {"compile_denoiser": True, "torch_compile_backend": "aot_eager"}
    logs = trained("compiled", **compiled)
    # All that is to come has been compiled with the first two generations and the first evaluation.
    assert 0 < logs[0]["compiled_graphs"] <= logs[2]["compiled_graphs"] == logs[4]["compiled_graphs"] <= 24
    # Exactly: a generation is compared with itself until its first update.
    for log in (logs[0], logs[2], logs[4]):
        assert log["ratio/mean"] == 1 and log["log_ratio/abs_max"] == 0
    for a, b in zip(plain, logs, strict=True):
        assert a.get("reward") == pytest.approx(b.get("reward"), abs=1e-4)
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    actual = load_file(tmp_path / "compiled" / "adapter_model.safetensors")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # Within a generation.
    trained("resumed", str(tmp_path / "compiled" / "checkpoint-3"), **compiled)
    resumed = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert all(torch.equal(weight, actual[name]) for name, weight in resumed.items())


def test_the_compiler_of_kernels():
    """Sana is of those that do not tell diffusers which blocks are repeated."""
    flow_model = load_flow_model(tiny_sana_pipeline())
    sampler = Sampler.from_settings(flow_model, num_inference_steps=2, height=32, width=32, guidance_scale=1.0)
    prompts = ["a cat", "a dog"]
    expected = torch.cat(list(sampler.draw_latents(prompts, [0, 1])))
    names = list(flow_model.denoiser.state_dict())
    compile_blocks(flow_model.denoiser)
    sampler.batch_size = 2
    actual = torch.cat(list(sampler.draw_latents(prompts, [0, 1])))
    assert compiled_graphs() > 0
    assert list(flow_model.denoiser.state_dict()) == names
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_refused_beside_a_compiled_whole(make_trainer):
    with pytest.raises(
        ValueError, match="compile_denoiser=True compiles the denoiser's blocks, and torch_compile=True"
    ):
        make_trainer(compile_denoiser=True, torch_compile=True)


class Block(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1


def test_batches_of_any_size_have_one_graph():
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([Block()])
    compile_blocks(network, backend="eager")
    for size in (4, 5, 7):
        network.blocks[0](torch.ones(size, 3))
    assert compiled_graphs() == 1


def test_more_ways_than_pytorch_compiles_by_default():
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([Block()])
    compile_blocks(network, backend="eager")
    ways = 10  # by default 8
    for rank in range(1, 1 + ways):
        assert network.blocks[0](torch.ones([2] * (rank - 1) + [4])).isfinite().all()
    assert compiled_graphs() == ways


def test_how_it_compiles_does_not_compile_the_whole(tmp_path):
    how = {"torch_compile_backend": "aot_eager", "torch_compile_mode": "default"}
    config = ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, compile_denoiser=True, **how)
    assert not config.torch_compile
    assert {name: getattr(config, name) for name in how} == how
