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
Long runs: what must not grow with the steps, the requests or the kills does not grow. Needs Linux's /proc.

```bash
PYTHONPATH=tests python tests/campaigns/soak.py train --steps 2000       # both trainers on the tiny model
PYTHONPATH=tests python tests/campaigns/soak.py server --requests 20000  # the reward server under 32 clients
PYTHONPATH=tests python tests/campaigns/soak.py cache --kills 10         # two runs that share the cache of prompts
```

`train` counts the memory, open files, threads and Python objects of the process and the files of its folder every 50 steps,
of a run that logs, samples, evaluates and saves. `server` checks every score. In `cache` one of two runs is killed every 30
seconds and resumed; both must end as runs that keep no embeddings on disk, bit for bit.
"""

import argparse
import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from campaigns.tiny_runs import TRAINERS, make_trainer, save_trained
from datasets import Dataset
from huggingface_hub import cached_assets_path
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion.models.conditioning import open_prompt_store
from trl_diffusion.rewards import RemoteReward
from trl_diffusion.runtime.checkpoints import checkpoints, last_whole_checkpoint


ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
# Of different length, and more of them than a window of embeddings or the cache of a campaign holds.
PROMPTS = [f"{'a long way to ' * (number % 3)}picture {number}" for number in range(40)]


@dataclass(frozen=True)
class Sample:
    """What a process holds: at a step, or after so many requests."""

    at: int
    rss: int
    files: int
    threads: int


def sample(at: int, process: int | str = "self") -> Sample:
    """Bytes in memory, open files and threads of a process."""
    folder = Path("/proc") / str(process)
    pages = int((folder / "statm").read_text().split()[1])
    files, threads = len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))
    return Sample(at, pages * os.sysconf("SC_PAGE_SIZE"), files, threads)


def check_flat(name: str, samples: list[Sample], tolerance: float) -> str:
    """
    What was found, in words.

    Raises:
        `AssertionError`: the memory of the last quarter of the samples is more than that of the first by over `tolerance`
        MiB, or there are more files or threads than at first.
    """
    quarter = max(len(samples) // 4, 1)
    memory = np.array([found.rss / MIB for found in samples])
    growth = np.median(memory[-quarter:]) - np.median(memory[:quarter])
    at = np.array([found.at for found in samples])
    slope = 1000 * np.polyfit(at, memory, 1)[0]
    told = (
        f"{name}: {at[0]} to {at[-1]}, memory {memory.min():.0f} to {memory.max():.0f} MiB, grown by {growth:+.1f} MiB, "
        f"{slope:+.2f} MiB a thousand; open files {sorted({found.files for found in samples})}, "
        f"threads {sorted({found.threads for found in samples})}"
    )
    assert growth <= tolerance, told
    assert samples[-1].files <= samples[0].files and samples[-1].threads <= samples[0].threads, told
    return told


# ---- A long training ----


class Watch(TrainerCallback):
    """Counts every so many steps, and the files of the run beside."""

    def __init__(self, every: int):
        self.every = every
        self.samples: list[Sample] = []
        self.objects: list[int] = []
        self.folders: list[dict[str, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.samples.append(sample(state.global_step))
            gc.collect()
            self.objects.append(len(gc.get_objects()))
            folder = Path(args.output_dir)
            entries = [path for path in folder.iterdir() if path.is_dir()]
            self.folders.append({path.name: sum(map(Path.is_file, path.rglob("*"))) for path in entries})


def train(
    kind: str,
    folder: Path,
    steps: int,
    settled: int = 100,
    every: int = 50,
    tolerance: float = 10,
    limit: int = 20,
) -> str:
    """
    A run that logs at each step, and evaluates and saves now and then; flat from the step `settled` on, with so many MiB of
    `tolerance`, and with `limit` folders of samples.
    """
    trainer = make_trainer(
        kind, folder, prompts=PROMPTS, eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}), max_steps=steps,
        save_steps=max(steps // 20, 1), eval_strategy="steps", eval_steps=max(steps // 10, 1), num_eval_images=4,
        log_samples=True, num_samples_to_log=2, samples_total_limit=limit, report_to="tensorboard", prompt_window=8,
    )  # fmt: skip
    watch = Watch(every)
    trainer.add_callback(watch)
    start = time.perf_counter()
    trainer.train()
    told = check_flat(kind, [found for found in watch.samples if found.at >= settled], tolerance)
    after = [objects for objects, found in zip(watch.objects, watch.samples, strict=True) if found.at >= settled]
    kept = sorted(path.name for path in (folder / "samples").iterdir())
    # Three files a folder: two pictures and what is known of them.
    most = max(found["samples"] for found in watch.folders)
    told += (
        f"; Python objects {after[0]} to {after[-1]}; {len(trainer.state.log_history)} logs; files of samples at most "
        f"{most}; {time.perf_counter() - start:.0f} s"
    )
    assert len(kept) == limit and most <= 3 * limit, told
    # A generation of Chunk-GRPO lasts for two steps, and its samples are written once.
    assert kept[0] == "step_000001" and kept[-1] in (f"step_{steps - 1:06d}", f"step_{steps:06d}"), told
    assert watch.folders[-1]["runs"] == watch.folders[0]["runs"], told
    assert len([path for path in folder.iterdir() if path.name.startswith("checkpoint-")]) == 2, told
    return told


# ---- The reward server ----


def shade(images: list[Image.Image], prompts: list[str], **columns: list) -> list[float]:
    """What the server scores with: the red of the first pixel, and the length of the prompt behind the comma, exact in float32."""
    return [image.getpixel((0, 0))[0] + len(prompt) / 1024 for image, prompt in zip(images, prompts, strict=True)]


@contextlib.contextmanager
def reward_server() -> Iterator[tuple[int, str]]:
    """The command in a process of its own; gives its id and its address."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "trl_diffusion.cli", "reward-server", "--reward", "campaigns.soak.shade"]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        # Libraries may print lines of their own before.
        found = (re.search(r"remote:(http://127\.0\.0\.1:\d+)\)", line) for line in process.stdout)
        yield process.pid, next(match for match in found if match)[1]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def serve(requests: int, clients: int, tolerance: float = 10) -> str:
    """So many requests of one to three images; every client is made anew after 50 of its own."""
    numbers, samples = itertools.count(), []
    every = max(requests // 40, 1)
    lock = threading.Lock()

    def client(url: str, process: int) -> int:
        images = 0
        while True:
            # No second attempt: a request that fails, fails the campaign.
            reward = RemoteReward(url, batch_size=3, timeout=120.0, retries=0)
            with contextlib.closing(reward.session):
                for _ in range(50):
                    number = next(numbers)
                    if number >= requests:
                        return images
                    count = 1 + number % 3
                    reds = [(number + index) % 256 for index in range(count)]
                    prompts = ["x" * (number * (index + 1) % 97) for index in range(count)]
                    pictures = [Image.new("RGB", (16 + number % 48, 32), (red, 0, 0)) for red in reds]
                    scores = reward(pictures, prompts)
                    expected = [red + len(prompt) / 1024 for red, prompt in zip(reds, prompts, strict=True)]
                    assert scores == expected, f"request {number}: {scores} instead of {expected}"
                    images += count
                    if number % every == 0:
                        with lock:
                            samples.append(sample(number, process))

    with reward_server() as (process, url):
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            done = [pool.submit(client, url, process) for _ in range(clients)]
        images = sum(future.result() for future in done)
        seconds = time.perf_counter() - start
        time.sleep(0.5)  # the server learns that its clients are gone
        last = sample(requests, process)
    samples.sort(key=lambda found: found.at)
    settled = [found for found in samples if found.at >= requests // 10]
    # Connections are open files, and come and go; none may stay.
    alike = [Sample(found.at, found.rss, last.files, last.threads) for found in settled]
    told = check_flat("server", alike, tolerance)
    most = max(found.files for found in samples)
    told += f"; {most} open files at most under {clients} clients, {last.files} after them"
    assert most <= last.files + 2 * clients and last.files <= 32, told
    return f"{told}; {requests} requests of {images} images, all scores right, {seconds:.0f} s"


# ---- Two runs and one cache of prompts ----

CONTEXT = multiprocessing.get_context("fork")


def run(kind: str, folder: Path, steps: int, cache: dict) -> None:
    """A run from its last whole checkpoint, or from the start; in a process of its own."""
    torch.set_num_threads(1)
    trainer = make_trainer(kind, folder, prompts=PROMPTS, max_steps=steps, prompt_window=4, **cache)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) is not None)
    save_trained(trainer, folder / "trained.safetensors")


