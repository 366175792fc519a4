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

"""The relatives of Chunk-GRPO, by their settings: noise and windows, trust regions, weights of steps."""

import pytest
import torch

from trl_diffusion.flow import shifted_schedule, transition_coefficients

from .conftest import generation, gradients, off_policy_in_float64, perturb, trainable


WINDOW = {"chunk_sizes": None, "train_window": 2}


def assert_same_gradient(actual, expected):
    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def backward(trainer, loss):
    trainer.model.zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten().double() for p in trainer.model.parameters() if p.requires_grad])


class TestNoise:
    @pytest.mark.parametrize("sde_type", ["flow", "cps"])
    def test_between_trained_steps_the_sampler_is_eulers(self, make_trainer, sde_type):
        """Window 1 to 3 of five: by hand from the noise to its start, and from its end to the image."""
        trainer = make_trainer(
            chunk_sizes=[1, 2, 2], chunk_sampling=[1], stochastic_steps="trained", sde_type=sde_type
        )
        perturb(trainer)
        (batch, _) = generation(trainer)
        assert batch.chunks == [[1, 2]]
        stochastic = batch.log_probs.isfinite()
        assert (stochastic == torch.tensor([False, True, True, False, False, False])).all()
        conditioning = trainer.conditioning.get(batch.prompts)
        sigmas = shifted_schedule(6).float()

        def euler(latents, i):
            with torch.no_grad():
                velocity = trainer.velocity(trainer.model, latents, sigmas[i].expand(4), conditioning)
            return latents + (sigmas[i + 1] - sigmas[i]) * velocity

        noise = trainer.image_sampler.draw_noise(trainer.generators(0, 0, [0] * 4))
        torch.testing.assert_close(batch.states[1], euler(noise, 0), rtol=0, atol=1e-5)
        latents = batch.states[3]
        for i in (3, 4, 5):
            latents = euler(latents, i)
        torch.testing.assert_close(batch.clean, latents, rtol=0, atol=1e-5)
        # And within, it is as noisy as ever: the images of a group differ by it.
        std = transition_coefficients(sigmas, sde_type).std[1].item()
        spread = (batch.states[2] - batch.states[2].mean(0)).square().sum(0).div(3).mean().sqrt().item()
        assert spread == pytest.approx(std, rel=0.1)

    def test_all_trained_is_all(self, make_trainer):
        settings = {"chunk_fraction": 1.0}
        all_steps, trained = (make_trainer(stochastic_steps=s, **settings) for s in ("all", "trained"))
        assert torch.equal(generation(all_steps)[0].clean, generation(trained)[0].clean)


class TestWindow:
    @pytest.mark.parametrize(
        ("settings", "chunks"),
        [
            ({"window_interval": 1}, [[[i], [i + 1]] for i in (0, 1, 2, 3, 0, 1)]),
            ({"window_interval": 2, "window_stride": 2}, [[[i], [i + 1]] for i in (0, 0, 2, 2, 0, 0)]),
            ({"window_interval": 1, "window_chunk": 2}, [[[i, i + 1]] for i in (0, 1, 2, 3, 0, 1)]),
            ({"train_window": 5, "window_chunk": 3}, [[[0, 1, 2], [3, 4]]] * 6),
        ],
    )
    def test_sliding(self, make_trainer, settings, chunks):
        trainer = make_trainer(**{**WINDOW, **settings})
        assert [trainer._draw_chunks(i, None) for i in range(6)] == chunks
        batch = generation(trainer)[0]
        assert batch.chunks == chunks[0] and batch.divisors == [len(chunks[0])] * len(chunks[0])

    def test_random_depends_on_seed_and_generation_alone(self, make_trainer):
        settings = {**WINDOW, "window_schedule": "random", "num_inference_steps": 11}
        one, same = make_trainer(**settings), make_trainer(**settings)
        other = make_trainer(**settings, seed=3)
        drawn = [[trainer._draw_chunks(i, None) for i in range(40)] for trainer in (one, same, other)]
        assert [same._draw_chunks(i, None) for i in reversed(range(40))] == drawn[0][::-1]
        assert drawn[0] == drawn[1] != drawn[2]
        # Of nine offsets, the noisier half.
        assert {chunks[0][0] for chunks in drawn[0]} == {0, 1, 2, 3}
        assert all(chunks == [[chunks[0][0]], [chunks[0][0] + 1]] for chunks in drawn[0])

    @pytest.mark.parametrize(
        "settings",
        [
            {"window_interval": 1},
            {"window_schedule": "random", "trust_region": "kl", "num_iterations": 2, "chunk_gradient": "streamed"},
            {"window_chunk": 2, "trust_region": "guard", "num_iterations": 2, "beta": 0.1},
            {"window_chunk": 2, "loss_weighting": "inverse_chunk_size", "peft_config": False, "learning_rate": 1e-3},
            {"trust_region": "guard", "steps_per_generation": 4, "peft_config": False, "learning_rate": 1e-3},
        ],
        ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
    )
    def test_trains(self, make_trainer, settings):
        trainer = make_trainer(**WINDOW, stochastic_steps="trained", **settings)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.isfinite(weight).all() for weight in trainable(trainer).values())
        assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())
        first, second = trainer.state.log_history[:2]
        assert first["ratio/mean"] == 1 and first["skipped_steps"] == second["skipped_steps"] == 0
        off_policy = not trainer.args.on_policy
        assert (second["frac_off_policy"] > 0) is off_policy
        if "trust_region" in settings:
            assert first["divergence/mean"] == 0 < second["divergence/mean"]


