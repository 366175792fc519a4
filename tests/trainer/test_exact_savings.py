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
What the images of a group have in common is computed once, and nothing but the time changes: against the plain computation,
in float64. Each of the rollout's families is in `tests/models/test_sampler.py`, several processes in `test_distributed.py`.
"""

import pytest
import torch
from diffusers.models.normalization import RMSNorm

from trl_diffusion.trainer.generation import beginning_groups

from .conftest import generation, gradients, in_float64, off_policy_in_float64, perturb


WINDOW = {"chunk_sizes": None, "train_window": 3, "window_chunk": 2, "stochastic_steps": "trained"}
SETTINGS = [
    {"chunk_sampling": [0]},
    {"chunk_sampling": [0], "chunk_gradient": "streamed", "trust_region": "kl"},
    {**WINDOW, "window_schedule": "random", "trust_region": "guard", "beta": 0.1},
    {**WINDOW, "chunk_gradient": "streamed"},
    {**WINDOW, "trust_region": "guard", "peft_config": False},
    {"chunk_fraction": 1.0, "loss_weighting": "inverse_chunk_size"},
]


def ids(settings):
    return ",".join(f"{name}={value}" for name, value in settings.items())


def norms_in_float64(network):
    """Diffusers' normalisation is float32 whatever its weights; this is the same layer of PyTorch."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                norm = torch.nn.RMSNorm(child.dim, child.eps, dtype=torch.float64)
                norm.weight.data.copy_(child.weight)
                setattr(module, name, norm)


def rollouts(trainer):
    """All trajectories of a generation, in the order of the images."""
    perturb(trainer)
    trainer.model.double()
    trainer.flow.dtype = torch.float64
    return trainer.generation_class.cat(generation(trainer, ["a cat", "a dog", "rain"]))


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
# Groups of four in micro-batches of one and a half, and of three groups.
@pytest.mark.parametrize(("size", "rollout_size"), [(6, 5), (12, 1)])
def test_rollout(make_trainer, settings, size, rollout_size):
    settings = {"num_iterations": 2, "gradient_accumulation_steps": 12 // size, **settings}
    once = make_trainer(per_device_train_batch_size=size, rollout_batch_size=rollout_size, **settings)
    plain = make_trainer(per_device_train_batch_size=12, **{**settings, "gradient_accumulation_steps": 1})
    plain._computes_common_once = False
    ours, expected = rollouts(once), rollouts(plain)
    assert once._forwards < plain._forwards
    assert ours.chunks == expected.chunks and ours.states.keys() == expected.states.keys()
    # Latents are float32; that they are equal says that networks in float64 were not further apart.
    exact = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(ours.clean, expected.clean, **exact)
    torch.testing.assert_close(ours.scores, expected.scores, **exact)
    for name in ("log_probs", "old_log_probs"):
        torch.testing.assert_close(vars(ours)[name], vars(expected)[name], **exact)
    for name in ("states", "old_means", "reference_means"):
        for i, tensor in vars(ours)[name].items():
            torch.testing.assert_close(tensor, vars(expected)[name][i], **exact)


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
@pytest.mark.parametrize("size", [4, 6])
def test_gradient(make_trainer, settings, size):
    # With nothing clipped or dropped. The rotary embeddings of the other families are float32 whatever their weights.
    bound = {"kl_threshold": 1.0} if settings.get("trust_region") == "kl" else {"epsilon": 1.0}
    trainer = make_trainer(
        "sd3", per_device_train_batch_size=size, gradient_accumulation_steps=12 // size, num_iterations=2, **bound,
        **settings,
    )  # fmt: skip
    norms_in_float64(trainer.model)
    batch = off_policy_in_float64(trainer, ["a cat", "a dog", "rain"])
    found, forwards = [], []
    for once in (True, False):
        trainer._computes_common_once = once
        before = trainer.image_sampler.forwards
        found.append(gradients(trainer, batch))
        forwards.append(trainer.image_sampler.forwards - before)
    assert forwards[0] < forwards[1]
    scale = found[1].abs().max().item()
    assert scale > 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-12 * scale)


