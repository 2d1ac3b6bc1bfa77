"""Law 3: a rank that hangs is named on every rank within seconds, and the run ends.

Each case takes a few seconds to notice the hang, and some to end; a rank that is stopped is killed
once the others have ended, by a process that waits for them.
"""

import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import planted
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.distributed.activity import Heartbeat, heartbeat_key
from dtrain.errors import RemoteError
from dtrain.testing import run_outcomes, run_processes
from dtrain.watchdog.thread import HANG_EXIT_CODE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HERE, HERE_IN = Path(__file__).name, Path(__file__).parent
HOST = re.escape(socket.gethostname())
TIMEOUT_S = 40.0
NAMED_S = 10.0
STEP = 6

# Waits for processes to end, tells when they had, and kills another.
REAPER = """
import os, select, signal, sys, time
folder, doomed, *others = sys.argv[1:]
doomed = [int(pid) for pid in doomed.split(",")]
began = time.monotonic()
handles = [os.pidfd_open(int(pid)) for pid in others]
for handle in handles:
    select.select([handle], [], [], 35)
with open(folder + "/ended", "w") as file:
    file.write(str(time.monotonic() - began))
for pid in doomed:
    os.kill(pid, signal.SIGKILL)
"""


SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from test_no_silent_hang import hang_under_launcher
hang_under_launcher(int(sys.argv[2]), sys.argv[3], sys.argv[4])
"""


def line_of(mark):
    """The number of the line of this file that ends with a mark, as reports show it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return f"{HERE}:{number}"


# -- what a rank does that hangs -------------------------------------------------------------------


def heard_in(phase):
    """Returns once this rank has posted that it is in ``phase``."""
    world = dtrain.init()
    store = world.connect()
    deadline = time.monotonic() + 10
    while Heartbeat.from_json(store.get(heartbeat_key(world.rank))).phase != phase:
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def stop(folder, pids, more=()):
    heard_in("on_step_end")
    others = [str(pid) for pid in pids if pid != os.getpid()]
    doomed = ",".join(str(pid) for pid in (*more, os.getpid()))
    arguments = [sys.executable, "-c", REAPER, folder, doomed, *others]
    reaper = subprocess.Popen(arguments, start_new_session=True)
    Path(folder, "reaper").write_text(str(reaper.pid))
    for pid in (*more, os.getpid()):
        os.kill(pid, signal.SIGSTOP)


def stop_with_store(folder, pids):
    """As if rank 0's host had frozen, with the store that is served there."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (store,) = [
        int(pid)
        for pid in children
        if "store_process.py" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    stop(folder, pids, [store])


def kill(folder, pids):
    heard_in("on_step_end")
    os.kill(os.getpid(), signal.SIGKILL)


def loop_forever(folder, pids):
    while True:
        fetched = len(pids)  # the endless loop
        del fetched


def hold_the_interpreter(folder, pids):
    heard_in("on_step_end")
    ctypes.PyDLL(None).sleep(60)  # the call in C


def meet_alone(folder, pids):
    dist.barrier()  # a collective that the others do not make


def meet_alone_by_a_verb(folder, pids):
    dtrain.init().comm.barrier("alone")  # a verb that the others do not call


ACTS = {
    "stopped": stop,
    "stopped with the store": stop_with_store,
    "killed": kill,
    "loops": loop_forever,
    "holds": hold_the_interpreter,
    "meets": meet_alone,
    "meets by a verb": meet_alone_by_a_verb,
}


class Hangs(dtrain.Callback):
    """One rank does something in a step's end, and does not come back."""

    def __init__(self, act, rank, folder):
        self.act, self.rank, self.folder = ACTS[act], rank, folder

    def on_fit_start(self, ctx):
        self.pids = ctx.comm.gather_objects("pids", os.getpid())

    def on_step_end(self, ctx, step):
        if step.number == STEP and dtrain.init().rank == self.rank:
            self.act(self.folder, self.pids)


def dataset():
    x = torch.randn(640, 3, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x.sum(1, keepdim=True))


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def train(
    callbacks=(),
    data=None,
    *,
    loss_fn=mse,
    max_steps=40,
    hang_after_s=300.0,
    run_dir=None,
    **options,
):
    dtrain.init(seed=1)
    model = nn.Linear(3, 1)
    trainer = dtrain.Trainer(
        model,
        SGD(model.parameters(), lr=0.01),
        loss_fn,
        callbacks=callbacks,
        sinks=[],
        run_dir=run_dir,
        hang_after_s=hang_after_s,
    )
    data = dataset() if data is None else data
    return trainer.fit(data, **{"batch_size": 16, "max_steps": max_steps} | options)


