"""Where a run stands: the file that says so."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.checkpoint import status
from dtrain.checkpoint.one_folder import prepare
from dtrain.checkpoint.status import Status
from dtrain.errors import CheckpointError, ConfigError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert status.read(tmp_path) is None
    before = Status("failed", "rank 3 – ValueError", 7, 1, {"model": "x", "samples": None})
    status.write(tmp_path, Status("running"))
    status.write(tmp_path, before)
    assert status.read(tmp_path) == replace(before, sentence=status.describe(before))
    assert names(tmp_path) == ["status.json"]
    facts = json.loads((tmp_path / "status.json").read_text())
    assert (facts["status"], facts["reason"], facts["step"]) == ("failed", before.reason, 7)


SENTENCES = [
    (
        Status("finished", "all epochs done", 46, saved=46),
        "finished after 46 steps (all epochs done)",
    ),
    (
        Status("preempted", "SIGUSR1", 62, saved=62),
        "left after 62 steps (SIGUSR1), saved at step 62",
    ),
    (Status("running", "", 25, saved=25), "killed at step 25 or later, saved at step 25"),
    (Status("running"), "killed at step 0 or later, nothing is saved"),
    (
        Status("failed", "ValueError: planted\n  and more", 41, failures=1, failed_at=41, saved=0),
        "failed at step 41 (ValueError: planted), saved at step 0",
    ),
    (
        Status("failed", "E: " + "x" * 400, 40, failures=3, failed_at=41, saved=40),
        f"failed 3 times in a row, never beyond step 41 (E: {'x' * 297}...), saved at step 40",
    ),
]


@pytest.mark.parametrize(("now", "sentence"), SENTENCES)
def test_what_became_of_a_run_is_one_sentence(tmp_path: Path, now: Status, sentence: str) -> None:
    status.write(tmp_path, now)
    assert json.loads((tmp_path / "status.json").read_text())["sentence"] == sentence


def test_a_status_is_on_the_disk_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def record_sync(handle: int) -> None:
        done.append(f"{Path(os.readlink(f'/proc/self/fd/{handle}')).name} synced")
        fsync(handle)

    def record_replace(old: Path, new: Path) -> None:
        done.append(f"{old.name} is {new.name}, with {old.stat().st_size > 0}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    status.write(tmp_path, Status("running"))
    aside = ".status.json.writing"
    assert done == [f"{aside} synced", f"{aside} is status.json, with True"]


def test_a_status_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none/status\.json cannot be written"):
        status.write(tmp_path / "none", Status("running"))
    (tmp_path / "status.json" / "x").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"status\.json cannot be written"):
        status.write(tmp_path, Status("running"))


def test_preparing_proves_that_the_folder_can_be_written(tmp_path: Path) -> None:
    prepare(tmp_path / "a" / "b")
    prepare(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(ConfigError, match=f"run_dir {place} cannot be written"):
            prepare(place)


# ----------------------------------------------------------------------------- for a batch script


def test_a_copy_is_written_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.json"
    monkeypatch.setenv("DTRAIN_STATUS_FILE", str(copy))
    status.write(tmp_path, Status("preempted", "USR1", 7))
    assert copy.read_bytes() == (tmp_path / "status.json").read_bytes()
    # What the batch script looks for: one key a line, as it is here.
    lines = copy.read_text().splitlines()
    assert ' "status": "preempted",' in lines
    assert ' "requeue": true,' in lines


def test_a_copy_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_STATUS_FILE", str(tmp_path / "none" / "copy.json"))
    with pytest.raises(CheckpointError, match=r"none/copy.json cannot be written: .*No such file"):
        status.write(tmp_path, Status("running"))
