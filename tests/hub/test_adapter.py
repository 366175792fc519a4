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

import copy
import dataclasses
import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import EvaConfig, IA3Config, LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import tiny_flux_pipeline, tiny_sd3_pipeline

from trl_diffusion.hub import check_lora_config, save_adapter
from trl_diffusion.hub.adapter import EXPORTABLE_FIELDS


TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


def tiny_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()


def plain_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def trained_model(transformer: FluxTransformer2DModel, **config) -> PeftModel:
    """A LoRA whose B matrices are not zero, as if trained."""
    config = LoraConfig(**{"target_modules": TARGET_MODULES, **config})
    check_lora_config(config)
    model = get_peft_model(transformer, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 4, 16, generator=generator),
            encoder_hidden_states=torch.randn(2, 3, 16, generator=generator),
            pooled_projections=torch.randn(2, 8, generator=generator),
            timestep=torch.tensor([0.5, 0.25]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
            guidance=torch.tensor([3.5, 3.5]),
            return_dict=False,
        )[0]


CONFIGS = {
    "alpha equals r": {"r": 4, "lora_alpha": 4},
    "alpha differs from r": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
}
# One for each of the other fields that may be set.
VARIANTS = {
    "patterns of full names": {
        "use_rslora": True,
        "rank_pattern": {r"^transformer_blocks\.0\.attn\.to_q": 2},
        "alpha_pattern": {r"^transformer_blocks\.0\.attn\.to_q": 3, "ff.net.2": 1},
    },
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "no start at 0": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*attn\.to_[qk]"},
    "excluded": {"exclude_modules": ["to_k", "proj_out"]},
    "one layer": {"layers_to_transform": [0]},
    "one pattern of layers": {
        # In transformer_blocks.0.ff.net.0.proj: PEFT before 0.21 finds no pattern at the start of a name.
        "target_modules": ["proj", "to_q"],
        "layers_to_transform": [0],
        "layers_pattern": "net",
    },
    "offloaded computation": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
}


