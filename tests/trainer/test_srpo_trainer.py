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

"""SRPO end to end on tiny models: what it optimises, logs, saves and resumes, and what it refuses."""

import json
import re
import weakref
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from transformers import TrainerControl, TrainerState

from trl_diffusion import SRPOConfig, SRPOTrainer
from trl_diffusion.rewards import RewardModel, TwoTowerReward, VideoRewardModel
from trl_diffusion.trainer.callbacks import RewardHackingCallback
from trl_diffusion.trainer.srpo_trainer import one_step_prediction, scores_of_prompt_sets

from .conftest import PIPELINES, PROMPTS, dataset_of, gradients, redness, trainable


TRAINER_ARGUMENTS = ("peft_config", "watch_reward_funcs", "eval_dataset", "callbacks", "train_dataset", "model")


class Taste(RewardModel):
    """A smooth function of the image that differs from prompt to prompt, and remembers the prompts it saw."""

    name = "taste"

    def __init__(self, name="taste"):
        super().__init__()
        self.name = name
        self.seen = []

    def score(self, images, prompts):
        self.seen.append(list(prompts))
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        weights = [
            torch.randn(48, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode()))) for prompt in prompts
        ]
        return torch.sin((pooled * torch.stack(weights).to(images)).sum(1) / 4)


class Brightness(RewardModel):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Motion(VideoRewardModel):
    """A smooth function of a video's changes, and of the prompt."""

    name = "motion"

    def score(self, videos, prompts):
        words = torch.tensor([len(prompt) for prompt in prompts]).to(videos)
        return torch.tanh(videos.diff(dim=1).square().mean(dim=(1, 2, 3, 4)) * words)


class Towers(TwoTowerReward):
    name = "towers"

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(48, 8)
        self.image_forwards = 0

    def image_features(self, images):
        self.image_forwards += 1
        return self.projection(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))

    def text_features(self, prompts):
        return torch.stack(
            [torch.randn(8, generator=torch.Generator().manual_seed(zlib.crc32(p.encode()))) for p in prompts]
        )


@pytest.fixture
def make_trainer(tmp_path):
    """Builds a trainer of a tiny model; keyword arguments are settings, and some of the trainer's own."""

    def make(family="flux", reward_funcs=None, **settings):
        arguments = {name: settings.pop(name) for name in TRAINER_ARGUMENTS if name in settings}
        arguments.setdefault("peft_config", LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
        arguments.setdefault("train_dataset", dataset_of(family))
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "num_inference_steps": 4,
            "height": 32,
            "width": 32,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "cache_prompt_embeds": False,
        }
        config = SRPOConfig(**{**defaults, **settings})
        model = arguments.pop("model", None) or PIPELINES[family](seed=0)
        return SRPOTrainer(model, Taste() if reward_funcs is None else reward_funcs, config, **arguments)

    return make