def hang(act, rank, folder, hang_after_s=300.0):
    return train([Hangs(act, rank, folder)], hang_after_s=hang_after_s)


def hang_in_the_loader(rank, folder):
    data = dtrain.Data(Stops(rank, folder), batch_size=16, num_workers=1)
    return train(data=data, batch_size=None)


def ends(pid):
    """Whether a process, which may be about to end, does so within seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([handle], [], [], 10)
    os.close(handle)
    return bool(ended)


def seconds_until_ended(folder):
    """What the reaper has measured, which others' watchdogs may have forestalled."""
    assert ends(int((folder / "reaper").read_text()))
    return float((folder / "ended").read_text())


class Stops:
    """A dataset whose worker stops itself on one rank, some steps into the epoch."""

    def __init__(self, rank, folder):
        self.rank, self.folder = rank, folder
        self.fetched = 0

    def __len__(self):
        return 640

    def __getitem__(self, index):
        self.fetched += 1
        if self.fetched == 1:
            Path(self.folder, f"worker-{os.environ['RANK']}").write_text(str(os.getpid()))
        if self.fetched == 240 and int(os.environ["RANK"]) == self.rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        x = torch.full((3,), float(index))
        return x, x.sum(0, keepdim=True)


# -- what is told ----------------------------------------------------------------------------------


def told(outcome):
    """All that a rank said: what it printed, and what it raised."""
    return f"{outcome.output}\n{outcome.error}\n{outcome.trace}"


def assert_ended(outcomes, doomed):
    for outcome in outcomes:
        assert outcome.exitcode not in (0, None), told(outcome)
        if outcome.rank != doomed:
            # By the watchdog, or by raising what it had found out.
            raised = isinstance(outcome.error, RemoteError) and outcome.exitcode == 1
            assert raised or outcome.exitcode == HANG_EXIT_CODE, told(outcome)


def assert_named(outcomes, doomed, words, *, on_doomed=False, phase="on_step_end", step=str(STEP)):
    assert_ended(outcomes, doomed)
    for outcome in outcomes:
        if outcome.rank == doomed and not on_doomed:
            continue
        said = told(outcome)
        if outcome.rank == doomed:
            assert re.search(rf"rank {doomed} on {HOST} \(pid \d+\)", said), said
            assert f"step {step} in {phase}" in said, said
        else:
            named = rf"rank {doomed} on {HOST} failed in {phase} at step {step}: HangError: "
            assert re.search(named, said), said
        for word in words:
            assert word in said, said


def launch(fn, size, *args):
    began = time.monotonic()
    outcomes = run_outcomes(fn, size, *args, timeout_s=TIMEOUT_S + 2 * size)
    for outcome in outcomes:
        print(f"-- rank {outcome.rank}: code {outcome.exitcode}\n{told(outcome)}")
    print(f"took {time.monotonic() - began:.1f} s")
    return outcomes


@pytest.mark.parametrize(
    ("size", "rank"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (16, 5), (32, 31)]
)
def test_a_stopped_rank(tmp_path, size, rank):
    outcomes = launch(hang, size, "stopped", rank, str(tmp_path))
    assert outcomes[rank].exitcode == -signal.SIGKILL  # by the reaper, who waited for the others
    assert_named(outcomes, rank, ["its process is stopped", f"({__file__}:"])
    took = seconds_until_ended(tmp_path)
    print(f"all others had ended after {took:.1f} s")
    if size < 16:
        assert took <= NAMED_S


def hang_in_a_run(rank, folder):
    callbacks = [Hangs("stopped", rank, folder), Checkpoint(every_steps=2)]
    return train(callbacks, run_dir=Path(folder, "run"))


def test_what_the_watchdog_ends_is_in_the_runs_files(tmp_path):
    outcomes = launch(hang_in_a_run, 2, 1, str(tmp_path))
    assert outcomes[0].exitcode == HANG_EXIT_CODE
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["saved"], status["failures"]) == ("failed", STEP, 1)
    assert re.match(
        rf"failed at step \d+ \(rank 1 on {HOST} failed in on_step_end", status["sentence"]
    )
    assert "HangError: its process is stopped" in status["sentence"]


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_killed_rank(tmp_path, size, rank):
    outcomes = launch(hang, size, "killed", rank, str(tmp_path))
    assert outcomes[rank].exitcode == -signal.SIGKILL
    assert_named(outcomes, rank, ["its process is gone", f"({__file__}:"])


