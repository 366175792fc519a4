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

import json

import pytest

from trl_diffusion.cli.chunk_grpo import main, make_parser
from trl_diffusion.cli.prompts import load_prompts
from trl_diffusion.cli.training import ScriptArguments


REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "clip", "aesthetic"]


def test_command_line_reaches_both_dataclasses(tmp_path):
    script_args, training_args = make_parser().parse_args_and_config(
        [*REQUIRED, "--num_inference_steps", "10", "--chunk_sizes", "1", "2", "2", "4", "--output_dir", str(tmp_path)]
    )
    assert script_args.reward_funcs == ["clip", "aesthetic"]
    assert script_args.peft_config() is None
    assert training_args.num_inference_steps == 10
    assert training_args.chunk_sizes == [1, 2, 2, 4]


def test_yaml_gives_values_and_the_command_line_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: m\ndataset_name: d\nreward_funcs: [clip]\nlearning_rate: 3e-4\neta: 0.5\n"
        f"chunk_sizes: [1, 2, 2, 4]\nnum_inference_steps: 10\noutput_dir: {tmp_path}\n"
    )
    script_args, training_args = make_parser().parse_args_and_config(["--config", str(config), "--eta", "0.6"])
    assert script_args.model_name_or_path == "m"
    assert training_args.learning_rate == 3e-4
    assert training_args.eta == 0.6
    assert training_args.chunk_sizes == [1, 2, 2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generatoins: 8\n", "num_generatoins"),
        ("chunk_sizes: [1, 2]\nnum_inference_steps: 10\n", "sum to 3"),
        ("num_generations: 1\n", "num_generations"),
        ("lora_r: 0\n", "lora_r must be at least 1"),
        ("lora_dropout: 1\n", "lora_dropout must lie in"),
        ("use_peft: false\nlora_dropout: 0.1\n", "lora_dropout were given"),
        ("lora_target_modules: 'to_(q'\n", "no regular expression"),
        ("lora_target_modules: [to_q, all-linear]\n", "'all-linear' among 2"),
        ("use_peft: false\nlora_r: 8\n", "use_peft"),
        ("a: [1\n", "expected"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*REQUIRED, "--num_generation", "8"], "--num_generation"),  # no abbreviations
        ([*REQUIRED, "--nonsense", "8"], "--nonsense"),
        (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
        (["--model_name_or_path", "m"], "--dataset_name"),
    ],
)
def test_wrong_command_line_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "--chunk_fraction" in printed and "--watch_reward_funcs" in printed


def test_lora_arguments():
    arguments = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["clip"]}
    config = ScriptArguments(**arguments, lora_r=64, lora_target_modules=["to_q"]).peft_config()
    assert (config.r, config.lora_alpha, config.target_modules, config.task_type) == (64, 64, {"to_q"}, None)
    assert ScriptArguments(**arguments, lora_r=64, lora_alpha=128).peft_config().lora_alpha == 128
    assert ScriptArguments(**arguments, use_peft=False).peft_config() is False


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"lora_dropout": 0.1}, {"lora_dropout": 0.1}),
        ({"lora_alpha": 8}, {"lora_alpha": 8}),
        ({"lora_target_modules": ["to_q", "to_out.0"]}, {"target_modules": {"to_q", "to_out.0"}}),
        ({"lora_target_modules": ["all-linear"]}, {"target_modules": "all-linear"}),
        ({"lora_target_modules": [r".*\.to_[qk]"]}, {"target_modules": r".*\.to_[qk]"}),
    ],
)
def test_lora_arguments_change_the_default(given, changed):
    config = ScriptArguments(model_name_or_path="m", dataset_name="d", reward_funcs=["clip"], **given).peft_config()
    default = {"r": 32, "lora_alpha": 64, "init_lora_weights": "gaussian", "lora_dropout": 0.0, "target_modules": None}
    assert {name: getattr(config, name) for name in default} == {**default, **changed}


def test_lora_target_modules_in_a_file(tmp_path):
    config = tmp_path / "run.yaml"
    for text, modules in (("all-linear", "all-linear"), ("to_q", {"to_q"}), ("[to_q, to_k]", {"to_q", "to_k"})):
        config.write_text(f"lora_target_modules: {text}\noutput_dir: {tmp_path}\n")
        script_args, _ = make_parser().parse_args_and_config(["--config", str(config), *REQUIRED])
        assert script_args.peft_config().target_modules == modules


PROMPTS = ["a fox", "ein Bär", 'a "quoted", comma']


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_prompts_from_a_file(tmp_path, ending):
    path = tmp_path / f"prompts{ending}"
    if ending == ".txt":
        path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    elif ending == ".parquet":
        import pandas

        pandas.DataFrame({"prompt": PROMPTS}).to_parquet(path)
    elif ending == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["prompt"], *[[prompt] for prompt in PROMPTS]])
    else:
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    assert load_prompts(str(path), split="test")["prompt"][:] == PROMPTS


def test_prompts_of_the_embedded_world():
    train, test = load_prompts("shapes", "train"), load_prompts("shapes", "test")
    assert len(train) > 0 and not set(train["prompt"]) & set(test["prompt"])


def test_file_of_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "prompts.xlsx"
    path.write_text("")
    with pytest.raises(ValueError, match=r"prompts\.xlsx.*\.jsonl"):
        load_prompts(str(path), "train")
