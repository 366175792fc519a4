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
"""A plan against what runs really allocate and compute."""

import dataclasses
import functools
import gc
import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import FluxPipeline, Krea2Transformer2DModel
from peft import LoraConfig
from tiny_models import (
    tiny_chroma_pipeline,
    tiny_flux2_klein_pipeline,
    tiny_flux2_pipeline,
    tiny_flux_kontext_pipeline,
    tiny_flux_pipeline,
    tiny_krea2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sana_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOTrainer
from trl_diffusion.cli.plan import DOES_NOT_FIT_STATUS, main, memory_size, sharding_of
from trl_diffusion.models import load_flow_model
from trl_diffusion.planning.configurations import fake_flow_model, read_configurations
from trl_diffusion.planning.counting import Counter, Tally
from trl_diffusion.planning.plan import CONTEXT_BYTES, FRAGMENTATION, Planner
from trl_diffusion.planning.published import PUBLISHED
from trl_diffusion.rewards import RewardModel


FAMILIES = {
    "flux": tiny_flux_pipeline,
    "sd3": tiny_sd3_pipeline,
    "qwen-image": tiny_qwen_image_pipeline,
    "chroma": tiny_chroma_pipeline,
    "sana": tiny_sana_pipeline,
    "krea2": tiny_krea2_pipeline,
    "flux2": tiny_flux2_pipeline,
    "flux2-klein": tiny_flux2_klein_pipeline,
    "z-image": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
}
LORA = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"])


def deeper_pipeline(**changes):
    """The tiny FLUX with another network."""
    pipeline = tiny_flux_pipeline()
    config = {**pipeline.transformer.config, **changes}
    torch.manual_seed(0)
    return FluxPipeline(**{**pipeline.components, "transformer": type(pipeline.transformer).from_config(config)})


def medium_pipeline():
    """Large enough that nothing but the network matters."""
    return deeper_pipeline(num_layers=2, num_single_layers=3, num_attention_heads=16)


@pytest.fixture
def saved(tmp_path):
    """Saves a pipeline, whose configurations are read then."""

    def save(pipeline):
        pipeline.save_pretrained(tmp_path / "pipeline")
        return tmp_path / "pipeline"

    return save


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_counted_is_what_the_real_modules_do(saved, family):
    """Forward, update and decode of each family, real tensors against those without memory."""
    pipeline = FAMILIES[family]()
    real = load_flow_model(pipeline)
    row, (found,) = real.empty_row(), real.encode_rows(["a cat"])
    assert {name: tensor.dtype for name, tensor in row.items()} == {n: t.dtype for n, t in found.items()}
    for name, tensor in row.items():
        assert tensor.shape[name in real.variable_length :] == found[name].shape[name in real.variable_length :]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_flow_model(read_configurations(saved(pipeline)), mode, torch.float32)
    fake.max_sequence_length = real.max_sequence_length = min(real.max_sequence_length, 64)
    real.row_lengths = fake.row_lengths
    num_frames = None if real.default_num_frames is None else 5
    if family == "sd3":  # whose tokenizers are tiny too
        fake.pipeline.tokenizer_max_length = real.pipeline.tokenizer_max_length
    side = 2 * real.latent_downsample
    costs = []
    for flow_model, tensors in ((real, nullcontext()), (fake, mode)):
        next(p for name, p in flow_model.denoiser.named_parameters() if "to_q" in name).requires_grad_(True)
        flow_model.enable_gradient_checkpointing()
        counter = Counter(
            flow_model, tensors, flow_model.denoiser, (side, 2 * side), flow_model.default_guidance_scale,
            num_frames=num_frames,
        )  # fmt: skip
        costs.append([counter.forward(2), counter.update(2), counter.decode(1)])
    for a, b in zip(*costs, strict=True):
        assert a.flops == b.flops > 0
        # Networks this small hold little but what a block needs at once; see the medium ones below.
        assert b.bytes == pytest.approx(a.bytes, rel=0.15)


def test_the_image_that_is_edited_is_counted(saved):
    """About a million pixels beside those that are drawn."""
    costs = []
    for build in (tiny_flux_pipeline, tiny_flux_kontext_pipeline):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        flow_model = fake_flow_model(read_configurations(saved(build())), mode, torch.float32)
        flow_model.max_sequence_length = 48
        costs.append(Counter(flow_model, mode, flow_model.denoiser, (64, 64), 3.5).forward(1))
    plain, editing = costs
    assert editing.flops > 10 * plain.flops and editing.bytes > 10 * plain.bytes


def test_weights_have_the_dtypes_of_a_loaded_model(saved):
    """Krea 2 keeps its norms in float32."""
    folder = saved(tiny_krea2_pipeline())
    real = Krea2Transformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.bfloat16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_flow_model(read_configurations(folder), mode, torch.bfloat16).denoiser
    dtypes = {name: parameter.dtype for name, parameter in real.named_parameters()}
    assert {name: parameter.dtype for name, parameter in fake.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


def test_garbage_is_not_counted():
    """What is in a circle of references is gone before it makes a peak, and a peak stays."""
    gc.disable()
    try:
        with FakeTensorMode(), Tally([], fake=True) as tally:
            large = torch.empty(1000)
            del large
            circle = [torch.empty(600)]
            circle.append(circle)
            del circle
            last = torch.empty(500)  # with the circle more than the first
    finally:
        gc.enable()
    assert tally.peak == 4 * 1000 and tally.now == 4 * len(last)


def test_blocks_that_are_not_run_cost_what_the_others_do(saved):
    pipeline = deeper_pipeline(num_layers=5, num_single_layers=6)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    flow_model = fake_flow_model(read_configurations(saved(pipeline)), mode, torch.float32)
    flow_model.denoiser.transformer_blocks[0].attn.to_q.weight.requires_grad_(True)
    flow_model.enable_gradient_checkpointing()
    counter = Counter(flow_model, mode, flow_model.denoiser, (32, 32), 3.5)
    by_few = counter.forward(2), counter.update(2)
    assert len(flow_model.denoiser.transformer_blocks) == 5
    counter._by_blocks = lambda measure: measure()
    for few, all_ in zip(by_few, (counter.forward(2), counter.update(2)), strict=True):
        assert few.flops == all_.flops
        assert few.bytes == pytest.approx(all_.bytes, rel=0.02)


CHUNK_GRPO = {
    "num_inference_steps": 5, "chunk_sizes": [1, 3], "chunk_sampling": [1], "num_generations": 4,
    "gradient_accumulation_steps": 2,
}  # fmt: skip
SRPO = {"num_inference_steps": 3, "num_landings": 2, "preference": "absolute", "gradient_accumulation_steps": 2}
ALL_CHUNKS = {**CHUNK_GRPO, "chunk_sampling": "uniform", "chunk_fraction": 1.0}
RUNS = {
    "chunk_grpo": (ChunkGRPOTrainer, CHUNK_GRPO),
    "own-noise": (ChunkGRPOTrainer, {**ALL_CHUNKS, "shared_noise": "none"}),
    "off-policy": (
        ChunkGRPOTrainer,
        {**ALL_CHUNKS, "steps_per_generation": 4, "beta": 0.1, "chunk_gradient": "streamed", "max_steps": 2},
    ),
    "window": (
        ChunkGRPOTrainer,
        {
            "num_inference_steps": 5, "train_window": 2, "window_interval": 1, "stochastic_steps": "trained",
            "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
        },
    ),
    "srpo": (SRPOTrainer, SRPO),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "build", "peft_config"),
    [
        ("own-noise", tiny_flux_pipeline, LORA),
        ("window", tiny_flux_pipeline, LORA),
        ("off-policy", tiny_flux_pipeline, LORA),
        ("chunk_grpo", medium_pipeline, False),
        ("srpo", medium_pipeline, LORA),
    ],
)
def test_memory_and_work_are_those_of_a_run(saved, tmp_path, name, build, peft_config):
    trainer_class, settings = RUNS[name]
    pipeline = build()
    folder = saved(pipeline)
    # A trainer changes its settings.
    make_args = functools.partial(
        trainer_class.config_class, output_dir=str(tmp_path), use_cpu=True, height=64, width=64,
        per_device_train_batch_size=2, save_strategy="no", log_samples=False, disable_tqdm=True,
        **{"max_steps": 1, **settings},
    )  # fmt: skip
    args = make_args()
    planner = Planner(read_configurations(folder), args, [], peft_config)
    planner.flow_model.max_sequence_length = 48  # the tiny tokenizer's
    plan = planner.plan()

    live = []

    class Measured(trainer_class):
        def timed(self, phase, *how):
            if phase != "update":
                return super().timed(phase, *how)
            tensors = [*self.model.parameters(), *self.model.buffers(), *self.flow.vae.parameters()]
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            live.append(Tally([*tensors, *gradients]))
            return live[-1]

    trainer = Measured(
        pipeline,
        Brightness(),
        make_args(),
        Dataset.from_dict({"prompt": ["a cat", "a dog", "a bird", "a fish"]}),
        peft_config=peft_config,
    )
    trainer.train()
    # Again, since a count of operations keeps tensors alive.
    trainer = trainer_class(
        build(),
        Brightness(),
        make_args(),
        Dataset.from_dict({"prompt": ["a cat", "a dog", "a bird", "a fish"]}),
        peft_config=peft_config,
    )
    with FlopCounterMode(display=False) as flops:
        trainer.train()
    # The logged norm of a LoRA takes a few, and the reference is without it.
    rel = 0.01 if name == "off-policy" else 1e-3
    assert flops.get_total_flops() == pytest.approx(args.max_steps * sum(plan.work.values()), rel=rel)
    if name in ("chunk_grpo", "own-noise"):
        # All rows of the network: of the rollout and of the update.
        rows = planner.trained_rows_per_image
        logged = trainer.state.log_history[0]["forwards_per_image"]
        assert logged == pytest.approx(planner.forwards_per_image + rows)

    update = plan.phases["update"]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert update["trained weights"] == sum(4 * parameter.numel() for parameter in trained)
    frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    assert update.get("frozen weights", 0) == (0 if peft_config is False else sum(4 * p.numel() for p in frozen))
    states = trainer.optimizer.state.values()
    assert update["optimizer"] == sum(
        4 * state["exp_avg"].numel() + 4 * state["exp_avg_sq"].numel() for state in states
    )
    # From the second micro-batch on, gradients are there before.
    measured = live[1].peak
    assert measured == pytest.approx(update["activations"], rel=0.05 if build is medium_pipeline else 0.2)


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": False, "chunk_gradient": "streamed"}])
def test_a_remedy_gives_the_peak_that_it_says(saved, tmp_path, changes):
    """Each setting, with those before it, is written into the settings and planned again."""
    configurations = read_configurations(saved(deeper_pipeline(num_attention_heads=16)))
    configurations = dataclasses.replace(configurations, text_encoders={})
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "height": 64, "width": 64, "per_device_train_batch_size": 4,
        **CHUNK_GRPO, **changes,
    }  # fmt: skip
    planner = Planner(configurations, ChunkGRPOConfig(**settings), [], LORA)
    plan = planner.plan(memory=CONTEXT_BYTES + 1)
    assert not plan.fits and len(plan.remedies) >= 3
    peaks = [plan.peak, *(remedy.peak for remedy in plan.remedies)]
    assert peaks == sorted(peaks, reverse=True)
    found = []
    for remedy in plan.remedies:
        if remedy.settings.startswith("--"):
            break
        settings |= yaml.safe_load("{" + remedy.settings + "}")
        again = Planner(configurations, ChunkGRPOConfig(**settings), [], LORA).plan()
        assert again.peak == remedy.peak, remedy.settings
        found += remedy.settings.split(": ")[:1]
    assert found[0] == ("chunk_gradient" if not changes else "per_device_train_batch_size")
    just_enough = CONTEXT_BYTES + round(plan.peak / (1 - FRAGMENTATION)) + 1
    assert planner.plan(memory=just_enough).fits and not planner.plan(memory=just_enough - 2).fits