@pytest.mark.parametrize("config", [*CONFIGS.values(), *VARIANTS.values()], ids=[*CONFIGS, *VARIANTS])
def test_plain_pipeline_with_the_adapter_is_the_trained_model(tmp_path, config):
    base = tiny_transformer()
    trained = trained_model(copy.deepcopy(base), **config)
    save_adapter(trained, FluxPipeline, tmp_path)

    pipeline = plain_pipeline(copy.deepcopy(base))
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")

    wanted = output(trained)
    assert (wanted - output(base)).abs().max() > 3e-3  # the adapter does something
    torch.testing.assert_close(output(pipeline.transformer), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("modules", ["all-linear", r".*(\.to_[qk]|ff\.net\.2)"])
@pytest.mark.parametrize("make_pipeline", [tiny_flux_pipeline, tiny_sd3_pipeline])
def test_all_linear_layers_and_regular_expressions(tmp_path, make_pipeline, modules):
    pipeline, plain = make_pipeline(seed=0), make_pipeline(seed=0)
    linear = {name for name, layer in plain.transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    torch.manual_seed(1)
    model = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    save_adapter(model, type(pipeline), tmp_path)

    def adapted(transformer):
        return {name for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}

    def latents(pipeline):
        generator = torch.Generator().manual_seed(0)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
        return pipeline("a fox", **settings, generator=generator, output_type="latent").images

    base = latents(plain)
    plain.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert adapted(plain.transformer) == adapted(pipeline.transformer)
    assert (
        adapted(pipeline.transformer) == linear if modules == "all-linear" else adapted(pipeline.transformer) < linear
    )
    wanted = latents(pipeline)
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(latents(plain), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_reads_the_adapter_back(tmp_path, config):
    base = tiny_transformer()
    trained = trained_model(copy.deepcopy(base), **config)
    save_adapter(trained, FluxPipeline, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(loaded), output(trained), rtol=0, atol=1e-6)


def test_state_dict_that_is_passed_in_is_saved_and_not_the_live_parameters(tmp_path):
    base = tiny_transformer()
    trained = trained_model(copy.deepcopy(base), r=4, lora_alpha=12)
    wanted = output(trained)
    gathered = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = torch.empty(0)  # as the live parameters are under ZeRO-3
    save_adapter(trained, FluxPipeline, tmp_path, state_dict=gathered)

    pipeline = plain_pipeline(copy.deepcopy(base))
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output(pipeline.transformer), wanted, rtol=0, atol=1e-6)


def test_saving_leaves_the_model_as_it_was_and_tells_no_local_path(tmp_path):
    trained = trained_model(tiny_transformer(), r=4)
    trained.peft_config["default"].base_model_name_or_path = "/home/alice/flux"
    before = output(trained)
    save_adapter(trained, FluxPipeline, tmp_path, base_model="black-forest-labs/FLUX.1-dev")

    assert trained.peft_config["default"].base_model_name_or_path == "/home/alice/flux"
    assert trained.peft_config["default"].inference_mode is False
    assert all(layer.r["default"] == 4 for layer in trained.modules() if isinstance(layer, LoraLayer))
    torch.testing.assert_close(output(trained), before, rtol=0, atol=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "black-forest-labs/FLUX.1-dev"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    for path in tmp_path.iterdir():
        assert b"alice" not in path.read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["to_q"], feedforward_modules=[]), "IA3Config.*peft.LoraConfig"),
        (LoraConfig(task_type="CAUSAL_LM"), "CAUSAL_LM.*task_type unset"),
        (LoraConfig(bias="all"), "bias='all'.*bias='none'"),
        (LoraConfig(modules_to_save=["proj_out"]), "proj_out.*target_modules"),
        (LoraConfig(init_lora_weights="pissa"), "pissa.*gaussian"),
        (LoraConfig(init_lora_weights="eva", eva_config=EvaConfig()), "'eva'.*needs data.*gaussian"),
        (
            LoraConfig(inference_mode=True),
            "inference_mode=True: the adapter would not be trained.*inference_mode=False",
        ),
        (LoraConfig(target_parameters=["proj_out.weight"]), "target_parameters.*cannot take.*target_modules instead"),
        (
            LoraConfig(trainable_token_indices=[1]),
            r"trainable_token_indices=\[1\].*Leave trainable_token_indices unset",
        ),
        (LoraConfig(layer_replication=[(0, 1)]), r"layer_replication=\[\(0, 1\)\].*cannot be loaded by diffusers"),
        (LoraConfig(alora_invocation_tokens=[1]), r"alora_invocation_tokens=\[1\]"),
        (LoraConfig(use_qalora=True), "use_qalora=True.*Use use_qalora=False"),
        (LoraConfig(megatron_config={"a": 1}), "megatron_config"),
    ],
)
def test_what_diffusers_cannot_load_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_lora_config(config)


def test_an_ordinary_lora_config_is_accepted():
    assert check_lora_config(LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian")) is None


def test_all_variants_are_decided():
    """Every field of the installed PEFT that may be set was tried above; any value of the others is refused."""
    tried = {name for config in [*CONFIGS.values(), *VARIANTS.values()] for name in config}
    filled_in = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    assert EXPORTABLE_FIELDS - filled_in == tried | {"target_modules"}
    for field in dataclasses.fields(LoraConfig):
        if field.name not in EXPORTABLE_FIELDS:
            config = LoraConfig()
            setattr(config, field.name, "something")  # as kasa_config, of which older releases know nothing
            with pytest.raises(ValueError, match=f"{field.name}='something'"):
                check_lora_config(config)


def test_names_that_users_networks_have_not_are_not_written(tmp_path):
    base = tiny_transformer()
    base.transformer_blocks[0] = torch.compile(base.transformer_blocks[0], backend="eager")
    message = r"'transformer_blocks\.0\._orig_mod\.attn\.to_.*' and more.*pass the trainer the plain one"
    with pytest.raises(ValueError, match=message):
        save_adapter(trained_model(base), FluxPipeline, tmp_path)
    assert not list(tmp_path.iterdir())
