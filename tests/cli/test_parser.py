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

from dataclasses import fields

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_diffusion.cli import chunk_grpo, srpo
from trl_diffusion.cli.prompts import load_prompts
from trl_diffusion.cli.training import ScriptArguments
from trl_diffusion.trainer import ChunkGRPOConfig, SRPOConfig


REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "clip"]
COMMANDS = [(chunk_grpo, ChunkGRPOConfig), (srpo, SRPOConfig)]


def parse(tmp_path, arguments, text=None):
    arguments = [*REQUIRED, "--output_dir", str(tmp_path), *arguments]
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
        arguments = ["--config", str(tmp_path / "run.yaml"), *arguments]
    return chunk_grpo.make_parser().parse_args_and_config(arguments)


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_every_field_is_an_option(command, config):
    options = command.make_parser()._option_string_actions
    names = [field.name for dtype in (ScriptArguments, config) for field in fields(dtype) if field.init]
    assert len(names) > 150
    assert [name for name in names if f"--{name}" not in options] == []


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_help_is_grouped_as_the_docstrings_are(command, config):
    text = command.make_parser().format_help()
    groups, heading = {}, None
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        elif line.startswith("  --"):
            groups[line.split()[0].rstrip(",")] = heading
    assert groups["--model_name_or_path"] == "Model, prompts and rewards"
    assert groups["--lora_r"] == "LoRA"
    assert groups["--sigma_shift"] == "Parameters that control sampling"
    assert groups["--save_total_limit"] == "Checkpointing & Saving"  # of TrainingArguments
    own = {"--chunk_sizes": "Parameters that control chunks"} if config is ChunkGRPOConfig else {}
    assert all(groups[option] == heading for option, heading in own.items())
    # Each option is shown once, and those of the method before those of the Trainer.
    assert text.count("\n  --learning_rate ") == 1
    assert text.index("--sigma_shift ") < text.index("--save_total_limit ")


@pytest.mark.parametrize("method", ["", "--preset=dance_grpo", "yaml"])
def test_preset_is_overridden_by_the_file_and_that_by_the_command_line(tmp_path, method):
    text = ("preset: dance_grpo\n" if method == "yaml" else "") + "num_generations: 6\nmax_grad_norm: 0.5\n"
    arguments = ["--preset", "dance_grpo"] if not method else [method] if method.startswith("--") else []
    _, config = parse(tmp_path, [*arguments, "--num_generations", "4"], text)
    assert (config.sde_type, config.eta, config.height) == ("dance", 0.3, 720)  # the preset's
    assert config.max_grad_norm == 0.5
    assert config.num_generations == 4


def test_preset_of_the_command_line_replaces_that_of_the_file(tmp_path):
    script, config = parse(tmp_path, ["--preset", "flow_grpo"], "preset: dance_grpo\n")
    assert (script.preset, config.sde_type) == ("flow_grpo", "flow")


@pytest.mark.parametrize("command", [chunk_grpo, srpo])
def test_presets_of_the_command_are_those_of_the_class(tmp_path, command):
    config = dict(COMMANDS)[command]
    for name in config.PRESETS:
        arguments = [*REQUIRED, "--output_dir", str(tmp_path), "--preset", name]
        _, parsed = command.make_parser().parse_args_and_config(arguments)
        wanted = config.preset(name, output_dir=str(tmp_path))
        different = [
            field.name
            for field in fields(config)
            if getattr(parsed, field.name) != getattr(wanted, field.name)
            and field.name not in ("logging_dir", "accelerator_config")
        ]
        assert different == []


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_a_preset_has_its_rewards_which_file_and_command_line_override(command, config, tmp_path):
    required = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    (tmp_path / "run.yaml").write_text("reward_funcs: [aesthetic]\n")
    for name, rewards in config.PRESET_REWARDS.items():
        for more, expected in [
            ([], rewards),
            (["--config", str(tmp_path / "run.yaml")], ["aesthetic"]),
            (["--reward_funcs", "clip:scale=2"], ["clip:scale=2"]),
        ]:
            script, _ = command.make_parser().parse_args_and_config([*required, "--preset", name, *more])
            assert script.reward_funcs == expected


