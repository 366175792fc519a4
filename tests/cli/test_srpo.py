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

import pytest
from safetensors.torch import load_file

from trl_diffusion.cli.main import main as trl_diffusion
from trl_diffusion.cli.srpo import main, make_parser


REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "clip"]


def test_command_line_reaches_both_dataclasses(tmp_path):
    script_args, training_args = make_parser().parse_args_and_config(
        [*REQUIRED, "--sigma_range", "0.6", "0.9", "--branches", "denoise", "--positive_words", "sharp", "crisp",
         "--lora_r", "8", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert script_args.reward_funcs == ["clip"] and script_args.peft_config().r == 8
    assert training_args.sigma_range == [0.6, 0.9] and training_args.branches == ["denoise"]
    assert training_args.positive_words == ["sharp", "crisp"] and "Painting" in training_args.negative_words


def test_yaml_gives_words_for_each_reward(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\ndataset_name: d\nreward_funcs: [clip, aesthetic]\npreference: interpolated\n"
        f"positive_words: {{clip: [Real], aesthetic: [Detail, Sharp]}}\nnegative_words: [Flat]\noutput_dir: {tmp_path}\n"
    )
    _, training_args = make_parser().parse_args_and_config(["--config", str(config), "--num_landings", "2"])
    assert training_args.positive_words == {"clip": ["Real"], "aesthetic": ["Detail", "Sharp"]}
    assert (training_args.preference, training_args.num_landings) == ("interpolated", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_landing: 8\n", "num_landing"),
        ("sigma_range: [0.9, 0.5]\n", "sigma_range must ascend"),
        ("positive_words: []\n", "positive_words is empty"),
        ("estimator: draft\ndraft_steps: 30\n", "draft_steps=30"),
    ],
)
def test_wrong_yaml_ends_with_one_readable_message(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: m\ndataset_name: d\nreward_funcs: [clip]\noutput_dir: {tmp_path}\n" + text)
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(config)])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed) < 1000  # not the usage of 200 options


def test_trains_the_built_in_model(tmp_path):
    status = trl_diffusion(
        ["srpo", "--model_name_or_path", "shapes", "--dataset_name", "shapes", "--reward_funcs", "shapes-clip",
         "--watch_reward_funcs", "shapes-judge", "--eval_strategy", "steps", "--eval_steps", "1", "--num_eval_images",
         "4", "--output_dir", str(tmp_path), "--num_inference_steps", "3", "--per_device_train_batch_size", "4",
         "--positive_words", "sharp", "--negative_words", "blurred", "--max_steps", "1", "--use_cpu", "--lora_r", "4",
         "--save_strategy", "no"]
    )  # fmt: skip
    assert status == 0
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
