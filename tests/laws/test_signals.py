"""Law 2: a signal to any one rank, at any moment, ends the run in order on all of them."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from updating import JOBS, loss_fn

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import format as files
from dtrain.cluster import signals
from dtrain.cluster.signals import SIGNALS, Signals
from dtrain.testing import run_outcomes, run_processes

ROOT = Path(__file__).parents[2]
STEPS, STEPS_PER_EPOCH = 12, 4
MOMENTS = [
    "on_epoch_start",
    "on_step_start",
    "on_batch",
    "on_loss",
    "backward",
    "on_grads_ready",
    "on_step_end",
    "on_eval_start",
    "on_eval_batch",
    "on_eval_end",
    "on_save",
    "on_epoch_end",
]


class Sends(dtrain.Callback):
    """Sends its own process a signal, at one moment of a step or of what follows it.

    Of two updates a step has, in the last.
    """

    def __init__(self, number, moment, step, *, mine):
        self.number, self.moment, self.step = number, moment, step
        self.pending = mine

    def at(self, ctx, moment, update=""):
        if (
            update != "first"
            and self.pending
            and moment == self.moment
            and ctx.progress.step >= self.step
        ):
            self.pending = False
            os.kill(os.getpid(), self.number)

    def on_epoch_start(self, ctx):
        self.at(ctx, "on_epoch_start")

    def on_step_start(self, ctx, step):
        self.at(ctx, "on_step_start")

    def on_batch(self, ctx, step):
        self.at(ctx, "on_batch")

    def on_loss(self, ctx, step):
        self.at(ctx, "on_loss", update := step.update)
        step.loss.mean.register_hook(lambda grad: self.at(ctx, "backward", update))

    def on_grads_ready(self, ctx, step):
        self.at(ctx, "on_grads_ready", step.update)

    def on_step_end(self, ctx, step):
        self.at(ctx, "on_step_end")

    def on_eval_start(self, ctx):
        self.at(ctx, "on_eval_start")

    def on_eval_batch(self, ctx, step):
        self.at(ctx, "on_eval_batch")

    def on_eval_end(self, ctx, metrics):
        self.at(ctx, "on_eval_end")

    def on_save(self, ctx):
        self.at(ctx, "on_save")

    def on_epoch_end(self, ctx):
        self.at(ctx, "on_epoch_end")


def fit(run_dir, *sends, updates=1, **options):
    dtrain.init(seed=0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.2), nn.Linear(12, 2))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(48, 8, generator=generator)
    data = dtrain.Data(TensorDataset(x, (x[:, 0] > 0).long()), 12, **options)
    trainer = dtrain.Trainer(
        model,
        *JOBS[updates],
        eval_fn=loss_fn,
        callbacks=[Checkpoint(every_steps=2), *sends],
        sinks=[],
        run_dir=run_dir,
    )
    result = trainer.fit(data, max_steps=STEPS, eval_set=data.dataset)
    return result, {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def signalled(folder, cases, updates=1):
    world = dtrain.init(seed=0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
    found = []
    # Of the same make-up as the others: a callback that sends nothing.
    _, whole = fit(folder / "whole", Sends(0, "", 0, mine=False), updates=updates)
    for i, (rank, number, moment, step) in enumerate(cases):
        run_dir = folder / str(i)
        before = [signal.getsignal(one) for one in SIGNALS]
        result, _ = fit(
            run_dir, Sends(number, moment, step, mine=world.rank == rank), updates=updates
        )
        status = json.loads((run_dir / "status.json").read_text())
        saved, damaged = files.find(run_dir / "checkpoints")
        assert [signal.getsignal(one) for one in SIGNALS] == before
        world.comm.barrier("looked at")
        again, parameters = fit(run_dir, Sends(0, "", 0, mine=False), updates=updates)
        found.append(
            {
                "steps": result.steps,
                "reason": result.stop_reason,
                "preempted": result.preempted,
                "status": (status["status"], status["reason"], status["step"]),
                "saved": (saved.step, damaged),
                "again": (again.steps, again.preempted),
                "equal": parameters == whole,
            }
        )
    return found


def draw(world_size):
    """Each moment, at two ranks on each of them; signal, step and rank by chance, seeded."""
    drawn = random.Random(world_size)
    return [
        (rank, drawn.choice(SIGNALS), moment, drawn.randrange(0, STEPS - STEPS_PER_EPOCH))
        for moment in MOMENTS
        for rank in ((0, 1) if world_size == 2 else [drawn.randrange(world_size)])
    ]


@pytest.mark.parametrize(
    ("world_size", "updates"), [(1, 1), (2, 1), (3, 1), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_one_ranks_signal_saves_and_ends_the_run_on_all(world_size, updates, tmp_path):
    cases = draw(world_size)
    by_rank = run_processes(signalled, world_size, tmp_path, cases, updates, timeout_s=90)
    for found in by_rank:
        assert found == by_rank[0]
    for (rank, number, moment, step), found in zip(cases, by_rank[0], strict=True):
        case = f"{number.name} to rank {rank} in {moment}, step {step}"
        by = f" (asked by rank {rank} on {socket.gethostname()})" if world_size > 1 else ""
        assert found["reason"] == number.name + by, case
        assert found["preempted"], case
        # In the step itself, or the next one if it came after the reduction; a moment that comes
        # once in an epoch may be that much later.
        assert step <= found["steps"] <= step + STEPS_PER_EPOCH + 2, case
        assert found["status"] == ("preempted", found["reason"], found["steps"]), case
        assert found["saved"] == (found["steps"], []), case
        assert found["again"] == (STEPS, False), case
        assert found["equal"], case


def all_at_once(run_dir):
    result, _ = fit(run_dir, Sends(signal.SIGTERM, "on_batch", 3, mine=True))
    return result.stop_reason, result.steps


def test_a_signal_to_all_ranks_is_told_once(tmp_path):
    assert run_processes(all_at_once, 3, tmp_path) == [("SIGTERM", 4)] * 3


# ------------------------------------------------------------------------------ what is left alone


def twice(run_dir, within_s):
    signals._TWICE_S = within_s

    class Impatient(dtrain.Callback):
        def on_loss(self, ctx, step):
            if dtrain.init(seed=0).rank == 1 and step.number == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    result, _ = fit(run_dir, Impatient())
    return result.stop_reason


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    _, impatient = run_outcomes(twice, 2, tmp_path, 0.0, timeout_s=20)
    assert impatient.exitcode == 130


def test_one_that_a_launcher_passes_on_as_well_is_no_second_one(tmp_path):
    """As where all processes of a job are sent it: the rank, and its torchrun."""
    assert (
        run_processes(twice, 2, tmp_path, 60.0)
        == [f"SIGINT (asked by rank 1 on {socket.gethostname()})"] * 2
    )


def own_handler(run_dir):
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Both(dtrain.Callback):
        def on_loss(self, ctx, step):
            if step.number == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGINT)

    result, _ = fit(run_dir, Both())
    return result.steps, result.preempted, seen


def test_signals_that_the_script_handles_are_left_alone(tmp_path):
    assert run_processes(own_handler, 1, tmp_path) == [(STEPS, False, [signal.SIGUSR1])]


class HitsWorkers(dtrain.Callback):
    """Signals the loader's workers; with TERM, as to a whole job, their rank as well."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def on_step_end(self, ctx, step):
        if step.number in (2, 5):
            for worker in multiprocessing.active_children():
                for number in self.numbers:
                    os.kill(worker.pid, number)
                worker.join(10 if signal.SIGTERM in self.numbers else 0)
            if signal.SIGTERM in self.numbers and dtrain.init(seed=0).rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)


