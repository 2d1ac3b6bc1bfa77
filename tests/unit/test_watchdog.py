"""Who is judged how: fake heartbeats in, a rank to blame out. And the activity behind them."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from itertools import pairwise
from traceback import FrameSummary as Line

import pytest
from torch.distributed import HashStore

from dtrain.distributed.activity import (
    ARRIVAL,
    BACKWARD,
    BETWEEN,
    DATA,
    FIRST_DATA,
    LOSS_FN,
    OWN_BACKWARD,
    SAVING,
    STEP,
    UPDATE,
    Activity,
    Heartbeat,
    Phase,
    heartbeat_key,
)
from dtrain.distributed.comm import Comm
from dtrain.distributed.processes import end_process, look_up, started, this_machine
from dtrain.distributed.world import World
from dtrain.errors import ConfigError, Failure, RankMismatch
from dtrain.watchdog.asking import find_lost
from dtrain.watchdog.judgement import LOOKERS, Seen, behind, gives_way, judge, looks, stuck, table
from dtrain.watchdog.reach import Door, call
from dtrain.watchdog.stacks import Stack, main_stack
from dtrain.watchdog.store import Bounded, Others, RunningClock, WatchdogStore
from dtrain.watchdog.thread import HANG_EXIT_CODE, Watch

SIZES = [2, 3, 64]


def waiting(rank, **more):
    """A rank that has waited in backward for longer than its limit."""
    facts = {"step": 8, "phase": "backward", "at": "train.py:9", "waits": True, "quiet_s": 6.0}
    facts |= {"limit_s": 5.0, "inside": True} | more
    return Heartbeat(rank, f"node{rank // 8}", 100 + rank, "", 50, **facts)


def working(rank, **more):
    """A rank that has worked without progress, for less than its limit."""
    return waiting(rank, **{"phase": "data", "at": "", "waits": False, "quiet_s": 3.0} | more)


def world(size, odd, make, **more):
    """All wait but one; as another rank sees them, whose posts are half a second old."""
    posts = [make(odd, **more) if rank == odd else waiting(rank) for rank in range(size)]
    return [Seen(heartbeat, 0.5) for heartbeat in posts]


def changed(seen, rank, **more):
    return [replace(one, **more) if one.heartbeat.rank == rank else one for one in seen]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_works_within_its_limit_is_waited_for(size):
    for odd in (0, size - 1):
        seen = world(size, odd, working)
        assert judge(seen) is None
        assert behind(seen).rank == odd
        # In a save it may take its time; in a debugger, all the time.
        for limit_s in (300.0, math.inf):
            slow = world(size, odd, working, quiet_s=299.0, limit_s=limit_s)
            assert judge(slow) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("process", "words"), [("gone", "its process is gone"), ("stopped", "its process is stopped")]
)
def test_a_process_that_does_not_run_is_named_at_once(size, process, words):
    for odd in (0, size - 1):
        for make in (working, waiting):
            posts = world(size, odd, make, limit_s=300.0)
            seen = changed(posts, odd, process=process, stopped_s=3.9)
            # For a moment a process may be stopped; the ranks of a job are, and go on, in turn.
            assert (judge(seen) is None) == (process == "stopped")
            blame = judge(changed(seen, odd, stopped_s=4.0))
            assert blame.heartbeat.rank == odd
            assert words in blame.message
            failure = str(blame.failure())
            assert failure.startswith(f"rank {odd} on node{odd // 8} failed in ")
            assert "at step 8: HangError: its process is " in failure


@pytest.mark.parametrize("size", SIZES)
def test_a_host_that_does_not_answer_is_named_at_once(size):
    odd = size // 2
    seen = changed(world(size, odd, working, limit_s=300.0), odd, stale_s=5.5)
    assert judge(changed(seen, odd, process="runs")) is None  # a call holds its interpreter
    blame = judge(changed(seen, odd, process="away"))
    assert blame.heartbeat.rank == odd
    assert blame.message.startswith("nothing was heard of it for 5.5 s, and its host does not")


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_posts_nothing_is_named_after_its_own_limit(size):
    odd = size // 2
    seen = world(size, odd, working)
    assert judge(changed(seen, odd, stale_s=4.9)) is None
    blame = judge(changed(seen, odd, stale_s=5.1))
    assert blame.heartbeat.rank == odd
    assert "nothing was heard of it for 5.1 s" in blame.message
    # Reading a large file may hold the interpreter, in a slow phase.
    slow = world(size, odd, working, limit_s=300.0)
    assert judge(changed(slow, odd, stale_s=60.0)) is None
    held = judge(changed(slow, odd, stale_s=301.0, process="runs"))
    assert (held.held, held.slow) == (True, True)
    debugged = world(size, odd, working, limit_s=math.inf)
    assert judge(changed(debugged, odd, stale_s=1e6)) is None
    # Outside of fit nobody posts; it may come back.
    outside = world(size, odd, working, inside=False)
    assert judge(changed(outside, odd, stale_s=1e6)) is None
    assert behind(outside).rank == odd


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_wait_for_one_another_are_all_shown(size):
    odd = size - 1
    seen = world(size, odd, waiting, step=7, phase="on_step_end", at="mine.py:3")
    blame = judge(seen)
    assert blame.heartbeat.rank == odd
    assert "all ranks wait for one another, and none has moved for 6.0 s" in blame.message
    lines = blame.table.splitlines()
    assert len(lines) == 2
    assert lines[1] == f"  rank {odd} on node{odd // 8}: step 7 in on_step_end (mine.py:3)"
    if size == 64:
        assert lines[0] == (
            "  ranks 0, 1, 2, 3, 4, 5, 6, 7 and 55 more on node0, node1, node2 and others: "
            "step 8 in backward (train.py:9)"
        )
    assert blame.table in str(blame.failure())
    # One that has not waited for that long may just have come.
    assert judge(world(size, odd, waiting, quiet_s=4.0)) is None
    assert judge(world(size, odd, waiting, limit_s=300.0)) is None
    assert judge(world(size, odd, waiting, inside=False)) is None


def alone(rank, **more):
    """A rank that sits in a call of its own, in a hook of step 7."""
    facts = {"step": 7, "order": 6, "phase": "on_step_end", "at": "mine.py:3", "limit_s": 300.0}
    return waiting(rank, **facts | {"call": "barrier at mine.py:3"} | more)


def ahead(rank, **more):
    """A rank in the next step."""
    return working(rank, **{"order": 2, "quiet_s": 6.0, "limit_s": 300.0} | more)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"step": 7, "order": 9, "phase": "evaluation"},
        {"step": 7, "order": 0, "waits": True, "call": "verb", "phase": "comm 'metrics'"},
        {"step": 6, "order": 0, "waits": True, "call": "barrier at mine.py:9"},
    ],
)
def test_a_call_that_others_have_passed_or_that_is_not_theirs_is_an_error_at_once(size, others):
    posts = [ahead(rank, **others) for rank in range(size - 1)] + [alone(size - 1)]
    blame = judge([Seen(post, 0.5) for post in posts])
    assert blame.kind is RankMismatch
    assert not blame.slow
    assert "they are in different calls" in blame.message
    assert f"rank {size - 1} on node{(size - 1) // 8}: step 7 in on_step_end" in blame.table
    if size > 2 or not others.get("call"):
        assert blame.heartbeat.rank == size - 1
    # Two of three on the same line, too.
    if size > 2:
        seen = [Seen(post, 0.5) for post in [*posts[:-2], alone(size - 2), alone(size - 1)]]
        assert judge(seen).kind is RankMismatch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "other",
    [
        {"step": 7, "order": 3},  # behind, for 20 s
        {"step": 6, "order": 9},
        {"step": 7, "order": 6},  # at the same place: in an earlier hook?
        {"order": 0, "step": 7},  # nobody can tell
        {"quiet_s": 3.0},  # it moves, and what was posted may be old
        {"inside": False},
        {"stale_s": 3.0},  # it was there, and holds its interpreter since
        {"step": 7, "order": 6, "waits": True, "call": "barrier at mine.py:3"},  # the same call
        {"step": 8, "order": 3, "waits": True, "call": "", "inside": False},
    ],
)
def test_a_rank_that_may_still_come_is_waited_for(size, other):
    stale_s = other.get("stale_s", 0.5)
    facts = {name: fact for name, fact in other.items() if name != "stale_s"}
    seen = [Seen(alone(rank), 0.5) for rank in range(size - 1)]
    assert judge([*seen, Seen(ahead(size - 1, **facts), stale_s)]) is None


def test_all_ranks_in_a_large_reduction_are_waited_for():
    posts = [waiting(rank, call="backward", order=3, limit_s=300.0) for rank in range(3)]
    assert judge([Seen(post, 0.5) for post in posts]) is None
    assert behind([Seen(post, 0.5) for post in posts]) is None


def test_places_of_a_step_follow_one_another():
    activity = Activity()
    orders = []
    activity.begin_step(3)
    for phase in (STEP, DATA, LOSS_FN, OWN_BACKWARD, DATA, LOSS_FN, BACKWARD, ARRIVAL, UPDATE):
        activity.enter(phase)
        orders.append(activity.order)
    activity.end_lap(BETWEEN)
    activity.enter(Phase("comm 'x'", waits=True))  # stays there
    orders.append(activity.order)
    assert orders == sorted(orders)
    assert orders[1] == orders[5]  # micro-batches come again and again
    activity.restart()
    assert activity.order == 0


def test_a_world_where_nothing_is_known_is_left_alone():
    assert judge([]) is None
    assert judge([Seen(waiting(0))]) is None  # alone, nobody else is at fault
    assert behind([]) is None


def test_a_rank_further_behind_is_looked_at_first():
    mine = working(0, quiet_s=6.0)
    last = working(1, step=7, quiet_s=6.0)
    assert gives_way(mine, [Seen(mine), Seen(last)])
    assert not gives_way(last, [Seen(mine), Seen(last)])
    assert not gives_way(mine, [Seen(mine), Seen(working(1, quiet_s=6.0))])
    assert not gives_way(mine, [Seen(mine), Seen(replace(last, quiet_s=0.1))])  # it moves
    assert not gives_way(mine, [])


def test_a_rank_on_itself():
    blame = stuck(working(3, quiet_s=5.5, at="train.py:4"))
    assert str(blame.failure()) == (
        "rank 3 on node0 failed in data at step 8: HangError: it works without any progress for "
        "5.5 s, where its limit is 5 s (train.py:4)"
    )


def test_posts_travel_as_json():
    for heartbeat in (waiting(1), working(2, limit_s=math.inf)):
        assert Heartbeat.from_json(heartbeat.to_json()) == heartbeat
        assert Heartbeat.from_json(heartbeat.to_json().encode()) == heartbeat
    assert table([waiting(0), working(1)]).splitlines() == [
        "  rank 0 on node0: step 8 in backward (train.py:9)",
        "  rank 1 on node0: step 8 in data",
    ]


def test_the_kernel_knows_what_became_of_a_process():
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    machine = this_machine()
    heartbeat = replace(waiting(1), pid=child.pid, machine=machine)
    try:
        assert look_up(heartbeat, machine) == "runs"
        assert (
            look_up(heartbeat, "another")
            == look_up(replace(heartbeat, machine=""), "")
            == "unknown"
        )
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert look_up(heartbeat, machine) == "stopped"
    finally:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert look_up(heartbeat, machine) == "gone"  # nobody has taken its exit code yet
        child.communicate()
    assert look_up(heartbeat, machine) == "gone"


# ----------------------------------------------------------------------------- the activity


def test_limits_follow_the_place_and_the_slowest_recent_step():
    activity = Activity()
    assert activity.limit_s(5, 300) == 300  # the start
    activity.begin_step(0)
    activity.enter(BACKWARD)
    assert activity.limit_s(5, 300) == 300  # the first step
    activity.steps._began -= 100.0
    activity.end_lap(BETWEEN)
    assert activity.limit_s(5, 300) == 300  # between steps, where anything may take long
    activity.begin_step(1)
    assert activity.step == 1
    activity.enter(FIRST_DATA)
    assert activity.limit_s(5, 300) == 300
    activity.steps._began -= 100.0
    activity.has_data(first=True)  # what workers' start took counts as little as the first step
    assert activity.phase is LOSS_FN
    assert activity.limit_s(5, 300) == 5
    activity.steps._began -= 2.0
    activity.end_lap(BETWEEN)
    activity.begin_step(2)
    assert 20 <= activity.limit_s(5, 300) < 21
    for step in range(3, 300):  # forgotten by and by
        activity.begin_step(step)
        activity.end_lap(BETWEEN)
    activity.begin_step(300)
    assert activity.limit_s(5, 300) == 5
    assert activity.limit_s(400, 300) == 400
    before = activity.enter(SAVING)
    assert activity.limit_s(5, 300) == 300
    assert activity.limit_s(400, 300) == 400
    activity.enter(before)
    activity.restart()
    assert activity.limit_s(5, 300) == 300


def test_what_is_slow_for_once_leaves_the_limit_as_it_is():
    activity = Activity()
    for step in range(2):
        activity.begin_step(step)
        with activity.long_operation("writing a trace"):
            assert activity.limit_s(5, 300) == 300
            assert activity.phase.name == "writing a trace"
            threading.Event().wait(0.1)
        assert activity.limit_s(5, 300) == (5 if step else 300)
        activity.end_lap(BETWEEN)
    assert activity.steps.slowest_s < 0.1


def test_batches_of_an_evaluation_have_a_limit_of_their_own():
    activity = Activity()
    activity.restart_batches()
    activity.begin_batch()
    assert activity.limit_s(5, 300) == 300
    activity.end_lap(BETWEEN)
    activity.begin_batch()
    assert activity.limit_s(5, 300) == 5
    assert activity.phase.name == "data of an evaluation"


def test_every_sign_of_progress_counts():
    activity = Activity()
    signs = activity.signs
    assert activity.enter(DATA) is not DATA
    assert activity.enter(DATA) is DATA
    assert activity.signs == signs + 2


def test_what_another_rank_broke_is_told_from_what_broke_here():
    comm = Comm()
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4")
    mine = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert comm.may_be_broken(closed)
    assert not comm.may_be_broken(mine)
    assert not comm.may_be_broken(ValueError("gloo"))
    assert not comm.may_be_broken(ConfigError("gloo"))
    comm.activity.enter(BACKWARD)
    assert comm.may_be_broken(mine)


# ----------------------------------------------------------------------------- stacks and calls


def test_the_main_thread_is_read_from_another_one():
    found = []
    thread = threading.Thread(target=lambda: found.append(main_stack()))
    thread.start()
    thread.join()
    (stack,) = found
    assert not stack.compiles
    assert not stack.debugged
    assert not stack.in_collective
    assert "test_watchdog.py:" in stack.at
    assert "in test_the_main_thread_is_read_from_another_one" in stack.text()


@pytest.mark.parametrize("file", ["/lib/python3.11/pdb.py", "/x/pydevd_bundle/pydevd.py"])
def test_a_debugger_is_seen(file):
    assert Stack((Line("/lib/python3.11/cmd.py", 1, "cmdloop"), Line(file, 3, "x"))).debugged


def test_a_prompt_is_seen(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("lr = 0.1\nanswer = input('go on? ')\n")
    assert Stack((Line(str(script), 2, "<module>"),)).debugged
    assert not Stack((Line(str(script), 1, "<module>"),)).debugged


def test_a_raw_collective_is_seen():
    site = "/x/site-packages/torch/distributed/distributed_c10d.py"
    stack = Stack((Line(site, 10, "barrier"), Line("/home/me/train.py", 4, "hook")))
    assert stack.in_collective
    assert stack.call == "barrier at /home/me/train.py:4"
    # Who sends may be done before another comes; who has passed it proves nothing.
    assert Stack((Line(site, 10, "broadcast"), *stack.lines[1:])).call == ""
    assert Stack(stack.lines[1:]).call == ""
    assert stack.at == "/home/me/train.py:4"
    assert not Stack(stack.lines[1:]).in_collective


def test_a_call_that_does_not_come_back_is_given_up():
    calls, gate = Bounded(), threading.Event()
    assert calls.call(lambda: 3, 5) == 3
    with pytest.raises(KeyError):
        calls.call(lambda: {}["x"], 5)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.1 s"):
        calls.call(gate.wait, 0.1)
    with pytest.raises(TimeoutError, match="no answer to an earlier call"):
        calls.call(lambda: 3, 0.1)
    gate.set()
    assert calls.call(lambda: 3, 5) == 3


def test_the_clock_stands_still_while_the_process_does(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dtrain.watchdog.store.time.monotonic", lambda: now[0])
    clock = RunningClock()
    for seconds, ran_s in ((0.5, 0.5), (45.0, 2.0), (0.5, 2.5), (3600.0, 4.0)):
        now[0] += seconds
        assert clock.now() == pytest.approx(ran_s)


def test_only_who_is_stopped_for_long_is_ended():
    """And only if it is that very process."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    machine = this_machine()
    child.stdout.readline()
    one = replace(waiting(1), pid=child.pid, machine=machine, started=started(child.pid))
    try:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        other = replace(one, started=one.started + 1)
        assert look_up(other, machine) == "gone"
        for wrong in (other, replace(one, started=0), replace(one, machine="another")):
            end_process(wrong, machine, held=False)
            assert look_up(one, machine) == "stopped"
        os.kill(child.pid, signal.SIGCONT)
        os.waitid(os.P_PID, child.pid, os.WCONTINUED)
        end_process(one, machine)  # it went on meanwhile
        assert look_up(one, machine) == "runs"
        end_process(one, machine, held=True)
        assert child.wait(10) == -signal.SIGABRT
    finally:
        child.kill()
        child.communicate()