def test_an_endless_loop(tmp_path):
    outcomes = launch(hang, 2, "loops", 1, str(tmp_path), 5.0)
    assert outcomes[1].exitcode == HANG_EXIT_CODE
    assert_named(outcomes, 1, ["works without any progress for "], on_doomed=True)
    name, number = line_of("the endless loop").split(":")
    lines = "|".join(str(int(number) + offset) for offset in (-1, 0, 1))
    for outcome in outcomes:
        assert re.search(rf"{name}:({lines})\)", told(outcome)), told(outcome)
    assert " in loop_forever" in outcomes[1].output


def test_a_call_that_holds_the_interpreter(tmp_path):
    outcomes = launch(hang, 2, "holds", 1, str(tmp_path), 5.0)
    assert outcomes[1].exitcode == -signal.SIGABRT  # from the other one, on the same host
    assert "Fatal Python error: Aborted" in outcomes[1].output
    assert f'{HERE}", line {line_of("the call in C").split(":")[1]} in hold' in outcomes[1].output
    assert_named(outcomes, 1, [f"({__file__}:"])


@pytest.mark.parametrize(
    ("act", "mark"),
    [
        ("meets", "a collective that the others do not make"),
        ("meets by a verb", "a verb that the others do not call"),
    ],
)
def test_a_collective_that_one_rank_makes_alone(tmp_path, act, mark):
    outcomes = launch(hang, 2, act, 1, str(tmp_path))
    alone = line_of(mark)
    assert_ended(outcomes, 1)
    for outcome in outcomes:
        said = told(outcome)
        assert "all ranks wait for one another, for they are in different calls" in said, said
        table = rf"  rank 1 on {HOST}: step {STEP} in (on_step_end|comm 'alone') \(.*{alone}\)"
        assert re.search(table, said), said
        assert re.search(rf"  rank 0 on {HOST}: step {STEP + 1} in backward", said), said


def test_a_stopped_loader_worker(tmp_path):
    outcomes = launch(hang_in_the_loader, 2, 1, str(tmp_path))
    assert outcomes[1].exitcode == HANG_EXIT_CODE
    step = r"[1-9]\d*"
    assert_ended(outcomes, 1)
    named = rf"rank 1 on {HOST} failed in data at step {step}: HangError: "
    assert re.search(named, told(outcomes[0])), told(outcomes[0])
    assert re.search(rf"step {step} in data \({__file__}:\d+\)", outcomes[1].output)
    assert "data/map_feed.py" in outcomes[1].output  # the stack
    worker = (tmp_path / "worker-1").read_text()
    assert f"its process {worker} is stopped" in told(outcomes[0]), told(outcomes[0])
    for rank in range(2):
        assert ends(int((tmp_path / f"worker-{rank}").read_text()))


# -- slow, and not stuck ---------------------------------------------------------------------------


class Slow(dtrain.Callback):
    """Steps of varying length, and an evaluation longer than the limit, with long batches."""

    def wait(self, seconds):
        threading.Event().wait(seconds)

    def on_step_start(self, ctx, step):
        rank = dtrain.init().rank
        if step.number == 0:
            self.wait(4.0 * rank)  # the first step may take long
        elif step.number == 3:
            self.wait(0.9 * (1 - rank))
        elif step.number == 6:
            self.wait(2.5 * rank)  # more than the limit, less than ten times the slowest step
        elif step.number == 7:
            for _ in range(4):
                self.wait(1.0)
                ctx.heartbeat()

    def on_eval_batch(self, ctx, step):
        self.wait(0.5)

    def on_eval_end(self, ctx, metrics):
        self.wait(2.5 * dtrain.init().rank)

    def on_save(self, ctx):
        self.wait(2.5 * dtrain.init().rank)


def train_slowly(folder):
    dtrain.init(seed=1)
    model = nn.Linear(3, 1)
    trainer = dtrain.Trainer(
        model,
        SGD(model.parameters(), lr=0.01),
        mse,
        callbacks=[Slow(), Checkpoint()],
        sinks=[],
        run_dir=folder,
        hang_after_s=2.0,
    )
    x = torch.ones(160, 3)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return trainer.fit(data, batch_size=16, max_steps=10, eval_set=data).steps


