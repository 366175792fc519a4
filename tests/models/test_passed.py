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

"""What a user did to a pipeline before passing it: taken off, or refused with the lines that help."""

import accelerate
import peft
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import tiny_flux_pipeline, tiny_sd3_pipeline

from trl_diffusion.hub import save_adapter
from trl_diffusion.models import load_flow_model


TARGET_MODULES = ["to_q", "to_k", "to_out.0"]


def draw(pipeline):
    with torch.no_grad():
        return pipeline(
            "a cat", height=32, width=32, num_inference_steps=3, generator=torch.Generator().manual_seed(1),
            max_sequence_length=16, output_type="pt",
        ).images  # fmt: skip


def randomize(module):
    """Move all adapters away from their start, as if trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_", "ia3_", "oft_")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Two LoRAs of the transformer, and one of the transformer and the first text encoder."""
    folder = tmp_path_factory.mktemp("styles")
    for name, rank in (("style", 4), ("other", 2)):
        pipeline = tiny_flux_pipeline()
        model = get_peft_model(pipeline.transformer, LoraConfig(r=rank, target_modules=TARGET_MODULES))
        randomize(model)
        save_adapter(model, FluxPipeline, folder / name)
    pipeline = tiny_flux_pipeline()
    tensors = {}
    for name, targets in (("transformer", ["to_q"]), ("text_encoder", ["q_proj", "v_proj"])):
        network = inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), pipeline.components[name])
        randomize(network)
        tensors[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network, adapter_name="default")
    FluxPipeline.save_lora_weights(folder / "both", **tensors)
    return folder


def load(pipeline, folder, **kwargs):
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", **kwargs)


def two(pipeline, styles):
    load(pipeline, styles / "style", adapter_name="style")
    load(pipeline, styles / "other", adapter_name="other")
    pipeline.set_adapters(["style", "other"], [0.7, -0.4])


def one_of_two_fused(pipeline, styles):
    two(pipeline, styles)
    pipeline.fuse_lora(adapter_names=["other"], lora_scale=0.5)


def hot_swapped(pipeline, styles):
    pipeline.enable_lora_hotswap(target_rank=8)
    load(pipeline, styles / "style", adapter_name="style")
    load(pipeline, styles / "other", adapter_name="style", hotswap=True)


def injected(config, component="transformer"):
    def change(pipeline, styles):
        inject_adapter_in_model(config, getattr(pipeline, component))
        randomize(getattr(pipeline, component))

    return change


def wrapped(pipeline, styles):
    pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(target_modules=TARGET_MODULES))
    pipeline.transformer.add_adapter("other", LoraConfig(target_modules=["to_v"]))
    randomize(pipeline.transformer)
    pipeline.transformer.set_adapter("other")


ADAPTERS = {
    "loaded": lambda pipeline, styles: load(pipeline, styles / "style"),
    "loaded as default": lambda pipeline, styles: load(pipeline, styles / "style", adapter_name="default"),
    "two with weights": two,
    "fused and not unloaded": one_of_two_fused,
    "hot-swapped": hot_swapped,
    "of a text encoder too": lambda pipeline, styles: load(pipeline, styles / "both"),
    "added": lambda pipeline, styles: (
        pipeline.transformer.add_adapter(LoraConfig(target_modules=TARGET_MODULES)),
        randomize(pipeline.transformer),
    ),
    "injected": injected(LoraConfig(target_modules=TARGET_MODULES)),
    "injected DoRA": injected(LoraConfig(target_modules=TARGET_MODULES, use_dora=True)),
    "injected LoHa": injected(LoHaConfig(target_modules=TARGET_MODULES)),
    "injected OFT": injected(peft.OFTConfig(target_modules=TARGET_MODULES, oft_block_size=4)),
    "injected into T5": injected(LoraConfig(target_modules=["q", "v"]), "text_encoder_2"),
    "PeftModel": wrapped,
    "compiled": lambda pipeline, styles: (
        load(pipeline, styles / "style"),
        setattr(pipeline, "transformer", torch.compile(pipeline.transformer, backend="eager")),
    ),
}


