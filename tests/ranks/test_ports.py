"""A port that somebody else has: it is said on all ranks, soon, and nobody there is disturbed."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from dtrain.distributed import rendezvous
from dtrain.distributed.rendezvous import serve_apart, serve_store
from dtrain.distributed.store_process import SERVED
from dtrain.errors import LaunchError
from dtrain.testing import rank_environment

SCRIPT = """
import dtrain
try:
    world = dtrain.init(timeout_s=60)
except dtrain.LaunchError as error:
    print("LaunchError:", error)
else:
    print("rank", world.rank, "is in")
    input()
"""


@pytest.fixture
def at(monkeypatch):
    """Makes this process the rank of a job whose store is at a port."""

    def take(port, rank=1, size=2):
        for name, value in rank_environment(rank, size, port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        return serve_apart(timeout_s=20)

    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.3)
    return take


def job(port, size=2):
    """Starts the ranks of a job at ``port``, one after the other."""
    for rank in range(size):
        env = os.environ | rank_environment(rank, size, port) | {"OMP_NUM_THREADS": "1"}
        del env["TORCHELASTIC_USE_AGENT_STORE"]
        yield subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def test_who_takes_calls_and_says_nothing_is_no_store(at):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = f"rank 1 has met something that is not this job's rendezvous store at .*:{port}. Is"
        with pytest.raises(LaunchError, match=words):
            at(port).wait()
        assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def test_who_hangs_up_is_no_store(at):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up():
            while True:
                try:
                    other.accept()[0].close()
                except OSError:
                    return

        hangs_up = threading.Thread(target=hang_up)
        hangs_up.start()
        try:
            with pytest.raises(LaunchError, match="rank 1 has met something that is not"):
                at(other.getsockname()[1]).wait()
        finally:
            other.shutdown(socket.SHUT_RDWR)
            hangs_up.join(10)


def test_a_store_of_torchs_own_is_not_this_jobs(at):
    store = serve_store(20)
    with pytest.raises(LaunchError, match="not this job's rendezvous store"):
        at(store.port).wait()


def test_each_rank_comes_once(at, monkeypatch):
    store = serve_store(20)
    store.set(SERVED, "yes")
    at(store.port).wait()
    at(store.port).wait()  # the same process
    with pytest.raises(LaunchError, match=r"another job of dtrain's \(2 ranks; "):
        at(store.port, size=3).wait()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(LaunchError, match=rf"\(2 ranks; rank 1 is process \d+ on .*:{store.port}"):
        at(store.port).wait()


def test_nobody_serves(at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at(port)
    with pytest.raises(LaunchError, match=r"nobody has served .* in 0.2 s: rank 0 has not started"):
        rendezvous._come_in(0.2)


@pytest.mark.slow
def test_a_second_job_at_the_port_of_a_running_one():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = list(job(port))
    assert [one.stdout.readline() for one in first] == ["rank 0 is in\n", "rank 1 is in\n"]
    second = list(job(port))
    told = [one.communicate(timeout=60)[0] for one in second]
    assert "LaunchError: the rendezvous store cannot serve at port" in told[0]
    assert "LaunchError: rank 1 has met another job of dtrain's (2 ranks; rank 1 is" in told[1]
    assert [one.communicate("go\n", timeout=60)[0] for one in first] == ["", ""]
    assert [one.returncode for one in first] == [0, 0]