def test_a_slow_run_that_moves_is_left_alone(tmp_path):
    assert run_processes(train_slowly, 2, str(tmp_path), timeout_s=60) == [10, 10]


class SlowRows:
    """A dataset that once waits for its disk, for longer than the limit, on rank 1."""

    def __init__(self):
        self.fetched = 0

    def __len__(self):
        return 640

    def __getitem__(self, index):
        self.fetched += 1
        if self.fetched == 8 * STEP + 1 and dtrain.init().rank == 1:
            threading.Event().wait(4.0)
        x = torch.full((3,), float(index)) / 640
        return x, x.sum(0, keepdim=True)


def train_with_slow_data():
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    trainer = dtrain.Trainer(model, optimizer, mse, sinks=[], hang_after_s=1.5)
    return trainer.fit(SlowRows(), batch_size=16, max_steps=10).steps


def test_a_disk_that_stalls_is_told_and_ends_nothing():
    for outcome in run_outcomes(train_with_slow_data, 2, timeout_s=TIMEOUT_S):
        assert outcome.value == 10, told(outcome)
        if outcome.rank == 0:
            waits = rf"for rank 1 on {HOST} \(pid \d+\), which is at step {STEP} in data"
            assert re.search(waits, outcome.output), told(outcome)


def stay(filename):
    """Stays for longer than the limit in a frame of that file."""
    source = "import threading\n\ndef stay():\n    threading.Event().wait(4)\n"
    names = {}
    exec(compile(source, filename, "exec"), names)
    names["stay"]()


class Stays(dtrain.Callback):
    def __init__(self, filename):
        self.filename = filename

    def on_step_end(self, ctx, step):
        if step.number == STEP and dtrain.init().rank == 1:
            stay(self.filename)


