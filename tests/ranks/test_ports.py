"""A port that somebody else has: it is said on all ranks, soon, and nobody there is disturbed."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from dtrain.distributed import rendezvous, store_process
from dtrain.distributed.rendezvous import MET, Job, find_store, serve_apart, serve_store
from dtrain.distributed.store_process import SERVED
from dtrain.errors import LaunchError
from dtrain.testing import rank_environment

SCRIPT = """
import sys
import dtrain
try:
    world = dtrain.init(timeout_s=60)
except dtrain.LaunchError as error:
    print("LaunchError:", error)
    if len(sys.argv) > 1:  # the script tries another port
        import os
        os.environ["MASTER_PORT"] = sys.argv[1]
        world = dtrain.init(timeout_s=60)
        print("rank", world.rank, "is in")
else:
    print("rank", world.rank, "is in", flush=True)
    input()
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def refused(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@pytest.fixture
def at(monkeypatch):
    """Makes this process the rank of a job whose store is at a port; returns what looks for it."""

    def take(ports, rank=1, size=2, identity="", timeout_s=20.0):
        ports = [ports] if isinstance(ports, int) else ports
        for name, value in rank_environment(rank, size, ports[0]).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        job = Job(identity, size, "host7", os.getpid(), "")
        return serve_apart(job, ports, timeout_s)

    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.3)
    monkeypatch.setattr(rendezvous, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(rendezvous, "_MUTE_S", 0.5)
    return take


def serving(identity="", size=2, slurm=""):
    """A store that says it is that of a job of dtrain's."""
    store = serve_store(20)
    job = {"identity": identity, "ranks": size, "host": "host7", "pid": 9, "slurm": slurm}
    store.set(SERVED, json.dumps(job))
    return store


def job(port, *, size=2, arguments=()):
    """Starts the ranks of a job at ``port``, one after the other."""
    for rank in range(size):
        env = os.environ | rank_environment(rank, size, port) | {"OMP_NUM_THREADS": "1"}
        del env["TORCHELASTIC_USE_AGENT_STORE"]
        yield subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def test_who_takes_calls_and_says_nothing_is_no_store(at):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = (
            f"rank 1 has met something that is not this job's rendezvous store at .*:{port}. Set"
        )
        apart = at(port)
        with pytest.raises(LaunchError, match=words):
            apart.wait()
        apart.drop()
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


@pytest.mark.parametrize("theirs", [{"size": 3}, {"identity": "slurm 7.1.0"}], ids=str)
def test_another_job_is_named(at, theirs):
    store = serving(**theirs, slurm="SLURM job 7, step 1")
    ranks = theirs.get("size", 2)
    words = (
        f"rank 1 has met another dtrain job .{ranks} ranks, of which rank 0 is process 9 on host7"
    )
    with pytest.raises(LaunchError, match=f"{words}, SLURM job 7, step 1. at .*:{store.port}"):
        at(store.port).wait()


def test_a_named_job_is_found_at_one_of_the_next_ports(at):
    """Rank 0 has taken the second: at the first there is another step of the allocation."""
    another, own = serving("slurm 7.1.0"), serving("slurm 7.2.0")
    at([another.port, free_port(), own.port], identity="slurm 7.2.0").wait()
    assert os.environ["MASTER_PORT"] == str(own.port)


@pytest.mark.slow
def test_rank_0_takes_the_next_port_and_says_who_has_the_last(at):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        free = free_port()
        apart = at([port, free], rank=0, identity="slurm 7.2.0")
        with closing_down(apart):
            apart.wait()
            assert os.environ["MASTER_PORT"] == str(free)
        apart = at(port, rank=0)
        words = rf"rank 0 on .* at port {port}: Address already in use by process {os.getpid()} \("
        with closing_down(apart), pytest.raises(LaunchError, match=words):
            apart.wait()


def closing_down(apart):
    process = apart._process

    class Down:
        def __enter__(self):
            return apart

        def __exit__(self, *_):
            apart.drop()
            assert process.returncode is not None

    return Down()


def test_nobody_serves(at, capfd, monkeypatch):
    monkeypatch.setattr(rendezvous, "_SAY_S", 0.05)
    port = free_port()
    apart = at(port, timeout_s=0.2)
    with pytest.raises(LaunchError, match=r"nobody has served .* in 0.2 s: rank 0 has not started"):
        apart.wait()
    assert f"nobody serves the rendezvous store at 127.0.0.1:{port} yet" in capfd.readouterr().err
    with pytest.raises(LaunchError, match="nobody has served"):  # a launcher's store
        find_store(None, [port], 0.1)


def test_an_address_of_each_host_itself_is_named(at, monkeypatch):
    apart = at(free_port(), timeout_s=0.1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(LaunchError, match=r"; 127\.0\.0\.1 is, on each host, that host itself"):
        apart.wait()


def test_rank_0_must_be_where_master_addr_leads(at, monkeypatch):
    port = free_port()
    apart = at(port, rank=0)
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 5.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(os, "getpid", lambda: 1)  # the store is another's
    with (
        closing_down(apart),
        pytest.raises(
            LaunchError, match=f"at 127.0.0.1:{port}, where the others look for it, is an"
        ),
    ):
        apart.wait()


@pytest.mark.parametrize("lives", [True, False], ids=["lives", "is gone"])
def test_a_second_rank_0_warns_those_that_gather(lives):
    """Of a store whose rank 0 is gone it waits for the end instead."""
    store, answers = serving(), []
    here = {"identity": "", "ranks": 2, "host": "host7", "pid": os.getpid(), "slurm": ""}
    with subprocess.Popen(["true"]) as ended:
        pass
    store.set(SERVED, json.dumps(here | {"pid": os.getpid() if lives else ended.pid}))
    store_process._visit(store.port, json.dumps(here | {"pid": 5}), f"p/{MET}", answers)
    if not lives:
        assert answers == [True]
        assert not store.check([f"p/{MET}"])
        return
    assert answers == []
    words = json.loads(store.get(f"p/{MET}"))["error"]
    assert f"two jobs of 2 ranks start at the same port {store.port}, or RANK=0 was given" in words
    assert f"process {os.getpid()} on host7 and process 5 on host7 are both rank 0" in words


TASK = """
import os
import dtrain
world = dtrain.init(timeout_s=30)
world.connect().set(f"said by {world.rank}", "here")  # a further connection, as the watchdog's
print(world.comm.gather_objects("all", os.environ["MASTER_PORT"]), os.environ["MASTER_ADDR"])
"""


@pytest.mark.slow
def test_what_the_ranks_have_found_is_what_they_go_on_with():
    """A port that follows from the job is taken, and the node's name is none that resolves."""
    for job in range(1, 1000):
        with suppress(OSError):
            other = socket.create_server(("", 20000 + job))
            break
    srun = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    srun |= {"SLURM_STEP_NODELIST": "no-such-node", "SLURM_STEP_TASKS_PER_NODE": "2"}
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    with other:
        tasks = [
            subprocess.Popen(
                [sys.executable, "-c", TASK],
                env=plain | srun | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        told = [task.communicate(timeout=60)[0].split() for task in tasks]
    ports = {int(port.strip("[',]")) for words in told for port in words[:2]}
    assert len(ports) == 1
    assert ports <= set(range(20001 + job, 20008 + job))
    assert [words[2] for words in told] == ["127.0.0.1"] * 2


@pytest.mark.slow
def test_torchruns_port_may_be_taken_by_the_time_it_is_served():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # who takes calls, and says nothing
        port = silent.getsockname()[1]
        torchrun = {"TORCHELASTIC_RUN_ID": "abc", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env=os.environ | rank_environment(rank, 2, port) | torchrun,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        said = [one.communicate("\n", timeout=60)[0] for one in ranks]
    assert [f"rank {rank} is in" in text for rank, text in enumerate(said)] == [True, True], said


@pytest.mark.slow
def test_a_second_job_at_the_port_of_a_running_one():
    port, another = free_port(), free_port()
    first = list(job(port))
    assert [one.stdout.readline() for one in first] == ["rank 0 is in\n", "rank 1 is in\n"]
    second = list(job(port, arguments=[another]))
    told = [one.communicate(timeout=60)[0] for one in second]
    words = f"another dtrain job (2 ranks, of which rank 0 is process {first[0].pid} on "
    assert "LaunchError: rank 0 on " in told[0]
    assert words in told[0]
    assert "LaunchError: rank 1 has come twice: it is process" in told[1]
    assert [f"rank {rank} is in" in told[rank] for rank in range(2)] == [True, True]
    assert [one.communicate("go\n", timeout=60)[0] for one in first] == ["", ""]
    assert [one.returncode for one in first + second] == [0, 0, 0, 0]
    assert refused(port)  # no store lives on
    assert refused(another)


@pytest.mark.slow
def test_a_job_that_starts_while_another_gathers_at_its_port():
    """Ranks that come later may be of either: both end."""
    port = free_port()
    first = next(job(port))
    until = time.monotonic() + 60
    while refused(port) and time.monotonic() < until:
        threading.Event().wait(0.05)
    second = next(job(port))
    told = [one.communicate(timeout=60)[0] for one in (first, second)]
    both = f"process {first.pid} on {socket.gethostname()} and process {second.pid} on "
    assert f"LaunchError: two jobs of 2 ranks start at the same port {port}, or RANK=0" in told[0]
    assert both in told[0]
    assert "cannot serve the rendezvous store at port" in told[1]
    assert f"of which rank 0 is process {first.pid} on " in told[1]
    assert refused(port)


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_and_the_store_ends():
    port = free_port()
    env = os.environ | rank_environment(0, 2, port) | {"OMP_NUM_THREADS": "1"}
    del env["TORCHELASTIC_USE_AGENT_STORE"]
    script = SCRIPT.replace("timeout_s=60", "timeout_s=1")
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60
    )
    words = "LaunchError: still missing after 1 s (dtrain.init(timeout_s=...)): rank 1 of 2 (WORLD_"
    assert done.stdout.startswith(words)
    assert refused(port)
