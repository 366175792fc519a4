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

"""What happens when something breaks: nothing is lost, and the message says what to do."""

import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from campaigns import full_disk
from campaigns.tiny_runs import PROMPTS, Warmth, make_trainer
from safetensors.torch import load_file

import trl_diffusion
from trl_diffusion import ChunkGRPOConfig
from trl_diffusion.rewards import calls as reward_calls
from trl_diffusion.rewards import score_images
from trl_diffusion.rewards.calls import RewardError, call_reward
from trl_diffusion.runtime.checkpoints import (
    MANIFEST_NAME,
    checkpoints,
    last_whole_checkpoint,
    publish,
    recover,
    rotate,
    why_incomplete,
    write_manifest,
)


KINDS = ["chunk_grpo", "srpo"]
TESTS = Path(__file__).parents[1]
CONFIGS = Path(trl_diffusion.__file__).parent / "accelerate_configs"


class AtStep(Warmth):
    """The reward, which does something else first at a step of the training."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action
        self.trainer = None

    def score(self, images, prompts):
        if self.trainer is not None and self.trainer.is_in_train and self.trainer.state.global_step == self.step:
            return self.action(super().score(images, prompts))
        return super().score(images, prompts)


def breaking_trainer(kind, folder, step, action, **settings):
    reward = AtStep(step, action)
    trainer = make_trainer(kind, folder, reward=reward, **settings)
    reward.trainer = trainer
    return trainer


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


@functools.cache
def whole_weights(kind):
    """The weights after four steps of a run that is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, folder, save_strategy="no", max_steps=4)
        trainer.train()
    return trained(trainer)


@pytest.fixture(autouse=True)
def messages(caplog, monkeypatch):
    # The loggers of transformers, which ours are, do not propagate by themselves.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_diffusion"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(reward_calls, "FIRST_PAUSE", 0.0)