def train_staying():
    world = dtrain.init()
    for file in ("/x/lib/python3.11/pdb.py", "/x/torch/_dynamo/convert_frame.py"):
        model = nn.Linear(3, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        callbacks = [Stays(file)]
        trainer = dtrain.Trainer(
            model, optimizer, mse, callbacks=callbacks, sinks=[], hang_after_s=1
        )
        assert trainer.fit(dataset(), batch_size=16, max_steps=10).steps == 10
    return world.rank


def test_a_debugger_and_the_compiler_may_take_their_time():
    first, second = run_outcomes(train_staying, 2, timeout_s=TIMEOUT_S)
    assert (first.value, second.value) == (0, 1), told(first) + told(second)
    # What it waits for is told all the same, once in each of the two.
    waits = (
        rf"dtrain: rank 0 on {HOST} \(pid \d+\) has waited for \d s at step {STEP + 1} in backward"
    )
    assert len(re.findall(waits, first.output)) == 2, first.output
    assert second.output == ""


class Uploads(dtrain.Callback):
    """One rank takes long, in a hook that is of a step or not."""

    def __init__(self, seconds, hold):
        self.seconds, self.hold = seconds, hold

    def on_step_end(self, ctx, step):
        if step.number == STEP and dtrain.init().rank == 1:
            if self.hold:
                ctypes.PyDLL(None).sleep(int(self.seconds))
            else:
                threading.Event().wait(self.seconds)


def train_uploading(seconds, hold):
    return train([Uploads(seconds, hold)]).steps


@pytest.mark.parametrize(("seconds", "hold"), [(20.0, False), (9.0, True)])
def test_a_hook_that_takes_long_is_told_and_ends_nothing(seconds, hold):
    """An upload; or a call in C that keeps the interpreter."""
    first, second = run_outcomes(train_uploading, 2, seconds, hold, timeout_s=60)
    assert (first.value, second.value) == (40, 40), told(first) + told(second)
    # Once, by the one that waits.
    where = f"which is at step {STEP} in on_step_end"
    if hold:
        where = (
            r"of which nothing was heard for \d s \(a call in C that keeps the interpreter\?\); "
        )
    waits = rf"dtrain: rank 0 on {HOST} \(pid \d+\) has waited for [5-7] s at step {STEP + 1} in "
    waits += rf"backward \(.*\) for rank 1 on {HOST} \(pid \d+\), {where}"
    assert len(re.findall(waits, first.output)) == 1, first.output
    assert second.output == ""


def suspended(folder):
    """A training in which a rank is at times in one place, at times in another."""
    dtrain.init(seed=1)
    out = Path(folder)

    class Slow(dtrain.Callback):
        def on_step_end(self, ctx, step):
            rank = dtrain.init().rank
            if step.number == 10:
                (out / f"at-{rank}").write_text(str(os.getpid()))
            if 10 <= step.number < 40:
                threading.Event().wait(0.1)

    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    trainer = dtrain.Trainer(
        model, SGD(model.parameters(), lr=0.05), mse, callbacks=[Slow()], run_dir=out / "run"
    )
    trainer.fit(dataset(), batch_size=12, max_steps=100, log_every=50)
    (out / f"end-{dtrain.init().rank}").write_text(repr(model.state_dict()))


SUSPENDED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_no_silent_hang import suspended
suspended(sys.argv[2])
"""


@pytest.mark.parametrize(("size", "launcher"), [(2, "torchrun"), (3, "none")])
def test_a_job_that_is_suspended_goes_on(tmp_path, size, launcher):
    """All of it, the launcher or the store's process too, for longer than anything is waited."""
    folder, whole = tmp_path / "suspended", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    run_processes(suspended, size, str(whole), timeout_s=TIMEOUT_S)
    (folder / "train.py").write_text(SUSPENDED)
    script = [str(folder / "train.py"), str(HERE_IN), str(folder)]
    fault = planted.Fault("", "", 0, size, "", launcher)
    processes = planted.start(fault, folder, script)
    try:
        deadline = time.monotonic() + 60
        while not all((folder / f"at-{rank}").exists() for rank in range(size)):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        pids = [pid for p in processes for pid in (p.pid, *planted.descendants(p.pid))]
        for number, seconds in ((signal.SIGSTOP, 12), (signal.SIGCONT, 0)):
            for pid in pids:  # in turn, as nodes are
                os.kill(pid, number)
                threading.Event().wait(0.2)
            threading.Event().wait(seconds)
        assert [process.wait(60) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            planted.kill(process)
    log = (folder / "launcher").read_text()
    print(log)
    for words in ("dtrain: rank", "warning", "Timeout"):
        assert words not in log
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["status"], status["failures"]) == ("finished", 0)
    ends = [(one / f"end-{rank}").read_text() for one in (folder, whole) for rank in range(size)]
    assert len({*ends}) == 1


def test_planted_faults_are_named_and_end_the_job(tmp_path):
    """Two of those that `python tests/laws/planted.py` draws: one is stopped under torchrun."""
    drawn = planted.drawn(seed=int(os.environ.get("DTRAIN_SEED", "19")), number=7)
    stops = [fault for fault in drawn if fault.kind == "stop"]
    for fault in [*stops, *[fault for fault in drawn if fault.kind != "stop"][:1]]:
        folder = tmp_path / f"{fault.kind}-{fault.place}"
        folder.mkdir()
        found = planted.run(fault, folder)
        print(fault, found.named_s, found.over_s, *found.logs, sep="\n")
        # CI's cores are shared: each of both may take half as long again.
        assert found.named_s is not None, fault
        assert found.named_s <= 1.5 * planted.NAMED_S, fault
        assert found.over_s is not None, fault
        assert found.over_s <= 1.5 * planted.OVER_S, fault
        assert 0 not in found.codes


class NoStore:
    pass


def train_with_a_broken_watchdog():
    world = dtrain.init()
    world.connect = NoStore
    steps = train([Takes(2.0)]).steps
    world.connect = None
    return steps


class Takes(dtrain.Callback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, ctx, step):
        if step.number == STEP:
            threading.Event().wait(self.seconds)


def test_an_error_of_the_watchdog_is_told_once_and_ends_nothing():
    for outcome in run_outcomes(train_with_a_broken_watchdog, 2, timeout_s=TIMEOUT_S):
        assert outcome.value == 40, told(outcome)
        words = f"dtrain: the watchdog of rank {outcome.rank} on {socket.gethostname()} failed"
        assert outcome.output.count(words) == 1
        assert "AttributeError: 'NoStore' object has no attribute 'check'" in outcome.output


def threads_in_fit(hang_after_s):
    found = []

    class Looks(dtrain.Callback):
        def on_step_end(self, ctx, step):
            found.append([one.ident for one in watchdogs()])

    world = dtrain.init(seed=1)
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.01)
    trainer = dtrain.Trainer(
        model, optimizer, mse, callbacks=[Looks()], sinks=[], hang_after_s=hang_after_s
    )
    trainer.fit(dataset(), batch_size=16, max_steps=2)
    trainer.evaluate(dataset(), batch_size=16)
    trainer.fit(dataset(), batch_size=16, max_steps=2)
    quick = [*found]
    for thread in watchdogs():  # that rest: each ends by itself
        thread.join(TIMEOUT_S)
    left = len(watchdogs())
    trainer.fit(dataset(), batch_size=16, max_steps=2)
    world.close()
    return quick, left, found[4:], len(watchdogs())


