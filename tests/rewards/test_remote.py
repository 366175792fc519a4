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

"""The remote reward and its server over real HTTP: well, slow, dead, half-dead and wrong."""

import base64
import contextlib
import http.server
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
import uvicorn
from datasets import Dataset
from PIL import Image
from reward_folders import image_reward_folder
from tiny_models import tiny_flux_pipeline

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer
from trl_diffusion.cli.reward_server import create_app, main
from trl_diffusion.rewards import RemoteReward, RewardServerError, load_reward, score_images, score_pictures
from trl_diffusion.rewards.remote import TOKEN_VARIABLE


class Shade:
    """Scores the red channel and the columns of each image, and remembers what it was asked."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.seen = []
        self.running = self.most_running = 0

    def __call__(self, images, prompts, **columns):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        time.sleep(self.seconds)
        self.seen.append((list(prompts), columns))
        self.running -= 1
        return [
            None if prompt == "skip" else float("nan") if prompt == "nan" else float(image.getpixel((0, 0))[0])
            for image, prompt in zip(images, prompts, strict=True)
        ]


def shades(count, offset=0):
    return [Image.new("RGB", (6, 4), (index + offset, 0, 0)) for index in range(count)]


@contextlib.contextmanager
def serving(app, port=0):
    """A uvicorn server in a thread; gives its address."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def answering(*answers):
    """A plain HTTP server that gives these answers one after the other, the last one for ever."""
    requests_seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests_seen.append(body)
            self.body = body
            answer = answers[min(len(requests_seen), len(answers)) - 1]
            answer(self, len(body["images"]))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests_seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(body, status=200, length=None):
    def answer(handler, count):
        data = body(count) if callable(body) else body
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def scores(values):
    return reply(json.dumps({"scores": values}).encode())


good = reply(lambda count: json.dumps({"scores": [1.0] * count}).encode())
truncated = reply(b'{"scores": [1.0', length=400)


