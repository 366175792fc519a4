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
Sample images in the backends that report, each in the row of its step, and the folders of them that are kept. Backends that
are not installed are skipped.
"""

import json
import struct

import pytest
from campaigns import full_disk
from datasets import Dataset

from trl_diffusion import ChunkGRPOConfig


STEPS = [2, 4, 5]


@pytest.fixture
def run(make_trainer, tmp_path, monkeypatch):
    """A run of five steps that logs at `STEPS`, and evaluates at the third."""

    def run(backend):
        monkeypatch.chdir(tmp_path)
        trainer = make_trainer(
            max_steps=5, logging_steps=2, num_samples_to_log=2, report_to=backend, eval_strategy="steps", eval_steps=5,
            num_eval_images=2, eval_dataset=Dataset.from_list([{"prompt": "a cat"}]),
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


def test_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("tensorboard")
    events = EventAccumulator(str(next((tmp_path / "out").glob("runs/*"))))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == STEPS


def leveldb_records(log):
    """The records of a log in the format of LevelDB, after wandb's header of 7 bytes: of a run that was offline."""
    position, record = 7, b""
    while position + 7 <= len(log):
        if 2**15 - position % 2**15 < 7:  # the rest of a block that no record fits into
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("wandb")
    wandb.finish()
    rows = []
    for data in leveldb_records(next((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    with_samples = [row for row in rows if "samples/count" in row]
    assert [row["train/global_step"] for row in with_samples] == STEPS
    assert all("train/loss" in row or "eval/reward" in row for row in with_samples)
    for row in with_samples:
        assert row["samples/count"] == 2 and all("redness" in caption for caption in row["samples/captions"])
        for name in row["samples/filenames"]:
            assert next((tmp_path / "wandb").glob(f"offline-run-*/files/{name}")).stat().st_size > 0


def test_trackio(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = run("trackio").args.project
    rows = SQLiteStorage.get_logs(project, *SQLiteStorage.get_runs(project))
    with_samples = [row for row in rows if "train/samples/000" in row]
    assert [row["train/global_step"] for row in with_samples] == STEPS
    assert all("train/loss" in row or "eval/reward" in row for row in with_samples)
    for row in with_samples:
        images = [value for name, value in row.items() if name.startswith("train/samples/")]
        assert len(images) == 2
        for image in images:
            assert image["_type"] == "trackio.image" and "redness" in image["caption"]
            assert next((tmp_path / "trackio").rglob(image["file_path"])).stat().st_size > 0


# ---- The number of folders ----


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_and_the_last_samples_stay_also_after_a_resume(make_trainer, tmp_path):
    settings = {"num_samples_to_log": 1, "samples_total_limit": 3, "save_strategy": "steps", "save_steps": 4}
    make_trainer(max_steps=4, **settings).train()
    samples = tmp_path / "out" / "samples"
    assert steps_in(samples) == ["step_000001", "step_000003", "step_000004"]
    others = [samples / "notes", samples / "step_1", samples / "step_000002_mine"]
    for folder in others:
        folder.mkdir()
    (samples / "step_000000").write_text("a file")
    make_trainer(max_steps=6, **settings).train(resume_from_checkpoint=True)
    kept = ["step_000001", "step_000005", "step_000006"]
    assert steps_in(samples) == sorted([*kept, "step_000000", *(folder.name for folder in others)])
    assert sorted(path.name for path in (samples / "step_000005").iterdir()) == ["000.png", "metadata.jsonl"]


def test_a_run_that_starts_anew_keeps_its_own_samples(make_trainer, tmp_path):
    """And not those that an earlier run has left of later steps."""
    samples = tmp_path / "out" / "samples"
    for step in (2, 500, 501):
        (samples / f"step_{step:06d}").mkdir(parents=True)
    make_trainer(max_steps=3, num_samples_to_log=1, samples_total_limit=3).train()
    assert steps_in(samples) == ["step_000001", "step_000002", "step_000003"]


def test_all_samples_stay_without_a_limit(make_trainer, tmp_path):
    for step in range(10, 70):
        (tmp_path / "out" / "samples" / f"step_{step:06d}").mkdir(parents=True)
    make_trainer(max_steps=1, num_samples_to_log=1, samples_total_limit=None).train()
    assert len(steps_in(tmp_path / "out" / "samples")) == 61
    make_trainer(max_steps=1, num_samples_to_log=1).train()
    assert len(steps_in(tmp_path / "out" / "samples")) == 50


def test_samples_that_cannot_be_deleted_do_not_stop_a_run(make_trainer, tmp_path, caplog):
    samples = tmp_path / "out" / "samples"
    for step in (1, 2):
        (samples / f"step_{step:06d}").mkdir(parents=True)
    in_use = samples / "step_000002" / "in_use"
    in_use.mkdir()
    try:
        with full_disk.small_disk(in_use, 2**20):
            make_trainer(max_steps=4, num_samples_to_log=1, samples_total_limit=2).train()
    except full_disk.CannotMount as error:
        pytest.skip(f"root alone can mount a file system: {error}")
    assert steps_in(samples)[-1] == "step_000004" and in_use.is_dir()
    assert f"The samples in {in_use.parent} could not be deleted and stay" in caplog.text


@pytest.mark.parametrize("limit", [1, 0, -1])
def test_a_limit_that_leaves_no_last_samples(limit, tmp_path):
    with pytest.raises(ValueError, match=f"samples_total_limit must be at least 2.*got {limit}. Use None to keep all"):
        ChunkGRPOConfig(output_dir=str(tmp_path), samples_total_limit=limit)
