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

"""The trainer end to end on tiny models: what it optimises, logs, saves and resumes."""

import io
import json
import re
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import FluxPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny_models import tiny_flux_pipeline
from transformers.trainer_utils import get_last_checkpoint

from trl_diffusion.flow import log_prob, shifted_schedule, transition_coefficients, transition_mean
from trl_diffusion.rewards import RewardModel

from .conftest import PIPELINES, PROMPTS, generation, gradients, perturb, redness, trainable


def test_streams_of_noise_are_those_of_the_seed_and_the_key(make_trainer):
    trainer = make_trainer()

    def first(*key):
        return [torch.randn(1, generator=generator).item() for generator in trainer.generators(*key)]

    keys = [(0, 0, [0, 1]), (0, 1, [0, 1]), (1, 0, [0, 1])]
    values = [value for key in keys for value in first(*key)]
    assert values == [value for key in keys for value in first(*key)]
    trainer.args.seed += 1
    values += [value for key in keys for value in first(*key)]
    assert len(set(values)) == 12


class TestRun:
    @pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image"])
    def test_trains_logs_and_saves(self, make_trainer, family, tmp_path):
        trainer = make_trainer(
            family, guidance_scale=3.0, watch_reward_funcs=[redness], save_strategy="steps", save_steps=2
        )
        before = trainable(trainer)
        trainer.train()
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())
        log = trainer.state.log_history[0]
        for name in (
            "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "rewards/redness/mean",
            "rewards/redness/std", "watch/redness/mean", "ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean",
            "rollout_logp_gap", "images_per_second", "time/rollout", "time/decode", "time/reward", "time/update",
            "memory/peak_gib",
        ):  # fmt: skip
            assert np.isfinite(log[name]), name
        assert log["watch/redness/mean"] == log["rewards/redness/mean"] == pytest.approx(log["reward"])
        # Only the adapter is in the checkpoint, in both formats.
        names = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"} <= names
        assert not any(name.startswith(("model.", "diffusion_pytorch")) for name in names)

    @pytest.mark.parametrize(
        "settings",
        [
            {"sde_type": "dance"},
            {"sde_type": "cps"},
            {"chunk_sizes": "equal:1", "chunk_fraction": 1.0},
            {"chunk_sizes": "temporal", "num_chunks": 2, "chunk_sampling": "temporal"},
            {"chunk_sampling": [1]},
            {"chunk_gradient": "streamed", "num_iterations": 2, "beta": 0.1},
            {"old_log_probs": "rollout", "steps_per_generation": 4, "beta": 0.1},
            {"sigma_shift": None, "shared_noise": "none", "rollout_batch_size": 3},
            {"gradient_checkpointing": True, "scale_rewards": "batch"},
        ],
        ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
    )
    def test_settings(self, make_trainer, settings):
        trainer = make_trainer(**settings)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.isfinite(weight).all() for weight in trainable(trainer).values())
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())

    def test_raises_its_reward(self, make_trainer):
        trainer = make_trainer(max_steps=24, learning_rate=5e-2, chunk_fraction=1.0, lr_scheduler_type="constant")
        trainer.train()
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        # Of an untrained network the images of a group differ by 0.006, so the mean of 40 of them is known to 0.001.
        assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.008

    def test_twice_gives_the_same(self, make_trainer):
        first, second = make_trainer(), make_trainer()
        first.train()
        second.train()
        for name, weight in trainable(first).items():
            assert torch.equal(weight, trainable(second)[name]), name

    @pytest.mark.parametrize("family", ["flux", "qwen-image"])
    def test_full_fine_tuning_saves_a_transformer(self, make_trainer, family, tmp_path):
        trainer = make_trainer(family, peft_config=False, beta=0.1, learning_rate=1e-3)
        trainer.train()
        trainer.save_model()
        transformer_class = type(trainer.flow.denoiser)
        loaded = transformer_class.from_pretrained(tmp_path / "out", subfolder="transformer")
        for name, weight in trainer.model.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name

    def test_default_adapter_is_on_the_attention_layers(self, make_trainer):
        trainer = make_trainer(peft_config=None)
        names = {name.split(".lora_")[0].rsplit("attn.", 1)[1] for name in trainable(trainer)}
        assert names == set(trainer.flow.lora_target_modules) - {"proj_out"}

    def test_rewards_get_the_other_columns(self, make_trainer):
        seen = []

        def reward(images, prompts, target, **columns):
            seen.extend(zip(prompts, target, strict=True))
            return redness(images, prompts)

        dataset = Dataset.from_list([{"prompt": prompt, "target": prompt.upper()} for prompt in PROMPTS])
        make_trainer(reward_funcs=reward, train_dataset=dataset, max_steps=1).train()
        assert len(seen) == 8
        assert all(target == prompt.upper() for prompt, target in seen)

    def test_images_that_no_reward_asks_for_are_not_read(self, make_trainer):
        """Reading one of them would end the run."""
        features = Features(prompt=Value("string"), image=ImageFeature())
        images = [{"bytes": b"no image", "path": None}] * len(PROMPTS)
        dataset = Dataset.from_dict({"prompt": PROMPTS, "image": images}, features=features)
        trainer = make_trainer(
            reward_funcs=lambda images, prompts: redness(images, prompts), train_dataset=dataset, eval_dataset=dataset,
            num_eval_images=2, max_steps=1,
        )  # fmt: skip
        trainer.train()
        assert "eval_reward" in trainer.evaluate()
        assert "eval_reward" in trainer.evaluate(dataset.select([0, 1]))

    def test_images_that_a_reward_asks_for_are_upright_whatever_else_a_camera_wrote(self, make_trainer):
        seen = {}

        def reward(images, prompts, photo):
            seen.update(zip(prompts, photo, strict=True))
            return redness(images, prompts)

        # Orientation 6 and a resolution of -1/0, on which the decoding of `datasets` ends.
        exif = struct.pack("<6s4sLHHHLHHHHLLLll", b"Exif", b"II*", 8, 2, 274, 3, 1, 6, 0, 282, 10, 1, 38, 0, -1, 0)
        file = io.BytesIO()
        Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
        photos = [{"bytes": file.getvalue(), "path": None}, *[None] * (len(PROMPTS) - 1)]
        features = Features(prompt=Value("string"), photo=ImageFeature())
        dataset = Dataset.from_dict({"prompt": PROMPTS, "photo": photos}, features=features)
        with pytest.raises(struct.error):
            dataset[0]
        make_trainer(reward_funcs=reward, train_dataset=dataset.with_format("torch"), max_steps=3).train()
        assert set(seen) == set(PROMPTS)
        assert seen.pop("a cat").size == (10, 20) and not any(seen.values())

    def test_several_rewards_and_none(self, make_trainer):
        def cats_only(images, prompts, **columns):
            return [1.0 if "cat" in prompt else None for prompt in prompts]

        trainer = make_trainer(reward_funcs=[redness, cats_only], reward_weights=[1.0, 2.0], max_steps=3)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "reward" in log]
        assert any(log["rewards/cats_only/mean"] == 1.0 for log in logs)
        assert all(np.isfinite(log["loss"]) for log in logs)

    def test_a_reward_model_scores_tensors(self, make_trainer):
        class Brightness(RewardModel):
            name = "brightness"

            def score(self, images, prompts):
                assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32)
                return images.mean(dim=(1, 2, 3))

        trainer = make_trainer(reward_funcs=Brightness(), max_steps=1)
        trainer.train()
        assert 0 < trainer.state.log_history[0]["rewards/brightness/mean"] < 1

    def test_samples_are_written(self, make_trainer, tmp_path):
        make_trainer(max_steps=1, num_samples_to_log=3, report_to="tensorboard").train()
        folder = tmp_path / "out" / "samples" / "step_000001"
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [line["file_name"] for line in lines] == ["000.png", "001.png", "002.png"]
        assert all((folder / line["file_name"]).exists() and line["prompt"] in PROMPTS for line in lines)
        assert {"redness", "advantage"} <= set(lines[0])
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "out").glob("runs/*"))))
        events.Reload()
        assert len(events.Images("samples")) > 0

    def test_evaluate_is_the_same_every_time(self, make_trainer, train_dataset):
        trainer = make_trainer(eval_dataset=train_dataset, num_eval_images=8, watch_reward_funcs=redness)
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first == second
        assert first["eval_reward"] == pytest.approx(first["eval_rewards/redness/mean"])
        assert "eval_watch/redness_2/mean" in first or "eval_watch/redness/mean" in first


