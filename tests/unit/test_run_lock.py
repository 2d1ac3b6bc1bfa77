"""Of two starts of a run, one may write to its folder."""

import errno
import json
import os
import re
import socket

import pytest
from saved import save

from dtrain.checkpoint import disk, run_lock
from dtrain.checkpoint import format as files
from dtrain.checkpoint.resume import look
from dtrain.checkpoint.run_lock import RunLock
from dtrain.errors import CheckpointError, RunTaken

ME = re.escape(f"(pid {os.getpid()} on {socket.gethostname()}, since ")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_S", 0.3)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


def taken(run_dir):
    mine = RunLock(run_dir)
    mine.take()
    mine.check()
    return mine


def test_a_second_start_waits_says_so_and_gives_up(tmp_path, capsys):
    first = taken(tmp_path)
    with pytest.raises(RunTaken, match=f"^another start of this run {ME}.*is alive and writes to"):
        RunLock(tmp_path).take()
    assert re.search(f"{ME}.* still writes to .*; waiting up to 0.3 s", capsys.readouterr().err)
    first.check()  # nothing was taken from it


JOBS = [
    ({"SLURM_JOB_ID": "12"}, "in SLURM job 12"),
    ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}, "in SLURM job 12, step 0"),
    (
        {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
        "in SLURM job 12_3",
    ),
    ({"PBS_JOBID": "7.head"}, "in PBS job 7.head"),
    ({"LSB_JOBID": "8"}, "in LSF job 8"),
]


@pytest.mark.parametrize(("env", "words"), JOBS)
def test_who_holds_it_is_named_by_its_job(tmp_path, monkeypatch, env, words):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    first = taken(tmp_path)
    with pytest.raises(RunTaken, match=rf"\(pid \d+ on [^,]+, {words}, since .* is alive"):
        RunLock(tmp_path).take()
    first.release()


def test_the_lock_is_free_once_it_is_released_whoever_has_a_copy_of_it(tmp_path):
    first = taken(tmp_path)
    copy = os.dup(first._lock)  # as a forked process has
    first.release()
    first.release()
    second = taken(tmp_path)
    os.close(copy)
    with pytest.raises(RunTaken, match=rf"{ME}.*\) writes to {re.escape(str(tmp_path))} now"):
        first.check()
    second.check()
    assert sorted(os.listdir(tmp_path)) == [".writer", ".writer.lock"]


@pytest.mark.parametrize("change", [{"machine": "another"}, {"pid": 2**22 + 1}])
def test_a_lock_of_nobody_here_is_waited_for_and_passed(tmp_path, capsys, change):
    """Another host's, which may be cut off or dead; or that of a worker that was left behind."""
    first = taken(tmp_path)
    facts = json.loads((tmp_path / ".writer").read_text())
    (tmp_path / ".writer").write_text(json.dumps(facts | change))
    second = taken(tmp_path)
    assert f"{tmp_path} is taken over from another start" in capsys.readouterr().err
    with pytest.raises(RunTaken):
        first.check()
    second.release()


def test_without_locks_the_token_decides(tmp_path, no_locks):
    first = taken(tmp_path)
    second = taken(tmp_path)
    with pytest.raises(RunTaken):
        first.check()
    second.check()
    second.release()


def test_any_other_trouble_with_a_lock_is_told(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="Input/output error"):
        RunLock(tmp_path).take()


def test_a_further_fit_goes_on_unless_somebody_else_wrote(tmp_path):
    first = taken(tmp_path)
    first.release()
    first.take_again()
    first.release()
    taken(tmp_path).release()
    with pytest.raises(RunTaken):
        first.take_again()
    first.release()


def test_a_token_that_cannot_be_read_is_no_other_start(tmp_path):
    mine = taken(tmp_path)
    (tmp_path / ".writer").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        mine.check()
    assert not isinstance(caught.value, RunTaken)


def test_beginning_anew_leaves_the_lock_where_it_is(tmp_path):
    mine = taken(tmp_path)
    (tmp_path / "status.json").write_text("{}")
    look(tmp_path, "never")
    mine.check()
    assert sorted(os.listdir(tmp_path)) == [".writer", ".writer.lock", "before-1"]


def test_a_commit_by_an_old_start_changes_nothing(tmp_path, no_locks):
    old = taken(tmp_path)
    folder = tmp_path / "checkpoints"
    final, aside = files.place(folder, 5, old.token)
    aside.mkdir(parents=True)
    disk.write_bytes(aside / "rank-00000.json", b"{}")
    new = taken(tmp_path)
    assert files.place(folder, 5, new.token)[1] != aside
    save(folder, 5)
    before = (final / "manifest.json").read_bytes()
    aside.mkdir(exist_ok=True)  # the new start had tidied up
    facts = {"rank-00000.json": {"bytes": 2, "sha256": ""}}
    with pytest.raises(RunTaken):
        files.commit(aside, final, 5, {}, facts, old.check)
    assert (final / "manifest.json").read_bytes() == before
    assert files.check(final).step == 5
    assert json.loads((tmp_path / ".writer").read_text())["token"] == new.token


def test_who_writes_by_the_token_alone_does_not_ask_for_the_lock_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_lock, "_lock", asked.append)  # which cannot be had
    mine = RunLock(tmp_path)
    mine.take()
    mine.take_again()
    assert len(asked) == 1
    mine.release()
    mine.take_again()
    assert len(asked) == 2
