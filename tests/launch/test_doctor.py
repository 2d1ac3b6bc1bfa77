"""`dtrain doctor`: planted faults are named, each with what to do, and the status says the rest."""

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from launch.hosts import missing

TIMEOUT_S = 120.0
DOCTOR = [sys.executable, "-m", "dtrain", "doctor"]


def environment(**more):
    # Its own port is looked at, and no launcher's variables are there.
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "MASTER_"))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def run(command, cwd, **env):
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def findings(output):
    told = json.loads(output)
    assert told["works"] is not any(one["level"] == "wrong" for one in told["findings"])
    return told["findings"]


def of(told, subject, level):
    """Returns the one finding of a kind; all words of it."""
    (found,) = [one for one in told if (one["subject"], one["level"]) == (subject, level)]
    # What other parts of dtrain say has its remedy in it.
    assert found["remedy"] or level == "fine" or subject in ("shared folder", "ranks")
    return f"{found['words']} -> {found['remedy']}"


def isolated(script, hostname=None):
    """Returns a command that mounts and names what it likes, seen by nobody else."""
    if why := missing():
        assert "CI" not in os.environ, why
        pytest.skip(why)
    named = f"hostname {hostname}; " if hostname else ""
    return ["unshare", "--mount", "--uts", "sh", "-ec", named + script]


def test_where_all_is_well(tmp_path):
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    seen = run([*two, "-m", "dtrain", "doctor", "--run-dir", "runs"], tmp_path)
    assert seen.returncode == 0, seen.stdout + seen.stderr
    assert "a run would work here" in seen.stdout
    for subject in ("versions", "clocks", "shared folder", "a real step", "run_dir"):
        assert seen.stdout.count(f"fine   {subject} ") == 1
    assert "2, started by torchrun: 2 on" in seen.stdout
    assert seen.stdout.count("all-reduce ") == 4
    assert [*Path(tmp_path, "runs").iterdir()] == []  # nothing is left


def test_faults_of_one_host(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mounts = f"mount -t tmpfs -o ro none {shlex.quote(str(folder))}; "
        mounts += "mount -t tmpfs -o size=64m none /dev/shm; ulimit -n 128; "
        command = isolated(
            mounts + shlex.join([*DOCTOR, "--json", "--run-dir", str(folder)]),
            hostname="no-such-host.invalid",
        )
        asked = {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "ib7"}
        seen = run(command, tmp_path, **asked)
    assert seen.returncode == 1, seen.stderr
    told = findings(seen.stdout)
    assert f"{folder} cannot be written: Read-only file system" in of(told, "run_dir", "wrong")
    assert "64 MiB in /dev/shm, 64 MiB free" in of(told, "shared memory", "note")
    assert "--shm-size=8g" in of(told, "shared memory", "note")
    assert "no-such-host.invalid does not resolve" in of(told, "host name", "note")
    assert f"MASTER_PORT={port} is taken" in of(told, "port", "wrong")
    assert "GLOO_SOCKET_IFNAME=ib7 names ib7, which is not here" in of(told, "interfaces", "wrong")
    assert "at most 128 in a process" in of(told, "open files", "wrong")


# What differs on rank 1 alone.
OTHERS = """
import sys, torch
torch.__version__ = "2.12.0"
from dtrain.cli import main
main()
"""


def test_ranks_that_do_not_fit_together(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["doctor", "--json", "--run-dir", str(folder)]
    own = isolated(
        f"mount -t tmpfs none {shlex.quote(str(folder))}; "
        + shlex.join([sys.executable, "-c", OTHERS, *arguments])
    )
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    with ExitStack() as stack:
        started = []
        for rank, command in enumerate(([*DOCTOR, *arguments[1:]], own)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            env |= {name: str(value) for name, value in place.items()}
            if rank == 1:
                # Of a host that is set wrong, the clock that only counts on is right.
                env |= {"LD_PRELOAD": str(library), "FAKETIME": "+60s"}
                env |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            one = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
            stack.callback(one.kill)
            started.append(one)
        outputs = [one.communicate(timeout=TIMEOUT_S) for one in started]
    assert [one.returncode for one in started] == [1, 1], outputs
    assert outputs[1][0] == ""
    told = findings(outputs[0][0])
    of_torch = of(told, "versions", "wrong")
    assert "torch: " in of_torch
    assert "2.12.0 on rank 1" in of_torch
    clocks = of(told, "clocks", "wrong")
    assert "rank 1 on" in clocks
    assert float(clocks.partition(" is ")[2].partition(" s ahead")[0]) == pytest.approx(60, abs=5)
    assert "rank 1 does not see the run_dir in which rank 0" in of(told, "shared folder", "wrong")
    assert not any(one["subject"] == "a real step" for one in told)


def test_a_name_that_does_not_resolve_is_a_finding(tmp_path):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    seen = run(
        [*DOCTOR, "--json"], tmp_path, MASTER_ADDR="rank0.invalid", MASTER_PORT="29511", **place
    )
    assert seen.returncode == 1, seen.stderr
    told = findings(seen.stdout)
    assert "rank0.invalid does not resolve" in of(told, "MASTER_ADDR", "wrong")
    assert "rank0.invalid" in of(told, "ranks", "wrong").partition(" -> ")[0]
