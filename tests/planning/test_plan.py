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

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import FluxPipeline, FluxTransformer2DModel, Krea2Transformer2DModel
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
from trl_diffusion.planning.configurations import configurations_of, fake_flow_model, read_configurations
from trl_diffusion.planning.counting import Counter, Tally, only_what_is_new_is_collected
from trl_diffusion.planning.plan import CONTEXT_BYTES, FRAGMENTATION, Planner
from trl_diffusion.planning.published import PUBLISHED
from trl_diffusion.planning.rewards import reward_size
from trl_diffusion.rewards import RewardModel
from trl_diffusion.trainer import OnlineConfig
from trl_diffusion.trainer.network import DEFAULT_LORA


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
PROMPT = "a cat"
# Guided by a prompt of its own, which is as long here.
NEGATIVE = ("sd3", "qwen-image", "chroma", "sana", "krea2", "z-image", "wan")
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


@functools.cache
def checked_row(family):
    """The conditioning of the prompt, which has the form of the row that a plan takes: dtypes and, but for lengths, shapes."""
    flow_model = load_flow_model(FAMILIES[family]())
    row, (found,) = flow_model.empty_row(), flow_model.encode_rows([PROMPT])
    assert {name: tensor.dtype for name, tensor in row.items()} == {n: t.dtype for n, t in found.items()}
    for name, tensor in row.items():
        has_length = name in flow_model.variable_length
        assert tensor.shape[has_length:] == found[name].shape[has_length:]
    return found


def tallied(trainer_class):
    """The trainer, whose phases are counted: each time one begins, from what is there then."""

    class Tallied(trainer_class):
        tallies = {"rollout": [], "decode": [], "update": []}

        def timed(self, phase, *how):
            if phase not in self.tallies:
                return super().timed(phase, *how)
            tensors = [*self.model.parameters(), *self.model.buffers(), *self.flow.vae.parameters()]
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.tallies[phase].append(Tally([*tensors, *gradients]))
            return self.tallies[phase][-1]

    return Tallied


def assert_what_stays_is_planned(trainer, planned):
    trained = [parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad]
    frozen = [parameter.numel() for parameter in trainer.model.parameters() if not parameter.requires_grad]
    assert planned["trained weights"] == 4 * sum(trained) and planned.get("frozen weights", 0) == 4 * sum(frozen)
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned["optimizer"] == 4 * sum(moment.numel() for moment in moments)


@pytest.mark.parametrize("trainer_class", [ChunkGRPOTrainer, SRPOTrainer])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_family_does_what_is_planned(saved, tmp_path, family, trainer_class):
    """
    One optimizer step of each trainer on real tensors, against a plan without any. All prompts are one, since lengths differ
    in families that compute no more than a prompt has.
    """
    pipeline = FAMILIES[family]()
    side = 2 * load_flow_model(pipeline).latent_downsample
    args = trainer_class.config_class(
        output_dir=str(tmp_path), use_cpu=True, height=side, width=2 * side, per_device_train_batch_size=2, max_steps=1,
        save_strategy="no", log_samples=False, disable_tqdm=True, sigma_shift=None,
        num_frames=5 if family == "wan" else None, negative_prompt=PROMPT if family in NEGATIVE else None,
        **(SRPO if trainer_class is SRPOTrainer else CHUNK_GRPO),
    )  # fmt: skip
    planner = Planner(read_configurations(saved(pipeline)), args, [], LORA)
    # A plan takes the longest prompt.
    row = checked_row(family)
    planner.flow_model.max_sequence_length = planner.flow_model.row_length(row)
    planner.flow_model.empty_row = lambda: {
        name: torch.empty_like(tensor, device="cpu") for name, tensor in row.items()
    }
    plan = planner.plan()

    trainer = tallied(trainer_class)(
        pipeline, Brightness(), args, Dataset.from_dict({"prompt": [PROMPT] * 4}), peft_config=LORA
    )
    with Tally([]) as everything:
        trainer.train()
    assert everything.flops == pytest.approx(sum(plan.work.values()), rel=1e-3)
    for phase in ("rollout", "decode"):
        done = sum(tally.flops for tally in trainer.tallies[phase])
        assert done == pytest.approx(plan.work[phase], rel=1e-3), phase
    decode, update = plan.phases["decode"], plan.phases["update"]
    planned = decode["activations"] + decode.get("images", 0)
    assert trainer.tallies["decode"][0].peak == pytest.approx(planned, rel=0.05)
    # From the second micro-batch on, gradients are there before.
    planned = update["activations"] + update.get("embeddings", 0)
    assert trainer.tallies["update"][1].peak == pytest.approx(planned, rel=0.05)
    assert_what_stays_is_planned(trainer, update)


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