def perturb(trainer, scale=0.05, seed=0):
    """Move the adapter away from its start, where its second matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def clean_batch(trainer, prompts=tuple(PROMPTS[:3])):
    """The first batch of a trainer that has not trained yet."""
    dataset = trainer.train_dataset
    images = list(dataset.select_columns("condition_image")) if trainer.flow.takes_image else len(prompts) * [{}]
    rows = [{"prompt": prompt, **image} for prompt, image in zip(prompts, images, strict=False)]
    return trainer._prepare_inputs(rows)


def to_double(trainer, batch, monkeypatch):
    """
    Compute everything in float64.

    Parts of diffusers' networks compute in float32 whatever they are given, with last bits that depend on the CPU: from
    here on tensors become float64 where float32 is asked for.
    """
    to = torch.Tensor.to

    def to_float64(tensor, *args, **kwargs):
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to_float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    trainer.model.double()
    trainer.flow.vae.double()
    trainer.flow.dtype = torch.float64
    batch.clean, batch.noise, batch.sigmas = batch.clean.double(), batch.noise.double(), batch.sigmas.double()
    batch.states = {i: latents.double() for i, latents in batch.states.items()}
    batch.fresh_noise = [noise.double() for noise in batch.fresh_noise]


def total_loss(trainer, batch):
    return sum(term().item() for term in trainer.loss_terms(trainer.model, batch))


def image_dataset(images):
    rows = {"prompt": [f"picture {i}" for i in range(len(images))], "image": images}
    return Dataset.from_dict(rows, features=Features({"prompt": Value("string"), "image": ImageFeature()}))


def picture(width=40, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestRun:
    @pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image"])
    @pytest.mark.parametrize("estimator", ["direct_align", "refl", "draft"])
    def test_trains_logs_and_saves(self, make_trainer, family, estimator, tmp_path):
        trainer = make_trainer(
            family,
            estimator=estimator,
            sigma_range=[0.5, 0.95],
            guidance_scale=3.0,
            save_strategy="steps",
            save_steps=2,
        )
        before = trainable(trainer)
        trainer.train()
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())
        log = trainer.state.log_history[0]
        for name in (
            "loss", "grad_norm", "reward", "rewards/taste/mean", "images_per_second", "time/rollout", "time/decode",
            "time/reward", "time/update", "memory/peak_gib",
        ):  # fmt: skip
            assert np.isfinite(log[name]), name
        for label in ("denoise", "inversion") if estimator == "direct_align" else (estimator,):
            values = {
                name: log[f"{label}/{name}"]
                for name in (
                    "taste/positive", "taste/negative", "taste/difference", "loss", "recovery_error", "clamped", "active",
                )
            }  # fmt: skip
            assert values["taste/difference"] == pytest.approx(values["taste/positive"] - values["taste/negative"])
            assert 0 <= values["active"] <= 1
            assert values["loss"] > 0 and values["recovery_error"] >= 0 and 0 <= values["clamped"] <= 1
        names = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
        assert {"adapter_model.safetensors", "pytorch_lora_weights.safetensors"} <= names

    @pytest.mark.parametrize(
        "settings",
        [
            {"preference": "difference"},
            {"preference": "absolute"},
            {"preference": "interpolated"},
            {"branches": ["denoise"]},
            {"branches": ["inversion"]},
            {"num_landings": 3, "noise_prior": "fresh"},
            {"rollout_guidance_scale": 1.0, "rollout_batch_size": 3, "sigma_shift": None},
            {"vae_slicing": True, "vae_tiling": True, "activation_checkpointing": False},
            {"vae_gradient_checkpointing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"estimator": "draft", "draft_steps": 2},
            {"estimator": "draft", "draft_renoisings": 3},
            {"estimator": "refl", "num_landings": 2, "sigma_range": [0.3, 0.95]},
        ],
        ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
    )
    def test_settings(self, make_trainer, settings):
        trainer = make_trainer(**settings)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.isfinite(weight).all() for weight in trainable(trainer).values())
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())

    def test_rollouts_with_the_lora_in_the_weights(self, make_trainer):
        trainer = make_trainer(rollout_merged_lora=True)
        seen = set()  # gradient, merged
        layer = trainer.network.base_model.model.transformer_blocks[0].attn.to_q
        layer.register_forward_hook(lambda layer, *_: seen.add((torch.is_grad_enabled(), layer.merged)))
        trainer.train()
        assert seen >= {(False, True), (True, False)} and (True, True) not in seen

    @pytest.mark.parametrize("estimator", ["direct_align", "refl", "draft"])
    def test_raises_its_reward(self, make_trainer, estimator):
        trainer = make_trainer(
            reward_funcs=Brightness(), estimator=estimator, preference="absolute", reward_threshold=2.0, max_steps=15,
            learning_rate=2e-2, lr_scheduler_type="constant", sigma_range=[0.5, 0.95], max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train()
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        # An untrained network: it moves little, but surely.
        assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.004
        assert np.corrcoef(np.arange(15), rewards)[0, 1] > 0.8

    def test_twice_gives_the_same(self, make_trainer):
        first, second = make_trainer(), make_trainer()
        first.train()
        second.train()
        for name, weight in trainable(first).items():
            assert torch.equal(weight, trainable(second)[name]), name

    @pytest.mark.parametrize("family", ["flux", "qwen-image"])
    def test_full_fine_tuning_saves_a_transformer(self, make_trainer, family, tmp_path):
        trainer = make_trainer(family, peft_config=False, learning_rate=1e-3)
        trainer.train()
        trainer.save_model()
        transformer_class = type(trainer.flow.denoiser)
        loaded = transformer_class.from_pretrained(tmp_path / "out", subfolder="transformer")
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name

    def test_nothing_but_the_adapter_gets_a_gradient(self, make_trainer):
        reward = Towers()
        trainer = make_trainer(reward_funcs=reward)
        perturb(trainer)
        assert gradients(trainer, clean_batch(trainer)).norm() > 0
        frozen = [*trainer.flow.vae.parameters(), *reward.parameters()]
        frozen += [p for p in trainer.model.parameters() if not p.requires_grad]
        assert all(parameter.grad is None for parameter in frozen)

    def test_samples_and_card_are_written(self, make_trainer, tmp_path):
        trainer = make_trainer(max_steps=1, num_samples_to_log=3)
        trainer.train()
        lines = (tmp_path / "out" / "samples" / "step_000001" / "metadata.jsonl").read_text().splitlines()
        assert len(lines) == 3 and "taste" in json.loads(lines[0])
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "2509.06942" in card and "SRPOTrainer" in card

    @pytest.mark.parametrize(
        ("estimator", "numbers"),
        [
            ("direct_align", ["2509.06942"]),
            ("refl", ["2304.05977", "2509.06942"]),
            ("draft", ["2309.17400", "2509.06942"]),
        ],
    )
    def test_the_card_cites_the_estimator_that_was_used(self, make_trainer, tmp_path, estimator, numbers):
        make_trainer(estimator=estimator, preference="absolute").create_model_card()
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert re.findall(r"arXiv preprint arXiv:([\d.]+)", card) == numbers

    def test_rollout_of_any_batch_size_is_the_same(self, make_trainer):
        whole, parts = (clean_batch(make_trainer(rollout_batch_size=size)) for size in (3, 2))
        torch.testing.assert_close(whole.clean, parts.clean, rtol=0, atol=1e-5)
        assert torch.equal(whole.noise, parts.noise) and torch.equal(whole.sigmas, parts.sigmas)

    def test_noise_prior(self, make_trainer):
        rollout, fresh = (clean_batch(make_trainer(noise_prior=prior)) for prior in ("rollout", "fresh"))
        assert torch.equal(rollout.clean, fresh.clean)
        assert not torch.equal(rollout.noise, fresh.noise)
        # The rollout's noise leads to its clean latents, the deterministic solver says so.
        trainer = make_trainer()
        latents = rollout.noise
        conditioning = trainer.conditioning.get(rollout.prompts)
        with torch.no_grad():
            for sigma, following in zip(trainer.sigmas[:-1], trainer.sigmas[1:], strict=True):
                latents = latents + (following - sigma) * trainer.velocity(
                    trainer.model, latents, sigma.expand(3), conditioning
                )
        torch.testing.assert_close(latents, rollout.clean, rtol=0, atol=1e-5)

    def test_landings_are_in_range_and_differ(self, make_trainer):
        batch = clean_batch(make_trainer(num_landings=5, sigma_range=[0.6, 0.9]))
        assert batch.sigmas.shape == (5, 3)
        assert batch.sigmas.min() >= 0.6 and batch.sigmas.max() <= 0.9
        assert batch.sigmas.unique().numel() == 15


class TestObjective:
    """The loss and its gradient, against the formulas and against finite differences."""

    @pytest.mark.parametrize("preference", ["relative", "difference", "absolute", "interpolated"])
    def test_loss_is_that_of_the_formulas(self, make_trainer, preference):
        first, second = Taste(), Towers()
        trainer = make_trainer(
            reward_funcs=[first, second], reward_weights=[1.0, 0.5], preference=preference, num_landings=2,
            sigma_range=[0.6, 0.9], delta_sigma=0.04, denoise_discount=[0.1, 0.3], inversion_discount=[0.4, 0.2],
            positive_words=["bright", "good"], negative_words=["dark"],
        )  # fmt: skip
        perturb(trainer)
        batch = clean_batch(trainer)
        conditioning = trainer.conditioning.get(batch.prompts)
        vae = trainer.flow.vae
        expected = 0.0
        for sigma in batch.sigmas:
            for branch, sign, (at_clean, at_noisy) in (("denoise", 1, (0.1, 0.3)), ("inversion", -1, (0.4, 0.2))):
                s, k = sigma.view(3, 1, 1, 1), at_clean + (at_noisy - at_clean) * (sigma - 0.6) / 0.3
                x_in = (s + sign * 0.04) * batch.noise + (1 - s - sign * 0.04) * batch.clean
                with torch.no_grad():
                    v = trainer.velocity(trainer.model, x_in, sigma + sign * 0.04, conditioning)
                    # The closed form of the recovered latents.
                    latents = batch.clean + sign * 0.04 / (1 - s) * (batch.noise - batch.clean - v)
                    images = vae.decode(latents / 0.3611 + 0.1159).sample.div(2).add(0.5).clamp(0, 1)
                for reward, weight in ((first, 1.0), (second, 0.5)):
                    with torch.no_grad():
                        plain = reward.score(images, batch.prompts)
                        good = reward.score(images, [f"bright. {prompt}" for prompt in batch.prompts])
                        bad = reward.score(images, [f"dark. {prompt}" for prompt in batch.prompts])
                    r = {
                        ("relative", "denoise"): (1 + k) * good - bad,
                        ("relative", "inversion"): (1 + k) * bad - good,
                        ("difference", "denoise"): good - bad,
                        ("difference", "inversion"): bad - good,
                        ("absolute", "denoise"): plain,
                        ("absolute", "inversion"): -plain,
                        ("interpolated", "denoise"): (1 - k) * bad + k * good,
                        ("interpolated", "inversion"): -(1 - k) * bad - k * good,
                    }[preference, branch]
                    expected += weight * torch.relu(0.7 - r).mean().item() / 4
        assert total_loss(trainer, batch) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_landings": 2, "preference": "interpolated"},
            {"branches": ["inversion"], "preference": "absolute"},
            {"family": "sd3", "guidance_scale": 3.0},
            {"family": "qwen-image", "guidance_scale": 3.0, "negative_prompt": "dull"},
            {"family": "flux2-klein", "guidance_scale": 3.0},
            {"family": "z-image", "guidance_scale": 3.0, "negative_prompt": "dull"},
            {"family": "chroma", "guidance_scale": 3.0},
            {"family": "sana", "guidance_scale": 3.0, "negative_prompt": "dull"},
            {"family": "krea2", "guidance_scale": 3.0, "negative_prompt": "dull"},
            {"family": "flux-kontext"},
            {"family": "qwen-image-edit-plus", "guidance_scale": 3.0, "negative_prompt": "dull"},
            {"family": "wan", "guidance_scale": 3.0, "negative_prompt": "dull", "num_frames": 5},
            {"family": "wan", "guidance_scale": 3.0, "num_frames": 9, "frame_reduction": "min"},
            {"family": "wan", "guidance_scale": 1.0, "num_frames": 5, "frame_reduction": "first"},
            {"family": "wan", "guidance_scale": 1.0, "num_frames": 5, "reward_funcs": Motion()},
            {"reward_funcs": [Taste("a"), Taste("b")], "reward_weights": [1.0, 0.5]},
            {"estimator": "refl", "num_landings": 2},
            {"estimator": "draft"},
            {"estimator": "draft", "draft_steps": 2},
            {"estimator": "draft", "draft_renoisings": 3},
            {"estimator": "draft", "draft_steps": 4, "family": "sd3", "guidance_scale": 1.0},
        ],
        ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items() if name != "reward_funcs"),
    )
    def test_gradient_is_a_finite_difference_through_the_whole_pass(self, make_trainer, settings, monkeypatch):
        trainer = make_trainer(**{"sigma_range": [0.5, 0.95], "reward_threshold": 3.0, **settings})
        perturb(trainer)
        batch = clean_batch(trainer)
        to_double(trainer, batch, monkeypatch)
        analytic = gradients(trainer, batch)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        start = torch.cat([p.detach().flatten() for p in parameters])
        direction = torch.randn(len(start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        direction = direction / direction.norm() + analytic / analytic.norm()

        def loss(shift):
            torch.nn.utils.vector_to_parameters(start + shift * direction, parameters)
            with torch.no_grad():
                return total_loss(trainer, batch)

        step = 1e-5
        numeric = (loss(step) - loss(-step)) / (2 * step)
        assert numeric == pytest.approx((analytic @ direction).item(), rel=1e-6)

    def test_refl_predicts_the_clean_latents_of_an_exact_velocity(self):
        clean, noise, sigma = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.tensor([0.9, 0.5, 0.1])
        latents = sigma.view(3, 1, 1) * noise + (1 - sigma).view(3, 1, 1) * clean
        torch.testing.assert_close(one_step_prediction(latents, noise - clean, sigma), clean)

    def test_draft_of_one_step_goes_through_the_sampled_image(self, make_trainer):
        """With the rollout's guidance the last step leads to the very image that was sampled."""
        trainer = make_trainer(estimator="draft", draft_steps=2, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["draft/recovery_error"] < 1e-6

    def test_branches_cancel_where_one_has_its_prompts_swapped(self, make_trainer):
        """Both branches push the same way; with the prompts of one of them swapped, they push against each other."""

        def gradient(branch, positive, negative):
            trainer = make_trainer(
                branches=[branch], preference="difference", reward_threshold=3.0, sigma_range=[0.7, 0.8],
                delta_sigma=0.001, positive_words=[positive], negative_words=[negative],
            )  # fmt: skip
            perturb(trainer)
            return gradients(trainer, clean_batch(trainer))

        denoise = gradient("denoise", "good", "bad")
        right, swapped = gradient("inversion", "good", "bad"), gradient("inversion", "bad", "good")
        assert torch.nn.functional.cosine_similarity(denoise, right, dim=0) > 0.95
        assert (denoise + swapped).norm() < 0.2 * (denoise + right).norm()

    def test_batch_of_four_equals_four_batches_of_one(self, make_trainer):
        logs, weights = [], []
        for size in (4, 2, 1):
            trainer = make_trainer(
                per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, num_landings=2, max_steps=1,
                max_grad_norm=1e9, optim="sgd", learning_rate=1.0,
            )  # fmt: skip
            perturb(trainer)
            trainer.train()
            logs.append(trainer.state.log_history[0])
            weights.append(trainable(trainer))
        for log, trained in zip(logs[1:], weights[1:], strict=True):
            for name in ("loss", "grad_norm", "reward", "denoise/recovery_error"):
                assert log[name] == pytest.approx(logs[0][name], rel=1e-4), name
            for name, weight in trained.items():
                torch.testing.assert_close(weight, weights[0][name], rtol=1e-4, atol=1e-6)

    def test_memory_is_flat_in_the_number_of_landings(self, make_trainer):
        """The largest amount of memory that graphs hold at any time of a step."""

        def peak(num_landings, together=False):
            trainer = make_trainer(num_landings=num_landings, vae_gradient_checkpointing=False,
                                   activation_checkpointing=False)  # fmt: skip
            perturb(trainer)
            batch = clean_batch(trainer)
            held, largest = [0], [0]

            class Saved:
                def __init__(self, tensor):
                    self.tensor = tensor

            def pack(tensor):
                saved, size = Saved(tensor), tensor.numel() * tensor.element_size()
                held[0] += size
                largest[0] = max(largest[0], held[0])
                weakref.finalize(saved, lambda: held.__setitem__(0, held[0] - size))
                return saved

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
                if together:
                    sum(term() for term in trainer.loss_terms(trainer.model, batch)).backward()
                else:
                    trainer._prepare_inputs = lambda rows: batch
                    trainer.accelerator.gradient_state._set_sync_gradients(True)
                    trainer.current_gradient_accumulation_steps = 1
                    trainer.training_step(trainer.model, batch)
            return largest[0]

        one, four = peak(1), peak(4)
        assert four <= 1.01 * one
        assert peak(4, together=True) > 4 * one  # what the passes would need together


class TestActive:
    def test_share_of_images_with_a_loss(self, make_trainer):
        """Against the loss of each image, by hand from the scores that the reward gives them."""
        trainer = make_trainer(reward_threshold=0.1, per_device_train_batch_size=3, branches=["inversion"])
        batch = clean_batch(trainer, PROMPTS[:3])
        trainer._preference_term(batch.clean, batch, batch.sigmas[0], "inversion", "inversion")
        images = trainer.flow.decode(batch.clean)
        positive, negative = (
            trainer.rewards["taste"].score(images, [f"{word}. {prompt}" for prompt in PROMPTS[:3]])
            for word in ("Natural-lighting", "Concept art")
        )
        low, high = trainer.args.sigma_range
        discount = 0.3 + (0.01 - 0.3) * (batch.sigmas[0] - low) / (high - low)
        above = 0.1 - ((1 + discount) * negative - positive) > 0
        assert 0 < above.sum() < 3  # the share says something
        logged = trainer._running_metrics.take(trainer.accelerator)
        assert logged["inversion/active"] == pytest.approx(above.float().mean().item())

    @pytest.mark.parametrize("threshold", [-10.0, 0.7])
    def test_a_pass_that_trains_nothing_is_told_once_a_window(self, make_trainer, caplog, threshold):
        trainer = make_trainer(reward_threshold=threshold, max_steps=4, logging_steps=2, branches=["denoise"])
        try:
            trainer.train()
        except RuntimeError as error:  # the first update has changed nothing
            assert threshold < 0, error
        logs = [log for log in trainer.state.log_history if "denoise/active" in log]
        told = [record.message for record in caplog.records if "denoise/active was 0" in record.message]
        assert len(told) == sum(log["denoise/active"] == 0 for log in logs) == (len(logs) if threshold < 0 else 0)
        if threshold < 0:
            assert f"reward_threshold={threshold}" in told[0]

    def test_scores_in_a_column_are_taken_as_one_an_image(self, make_trainer):
        class Column(Taste):
            def score(self, images, prompts):
                return super().score(images, prompts)[:, None]

        terms = []
        for reward in (Taste(), Column()):
            trainer = make_trainer(reward_funcs=reward)
            batch = clean_batch(trainer, PROMPTS[:3])
            terms.append(trainer._preference_term(batch.clean, batch, batch.sigmas[0], "denoise", "denoise").item())
        assert terms[0] == terms[1]


class TestPreference:
    def test_generator_sees_the_plain_prompt_and_the_reward_the_words_in_turn(self, make_trainer):
        reward = Taste()
        trainer = make_trainer(
            reward_funcs=reward, branches=["denoise"], positive_words=["a", "b"], negative_words=["x", "y", "z"],
            control_template="[{control}] {prompt}", max_steps=4,
        )  # fmt: skip
        reward.seen.clear()
        trainer.train()
        words = []
        for prompts in reward.seen:
            found = {prompt[: prompt.index("]") + 1] if prompt.startswith("[") else "" for prompt in prompts}
            assert len(found) == 1
            words.append(found.pop())
            assert all(prompt.removeprefix(words[-1]).strip() in PROMPTS for prompt in prompts)
        # At each step the rollout's score with the plain prompts, then the pass.
        assert words == ["", "[a]", "[x]", "", "[b]", "[y]", "", "[a]", "[z]", "", "[b]", "[x]"]

    def test_words_of_each_reward(self, make_trainer):
        rewards = [Taste("one"), Taste("two")]
        trainer = make_trainer(
            reward_funcs=rewards, positive_words={"one": ["a"], "two": ["b"]}, negative_words=["x"], max_steps=1
        )
        trainer.train()
        for reward, word in zip(rewards, "ab", strict=True):
            controls = {prompt.split(". ")[0] for prompts in reward.seen for prompt in prompts if ". " in prompt}
            assert controls == {word, "x"}

    def test_words_of_another_reward_are_refused(self, make_trainer):
        with pytest.raises(ValueError, match=r"positive_words has words for the rewards \['other'\].*\['taste'\]"):
            make_trainer(positive_words={"other": ["a"]})

    def test_prompts_with_braces_stay_as_they_are(self, tmp_path):
        config = SRPOConfig(output_dir=str(tmp_path), use_cpu=True)
        assert config.control_prompts(["Real"], "r", 0, ["a {prompt} {control} {x}"]) == [
            "Real. a {prompt} {control} {x}"
        ]

    def test_two_towers_see_the_image_once(self):
        reward = Towers()
        images = torch.rand(2, 3, 8, 8)
        sets = [["a", "b"], ["c", "d"], ["e", "e"]]
        scores = scores_of_prompt_sets(reward, images, sets)
        assert reward.image_forwards == 1
        for score, prompts in zip(scores, sets, strict=True):
            torch.testing.assert_close(score, reward.score(images, prompts))


class TestResume:
    @pytest.mark.parametrize(
        "settings",
        [
            {"positive_words": ["a", "b", "c"], "negative_words": ["x", "y"]},
            {"estimator": "refl", "sigma_range": [0.3, 0.95]},
            {"estimator": "draft", "draft_renoisings": 2},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_landings": 2},
            {"offline": True, "offline_steps": 4},
        ],
        ids=["words", "refl", "draft", "accumulation", "offline"],
    )
    def test_resumed_equals_uninterrupted(self, make_trainer, tmp_path, settings):
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "log_samples": False, **settings}
        if settings.pop("offline", False):
            images = [picture(40, 40, seed) for seed in range(5)] + [picture(80, 40, seed) for seed in range(5)]
            settings["train_dataset"] = image_dataset(images)
        whole = make_trainer(reward_funcs=Taste(), **settings)
        whole.train()
        reward = Taste()
        resumed = make_trainer(reward_funcs=reward, **settings)
        reward.seen.clear()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        for name, weight in trainable(whole).items():
            assert torch.equal(weight, trainable(resumed)[name]), name
        losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
        assert len(losses[0]) == 5 and losses[0] == losses[1]
        if settings.get("positive_words"):
            words = {prompt.split(". ")[0] for prompts in reward.seen for prompt in prompts if ". " in prompt}
            assert words == {"a", "b", "x", "y"}  # steps 3 and 4 of three positive and two negative words

    def test_hacking_guard_remembers(self, make_trainer, tmp_path):
        settings = {
            "eval_dataset": Dataset.from_list([{"prompt": "a cat"}]), "num_eval_images": 2, "eval_strategy": "steps",
            "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 3, "watch_reward_funcs": redness,
        }  # fmt: skip
        whole, resumed = make_trainer(**settings), make_trainer(**settings)
        whole.train()
        saved = json.loads((tmp_path / "out" / "checkpoint-2" / "trl_diffusion_state.json").read_text())["hacking"]
        assert set(saved["best"]) == {"watch/redness/mean"}
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert resumed.hacking_callback.best == whole.hacking_callback.best
        assert resumed.hacking_callback.count == whole.hacking_callback.count


