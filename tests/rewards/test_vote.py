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

"""Votes on disk, over HTTP, in a training, in a browser, and over kills."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
import torch
from datasets import Dataset, load_from_disk
from evaluation.test_report import browser, needs_browser  # noqa: F401 - a fixture
from PIL import Image

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer, shapes
from trl_diffusion.cli.demo_vote import vote
from trl_diffusion.cli.main import main
from trl_diffusion.rewards.ballot import Ballot, save_pairs
from trl_diffusion.rewards.vote import VoteReward


COLORS = ("red", "green", "blue", "white")


def pictures(colors=COLORS):
    return [Image.new("RGB", (8, 6), color) for color in colors]


PROMPTS = ["a cat", "a cat", "a dog", "a dog"]


@pytest.fixture
def asked(tmp_path):
    """A ballot of two groups of two pictures, the keys of the pictures, and the groups."""
    ballot = Ballot(tmp_path)
    return ballot, ballot.ask(pictures(), PROMPTS), ballot.groups


class TestBallot:
    def test_votes_become_scores(self, asked):
        ballot, keys, (cats, dogs) = asked
        ballot.vote(cats.id, keys[1], 1)
        ballot.vote(cats.id, keys[1], 2)
        ballot.close(cats.id)
        assert not ballot.wait(0)
        ballot.vote(dogs.id, keys[2], 1)
        ballot.close(dogs.id, skip=True)
        assert ballot.wait(0)
        assert ballot.scores() == [0.0, 2.0, None, None]
        assert not ballot.wait(0) and ballot.groups == []

    def test_every_act_is_there_for_the_next_process(self, asked, tmp_path):
        ballot, keys, (cats, dogs) = asked
        ballot.vote(cats.id, keys[0], 2)
        for act in (lambda: ballot.close(cats.id), lambda: ballot.vote(dogs.id, keys[3], 1), ballot.undo):
            act()
            again = Ballot(tmp_path)
            again.ask(pictures(), PROMPTS)
            assert again.groups == ballot.groups and cats.state == "done"
        assert dogs.scores == {}

    def test_undo(self, asked):
        ballot, keys, (cats, _) = asked
        ballot.vote(cats.id, keys[0], 1)
        ballot.vote(cats.id, keys[0], 2)
        ballot.close(cats.id)
        assert cats.state == "done"
        assert ballot.undo() and (cats.state, cats.scores) == ("open", {keys[0]: 2})
        assert ballot.undo() and cats.scores == {keys[0]: 1}
        assert ballot.undo() and cats.scores == {}
        assert not ballot.undo()

    def test_what_was_scored_is_not_undone(self, tmp_path):
        ballot = Ballot(tmp_path)
        ballot.ask(pictures(COLORS[:2]), ["a cat"] * 2)
        ballot.close(ballot.groups[0].id)
        ballot.scores()
        ballot.ask(pictures(COLORS[2:]), ["a dog"] * 2)
        assert not ballot.undo()
        again = Ballot(tmp_path)
        again.ask(pictures(COLORS[:2]), ["a cat"] * 2)
        assert again.wait(0)

    def test_equal_pictures_are_asked_once(self, tmp_path):
        ballot = Ballot(tmp_path)
        keys = ballot.ask(pictures(["red", "blue", "red"]), ["a cat"] * 3)
        (group,) = ballot.groups
        assert group.keys == (keys[0], keys[1]) and keys[0] == keys[2]
        ballot.vote(group.id, keys[0], 2)
        ballot.close(group.id)
        assert ballot.scores() == [2.0, 0.0, 2.0]

    def test_a_prompt_with_another_picture_to_edit_is_another_group(self, tmp_path):
        ballot = Ballot(tmp_path)
        # The same pictures of both: what they edit alone tells the groups apart.
        edited = pictures(["gray", "gray", "black", "black"])
        keys = ballot.ask(pictures(["red", "blue", "red", "blue"]), ["make it wide"] * 4, edited)
        first, second = ballot.groups
        assert (first.keys, second.keys) == (tuple(keys[:2]), tuple(keys[2:])) and first.id != second.id
        assert [Image.open(ballot.picture_path(g.source)).getpixel((0, 0))[0] for g in ballot.groups] == [128, 0]
        ballot.vote(second.id, keys[3], 2)
        ballot.close(first.id, skip=True)
        ballot.close(second.id)
        assert ballot.scores() == [None, None, 0.0, 2.0]

    def test_the_same_pixels_for_another_prompt_or_size_are_others(self, tmp_path):
        ballot = Ballot(tmp_path)
        wide, high = Image.new("RGB", (8, 6)), Image.new("RGB", (6, 8))
        assert len(set(ballot.ask([wide, high, wide], ["a cat", "a cat", "a dog"]))) == 3

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_line_that_was_not_finished_is_no_vote(self, asked, tmp_path, cut):
        ballot, keys, (cats, _) = asked
        ballot.vote(cats.id, keys[0], 1)
        ballot.vote(cats.id, keys[1], 2)
        path = tmp_path / "votes.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        again = Ballot(tmp_path)
        again.ask(pictures(), PROMPTS)
        assert again.groups[0].scores == {keys[0]: 1}
        again.vote(again.groups[0].id, keys[1], 1)
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2

    def test_an_act_that_cannot_be_written_does_not_count(self, asked, tmp_path):
        ballot, keys, (cats, _) = asked
        before = ballot.snapshot()
        (tmp_path / "votes.jsonl").mkdir()
        with pytest.raises(OSError):
            ballot.vote(cats.id, keys[0], 2)
        assert ballot.snapshot() == before
        (tmp_path / "votes.jsonl").rmdir()
        ballot.vote(cats.id, keys[1], 1)
        assert cats.scores == {keys[1]: 1}

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "votes.jsonl").write_text('{"act": "vote", "group": "x"}\nno vote\n')
        with pytest.raises(ValueError, match="Line 2 of .*votes.jsonl is no vote: 'no vote'. Move the file away"):
            Ballot(tmp_path)

    def test_pairs(self, tmp_path):
        ballot = Ballot(tmp_path)
        keys = ballot.ask(pictures(), ["a cat"] * 4)
        (group,) = ballot.groups
        assert save_pairs(tmp_path) is None
        for key, score in zip(keys, (2, 1, 1, 0), strict=True):
            ballot.vote(group.id, key, score)
        ballot.close(group.id)
        rows = load_from_disk(save_pairs(tmp_path))
        assert rows.column_names == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]
        found = [(row["chosen"].getpixel((0, 0)), row["rejected"].getpixel((0, 0))) for row in rows]
        red, green, blue, white = [picture.getpixel((0, 0)) for picture in pictures()]
        # Each that was liked better than another, once; the worse ones take turns.
        assert found == [(red, green), (green, white), (blue, white)]
        assert all(row["chosen_score"] > row["rejected_score"] and row["prompt"] == "a cat" for row in rows)

    def test_of_two_pictures_that_nobody_liked_none_is_rejected_twice(self, tmp_path):
        ballot = Ballot(tmp_path)
        keys = ballot.ask(pictures(), ["a cat"] * 4)
        (group,) = ballot.groups
        for key in keys[:2]:
            ballot.vote(group.id, key, 2)
        ballot.close(group.id)
        assert [pair["rejected"]["bytes"] for pair in ballot.pairs()] == [
            ballot.picture_path(key).read_bytes() for key in keys[2:]
        ]


@contextlib.contextmanager
def opened(folder, **options):
    people = VoteReward()
    address = people.open(folder, **options)
    try:
        yield people, address
    finally:
        people.close()


def answered(people, images, prompts):
    """The reward, asked in a thread, and what it answers."""
    answer = []
    thread = threading.Thread(target=lambda: answer.extend(people(images, prompts)), daemon=True)
    thread.start()
    while not people.ballot.groups:
        time.sleep(0.01)
    return thread, answer


class TestServer:
    def test_an_address_needs_the_token(self, tmp_path):
        with opened(tmp_path) as (people, address):
            people.ballot.ask(pictures(), ["a cat"] * 4)
            assert address.startswith("http://127.0.0.1:")
            root = address.rpartition("/")[0].rpartition("/")[0]
            for path in ("", "/", "/state", "/x/state", "/" + "x" * 22 + "/"):
                assert requests.get(root + path).status_code == 403
            group, key = people.ballot.groups[0].id, people.ballot.groups[0].keys[0]
            vote_ = {"group": group, "image": key, "score": 1}
            assert requests.post(f"{root}/x/vote", json=vote_).status_code == 403
            assert people.ballot.groups[0].scores == {}
            assert (tmp_path / "token").stat().st_mode & 0o077 == 0

    def test_what_is_wrong_changes_nothing(self, tmp_path):
        with opened(tmp_path) as (people, address):
            people.ballot.ask(pictures(), ["a cat"] * 4)
            group = people.ballot.groups[0]
            good = {"group": group.id, "image": group.keys[0], "score": 1}
            for name, body, status in (
                ("vote", {**good, "score": 3}, 400), ("vote", {**good, "score": True}, 400), ("vote", [], 400),
                ("vote", {**good, "image": "x"}, 409), ("vote", {**good, "group": "x"}, 409), ("fly", good, 400),
                ("done", {"group": "x"}, 409), ("vote", {**good, "more": "x" * 20_000}, 413),
            ):  # fmt: skip
                assert requests.post(address + name, json=body).status_code == status, (name, body)
            assert requests.post(address + "vote", data="{").status_code == 400
            for path in ("pictures/x", "pictures/..%2Ftoken", "pictures/../token", "votes.jsonl"):
                assert requests.get(address + path).status_code in (403, 404)
            assert people.ballot.groups[0].scores == {} and (tmp_path / "votes.jsonl").exists() is False
            assert requests.post(address + "vote", json=good).json()["groups"][0]["images"][0] == [group.keys[0], 1]

    def test_nothing_comes_from_elsewhere(self, tmp_path):
        with opened(tmp_path) as (_, address):
            answer = requests.get(address)
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert "http" not in answer.text.replace("<!doctype html>", "").replace("https-equiv", "")

    def test_a_port_that_is_in_use(self, tmp_path):
        with opened(tmp_path / "one") as (_, first):
            port = int(first.split(":")[2].split("/")[0])
            people = VoteReward()
            second = people.open(tmp_path / "two", port=port)
            assert second.split("/")[2] != first.split("/")[2]
            assert requests.get(second).status_code == 200 and requests.get(first).status_code == 200
            people.close()

    def test_the_address_of_a_folder_stays(self, tmp_path):
        with opened(tmp_path) as (_, first):
            pass
        with opened(tmp_path) as (_, second):
            assert first.split("/")[3] == second.split("/")[3]

    def test_an_address_that_cannot_be_listened_on(self, tmp_path):
        for host in ("203.0.113.1", "no.such.host.invalid"):
            with pytest.raises(ValueError, match=f"cannot be served at vote_host='{host}', vote_port=0"):
                VoteReward().open(tmp_path, host=host)

    def test_what_a_prompt_edits_is_shown(self, tmp_path):
        with opened(tmp_path) as (people, address):
            people.ballot.ask(pictures(), ["a cat"] * 4, pictures(["gray"] * 4))
            source = requests.get(address + "state").json()["groups"][0]["source"]
            shown = Image.open(io.BytesIO(requests.get(f"{address}pictures/{source}").content))
            assert shown.getpixel((0, 0)) == (128, 128, 128)

    def test_pairs_that_cannot_be_written_do_not_hide_what_ended_a_run(self, tmp_path, caplog):
        people = VoteReward()
        address = people.open(tmp_path)
        keys = people.ballot.ask(pictures(), ["a cat"] * 4)
        group = people.ballot.groups[0].id
        people.ballot.vote(group, keys[0], 1)
        people.ballot.close(group)
        people.ballot.picture_path(keys[0]).unlink()
        people.close()
        assert "The pairs of votes could not be written" in caplog.text and not (tmp_path / "pairs").exists()
        with pytest.raises(requests.ConnectionError):
            requests.get(address)

    def test_waiting_can_be_broken_off(self, tmp_path):
        def stop():
            raise SystemExit(143)

        with opened(tmp_path, meanwhile=stop) as (people, _), pytest.raises(SystemExit):
            people(pictures(), ["a cat"] * 4)


# ---- In a training ----

SETTINGS = {
    "height": 32, "width": 32, "num_inference_steps": 3, "chunk_sizes": [1, 1], "num_generations": 4,
    "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": 2, "use_cpu": True, "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "vote_port": 0, "reward_timeout": 0.01,
}  # fmt: skip


def make_trainer(folder, reward_funcs="vote", watch=None, eval_dataset=None, **settings):
    args = ChunkGRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    prompts = shapes.load_dataset("train").select(range(8))
    return ChunkGRPOTrainer("shapes", reward_funcs, args, prompts, eval_dataset, watch_reward_funcs=watch)


@contextlib.contextmanager
def voters(trainer, act):
    """People who do `act(address, state)` whenever there is something to vote on."""

    def loop():
        while trainer._voters._server is None:
            time.sleep(0.01)
        address = trainer._voters.address
        with contextlib.suppress(requests.ConnectionError):
            while True:
                state = requests.get(address + "state").json()
                if any(group["state"] == "open" for group in state["groups"]):
                    act(address, state)
                time.sleep(0.02)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


def close_all(name):
    def act(address, state):
        for group in state["groups"]:
            requests.post(address + name, json={"group": group["id"]})

    return act


class TestTraining:
    def test_votes_reach_the_trainer(self, tmp_path):
        trainer = make_trainer(
            tmp_path, ["vote", "shapes-judge"], watch=["shapes-clip"], rollout_batch_size=3, reward_timeout=None
        )
        seen = []

        def act(address, state):
            seen.append(state)
            for group in state["groups"]:
                assert len(group["images"]) == 4
                assert (
                    requests.get(f"{address}pictures/{group['images'][0][0]}").headers["Content-Type"] == "image/png"
                )
                for key, _ in group["images"][:1]:
                    requests.post(address + "vote", json={"group": group["id"], "image": key, "score": 2})
                requests.post(address + "done", json={"group": group["id"]})

        with voters(trainer, act):
            trainer.train()
        logs = [log for log in trainer.state.log_history if "rewards/vote/mean" in log]
        assert len(logs) == 2 and all(log["rewards/vote/mean"] == 0.5 for log in logs)
        assert all("rewards/attribute_share/mean" in log for log in logs)
        # Whole groups, although rewards get batches, and what the training is at.
        assert [len(state["groups"]) for state in seen] == [2, 2]
        assert [state["message"] for state in seen] == ["Optimizer step 1 of 2", "Optimizer step 2 of 2"]
        assert len(seen[0]["strip"]) == 4
        pairs = load_from_disk(tmp_path / "votes" / "pairs")
        assert len(pairs) == 2 * 2

    def test_the_same_prompts_before_and_now(self, tmp_path):
        trainer = make_trainer(tmp_path, learning_rate=1e-2)
        found = []

        def act(address, state):
            found.append([requests.get(f"{address}pictures/{kind}-0").content for kind in ("before", "now")])
            keys = [key for key, _ in state["groups"][0]["images"]]
            requests.post(address + "vote", json={"group": state["groups"][0]["id"], "image": keys[0], "score": 1})
            close_all("done")(address, state)

        with voters(trainer, act):
            trainer.train()
        (before, now), (still_before, later) = found
        assert before == now == still_before != later

    def test_groups_that_are_skipped_teach_nothing(self, tmp_path):
        trainer = make_trainer(tmp_path)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        with voters(trainer, close_all("skip")):
            trainer.train()
        after = trainer.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    @pytest.mark.parametrize("rewards", [["vote", "shapes-judge"], ["vote"]], ids=len)
    def test_evaluations_ask_nobody(self, tmp_path, rewards):
        trainer = make_trainer(
            tmp_path, rewards, watch=["shapes-clip"], eval_strategy="steps", eval_steps=1, num_eval_images=4,
            reward_timeout=None, eval_dataset=shapes.load_dataset("test").select(range(4)),
        )  # fmt: skip
        with voters(trainer, close_all("done")):
            trainer.train()
        logs = [log for log in trainer.state.log_history if "eval_watch/shapes-clip/mean" in log]
        assert len(logs) == 2
        for log in logs:
            assert log.get("eval_reward") == log.get("eval_rewards/attribute_share/mean")
            assert ("eval_reward" in log) == (len(rewards) == 2) and not any("vote" in name for name in log)


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("no vote", {}, "votes.jsonl is no vote"),
        (None, {"vote_host": "203.0.113.1"}, "cannot be served at vote_host="),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_loaded(tmp_path, line, settings, message):
    if line is not None:
        (tmp_path / "votes").mkdir()
        (tmp_path / "votes" / "votes.jsonl").write_text(line + "\n")
    args = ChunkGRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **settings})
    with pytest.raises(ValueError, match=message):
        ChunkGRPOTrainer("no/such/model", "vote", args, shapes.load_dataset("train"))


def test_settings_of_votes_without_votes_are_refused(tmp_path):
    args = ChunkGRPOConfig(output_dir=str(tmp_path), **SETTINGS, vote_prompts=3)
    with pytest.raises(ValueError, match="has no effect without the reward 'vote'"):
        ChunkGRPOTrainer("no/such/model", "shapes-judge", args, shapes.load_dataset("train"))


def test_where_people_cannot_vote(tmp_path, capsys):
    with pytest.raises(ValueError, match="'vote' scores whole generations of a training"):
        make_trainer(tmp_path, "shapes-judge", watch=["vote"])
    with pytest.raises(ValueError, match="overlap_rewards=True scores parts of them. Leave it at False."):
        make_trainer(tmp_path, overlap_rewards=True)
    with pytest.raises(TypeError, match="SRPO needs differentiable rewards, but 'vote' is a black box"):
        SRPOTrainer(
            "shapes", "vote", SRPOConfig(str(tmp_path), use_cpu=True), Dataset.from_dict({"prompt": ["a cat"]})
        )
    with pytest.raises(ValueError, match="People vote during a training of ChunkGRPOTrainer alone"):
        VoteReward()(pictures(), ["a cat"] * 4)
    for command in (
        ["evaluate", "--model_name_or_path", "shapes", "--prompts", "shapes", "--rewards", "vote", "--adapter", "x"],
        ["reward-server", "--reward", "vote"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 2 and "'vote' scores whole generations" in capsys.readouterr().err
    for settings, message in (
        ({"vote_port": 70000}, "vote_port must lie"),
        ({"vote_prompts": -1}, "vote_prompts must"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkGRPOConfig(str(tmp_path), use_cpu=True, **settings)


# ---- Over kills ----


def start(folder, *arguments):
    """A training from the command line that people vote in, and the address of their page."""
    command = [sys.executable, "-m", "trl_diffusion.cli", "chunk_grpo", "--model_name_or_path", "shapes"]
    command += ["--dataset_name", "shapes", "--reward_funcs", "vote", "--output_dir", str(folder), *arguments]
    for name, value in {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in run.stdout:
        lines.append(line)
        found = re.match(r"Vote at (\S+)", line)
        if found:
            threading.Thread(target=run.stdout.read, daemon=True).start()
            return run, found[1]
    raise AssertionError("".join(lines))


def wait_for_groups(address, fewest=1, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = requests.get(address + "state").json()
        if sum(group["state"] == "open" for group in state["groups"]) >= fewest:
            return state
        time.sleep(0.1)
    raise AssertionError(state)


def test_no_vote_is_asked_twice(tmp_path):
    """Killed in the middle of a group of the second generation, resumed, and ended by SIGTERM while it waits."""
    run, address = start(tmp_path)
    first = wait_for_groups(address, 2)
    for group in first["groups"]:
        requests.post(address + "vote", json={"group": group["id"], "image": group["images"][0][0], "score": 1})
        requests.post(address + "done", json={"group": group["id"]})
    second = wait_for_groups(address, 2)
    one, other = second["groups"]
    requests.post(address + "done", json={"group": one["id"]})
    requests.post(address + "vote", json={"group": other["id"], "image": other["images"][2][0], "score": 2})
    run.send_signal(signal.SIGKILL)
    run.wait(60)

    run, address = start(tmp_path, "--resume_from_checkpoint", "true")
    again = wait_for_groups(address)
    assert [group["state"] for group in again["groups"]] == ["done", "open"]
    assert again["groups"][1]["images"] == [[key, 2 * (i == 2)] for i, (key, _) in enumerate(other["images"])]
    assert again["message"] == "Optimizer step 2 of 3" and again["strip"][0]["before"]
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert len(load_from_disk(tmp_path / "votes" / "pairs")) == 2


# ---- In a browser ----


@pytest.fixture
def open_page(browser):  # noqa: F811
    pages, troubles = [], []

    def open_(address, width=1100):
        page = browser.new_page()
        page.set_viewport_size({"width": width, "height": 844})
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: request.url.startswith(address) or troubles.append(request.url))
        page.goto(address)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    # A vote that came late, and a run that was away, which a browser tells in several ways.
    expected = ("data:", "Failed to load resource: the server responded with a status of 409")
    expected += ("Failed to load resource: net::ERR_",)
    assert [trouble for trouble in troubles if not trouble.startswith(expected)] == []


@needs_browser
class TestPage:
    def test_clicks_keys_and_two_pages(self, tmp_path, open_page):
        with opened(tmp_path) as (people, address):
            people.show("Optimizer step 1 of 2", 0.5, [("a <b>fox</b>", *pictures(["red", "blue"]))])
            page, other = open_page(address), open_page(address, 390)
            page.get_by_text("It is the trainer's turn").wait_for()
            colors = [(20 * value, 0, 0) for value in range(12)]
            thread, answer = answered(people, pictures(colors), ["a cat"] * 4 + ["a <i>dog</i>"] * 4 + ["a bird"] * 4)
            page.get_by_role("heading", name="a cat").wait_for()
            images = page.locator("#grid button")
            images.nth(1).click()
            page.locator('#grid [data-score="1"]').wait_for()
            images.nth(1).click()
            page.locator('#grid [data-score="2"]').wait_for()
            page.keyboard.press("4")
            # The other page, on a phone, sees it and goes on with it; a new look loses nothing.
            other.locator('#grid [data-score="1"]').wait_for()
            other.reload()
            other.locator('#grid [data-score="2"]').wait_for()
            assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.keyboard.press("Enter")
            other.get_by_role("heading", name="a <i>dog</i>").wait_for()
            other.get_by_role("button", name="Skip").click()
            page.get_by_role("heading", name="a bird").wait_for()
            page.keyboard.press("u")
            page.get_by_role("heading", name="a <i>dog</i>").wait_for()
            page.locator("#grid button").nth(0).click()
            page.locator('#grid [data-score="1"]').wait_for()
            page.get_by_role("button", name="Next").click()
            other.get_by_role("heading", name="a bird").wait_for()
            assert "3 of 3" in other.locator("#where").inner_text() and thread.is_alive()
            other.keyboard.press("s")
            thread.join(30)
            assert answer == [0.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, None, None, None, None]
            page.get_by_text("It is the trainer's turn").wait_for()
            assert page.locator("#strip figcaption").inner_text() == "a <b>fox</b>"
            assert page.locator("#strip img").evaluate_all("all => all.every(image => image.naturalWidth === 8)")

    def test_an_answer_that_comes_late_takes_nothing_back(self, tmp_path, open_page):
        with opened(tmp_path) as (people, address):
            page = open_page(address)
            thread, _ = answered(people, pictures(), ["a cat"] * 4)
            image = page.locator("#grid button").nth(0)
            image.wait_for()
            older = page.evaluate("async () => (await fetch('state')).json()")
            image.click()
            page.locator('#grid [data-score="1"]').wait_for()
            shown = "late => { show(late); return document.querySelector('#grid button').dataset.score; }"
            assert older["groups"][0]["images"][0][1] == 0 and page.evaluate(shown, older) == "1"
            page.keyboard.press("Enter")
            thread.join(30)

    def test_a_run_that_comes_back(self, tmp_path, open_page):
        """The page says that nobody answers, and goes on by itself."""
        people = VoteReward()
        address = people.open(tmp_path)
        port = int(address.split(":")[2].split("/")[0])
        page = open_page(address)
        page.get_by_text("It is the trainer's turn").wait_for()
        people.close()
        page.get_by_text("The run does not answer").wait_for()
        people.open(tmp_path, port=port)
        thread, answer = answered(people, pictures(), ["a cat"] * 4)
        page.get_by_role("heading", name="a cat").wait_for()
        page.keyboard.press("Enter")
        thread.join(30)
        assert answer == [0.0] * 4
        people.close()

    def test_a_voter_in_a_browser_gets_what_it_likes(self, tmp_path, browser):  # noqa: F811
        """Clicks alone: contrast rises on prompts that were not voted on."""
        command = [sys.executable, "-m", "trl_diffusion.cli", "demo", "vote", "--output_dir", str(tmp_path)]
        command += ["--max_steps", "10", "--num_eval_images", "48"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        address = next(match[1] for line in run.stdout if (match := re.match(r"Vote at (\S+)", line)))
        page = browser.new_page()
        page.goto(address)
        images, contrasts = page.locator("#grid button"), []
        for _ in range(10 * 3):
            page.locator("#voting:not([hidden])").wait_for(timeout=120_000)
            prompt, first = page.locator("#prompt").inner_text(), images.first.get_attribute("data-key")
            keys = images.evaluate_all("all => all.map(each => each.dataset.key)")
            found = [Image.open(tmp_path / "votes" / "images" / f"{key}.png") for key in keys]
            contrast = shapes.judge(found, [prompt] * len(found))["contrast"]
            contrasts.append(contrast)
            for rank, index in enumerate(contrast.argsort()[::-1][:4]):
                for score in range(1, 3 if rank < 2 else 2):
                    images.nth(index).click()
                    page.locator(f'#grid [data-key="{keys[index]}"][data-score="{score}"]').wait_for()
            page.keyboard.press("Enter")
            page.wait_for_function(
                "first => voting.hidden || grid.firstChild.dataset.key !== first", arg=first, timeout=120_000
            )
        page.close()
        assert run.wait(240) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["change"]["contrast"]["low"] > 0.05
        # The curve is of the pictures that were voted on.
        curve = [point["contrast"] for point in results["reward_curve"]]
        assert curve == pytest.approx(np.reshape(contrasts, (10, -1)).mean(1), rel=1e-4)
        for name in ("before_after.png", "reward.png", "README.md", "pytorch_lora_weights.safetensors"):
            assert (tmp_path / name).stat().st_size > 0
        assert len(load_from_disk(tmp_path / "votes" / "pairs")) > 10 * 3 * 3


def test_a_script_votes_by_a_measure(tmp_path):
    """The best quarter of a group is loved, the next liked."""
    contrasts = [0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]
    images = [Image.fromarray(shapes_picture(value)) for value in contrasts]
    with opened(tmp_path) as (people, address):
        thread, answer = answered(people, images, ["a large red square on a black background"] * 8)
        threading.Thread(target=vote, args=(address, "contrast"), daemon=True).start()
        thread.join(60)
        assert answer == [0.0, 2.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0]


def shapes_picture(contrast):
    picture = np.full((32, 32, 3), 10, dtype=np.uint8)
    picture[10:22, 10:22, 0] = 10 + round(240 * contrast)
    return picture
