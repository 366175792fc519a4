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

"""Decoding and scoring beside the sampling of the next batch."""

import threading

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from trl_diffusion.rewards import RewardModel


PROMPTS = ["a cat", "a large dog", "a bird in a tree"]


class Blueness(RewardModel):
    def score(self, images, prompts):
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return images[:, 2].mean((1, 2)) * lengths


def greenness(images, prompts, weight):
    """With PyTorch's gradients, as a function of a user may take them."""
    green = torch.tensor([image.resize((1, 1)).getpixel((0, 0))[1] / 255 for image in images], requires_grad=True)
    (gradient,) = torch.autograd.grad((green * torch.tensor(weight)).square().sum(), green)
    return gradient.tolist()


def test_the_result_is_the_same_bit_for_bit(make_trainer, tmp_path):
    def trained(folder, **settings):
        trainer = make_trainer(
            reward_funcs=[greenness, Blueness()], watch_reward_funcs=[Blueness()], output_dir=str(tmp_path / folder),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS, "weight": [1.0, 2.0, 3.0]}), rollout_batch_size=3,
            max_steps=2, logging_steps=1, **settings,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return load_file(tmp_path / folder / "adapter_model.safetensors"), logs

    expected, plain_logs = trained("plain")
    actual, logs = trained("overlapping", overlap_rewards=True)
    assert all(torch.equal(weight, expected[name]) for name, weight in actual.items())
    for a, b in zip(plain_logs, logs, strict=True):
        told = {name for name in a if not name.startswith(("time/", "images_per_second", "memory"))}
        assert {name: a[name] for name in told} == {name: b[name] for name in told}
        assert {"time/rollout", "time/decode", "time/reward", "time/overlap_wait"} <= b.keys()
        assert all(b[name] > 0 for name in b if name.startswith("time/"))
    assert "time/overlap_wait" not in plain_logs[0]


def test_the_next_batch_is_sampled_meanwhile(make_trainer):
    """A reward that waits for a forward of the network, which without overlap would never come."""
    forwards, scored = threading.Semaphore(0), []

    def waiting(images, prompts, **columns):
        # The last batch has none behind it.
        scored.append(len(images))
        arrived = len(scored) == 2 or forwards.acquire(timeout=60)
        return [float(arrived)] * len(images)

    trainer = make_trainer(
        reward_funcs=waiting, rollout_batch_size=4, overlap_rewards=True, shared_noise="none", max_steps=1
    )
    decode = trainer.decode

    def decode_then_count(latents):
        # Forwards before this are of this very batch.
        while forwards.acquire(blocking=False):
            pass
        return decode(latents)

    trainer.decode = decode_then_count
    trainer.flow.denoiser.register_forward_hook(lambda *args: forwards.release())
    rows = [{"prompt": "a cat"}] * 4 + [{"prompt": "a dog"}] * 4
    generation = trainer.make_generation(rows, 0)
    assert scored == [4, 4]
    assert generation.scores.eq(1).all()


@pytest.mark.parametrize("error", [OSError("the disk of the server is full"), ValueError("no such prompt")])
def test_a_reward_that_fails_stops_the_run_as_it_does_without(make_trainer, tmp_path, error):
    calls = []

    def failing(images, prompts, **columns):
        calls.append(len(images))
        if len(calls) > 2:  # the second generation
            raise error
        return [float(i) for i in range(len(images))]

    messages = []
    for overlap in (False, True):
        calls.clear()
        trainer = make_trainer(
            reward_funcs=failing, output_dir=str(tmp_path / str(overlap)), reward_retries=0, rollout_batch_size=4,
            overlap_rewards=overlap, max_steps=3,
        )  # fmt: skip
        with pytest.raises(Exception, match=str(error)) as raised:
            trainer.train()
        assert len(calls) == 3  # nothing is asked after the failure
        assert (tmp_path / str(overlap) / "checkpoint-1").is_dir()
        messages.append((raised.type, str(raised.value).replace(str(overlap), "")))
    assert messages[0] == messages[1]


def test_a_rollout_that_fails_leaves_no_thread_behind(make_trainer):
    trainer = make_trainer(overlap_rewards=True)

    def interrupt(*args):
        raise KeyboardInterrupt

    trainer.flow.denoiser.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.make_generation([{"prompt": "a cat"}] * 4, 0)
    for thread in threading.enumerate():
        if thread.name == "side-work":
            thread.join(60)
            assert not thread.is_alive()


def test_refused_where_rewards_are_off_the_accelerator(make_trainer):
    with pytest.raises(
        ValueError, match="overlap_rewards=True uses the VAE and the rewards while the network samples"
    ):
        make_trainer(overlap_rewards=True, offload_frozen=True)