class TestImages:
    def test_images_replace_the_rollout(self, make_trainer):
        images = [picture(48, 48, seed) for seed in range(4)]
        trainer = make_trainer(train_dataset=image_dataset(images), max_steps=1)
        rows = [trainer.train_dataset[i] for i in (2, 0)]
        batch = trainer._prepare_inputs(rows)
        assert batch.prompts == ["picture 2", "picture 0"]
        resized = [np.array(images[i].resize((32, 32), Image.Resampling.LANCZOS)) / 255 for i in (2, 0)]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            latents = trainer.flow.vae.encode(pixels * 2 - 1).latent_dist.mode()
        assert latents.shape[-2:] == (16, 16)
        torch.testing.assert_close(batch.clean, (latents - 0.1159) * 0.3611, rtol=0, atol=1e-5)
        assert batch.noise.std() > 0.8 and not torch.equal(batch.noise[0], batch.noise[1])
        trainer.train()
        log = trainer.state.log_history[0]
        assert "time/rollout" not in log and "time/encode" in log and np.isfinite(log["denoise/loss"])

    def test_aspect_buckets(self, make_trainer):
        images = [picture(40, 40, seed) for seed in range(4)] + [picture(90, 45, seed) for seed in range(4)]
        trainer = make_trainer(train_dataset=image_dataset(images), max_steps=2)
        sizes = {trainer._prepare_inputs([trainer.train_dataset[i]]).clean.shape[-2:] for i in range(8)}
        # Latents of half the height and width: these are multiples of 4, of about 32 x 32 pixels.
        assert sizes == {(32 // 2, 32 // 2), (24 // 2, 44 // 2)}
        trainer.train()
        assert all(torch.isfinite(weight).all() for weight in trainable(trainer).values())

    def test_rollouts_after_the_offline_steps(self, make_trainer):
        images = [picture(40, 40, seed) for seed in range(4)]
        trainer = make_trainer(train_dataset=image_dataset(images), offline_steps=2, max_steps=4)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert ["time/rollout" in log for log in logs] == [False, False, True, True]
        assert ["time/encode" in log for log in logs] == [True, True, False, False]

    def test_rewards_get_no_columns_of_ours(self, make_trainer):
        def watched(images, prompts):  # takes no further columns
            return [0.0] * len(prompts)

        trainer = make_trainer(
            train_dataset=image_dataset([picture(40, 40, seed) for seed in range(4)]), offline_steps=1,
            watch_reward_funcs=watched, eval_dataset=Dataset.from_list([{"prompt": "a cat"}]), num_eval_images=2,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        assert [log["eval_watch/watched/mean"] for log in trainer.state.log_history if "eval_reward" in log] == [0, 0]


def evaluate(callback, control, objective, watched, step=0):
    """What the trainer does when it evaluates."""
    state = TrainerState()
    state.global_step = step
    callback.scores = {"objective": objective, "watch/judge/mean": watched}
    metrics = {f"eval_{name}": np.nanmean(scores) for name, scores in callback.scores.items()}
    callback.on_evaluate(None, state, control, metrics=metrics)


class TestHacking:
    @pytest.mark.parametrize("stop", [False, True])
    def test_warns_after_patience_evaluations(self, caplog, stop):
        callback, control = RewardHackingCallback(patience=2, stop=stop), TrainerControl()
        warned = []
        #                              first   hacked  no more hacked  hacked  hacked
        for objective, watched in [(0, 9), (1, 8), (2, 9), (3, 8), (4, 7), (5, 5)]:
            caplog.clear()
            evaluate(callback, control, [objective, objective + 2], [watched, watched + 1])
            warned.append("Reward hacking" in caplog.text)
            assert control.should_training_stop == (stop and any(warned))
        assert warned == [False, False, False, False, True, True]
        assert (
            "objective has risen to 6 while watch/judge/mean has fallen to 5.5 from 9.5 at its best, for 3 evaluations"
            in caplog.text
        )

    def test_a_slow_decline_is_noticed(self):
        """Of which no step exceeds its noise, but all of them together do."""
        random = np.random.default_rng(0)
        callback, control = RewardHackingCallback(patience=2, stop=True), TrainerControl()
        stopped = None
        for step in range(15):
            if stopped is None and control.should_training_stop:
                stopped = step
            evaluate(callback, control, [step] * 64, (random.normal(size=64) - 0.1 * step).tolist(), step)
        assert stopped is not None and stopped > 3

    def test_a_fall_of_both_or_a_rise_of_both_is_no_hacking(self, caplog):
        callback, control = RewardHackingCallback(patience=1, stop=True), TrainerControl()
        nan = float("nan")
        for objective, watched in [(1, [1, 1]), (0, [0, 0]), (1, [1, 1]), (2, [1, 1]), (3, [nan, 0]), (4, [0, nan])]:
            evaluate(callback, control, [objective] * 2, watched)
        assert not caplog.records and not control.should_training_stop

    def test_changes_within_their_noise_do_not_count(self):
        """What is watched only fluctuates, image by image: the bare means would fall in half of all evaluations."""
        random = np.random.default_rng(0)
        warned, falls = 0, 0
        for _ in range(50):
            callback, control = RewardHackingCallback(patience=2, stop=True), TrainerControl()
            means = []
            for step in range(9):
                watched = random.normal(size=64)
                evaluate(callback, control, [step] * 64, watched.tolist(), step)
                means.append(watched.mean())
            warned += control.should_training_stop
            falls += any(a > b > c for a, b, c in zip(means, means[1:], means[2:], strict=False))
        assert falls > 35 and warned < 5

    def test_changes_beyond_their_noise_count(self):
        random = np.random.default_rng(0)
        callback, control = RewardHackingCallback(patience=2, stop=True), TrainerControl()
        for step in range(3):
            evaluate(callback, control, [step] * 64, (random.normal(size=64) - step).tolist(), step)
        assert control.should_training_stop

    def test_evaluations_of_other_sizes_are_not_compared(self):
        callback, control = RewardHackingCallback(patience=1, stop=True), TrainerControl()
        evaluate(callback, control, [0, 0], [9, 9])
        evaluate(callback, control, [1, 1, 1], [8, 8, 8])
        assert not control.should_training_stop

    def test_an_evaluation_under_another_name_is_left_alone(self, make_trainer):
        trainer = make_trainer(eval_dataset=Dataset.from_list([{"prompt": "a cat"}]), num_eval_images=2)
        trainer.evaluate(metric_key_prefix="test")
        assert trainer.hacking_callback.best == {}

    def test_training_stops_where_the_watched_reward_is_the_opposite(self, make_trainer, caplog):
        def darkness(images, prompts, **columns):
            return [-float(np.asarray(image).mean()) for image in images]

        trainer = make_trainer(
            reward_funcs=Brightness(), watch_reward_funcs=darkness, preference="absolute", max_steps=20,
            reward_threshold=2.0, learning_rate=2e-2, lr_scheduler_type="constant", eval_strategy="steps",
            eval_steps=2, eval_dataset=Dataset.from_list([{"prompt": "a cat"}, {"prompt": "a dog"}]),
            num_eval_images=4, stop_on_hacking=True, sigma_range=[0.5, 0.95], max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step < 20
        assert "watch/darkness/mean has fallen" in caplog.text

    def test_objective_of_an_evaluation(self, make_trainer):
        """The mean over all words of the rewards' preference, of the images that `generate` draws."""
        one, two = Taste("one"), Towers()
        prompts = [{"prompt": "a cat"}, {"prompt": "a dog"}]
        trainer = make_trainer(
            reward_funcs=[one, two], reward_weights=[1.0, 3.0], positive_words=["a", "b"], negative_words=["x"],
            eval_dataset=Dataset.from_list(prompts), num_eval_images=3, rollout_batch_size=2,
        )  # fmt: skip
        drawn = ["a cat", "a dog", "a cat"]
        images = trainer.generate(drawn, [0, 1, 2])
        expected = 0.0
        for reward, weight in ((one, 1.0), (two, 3.0)):
            with torch.no_grad():
                a, b, x = (reward.score(images, [f"{word}. {prompt}" for prompt in drawn]) for word in "abx")
            expected += weight * ((a + b) / 2 - x).mean().item()
        assert trainer.evaluate()["eval_objective"] == pytest.approx(expected, rel=1e-4)

    def test_watching_without_evaluating_is_remarked(self, make_trainer, caplog):
        make_trainer(watch_reward_funcs=redness)
        assert "eval_strategy is 'no'" in caplog.text


def never_loaded(*args, **kwargs):
    raise AssertionError("weights were loaded")


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"estimator": "reinforce"}, "estimator must be one of 'direct_align', 'refl', 'draft', got 'reinforce'"),
            ({"preference": "positive"}, "preference must be one of"),
            ({"branches": []}, r"branches must be 'denoise', 'inversion' or both, got \[\]"),
            ({"branches": ["denoise", "denoise"]}, "branches must be"),
            ({"branches": ["up"]}, "branches must be"),
            ({"num_landings": 0}, "num_landings must be at least 1, got 0"),
            ({"sigma_range": [0.0, 0.9]}, r"sigma_range must ascend inside \(0, 1\), got \[0.0, 0.9\]"),
            ({"sigma_range": [0.5, 1.0]}, r"sigma_range must ascend inside \(0, 1\)"),
            ({"sigma_range": [0.9, 0.5]}, "sigma_range must ascend"),
            ({"sigma_range": [0.5]}, "sigma_range must have two values"),
            ({"sigma_range": [0.5, 0.97], "delta_sigma": 0.05}, "noise levels between 0.45 and 1.02"),
            ({"sigma_range": [0.03, 0.9], "delta_sigma": 0.05}, "noise levels between -0.02 and 0.95"),
            ({"delta_sigma": 0.0}, "delta_sigma above 0"),
            ({"denoise_discount": [0.1]}, "denoise_discount must have two values"),
            ({"positive_words": []}, r"positive_words is empty \(\[\]\), but preference='relative'"),
            ({"negative_words": {"hpsv2": []}}, "negative_words is empty"),
            ({"positive_words": ["Real", " "]}, "positive_words has the empty word ' '"),
            ({"positive_words": "Real"}, "positive_words must be a list of words"),
            ({"control_template": "{prompt}"}, "control_template must contain {control}"),
            ({"noise_prior": "none"}, "noise_prior must be one of 'rollout', 'fresh'"),
            ({"offline_steps": 0}, "offline_steps must be at least 1, got 0"),
            ({"draft_steps": 26}, "draft_steps=26 exceeds the num_inference_steps=25"),
            ({"draft_steps": 2, "draft_renoisings": 2}, "draft_renoisings=2 needs draft_steps=1"),
            ({"hacking_patience": 0}, "hacking_patience must be at least 1"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_settings(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            SRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)

    def test_absolute_preference_needs_no_words(self, tmp_path):
        config = SRPOConfig(output_dir=str(tmp_path), use_cpu=True, preference="absolute", positive_words=[])
        assert config.positive_words == []

    def test_one_branch_needs_room_on_one_side_only(self, tmp_path):
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "sigma_range": [0.5, 0.97], "delta_sigma": 0.05}
        assert SRPOConfig(**settings, branches=["inversion"]).delta_sigma == 0.05

    @pytest.mark.parametrize("name", ["srpo_hpsv2", "srpo_pickscore"])
    def test_presets(self, name, tmp_path):
        config = SRPOConfig.preset(name, output_dir=str(tmp_path), use_cpu=True)
        assert config.num_inference_steps == 25 and config.learning_rate == 5e-6 and config.max_grad_norm == 0.1
        low, high = config.sigma_range
        assert config.delta_sigma == pytest.approx((high - low) / 10)

    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            (redness, "SRPO needs differentiable rewards, but <function redness.* is a black box"),
            ("shapes-judge", "but 'shapes-judge' is a black box"),
            ("remote:http://127.0.0.1:1", "is a black box"),
            ("trl_diffusion.shapes.attribute_share", "is a black box"),
        ],
        ids=["callable", "name", "server", "dotted"],
    )
    def test_black_box_reward(self, make_trainer, monkeypatch, reward, message):
        monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never_loaded)
        with pytest.raises(TypeError, match=message):
            make_trainer(reward_funcs=reward, model="never/loaded")

    @pytest.mark.parametrize("kind", ["no_grad", "constant", "rounded", "nan"])
    def test_reward_without_a_gradient(self, make_trainer, kind):
        class Flat(RewardModel):
            name = "flat"

            def score(self, images, prompts):
                if kind == "no_grad":
                    with torch.no_grad():
                        return images.mean(dim=(1, 2, 3))
                if kind == "constant":
                    return torch.ones(len(images), requires_grad=True)
                if kind == "rounded":
                    return images.round().mean(dim=(1, 2, 3))
                return (images.mean(dim=(1, 2, 3)) - 1e9).sqrt()

        with pytest.raises(ValueError, match="reward 'flat' is not differentiable"):
            make_trainer(reward_funcs=Flat())

    def test_too_few_prompts(self, make_trainer):
        with pytest.raises(ValueError, match="has 6 rows, which do not fill one batch of 8.*per_device_train_batch"):
            make_trainer(per_device_train_batch_size=8)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"offline_steps": 3}, r"offline_steps=3, but train_dataset has no column 'image', only \['prompt'\]"),
            ({"images": [picture()] * 4, "estimator": "refl"}, "estimator='refl' needs rollouts"),
            (
                {"images": [picture()] * 4, "rollout_merged_lora": True},
                "offline_steps is None, so there are no rollouts",
            ),
            ({"images": [picture()] * 3 + [None]}, "Row 3 of train_dataset has no image"),
            ({"images": [picture(40, 40)] * 2 + [picture(90, 40)] * 2}, r"2 aspect buckets of \[2, 2\] rows"),
        ],
        ids=["offline-steps", "estimator", "no-rollouts", "missing-image", "small-buckets"],
    )
    def test_images_before_weights(self, make_trainer, monkeypatch, arguments, message):
        monkeypatch.setattr("trl_diffusion.trainer.construction.load_flow_model", never_loaded)
        arguments = dict(arguments)
        if "images" in arguments:
            arguments["train_dataset"] = image_dataset(arguments.pop("images"))
        with pytest.raises(ValueError, match=message):
            make_trainer(model="never/loaded", **arguments)

    def test_refl_without_a_step_in_range(self, make_trainer):
        with pytest.raises(ValueError, match=r"No sampling step lies in sigma_range=\[0.31, 0.35\]; the schedule is"):
            make_trainer(estimator="refl", sigma_range=[0.31, 0.35])

    def test_non_finite_loss_names_the_prompts(self, make_trainer):
        class Breaks(RewardModel):
            name = "breaks"
            calls = 0

            def score(self, images, prompts):
                self.calls += 1
                return images.mean(dim=(1, 2, 3)) * (float("nan") if self.calls > 2 else 1)

        with pytest.raises(
            FloatingPointError, match="step 1 was not applied: the loss of term 1 of 2 is nan on the p"
        ):
            make_trainer(reward_funcs=Breaks(), preference="absolute", max_bad_steps=1).train()
