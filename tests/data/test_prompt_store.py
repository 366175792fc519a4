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

"""Embeddings on disk: what is found is what was put, whoever else writes, and there is never more than allowed."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import torch

from trl_diffusion.data.prompt_store import PromptStore


ROW = {"prompt_embeds": torch.arange(12.0).view(3, 4).bfloat16(), "mask": torch.tensor([True, True, False])}


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_put_is_found_with_its_dtype_by_its_key_and_prompt_alone(tmp_path):
    store = PromptStore(tmp_path, "key", max_gib=1)
    assert store.get("a cat") is None and "a cat" not in store
    store.put("a cat", ROW)
    found = PromptStore(tmp_path, "key", max_gib=1).get("a cat")
    assert found.keys() == ROW.keys() and "a cat" in store
    for name, tensor in ROW.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert store.get("a cat ") is None
    assert PromptStore(tmp_path, "other key", max_gib=1).get("a cat") is None
    store.put("a cat", {"mask": ROW["mask"]})
    assert store.get("a cat").keys() == {"mask"}
    assert len(files(tmp_path)) == 1


def test_what_was_used_longest_ago_goes_first(tmp_path):
    tensor = {"x": torch.zeros(1 << 18)}  # 1 MiB
    store = PromptStore(tmp_path, "key", max_gib=3.5 / 1024)
    for age, prompt in enumerate(["newest", "middle", "used again", "oldest"]):
        store.put(prompt, tensor)
        then = time.time() - 100 * (age + 1)
        os.utime(store._path(prompt), (then, then))
    store.get("used again")
    store.trim()
    assert [prompt for prompt in ("newest", "middle", "used again", "oldest") if prompt in store] == [
        "newest", "middle", "used again",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3.5 * 2**20


def test_damaged_files_are_made_again(tmp_path, caplog):
    store = PromptStore(tmp_path, "key", max_gib=1)
    store.put("a cat", ROW)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    assert store.get("a cat") is None
    store.put("a cat", ROW)
    assert torch.equal(store.get("a cat")["mask"], ROW["mask"])


def test_an_entry_is_opened_once(tmp_path):
    """Another process may delete it after that. A pipe can be read by one opening alone."""
    store = PromptStore(tmp_path, "key", max_gib=1)
    store.put("a cat", ROW)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    found = store.get("a cat")
    writer.join(10)
    assert found.keys() == ROW.keys() and all(torch.equal(found[name], ROW[name]) for name in ROW)


def test_what_a_killed_process_left_is_no_entry_and_is_deleted_in_time(tmp_path):
    store = PromptStore(tmp_path, "key", max_gib=1)
    store.put("a cat", ROW)
    (path,) = files(tmp_path)
    half = path.with_name("tmpabc")
    half.write_bytes(path.read_bytes()[:20])
    store.trim()
    assert half.exists()  # another process may be writing it
    then = time.time() - 4000
    os.utime(half, (then, then))
    store.trim()
    assert files(tmp_path) == [path]


WRITER = """
    import sys
    from pathlib import Path
    import torch
    from trl_diffusion.data.prompt_store import PromptStore

    store = PromptStore(Path(sys.argv[1]), "key", max_gib=4 / 1024)
    print("ready", flush=True)
    number = 0
    while True:
        for i in range(8):
            store.put(f"prompt {i}", {"x": torch.full((1 << 17,), float(i)), "y": torch.full((4,), float(i))})
            row = store.get(f"prompt {i}")
            assert row is None or (row["x"] == i).all()
        store.trim()
"""


def test_two_writers_that_are_killed_leave_whole_entries(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        store = PromptStore(tmp_path, "key", max_gib=1)
        seen = 0
        deadline = time.monotonic() + 60
        while seen < 200 and time.monotonic() < deadline:
            for i in range(8):
                row = store.get(f"prompt {i}")
                if row is not None:
                    assert (row["x"] == i).all() and (row["y"] == i).all()
                    seen += 1
        assert seen >= 200
        assert [writer.poll() for writer in writers] == [None, None], [w.stderr.read() for w in writers if w.poll()]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    found = [row for row in map(store.get, (f"prompt {i}" for i in range(8))) if row is not None]
    assert found
    for row in found:
        assert (row["x"] == row["y"][0]).all()