ON_POLICY = [
    {"chunk_fraction": 1.0},
    {"chunk_fraction": 1.0, "chunk_gradient": "streamed", "trust_region": "kl", "beta": 0.1},
    {"chunk_fraction": 1.0, "loss_weighting": "inverse_chunk_size", "beta": 0.1},
    {**WINDOW, "trust_region": "guard", "beta": 0.1},
    {**WINDOW, "window_chunk": 1, "num_iterations": 2, "peft_config": False},
]


# Three groups of four: each in several micro-batches, and some micro-batches with two of them.
SIZES = [(ON_POLICY[0], size) for size in (1, 2, 3, 6)] + list(zip(ON_POLICY[1:], (1, 3, 6, 2), strict=True))


@pytest.mark.parametrize(
    ("settings", "size"), SIZES, ids=lambda value: ids(value) if isinstance(value, dict) else None
)
def test_an_update_whose_groups_are_in_several_micro_batches(make_trainer, settings, size):
    found, losses, forwards, logged = [], [], [], []
    for once, rows in ((True, size), (False, 12)):
        passes = settings.get("num_iterations", 1)
        trainer = make_trainer(
            "sd3", per_device_train_batch_size=rows, gradient_accumulation_steps=passes * 12 // rows,
            steps_per_generation=12 // rows, guidance_scale=1.0, **settings,
        )  # fmt: skip
        trainer._computes_common_once = once
        norms_in_float64(trainer.model)
        perturb(trainer)
        in_float64(trainer)
        micro_batches = generation(trainer, ["a cat", "a dog", "rain"])
        beginning = [batch.beginning for batch in micro_batches if batch.beginning is not None]
        in_float64(trainer, *micro_batches, *beginning)
        for batch in (*micro_batches, *beginning):  # as if the rollout's were far away, by image and step
            batch.log_probs += torch.tensor(batch.index)[:, None] * torch.arange(6)
        if trainer.args.beta > 0:
            trainer._add_reference_means(micro_batches)
        before, terms = trainer.image_sampler.forwards, []
        gradient = sum(gradients(trainer, batch, terms) for batch in micro_batches)
        found.append(gradient / len(micro_batches))
        losses.append(sum(terms) / len(micro_batches))
        logged.append(trainer._running_metrics.take(trainer.accelerator))
        forwards.append(trainer.image_sampler.forwards - before)
        if once:  # each group at one micro-batch, where its first image is
            assert sorted(sum((batch.index for batch in beginning), [])) == list(range(12))
            assert all(
                batch.beginning.index[0] in batch.index for batch in micro_batches if batch.beginning is not None
            )
            assert {batch.common_step for batch in micro_batches} == {min(map(min, micro_batches[0].chunks))}
            assert trainer.generation_class.cat(micro_batches).index == list(range(12))  # as a checkpoint has them
    # Of all trained steps one is common to four images.
    steps = sum(map(len, micro_batches[0].chunks))
    assert forwards == [12 * (steps - 1) + 3, 12 * steps]
    scale = found[1].abs().max().item()
    assert scale > 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-12 * scale)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10, abs=1e-14)
    assert ("kl" in logged[0]) == (settings.get("beta", 0) > 0)
    assert logged[0]["rollout_logp_gap"] > 1
    assert logged[0] == pytest.approx(logged[1], rel=1e-5, abs=1e-9)