def started(kind: str, folder: Path, steps: int, cache: dict) -> multiprocessing.Process:
    process = CONTEXT.Process(target=run, args=(kind, folder, steps, cache))
    process.start()
    return process


def saved_step(folder: Path) -> int:
    """Of the latest checkpoint of a run, 0 before the first."""
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints(folder)), default=0)


def finish(process: multiprocessing.Process) -> None:
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"The run ended with status {process.exitcode}; its error is above.")


def put_one_entry(folder: Path) -> None:
    """Encode the first prompt into the cache; in a process of its own, since this one must not compute before it forks."""
    torch.set_num_threads(1)
    flow = make_trainer("srpo", folder, prompts=PROMPTS, prompt_window=4).flow
    open_prompt_store(flow, 1.0).put(PROMPTS[0], flow.encode_rows([PROMPTS[0]])[0])


class Entries:
    """The files of the cache, seen from outside while the runs write them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: set[str] = set()
        self.most = 0

    def sizes(self) -> dict[str, int]:
        found = {}
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                found[path.name] = path.stat().st_size
        return found

    def watch(self, process: multiprocessing.Process, reached: Callable[[], bool] = lambda: False) -> None:
        """Look until something is reached or the process ends."""
        while process.is_alive() and not reached():
            sizes = self.sizes()
            self.seen |= sizes.keys()
            self.most = max(self.most, sum(sizes.values()))
            time.sleep(0.05)


def share_cache(folder: Path, steps: int, kills: int) -> str:
    """
    Run Chunk-GRPO, which is killed when it has done a further share of its steps, beside SRPO, which is not.

    The cache is that of this process, so HF_ASSETS_CACHE is set before it starts.
    """
    start = time.perf_counter()
    first = CONTEXT.Process(target=put_one_entry, args=(folder / "encoder",))
    first.start()
    whole = [started(kind, folder / f"{kind}-whole", steps, {}) for kind in TRAINERS]
    for process in (first, *whole):
        finish(process)
    cached = Entries(cached_assets_path("trl_diffusion", "prompts", "embeddings"))
    (size,) = cached.sizes().values()
    limit = 12 * size
    cache = {"cache_prompt_embeds": True, "prompt_cache_gib": limit / 2**30}
    killed = 0
    beside = started("srpo", folder / "srpo", steps, cache)
    disturbed = started("chunk_grpo", folder / "chunk_grpo", steps, cache)
    while killed < kills:
        step = (killed + 1) * steps // (kills + 1)
        cached.watch(disturbed, lambda step=step: saved_step(folder / "chunk_grpo") >= step)
        if not disturbed.is_alive():
            break
        disturbed.kill()
        disturbed.join()
        killed += 1
        disturbed = started("chunk_grpo", folder / "chunk_grpo", steps, cache)
    cached.watch(disturbed)
    finish(disturbed)
    finish(beside)
    for kind in TRAINERS:
        expected = load_file(folder / f"{kind}-whole" / "trained.safetensors")
        found = load_file(folder / kind / "trained.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), f"{kind}: {name} differs by {weight - found[name]}"
    flow = make_trainer("srpo", folder / "decoder", prompts=PROMPTS, prompt_window=4).flow
    store, left, entries = open_prompt_store(flow, 1.0), sum(cached.sizes().values()), 0
    for prompt in PROMPTS:
        (row,), kept = flow.encode_rows([prompt]), store.get(prompt)
        if kept is not None:
            entries += 1
            assert kept.keys() == row.keys() and all(torch.equal(kept[name], row[name]) for name in row), prompt
    assert entries == len(cached.sizes()), "The cache holds an entry that is damaged, or of no prompt."
    broken_off = len([path for path in store.folder.glob("*/*") if path.suffix != ".safetensors"])
    told = (
        f"cache: {steps} steps, {killed} kills, both runs equal bit for bit to those without a cache; of {len(cached.seen)} "
        f"entries {entries} stayed, all whole, {left} of {limit} bytes allowed, {cached.most} at most on the way; "
        f"{broken_off} half written files of killed runs; {time.perf_counter() - start:.0f} s"
    )
    assert killed == kills, f"{told}. The run ended before it was killed so often: give more --steps."
    assert len(cached.seen) > entries, told
    # Each run deletes what is too much when it has encoded a window.
    assert left <= limit and cached.most <= limit + 2 * 5 * size, told
    return told


# ---- The command ----


def in_a_fresh_process(function: Callable[..., str], *arguments) -> str:
    """The answer of a function in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("campaign", choices=["train", "server", "cache"])
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS), help="of train")
    parser.add_argument("--steps", type=int, default=2000, help="of train and cache")
    parser.add_argument("--requests", type=int, default=20_000, help="of server")
    parser.add_argument("--clients", type=int, default=32, help="of server")
    parser.add_argument("--kills", type=int, default=10, help="of cache")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.campaign == "train":
            for kind in arguments.trainers:
                print(in_a_fresh_process(train, kind, folder / kind, arguments.steps), flush=True)
        elif arguments.campaign == "server":
            print(serve(arguments.requests, arguments.clients))
        elif "HF_ASSETS_CACHE" in os.environ:
            print(share_cache(folder, arguments.steps, arguments.kills))
        else:
            # Read when the libraries are imported, so that only another process can have a cache of its own.
            environment = {**os.environ, "HF_ASSETS_CACHE": str(folder / "assets")}
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
