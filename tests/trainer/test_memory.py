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
Quantised frozen weights, AdamW with 8-bit states, and frozen modules that are moved to the accelerator for their phase
only.
"""

import contextlib

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import tiny_flux_pipeline

from trl_diffusion import SRPOConfig, SRPOTrainer
from trl_diffusion.models.quantization import quantization_config
from trl_diffusion.rewards import RewardModel


pytest.importorskip("torchao", reason="needs the extra 'quantization'")


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_flux_pipeline(seed=0).save_pretrained(folder)
    return str(folder)


def quantised(folder):
    return FluxPipeline.from_pretrained(
        folder, quantization_config=quantization_config("int8"), torch_dtype=torch.float32
    )


@pytest.mark.parametrize("loaded", [False, True], ids=["setting", "pipeline"])
def test_lora_on_int8_weights_trains_and_exports(make_trainer, saved_pipeline, tmp_path, loaded):
    if loaded:
        trainer = make_trainer(model=quantised(saved_pipeline))
    else:
        trainer = make_trainer(model=saved_pipeline, quantization="int8")
    layer = trainer.model.base_model.model.transformer_blocks[0].attn.to_k
    assert type(layer.weight).__name__ == "Int8Tensor"
    before = layer.weight.dequantize().clone()
    plain = FluxPipeline.from_pretrained(saved_pipeline)
    # Rounded to 8 bits, a scale for each output channel.
    exact = plain.transformer.transformer_blocks[0].attn.to_k.weight
    assert 0 < (before - exact).abs().max() <= exact.abs().max() / 127

    trainer.train()
    trainer.save_model()
    assert torch.equal(layer.weight.dequantize(), before)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["grad_norm"] > 0 and entry["ratio/mean"] == pytest.approx(1) for entry in logs)

    # The LoRA is one for the plain pipeline.
    saved = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    plain.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
    found = plain.transformer.transformer_blocks[0].attn.to_q.lora_B["default_0"].weight
    torch.testing.assert_close(found, saved["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"])


def test_quantised_weights_cannot_be_trained(make_trainer, saved_pipeline):
    with pytest.raises(ValueError, match="quantization='int8' with peft_config=False"):
        make_trainer(model=saved_pipeline, quantization="int8", peft_config=False)
    with pytest.raises(ValueError, match="transformer is quantised"):
        make_trainer(model=quantised(saved_pipeline), peft_config=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, "'nf4', 'int8'"),
        ({"quantization": "nf4"}, "needs an accelerator"),
        ({"quantization": "int8"}, "still to be loaded"),
    ],
)
def test_impossible_quantisation_is_refused(make_trainer, saved_pipeline, settings, message):
    model = tiny_flux_pipeline() if settings == {"quantization": "int8"} else saved_pipeline
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model, **settings)


# ---- AdamW with 8-bit states ----


def wide_flux_pipeline():
    """A pipeline whose weights, and a LoRA's of rank 32 on them, have the 4096 values from which states are quantised."""
    pipeline = tiny_flux_pipeline(seed=0)
    wider = {"attention_head_dim": 32, "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12)}
    pipeline.transformer = FluxTransformer2DModel.from_config({**pipeline.transformer.config, **wider})
    return pipeline


def bytes_of_states(optimizer):
    """Of an optimizer's moments, with their scales and tables; torchao's are tensors made of tensors."""
    total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor):
                inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
                total += sum(getattr(value, part).nbytes for part in inner) or value.nbytes
    return total


