"""Where a run stands: the file that says so."""

import json
import os
from pathlib import Path

import pytest

from dtrain.checkpoint import status
from dtrain.checkpoint.run_files import prepare
from dtrain.checkpoint.status import Status
from dtrain.errors import CheckpointError, ConfigError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert status.read(tmp_path) is None
    before = Status("failed", "rank 3 – ValueError", 7, 1, {"model": "x", "samples": None})
    status.write(tmp_path, Status("running"))
    status.write(tmp_path, before)
    assert status.read(tmp_path) == before
    assert names(tmp_path) == ["status.json"]
    facts = json.loads((tmp_path / "status.json").read_text())
    assert (facts["status"], facts["reason"], facts["step"]) == ("failed", before.reason, 7)


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