class TestPolicy:
    """Rollout and training are one policy."""

    @pytest.mark.parametrize(
        ("family", "gradient"), [("flux", "joint"), ("flux", "streamed"), ("qwen-image", "joint")]
    )
    def test_on_policy_ratio_is_exactly_one(self, make_trainer, family, gradient):
        trainer = make_trainer(family, chunk_gradient=gradient)
        trainer.train()
        for log in trainer.state.log_history[:-1]:
            assert log["ratio/mean"] == 1.0
            assert log["log_ratio/abs_max"] == log["frac_off_policy"] == 0.0
            assert log["rollout_logp_gap"] < 1e-6

    def test_recomputed_ratio_is_exactly_one_before_the_first_update(self, make_trainer):
        trainer = make_trainer(steps_per_generation=4, num_generations=4, max_steps=4)
        trainer.train()
        logs = trainer.state.log_history[:-1]
        ratios = [log["ratio/mean"] for log in logs]
        # Two optimizer steps a generation: the first of each is on-policy, the second is not.
        assert ratios[0] == ratios[2] == 1.0
        assert ratios[1] != 1.0 and ratios[3] != 1.0
        assert [log["frac_off_policy"] for log in logs] == [0.0, 1.0, 0.0, 1.0]
        assert all((log["log_ratio/abs_max"] > 0) == (ratio != 1) for log, ratio in zip(logs, ratios, strict=True))
        # Images are drawn in the steps that begin a generation.
        assert [log.get("duplicate_images") for log in logs] == [0.0, None, 0.0, None]

    @pytest.mark.parametrize("gradient", ["joint", "streamed"])
    def test_metrics_of_known_ratios(self, make_trainer, gradient):
        """Of old log-probabilities that lie by known amounts below or above, over two micro-batches and two chunks."""
        trainer = make_trainer(chunk_gradient=gradient, chunk_fraction=1.0, epsilon=1e-3)
        log_ratios = []
        for batch in generation(trainer):
            batch.old_log_probs = batch.log_probs.clone()
            forwards = trainer._forwards_of(batch)
            for index, chunk in enumerate(batch.chunks):
                above = 2e-3 * torch.randint(-2, 3, (4, 1)).float() * torch.ones(len(chunk))
                with torch.no_grad():
                    log_probs = [
                        trainer._transition(trainer.model, batch, steps)[0] for _, i, steps in forwards if i == index
                    ]
                batch.old_log_probs[:, chunk] = torch.cat(log_probs, 1) - above
                log_ratios.append(above[:, 0])
            for term in trainer.loss_terms(trainer.model, batch):
                term()
        log_ratios = torch.stack(log_ratios)
        metrics = trainer._take_metrics()
        assert 0 < (log_ratios == 0).float().mean() < 1
        assert metrics["log_ratio/abs_max"] == pytest.approx(log_ratios.abs().max().item(), rel=1e-3)
        assert metrics["ratio/mean"] == pytest.approx(log_ratios.exp().mean().item(), rel=1e-6)
        # Rounding makes ratios of 1 up to some 1e-8 others.
        assert metrics["frac_off_policy"] >= (log_ratios != 0).float().mean().item()
        assert "log_ratio/abs_max" not in trainer._take_metrics()

    def test_images_that_are_equal_are_counted(self, make_trainer):
        """Groups of four that are drawn from one noise, almost without more: in 8 bits most are the same picture."""
        pictures = []

        def reward(images, prompts, **columns):
            pictures.extend(image.tobytes() for image in images)
            return redness(images, prompts)

        trainer = make_trainer(reward_funcs=reward, eta=1e-6, max_steps=1)
        trainer.train()
        groups = [pictures[:4], pictures[4:]]
        equal = np.mean([group.count(picture) > 1 for group in groups for picture in group])
        assert trainer.state.log_history[0]["duplicate_images"] == equal > 0

    @pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])
    def test_log_probs_of_the_rollout_in_float64(self, make_trainer, sde_type):
        """The recorded log-probabilities are those of the recorded transitions, computed here from their definition."""
        trainer = make_trainer(sde_type=sde_type, chunk_fraction=1.0)
        (batch, _) = generation(trainer)
        sigmas = shifted_schedule(6)
        table = transition_coefficients(sigmas, sde_type)
        conditioning = trainer.conditioning.get(batch.prompts)
        for i in range(5):
            with torch.no_grad():
                velocity = trainer.velocity(trainer.model, batch.states[i], sigmas[i].float().expand(4), conditioning)
            rows = table.rows(torch.tensor([i]), velocity.ndim)
            mean = transition_mean(batch.states[i].double(), velocity.double(), rows)
            expected = log_prob(batch.states[i + 1].double(), mean, rows.std)
            assert torch.allclose(batch.log_probs[:, i].double(), expected, atol=2e-5)

    def test_batches_of_the_rollout_do_not_change_it(self, make_trainer):
        whole = generation(make_trainer(rollout_batch_size=8))
        parts = generation(make_trainer(rollout_batch_size=3))
        for a, b in zip(whole, parts, strict=True):
            for i in a.states:
                assert torch.allclose(a.states[i], b.states[i], atol=1e-5)

    def test_shared_noise(self, make_trainer):
        shared = make_trainer(shared_noise="group", chunk_sampling=[0])
        (batch, other) = generation(shared)
        assert all(torch.equal(batch.states[0][0], latents) for latents in batch.states[0])
        assert not torch.equal(batch.states[0][0], other.states[0][0])
        (batch, _) = generation(make_trainer(shared_noise="none", chunk_sampling=[0]))
        assert not torch.equal(batch.states[0][0], batch.states[0][1])

    def test_only_what_trains_is_kept(self, make_trainer):
        trainer = make_trainer(chunk_sampling=[1])
        assert set(generation(trainer)[0].states) == {2, 3, 4, 5}
        trainer = make_trainer(chunk_sizes="temporal", num_chunks=2, chunk_sampling="temporal")
        batch = generation(trainer)[0]
        assert set(batch.states) == {state for chunk in batch.chunks for i in chunk for state in (i, i + 1)}

    def test_temporal_layout_is_drawn_once(self, make_trainer):
        trainer = make_trainer(chunk_sizes="temporal", num_chunks=2)
        assert trainer.chunk_sizes is None
        generation(trainer)
        layout = trainer.chunk_sizes
        assert sum(layout) == 5 and len(layout) == 2
        trainer.make_micro_batches([{"prompt": "rain"}] * 4 + [{"prompt": "a fish"}] * 4, 1)
        assert trainer.chunk_sizes is layout