def test_the_collector_is_left_as_it_was():
    """What others froze stays so, and what they did not is looked through again."""
    frozen_before = gc.get_freeze_count()
    try:
        for frozen in (False, True):
            (gc.freeze if frozen else gc.unfreeze)()
            with only_what_is_new_is_collected():
                with FakeTensorMode(), Tally([], fake=True):
                    torch.empty(10)
                assert gc.get_freeze_count() > 0  # one inside another does not end it
            assert (gc.get_freeze_count() > 0) == frozen
    finally:
        if not frozen_before:
            gc.unfreeze()


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
        {
            **ALL_CHUNKS, "steps_per_generation": 4, "beta": 0.1, "chunk_gradient": "streamed", "num_iterations": 2,
            "max_steps": 4,
        },
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


@pytest.fixture
def planned_run(saved, tmp_path):
    """A run by its name, and the plan of it."""

    def make(name, pipeline, peft_config=LORA, wrap=lambda trainer_class: trainer_class):
        trainer_class, settings = RUNS[name]
        make_args = functools.partial(
            trainer_class.config_class, output_dir=str(tmp_path), use_cpu=True, height=64, width=64,
            per_device_train_batch_size=2, save_strategy="no", log_samples=False, disable_tqdm=True,
            **{"max_steps": 1, **settings},
        )  # fmt: skip
        args = make_args()
        planner = Planner(read_configurations(saved(pipeline)), args, [], peft_config)
        planner.flow_model.max_sequence_length = 48  # the tiny tokenizer's
        prompts = Dataset.from_dict({"prompt": ["a cat", "a dog", "a bird", "a fish"]})
        # A trainer changes its settings.
        trainer = wrap(trainer_class)(pipeline, Brightness(), make_args(), prompts, peft_config=peft_config)
        return trainer, planner

    return make


@pytest.mark.parametrize("name", ["own-noise", "window", "off-policy"])
def test_work_is_that_of_a_run(planned_run, name):
    """As PyTorch's own counter has it."""
    trainer, planner = planned_run(name, tiny_flux_pipeline())
    work = planner.plan().work
    with FlopCounterMode(display=False) as flops:
        trainer.train()
    # The logged norm of a LoRA takes a few, and the reference is without it.
    rel = 0.01 if name == "off-policy" else 1e-3
    assert flops.get_total_flops() == pytest.approx(trainer.args.max_steps * sum(work.values()), rel=rel)
    if name == "own-noise":
        # All rows of the network: of the rollout and of the update.
        logged = trainer.state.log_history[0]["forwards_per_image"]
        assert logged == pytest.approx(planner.workload.rollout_rows + planner.workload.trained_rows)


def test_memory_of_a_larger_network_that_trains_whole(planned_run):
    trainer, planner = planned_run("chunk_grpo", medium_pipeline(), False, tallied)
    update = planner.plan().phases["update"]
    trainer.train()
    assert trainer.tallies["update"][1].peak == pytest.approx(update["activations"], rel=0.05)
    assert_what_stays_is_planned(trainer, update)


def test_a_remedy_gives_the_peak_that_it_says(saved, tmp_path):
    """Each setting, with those before it, is written into the settings and planned again."""
    configurations = read_configurations(saved(deeper_pipeline(num_attention_heads=16)))
    configurations = dataclasses.replace(configurations, text_encoders={})
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "height": 64, "width": 64, "per_device_train_batch_size": 4,
        "activation_checkpointing": False, **CHUNK_GRPO,
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
    assert found[0] == "chunk_gradient" and {"activation_checkpointing", "per_device_train_batch_size"} <= set(found)
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


