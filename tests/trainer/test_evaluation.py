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

"""What an evaluation during training measures, and what hangs on it: the best model, and stopping early."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from trl_diffusion import ChunkGRPOConfig, SRPOConfig
from trl_diffusion.rewards import RewardModel


class Darkness(RewardModel):
    name = "darkness"

    def score(self, images, prompts):
        return 1 - images.mean(dim=(1, 2, 3))


def only_cats(images, prompts, **columns):
    """Does not apply to most prompts."""
    return [float(i) if "cat" in prompt else None for i, prompt in enumerate(prompts)]


class DarkCats(RewardModel):
    """Does not apply to most prompts."""

    name = "dark_cats"

    def score(self, images, prompts):
        applies = torch.tensor(["cat" in prompt for prompt in prompts], device=images.device)
        return torch.where(applies, 1 - images.mean(dim=(1, 2, 3)), torch.nan)


class CountImages:
    """Counts what the trainer draws for evaluations: through the reward, which sees every image."""

    def __init__(self):
        self.images = 0

    def __call__(self, images, prompts, **columns):
        self.images += len(images)
        return [0.0] * len(images)


def test_base_model_is_scored_once_and_logged_beside(make_trainer, train_dataset):
    counter = CountImages()
    trainer = make_trainer(
        eval_dataset=train_dataset, num_eval_images=6, watch_reward_funcs=[Darkness(), counter, only_cats],
        eval_strategy="steps", eval_steps=1, max_steps=2, rollout_batch_size=3,
        reward_weights=[0.5], max_grad_norm=0.0,
    )  # fmt: skip
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 2
    # 6 of the base model, 6 of each evaluation, and those that were trained on.
    trained = 2 * trainer.args.generation_batch_size
    assert counter.images == 6 + 2 * 6 + trained

    prompts = train_dataset["prompt"][:]
    images = {fraction: trainer.generate(prompts, range(6), adapter_fraction=fraction) for fraction in (0.0, 1.0)}
    for prefix, fraction in (("eval_base/", 0.0), ("eval_", 1.0)):
        expected = trainer.scorer.score(trainer.rewards, images[fraction], prompts, {}).mean().item()
        assert evaluations[-1][f"{prefix}rewards/redness/mean"] == pytest.approx(expected, abs=1e-6)
        assert evaluations[-1][f"{prefix}reward"] == pytest.approx(expected / 2, abs=1e-6)
        darkness = (1 - images[fraction].mean(dim=(1, 2, 3))).mean().item()
        assert evaluations[-1][f"{prefix}watch/darkness/mean"] == pytest.approx(darkness, abs=1e-6)
    assert evaluations[0]["eval_base/reward"] == evaluations[1]["eval_base/reward"]


def test_win_rate_is_the_share_of_better_images(make_trainer, train_dataset):
    trainer = make_trainer(
        eval_dataset=train_dataset, num_eval_images=6, watch_reward_funcs=[Darkness(), DarkCats(), only_cats]
    )
    # An adapter that does nothing yet: every image ties.
    first = trainer.evaluate()
    assert first["eval_win_rate/reward"] == first["eval_win_rate/rewards/redness"] == 0.5
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    metrics = trainer.evaluate()
    prompts = train_dataset["prompt"][:]
    base, aligned = (trainer.generate(prompts, range(6), adapter_fraction=fraction) for fraction in (0.0, 1.0))
    darker = (base - aligned).mean(dim=(1, 2, 3))
    expected = ((darker > 0).float() + (darker == 0).float() / 2).mean().item()
    assert metrics["eval_win_rate/watch/darkness"] == pytest.approx(expected)
    # Images that a reward does not apply to are no ties.
    cats = torch.tensor(["cat" in prompt for prompt in prompts])
    assert 0 < cats.sum() < 6 and (darker[cats] != 0).all()
    assert metrics["eval_win_rate/watch/dark_cats"] == pytest.approx((darker[cats] > 0).float().mean().item())
    assert metrics["eval_win_rate/watch/only_cats"] == 0.5 and not math.isnan(
        metrics["eval_base/watch/only_cats/mean"]
    )


def test_other_prompts_have_scores_of_their_own(make_trainer, train_dataset):
    trainer = make_trainer(eval_dataset=train_dataset, num_eval_images=2, watch_reward_funcs=Darkness())
    first = trainer.evaluate()["eval_base/watch/darkness/mean"]
    other = trainer.evaluate(train_dataset.select([4, 5]), metric_key_prefix="other")
    assert other["other_base/watch/darkness/mean"] == other["other_watch/darkness/mean"] != first
    assert trainer.evaluate()["eval_base/watch/darkness/mean"] == first


def test_full_fine_tuning_has_no_base_model_at_hand(make_trainer, train_dataset):
    trainer = make_trainer(eval_dataset=train_dataset, num_eval_images=2, peft_config=False)
    assert set(trainer.evaluate()) - {"epoch"} == {"eval_reward", "eval_rewards/redness/mean"}


@pytest.mark.parametrize(
    ("peft_config", "greater"), [({}, True), ({"peft_config": False}, False)], ids=["lora", "full"]
)
def test_best_model_by_a_watched_measure_is_loaded_at_the_end(
    make_trainer, train_dataset, tmp_path, peft_config, greater
):
    values = {0: 0.0, 1: 5.0, 2: 9.0, 3: 7.0}

    def scripted(images, prompts, **columns):
        value = values[trainer.state.global_step]
        return [value if greater else -value] * len(images)

    trainer = make_trainer(
        eval_dataset=train_dataset, num_eval_images=2, watch_reward_funcs=scripted, max_steps=3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="watch/scripted/mean", greater_is_better=greater, **peft_config,
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_global_step, abs(trainer.state.best_metric)) == (2, 9.0)
    live = trainer.model.state_dict()
    if peft_config:
        file = "transformer/diffusion_pytorch_model.safetensors"
        names = {name: name for name in live}
    else:
        file = "adapter_model.safetensors"
        names = {name.replace(".default.", "."): name for name in live if "lora" in name}
    saved = {step: load_file(tmp_path / "out" / f"checkpoint-{step}" / file) for step in (2, 3)}
    assert set(saved[2]) == set(names)
    for name, tensor in saved[2].items():
        assert torch.equal(live[names[name]], tensor), name
    assert any(not torch.equal(tensor, saved[3][name]) for name, tensor in saved[2].items())


def test_stops_early_by_a_watched_measure(make_trainer, train_dataset):
    """What only ever falls stops the training after as many evaluations as the patience says."""
    count = iter(range(100, 0, -1))

    def falling(images, prompts, **columns):
        value = float(next(count))
        return [value] * len(images)

    trainer = make_trainer(
        eval_dataset=train_dataset, num_eval_images=2, watch_reward_funcs=falling, max_steps=10,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_watch/falling/mean",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 1


@pytest.mark.parametrize("best", [{"load_best_model_at_end": True}, {"save_strategy": "best"}, {}])
def test_the_reward_says_which_is_best(make_trainer, train_dataset, best):
    """Without metric_for_best_model: of the rewards 0, 5, 9, 7, 3 the third is best, and two worse ones are enough."""
    values = [0.0, 5.0, 9.0, 7.0, 3.0, 1.0]

    def scripted(images, prompts, **columns):
        return [values[trainer.state.global_step]] * len(images)

    settings = {"save_strategy": "steps", "save_steps": 1, **best}
    trainer = make_trainer(
        reward_funcs=scripted, eval_dataset=train_dataset, num_eval_images=2, max_steps=5, eval_strategy="steps",
        eval_steps=1, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], **settings,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, 9.0)


def test_the_best_of_srpo_is_its_objective(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "eval_strategy": "steps", "eval_steps": 1}
    config = SRPOConfig(load_best_model_at_end=True, save_steps=1, **settings)
    assert (config.metric_for_best_model, config.greater_is_better) == ("objective", True)
    # A learning rate that follows the reward falls when it stops rising.
    config = ChunkGRPOConfig(lr_scheduler_type="reduce_lr_on_plateau", **settings)
    assert (config.metric_for_best_model, config.lr_scheduler_kwargs) == ("reward", {"mode": "max"})


def test_a_best_model_needs_evaluations(make_trainer, train_dataset):
    with pytest.raises(ValueError, match="load_best_model_at_end=True needs evaluations, and eval_strategy is 'no'"):
        make_trainer(load_best_model_at_end=True)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match="eval_strategy is 'steps', but there is no eval_dataset. Pass one"):
        make_trainer(load_best_model_at_end=True, **settings)
    for metric in ("loss", "eval_watch/redness/mean"):
        message = (
            f"metric_for_best_model='{metric}' is not .* Choose one of reward, rewards/redness/mean, base/reward, "
        )
        with pytest.raises(ValueError, match=message):
            make_trainer(eval_dataset=train_dataset, metric_for_best_model=metric, **settings)
