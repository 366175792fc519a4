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

"""
`trl-diffusion evaluate`: adapters against their base model, on the same prompts and the same noise.

```bash
trl-diffusion evaluate --model_name_or_path shapes --adapter demo-chunk-grpo --rewards shapes-judge shapes-clip \
    --prompts shapes --num_inference_steps 10
```
"""

from collections.abc import Sequence
from pathlib import Path

from .evaluate_arguments import EvaluateArguments
from .parser import CommandParser


def main(arguments: Sequence[str]) -> int:
    parser = CommandParser(
        [EvaluateArguments],
        prog="trl-diffusion evaluate",
        usage="trl-diffusion evaluate --model_name_or_path MODEL --adapter ADAPTER [ADAPTER ...] --rewards REWARD "
        "[REWARD ...] --prompts PROMPTS [--output_dir FOLDER] [options]",
        description="Compare adapters with their base model on the same prompts and noise.",
    )
    with parser.user_errors():
        (args,) = parser.parse_args_and_config(arguments)

        from ..data.prompts import check_prompts
        from ..evaluation import markdown_table
        from ..hub.conversion import find_adapter
        from .evaluation_folder import Evaluation

        dataset = args.load_prompts(args.prompts)
        check_prompts(dataset, "prompts")
        files = {name: find_adapter(adapter) for name, adapter in zip(args.adapter_names, args.adapter, strict=True)}
        evaluation = Evaluation(args, dataset, files)
        evaluation.load()
    evaluation.draw()
    evaluation.score()
    results = evaluation.write()
    print(markdown_table(results["rewards"]))
    print(f"{Path(args.output_dir) / 'report.html'} shows the images.")
    return 0
