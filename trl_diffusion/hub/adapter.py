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
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file


DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"

# Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) move part of
# the base weights into the adapter, so the adapter alone, on the published base model, is not the trained model.
EXPORTABLE_INITIALISATIONS = (True, False, "gaussian")


def check_lora_config(config: PeftConfig) -> None:
    """
    Checks that an adapter of this configuration can be exported for diffusers. To be called before training.

    Args:
        config ([`~peft.PeftConfig`]):
            Configuration of the adapter.

    Raises:
        `ValueError`: if the adapter is no LoRA, or trains or changes weights that diffusers' LoRA file cannot hold.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"peft_config is a {type(config).__name__}, but only LoRA adapters can be loaded by diffusers' "
            "`load_lora_weights`. Pass a `peft.LoraConfig`, or `peft_config=False` for full fine-tuning."
        )
    if config.task_type is not None:
        raise ValueError(
            f"peft_config has task_type={str(config.task_type)!r}, which is for language models. Leave task_type unset."
        )
    if config.bias != "none":
        raise ValueError(
            f"peft_config has bias={config.bias!r}, but diffusers' LoRA file holds no biases. Use bias='none'."
        )
    if config.modules_to_save:
        raise ValueError(
            f"peft_config has modules_to_save={config.modules_to_save!r}, but diffusers' LoRA file holds LoRA matrices "
            "only. Remove modules_to_save, or name these modules in target_modules."
        )
    if config.init_lora_weights not in EXPORTABLE_INITIALISATIONS:
        raise ValueError(
            f"peft_config has init_lora_weights={config.init_lora_weights!r}, which changes the base weights, so that "
            f"the adapter does not fit the published base model. Use one of {list(EXPORTABLE_INITIALISATIONS)}."
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
        `ValueError`: if the adapter cannot be exported, see [`check_lora_config`].
    """
    config = copy.deepcopy(peft_model.peft_config[adapter_name])
    check_lora_config(config)
    config.inference_mode = True
    config.base_model_name_or_path = base_model
    if isinstance(config.target_modules, set):
        # A set has no order: the same adapter would be other bytes, and be uploaded again.
        config.target_modules = sorted(config.target_modules)

    # `save_embedding_layers="auto"` is for language models, and may ask the Hub for the base model's vocabulary.
    lora_layers = get_peft_model_state_dict(
        peft_model, state_dict=state_dict, adapter_name=adapter_name, save_embedding_layers=False
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
        transformer_lora_adapter_metadata=config.to_dict(),
    )
