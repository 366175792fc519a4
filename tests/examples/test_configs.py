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

"""The ready YAML files: the command line takes each, and they say what their names promise."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.cli.main import main
from trl_diffusion.cli.training import make_parser
from trl_diffusion.rewards import check_reward, is_differentiable, parse_spec


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FILES = sorted(CONFIGS.glob("*/*.yaml"))
TRAINERS = {"chunk_grpo": ChunkGRPOTrainer, "srpo": SRPOTrainer}
# What differs between a run by the published settings and the preset, which leaves the number of GPUs open.
NOT_OF_THE_PRESET = {"srpo": {"gradient_accumulation_steps": 4}, "chunk_grpo": {}}


def parse(path):
    parser = make_parser(TRAINERS[path.parent.name].config_class, path.parent.name, "method")
    return parser.parse_args_and_config(["--config", str(path)])


# What is trained, by the name of the family in the file's.
MODELS = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "z-image": "Tongyi-MAI/Z-Image",
    "chroma": "lodestones/Chroma1-HD",
    "krea2": "krea/Krea-2-Raw",
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "qwen-image": "Qwen/Qwen-Image",
    "qwen-image-edit": "Qwen/Qwen-Image-Edit-2509",
    "sana": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
}

# Of an image on 80 GB, where not that of the others.
SIDE = {"sana": 1024}
# Of videos, on every card.
FRAMES = {("chunk_grpo", "80gb"): 81, ("chunk_grpo", "24gb"): 33, ("srpo", "80gb"): 33, ("srpo", "24gb"): 5}


def named(path):
    return path.parent.name, *path.stem.split("_")


def test_there_is_a_file_for_everything_that_fits():
    wanted = {
        (method, "flux", reward, place)
        for method in TRAINERS
        for reward in ("hpsv2", "hpsv3", "pickscore")
        for place in ("paper", "80gb", "24gb")
    }
    wanted |= {
        (method, family, "hpsv2", place)
        for method in TRAINERS
        for family in MODELS.keys() - {"flux"}
        for place in ("80gb", "24gb")
    }
    without_room = {("srpo", "flux", "hpsv3", "24gb")}
    assert set(map(named, FILES)) == wanted - without_room
    assert len({yaml.safe_load(path.read_text())["output_dir"] for path in FILES}) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join(named(path)))
def test_the_command_line_takes_it(path):
    method, family, reward, place = named(path)
    script_args, config = parse(path)
    assert script_args.model_name_or_path == MODELS[family]
    # The papers' settings are of FLUX.1-dev; no other file has been run on its card.
    assert (family == "flux") or "Not measured." in path.read_text(encoding="utf-8").splitlines()[0]
    (spec,) = script_args.reward_funcs
    check_reward(spec)
    assert parse_spec(spec).name == reward or (
        spec.startswith("remote:") and (method, reward, place) == ("chunk_grpo", "hpsv3", "24gb")
    )
    assert method == "chunk_grpo" or is_differentiable(spec)
    # A LoRA on one card, with its own learning rate; all weights with the papers'.
    assert script_args.use_peft is (place != "paper")
    assert (config.learning_rate >= 1e-4) is (place != "paper")
    if family == "wan":
        assert (config.height, config.width, config.num_frames) == (480, 832, FRAMES[method, place])
    else:
        assert (config.height, config.width) == ((512, 512) if place == "24gb" else (SIDE.get(family, 720),) * 2)
        assert config.num_frames is None
    if method == "srpo":
        processes = 8 if place == "paper" else 1
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == 32
    else:
        assert config.generation_batch_size % config.num_generations == 0
        assert config.chunk_sizes == [2, 3, 4, 7] and config.chunk_sampling == "temporal"


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("chunk_grpo/flux_hpsv3_paper.yaml", ChunkGRPOConfig.PRESETS["chunk_grpo"]),
        ("chunk_grpo/flux_hpsv2_paper.yaml", ChunkGRPOConfig.PRESETS["chunk_grpo"]),
        ("chunk_grpo/flux_pickscore_paper.yaml", ChunkGRPOConfig.PRESETS["chunk_grpo"]),
        ("srpo/flux_hpsv2_paper.yaml", SRPOConfig.PRESETS["srpo_hpsv2"]),
        ("srpo/flux_pickscore_paper.yaml", SRPOConfig.PRESETS["srpo_pickscore"]),
    ],
)
def test_the_papers_settings_are_the_presets(name, preset):
    path = CONFIGS / name
    _, config = parse(path)
    expected = {**preset, **NOT_OF_THE_PRESET[path.parent.name]}
    assert {key: vars(config)[key] for key in expected} == expected


@pytest.mark.parametrize(("reward", "scale"), [("pickscore", 1 / 20), ("hpsv3", 1 / 15)])
def test_scores_are_scaled_to_the_threshold(reward, scale):
    for path in CONFIGS.glob(f"srpo/flux_{reward}_*.yaml"):
        script_args, config = parse(path)
        (spec,) = script_args.reward_funcs
        assert float(parse_spec(spec).options["scale"]) == pytest.approx(scale, rel=1e-3)
        assert config.reward_threshold == 0.7 and config.reward_weights is None


@pytest.mark.parametrize("method", ["chunk_grpo", "srpo"])
def test_a_file_trains_the_built_in_model(method, tmp_path):
    """All that is of FLUX.1-dev and of its size is given on the command line, which wins."""
    status = main(
        [
            method, "--config", str(CONFIGS / method / "flux_hpsv2_80gb.yaml"), "--output_dir", str(tmp_path),
            "--model_name_or_path", "shapes", "--dataset_name", "shapes", "--reward_funcs", "shapes-clip",
            "--height", "32", "--width", "32", "--max_steps", "1", "--gradient_accumulation_steps", "1",
            "--reward_gradient_checkpointing" if method == "srpo" else "--steps_per_generation",
            "true" if method == "srpo" else "3", "--lora_r", "4",
        ]
    )  # fmt: skip
    assert status == 0
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
