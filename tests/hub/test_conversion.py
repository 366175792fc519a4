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

import itertools

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, WanPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)

from trl_diffusion.cli.main import main
from trl_diffusion.hub import save_adapter
from trl_diffusion.hub.conversion import export_comfyui, find_adapter, load_adapter, merge_adapter
from trl_diffusion.models import load_flow_model


PIPELINES = {
    "flux": tiny_flux_pipeline,
    "sd3": tiny_sd3_pipeline,
    "qwen-image": tiny_qwen_image_pipeline,
    "flux2": tiny_flux2_klein_pipeline,
    "z-image": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
}
CONFIGS = {
    "alpha differs from r": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
}


def draw(pipeline):
    is_video = isinstance(pipeline, WanPipeline)
    output = pipeline(
        prompt="a cat", height=32, width=32, num_inference_steps=3, generator=torch.Generator().manual_seed(1),
        max_sequence_length=16, output_type="pt", **({"num_frames": 5} if is_video else {}),
    )  # fmt: skip
    return output.frames if is_video else output.images


def save_trained(folder, family="flux", **config):
    """A LoRA whose B matrices are not zero, as if trained; returns what it draws."""
    pipeline = PIPELINES[family](seed=0)
    pipeline.set_progress_bar_config(disable=True)
    config = {"r": 4, "lora_alpha": 12, **config}
    config = {"target_modules": ["to_q", "to_k", "to_out.0"], **config}
    model = get_peft_model(pipeline.transformer, LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, type(pipeline), folder)
    return draw(pipeline), model


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_pipeline_draws_the_aligned_images(tmp_path, family, config):
    targets = load_flow_model(PIPELINES[family]()).lora_target_modules
    aligned, _ = save_trained(tmp_path / "adapter", family, target_modules=targets, **config)
    pipeline = PIPELINES[family](seed=0)
    base = draw(pipeline)
    merge_adapter(pipeline, tmp_path / "adapter")
    assert not [name for name in pipeline.transformer.state_dict() if "lora" in name]
    torch.testing.assert_close(draw(pipeline), aligned, rtol=0, atol=2e-5)
    assert (base - aligned).abs().max() > 1e-2