def watchdogs():
    return [thread for thread in threading.enumerate() if thread.name == "dtrain watchdog"]


@pytest.mark.parametrize(
    ("size", "hang_after_s", "threads"), [(2, 5.0, 1), (2, None, 0), (1, 5.0, 0)]
)
def test_it_is_there_only_while_it_is_wanted(size, hang_after_s, threads):
    found = run_processes(threads_in_fit, size, hang_after_s, timeout_s=TIMEOUT_S)
    for quick, left, later, closed in found:
        assert [len(idents) for idents in quick] == [threads] * 4
        assert len({tuple(idents) for idents in quick}) == 1  # the same one: fits are short
        assert left == 0
        assert [len(idents) for idents in later] == [threads] * 2
        assert closed == 0


# -- under torchrun --------------------------------------------------------------------------------


def hang_under_launcher(rank, folder, act):
    own = dtrain.init().rank
    Path(folder, f"pid-{own}").write_text(str(os.getpid()))
    train([Hangs(act, rank, folder)])


def environment(**variables):
    """Without launchers' traces; and with this Python first, as there may be no .venv here."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
    launchers += ("NNODES", "RDZV_", "TORCHELASTIC_", "TORCH_DIST", "SLURM_", "PYTHONWARNINGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables


def assert_nobody_is_left(folder, within_s=NAMED_S):
    assert seconds_until_ended(folder) <= within_s
    for number in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid-{number}").read_text()), 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_under_torchrun(tmp_path, rank):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), script.name]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(rank), str(tmp_path), "stopped"],
        cwd=tmp_path,
        env=environment(RANKS="2"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stderr)
    assert done.returncode == 1
    assert re.search(rf"rank {rank} on {HOST} failed in on_step_end at step {STEP}", done.stderr)
    # As the cause, where torchrun sums up; not the survivor that ended the job.
    assert "Root Cause (first observed failure)" in done.stderr
    cause = done.stderr.partition("Root Cause")[2]
    assert f"rank {rank} on " in cause
    assert "its process is stopped" in cause
    assert_nobody_is_left(tmp_path)


def free_job_id():
    """A job whose port, which follows from its number, is not taken."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + job % 20000)) != 0:
                return job
    raise AssertionError("no free port in a thousand")


def run_under_srun(tmp_path, act):
    """One process for each rank and no agent; returns what rank 1 said."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    job = str(free_job_id())
    processes = [
        subprocess.Popen(
            [sys.executable, script.name, str(Path(__file__).parent), "0", str(tmp_path), act],
            cwd=tmp_path,
            env=environment(
                SLURM_JOB_ID=job,
                SLURM_JOB_NODELIST="localhost",
                SLURM_LOCALID=str(rank),
                SLURM_PROCID=str(rank),
                SLURM_STEP_NODELIST="localhost",
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2",
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # That of rank 0 ends as well, though the store's process outlives it for a while.
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    print(*outputs)
    assert processes[0].returncode == -signal.SIGKILL  # by the reaper
    assert processes[1].returncode == HANG_EXIT_CODE
    return outputs[1]


def test_rank_0_stopped_under_srun(tmp_path):
    """The store is in a process of its own, and does not stop with rank 0."""
    said = run_under_srun(tmp_path, "stopped")
    named = rf"rank 0 on {HOST} failed in on_step_end at step {STEP}: HangError: its process is "
    assert re.search(named, said)
    assert_nobody_is_left(tmp_path)


def test_rank_0_stopped_with_the_store(tmp_path):
    said = run_under_srun(tmp_path, "stopped with the store")
    assert re.search(rf"rank 1 on {HOST} \(pid \d+\) no longer moves, at step {STEP + 1} in ", said)
    assert re.search(r"the rendezvous store at localhost:\d+, .* does not answer", said)
    assert "its host is down, stopped or cut off" in said
    assert_nobody_is_left(tmp_path, 2 * NAMED_S)  # the store is waited for as well
