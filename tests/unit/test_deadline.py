"""When a SLURM job ends, and a request to leave before it."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from dtrain.cluster.signals import Deadline, end_shown, job_end, margin_of
from dtrain.errors import ConfigError

JOB = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """The folder of a scontrol that says line after line of `says`, and then the last again."""
    script = tmp_path / "scontrol"
    script.write_text(
        "#!/bin/bash\n"
        'echo "$* $SLURM_TIME_FORMAT" >>"${0%/*}/asked"\n'
        'asked=$(wc -l <"${0%/*}/asked")\n'
        'head -n "$asked" "${0%/*}/says" | tail -n 1\n'
    )
    script.chmod(0o755)
    return tmp_path


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def env(folder: Path, **more: str) -> Mapping[str, str]:
    return {**JOB, "PATH": f"{folder}:/usr/bin:/bin", **more}


def test_the_end_is_read_as_local_time() -> None:
    shown = f"JobId=7 StartTime={at(1.7e9)} EndTime={at(1.8e9)} Deadline=N/A"
    assert end_shown(shown) == 1.8e9


@pytest.mark.parametrize("shown", ["", "JobId=7 EndTime=Unknown", "slurm_load_jobs error: what?"])
def test_an_end_that_nobody_knows(shown: str) -> None:
    assert end_shown(shown) is None


def test_the_environment_is_asked_first() -> None:
    assert job_end({**JOB, "SLURM_JOB_END_TIME": "1800000000"}) == 1.8e9


def test_where_there_is_no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert job_end({**JOB, "PATH": "/nonexistent"}) is None


def test_scontrol_is_asked_in_its_own_format(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{scontrol}:/usr/bin:/bin")
    (scontrol / "says").write_text(f"JobId=7 EndTime={at(1.8e9)}\n")
    assert job_end(env(scontrol, SLURM_TIME_FORMAT="relative")) == 1.8e9
    assert (scontrol / "asked").read_text() == "show job -o 7 \n"


def test_it_asks_before_the_end_and_only_once(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{scontrol}:/usr/bin:/bin")
    # The end is moved from an hour ago to one hence, less what is needed to leave.
    (scontrol / "says").write_text(
        f"EndTime={at(time.time() - 3600)}\nEndTime={at(time.time() + 3600)}\n"
    )
    told, asked = [], threading.Event()

    def ask(why: str) -> None:
        told.append(why)
        asked.set()

    with Deadline(ask, active=True, env=env(scontrol, DTRAIN_LEAVE_BEFORE_END_S="3700")):
        assert asked.wait(20)
    (why,) = told
    assert 3500 < float(why.removeprefix("the job ends in ").removesuffix(" seconds")) <= 3600
    assert (scontrol / "asked").read_text() == "show job -o 7 \n" * 3


@pytest.mark.parametrize(("active", "job"), [(False, JOB), (True, {})])
def test_elsewhere_nothing_is_started(active: bool, job: Mapping[str, str]) -> None:
    before = threading.active_count()
    told: list[str] = []
    with Deadline(told.append, active=active, env={**job, "SLURM_JOB_END_TIME": "1"}):
        assert threading.active_count() == before
    assert told == []


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_margin_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"DTRAIN_LEAVE_BEFORE_END_S='{text}': must be a number"):
        margin_of({"DTRAIN_LEAVE_BEFORE_END_S": text})