def to_the_workers(folder):
    most = [number for number in SIGNALS if number != signal.SIGTERM]
    result, _ = fit(folder / "most", HitsWorkers(*most), num_workers=1)
    found = [(result.steps, result.preempted)]
    one = [signal.SIGTERM] if dtrain.init(seed=0).rank == 1 else []
    result, _ = fit(folder / "term", HitsWorkers(*one), num_workers=1)
    found.append((result.steps <= 4, result.preempted, result.stop_reason))
    result, _ = fit(folder / "term", HitsWorkers(), num_workers=1)
    return [*found, (result.steps, result.preempted)]


@pytest.mark.slow
def test_signals_to_loader_workers(tmp_path):
    term = f"SIGTERM (asked by rank 1 on {socket.gethostname()})"
    expected = [(STEPS, False), (True, True, term), (STEPS, False)]
    assert run_processes(to_the_workers, 2, tmp_path, timeout_s=40) == [expected] * 2


def hit_and_fail():
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    raise ValueError("planted")


def test_handlers_are_restored_after_an_error():
    for number in SIGNALS:
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in SIGNALS]
    asked = []
    with pytest.raises(ValueError, match="planted"), Signals(asked.append):
        hit_and_fail()
    assert asked == ["SIGUSR2"]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_slurms_signal_after_the_run_does_not_kill_it(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGUSR1)
    asked = []
    try:
        for _ in range(2):
            with Signals(asked.append):
                os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == ["SIGUSR1"] * 2  # and we are still here


# ------------------------------------------------------------------------------ under torchrun

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
import dtrain

world = dtrain.init(seed=0)

class Sends(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if world.rank == 1 and step.number == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

model = nn.Linear(4, 1)
trainer = dtrain.Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, batch: model(batch[0]).square().mean(),
    callbacks=[Sends()], sinks=[], run_dir="run",
)
result = trainer.fit(TensorDataset(torch.ones(64, 4)), batch_size=4, epochs=10)
print(f"rank {world.rank}: {result.stop_reason}, step {result.steps}", flush=True)
"""


def test_under_torchrun_the_job_ends_well(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py"],
        cwd=tmp_path,
        env=os.environ | {"RANKS": "2", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        told = f"rank {rank}: SIGUSR1 (asked by rank 1 on {socket.gethostname()}), step 7"
        assert told in done.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    assert files.find(tmp_path / "run" / "checkpoints")[0].step == 7


@pytest.mark.slow
def test_a_launcher_that_is_killed_ends_its_ranks(tmp_path):
    script = SCRIPT.replace("world.rank == 1 and", "world.is_main and").replace(
        "os.kill(os.getpid(), signal.SIGUSR1)", "os.kill(os.getppid(), signal.SIGKILL)"
    )
    # In one piece: torchrun's ranks do not buffer, and share a pipe.
    script = f"import os; os.write(1, b'pid %d\\n' % os.getpid())\n{script}"
    (tmp_path / "train.py").write_text(script.replace("epochs=10)", "epochs=10**6)"))
    launcher = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py"],
        cwd=tmp_path,
        env=os.environ | {"RANKS": "2", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    ranks = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
    try:
        assert launcher.wait(60) == -signal.SIGKILL
        told, _ = launcher.communicate(timeout=15)  # its ranks hold the pipe until they end
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
    assert told.count("the launcher (torchrun) is gone") == 2  # found by one rank, or in one step
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted"