def dies(handler, count):
    """The connection is closed without a word, as when the process is killed."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def remote(url, **options):
    return RemoteReward(url, **{"backoff": 0.01, "timeout": 5.0, "retries": 3, **options})


# ---- The pair ----


@pytest.fixture(scope="module")
def shade_server():
    shade = Shade()
    with serving(create_app(shade)) as url:
        yield shade, url


def test_batches_columns_and_order(shade_server):
    shade, url = shade_server
    shade.seen.clear()
    prompts = [f"p{index}" for index in range(7)]
    prompts[2], prompts[5] = "skip", "nan"
    answer = remote(url, batch_size=3)(shades(7), prompts, target=list("abcdefg"), weight=[0.5] * 7)
    assert answer == [0.0, 1.0, None, 3.0, 4.0, None, 6.0]
    assert [asked for asked, _ in shade.seen] == [prompts[:3], prompts[3:6], prompts[6:]]
    assert shade.seen[1][1] == {"target": ["d", "e", "f"], "weight": [0.5] * 3}


def test_a_picture_in_a_column_arrives_as_one(shade_server):
    shade, url = shade_server
    shade.seen.clear()
    sources = [Image.new("RGB", (5, 3), (0, index, 0)) for index in range(3)]
    remote(url, batch_size=2)(shades(3), list("abc"), condition_image=sources, plain=[{"png": 3}, None, "x"])
    arrived = [image for _, columns in shade.seen for image in columns["condition_image"]]
    assert [image.getpixel((0, 0)) for image in arrived] == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    assert shade.seen[0][1]["plain"] == [{"png": 3}, None]


def test_as_a_reward_of_a_trainer(shade_server):
    reward = load_reward(f"remote:{shade_server[1]}")
    images = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 8, 8)
    answer = score_images(reward, images, ["a", "skip", "b"], {"target": [1, 2, 3]})
    assert answer[0] == 0 and answer[1].isnan() and answer[2] == 255


def test_a_reward_model_behind_the_server_scores_as_here(tmp_path):
    reward = load_reward(f"image_reward:{image_reward_folder(tmp_path)}")
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((40, 60), (64, 64), (40, 60))]
    prompts = ["cat", "dog", "bird"]
    with serving(create_app(reward)) as url:
        answer = remote(url, batch_size=2)(pictures, prompts)
    assert answer == pytest.approx(score_pictures(reward, pictures, prompts), abs=1e-6)
    assert len(set(answer)) == 3


def test_32_clients_and_none_lost():
    shade = Shade(seconds=0.002)
    with serving(create_app(shade)) as url:

        def client(number):
            return remote(url, batch_size=2, timeout=60.0)(shades(4, offset=4 * number), [str(number)] * 4)

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(client, range(32)))
    assert answers == [[4.0 * number + index for index in range(4)] for number in range(32)]
    assert len(shade.seen) == 64
    assert shade.most_running == 1  # one model, one device


def test_the_token(monkeypatch):
    with serving(create_app(Shade(), token="sesame")) as url:
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        for client in (remote(url), remote(url, token="wrong")):
            with pytest.raises(RewardServerError, match=f"answered 401: .*Set the .*{TOKEN_VARIABLE}"):
                client(shades(1), ["a"])
        assert remote(url, token="sesame")(shades(1), ["a"]) == [0.0]
        monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
        assert remote(url)(shades(1), ["a"]) == [0.0]
        assert requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}
        assert requests.get(f"{url}/score", timeout=5).status_code == 405


def png(width=2, height=2):
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 100).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def coded(data):
    return base64.b64encode(data).decode()


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x04pickle", "not JSON"),
        (b"[" * 100000, "not JSON"),
        ([1, 2], "must be an object"),
        ({}, '"images" must be'),
        ({"images": [], "prompts": []}, '"images" must be'),
        ({"images": [3], "prompts": ["a"]}, '"images" must be'),
        ({"images": [coded(png())]}, '"prompts" must be'),
        ({"images": [coded(png())], "prompts": ["a", "b"]}, "Got 2 prompts for 1 images"),
        ({"images": [coded(png())], "prompts": ["a"], "columns": [1]}, '"columns" must be'),
        ({"images": [coded(png())], "prompts": ["a"], "columns": {"x": [1, 2]}}, "Got 2 x for 1 images"),
        (
            {"images": [coded(png())], "prompts": ["a"], "columns": {"x": [{"png": "!!"}]}},
            "Value 0 of column 'x' is no PNG in base64",
        ),
        (
            {"images": [coded(png())], "prompts": ["a"], "columns": {"x": [{"png": coded(png(300, 300))}]}},
            "10000 pixels together",
        ),
        ({"images": ["!!"], "prompts": ["a"]}, "Image 0 is no PNG in base64"),
        ({"images": [coded(jpeg())], "prompts": ["a"]}, "Image 0 is no PNG in base64"),
        ({"images": [coded(png(90, 90)[:4000])], "prompts": ["a"]}, "Image 0 is no PNG in base64"),
        ({"images": [coded(png(300, 300))], "prompts": ["a"]}, "10000 pixels together"),
    ],
)
def test_malformed_requests(body, message):
    with serving(create_app(Shade(), max_pixels=10000)) as url:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = requests.post(f"{url}/score", data=data, timeout=5)
        assert answer.status_code == 400 and message in answer.json()["error"]
        assert remote(url)(shades(1), ["a"]) == [0.0]  # it lives on


def test_requests_that_are_too_large():
    with serving(create_app(Shade(), max_request_bytes=200)) as url:
        with pytest.raises(RewardServerError, match="answered 413.*Lower batch_size, now 16.*--max-request-mb"):
            remote(url)(shades(4), ["a"] * 4)


def test_a_reward_that_refuses_and_one_that_fails():
    def refuses(images, prompts):
        raise ValueError("no such prompt")

    with serving(create_app(refuses)) as url:
        started = time.monotonic()
        with pytest.raises(RewardServerError, match="answered 422: .*'refuses' raised ValueError: no such prompt"):
            remote(url, backoff=30.0)(shades(1), ["a"])
        assert time.monotonic() - started < 10  # sent once
    calls = []

    def fails_once(images, prompts):
        calls.append(prompts)
        if len(calls) == 1:
            raise OSError("full")
        return [1.0]

    with serving(create_app(fails_once)) as url:
        assert remote(url)(shades(1), ["a"]) == [1.0]
    assert len(calls) == 2


def test_a_reward_that_runs_out_of_memory_is_not_asked_again():
    calls = []

    async def hungry(prompts, images):  # called by name, as everywhere
        calls.append(len(images))
        raise MemoryError

    with serving(create_app(hungry)) as url:
        with pytest.raises(
            RewardServerError, match="answered 507: .*ran out of memory on 4 images.* Lower batch_size, now 16"
        ):
            remote(url)(shades(4), ["a"] * 4)
    assert calls == [4]


# ---- Bad servers ----


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (scores([1.0]), "1 scores for 2 images"),
        (scores([1.0, 2.0, 3.0]), "3 scores for 2 images"),
        (scores("ab"), "no list but str scores for 2 images"),
        (scores([1.0, "2.0"]), "the score '2.0'"),
        (scores([1.0, True]), "the score True"),
        (scores([1.0, [2.0]]), r"the score \[2.0\]"),
        (scores([1.0, float("inf")]), "the score inf"),
        (reply(b"<html>hello</html>"), "did not answer with JSON.*<html>"),
        (reply(b"[1.0, 2.0]"), "did not answer with JSON"),
        (reply(b'{"rewards": [1.0, 2.0]}'), "did not answer with JSON"),
        (reply(b"[" * 4000), "did not answer with JSON"),
        (reply(b"\x80\x04\x95"), "did not answer with JSON"),
        (reply(b"x" * 5000), "more than 4096 bytes"),
        (reply(b"", status=404), "answered 404.*Check the address"),
        (reply(b"", status=302), "answered 302"),
    ],
)
def test_wrong_answers_fail_at_once(answer, message):
    with answering(answer, good) as (url, seen):
        with pytest.raises(RewardServerError, match=f"{re.escape(url)}/score.*{message}"):
            remote(url, max_answer_bytes=4096)(shades(2), ["a", "b"])
        assert len(seen) == 1


def test_nan_means_not_applicable():
    with answering(scores([1.5, float("nan"), None])) as (url, _):
        assert remote(url)(shades(3), ["a"] * 3) == [1.5, None, None]


@pytest.mark.parametrize(
    "failure",
    [dies, truncated, reply(b"busy", status=503), reply(b"busy", status=429), reply(b"gateway", status=502)],
    ids=["dies", "truncated", "503", "429", "502"],
)
def test_a_failure_that_passes_is_waited_for(failure, caplog):
    with answering(failure, failure, good) as (url, seen), caplog.at_level("WARNING"):
        assert remote(url)(shades(2), ["a", "b"]) == [1.0, 1.0]
        assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    paused = [record.getMessage() for record in caplog.records if record.name == "trl_diffusion.rewards.remote"]
    assert len(paused) == 2
    assert all(message.startswith(f"Paused: the reward server {url}/score") for message in paused)
    assert "Attempt 3 of 4" in paused[1]


def test_a_failure_that_stays_fails_the_call():
    with answering(dies) as (url, seen):
        with pytest.raises(RewardServerError, match="failed 4 times.*broke off.*resume"):
            remote(url)(shades(1), ["a"])
        assert len(seen) == 4
    with pytest.raises(RuntimeError, match="'remote' raised RewardServerError.*failed 4 times.*'a'"):
        score_images(remote(url), torch.rand(1, 3, 4, 4), ["a"])  # nobody listens any more


def test_time_out():
    def sleeps(handler, count):
        time.sleep(0.6)

    with answering(sleeps, good) as (url, seen):
        assert remote(url, timeout=0.2)(shades(1), ["a"]) == [1.0]
        assert len(seen) == 2
    with answering(sleeps) as (url, _):
        with pytest.raises(RewardServerError, match="failed 2 times; the last time it took longer than 0.2 s"):
            remote(url, timeout=0.2, retries=1)(shades(1), ["a"])


def test_an_answer_that_drips_is_timed_out():
    def drips(handler, count):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client hangs up
            for _ in range(100):
                handler.wfile.write(b"1\r\n \r\n")
                time.sleep(0.05)

    with answering(drips) as (url, _):
        started = time.monotonic()
        with pytest.raises(RewardServerError, match="took longer than 0.3 s"):
            remote(url, timeout=0.3, retries=0)(shades(1), ["a"])
        assert time.monotonic() - started < 2


def test_pauses_double_and_leave_the_seeds_alone(monkeypatch):
    slept, ours, sleep = [], threading.current_thread(), time.sleep

    def note(seconds):
        # Servers of other tests may still sleep in threads of theirs.
        (slept.append if threading.current_thread() is ours else sleep)(seconds)

    monkeypatch.setattr(time, "sleep", note)
    client = RemoteReward("http://127.0.0.1:9", retries=8, timeout=0.5)  # the discard port: nobody listens
    torch_state, state = torch.get_rng_state(), __import__("random").getstate()
    with pytest.raises(RewardServerError, match="failed 9 times"):
        client(shades(1), ["a"])
    for pause, expected in zip(slept, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert 0.8 * expected <= pause <= 1.2 * expected
    assert torch.equal(torch.get_rng_state(), torch_state) and __import__("random").getstate() == state


def test_columns_that_are_not_json():
    client = RemoteReward("http://127.0.0.1:9")
    for column in ([object()], [float("nan")]):
        with pytest.raises(ValueError, match=r"columns \['extra'\] cannot be sent .* as JSON"):
            client(shades(1), ["a"], extra=column)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"max_answer_bytes": 0}, "max_answer_bytes"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward("http://127.0.0.1:9", **options)


# ---- In training ----


def redness(images, prompts, **columns):
    return [float(image.resize((1, 1)).getpixel((0, 0))[0]) / 255 for image in images]


def train(reward, folder):
    config = ChunkGRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        gradient_accumulation_steps=1,
        num_inference_steps=4,
        chunk_sizes=[1, 2],
        height=16,
        width=16,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        cache_prompt_embeds=False,
    )
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in ("a cat", "a dog", "a bird", "a fish")])
    trainer = ChunkGRPOTrainer(tiny_flux_pipeline(), reward, config, train_dataset=dataset)
    trainer.train()
    weights = [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]
    return [log["reward"] for log in trainer.state.log_history if "reward" in log], weights


def test_training_goes_on_as_if_the_server_had_not_died(tmp_path):
    scored = []

    def scores_redness(handler, count):
        pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in handler.body["images"]]
        values = redness(pictures, None)
        scored.append(values)
        scores(values)(handler, count)

    # Of the second generation's two batches the server dies in the second, stays away once more and comes back.
    with answering(scores_redness, scores_redness, scores_redness, dies, truncated, scores_redness) as (url, seen):
        rewards, weights = train(remote(url, batch_size=2), tmp_path / "remote")
    assert len(seen) == 8 and len(scored) == 6
    assert seen[3] == seen[4] == seen[5]
    expected_rewards, expected_weights = train(redness, tmp_path / "local")
    assert rewards == expected_rewards and len(rewards) == 3
    assert all(torch.equal(ours, expected) for ours, expected in zip(weights, expected_weights, strict=True))


# ---- The command ----


def start(arguments, port=0):
    """The command in its own process; gives the process and its address."""
    code = "import sys; from trl_diffusion.cli.reward_server import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    line = process.stdout.readline()
    return process, re.search(r"remote:(http://127\.0\.0\.1:\d+)\)", line)[1]


def test_a_server_that_is_killed_half_way_and_comes_back(tmp_path):
    spec = f"image_reward:{image_reward_folder(tmp_path)}"
    reward = load_reward(spec)
    arguments = ["--reward", spec, "--token", "sesame", "--device", "cpu", "--reward-batch-size", "2"]
    process, url = start(arguments)
    client = RemoteReward(url, token="sesame", batch_size=2, backoff=0.5, timeout=30.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=generator)
    prompts = [f"cat {letter}" for letter in "abcdefgh"]
    answers = []
    try:
        with ThreadPoolExecutor(1) as pool:
            answers.append(score_images(client, images, prompts))
            process.send_signal(signal.SIGKILL)
            process.wait()
            # The trainer's next call meets a dead server, pauses, and goes on with the new one.
            waiting = pool.submit(score_images, client, images, prompts)
            time.sleep(0.3)
            assert not waiting.done()
            process.stdout.close()
            process, again = start(arguments, port=int(url.rpartition(":")[2]))
            assert again == url
            answers.append(waiting.result(timeout=120))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        process.stdout.close()
    expected = score_images(reward, (images * 255).round() / 255, prompts)
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "hps"], "Unknown reward 'hps'"),
        (["--reward", "shapes-judge", "--host", "0.0.0.0"], "reached from other machines. Give a --token"),
        (["--reward", "shapes-judge", "--host", "example.org"], "reached from other machines. Give a --token"),
        (["--reward", "shapes-judge", "--token", " "], "token is empty"),
        (["--reward", "shapes-judge", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["--reward", "shapes-judge", "--dtype", "float32"], "takes no options, got ['dtype']"),
        ([], "required: --reward"),
    ],
)
def test_commands_that_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--port", "0"])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["--reward", "shapes-judge", "--port", str(taken.getsockname()[1])])
    assert "Address already in use" in capsys.readouterr().err
