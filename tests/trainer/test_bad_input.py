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

"""Bad input ends early, with an error that names the value and the remedy."""

import os
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import LoHaConfig, LoraConfig
from transformers import TrainingArguments

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig
from trl_diffusion.trainer.config_checks import CANNOT_ACT

from .conftest import redness


# Settings of transformers that act in the trainers, or say what happens anyway (do_train, do_eval).
ACT = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing gradient_checkpointing torch_compile
    torch_compile_backend torch_compile_mode logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start save_only_model
    save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
    """.split()
)


def never_loaded(*args, **kwargs):
    raise AssertionError("weights were loaded")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_generations": 3}, r"num_generations \(3\) must divide the generation batch \(8 images"),
        ({"chunk_sizes": [2, 3, 4]}, "sum to 9, but num_inference_steps=17 has 16 trainable transitions"),
        ({"chunk_sizes": [0, 16]}, "must all be at least 1"),
        ({"chunk_sizes": "equal:0"}, "'equal:N' or 'temporal', got 'equal:0'"),
        ({"chunk_sizes": "temporal", "num_chunks": 9}, "num_chunks=9 chunks of at least min_chunk_size=2"),
        ({"chunk_sampling": "random"}, "'uniform', 'temporal' or a list of chunk indices, got 'random'"),
        ({"chunk_sampling": [0, 4]}, "must name distinct chunks among 0 to 3"),
        ({"chunk_fraction": 0.0}, r"chunk_fraction must lie in \(0, 1\], got 0.0"),
        ({"sde_type": "ode"}, "sde_type must be one of 'flow', 'dance', 'cps', got 'ode'"),
        ({"eta": 0.0}, "eta must be above 0, got 0.0"),
        ({"sde_type": "cps", "eta": 1.5}, "and at most 1, got 1.5"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"beta": -1.0}, "beta must not be negative"),
        (
            {"train_window": 2, "chunk_sizes": [2, 3, 4, 7]},
            r"chunk_sizes=\[2, 3, 4, 7\] cannot act: train_window=2 says",
        ),
        ({"train_window": 2, "chunk_sampling": "uniform"}, "chunk_sampling='uniform' cannot act: train_window=2 says"),
        ({"train_window": 2, "chunk_fraction": 1.0}, "chunk_fraction=1.0 cannot act: train_window=2"),
        ({"train_window": 2, "num_chunks": 3}, "num_chunks=3 cannot act: train_window=2"),
        ({"train_window": 17}, "between 1 and the 16 trainable transitions of num_inference_steps=17.*, got 17"),
        ({"train_window": 0}, "between 1 and the 16 trainable transitions of num_inference_steps=17.*, got 0"),
        ({"train_window": 2, "window_chunk": 3}, "window_chunk must lie between 1 and train_window=2, got 3"),
        ({"train_window": 2, "window_stride": 0}, "window_stride must be at least 1, got 0"),
        ({"train_window": 2, "window_interval": 0}, "window_interval must be at least 1, got 0"),
        (
            {"train_window": 2, "window_schedule": "ring"},
            "window_schedule must be one of 'sliding', 'random', got 'ring'",
        ),
        (
            {"train_window": 2, "window_schedule": "random", "window_stride": 2},
            "window_stride=2 cannot act: window_schedule='random'",
        ),
        ({"window_chunk": 2}, "window_chunk=2 cannot act: train_window is not set"),
        ({"window_schedule": "random"}, "window_schedule='random' cannot act: train_window is not set"),
        ({"stochastic_steps": "none"}, "stochastic_steps must be one of 'all', 'trained', got 'none'"),
        (
            {"stochastic_steps": "trained", "num_inference_steps": 10},
            "'trained' cannot be used with chunk_sizes='temporal'",
        ),
        ({"stochastic_steps": "trained", "chunk_sampling": "temporal"}, "with chunk_sampling='temporal'"),
        ({"trust_region": "ppo"}, "trust_region must be one of 'clip', 'kl', 'guard', got 'ppo'"),
        ({"trust_region": "kl", "epsilon": 1e-4}, "epsilon=0.0001 cannot act: trust_region='kl' clips no ratio"),
        ({"trust_region": "kl", "epsilon_high": 1e-4}, "epsilon_high=0.0001 cannot act: trust_region='kl'"),
        ({"trust_region": "kl", "kl_threshold": 0.0}, "kl_threshold must be above 0, got 0.0"),
        (
            {"trust_region": "guard", "kl_threshold": 1e-4},
            "kl_threshold=0.0001 cannot act: trust_region='guard' clips",
        ),
        ({"kl_threshold": 1e-4}, "kl_threshold=0.0001 cannot act: trust_region='clip' clips ratios"),
        ({"trust_region": "guard", "old_log_probs": "rollout"}, "'guard' cannot be used with old_log_probs='rollout'"),
        ({"loss_weighting": "size"}, "loss_weighting must be one of 'inverse_chunk_size', got 'size'"),
        (
            {"loss_weighting": "inverse_chunk_size", "chunk_sizes": "equal:1"},
            "cannot act on chunks of one step.*chunk_sizes",
        ),
        (
            {"loss_weighting": "inverse_chunk_size", "train_window": 3},
            "cannot act on chunks of one step.*window_chunk",
        ),
        ({"num_inference_steps": 1}, "num_inference_steps must be at least 2"),
        ({"sigma_shift": 0.0}, "sigma_shift must be above 0"),
        ({"shared_noise": "all"}, "shared_noise must be one of 'group', 'none'"),
        ({"generation_batch_size": 12}, r"\(12\) must be divisible by"),
        ({"generation_batch_size": 16, "steps_per_generation": 1}, "contradict each other"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported.*per_device_train_batch_size"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config has dispatch_batches=True"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config has split_batches=True"),
        (
            {"negative_prompt": "dull", "guidance_scale": 1.0},
            "negative_prompt='dull' has no effect at guidance_scale=1.0",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ChunkGRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **settings)


@pytest.mark.parametrize("name", sorted(set(CANNOT_ACT) & {field.name for field in fields(TrainingArguments)}))
def test_settings_that_cannot_act(name, tmp_path):
    default = vars(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))[name]
    others = {bool: not default, str: "batch_rebalance", int: 3, list: ["loss"], type(None): 1.5}
    value = others.get(type(default), "all" if name == "include_num_input_tokens_seen" else 0.1)
    with pytest.raises(
        ValueError, match=rf"{name}=.* is not supported: it cannot act in this trainer\. .*\. Leave it"
    ):
        SRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_every_inherited_setting_is_known():
    """A new release of transformers brings settings: look whether they act, and add them here or to `CANNOT_ACT`."""
    assert {field.name for field in fields(TrainingArguments)} - set(CANNOT_ACT) <= ACT


def test_unknown_setting(tmp_path):
    with pytest.raises(TypeError, match="chunk_size"):
        ChunkGRPOConfig(output_dir=str(tmp_path), chunk_size=[1])


def test_unknown_preset():
    with pytest.raises(
        ValueError,
        match=r"no preset 'grpo'. Choose one of \['chunk_grpo', 'dance_grpo', 'flow_dppo', 'flow_grpo', 'flow_grpo_fast', 'gr",
    ):
        ChunkGRPOConfig.preset("grpo")


@pytest.mark.parametrize("name", sorted(ChunkGRPOConfig.PRESETS))
def test_presets_are_valid(name, tmp_path):
    config = ChunkGRPOConfig.preset(name, output_dir=str(tmp_path), use_cpu=True)
    # 2 prompts of 12 images a process, two optimizer steps each
    assert config.generation_batch_size == 24
    assert config.steps_per_generation == 2 * config.gradient_accumulation_steps
    # whole groups on one process, however many there are
    assert config.consecutive_images == config.num_generations
    if config.train_window is None:
        assert sum(config.chunk_sizes) == 16
    else:
        assert config.stochastic_steps == "trained" and config.window_chunk == 1


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"text": "a"}] * 8, ValueError, r"no column 'prompt', only \['text'\].*rename_column"),
        ([], ValueError, "train_dataset (is empty|has no column)"),
        ([{"prompt": "a"}, {"prompt": "  "}], ValueError, "Row 1 of train_dataset has an empty prompt '  '"),
        ([{"prompt": 1}, {"prompt": 2}], TypeError, "Row 0 of train_dataset has the prompt 1 of type int"),
        ([{"prompt": "a"}, {"prompt": None}], TypeError, "Row 1 of train_dataset has the prompt None"),
        ([{"prompt": "a", "images": 1}], ValueError, "has a column 'images'.*drawn images.*rename_column"),
        ([{"prompt": "a", "prompts": "b"}], ValueError, "train_dataset has a column 'prompts'.*Rename it"),
        ([{"prompt": "a"}], ValueError, "has 1 prompts, but a generation needs 2"),
    ],
)
def test_dataset(rows, error, message, make_trainer, monkeypatch):
    monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never_loaded)
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []})
    with pytest.raises(error, match=message):
        make_trainer(train_dataset=dataset, model="never/loaded")


def test_image_that_a_reward_asks_for(make_trainer, monkeypatch):
    monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never_loaded)
    values = [None, {"bytes": b"no image", "path": None}]
    dataset = Dataset.from_dict(
        {"prompt": ["a", "b"], "reference": values}, features=Features(prompt=Value("string"), reference=Image())
    )

    def likeness(images, prompts, reference):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="The image in row 1 of column 'reference' of train_dataset cannot be read"):
        make_trainer(reward_funcs=likeness, train_dataset=dataset, model="never/loaded")


def test_dataset_with_a_transform(make_trainer, train_dataset):
    transformed = train_dataset.with_transform(lambda rows: {"prompt": [p.upper() for p in rows["prompt"]]})
    with pytest.raises(ValueError, match=r"train_dataset has a transform.*with_format\(None\)"):
        make_trainer(train_dataset=transformed)
    with pytest.raises(ValueError, match="eval_dataset has a transform"):
        make_trainer(eval_dataset=transformed)


def test_dataset_of_another_kind(make_trainer):
    with pytest.raises(TypeError, match="must be a datasets.Dataset, got list"):
        make_trainer(train_dataset=["a cat"])
    stream = Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset()
    with pytest.raises(TypeError, match="eval_dataset must be a datasets.Dataset, got IterableDataset"):
        make_trainer(eval_dataset=stream)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward_funcs": []}, ValueError, "reward_funcs is empty"),
        ({"reward_funcs": "nothing"}, ValueError, "Unknown reward 'nothing'"),
        ({"reward_funcs": "pickscore:scal=2"}, ValueError, "no option 'scal'"),
        (
            {"reward_funcs": lambda images, prompts, style: []},
            TypeError,
            r"<lambda>\(images, prompts, style\) cannot be called: 'style' is neither .* columns \[\]",
        ),
        ({"watch_reward_funcs": lambda style=None: []}, TypeError, "takes neither images nor prompts"),
        ({"watch_reward_funcs": ["no_module_of_mine.warmth"]}, ValueError, "there is no module 'no_module_of_mine'"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 values for 1 reward functions"),
        ({"peft_config": True}, TypeError, "peft_config must be a peft.LoraConfig"),
        ({"peft_config": LoHaConfig()}, ValueError, "LoHaConfig"),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, ValueError, "task_type"),
    ],
)
def test_arguments_before_weights(arguments, error, message, make_trainer, monkeypatch):
    monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never_loaded)
    with pytest.raises(error, match=message):
        make_trainer(model="never/loaded", **arguments)


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (lambda folder: SRPOConfig(output_dir=folder, use_cpu=True), "SRPOConfig"),
        (lambda folder: TrainingArguments(output_dir=folder, use_cpu=True), "TrainingArguments"),
        (lambda folder: {"output_dir": folder}, "dict"),
        (lambda folder: ChunkGRPOConfig, "type"),
    ],
    ids=["other-trainer", "transformers", "dict", "class"],
)
def test_config_of_another_class(args, given, tmp_path):
    dataset = Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(TypeError, match=f"must be a ChunkGRPOConfig for ChunkGRPOTrainer, got a {given}"):
        ChunkGRPOTrainer("never/loaded", redness, args=args(str(tmp_path)), train_dataset=dataset)


def test_predict_says_what_to_call(make_trainer):
    trainer = make_trainer()
    with pytest.raises(NotImplementedError, match=r"evaluate\(eval_dataset\).*trl-diffusion generate"):
        trainer.predict(trainer.train_dataset)


def test_output_dir_that_cannot_be_written(make_trainer, tmp_path):
    # A file where the folder should be: permissions would not stop a test that runs as root.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir .*file.* is not writable"):
        make_trainer(output_dir=str(tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_dir(make_trainer, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="is not writable"):
        make_trainer(output_dir=str(tmp_path / "out"))


@pytest.mark.parametrize("size", [{"height": 30}, {"width": 34}])
def test_size(size, make_trainer):
    name, value = next(iter(size.items()))
    with pytest.raises(ValueError, match=f"{name}={value} is not possible"):
        make_trainer(**size)


def test_unsupported_family(make_trainer, tmp_path):
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=8)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()  # so that loading them would be another error
    with pytest.raises(
        ValueError, match="DDPMPipeline.*not supported. Supported: FluxPipeline, StableDiffusion3Pipeline"
    ):
        make_trainer(model=str(tmp_path / "ddpm"))


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda images, prompts, **kw: [1.0], ValueError, "returned 1 scores for 4 images"),
        (lambda images, prompts, **kw: "good", TypeError, "returned 'good'"),
        (lambda images, prompts, **kw: [float("inf")] * len(prompts), ValueError, "returned inf for the prompt 'a "),
        (lambda images, prompts, **kw: 1 / 0, RuntimeError, "raised ZeroDivisionError.*'a "),
        (
            lambda images, prompts, **kw: [None] * len(prompts),
            ValueError,
            "Every reward of generation 0 is None or NaN",
        ),
    ],
    ids=["count", "string", "infinity", "raises", "all-none"],
)
def test_rewards(reward, error, message, make_trainer):
    prompts = Dataset.from_list([{"prompt": f"a {animal}"} for animal in ("cat", "dog")])
    with pytest.raises(error, match=message):
        make_trainer(reward_funcs=reward, train_dataset=prompts, reward_retries=0).train()


def test_non_finite_loss_is_not_applied(make_trainer):
    trainer = make_trainer(max_bad_steps=1)
    generate = trainer.make_micro_batches

    def broken(rows, generation):
        micro_batches = generate(rows, generation)
        micro_batches[1].advantages[0] = float("nan")
        return micro_batches

    trainer.make_micro_batches = broken
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    message = "Optimizer step 1 was not applied: the loss of term 1 of 1 is nan on the prompts"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_evaluation_prompts_must_be_known(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="The prompt 'unseen' was not among the datasets"):
        trainer.evaluate(Dataset.from_list([{"prompt": "unseen"}]))


def test_black_box_rewards_are_fine_for_grpo(make_trainer):
    assert isinstance(make_trainer(reward_funcs=redness), ChunkGRPOTrainer)


@pytest.mark.parametrize("version", [None, "1"])
def test_fsdp1_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(
        ValueError, match="fsdp_version is 1, and the trainers support FSDP2 alone. Set fsdp_version: 2"
    ):
        ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("deepspeed", "settings", "message"),
    [
        (
            {"zero_optimization": {"stage": 0}},
            {},
            "zero_stage is 0, which shards nothing. Use ZeRO-1, 2 or 3, or multi_gpu",
        ),
        (
            {
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
                "bf16": {"enabled": "auto"},
            },
            {"bf16": True},
            "grad_accum_dtype is 'fp32', which with bf16 needs ZeRO-2 or 3, and the stage is 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "nowhere"}}},
            {"ema_decay": 0.9},
            "ema_decay=0.9 cannot be used with an optimizer that is offloaded to NVMe",
        ),
    ],
    ids=["stage-0", "float32-accumulation", "nvme"],
)
def test_impossible_deepspeed_is_refused(tmp_path, deepspeed, settings, message):
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    with pytest.raises(ValueError, match=message):
        ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=deepspeed, **settings)


WHOLE_WEIGHTS = {"quantization": "int8", "compile_denoiser": True, "rollout_merged_lora": True}


@pytest.mark.parametrize("name", WHOLE_WEIGHTS)
@pytest.mark.parametrize("sharding", ["fsdp2", "zero2", "zero3"])
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(tmp_path, monkeypatch, sharding, name):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, name: WHOLE_WEIGHTS[name]}
    if sharding == "fsdp2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    else:
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
        settings["deepspeed"] = {"zero_optimization": {"stage": int(sharding[-1])}}
    if sharding == "zero2":
        ChunkGRPOConfig(**settings)  # shards gradients and the optimizer alone
        return
    with pytest.raises(ValueError, match=f"{name}={WHOLE_WEIGHTS[name]!r} cannot be used with ZeRO-3 or FSDP"):
        ChunkGRPOConfig(**settings)


@pytest.mark.parametrize("config_class", [SRPOConfig, ChunkGRPOConfig])
def test_rewards_may_not_take_longer_than_processes_wait(tmp_path, monkeypatch, config_class):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "ddp_timeout": 30, "reward_timeout": 10}
    config_class(**settings, reward_retries=2)  # nobody waits for one process
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(config_class, "world_size", 2)
    config_class(**settings, reward_retries=1)
    with pytest.raises(ValueError, match="reward_timeout=10 s in 3 attempts takes longer than the 30 s"):
        config_class(**settings, reward_retries=2)


def test_batches_are_those_of_the_processes_that_a_launcher_starts(tmp_path, monkeypatch):
    """Under a launcher, also of one process, their number is known only when they have met."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6,
    }  # fmt: skip
    args = ChunkGRPOConfig(**settings, num_generations=4)
    assert (args.steps_per_generation, args.generation_batch_size) == (6, 12)
    with pytest.raises(ValueError, match=r"num_generations \(5\) must divide the generation batch \(12 images"):
        ChunkGRPOConfig(**settings, num_generations=5)
