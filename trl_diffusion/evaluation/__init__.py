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

"""Adapters against their base model, on the same prompts and the same noise."""

from .adapters import Adapters
from .comparison import compare, markdown_table
from .evaluator import Evaluator, evaluation_share
from .report import write_report


__all__ = ["Adapters", "Evaluator", "compare", "evaluation_share", "markdown_table", "write_report"]
