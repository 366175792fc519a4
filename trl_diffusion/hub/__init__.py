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

"""What goes to the Hub, and the way there: the adapter's files, the model card, the push."""

from .adapter import check_lora_config, check_names, plain_network, save_adapter
from .model_card import build_model_card, hub_id
from .publisher import Publisher
from .push import (
    CARD_NAME,
    check_login,
    create_repository,
    files_of,
    hub_client,
    inherited_license,
    model_files,
    push_files,
    push_model,
    shown_files,
)


__all__ = [
    "CARD_NAME",
    "Publisher",
    "build_model_card",
    "check_login",
    "check_lora_config",
    "check_names",
    "create_repository",
    "files_of",
    "hub_client",
    "hub_id",
    "inherited_license",
    "model_files",
    "plain_network",
    "push_files",
    "push_model",
    "save_adapter",
    "shown_files",
]
