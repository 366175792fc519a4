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

from .base import FlowModel
from .chroma import ChromaFlowModel
from .conditioning import Conditioning, open_prompt_store
from .flux import FluxFlowModel
from .flux2 import Flux2FlowModel, Flux2KleinFlowModel
from .flux_kontext import FluxKontextFlowModel
from .krea2 import Krea2FlowModel
from .loading import FLOW_MODELS, load_flow_model, whole_weights
from .qwen_image import QwenImageFlowModel
from .qwen_image_edit import QwenImageEditFlowModel, QwenImageEditPlusFlowModel
from .sampler import Sampler
from .sana import SanaFlowModel
from .sd3 import SD3FlowModel
from .wan import WanFlowModel
from .z_image import ZImageFlowModel


__all__ = [
    "FLOW_MODELS",
    "ChromaFlowModel",
    "Conditioning",
    "FlowModel",
    "Flux2FlowModel",
    "Flux2KleinFlowModel",
    "FluxFlowModel",
    "FluxKontextFlowModel",
    "Krea2FlowModel",
    "QwenImageEditFlowModel",
    "QwenImageEditPlusFlowModel",
    "QwenImageFlowModel",
    "SD3FlowModel",
    "Sampler",
    "SanaFlowModel",
    "WanFlowModel",
    "ZImageFlowModel",
    "load_flow_model",
    "open_prompt_store",
    "whole_weights",
]
