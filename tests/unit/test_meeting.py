"""Ranks meet before the group opens: who is missing, twice or unable to work is said on all."""

import json
import os
import socket
import threading

import pytest

from dtrain.distributed import addresses, local_store, meeting, rendezvous
from dtrain.distributed.addresses import addresses_of, unreachable_by_gloo
from dtrain.distributed.meeting import Arrival, meet
from dtrain.distributed.rendezvous import MET, Job, find_address, ports_for, refuse
from dtrain.errors import LaunchError


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Rank 0 does not wait long for ranks that are not there to hear of an error."""
    monkeypatch.setattr(meeting, "_HEARD_S", 0.1)


def arrival(rank, **more):
    given = {"host": "h", "pid": 100 + rank, "network": "n", "unreachable": ""} | more
    return Arrival(rank, **given)


class Counting:
    """A store that counts the calls of one rank."""

    def __init__(self, store):
        self.store, self.calls = store, 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.store, name)


def gather(arrivals, size, *, store=None, timeout_s=20.0, check=lambda all_: None, afresh=True):
    """Has ranks meet, each in a thread; returns each one's local ranks or its error, and store."""
    store = store or local_store()
    stores, told = [Counting(store) for _ in arrivals], [None] * len(arrivals)

    def run(place):
        mine = arrivals[place]
        said = f"WORLD_SIZE={size}"
        try:
            told[place] = meet(stores[place], mine, size, said, timeout_s, check, afresh=afresh)
        except LaunchError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=run, args=[place]) for place in range(len(arrivals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told, stores


def test_all_learn_their_places_on_hosts():
    hosts = ["a", "b", "a", "b", "b"]
    arrivals = [arrival(rank, host=host, network=host) for rank, host in enumerate(hosts)]
    assert gather(arrivals, 5)[0] == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_a_thousand_ranks_cost_a_few_calls_each(monkeypatch):
    """Of those that all are there already, as a rank meets them."""
    store = local_store()
    for rank in range(1, 1000):
        store.set(f"came/{rank}", json.dumps(arrival(rank).__dict__))
    (local,), (mine,) = gather([arrival(0)], 1000, store=store)
    assert local == (0, 1000)
    assert mine.calls == 1 + 2 * 4 + 1  # its own, four batches looked for and read, the verdict
    (local,), (mine,) = gather([arrival(7)], 1000, store=store, afresh=False)
    assert local == (7, 1000)
    assert mine.calls == 3 + (store.get("came/7") != json.dumps(arrival(7).__dict__).encode())


def test_who_is_missing_is_said_now_and_then_and_in_the_end_on_all(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "_SAY_S", 0.1)
    told, _ = gather([arrival(0), arrival(2)], 4, timeout_s=0.5)
    assert told[0] == told[1]
    assert told[0].startswith("still missing after ")
    assert "ranks 1, 3 of 4 (WORLD_SIZE=4). Was each rank started" in told[0]
    lines = capfd.readouterr().err.splitlines()
    words = f"dtrain: rank 0 on {socket.gethostname()}: waiting for ranks 1, 3 of 4 (WORLD_SIZE=4)"
    assert 2 <= len(lines) <= 3  # after 0.1, 0.2 and 0.4 s; rank 2 says nothing
    assert all(line.startswith(words) for line in lines)


def test_of_many_the_first_are_named(monkeypatch):
    told, _ = gather([arrival(0)], 1000, timeout_s=0.05)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more of 1000 (WORLD_SIZE=1000)" in told[0]


def test_who_waits_for_rank_0_says_so(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "_SAY_S", 0.1)
    told, _ = gather([arrival(1), arrival(2)], 3, timeout_s=0.5)
    assert told[0] == told[1]
    assert "rank 0 of 3 (WORLD_SIZE=3)" in told[0]
    assert ": waiting for rank 0 of 3 (WORLD_SIZE=3) (for 0 s; in " in capfd.readouterr().err


def test_who_gives_up_first_decides_for_all(monkeypatch):
    monkeypatch.setattr(rendezvous, "_SAY_S", 0.05)
    store = local_store()
    store.set("came/0", json.dumps(arrival(0).__dict__))
    store.set("waiting", "waiting for rank 2 of 3 (WORLD_SIZE=3)")
    (words,), _ = gather([arrival(1)], 3, store=store, timeout_s=0.2)
    assert "rank 2 of 3" in words
    (late,), _ = gather([arrival(2)], 3, store=store)
    assert late == words


def test_a_rank_that_came_twice_ends_a_meeting_but_no_world():
    store = local_store()
    store.set("came/1", json.dumps(arrival(1, pid=7).__dict__))
    (words,), _ = gather([arrival(1)], 2, store=store)
    assert words.startswith(
        "rank 1 has come twice: it is process 7 on h, and process 101 on h. Two"
    )
    assert json.loads(store.get(MET)) == {"error": words}
    (zero,), _ = gather([arrival(0)], 2, store=store)
    assert zero == words
    begun = local_store()
    begun.set("came/1", json.dumps(arrival(1, pid=7).__dict__))
    begun.set(MET, '{"error": "", "local": [0, 1]}')
    gather([arrival(1)], 2, store=begun)
    assert json.loads(begun.get(MET))["error"] == ""


def test_in_a_launchers_store_an_earlier_attempt_is_no_other_job():
    store = local_store()
    store.set("came/0", json.dumps(arrival(0, pid=7).__dict__))
    assert gather([arrival(0)], 1, store=store, afresh=False)[0] == [(0, 1)]


def test_an_interrupted_rank_tells_the_others(monkeypatch):
    store = local_store()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(meeting, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        meet(store, arrival(1), 3, "WORLD_SIZE=3", 20.0, lambda all_: None, afresh=True)
    (words,), _ = gather([arrival(0)], 3, store=store)
    assert words == "rank 1 on h left before all had come: KeyboardInterrupt()"


def test_what_check_finds_is_told_to_all():
    def check(arrivals):
        raise LaunchError(f"{len(arrivals)} cannot")

    assert gather([arrival(0), arrival(1)], 2, check=check)[0] == ["2 cannot", "2 cannot"]


def test_a_loopback_name_matters_over_several_hosts_only():
    why = "b: its own name resolves to 127.0.1.1, which is loopback (GLOO_SOCKET_IFNAME=eth0)"
    here = [arrival(0, unreachable=why), arrival(1, unreachable=why)]
    assert gather(here, 2)[0] == [(0, 2), (1, 2)]
    apart = [arrival(0, network="a"), arrival(1, network="b", unreachable=why)]
    told, _ = gather(apart, 2)
    assert told[0] == told[1]
    assert f"other hosts could not reach it there: {why}. On those hosts, set GLOO" in told[0]


# ------------------------------------------------------------------------------ names


def resolve_to(monkeypatch, *found):
    def getaddrinfo(name, port, **_):
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.mark.parametrize(
    ("found", "own", "words"),
    [
        ([], [], "does not resolve (Name or service not known)"),
        (["127.0.1.1"], ["127.0.1.1"], "resolves to 127.0.1.1, which is loopback"),
        (["127.0.1.1", "10.1.1.1"], ["127.0.1.1", "10.1.1.1"], "which is loopback"),
        (["10.9.9.9"], [], "resolves to 10.9.9.9, which is no address of its own"),
        (["10.9.9.9", "10.1.1.1"], ["10.1.1.1"], ""),
    ],
)
def test_where_gloo_will_listen(monkeypatch, found, own, words):
    resolve_to(monkeypatch, *found)
    monkeypatch.setattr(addresses, "_is_own", own.__contains__)
    told = unreachable_by_gloo("127.0.0.1")
    assert words in told
    assert bool(told) == bool(words)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert unreachable_by_gloo("127.0.0.1") == ""


def test_a_name_server_that_never_answers_is_not_waited_for(monkeypatch):
    forever = threading.Event()
    monkeypatch.setattr(addresses, "_LOOK_UP_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [] * forever.wait(20))
    assert addresses_of("host7") == ([], "no answer in 0.05 s")
    forever.set()


@pytest.fixture
def rank_1(monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host7", "LOCAL_WORLD_SIZE": "2"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_an_address_that_does_not_resolve_is_said(monkeypatch, rank_1):
    resolve_to(monkeypatch)
    with pytest.raises(LaunchError) as raised:
        find_address(600.0)
    words = (
        "cannot find rank 0: MASTER_ADDR=host7 does not resolve (Name or service not known). Set"
    )
    assert words in str(raised.value)
    assert "`hostname -i`" in str(raised.value)
    assert "add `ADDRESS host7` to /etc/hosts" in str(raised.value)


def test_on_one_host_its_name_need_not_resolve(monkeypatch, rank_1):
    resolve_to(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    find_address(600.0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_pods_name_is_waited_for(monkeypatch, rank_1, capfd):
    answers = iter([([], "no such name"), ([], "no such name"), (["10.0.0.1"], "")])
    monkeypatch.setattr(rendezvous, "addresses_of", lambda name: next(answers))
    monkeypatch.setattr(rendezvous, "_LOOK_UP_AGAIN_S", 0.01)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    find_address(20.0)
    assert capfd.readouterr().err.count("MASTER_ADDR=host7 does not resolve (no such name)") == 1


# ------------------------------------------------------------------------------ whose store


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "launcher", "identity"),
    [
        (SRUN, "slurm", "slurm 7.2.0"),
        (SRUN | {"SLURM_RESTART_COUNT": "3"}, "slurm", "slurm 7.2.3"),
        (SRUN | {"SLURM_HET_JOB_ID": "6"}, "slurm", "slurm 6.2.0"),
        (SRUN | {"PMIX_NAMESPACE": "prte-9@1"}, "mpirun", "PMIX_NAMESPACE=prte-9@1"),
        ({"WORLD_SIZE": "2"}, "mpirun", ""),
    ],
)
def test_what_the_launcher_calls_a_job(env, launcher, identity):
    assert Job.of(env, launcher, by_launcher=True).identity == identity


def test_by_hand_a_job_has_no_name():
    """Ranks of one job may have come by ssh, and know nothing of the allocation."""
    assert Job.of(SRUN, "torchrun", by_launcher=False).identity == ""
    torchrun = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "abc"}
    assert Job.of(torchrun, "torchrun", by_launcher=False).identity == "torchrun abc"
    torchrun["TORCHELASTIC_RUN_ID"] = "none"  # that of --rdzv-backend=static
    assert Job.of(torchrun, "torchrun", by_launcher=False).identity == ""


def test_a_chosen_port_is_kept_and_a_named_job_may_take_the_next():
    named = Job.of(SRUN, "slurm", by_launcher=True)
    assert ports_for(4000, named, chosen=False) == list(range(4000, 4008))
    assert ports_for(4000, named, chosen=True) == [4000]
    nameless = Job.of(SRUN, "torchrun", by_launcher=False)
    assert ports_for(4000, nameless, chosen=False) == [4000]


def test_the_first_end_of_a_meeting_counts():
    store = local_store()
    assert json.loads(refuse(store, "one")) == json.loads(refuse(store, "two")) == {"error": "one"}