def test_a_file_gives_rewards_their_options(tmp_path):
    text = "model_name_or_path: m\ndataset_name: d\n" + (
        "reward_funcs: [{name: pickscore, scale: 0.05}, hpsv2:dtype=bfloat16]\n"
        "watch_reward_funcs: {name: clip, reward_batch_size: 4}\n"
    )
    (tmp_path / "run.yaml").write_text(text + f"output_dir: {tmp_path}\n")
    script, _ = chunk_grpo.make_parser().parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert script.reward_funcs == [{"name": "pickscore", "scale": 0.05}, "hpsv2:dtype=bfloat16"]
    assert script.watch_reward_funcs == [{"name": "clip", "reward_batch_size": 4}]
    (tmp_path / "run.yaml").write_text(text.replace("scale", "scal") + f"output_dir: {tmp_path}\n")
    with pytest.raises(ValueError, match="no option 'scal'"):
        chunk_grpo.make_parser().parse_args_and_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_generation", "8"], r"--num_generation\. Did you mean --num_generations\?"),
        (["--learnin-rate=1e-4"], r"--learnin-rate\. Did you mean --learning_rate\?"),
        (["--zzz", "8"], r"--zzz\. '--help' lists"),
        (["--preset", "ppo"], r"'ppo'\. Choose one of chunk_grpo, dance_grpo, flow_dppo, flow_grpo, flow_grpo_fast, "),
    ],
)
def test_wrong_names_on_the_command_line(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_generatoins: 8\n", r"'num_generatoins' in the configuration file\. Did you mean num_generations\?"),
        ("num_generations: 8.5\n", "num_generations must be of type int, got 8.5"),
        ("num_generations: [8]\n", "num_generations takes one value"),
        ("sde_type: ode\n", "sde_type must be one of flow, dance, cps, got 'ode'"),
        ("preset: ppo\n", "unknown preset 'ppo'"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, [], text)


def test_numbers_and_words_that_yaml_reads_otherwise(tmp_path):
    # YAML 1.1: 1e-5 is a string and a bare no is false.
    text = "learning_rate: 1e-5\neval_strategy: no\nreward_weights: [1e-1]\nwatch_reward_funcs: ocr:re.findall\nlog_samples: off\n"
    script, config = parse(tmp_path, [], text)
    assert config.learning_rate == 1e-5 and config.eval_strategy == "no"
    assert config.reward_weights == [0.1] and config.log_samples is False
    assert script.watch_reward_funcs == ["ocr:re.findall"]


def test_prompts_from_folders(tmp_path):
    rows = Dataset.from_list([{"prompt": f"prompt {i}"} for i in range(3)])
    (tmp_path / "files").mkdir()
    rows.to_json(tmp_path / "files" / "train.jsonl")
    assert load_prompts(str(tmp_path / "files"))["prompt"][:] == rows["prompt"][:]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("prompt 0\nprompt 1\nprompt 2\n")
    assert load_prompts(str(tmp_path / "texts"))["prompt"][:] == rows["prompt"][:]
    rows.save_to_disk(tmp_path / "saved")
    assert load_prompts(str(tmp_path / "saved"))["prompt"][:] == rows["prompt"][:]
    DatasetDict(test=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert load_prompts(str(tmp_path / "splits"), "test")["prompt"][:] == ["prompt 1"]


@pytest.mark.parametrize("kind", ["file", "saved", "shapes"])
def test_streaming_takes_the_first_rows(tmp_path, kind):
    names = [f"prompt {i}" for i in range(5)]
    if kind == "file":
        source = tmp_path / "prompts.txt"
        source.write_text("\n".join(names))
    elif kind == "saved":
        source = tmp_path / "saved"
        Dataset.from_dict({"prompt": names}).save_to_disk(source)
    else:
        source, names = "shapes", load_prompts("shapes")["prompt"][:5]
    streamed = load_prompts(str(source), streaming=True, max_prompts=3)
    assert isinstance(streamed, Dataset) and streamed["prompt"][:] == names[:3]
    stream = load_prompts(str(source), streaming=True)
    assert isinstance(stream, IterableDataset)
    assert [row["prompt"] for row in stream.take(5)] == names[:5]
    assert load_prompts(str(source), max_prompts=2)["prompt"][:] == names[:2]
    assert len(load_prompts(str(source), max_prompts=10**6)) >= 5


def test_prompts_in_another_column(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("caption,prompt\na fox,x\n")
    assert load_prompts(str(path), prompt_column="caption")[0] == {"prompt": "a fox"}
    with pytest.raises(ValueError, match=r"no column 'text', only \['caption', 'prompt'\].*--prompt_column"):
        load_prompts(str(path), prompt_column="text")


def test_impossible_numbers_of_prompts():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_prompts("shapes", max_prompts=0)