def test_the_weights_of_a_reward_that_is_passed_are_counted_in_their_dtype():
    reward = Brightness()
    reward.narrow = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    reward.wide = torch.nn.Parameter(torch.zeros(3))
    assert reward_size(reward, FakeTensorMode()).bytes == 10 * 2 + 3 * 4


def test_plans_compare(saved, tmp_path):
    """What can be said without counting: more rows need more, a moving average is a copy of what is trained."""
    configurations = read_configurations(saved(tiny_flux_pipeline()))
    args = ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, height=16, width=16, **CHUNK_GRPO)
    planner = Planner(configurations, args, [], LORA)
    plan = planner.plan()
    args.ema_decay = 0.9
    copies = planner._phases(planner.choices)["update"]["other policies"]
    assert copies == plan.phases["update"]["trained weights"]
    args.max_steps, args.logging_steps = 1000, 1
    args.samples_total_limit = None
    everything = planner._disk()["samples"]
    args.samples_total_limit = 20
    assert planner._disk()["samples"] * 50 == everything
    on_cpu = planner._phases(dataclasses.replace(planner.choices, encode_on_cpu=True))
    assert "text encoders" in plan.phases["prompts"] and "text encoders" not in on_cpu["prompts"]
    wider = planner._phases(dataclasses.replace(planner.choices, rollout_batch_size=16))
    assert wider["rollout"]["activations"] == pytest.approx(2 * plan.phases["rollout"]["activations"], rel=0.02)


def make_trainer(folder, name, pipeline, peft_config=None):
    trainer_class, settings = RUNS[name]
    args = trainer_class.config_class(
        output_dir=str(folder), use_cpu=True, height=16, width=16, per_device_train_batch_size=2, **settings
    )
    return trainer_class(
        pipeline, "shapes-clip", args, Dataset.from_dict({"prompt": ["a cat", "a dog"]}), peft_config=peft_config
    )


@pytest.mark.parametrize(("name", "peft_config"), [("chunk_grpo", None), ("srpo", False)])
def test_a_trainer_prints_its_plan(tmp_path, capsys, name, peft_config):
    """That of the command for the same settings, before the training; small networks need none."""
    make_trainer(tmp_path, name, tiny_flux_pipeline(), peft_config)
    assert "The peak is" not in capsys.readouterr().out
    pipeline = deeper_pipeline(num_attention_heads=128, num_layers=2, num_single_layers=2)
    assert pipeline.transformer.num_parameters() > 100e6
    trainer_class, settings = RUNS[name]
    args = trainer_class.config_class(
        output_dir=str(tmp_path), use_cpu=True, height=16, width=16, per_device_train_batch_size=2, **settings
    )
    lora = LoraConfig(**DEFAULT_LORA) if peft_config is None else peft_config
    plan = Planner(configurations_of(pipeline), args, ["shapes-clip"], lora).plan()
    make_trainer(tmp_path, name, pipeline, peft_config)
    assert capsys.readouterr().out.startswith(plan.summary)


class LooksAtItsValues(FluxTransformer2DModel):
    def forward(self, hidden_states, *args, **kwargs):
        assert hidden_states.abs().max().item() >= 0  # which tensors without memory cannot tell
        return super().forward(hidden_states, *args, **kwargs)


def test_a_run_that_cannot_be_planned_is_trained_all_the_same(tmp_path, capsys, caplog):
    pipeline = deeper_pipeline(num_attention_heads=128, num_layers=2, num_single_layers=2)
    pipeline.transformer.__class__ = LooksAtItsValues
    trainer = make_trainer(tmp_path, "chunk_grpo", pipeline)
    assert "What the run needs could not be planned" in caplog.text and "The peak is" not in capsys.readouterr().out
    assert trainer.has_adapter


def test_a_method_that_does_not_tell_its_workload_is_refused(tmp_path):
    with pytest.raises(ValueError, match="OnlineConfig does not tell its workload"):
        Planner(read_configurations("shapes"), OnlineConfig(output_dir=str(tmp_path), use_cpu=True), [], LORA)