def run_plan(capsys, *arguments):
    status = main(arguments)
    return status, capsys.readouterr().out


@pytest.fixture
def config_file(tmp_path, saved):
    values = {
        "model_name_or_path": str(saved(tiny_flux_pipeline())), "dataset_name": "shapes", "reward_funcs": ["shapes-judge"],
        "height": 16, "width": 16, "num_inference_steps": 5, "chunk_sizes": [1, 3], "num_generations": 4,
        "per_device_train_batch_size": 4, "max_steps": 10, "bf16": False,
    }  # fmt: skip

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return str(path)

    return write


class TestCommand:
    def test_what_fits_and_what_does_not(self, capsys, config_file, tmp_path):
        numbers = tmp_path / "plan.json"
        status, output = run_plan(
            capsys, "chunk_grpo", "--config", config_file(), "--memory", "1100MB", "--json", str(numbers)
        )
        plan = json.loads(numbers.read_text())
        assert status == 0 and "it fits" in output and plan["fits"] and plan["remedies"] == []
        assert f"The peak is {plan['peak'] / 2**30:.1f} GiB" in output
        status, output = run_plan(capsys, "chunk_grpo", "--config", config_file(), "--memory", "1024MB")
        assert status == DOES_NOT_FIT_STATUS and "it does not fit" in output and "What would lower it" in output

    def test_hours_and_price(self, capsys, config_file):
        arguments = ["chunk_grpo", "--config", config_file(), "--tflops", "2", "--utilisation", "0.5", "--price", "3"]
        _, output = run_plan(capsys, *arguments, "--json", "-")
        plan = json.loads(output)
        seconds = 10 * sum(plan["work"].values()) / 1e12
        assert plan["hours"] == pytest.approx(seconds / 3600) and plan["price"] == pytest.approx(3 * plan["hours"])
        # Twice the accelerators do twice the images in the same time.
        two = ["--accelerate_config", "fsdp2", "--num_processes", "2"]
        _, output = run_plan(capsys, *arguments, *two, "--json", "-")
        shared = json.loads(output)
        assert shared["hours"] == pytest.approx(plan["hours"]) and shared["price"] == pytest.approx(2 * plan["price"])
        for part in ("frozen weights", "trained weights", "optimizer"):
            assert shared["phases"]["update"][part] == pytest.approx(plan["phases"]["update"][part] / 2, abs=1)

    def test_a_run_that_needs_its_processes(self, capsys, config_file):
        """One image a process: only together do they make a group."""
        settings = config_file(per_device_train_batch_size=1)
        with pytest.raises(SystemExit):
            main(["chunk_grpo", "--config", settings])
        assert "num_generations (4) must divide" in capsys.readouterr().err
        processes = ["--accelerate_config", "zero2", "--num_processes", "4"]
        status, output = run_plan(capsys, "chunk_grpo", "--config", settings, *processes)
        assert status == 0 and "The peak is" in output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["chunk_grpo", "--memory", "much"], "'much' is no size of a memory. Write it as 24GB."),
            (["chunk_grpo", "--tflops", "-1"], "'-1' is no number above 0."),
            (["grpo"], "invalid choice: 'grpo'"),
            (["chunk_grpo", "--num_processes", "0"], "num_processes must be at least 1, got 0"),
            (
                ["srpo", "--model_name_or_path", "no/such", "--dataset_name", "shapes", "--reward_funcs", "hpsv2"],
                "Without a network these are known: black-forest-labs/FLUX.1-dev",
            ),
        ],
    )
    def test_what_is_wrong_is_told(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_published_sizes(model):
    """Against what their makers say, in billions of weights; a model is named after it or its card tells it."""
    billions = {
        "FLUX.1-": 11.9, "medium": 2.24, "large": 8.06, "Qwen-Image": 20.4, "T2V-1.3B": 1.42, "T2V-14B": 14.3, "TI2V-5B": 5.0, "Chroma1": 8.9, "1.6B": 1.6, "Krea-2": 12.8,
        "FLUX.2-dev": 32.2, "4B": 3.9, "9B": 9.1, "Z-Image": 6.15,
    }  # fmt: skip
    expected = next(value for name, value in billions.items() if name in model)
    flow_model = fake_flow_model(
        read_configurations(model), FakeTensorMode(allow_non_fake_inputs=True), torch.bfloat16
    )
    is_distilled = any(name in model for name in ("urbo", "schnell", "klein-4B", "klein-9B"))
    assert flow_model.has_guidance == (not is_distilled)
    weights = sum(parameter.numel() for parameter in flow_model.denoiser.parameters())
    assert weights / 1e9 == pytest.approx(expected, rel=0.02)


def test_sizes_and_shardings():
    assert memory_size("24GB") == memory_size("24") == 24 * 2**30 and memory_size("512 MiB") == 2**29
    assert sharding_of("zero3") == ("zero3", 8) and sharding_of("multi_gpu")[0] == "multi_gpu"


def test_plans_compare(saved, tmp_path):
    """What can be said without counting: more rows need more, a moving average is a copy of what is trained."""
    configurations = read_configurations(saved(tiny_flux_pipeline()))
    args = ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, height=16, width=16, **CHUNK_GRPO)
    planner = Planner(configurations, args, [], LORA)
    plan = planner.plan()
    args.ema_decay = 0.9
    copies = planner._phases(planner.choices)["update"]["other policies"]
    assert copies == plan.phases["update"]["trained weights"]
    wider = planner._phases(dataclasses.replace(planner.choices, rollout_batch_size=16))
    assert wider["rollout"]["activations"] == 2 * plan.phases["rollout"]["activations"]