class TestCheckpointFolders:
    @staticmethod
    def write(folder, step, **files):
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        for name in ("trl_diffusion_state.json", "trainer_state.json"):
            (path / name).write_text("{}")
        (path / "weights").write_text("weights")
        write_manifest(path)
        return path

    def test_whole(self, tmp_path):
        path = self.write(tmp_path, 3)
        assert why_incomplete(path) is None
        assert last_whole_checkpoint(tmp_path) == path

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda path: (path / "weights").unlink(), "the file weights is missing"),
            (lambda path: (path / "weights").write_text("wei"), "the file weights has 3 bytes instead of 7"),
            (lambda path: (path / MANIFEST_NAME).unlink(), "its list of files, trl_diffusion_files.json, is missing"),
            (lambda path: (path / MANIFEST_NAME).write_text("{"), "is broken"),
        ],
        ids=["missing", "truncated", "no-list", "broken-list"],
    )
    def test_incomplete_is_passed_over_with_a_message(self, tmp_path, messages, damage, reason):
        older, newer = self.write(tmp_path, 9), self.write(tmp_path, 10)
        damage(newer)
        assert last_whole_checkpoint(tmp_path) == older
        assert f"{newer} is incomplete and is skipped: " in messages.text and reason in messages.text

    def test_weights_alone_cannot_be_resumed(self, tmp_path):
        path = self.write(tmp_path, 1)
        (path / "trl_diffusion_state.json").unlink()
        (path / MANIFEST_NAME).unlink()
        write_manifest(path)
        assert "save_only_model=True" in why_incomplete(path)

    def test_none(self, tmp_path):
        assert last_whole_checkpoint(tmp_path / "nothing") is None
        (tmp_path / "checkpoint-x").mkdir()
        (tmp_path / "checkpoint-5").write_text("a file")
        assert checkpoints(tmp_path) == []

    def test_publish_replaces_and_recover_puts_back(self, tmp_path):
        old = self.write(tmp_path, 4)
        new = self.write(tmp_path / "staging", 4)
        (new / "more").write_text("more")
        publish(new, old)
        assert (old / "more").exists() and [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []

        # Killed between the two renames: the old one is aside, the new one not yet in its place.
        aside = tmp_path / ".checkpoint-4-replaced"
        old.rename(aside)
        recover(tmp_path)
        assert why_incomplete(old) is None and not aside.exists()
        # Killed before the old one was deleted.
        shutil.copytree(old, aside)
        recover(tmp_path)
        assert why_incomplete(old) is None and not aside.exists()

    def test_rotation_keeps_what_was_just_written(self, tmp_path):
        # Checkpoints of an earlier run have higher numbers, and the clock of the file system shows one time for all.
        paths = [self.write(tmp_path, step) for step in (2, 50, 100)]
        for path in paths:
            os.utime(path, (0, 0))
        rotate(tmp_path, 1, {paths[0]})
        assert checkpoints(tmp_path) == [paths[0]]

    def test_rotation_deletes_the_oldest_and_keeps_the_best(self, tmp_path):
        paths = [self.write(tmp_path, step) for step in (1, 2, 3, 4)]
        for age, path in enumerate(paths):
            os.utime(path, (1000 + age, 1000 + age))
        rotate(tmp_path, None, {paths[3]})
        rotate(tmp_path, 0, {paths[3]})
        assert checkpoints(tmp_path) == paths
        rotate(tmp_path, 2, {paths[3], paths[0]})
        assert checkpoints(tmp_path) == [paths[0], paths[3]]


class TestResume:
    def test_a_broken_checkpoint_is_skipped(self, tmp_path, messages):
        whole = make_trainer("chunk_grpo", tmp_path, max_steps=3)
        whole.train()
        weights = tmp_path / "checkpoint-3" / "optimizer.pt"
        weights.write_bytes(weights.read_bytes()[:1000])
        resumed = make_trainer("chunk_grpo", tmp_path, max_steps=3)
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-3 is incomplete and is skipped: the file optimizer.pt has 1000 bytes" in messages.text
        assert_equal(trained(whole), trained(resumed))

    def test_nothing_to_resume_from(self, tmp_path):
        trainer = make_trainer("chunk_grpo", tmp_path)
        with pytest.raises(
            ValueError, match="There is no whole checkpoint in .* Train without resume_from_checkpoint"
        ):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="checkpoint-9' is no whole checkpoint: there is no such folder"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
        (tmp_path / "checkpoint-9").mkdir()
        with pytest.raises(ValueError, match="is no whole checkpoint: its list of files"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


class TestBadSteps:
    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_a_bad_step_changes_nothing(self, tmp_path, messages, what):
        def broken(scores):
            if not scores.requires_grad:
                return scores
            # The gradient of the root at 0 is infinite, its value is 0.
            return scores * torch.nan if what == "loss" else (scores - scores).sqrt()

        trainer = breaking_trainer("srpo", tmp_path, 2, broken, max_steps=4, save_total_limit=None)
        trainer.train()
        before, after = tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"
        for name in ("adapter_model.safetensors", "policies.safetensors"):
            assert_equal(load_file(before / name), load_file(after / name))
        states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (before, after)]
        assert states[0].keys() == states[1].keys() and states[0]
        for one, two in zip(states[0].values(), states[1].values(), strict=True):
            assert_equal(one, two)
        # The run goes on, and has counted.
        assert any((weight != load_file(after / "policies.safetensors")[f"current.{name}"]).any()
                   for name, weight in trained(trainer).items())  # fmt: skip
        logs = [log["skipped_steps"] for log in trainer.state.log_history if "skipped_steps" in log]
        assert logs == [0, 0, 1, 1]
        assert "Optimizer step 3 was not applied: " in messages.text
        expected = (
            "the loss of term 1 of 2 is nan on the prompts ['a " if what == "loss" else "the gradient is not finite"
        )
        assert expected in messages.text
        assert all(torch.isfinite(weight).all() for weight in trained(trainer).values())

    def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(self, tmp_path):
        broken = make_trainer(
            "chunk_grpo", tmp_path, save_strategy="no", max_bad_steps=2, max_steps=4, max_grad_norm=1
        )
        generate = broken.make_micro_batches

        def generate_bad(rows, generation):
            micro_batches = generate(rows, generation)
            if generation == 1:
                for micro_batch in micro_batches:
                    micro_batch.advantages[0] = torch.nan
            return micro_batches

        broken.make_micro_batches = generate_bad
        with pytest.raises(FloatingPointError, match=r"step 4 was not applied: the loss .* step 2 of 2 in a row.*"
                           r"\(max_bad_steps=2\).*Step 4 is saved in .*checkpoint-4"):  # fmt: skip
            broken.train()
        assert why_incomplete(tmp_path / "checkpoint-4") is None
        assert all(
            torch.isfinite(w).all() for w in load_file(tmp_path / "checkpoint-4" / "policies.safetensors").values()
        )
        # A run that is resumed counts its skipped steps on, and begins a new row.
        resumed = make_trainer("chunk_grpo", tmp_path, max_bad_steps=2, max_steps=5)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._skipped_steps == 2 and resumed.state.global_step == 5

    def test_good_steps_end_the_row(self, tmp_path):
        class EverySecond(Warmth):
            def score(self, images, prompts):
                scores = super().score(images, prompts)
                bad = trainer.is_in_train and trainer.state.global_step % 2 and images.requires_grad
                return scores * torch.nan if bad else scores

        settings = {"max_bad_steps": 2, "max_steps": 5, "save_strategy": "no"}
        trainer = make_trainer("srpo", tmp_path, prompts=PROMPTS, **settings)
        trainer.rewards["warmth"] = EverySecond()
        trainer.train()
        logs = [log["skipped_steps"] for log in trainer.state.log_history if "skipped_steps" in log]
        assert logs == [0, 1, 1, 2, 2]


class TestRewards:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_reward_that_fails_once_is_asked_again(self, tmp_path, messages, no_pauses, kind):
        failures = iter([ConnectionError("gone for a moment")])

        def fail_once(scores):
            for failure in failures:
                raise failure
            return scores

        trainer = breaking_trainer(kind, tmp_path / "out", 2, fail_once, save_strategy="no", max_steps=4)
        trainer.train()
        assert "The reward 'warmth' failed: " in messages.text and "gone for a moment" in messages.text
        assert_equal(whole_weights(kind), trained(trainer))

    @pytest.mark.parametrize(("kind", "how"), [("chunk_grpo", "fails"), ("srpo", "fails"), ("srpo", "hangs")])
    def test_a_reward_that_stays_broken_stops_the_run_with_a_checkpoint(self, tmp_path, no_pauses, kind, how):
        def broken(scores):
            if how == "fails":
                raise ConnectionError("out of order")
            time.sleep(3)
            return scores

        # Step 3 begins within a generation of Chunk-GRPO; the reward fails at the next that it makes.
        step = 2 if kind == "chunk_grpo" else 3
        settings = {"save_strategy": "no", "max_steps": 4, "reward_retries": 1}
        settings["reward_timeout"] = 0.5 if how == "hangs" else None
        trainer = breaking_trainer(kind, tmp_path / "out", step, broken, **settings)
        reason = "failed: .*out of order" if how == "fails" else "gave no answer within reward_timeout=0.5 s"
        with pytest.raises(RewardError, match=rf"The reward 'warmth' {reason}.*attempt 2, prompts \['a"):
            trainer.train()
        assert last_whole_checkpoint(tmp_path / "out").name == f"checkpoint-{step}"
        resumed = make_trainer(kind, tmp_path / "out", save_strategy="no", max_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert_equal(whole_weights(kind), trained(resumed))

    def test_wrong_answers_are_not_asked_for_again(self, messages):
        calls = []

        def answer():
            calls.append(1)
            raise ValueError("two scores for one image")

        with pytest.raises(ValueError, match="two scores"):
            call_reward("r", ["a"], answer, None, 5, torch.device("cpu"))
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("HIP error: out of memory")],
    )
    def test_a_reward_out_of_memory_is_not_asked_again_but_told_what_to_lower(self, error, no_pauses):
        calls = []

        def hungry(images, prompts):
            calls.append(len(prompts))
            raise error

        def score():
            return score_images(hungry, torch.zeros(2, 3, 4, 4), ["a", "b"])

        def differentiable():  # of SRPO, which calls the model itself
            calls.append(2)
            raise error

        for call in (score, differentiable):
            with pytest.raises(
                RewardError, match=r"ran out of memory on 2 images.*Lower .*rollout_batch_size"
            ) as caught:
                call_reward("hungry", ["a", "b"], call, None, 5, torch.device("cpu"))
            assert "failed" not in str(caught.value)
        assert calls == [2, 2]

    @pytest.mark.parametrize("timeout", [None, 30.0])
    def test_a_call_keeps_its_gradient(self, timeout):
        images = torch.ones(2, requires_grad=True)
        total = call_reward("r", ["a"], lambda: (images**2).sum(), timeout, 0, torch.device("cpu"))
        total.backward()
        assert images.grad.tolist() == [2, 2]
        with torch.no_grad():
            assert not call_reward("r", ["a"], lambda: images.sum(), timeout, 0, torch.device("cpu")).requires_grad

    def test_long_prompts_are_shortened_in_messages(self):
        def fail():
            raise OSError("no")

        with pytest.raises(RewardError) as caught:
            call_reward("r", ["x" * 10_000] + [f"prompt {i}" for i in range(20)], fail, None, 0, torch.device("cpu"))
        assert len(str(caught.value)) < 600 and "and 13 more" in str(caught.value)