class TestGradient:
    """The gradient of the loss terms, against other ways to have it."""

    @pytest.mark.parametrize("off_policy", [False, True])
    @pytest.mark.parametrize("beta", [0.0, 0.5])
    def test_joint_equals_streamed(self, make_trainer, off_policy, beta):
        settings = {"chunk_fraction": 1.0, "beta": beta, "num_iterations": 2 if off_policy else 1, "epsilon": 1e-3}
        joint = make_trainer(chunk_gradient="joint", **settings)
        streamed = make_trainer(chunk_gradient="streamed", **settings)
        perturb(joint)
        perturb(streamed)
        joint_batch, streamed_batch = generation(joint)[0], generation(streamed)[0]
        if off_policy:
            perturb(joint, seed=1)
            perturb(streamed, seed=1)
        a, b = gradients(joint, joint_batch), gradients(streamed, streamed_batch)
        assert a.norm() > 0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * a.abs().max().item() + 1e-9)
        loss_joint = sum(term().item() for term in joint.loss_terms(joint.model, joint_batch))
        loss_streamed = sum(term().item() for term in streamed.loss_terms(streamed.model, streamed_batch))
        assert loss_joint == pytest.approx(loss_streamed, abs=1e-6)

    def test_chunk_gradient_is_the_step_gradient_over_the_chunk_size(self, make_trainer):
        """On-policy, d/dtheta of a chunk is the mean over its steps of -A d log p."""
        trainer = make_trainer(chunk_fraction=1.0)
        perturb(trainer)
        batch = generation(trainer)[0]
        actual = gradients(trainer, batch)

        trainer.model.zero_grad()
        for chunk in batch.chunks:
            for step in chunk:
                log_probs, _, _ = trainer._transition(trainer.model, batch, [step])
                loss = -(batch.advantages * log_probs[:, 0]).mean() / len(chunk) / len(batch.chunks)
                loss.backward()
        expected = torch.cat([p.grad.flatten().double() for p in trainer.model.parameters() if p.requires_grad])
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())

    def test_chunks_of_one_are_step_level_bit_for_bit(self, make_trainer):
        chunks = make_trainer(chunk_sizes=[1] * 5, chunk_fraction=1.0)
        perturb(chunks)
        batch = generation(chunks)[0]
        actual = gradients(chunks, batch)

        chunks.model.zero_grad()
        for step in range(5):
            log_probs, _, _ = chunks._transition(chunks.model, batch, [step])
            ratio = torch.exp(log_probs[:, 0] - log_probs[:, 0].detach())
            unclipped = -batch.advantages * ratio
            clipped = -batch.advantages * ratio.clamp(1 - 5e-5, 1 + 5e-5)
            (torch.maximum(unclipped, clipped).mean() / 5).backward()
        expected = torch.cat([p.grad.flatten().double() for p in chunks.model.parameters() if p.requires_grad])
        assert torch.equal(actual, expected)

    def test_a_batch_is_the_mean_of_its_parts(self, make_trainer):
        """One micro-batch of 8 and two of 4 train the same; so does any accumulation."""
        one = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=1)
        two = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
        four = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
        norms = []
        for trainer in (one, two, four):
            trainer.train()
            norms.append(trainer.state.log_history[0]["grad_norm"])
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert norms[2] == pytest.approx(norms[0], rel=1e-4)

    def test_finite_differences(self, make_trainer):
        """The gradient of the clipped chunk loss along a direction, through the network, off-policy."""
        trainer = make_trainer(num_iterations=2, epsilon=1.0, chunk_fraction=1.0)
        perturb(trainer)
        batch = generation(trainer)[0]
        trainer.model.double()
        trainer.flow.dtype = torch.float64
        batch.states = {i: latents.double() for i, latents in batch.states.items()}
        batch.advantages = batch.advantages.double()
        analytic = gradients(trainer, batch)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        start = torch.cat([p.detach().flatten() for p in parameters])
        direction = torch.randn(len(start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def loss(shift):
            torch.nn.utils.vector_to_parameters(start + shift * direction, parameters)
            with torch.no_grad():
                return sum(term().item() for term in trainer.loss_terms(trainer.model, batch))

        # Norms and embeddings of the network compute in float32 whatever its weights, which bounds the step from below.
        numeric = (loss(1e-3) - loss(-1e-3)) / 2e-3
        assert numeric == pytest.approx((analytic @ direction).item(), rel=2e-3)


class TestResume:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            # Two optimizer steps a generation: the checkpoint falls between them.
            {"steps_per_generation": 4, "save_steps": 3},
            {"num_iterations": 2, "save_steps": 3},
            {"chunk_sizes": "temporal", "num_chunks": 2, "chunk_sampling": "temporal"},
            {"peft_config": False, "learning_rate": 1e-3},
            # Within a window, and within a generation that has the means of the policy that sampled it.
            {
                "chunk_sizes": None,
                "train_window": 2,
                "window_interval": 2,
                "stochastic_steps": "trained",
                "save_steps": 3,
            },
            {
                "chunk_sizes": None,
                "train_window": 3,
                "window_schedule": "random",
                "window_chunk": 2,
                "steps_per_generation": 4,
                "save_steps": 3,
                "trust_region": "guard",
                "chunk_gradient": "streamed",
            },
        ],
        ids=["on-policy", "mid-generation", "second-pass", "temporal", "full", "window", "old-means"],
    )
    def test_resumed_equals_uninterrupted(self, make_trainer, tmp_path, settings):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "log_samples": False, **settings}
        whole = make_trainer(**settings)
        whole.train()
        checkpoint = tmp_path / "out" / f"checkpoint-{settings['save_steps']}"
        resumed = make_trainer(**settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for name, weight in trainable(whole).items():
            assert torch.equal(weight, trainable(resumed)[name]), name
        rewards = [[log["reward"] for log in t.state.log_history if "reward" in log] for t in (whole, resumed)]
        assert rewards[0] == rewards[1]

    def test_a_save_that_fails_leaves_the_last_whole_checkpoint(self, make_trainer, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "log_samples": False}
        trainer = make_trainer(**settings)
        save = trainer._save_process_state

        def fail_at_the_second(folder):
            if trainer.state.global_step == 4:
                raise OSError(28, "No space left on device")
            save(folder)

        trainer._save_process_state = fail_at_the_second
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        assert get_last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
        resumed = make_trainer(**settings)
        resumed.train(resume_from_checkpoint=True)
        for name, weight in trainable(trainer).items():
            assert torch.equal(weight, trainable(resumed)[name]), name
        assert get_last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")
        assert not list((tmp_path / "out").glob(".checkpoint*"))

    def test_old_checkpoints_are_deleted_and_the_best_kept(self, make_trainer, tmp_path, train_dataset):
        trainer = make_trainer(
            max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps", eval_steps=1,
            metric_for_best_model="reward", greater_is_better=True, load_best_model_at_end=True, num_eval_images=4,
            eval_dataset=train_dataset,
        )  # fmt: skip
        trainer.train()
        folders = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
        assert len(folders) == 2 and "checkpoint-4" in folders
        evaluations = {log["step"]: log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log}
        best = max(evaluations, key=evaluations.get)
        assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
        assert f"checkpoint-{best}" in folders
        assert trainer.evaluate()["eval_reward"] == pytest.approx(evaluations[best], abs=1e-6)


class TestAdapter:
    @pytest.mark.parametrize(
        ("family", "guidance", "guidance_arguments"),
        [
            ("flux", {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
            (
                "qwen-image",
                {"guidance_scale": 3.0, "negative_prompt": "dull"},
                {"true_cfg_scale": 3.0, "negative_prompt": "dull"},
            ),
        ],
    )
    def test_round_trip_into_a_plain_pipeline(self, make_trainer, family, guidance, guidance_arguments, tmp_path):
        """The saved LoRA in a fresh pipeline gives the very images of the trained model."""
        lora = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_v", "to_out.0"])
        trainer = make_trainer(family, peft_config=lora, sigma_shift=None, max_steps=3, **guidance)
        trainer.train()
        trainer.save_model()
        # What the adapter adds to the weights, made whole here.
        layers = [layer for layer in trainer.model.modules() if isinstance(layer, LoraLayer)]
        updates = torch.cat([layer.get_delta_weight("default").flatten() for layer in layers])
        assert trainer.state.log_history[-2]["adapter_norm"] == pytest.approx(updates.norm().item(), rel=1e-5)
        generator = torch.Generator().manual_seed(7)
        expected = trainer.generate(["a cat"], [7])

        pipeline = PIPELINES[family](seed=0)
        pipeline.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
        image = pipeline(
            "a cat", height=32, width=32, num_inference_steps=6, generator=generator, output_type="pt",
            max_sequence_length=trainer.flow.max_sequence_length, **guidance_arguments,
        ).images  # fmt: skip
        assert torch.allclose(image, expected, atol=1e-5)
        base = trainer.generate(["a cat"], [7], adapter_fraction=0.0)
        assert not torch.allclose(base, expected, atol=1e-3)

    def test_of_a_pipeline_from_a_path(self, make_trainer, tmp_path):
        tiny_flux_pipeline(seed=0).save_pretrained(tmp_path / "base")
        trainer = make_trainer(model=FluxPipeline.from_pretrained(tmp_path / "base"))
        trainer.save_model()
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None  # a local path is nobody's business

    def test_saved_with_its_card(self, make_trainer, tmp_path, caplog):
        """Saving does not ask the Hub for the licence of the base model, which would say here that it is offline."""
        trainer = make_trainer(max_steps=1, num_samples_to_log=1, save_strategy="steps", save_steps=1)
        trainer.model_name = "alice/base"
        trainer.train()
        home, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
        assert not list(home.rglob("README.md"))  # checkpoints have none
        trainer.save_model()
        card = ModelCard.load(home / "README.md")
        assert card.data.base_model == "alice/base" and card.data.license is None
        assert [(home / example["output"]["url"]).is_file() for example in card.data.widget] == [True]
        trainer.save_model(str(elsewhere))
        assert (elsewhere / "pytorch_lora_weights.safetensors").is_file()
        assert "widget" not in ModelCard.load(elsewhere / "README.md").data  # there are no pictures
        assert "licence" not in caplog.text
        trainer.create_model_card(dataset_name="alice/prompts", license={"license": "mit"}, tags="red")
        trainer.save_model()
        card = ModelCard.load(home / "README.md")
        assert card.data.license == "mit" and card.data.datasets == ["alice/prompts"] and "red" in card.data.tags

    @pytest.mark.parametrize(
        ("settings", "numbers"),
        [
            ({}, set()),
            ({"train_window": 2}, {"2507.21802"}),
            ({"trust_region": "kl"}, {"2606.11025"}),
            ({"train_window": 2, "trust_region": "guard"}, {"2507.21802", "2510.22319"}),
        ],
    )
    def test_the_card_cites_the_methods_that_were_used(self, make_trainer, tmp_path, settings, numbers):
        trainer = make_trainer(**{"chunk_sizes": None if "train_window" in settings else [2, 3], **settings})
        trainer.create_model_card()
        cited = re.findall(
            r"arXiv preprint arXiv:([\d.]+)", (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        )
        assert len(cited) == len(set(cited)) and set(cited) - {"2510.21583", "2505.07818", "2505.05470"} == numbers

    def test_hybrid_sampling_lies_between(self, make_trainer):
        trainer = make_trainer()
        perturb(trainer, 0.1)
        images = [trainer.generate(["rain"], [0], adapter_fraction=fraction) for fraction in (0.0, 0.5, 1.0)]
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
        with pytest.raises(ValueError, match="adapter_fraction"):
            trainer.generate(["rain"], [0], adapter_fraction=1.5)


def test_rollouts_have_no_dropout_and_all_updates_have(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=4, target_modules=["to_q"], lora_dropout=0.5))
    modes = []
    handle = trainer.model.register_forward_pre_hook(
        lambda network, inputs: modes.append((torch.is_grad_enabled(), network.training))
    )
    trainer.train()
    handle.remove()
    assert set(modes) == {(False, False), (True, True)}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_is_the_network_that_the_run_started_from(make_trainer, full):
    settings = {"peft_config": False} if full else {}
    trainer = make_trainer(beta=0.1, learning_rate=1e-3, **settings)
    trainer.train()
    fresh = make_trainer(beta=0.1, **settings)
    batch = trainer.make_micro_batches([{"prompt": "rain"}] * 4 + [{"prompt": "a fish"}] * 4, 1)[0]
    for steps in batch.chunks:
        means = torch.cat([batch.reference_means[step] for step in steps])
        with torch.no_grad():
            expected = fresh._transition(fresh.model, batch, steps)[1]
            trained = trainer._transition(trainer.model, batch, steps)[1]
        assert torch.equal(means, expected) and not torch.equal(means, trained)