@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_are_refused_with_the_lines_that_keep_or_drop_them(change, styles):
    base = draw(tiny_flux_pipeline())
    for kept in (True, False):
        pipeline = tiny_flux_pipeline()
        change(pipeline, styles)
        wanted = draw(pipeline) if kept else base
        assert not kept or (wanted - base).abs().max() > 1e-3
        with pytest.raises(ValueError, match="holds adapters already, .* switch them off") as refusal:
            load_flow_model(pipeline)
        _, keep, drop = str(refusal.value).split(":\n")
        lines = (keep if kept else drop).splitlines()
        exec("\n".join(line[4:] for line in lines if line.startswith("    ")), {"pipe": pipeline})
        flow_model = load_flow_model(pipeline)
        plain = tiny_flux_pipeline()
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            assert pipeline.components[name].state_dict().keys() == plain.components[name].state_dict().keys()
        torch.testing.assert_close(draw(flow_model.pipeline), wanted, rtol=0, atol=2e-6)


def test_an_adapter_that_is_off_is_refused_too(styles):
    pipeline = tiny_flux_pipeline()
    load(pipeline, styles / "style")
    pipeline.disable_lora()
    with pytest.raises(ValueError, match=r"\['default_0'\] in its transformer"):
        load_flow_model(pipeline)


def whole(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


def blocks(pipeline):
    for index, block in enumerate(pipeline.transformer.transformer_blocks):
        pipeline.transformer.transformer_blocks[index] = torch.compile(block, backend="eager")


def others(pipeline):
    pipeline.vae = torch.compile(pipeline.vae, backend="eager")
    pipeline.text_encoder = torch.compile(pipeline.text_encoder, backend="eager")
    pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, backend="eager")


def parallel(pipeline):
    pipeline.transformer = torch.compile(torch.nn.DataParallel(pipeline.transformer), backend="eager")


def offloaded(pipeline):
    accelerate.cpu_offload(pipeline.transformer, execution_device="cpu")  # as enable_sequential_cpu_offload does
    pipeline.text_encoder, hook = accelerate.cpu_offload_with_hook(pipeline.text_encoder, execution_device="cpu")
    pipeline.vae, _ = accelerate.cpu_offload_with_hook(pipeline.vae, "cpu", prev_module_hook=hook)


def in_place(pipeline):
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    pipeline.vae.decoder.compile(backend="eager")


@pytest.mark.parametrize("wrap", [whole, blocks, others, parallel, offloaded, in_place])
def test_wrappers_are_taken_off(wrap):
    plain = tiny_flux_pipeline()
    wanted = draw(plain)
    pipeline = tiny_flux_pipeline()
    wrap(pipeline)
    load_flow_model(pipeline)
    for name, network in plain.components.items():
        if isinstance(network, torch.nn.Module):
            found = pipeline.components[name]
            assert [(n, type(m)) for n, m in found.named_modules()] == [
                (n, type(m)) for n, m in network.named_modules()
            ]
            assert not any("_hf_hook" in vars(module) for module in found.modules())
            for key, tensor in found.state_dict().items():
                assert torch.equal(tensor, network.state_dict()[key]), key
    torch.testing.assert_close(draw(pipeline), wanted, rtol=0, atol=2e-6)


def cached(pipeline):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))


def cast(pipeline):
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def spread(pipeline):
    pipeline.transformer.hf_device_map = {"transformer_blocks": 0, "single_transformer_blocks": 1}


def with_ip_adapter(pipeline):
    processors = {
        name: FluxIPAdapterAttnProcessor(32, 32) if name.startswith("transformer_blocks") else processor
        for name, processor in pipeline.transformer.attn_processors.items()
    }
    pipeline.transformer.set_attn_processor(processors)


def fused(pipeline):
    pipeline.transformer.fuse_qkv_projections()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cached, r"transformer has hooks of diffusers, \['.*fbc_block_hook.*'\].*pipe.transformer.disable_cache\(\)"),
        (cast, r"hooks of diffusers, \['layerwise_casting'\].*Load the pipeline without them"),
        (spread, "transformer lies on several devices.*Load it without device_map"),
        (with_ip_adapter, r"processors with weights of their own, 'transformer_blocks.*unload_ip_adapter\(\)"),
        (fused, r"projections of the pipeline's transformer are fused.*unfuse_qkv_projections\(\)"),
    ],
)
def test_what_changes_the_network_is_refused(change, message):
    pipeline = tiny_flux_pipeline()
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        load_flow_model(pipeline)


def test_plain_pipelines_stay_as_they_are():
    for pipeline in (tiny_flux_pipeline(), tiny_sd3_pipeline()):
        components = dict(pipeline.components)
        load_flow_model(pipeline)
        assert all(pipeline.components[name] is component for name, component in components.items())