class TestSigterm:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_run_leaves_with_a_checkpoint(self, tmp_path, messages, kind):
        signals = iter([signal.SIGTERM])

        def terminate(scores):
            for number in signals:
                os.kill(os.getpid(), number)
            return scores

        before = signal.getsignal(signal.SIGTERM)
        trainer = breaking_trainer(kind, tmp_path / "out", 2, terminate, save_strategy="no", max_steps=4)
        with pytest.raises(SystemExit) as left:
            trainer.train()
        assert left.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert "SIGTERM: the run ends with exit status 143. Step 2 is saved in" in messages.text
        assert last_whole_checkpoint(tmp_path / "out").name == "checkpoint-2"
        resumed = make_trainer(kind, tmp_path / "out", save_strategy="no", max_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert_equal(whole_weights(kind), trained(resumed))

    def test_command_line(self, tmp_path):
        out = tmp_path / "out"
        command = [sys.executable, "-m", "trl_diffusion.cli", "chunk_grpo", "--model_name_or_path", "shapes"]
        command += ["--dataset_name", "shapes", "--reward_funcs", "shapes-judge", "--output_dir", str(out)]
        command += ["--num_inference_steps", "3", "--chunk_sizes", "1", "1", "--num_generations", "2"]
        command += ["--per_device_train_batch_size", "2", "--max_steps", "10000", "--use_cpu", "true"]
        command += ["--save_strategy", "no"]
        run = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(out / "samples" / "step_000001", run)
        run.terminate()
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 143, output[-3000:]
        assert "SIGTERM: the run ends with exit status 143. Step " in output
        assert "Traceback" not in output
        assert why_incomplete(last_whole_checkpoint(out)) is None
        assert not (out / "pytorch_lora_weights.safetensors").exists()


class TestFullDisk:
    @staticmethod
    def mount(folder, *options):
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode != 0:
            pytest.skip(f"root alone can mount a file system: {mounted.stderr.strip()}")

    @pytest.fixture
    def small_disk(self, tmp_path):
        """A file system of its own, in memory."""
        folder = tmp_path / "disk"
        folder.mkdir()
        yield folder
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    # A checkpoint takes about 110 KiB: the second fails at one of its first files, or at one of its last.
    @pytest.mark.parametrize(("on_save_error", "kibibytes"), [("stop", 132), ("continue", 180)])
    def test_the_last_whole_checkpoint_stays(self, small_disk, messages, on_save_error, kibibytes):
        self.mount(small_disk, "-o", f"size={kibibytes}k")
        settings = {"max_steps": 4, "save_total_limit": None, "on_save_error": on_save_error}
        trainer = make_trainer("chunk_grpo", small_disk, **settings)
        message = (
            r"The checkpoint checkpoint-2 could not be written to .*, which had 0.0 MiB free: .*"
            r"The last whole checkpoint is checkpoint-1\. "
        )
        if on_save_error == "stop":
            with pytest.raises(OSError, match=message + "Free some space and resume"):
                trainer.train()
            assert trainer.state.global_step == 2
        else:
            trainer.train()
            assert trainer.state.global_step == 4
            assert re.search(message + r"The run goes on \(on_save_error='continue'\)", messages.text)
        assert checkpoints(small_disk) == [last_whole_checkpoint(small_disk)] == [small_disk / "checkpoint-1"]
        assert not list(small_disk.glob(".checkpoint*"))

        self.mount(small_disk, "-o", "remount,size=1m")
        resumed = make_trainer("chunk_grpo", small_disk, max_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert_equal(trained(resumed), whole_weights("chunk_grpo"))
        assert last_whole_checkpoint(small_disk).name == "checkpoint-4"


class TestMovingAverage:
    def test_is_that_of_the_formula(self, tmp_path):
        trainer = make_trainer("srpo", tmp_path, ema_decay=0.3, save_total_limit=None, max_steps=5)
        start = trained(trainer)
        trainer.train()
        average = {name: weight.double() for name, weight in start.items()}
        for n in range(5):
            decay = 0 if n == 0 else min(0.3, (1 + n) / (10 + n))
            weights = load_file(tmp_path / f"checkpoint-{n + 1}" / "policies.safetensors")
            for name in average:
                average[name] = decay * average[name] + (1 - decay) * weights[f"current.{name}"].double()
                torch.testing.assert_close(weights[f"average.{name}"].double(), average[name], rtol=1e-5, atol=1e-7)

    def test_evaluates_generates_and_exports_the_average(self, tmp_path):
        trainer = make_trainer("chunk_grpo", tmp_path, save_strategy="no", max_steps=3)
        trainer.train()
        raw = trained(trainer)
        with trainer.averaged_weights():
            average = trained(trainer)
            with trainer.averaged_weights():
                assert_equal(average, trained(trainer))
        assert_equal(raw, trained(trainer))
        assert any((raw[name] != average[name]).any() for name in raw)

        images = trainer.generate(PROMPTS[:2], [0, 1])
        score = trainer.evaluate(trainer.train_dataset)["eval_reward"]
        trainer.save_model()
        assert_equal(raw, trained(trainer))
        exported = load_file(tmp_path / "adapter_model.safetensors")
        assert_equal({name.replace(".default", ""): weight for name, weight in average.items()}, exported)

        # A trainer without an average, whose weights are these.
        plain = make_trainer("chunk_grpo", tmp_path / "plain", ema_decay=None)
        with torch.no_grad():
            for name, parameter in plain.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(average[name])
        assert torch.equal(plain.generate(PROMPTS[:2], [0, 1]), images)
        assert plain.evaluate(plain.train_dataset)["eval_reward"] == score

    def test_checkpoints_with_and_without_are_told_apart(self, tmp_path):
        make_trainer("srpo", tmp_path / "with", max_steps=1).train()
        make_trainer("srpo", tmp_path / "without", max_steps=1, ema_decay=None).train()
        for decay, other, folder in ((None, 0.9, "with"), (0.9, None, "without")):
            trainer = make_trainer("srpo", tmp_path / folder, max_steps=2, ema_decay=decay)
            with pytest.raises(ValueError, match=f"ema_decay was {other} and is {decay}"):
                trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must lie in \(0, 1\), got 1.0"),
        ({"max_bad_steps": 0}, "max_bad_steps must be at least 1, got 0"),
        ({"reward_retries": -1}, "reward_retries must be at least 0, got -1"),
        ({"reward_timeout": 0}, "reward_timeout must be above 0, got 0"),
        ({"on_save_error": "ignore"}, "on_save_error must be one of 'stop', 'continue', got 'ignore'"),
    ],
)
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ChunkGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


