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
"""Models of which configurations alone are read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from .. import shapes
from ..models import FLOW_MODELS, FlowModel
from ..models.editing import EditingFlowModel
from ..models.loading import euler_of
from ..paths import check_exists, not_found
from .published import PUBLISHED


@dataclass(frozen=True)
class Configurations:
    """
    What a pipeline says of itself.

    Attributes:
        pipeline_class_name (`str`): its class.
        pipeline (`Mapping`): arguments of the pipeline that are no parts of it.
        parts (`Mapping[str, tuple[type, Mapping]]`): class and configuration of transformer, VAE and scheduler.
        text_encoders (`Mapping[str, int]`): number of weights of each text encoder.
        source (`str`): where this was read.
    """

    pipeline_class_name: str
    pipeline: Mapping[str, Any]
    parts: Mapping[str, tuple[type, Mapping[str, Any]]]
    text_encoders: Mapping[str, int]
    source: str


def read_configurations(model: str | os.PathLike) -> Configurations:
    """
    The configurations of a pipeline: of a folder, of what was downloaded before, as the package knows them, or of the Hub.

    Raises:
        `ValueError`: there are none, or the family is not supported.
    """
    if model == "shapes":
        model = shapes.pipeline_path()
    check_exists(model)
    files: dict[str, Any] = {}
    if str(model) in PUBLISHED:
        if not isinstance(try_to_load_from_cache(str(model), "model_index.json"), str):
            return _published(str(model))
        files["local_files_only"] = True
    try:
        index = DiffusionPipeline.load_config(model, **files)
    except OSError as error:
        reason = str(error) if os.path.isdir(model) else not_found(model, error)
        raise ValueError(
            f"No configuration of a pipeline could be read from {str(model)!r}: {reason} Without a network these are known: "
            f"{', '.join(PUBLISHED)}."
        ) from error
    name = index.get("_class_name")
    if name not in FLOW_MODELS:
        raise ValueError(f"The pipeline class {name} of {str(model)!r} is not supported: {', '.join(FLOW_MODELS)}.")
    parts, text_encoders, arguments = {}, {}, {}
    for part, value in index.items():
        if part.startswith("_") or value == [None, None]:  # a part that it is without
            continue
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            arguments[part] = value
        elif part in ("transformer", "vae", "scheduler"):
            part_class = getattr(diffusers, value[1])
            parts[part] = part_class, part_class.load_config(model, subfolder=part, **files)
        elif part.startswith("text_encoder"):
            config = AutoConfig.from_pretrained(model, subfolder=part, **files)
            with torch.device("meta"):
                text_encoders[part] = getattr(transformers, value[1])(config).num_parameters()
    where = Path(model).name if os.path.isdir(model) else f"the Hub's {model}"
    return Configurations(name, arguments, parts, text_encoders, f"the files of {where}")


def configurations_of(pipeline: DiffusionPipeline) -> Configurations:
    """What a pipeline that is loaded would say of itself."""
    parts, text_encoders = {}, {}
    for name, part in pipeline.components.items():
        if name in ("transformer", "vae", "scheduler"):
            parts[name] = type(part), dict(part.config)
        elif name.startswith("text_encoder") and part is not None:
            text_encoders[name] = part.num_parameters()
    kept = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
    arguments = {name: value for name, value in kept.items() if name not in pipeline.components}
    return Configurations(type(pipeline).__name__, arguments, parts, text_encoders, "the pipeline")


def _published(model: str) -> Configurations:
    known = PUBLISHED[model]
    parts = {name: (getattr(diffusers, class_name), config) for name, (class_name, config) in known["parts"].items()}
    return Configurations(
        known["pipeline_class"], known.get("pipeline", {}), parts, known["text_encoders"],
        f"the package's list, for {model}",
    )  # fmt: skip


def fake_flow_model(configurations: Configurations, mode: FakeTensorMode, dtype: torch.dtype) -> FlowModel:
    """
    The model of a pipeline without weights, text encoders and tokenizers: its tensors have shapes and no memory.

    Args:
        configurations ([`Configurations`]): of the pipeline.
        mode (`FakeTensorMode`): in which the tensors are made, and can be used.
        dtype (`torch.dtype`): of the weights.
    """
    model_class = FLOW_MODELS[configurations.pipeline_class_name]
    expected = model_class.pipeline_class._get_signature_keys(model_class.pipeline_class)[0]
    components: dict[str, Any] = dict.fromkeys(name for name in expected if name != "self")
    for name, (part_class, config) in configurations.parts.items():
        if not issubclass(part_class, ModelMixin):
            components[name] = part_class.from_config(config)
            continue
        with mode:
            components[name] = part_class.from_config(config)
            _cast(components[name], dtype)
    components["scheduler"] = euler_of(components["scheduler"])
    flow_model = model_class(model_class.pipeline_class(**components, **configurations.pipeline))
    # No mask has content.
    flow_model.row_lengths = lambda mask: [mask.shape[1]] * len(mask)
    if isinstance(flow_model, EditingFlowModel):  # nor have sizes
        flow_model.image_sizes = lambda conditioning: [
            list(image.shape[-2:]) for image in conditioning["image_latents"]
        ]
    return flow_model


def add_adapter(flow_model: FlowModel, mode: FakeTensorMode, config: PeftConfig, dtype: torch.dtype) -> PeftModel:
    """The denoiser of a [`fake_flow_model`] with an adapter in the dtype."""
    network = get_peft_model(flow_model.denoiser, config, low_cpu_mem_usage=True)
    with mode:
        for part in network.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.requires_grad:
                    setattr(part, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    return network


def _cast(module: ModelMixin, dtype: torch.dtype) -> None:
    """As `from_pretrained` loads a module in a dtype. `to` cannot change the dtype of tensors without memory."""
    kept = module._keep_in_fp32_modules or []
    for path, part in module.named_modules():
        if not any(name in path.split(".") for name in kept):
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(parameter.detach().to(dtype)))
