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

"""The trained LoRA on disk, in the two formats that its users read."""

import copy
import dataclasses
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule


DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"

# Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) move part of
# the base weights into the adapter, so the adapter alone, on the published base model, is not the trained model, or
# need data that the trainers do not give them (EVA, LoRA-GA).
EXPORTABLE_INITIALISATIONS = (True, False, "gaussian", "orthogonal")

# The fields of a LoraConfig that may have another value than their default: those that a diffusers pipeline which loads
# the adapter draws the same images with, see `tests/hub/test_adapter.py`. Fields that PEFT gets later are refused until
# they are known to.
EXPORTABLE_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "runtime_config",
    # what PEFT fills in
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
}  # fmt: skip

# Why some of the others cannot be used, where more can be said.
REASONS = {
    "bias": "diffusers' LoRA file is for LoRA matrices, and the biases of the base model are not among them",
    "modules_to_save": "diffusers' LoRA file holds LoRA matrices only; name these modules in target_modules instead",
    "task_type": "it is for language models",
    "target_parameters": "`load_lora_weights` cannot take such an adapter back; name the layers in target_modules instead",
    "kasa_config": "it changes the base weights, so that the adapter does not fit the published base model",
    "inference_mode": "the adapter would not be trained; a configuration read from a saved adapter has it",
}


def check_lora_config(config: PeftConfig) -> None:
    """
    Checks that an adapter of this configuration can be trained and exported for diffusers. To be called before training.

    Args:
        config ([`~peft.PeftConfig`]):
            Configuration of the adapter.

    Raises:
        `ValueError`: if the adapter is no LoRA, or of a variant that diffusers' `load_lora_weights` does not take back as
            it was; the message names the field of the configuration.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"peft_config is a {type(config).__name__}, but only LoRA adapters can be loaded by diffusers' "
            "`load_lora_weights`. Pass a `peft.LoraConfig`, or `peft_config=False` for full fine-tuning."
        )
    if config.init_lora_weights not in EXPORTABLE_INITIALISATIONS:
        raise ValueError(
            f"peft_config has init_lora_weights={config.init_lora_weights!r}, which changes the base weights, so that "
            "the adapter does not fit the published base model, or needs data before the training. Use one of "
            f"{list(EXPORTABLE_INITIALISATIONS)}."
        )
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = vars(config)[field.name]
        if field.name not in EXPORTABLE_FIELDS and value != default:
            value = str(value) if isinstance(value, str) else value  # PEFT's enumerations
            remedy = f"Leave {field.name} unset" if default is None else f"Use {field.name}={default!r}"
            reason = REASONS.get(
                field.name, "an adapter of this variant cannot be loaded by diffusers as it was trained"
            )
            raise ValueError(f"peft_config has {field.name}={value!r}: {reason}. {remedy}.")


def plain_network(network: nn.Module) -> nn.Module:
    """
    A diffusers network as its class makes it of its configuration: the names in it are those that users' networks have.
    It has no memory for weights.

    Args:
        network (`nn.Module`): that is trained, without an adapter's [`~peft.PeftModel`] around it.
    """
    # FSDP2 makes a class of its own, of the network's.
    network_class = next(base for base in type(network).__mro__ if not issubclass(base, FSDPModule))
    config = {name: value for name, value in network.config.items() if name != "quantization_config"}
    with torch.device("meta"):
        return network_class.from_config(config)


def check_names(names: Iterable[str], known: Container[str]) -> None:
    """
    Check that names of what is exported are names of the plain network.

    Args:
        names (`Iterable[str]`): of layers or weights that are written.
        known (`Container[str]`): of those that a user's network has.

    Raises:
        `ValueError`: it has no such layer or weight; the message names the first.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"The trained network has {', '.join(map(repr, unknown[:3]))}"
            f"{' and more' if len(unknown) > 3 else ''}, which the network that users load has not, so the result could "
            "not be loaded. Something is wrapped around the network or a part of it; pass the trainer the plain one."
        )


def save_adapter(
    peft_model: PeftModel,
    pipeline_class: type[DiffusionPipeline],
    output_dir: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    base_model: str | None = None,
    adapter_name: str = "default",
) -> None:
    """
    Writes a LoRA adapter in diffusers' format and in PEFT's.

    - `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(...)`. The whole LoRA configuration travels in
      the file's metadata; without it, an alpha other than r would be lost on loading.
    - `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained(transformer, ...)` and for
      resuming.

    diffusers cannot read PEFT's file and PEFT cannot read diffusers'. The files are written by the calling process: in
    distributed training call it on the main process only, with the gathered `state_dict`.

    Args:
        peft_model ([`~peft.PeftModel`]):
            The transformer, wrapped by [`~peft.get_peft_model`], without any DDP, FSDP or DeepSpeed wrapper.
        pipeline_class (`type`):
            Class of the pipeline that the transformer belongs to, e.g. `FluxPipeline`.
        output_dir (`str` or `Path`):
            Folder to write to; created if missing. Files of the same name are replaced, others stay.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            State dict of `peft_model`, for sharded training, where the live parameters are empty. `None` takes the live
            parameters.
        base_model (`str`, *optional*):
            Hub id of the base model, for the configuration's `base_model_name_or_path`. Do not pass a local path: the
            files are meant to be published.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter of `peft_model` to write.

    Raises:
        `ValueError`: if the adapter cannot be exported, see [`check_lora_config`], or is on layers that a plain
            transformer has not.
    """
    config = copy.deepcopy(peft_model.peft_config[adapter_name])
    check_lora_config(config)
    config.inference_mode = True
    config.base_model_name_or_path = base_model
    plain = plain_network(peft_model.get_base_model())
    # Tells other programs whose layers these are.
    config.auto_mapping = {"base_model_class": type(plain).__name__, "parent_library": type(plain).__module__}
    if isinstance(config.target_modules, set):
        # A set has no order: the same adapter would be other bytes, and be uploaded again.
        config.target_modules = sorted(config.target_modules)

    # `save_embedding_layers="auto"` is for language models, and may ask the Hub for the base model's vocabulary.
    lora_layers = get_peft_model_state_dict(
        peft_model, state_dict=state_dict, adapter_name=adapter_name, save_embedding_layers=False
    )
    check_names(
        [name.removeprefix("base_model.model.").partition(".lora_")[0] for name in lora_layers],
        {name for name, _ in plain.named_modules()},
    )
    # safetensors refuses tensors that are strided or share memory.
    lora_layers = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in lora_layers.items()}

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(lora_layers, output_dir / PEFT_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(output_dir))
    pipeline_class.save_lora_weights(
        output_dir,
        transformer_lora_layers={
            name.removeprefix("base_model.model."): tensor for name, tensor in lora_layers.items()
        },
        weight_name=DIFFUSERS_WEIGHTS_NAME,
        # diffusers leaves the layers that it makes of it in training mode, where dropout is on.
        transformer_lora_adapter_metadata={**config.to_dict(), "lora_dropout": 0.0},
    )