def test_what_is_trained_together(make_trainer):
    """A group's common step, where it is in several micro-batches and the update has other steps and is on-policy."""

    def common_steps(size=2, **settings):
        trainer = make_trainer(
            per_device_train_batch_size=size, **{"gradient_accumulation_steps": 8 // size, **settings}
        )
        return {batch.common_step for batch in generation(trainer)}

    assert common_steps(chunk_fraction=1.0) == {0}
    assert common_steps(chunk_fraction=1.0, size=4) == {None}  # each group is in one micro-batch anyway
    assert common_steps(chunk_fraction=1.0, shared_noise="none") == {None}
    assert common_steps(chunk_sampling=[1]) == {None}
    assert common_steps(chunk_sizes=[1, 4], chunk_sampling=[0]) == {None}  # nothing is left for the others
    assert common_steps(chunk_fraction=1.0, num_iterations=2) == {None}


def places(processes, rows, num_generations):
    """By process the group of each row, where each process has so many in a row."""
    return [[(process * rows + row) // num_generations for row in range(rows)] for process in range(processes)]


def test_where_groups_begin():
    assert beginning_groups(places(1, 6, 4), 2) == [[slice(0, 4), None, slice(4, 6)]]
    assert beginning_groups(places(1, 6, 3), 2) == [[slice(0, 3), slice(3, 6), None]]
    assert beginning_groups(places(1, 8, 2), 4) is None  # each is in one micro-batch
    assert beginning_groups(places(2, 6, 3), 2) == [[slice(0, 3), slice(3, 6), None]] * 2
    # The second process has the other half of a group, whose images it trains together as well.
    assert beginning_groups(places(2, 2, 4), 1) == [[slice(0, 2), None]] * 2
    # The second one's groups begin at its first and third row, those of the others at the first and the fifth.
    assert beginning_groups(places(3, 6, 4), 2) is None
    # On the second of three each group is in one micro-batch, and it does as the others.
    three = places(3, 8, 3)
    expected = [[slice(0, 6), slice(6, 8)], [slice(0, 4), slice(4, 8)], [slice(0, 5), slice(5, 8)]]
    assert beginning_groups(three, 4) == expected
    assert beginning_groups(three[:2], 4) == expected[:2] and beginning_groups(three[1:], 4) == expected[1:]


def test_noise_of_their_own_has_nothing_in_common(make_trainer):
    trainer = make_trainer(shared_noise="none", chunk_sampling=[0])
    batch = generation(trainer)[0]
    assert trainer._forwards == 8 * 6
    gradients(trainer, batch)
    assert trainer._forwards == 8 * 6 + 4 * 2


@pytest.mark.parametrize(
    ("family", "settings", "rollout", "update"),
    [
        # Two groups of four images, six steps. The first is common; of the update's, step 0, two micro-batches.
        ("flux", {"chunk_sampling": [0]}, 2 + 5 * 8, 2 * (1 + 4)),
        ("flux", {"chunk_sampling": [1]}, 2 + 5 * 8, 2 * 3 * 4),
        # First the ratio of a chunk, then its gradient, where the update is not on-policy: in the second pass.
        ("flux", {"chunk_sampling": [0], "num_iterations": 2}, 2 + 5 * 8 + 2 * (1 + 4), 2 * 2 * (1 + 4)),
        # The steps before the window as well.
        ("flux", {**WINDOW, "window_interval": 1, "window_chunk": 1, "max_steps": 2}, 2 + 5 * 8 + 2 * 2 + 4 * 8,
         2 * 2 * (1 + 4 + 4)),
        ("qwen-image", {"chunk_sampling": [0], "guidance_scale": 3.0}, 2 * (2 + 5 * 8), 2 * 2 * (1 + 4)),
        ("flux", {"chunk_sampling": [0], "beta": 0.1}, 2 + 5 * 8 + 2 * (1 + 4), 2 * (1 + 4)),
        # Four micro-batches: on-policy, the common step is trained by the first one of a group.
        ("flux", {"chunk_sampling": [0], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
         2 + 5 * 8, 2 * 1 + 4 * 2),
        ("flux", {"chunk_sampling": [0], "beta": 0.1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
         2 + 5 * 8 + 2 + 8, 2 + 8),
    ],
)  # fmt: skip
def test_forwards_per_image_by_hand(make_trainer, family, settings, rollout, update, train_dataset):
    settings = {"max_steps": settings.get("num_iterations", 1), **settings, "logging_steps": 2}
    trainer = make_trainer(family, **settings, eval_dataset=train_dataset, num_eval_images=2)
    if settings["max_steps"] == 1:
        trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.evaluate()  # which does not count
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    images = 8 * settings["max_steps"] // settings.get("num_iterations", 1)
    assert log["forwards_per_image"] == pytest.approx((rollout + update) / images)


def test_every_process_knows_the_places_of_the_others_images(make_trainer, monkeypatch):
    """Together the rows of three processes are all images once, each optimizer step's behind those of the step before."""
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=4)
    size = trainer.args.consecutive_images
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    places = [trainer._global_index(2 * size, process) for process in range(3)]
    assert sorted(sum(places, [])) == list(range(6 * size))
    assert places[1] == [*range(size, 2 * size), *range(4 * size, 5 * size)]
    assert trainer._global_index(2 * size) == places[0]