def test_a_process_is_called_by_way_of_its_kernel(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    door = Door()
    assert door.address in ("127.0.0.1", "::1")
    place = door.address, door.port
    assert call({3: place, 5: place}) == {3: "runs", 5: "runs"}
    door.clear()
    assert call({3: place}) == {3: "runs"}  # nobody takes it
    door.close()
    assert call({3: place}) == {3: "gone"}


def test_silent_ranks_on_other_hosts_are_called_and_not_too_often(monkeypatch):
    called = []

    def answer(places):
        called.append(sorted(places))
        return {rank: "runs" if rank == 1 else "away" for rank in places}

    monkeypatch.setattr("dtrain.watchdog.store.call_places", answer)
    far = [replace(waiting(rank), address="10.0.0.2", port=7) for rank in (1, 2)]
    store = CountingStore([waiting(0), *far])
    others = Others(3, "a")
    others.read(store, 0.0)
    assert [one.process for one in others.seen(5.0)] == ["unknown"] * 3
    assert [one.process for one in others.seen(5.1)] == ["unknown", "runs", "away"]
    assert [one.process for one in others.seen(6.0)] == ["unknown", "runs", "away"]
    assert called == [[1, 2]]
    others.seen(16.0)
    assert called == [[1, 2], [1]]
    store.set(heartbeat_key(2), replace(far[1], number=51).to_json())
    others.read(store, 17.0)
    assert others.seen(17.0)[2].process == "unknown"  # it has posted


def test_a_connection_that_comes_late_is_the_only_one(monkeypatch):
    monkeypatch.setattr("dtrain.watchdog.store.CALL_S", 0.1)
    opened, gate = [], threading.Event()

    def connect():
        gate.wait()
        opened.append(HashStore())
        return opened[-1]

    made = World(0, 0, 2, "host", None, "none", "solo", 0, Comm(size=2))
    told = WatchdogStore(made, connect)
    told.open()
    assert told.lost == "connect: no answer in 0.1 s"
    gate.set()
    told.open()  # waits for the one under way first
    assert (told.lost, len(opened)) == ("", 1)
    assert told.store is opened[0]


def test_the_exit_code_says_that_it_failed():
    assert 0 < HANG_EXIT_CODE < 126


@pytest.mark.parametrize("size", [65, 100, 1000, 1024, 16384])
def test_in_a_large_world_few_ranks_look_at_all_others(size):
    at_once = [rank for rank in range(size) if not looks(rank, size).after_s]
    assert LOOKERS / 2 < len(at_once) <= LOOKERS
    assert min(b - a for a, b in pairwise(at_once)) >= size // LOOKERS
    # Should those be lost, the others follow, one by one.
    later = [looks(rank, size).after_s for rank in range(size) if rank not in at_once]
    assert min(b - a for a, b in pairwise(later)) >= 1
    assert min(later) >= 1


def test_in_a_small_world_all_look():
    assert all(looks(rank, size).after_s == 0 for size in (1, 2, 64) for rank in range(size))


class CountingStore(HashStore):
    """Counts what is read at once."""

    def __init__(self, posts):
        super().__init__()
        self.read = []
        for heartbeat in posts:
            self.set(heartbeat_key(heartbeat.rank), heartbeat.to_json())

    def multi_get(self, keys):
        self.read.append(len(keys))
        return super().multi_get(keys)


def watch_of(rank, size, store):
    made = World(rank, 0, size, "host", None, "none", "solo", 0, Comm(rank=rank, size=size))
    watch = Watch(made, 5.0, lambda: store)
    watch.world = made
    watch.told.store = store
    return watch


def test_a_rank_that_waits_leaves_looking_to_others_in_a_large_world():
    size = 600
    store = CountingStore([waiting(rank) for rank in range(size)])
    looker, other = watch_of(0, size, store), watch_of(1, size, store)
    assert len(looker._look(waiting(0, quiet_s=3.0))) == size
    # A few hundred at a time: the store's work for one call grows with the square of its keys.
    assert store.read == [256, 256, size - 2 * 256]
    assert other._look(waiting(1, quiet_s=3.0)) == []
    assert len(store.read) == 3
    assert len(other._look(waiting(1, quiet_s=4.0))) == size  # nobody has found anything
    assert len(watch_of(2, size, store)._look(working(2, quiet_s=6.0))) == size  # it is the one


LEFT = json.dumps(asdict(Failure(5, "h", "x", 1, "k", "m", "l")))  # by rank 5, in the store


def test_who_comes_late_waits_for_what_the_first_find():
    size = 600
    store = CountingStore([waiting(rank) for rank in range(size)])
    store.add("looking", LOOKERS)
    store.set("failure", LEFT)
    watch = watch_of(7, size, store)
    assert find_lost(watch.told, watch.world).rank == 5
    assert store.read == []
    assert int(store.add("looking", 0)) == LOOKERS + 1


def test_thousands_of_ranks_do_not_ask_in_each_tick_whether_one_has_failed():
    store = HashStore()
    store.set("failure", LEFT)
    for size, asks in ((2, [0.5, 1.0, 1.5]), (4096, [0.5, 1.0, 1.5]), (16384, [0.5, 2.5])):
        watch = watch_of(1, size, store)
        heard = []
        for tick in range(1, 6 if size == 16384 else 4):
            watch._clock = tick * 0.5
            heard += [watch._clock] * (watch._ask_for_failure() is not None)
        assert heard == asks