# ---- Several processes ----


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def needs_deepspeed(config):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")


def launch(folder, faults, config="multi_gpu", kind="srpo", **settings):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(CONFIGS / f"{config}.yaml"), str(TESTS / "trainer" / "faulty_run.py")]
    command += [kind, str(folder), json.dumps(faults), json.dumps(settings)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, run, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0][-3000:]
        time.sleep(0.05)


class TestTwoProcesses:
    @pytest.mark.parametrize("config", ["multi_gpu", "zero2", "zero3", "fsdp2"])
    def test_all_skip_the_steps_and_stop_at_the_reward_of_one(self, tmp_path, config):
        """The second process has a NaN in step 2 and an infinite gradient in step 3; in step 5 its reward is out of order."""
        needs_deepspeed(config)
        faults = {"nan": 1, "gradient": 2, "raise": 4}
        # With an average, the adapter's file has that; under DDP policies.safetensors has the weights as well.
        ema_decay = 0.9 if config == "multi_gpu" else None
        run = launch(tmp_path, faults, config, save_total_limit=None, reward_retries=0, ema_decay=ema_decay)
        output, _ = run.communicate(timeout=250)
        assert run.returncode != 0 and "terminate called" not in output
        assert output.count("Optimizer step 2 was not applied: the loss of term 1 of 2 is nan on the prompts ['") == 1
        assert output.count("Optimizer step 3 was not applied: the gradient is not finite on the prompts ['") == 1
        assert "The reward 'warmth' failed: " in output and "the reward is out of order" in output
        assert output.count("The run stops, because a reward failed") == 1
        assert last_whole_checkpoint(tmp_path).name == "checkpoint-4"
        state = json.loads((tmp_path / "checkpoint-4" / "trl_diffusion_state.json").read_text())
        assert state["skipped_steps"] == 2
        # Neither weights nor their average changed in these steps, and both did in the next.
        before, after, later = (
            {path.name: load_file(path) for path in (tmp_path / f"checkpoint-{step}").glob("*.safetensors")}
            for step in (1, 3, 4)
        )
        for name in ("adapter_model.safetensors", *(["policies.safetensors"] if ema_decay else [])):
            assert_equal(before[name], after[name])
            assert any((weight != later[name][key]).any() for key, weight in after[name].items())
            assert all(torch.isfinite(weight).all() for weight in later[name].values())

    @pytest.mark.parametrize("config", ["multi_gpu", "zero3"])
    def test_all_stop_at_the_reward_of_one_beside_the_rollout(self, tmp_path, config):
        """The thread of the second process fails after the first generation; no process waits for it without end."""
        needs_deepspeed(config)
        run = launch(tmp_path, {"raise": 2}, config, "chunk_grpo", reward_retries=0, overlap_rewards=True)
        output, _ = run.communicate(timeout=250)
        assert run.returncode != 0 and "terminate called" not in output
        assert "The reward 'warmth' failed: " in output and "the reward is out of order" in output
        assert output.count("The run stops, because a reward failed") == 1
        assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"

    @pytest.mark.parametrize(
        ("config", "room", "on_save_error"),
        [("zero2", 0.95, "continue"), ("fsdp2", 0.5, "stop")],
    )
    def test_full_disk(self, tmp_path, config, room, on_save_error):
        """The campaign of `make campaigns` in short."""
        needs_deepspeed(config)
        try:
            checkpoint = full_disk.bytes_of_a_checkpoint(config, tmp_path)
        except full_disk.CannotMount as error:
            pytest.skip(f"root alone can mount a file system: {error}")
        full_disk.check(config, tmp_path, checkpoint, room, on_save_error)

    def test_a_process_that_dies_takes_the_other_down(self, tmp_path):
        run = launch(tmp_path, {"slow": 1, "die": 1})
        wait_for(tmp_path / "slow", run)
        start = time.monotonic()
        output, _ = run.communicate(timeout=120)
        assert time.monotonic() - start < 60
        assert run.returncode != 0
        assert "The second process dies now." in output and "exitcode  : -9" in output
        assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"

    def test_sigterm(self, tmp_path):
        run = launch(tmp_path, {"slow": 1}, save_strategy="no")
        wait_for(tmp_path / "slow", run)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=120)
        steps = re.findall(r"SIGTERM: the run ends with exit status 143. Step (\d) is saved in", output)
        assert len(steps) == 1, output[-3000:]
        assert last_whole_checkpoint(tmp_path).name == f"checkpoint-{steps[0]}"


def test_killed_runs_end_as_if_left_alone():
    """The campaign of `make campaigns` in short: two kills of each trainer."""
    command = [sys.executable, str(TESTS / "campaigns" / "kill.py"), "--kills", "2"]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("2 kills (") == 2
