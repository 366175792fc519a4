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
Every preset and ready file has a gradient with its own reward, on the scale that the real reward model has.

The truth are the means that the papers report for images of FLUX.1-dev (docs/papers.md) and, by hand, the loss where both
prompts get the same score s: relu(0.7 - k s), k linear in sigma between the ends of a branch.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_diffusion import ChunkGRPOConfig, SRPOConfig, SRPOTrainer
from trl_diffusion.cli.chunk_grpo import make_parser as make_chunk_grpo_parser
from trl_diffusion.cli.srpo import make_parser as make_srpo_parser
from trl_diffusion.objectives import discount_at, group_advantages, preference_loss, relative_preference
from trl_diffusion.rewards import check_reward, is_differentiable, usual_range
from trl_diffusion.trainer.srpo_trainer import active_share


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PUBLISHED_MEANS = {"hpsv2": 0.289, "pickscore": 22.671, "hpsv3": 13.804}
REQUIRED = ["--model_name_or_path", "shapes", "--dataset_name", "shapes", "--use_cpu"]
SCALES = {"hpsv2": 1.0, "pickscore": 1 / 20, "hpsv3": 1 / 15}


def runs(method):
    presets = {"chunk_grpo": ChunkGRPOConfig, "srpo": SRPOConfig}[method].PRESETS
    return [["--preset", name, *REQUIRED] for name in presets] + [
        ["--config", str(path), "--use_cpu"] for path in sorted((CONFIGS / method).glob("*.yaml"))
    ]


def last_part(arguments):
    return Path(arguments[1]).name


@pytest.mark.parametrize("arguments", runs("srpo"), ids=last_part)
def test_srpo_has_a_loss_at_the_published_scores(arguments, tmp_path):
    script, config = make_srpo_parser().parse_args_and_config([*arguments, "--output_dir", str(tmp_path)])
    (spec,) = script.reward_funcs
    assert is_differentiable(spec)
    name = spec.partition(":")[0]
    score = PUBLISHED_MEANS[name] * SCALES[name]
    low, high = usual_range(spec)
    assert low < score < high and low == pytest.approx(SRPO_LOWEST[name] * SCALES[name], rel=1e-3, abs=1e-9)
    assert config.branches == ["denoise", "inversion"] and config.preference == "relative"
    sigma = torch.linspace(*config.sigma_range, 201, dtype=torch.float64)
    scores = torch.full_like(sigma, score)
    for branch, ends in (("denoise", config.denoise_discount), ("inversion", config.inversion_discount)):
        discount = discount_at(sigma, config.sigma_range, ends)
        loss = preference_loss(relative_preference(scores, scores, discount, branch), config.reward_threshold)
        by_hand = np.maximum(0, 0.7 - np.linspace(*ends, 201) * score)
        np.testing.assert_allclose(loss.numpy(), by_hand, atol=1e-12)
        assert (loss > 0).double().mean() > 0.9
        assert active_share(config, (low, high), branch) > 0.5


SRPO_LOWEST = {"hpsv2": 0.14, "pickscore": 18.0, "hpsv3": 0.0}


@pytest.mark.parametrize("arguments", runs("chunk_grpo"), ids=last_part)
def test_chunk_grpo_has_advantages_at_the_published_scores(arguments, tmp_path):
    script, config = make_chunk_grpo_parser().parse_args_and_config([*arguments, "--output_dir", str(tmp_path)])
    (spec,) = script.reward_funcs
    check_reward(spec)
    name = "hpsv3" if spec.startswith("remote:") else spec.partition(":")[0]
    # A spread of a percent of the score within a group, as of images from one noise.
    size = config.num_generations
    scores = PUBLISHED_MEANS[name] * (1 + 0.01 * np.random.default_rng(0).standard_normal(size))
    advantages, _ = group_advantages(torch.tensor(scores), size, config.scale_rewards, config.advantage_clip)
    np.testing.assert_allclose(advantages.numpy(), (scores - scores.mean()) / scores.std(ddof=1), rtol=1e-4)
    assert (advantages != 0).all()


def test_every_preset_has_rewards():
    for config in (ChunkGRPOConfig, SRPOConfig):
        assert config.PRESETS.keys() == config.PRESET_REWARDS.keys()


@pytest.mark.parametrize(
    ("preset", "reward", "message"),
    [
        ("srpo_pickscore", "pickscore", "'pickscore' gives scores of about 18 to 24, .*'denoise' would be 0"),
        ("srpo_pickscore", {"name": "pickscore", "scale": 2}, "scores of about 36 to 48"),
        ("srpo_hpsv2", "hpsv2:scale=100", "scores of about 14 to 33"),
    ],
)
def test_a_reward_beyond_the_threshold_is_refused_before_anything_loads(preset, reward, message, tmp_path):
    from datasets import Dataset

    config = SRPOConfig.preset(preset, output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"{message}.*pickscore:scale=0.05.*raise reward_threshold"):
        SRPOTrainer("no/model", reward, config, Dataset.from_list([{"prompt": "a cat"}]))


def test_presets_and_files_say_whether_they_were_measured():
    """A file in its first comment, and the page on the papers of each preset."""
    for path in CONFIGS.glob("*/*.yaml"):
        comment = path.read_text(encoding="utf-8").partition("\n\n")[0]
        mark = "From the paper, not measured." if path.stem.endswith("_paper") else "Not measured."
        assert comment.endswith(mark), path
    page = (CONFIGS.parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
    sentence = page[page.index("All presets, of both trainers, are from the papers") :].partition(".\n\n")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == {*ChunkGRPOConfig.PRESETS, *SRPOConfig.PRESETS}