class TestTrustRegion:
    @pytest.mark.parametrize("gradient", ["joint", "streamed"])
    @pytest.mark.parametrize("chunk_sizes", [[1] * 5, [2, 3]], ids=["steps", "chunks"])
    @pytest.mark.parametrize("trust_region", ["clip", "kl", "guard"])
    def test_off_policy_by_hand(self, make_trainer, trust_region, chunk_sizes, gradient):
        """From the means of both policies; chunks of one are the step-level methods of the papers."""
        trainer = make_trainer(
            trust_region=trust_region, chunk_sizes=chunk_sizes, chunk_fraction=1.0, num_iterations=2,
            chunk_gradient=gradient,
        )  # fmt: skip
        batch = off_policy_in_float64(trainer)
        batch.advantages = torch.tensor([1.2, -0.4, 0.3, -1.1], dtype=torch.float64)
        sigmas = shifted_schedule(6)
        table, advantages = transition_coefficients(sigmas, "flow"), batch.advantages
        old_means = batch.old_means
        if trust_region == "clip":  # which keeps none
            assert not old_means
            with torch.no_grad():
                perturb(trainer, scale=-0.02, seed=1)
                old_means = {i: trainer._transition(trainer.model, batch, [i])[1] for i in range(5)}
                perturb(trainer, seed=1)

        def ratio_and_divergence(chunk):
            exponents, divergences = [], []
            for step in chunk:
                mean, old = trainer._transition(trainer.model, batch, [step])[1], old_means[step]
                following, std = batch.states[step + 1], table.std[step]
                divergences.append((mean - old).square() / (2 * std**2))
                if trust_region == "guard":
                    # (log p - log p_old + D) std, in closed form
                    exponents.append((mean - old) * (following - old) / std)
                else:
                    exponents.append(((following - old).square() - (following - mean).square()) / (2 * std**2))
            exponent, divergence = (torch.stack(v).flatten(2).mean((0, 2)) for v in (exponents, divergences))
            return exponent.exp(), divergence.detach()

        with torch.no_grad():
            known = [ratio_and_divergence(chunk) for chunk in batch.chunks]
        moves = torch.cat([(ratio - 1).abs() for ratio, _ in known])
        # A bound that some pass and some do not.
        bound = torch.cat([divergence for _, divergence in known]).quantile(0.3).item()
        trainer.args.kl_threshold = bound
        trainer.args.epsilon = trainer.args.epsilon_high = epsilon = moves.quantile(0.3).item()
        held = []

        def loss():
            total = 0
            for chunk in batch.chunks:
                ratio, divergence = ratio_and_divergence(chunk)
                good = advantages > 0
                if trust_region == "kl":
                    stopped = (divergence > bound) & torch.where(good, ratio > 1, ratio < 1)
                else:
                    stopped = torch.where(good, ratio > 1 + epsilon, ratio < 1 - epsilon)
                held.append(stopped)
                # What is stopped has no gradient.
                of_chunk = torch.where(stopped, 0.0, -advantages * ratio)
                if trust_region == "guard":
                    of_chunk = of_chunk / (sigmas[chunk] - sigmas[[step + 1 for step in chunk]]).mean()
                total = total + of_chunk.mean() / len(batch.chunks)
            return total

        expected = backward(trainer, loss)
        share = torch.cat(held).float().mean().item()
        assert 0 < share < 1
        trainer._running_metrics.take(trainer.accelerator)
        assert_same_gradient(gradients(trainer, batch), expected)
        metrics = trainer._take_metrics()
        assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] == pytest.approx(share)
        assert metrics["ratio/mean"] == pytest.approx(torch.cat([ratio for ratio, _ in known]).mean().item(), rel=1e-6)
        if trust_region != "clip":
            divergence = torch.cat([divergence for _, divergence in known]).mean().item()
            assert metrics["divergence/mean"] == pytest.approx(divergence, rel=1e-3)

    @pytest.mark.parametrize("gradient", ["joint", "streamed"])
    def test_on_policy_they_differ_by_known_factors(self, make_trainer, gradient):
        settings = {"chunk_fraction": 1.0, "chunk_gradient": gradient}
        found = {}
        for trust_region in ("clip", "kl", "guard"):
            trainer = make_trainer(trust_region=trust_region, **settings)
            perturb(trainer)
            batch = generation(trainer)[0]
            found[trust_region] = gradients(trainer, batch)
        assert torch.equal(found["clip"], found["kl"])
        sigmas = shifted_schedule(6)
        std, lengths = transition_coefficients(sigmas, "flow").std, -sigmas.diff()

        def loss():
            total = 0
            for chunk in batch.chunks:
                for step in chunk:
                    log_probs = trainer._transition(trainer.model, batch, [step])[0][:, 0]
                    factor = std[step] / lengths[chunk].mean() / len(chunk) / len(batch.chunks)
                    total = total - factor * (batch.advantages * log_probs).mean()
            return total

        assert_same_gradient(found["guard"], backward(trainer, loss))

    def test_a_threshold_that_nothing_passes_is_no_bound(self, make_trainer):
        """As clip without a clip."""
        settings = {"chunk_fraction": 1.0, "num_iterations": 2}
        unbound = make_trainer(trust_region="kl", kl_threshold=1e30, **settings)
        unclipped = make_trainer(epsilon=1e30, **settings)
        found = [gradients(trainer, off_policy_in_float64(trainer)) for trainer in (unbound, unclipped)]
        assert torch.equal(*found)