def test_merge_command(tmp_path, capsys):
    aligned, _ = save_trained(tmp_path / "adapter")
    tiny_flux_pipeline(seed=0).save_pretrained(tmp_path / "base")
    arguments = ["--model_name_or_path", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *arguments, "--output_dir", str(tmp_path / "merged")]) == 0
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(merged) is FluxPipeline
    torch.testing.assert_close(draw(merged), aligned, rtol=0, atol=2e-5)
    # Half of the strength lies between.
    assert main(["merge", *arguments, "--output_dir", str(tmp_path / "half"), "--scale", "0.5"]) == 0
    half = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    whole = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = tiny_flux_pipeline(seed=0).transformer.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(half[name], (tensor + whole[name]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_comfyui_file_is_the_same_adapter_for_diffusers(tmp_path, config):
    """diffusers' converter takes alpha from the file's keys, as ComfyUI does: there is no metadata in it."""
    aligned, _ = save_trained(tmp_path / "adapter", **config)
    export_comfyui(tmp_path / "adapter", tmp_path / "comfyui" / "lora.safetensors")
    pipeline = tiny_flux_pipeline(seed=0)
    pipeline.load_lora_weights(str(tmp_path / "comfyui"), weight_name="lora.safetensors")
    torch.testing.assert_close(draw(pipeline), aligned, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_comfyui_adds_the_trained_difference(tmp_path, family, config):
    """ComfyUI adds alpha / r B A to each weight, r from the shape of A. Of its names diffusers knows whose they are."""
    flow_model = load_flow_model(PIPELINES[family]())
    _, model = save_trained(tmp_path, family, target_modules=flow_model.lora_target_modules, **config)
    export_comfyui(tmp_path, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    assert set(tensors) == {
        f"{layer}.{part}" for layer in layers for part in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    matrices = {}
    for layer in layers:
        down, up, alpha = (tensors[f"{layer}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        matrices |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": alpha / down.shape[0] * up}
    matrices = flow_model.pipeline.lora_state_dict(matrices)
    adapted = {
        name: module.get_delta_weight("default")
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert set(matrices) == {f"transformer.{name}.lora_{part}.weight" for name in adapted for part in "AB"}
    for name, expected in adapted.items():
        down, up = (matrices[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-6)


def test_comfyui_knows_the_single_blocks_of_flux2_by_its_own_names(tmp_path):
    save_trained(
        tmp_path, "flux2", target_modules=["add_q_proj", "to_qkv_mlp_proj", "single_transformer_blocks.1.attn.to_out"]
    )
    export_comfyui(tmp_path, tmp_path / "lora.safetensors")
    layers = {name.removesuffix(".alpha") for name in load_file(tmp_path / "lora.safetensors") if "alpha" in name}
    assert layers == {
        "transformer.transformer_blocks.0.attn.add_q_proj",
        "diffusion_model.single_blocks.0.linear1",
        "diffusion_model.single_blocks.1.linear1",
        "diffusion_model.single_blocks.1.linear2",
    }


def test_comfyui_file_of_wan_is_the_same_adapter_for_diffusers(tmp_path):
    """Which knows the names of Wan's own code too."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    aligned, _ = save_trained(tmp_path / "adapter", "wan", target_modules=targets)
    export_comfyui(tmp_path / "adapter", tmp_path / "comfyui" / "lora.safetensors")
    names = list(load_file(tmp_path / "comfyui" / "lora.safetensors"))
    assert len(names) == 3 * 2 * (4 + 4 + 2) and all(name.startswith("diffusion_model.blocks.") for name in names)
    pipeline = tiny_wan_pipeline(seed=0)
    base = draw(pipeline)
    pipeline.load_lora_weights(str(tmp_path / "comfyui"), weight_name="lora.safetensors")
    torch.testing.assert_close(draw(pipeline), aligned, rtol=0, atol=2e-5)
    assert (base - aligned).abs().max() > 1e-2


@pytest.mark.parametrize("with_metadata", [True, False])
def test_layers_of_wan_whose_names_in_comfyui_are_not_known_are_refused(tmp_path, with_metadata):
    save_trained(tmp_path, "wan", target_modules=["to_q", "proj_out"])
    if not with_metadata:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(load_file(file), file)
    with pytest.raises(ValueError, match="the layer 'proj_out' of a WanTransformer3DModel, whose name in ComfyUI"):
        export_comfyui(tmp_path, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_networks_that_comfyui_does_not_know_are_refused_by_name(tmp_path):
    save_trained(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as content:
        metadata = {
            key: value.replace("FluxTransformer2DModel", "DiTTransformer2DModel")
            for key, value in content.metadata().items()
        }
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(ValueError, match="a LoRA of a DiTTransformer2DModel, whose names .* Known: FluxTransformer2D"):
        export_comfyui(tmp_path, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_export_command_keeps_alpha(tmp_path, capsys):
    save_trained(tmp_path, r=4, lora_alpha=12)
    output = tmp_path / "lora.safetensors"
    assert main(["export", "--format", "comfyui", "--adapter", str(tmp_path), "--output", str(output)]) == 0
    alphas = {tensor.item() for name, tensor in load_file(output).items() if name.endswith(".alpha")}
    assert alphas == {12.0}


def test_file_without_metadata_has_alpha_r(tmp_path):
    save_trained(tmp_path, r=4, lora_alpha=12)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    export_comfyui(tmp_path / "plain.safetensors", tmp_path / "out.safetensors")
    assert {value.item() for name, value in load_file(tmp_path / "out.safetensors").items() if "alpha" in name} == {4}


def test_adapters_are_found(tmp_path):
    save_trained(tmp_path / "run")
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    assert find_adapter(tmp_path / "run") == find_adapter(file) == find_adapter(str(file)) == file
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "transformer").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(b"")
    for adapter, message in {
        "empty": "but nothing",
        "full": r"pytorch_lora_weights\.safetensors, but transformer",
        "weights.bin": "no .safetensors file",
        "missing": "There is no file or folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_adapter(tmp_path / adapter)


def test_adapter_of_another_model_is_refused(tmp_path):
    save_file(
        {"unet.x.lora_A.weight": torch.zeros(1, 2), "unet.x.lora_B.weight": torch.zeros(2, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match="changes nothing in the transformer of this FluxPipeline"):
        load_adapter(tiny_flux_pipeline(seed=0), tmp_path / "a.safetensors", "a")
    with pytest.raises(ValueError, match=r"unet\.x\.lora_A\.weight.*no LoRA matrix of a transformer"):
        export_comfyui(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        export_comfyui(tmp_path / "a.safetensors", tmp_path / "b.bin")
    assert not (tmp_path / "b.safetensors").exists()


def broken_adapters(folder):
    """Files that are no LoRA of the tiny FLUX, and what is said of each."""
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    layer = "transformer.transformer_blocks.0.attn.to_k"
    elsewhere = {name.replace("transformer_blocks.0", "transformer_blocks.7"): t for name, t in tensors.items()}
    wider = {name: torch.cat([t, t], 1 if "lora_A" in name else 0) for name, t in tensors.items()}
    written = {
        "one layer more": ({**elsewhere, **tensors}, "of its 10 layers 5 are not in the transformer"),
        "another width": (wider, "LoRA of another model: its layer .* is of 64 to 64 features, .* of 32 to 32"),
        "no B": (
            {k: t for k, t in tensors.items() if k != f"{layer}.lora_B.weight"},
            "not whole: .*blocks.0.attn.to_k",
        ),
        "another rank": ({k: t[:2] if "lora_A" in k else t for k, t in tensors.items()}, "do not make a pair"),
        "not finite": ({k: t * torch.nan for k, t in tensors.items()}, "not finite, as in 'single_transformer_blocks"),
        "no LoRA": (tiny_flux_pipeline().transformer.state_dict(), "changes nothing in the transformer"),
        "PEFT's": (
            load_file(folder / "adapter_model.safetensors"),
            "is in PEFT's format.*Convert it with .*save_adapter",
        ),
    }
    for name, (content, message) in written.items():
        (folder / name).mkdir()
        content = {key: tensor.clone() for key, tensor in content.items()}
        save_file(content, folder / name / file.name, metadata=metadata)
        yield folder / name, message
    data = file.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "empty": b"", "text": b"version https://git-lfs" * 9}.items():
        (folder / name).mkdir()
        (folder / name / file.name).write_bytes(content)
        yield folder / name, "cannot be read: .*not written or downloaded whole. Get it again"
    (folder / "wrong metadata").mkdir()
    save_file(tensors, folder / "wrong metadata" / file.name, metadata={"lora_adapter_metadata": "{"})
    yield folder / "wrong metadata", "no whole LoRA in a format that diffusers knows"
    yield folder / "adapter_model.safetensors", "PEFT's format.*Give 'pytorch_lora_weights.safetensors' beside it"
    (folder / "only PEFT's").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "only PEFT's" / "adapter_model.safetensors")
    yield folder / "only PEFT's", "holds no pytorch_lora_weights.safetensors, but adapter_model.*Convert it with"


def test_broken_adapters_are_refused_in_one_line(tmp_path):
    save_trained(tmp_path / "sd3", "sd3")
    save_trained(tmp_path / "run")
    pipeline = tiny_flux_pipeline(seed=0)
    other = (tmp_path / "sd3", "are not in the transformer of this")
    for adapter, message in itertools.chain(broken_adapters(tmp_path / "run"), [other]):
        with pytest.raises(ValueError, match=message) as refusal:
            load_adapter(pipeline, adapter, "a")
        file = next(iter(adapter.glob("*.safetensors"))) if adapter.is_dir() else adapter
        assert str(file.parent) in str(refusal.value) and "\n" not in str(refusal.value)
    load_adapter(pipeline, tmp_path / "run", "a")  # the others left nothing behind


def test_commands_refuse_a_file_before_they_load_the_model(tmp_path, capsys):
    save_trained(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    for command, *arguments in (
        ["merge", "--model_name_or_path", "no/model", "--output_dir", "x"],
        ["generate", "--model_name_or_path", "no/model", "--prompt", "a cat"],
        ["export", "--output", str(tmp_path / "x.safetensors")],
    ):
        with pytest.raises(SystemExit) as end:
            main([command, *arguments, "--adapter", str(tmp_path)])
        assert end.value.code == 2
        assert f"error: The adapter {str(tmp_path / 'pytorch_lora_weights.safetensors')!r} cannot be read" in (
            " ".join(capsys.readouterr().err.split())
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "--model_name_or_path", "shapes", "--output_dir", "x"], "--adapter"),
        (["merge", "--model_name_or_path", "shapes", "--adapter", "/no/such/place", "--output_dir", "x"], "/no/such"),
        (["export", "--adapter", "a", "--output", "b.safetensors", "--format", "invoke"], "invoke"),
    ],
)
def test_wrong_arguments_are_refused(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
