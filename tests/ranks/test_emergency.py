"""Law 4: when a step fails on any rank, the state before it is saved, and can be continued."""

import json

import pytest
import tiny
import torch
from ahead import run_ahead
from torch.optim.lr_scheduler import ExponentialLR

import dtrain
from dtrain.callbacks import EMA, Checkpoint, ClipGradients, GradientAccumulation, LRSchedule
from dtrain.checkpoint import format as files
from dtrain.errors import ResumeError
from dtrain.testing import run_processes

STEPS, FAILS_AT = 10, 2  # before the first epoch has ended
WHERE = ["on_step_start", "dataset", "on_batch", "loss_fn", "on_loss", "weight"]


class Broken(dtrain.Callback):
    """Raises on one rank, in one place of a step; mended, it does nothing."""

    name = "Broken"

    def __init__(self, where, mine):
        self.where, self.mine = where, mine
        self.step = 0

    def check(self, where):
        if self.mine and where == self.where and self.step == FAILS_AT:
            raise ValueError(f"planted in {where}")

    def on_step_start(self, ctx, step):
        self.step = step.number
        self.check("on_step_start")

    def on_batch(self, ctx, step):
        self.check("on_batch")

    def on_loss(self, ctx, step):
        self.check("on_loss")


class Rows:
    def __init__(self, broken):
        self.broken = broken
        self.data = tiny.dataset(48)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        self.broken.check("dataset")
        return self.data[row]


def fit(run_dir, where, failing, *, delays=False, **options):
    run_ahead(delays)
    world = dtrain.init(seed=0)
    broken = Broken(where, world.rank == failing)

    def loss_fn(net, batch):
        broken.check("loss_fn")
        loss = tiny.loss_fn(net, batch)
        bad = broken.mine and where == "weight" and broken.step == FAILS_AT
        loss.weight = -1 if bad else len(batch[1])
        return loss

    run = tiny.trainer(
        [
            broken,
            GradientAccumulation(2),
            ClipGradients(0.3),
            EMA(0.9),
            LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.9)),
            Checkpoint(),
        ],
        loss=loss_fn,
        hang_after_s=None,  # or a rank that failed asks, for a second, where the others wait
        optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True),
        run_dir=run_dir,
    )
    error = None
    try:
        run.fit(Rows(broken), batch_size=16, **{"max_steps": STEPS} | options)
    except Exception as caught:  # noqa: BLE001 -- looked at by the test
        error = caught
    return tiny.digest(run.model), error


def state_of(folder):
    """All that a checkpoint holds but random streams, which have moved on, and what is timed."""
    saved, damaged = files.find(folder)
    assert not damaged
    state = files.load_state(saved.path)
    state["callbacks"]["LRSchedule"].pop("total")  # the run to compare with was planned shorter
    other = ("shared_rng", "metrics", "loop", "fits")  # the last as the plan was shorter
    kept = {k: repr(v) for k, v in state.items() if k not in other}
    parameters = {name: t.tolist() for name, t in files.load_model(saved.path).items()}
    return saved.step, kept, parameters


def emergencies(folder, delays):
    world = dtrain.init(seed=0)
    whole, _ = fit(folder / "whole", "", None, delays=delays)
    fit(folder / "until", "", None, delays=delays, max_steps=FAILS_AT)
    expected = state_of(folder / "until" / "checkpoints")
    found = {}
    for where in WHERE:
        for failing in range(world.size):
            run_dir = folder / f"{where} {failing}"
            _, error = fit(run_dir, where, failing, delays=delays)
            world.comm.barrier("rank 0 has told")
            status = json.loads((run_dir / "status.json").read_text())
            saved = state_of(run_dir / "emergency")
            _, must = fit(run_dir, "", None, delays=delays, resume="must")
            continued, none = fit(run_dir, "", None, delays=delays, resume="emergency")
            found[where, failing] = {
                "error": str(error),
                "note": " ".join(getattr(error, "__notes__", [])),
                "status": (status["status"], status["step"]),
                "saved": saved == expected,
                "must": str(must),
                "continued": none is None and continued == whole,
            }
    return found


@pytest.mark.parametrize(("world_size", "delays"), [(1, False), (2, False), (3, False), (2, True)])
def test_the_state_before_the_failed_step_is_saved_and_continued(tmp_path, world_size, delays):
    by_rank = run_processes(emergencies, world_size, tmp_path, delays, timeout_s=60)
    for rank, found in enumerate(by_rank):
        for case, one in found.items():
            where, _ = case
            planted = "weight -1" if where == "weight" else f"planted in {where}"
            assert planted in one["error"], case
            assert one["status"] == ("failed", FAILS_AT), case
            assert one["saved"], case
            # There is no ordinary checkpoint: nothing goes on by itself.
            assert "resume='must', but there is no intact checkpoint" in one["must"], case
            assert one["continued"], case
            if rank == 0:
                assert f"the state before step {FAILS_AT} is saved in" in one["note"], case
                assert "fit(resume='emergency') continues from it" in one["note"], case


def nothing_saved(folder):
    _, error = fit(folder, "", None, resume="emergency")
    return type(error), str(error)


def test_without_an_emergency_there_is_nothing_to_continue(tmp_path):
    kind, words = run_processes(nothing_saved, 1, tmp_path)[0]
    assert kind is ResumeError
    assert "resume='emergency', but there is nothing that was saved when a step failed" in words