class TestLossWeighting:
    def test_on_policy_it_is_the_gradient_of_chunks(self, make_trainer):
        found = []
        for weighting in (None, "inverse_chunk_size"):
            trainer = make_trainer(chunk_fraction=1.0, loss_weighting=weighting)
            perturb(trainer)
            batch = generation(trainer)[0]
            found.append(gradients(trainer, batch))
        assert batch.chunks == [[0], [1], [2], [3], [4]] and batch.divisors == [4, 4, 6, 6, 6]
        assert_same_gradient(found[1], found[0])

    def test_off_policy_each_step_has_its_own_ratio(self, make_trainer):
        trainer = make_trainer(chunk_sampling=[1], loss_weighting="inverse_chunk_size", num_iterations=2, epsilon=1e-3)
        batch = off_policy_in_float64(trainer)
        assert batch.chunks == [[2], [3], [4]]

        def loss():
            total = 0
            for step in (2, 3, 4):
                log_probs = trainer._transition(trainer.model, batch, [step])[0][:, 0]
                ratio = (log_probs - batch.old_log_probs[:, step]).exp()
                clipped = ratio.clamp(1 - 1e-3, 1 + 1e-3)
                total = total + torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped).mean() / 3
            return total

        assert_same_gradient(gradients(trainer, batch), backward(trainer, loss))