def expected_bytes(count):
    """Two moments: a byte a value, a float32 scale for each block of 256 and a table of 256 float32; small ones whole."""
    return 2 * (count + 4 * count // 256 + 4 * 256) if count >= 4096 else 8 * count


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_bnb_8bit"])
def test_adamw_with_8_bit_states(make_trainer, tmp_path, optim, lora):
    eager = contextlib.nullcontext()
    if optim == "adamw_bnb_8bit":
        # Older releases have no kernels for the CPU.
        pytest.importorskip("bitsandbytes", "0.50.2", reason="needs the extra 'quantization': 125 MB")
    else:
        # torchao compiles its update for each shape of a weight: the same update, a minute later.
        eager = torch.compiler.set_stance("force_eager")

    def run(name, optim, **settings):
        torch.manual_seed(0)
        trainer = make_trainer(
            model=wide_flux_pipeline(),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_v"]) if lora else False,
            output_dir=str(tmp_path / name), optim=optim, learning_rate=1e-3, save_strategy="steps", save_steps=1,
            num_inference_steps=3, chunk_sizes=[1, 1],
        )  # fmt: skip
        before = flat(trainer)
        trainer.train(**settings)
        return trainer, flat(trainer), before

    def flat(trainer):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    _, exact, before = run("exact", "adamw_torch")
    with eager:
        trainer, found, _ = run("8bit", optim)
        resume_from = str(tmp_path / "8bit" / "checkpoint-1")
        _, resumed, _ = run("resumed", optim, resume_from_checkpoint=resume_from)

    counts = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    bytes_of_state = bytes_of_states(trainer.optimizer.optimizer)
    assert bytes_of_state == sum(map(expected_bytes, counts))
    # The tables and small tensors that keep these above two bytes do not grow with the network.
    assert bytes_of_state < 2.6 * sum(counts)
    saved = [(tmp_path / run / "checkpoint-2" / "optimizer.pt").stat().st_size for run in ("8bit", "exact")]
    assert saved[0] < 0.4 * saved[1]

    change = (exact - before).norm()
    assert change > 1e-3 * before.norm()
    assert 0 < (found - exact).norm() < 0.02 * change
    assert torch.equal(resumed, found)


# ---- Frozen modules on the CPU while they rest ----


class Moved(RewardModel):
    """Red over blue, and a record of what is done with it."""

    name = "moved"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.events = []

    def to(self, device):
        self.events.append("back" if device == "cpu" else "there")
        return super().to(device)

    def score(self, images, prompts):
        self.events.append("score")
        if images.requires_grad:
            images.register_hook(lambda gradient: self.events.append("backward"))
        return self.weight * (images[:, 0] - images[:, 2]).mean((1, 2))


def uses_between_moves(events):
    """What happens from each move to the accelerator to the next move back; nothing may happen elsewhere."""
    stays, inside = [], False
    for event in events:
        if event == "there":
            assert not inside
            inside = True
            stays.append([])
        elif event == "back":
            inside = False
        else:
            assert inside, f"{event} while the reward is on the CPU"
            stays[-1].append(event)
    assert not inside
    return stays


def test_rewards_are_moved_for_their_phase_only(make_trainer):
    reward = Moved()
    trainer = make_trainer(reward_funcs=reward, offload_frozen=True)
    trainer.train()
    # Two micro-batches an optimizer step make one generation: scored twice in one stay.
    assert uses_between_moves(reward.events) == [["score", "score"]] * 2


def test_a_differentiable_reward_stays_for_the_backward_pass(train_dataset, tmp_path):
    reward = Moved()
    config = SRPOConfig(
        output_dir=str(tmp_path), num_inference_steps=4, height=32, width=32, max_steps=1, num_landings=1,
        per_device_train_batch_size=2, save_strategy="no", use_cpu=True, disable_tqdm=True, cache_prompt_embeds=False,
        offload_frozen=True,
    )  # fmt: skip
    trainer = SRPOTrainer(tiny_flux_pipeline(seed=0), reward, config, train_dataset)
    trainer.train()
    check, rollout, *update = uses_between_moves(reward.events)
    assert (check, rollout) == (["score", "backward"], ["score"])
    # Two branches, each with the positive and the negative words.
    assert [sorted(events) for events in update] == [["backward"] * 4 + ["score"] * 4]


def test_offloading_changes_no_result(make_trainer, tmp_path):
    images = {}
    for offload in (False, True):
        trainer = make_trainer(
            reward_funcs="shapes-clip", offload_frozen=offload, output_dir=str(tmp_path / str(offload))
        )
        trainer.train()
        images[offload] = trainer.generate(["a cat"], [0])
    assert torch.equal(images[False], images[True])
