"""Several fits in one script: each is a phase of the run, and a new start finds them again."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    LRSchedule,
    ParamSchedule,
    StochasticWeightAveraging,
)
from dtrain.checkpoint import Fit, Fits
from dtrain.errors import ConfigError, ResumeError
from dtrain.sinks import JSONLines
from dtrain.testing import run_outcomes, run_processes, run_ranks

STEPS = 6 + 5 + 8  # of the script's three fits


class Dies(dtrain.Callback):
    """Ends the process at a step, as kill -9 would; or between two fits."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            os._exit(9)


class Rates(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_step_start(self, ctx, step):
        self.values.append(round(ctx.optimizer.param_groups[0]["lr"], 6))


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 2))


def make(run_dir, more=(), model=None, sinks=()):
    dtrain.init(seed=0)
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    files = {"callbacks": list(more), "sinks": list(sinks), "run_dir": run_dir}
    return dtrain.Trainer(model, optimizer, tiny.loss_fn, **files)


def script(run_dir, at=-1, between=-1):
    """A warm-up, then other data and a rate that is set by hand, then a fit that has a name."""
    callbacks = [
        LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
        ParamSchedule("weight_decay", lambda p: 0.01 * p.step / p.total_steps),
        EarlyStopping("eval/loss", patience=9, restore_best=True),
        Checkpoint(every_steps=2),
        Dies(at),
    ]
    trainer = make(run_dir, callbacks, sinks=[JSONLines()])
    small, results = tiny.dataset(40), []

    def fit(data, **how):
        results.append(trainer.fit(data, eval_set=small, log_every=2, **how))
        if len(results) == between:
            os._exit(9)

    fit(tiny.dataset(48), batch_size=16, epochs=2)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.05
    fit(small, batch_size=12, max_steps=5)
    fit(small, batch_size=10, epochs=2, name="last")
    ends = [(r.steps, r.epochs, r.stop_reason, r.updates, r.metrics) for r in results]
    return tiny.digest(trainer.model), ends


def rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


def check_a_kill(tmp_path, world_size, whole, at=-1, between=-1):
    place = f"at-{at}-{between}"
    run_dir = tmp_path / place
    assert {one.exitcode for one in run_outcomes(script, world_size, run_dir, at, between)} == {9}
    assert run_processes(script, world_size, run_dir) == whole, place
    assert rows(run_dir) == rows(tmp_path / "whole"), place


def test_killed_within_and_between_fits_the_end_is_the_same(tmp_path):
    whole = run_processes(script, 1, tmp_path / "whole")
    (_, ends), *_ = whole
    assert [end[:4] for end in ends] == [
        (6, 2, "all epochs done", 6),
        (11, 3, "max_steps reached", 11),
        (STEPS, 5, "all epochs done", STEPS),
    ]
    for at in (5, 7, 10, 13):
        check_a_kill(tmp_path, 1, whole, at)
    for between in (1, 2, 3):
        check_a_kill(tmp_path, 1, whole, -1, between)


@pytest.mark.slow
def test_killed_at_any_step_the_end_is_the_same(tmp_path):
    whole = run_processes(script, 2, tmp_path / "whole")
    for at in range(1, STEPS + 1):
        check_a_kill(tmp_path, 2, whole, at)
    for between in (1, 2, 3):
        check_a_kill(tmp_path, 2, whole, -1, between)


def test_more_ranks_than_when_it_was_killed(tmp_path):
    run_outcomes(script, 1, tmp_path / "run", 10)
    (one, ends), (two, _) = run_processes(script, 2, tmp_path / "run")
    assert one == two
    assert [end[:2] for end in ends] == [(6, 2), (11, 3), (STEPS, 5)]


# ------------------------------------------------------------------------------- in one process


def phases():
    """Each fit has a plan, a curve and a patience of its own; steps and epochs go on."""
    rates, seen = Rates(), []

    class Sees(dtrain.Callback):
        def on_fit_start(self, ctx):
            p = ctx.progress
            seen.append((p.phase, p.step, p.epoch, p.total_steps, p.total_epochs))

    halved = LRSchedule(lambda opt, steps: LinearLR(opt, 1.0, 0.5, steps))
    trainer = make(None, [halved, rates, Sees(), EarlyStopping("eval/loss", patience=2)])
    for batch_size, how in ((12, {"epochs": 1}), (24, {"epochs": 2}), (12, {"max_steps": 2})):
        trainer.fit(tiny.dataset(48), batch_size=batch_size, eval_set=tiny.dataset(), **how)
    return rates.values, seen


def test_each_fit_has_a_plan_and_a_curve_of_its_own():
    one, two = run_ranks(phases, 2)
    assert one == two
    rates, seen = one
    curve = [0.1, 0.0875, 0.075, 0.0625]
    assert rates == [*curve, *curve, 0.1, 0.075]
    assert seen == [(0, 0, 0, 4, 1), (1, 4, 1, 8, 3), (2, 8, 3, 10, None)]


def test_a_second_fit_sees_the_data_in_another_order():
    orders = []

    def loss(model, batch):
        orders.append(batch[0][:, 0].tolist())
        return tiny.loss_fn(model, batch)

    dtrain.init(seed=0)
    trainer = dtrain.Trainer(net(), tiny.adam, loss, sinks=[])
    for _ in range(2):
        trainer.fit(tiny.dataset(24), batch_size=12, max_steps=2)
    first, second = orders[0] + orders[1], orders[2] + orders[3]
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rate_that_is_set_between_two_fits_is_the_next_curves(by_hand):
    rates = Rates()
    trainer = make(None, [LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)), rates])
    trainer.fit(tiny.dataset(48), batch_size=12, epochs=1)
    more = {} if by_hand else {"override": {"lr": 0.02}}
    if by_hand:
        trainer.optimizer.param_groups[0]["lr"] = 0.02
    trainer.fit(tiny.dataset(48), batch_size=12, epochs=1, **more)
    assert rates.values[0] == 0.1
    assert rates.values[4] == 0.02


def test_a_plateau_is_judged_anew_from_the_first_rate():
    rates = Rates()
    plateau = LRSchedule(
        lambda opt, steps: ReduceLROnPlateau(opt, patience=0, threshold=9.0, factor=0.5),
        every="epoch",
        monitor="eval/loss",
    )
    trainer = make(None, [plateau, rates])
    for _ in range(2):
        trainer.fit(tiny.dataset(12), batch_size=12, epochs=3, eval_set=tiny.dataset())
    assert rates.values == [0.1, 0.05, 0.025] * 2


def test_patience_is_each_fits_own():
    class Worse(dtrain.Callback):  # each evaluation is worse than the one before
        value = 0.0

        def on_eval_end(self, ctx, metrics):
            Worse.value += 1.0
            metrics["eval/worse"] = Worse.value

    trainer = make(None, [Worse(), EarlyStopping("eval/worse", patience=3)])
    how = {"batch_size": 12, "epochs": 9, "eval_set": tiny.dataset()}
    epochs = [trainer.fit(tiny.dataset(12), **how).epochs for _ in range(2)]
    assert epochs == [4, 8]  # not 4 and 5


@pytest.mark.parametrize("average", [lambda: EMA(0.9), lambda: StochasticWeightAveraging(0)])
def test_the_next_fit_trains_what_the_one_before_has_left(average):
    told, begins = tiny.Words("message"), []

    class Begins(dtrain.Callback):
        def on_step_start(self, ctx, step):
            if not ctx.progress.of_phase().step:
                begins.append(tiny.digest(ctx.model))

    trainer = make(None, [average(), Begins()], sinks=[told])
    trainer.fit(tiny.dataset(24), batch_size=12, epochs=2)
    left = tiny.digest(trainer.model)
    trainer.fit(tiny.dataset(24), batch_size=12, max_steps=1)
    assert begins[1] == left
    words = "this fit goes on from the weights that the one before has left in the model"
    assert any(line.startswith(words) for line in told.words)


def test_a_further_fit_that_was_called_wrongly_is_called_again():
    trainer = make(None)
    trainer.fit(tiny.dataset(24), batch_size=12, epochs=1)
    for wrong in ({"batch_size": 0, "epochs": 1}, {"batch_size": 12}):
        with pytest.raises(dtrain.DtrainError):
            trainer.fit(tiny.dataset(48), **wrong)
    with pytest.raises(ConfigError, match="eval_every"):
        trainer.fit(tiny.dataset(48), batch_size=6, epochs=1, eval_every="never")
    assert trainer.fit(tiny.dataset(48), batch_size=16, epochs=1).steps == 2 + 3


def test_a_further_fit_that_fails_in_its_first_step_is_saved_and_begun_again(tmp_path):
    planted = [3]

    class Fails(dtrain.Callback):
        def on_batch(self, ctx, step):
            if step.number in planted:
                raise ValueError("planted")

    def two_fits(run_dir):
        trainer = make(run_dir, [Checkpoint(), Fails()])
        trainer.fit(tiny.dataset(36), batch_size=12, epochs=1, name="one")
        more = {"epochs": 1, "name": "two"}
        try:
            trainer.fit(tiny.dataset(24), batch_size=12, **more)
        except ValueError:
            assert json.loads((run_dir / "status.json").read_text())["status"] == "failed"
            assert (run_dir / "emergency" / "step-00000003").exists()
            planted.clear()
            trainer.fit(tiny.dataset(24), batch_size=8, **more)  # or called otherwise
        return trainer

    assert two_fits(tmp_path / "run").context.progress.step == 3 + 3
    assert two_fits(tmp_path / "unbroken").context.progress.step == 3 + 2


# ------------------------------------------------------------------------------- names and words


def test_the_same_name_goes_on_with_the_same_fit():
    trainer = make(None)
    how = {"batch_size": 12, "name": "main"}
    assert trainer.fit(tiny.dataset(24), epochs=1, **how).steps == 2
    assert trainer.fit(tiny.dataset(24), epochs=3, **how).steps == 6
    with pytest.raises(ConfigError, match="has done 3 epochs and 6 steps already, by an earlier"):
        trainer.fit(tiny.dataset(24), epochs=3, **how)
    trainer.fit(tiny.dataset(24), batch_size=6, epochs=1, name="other")
    with pytest.raises(ConfigError, match="fit 'main' of this run is over, and others have"):
        trainer.fit(tiny.dataset(24), epochs=9, **how)


@pytest.mark.parametrize("name", ["", 3, b"main"])
def test_a_name_is_a_text(name):
    with pytest.raises(ConfigError, match="a text that tells it from the run's other fits"):
        make(None).fit(tiny.dataset(24), batch_size=12, epochs=1, name=name)


def unequal_names():
    name = f"on rank {dtrain.init(seed=0).rank}"
    with pytest.raises(dtrain.RankMismatch, match="rank 1: fit: fit 'on rank 1'"):
        make(None).fit(tiny.dataset(24), batch_size=12, epochs=1, name=name)


def test_ranks_that_name_a_fit_otherwise_are_told():
    run_ranks(unequal_names, 2)


def one_fit(run_dir, name=None):
    trainer = make(run_dir, [Checkpoint()])
    result = trainer.fit(tiny.dataset(24), batch_size=12, epochs=2, name=name)
    return result.steps, result.stop_reason, len(result.history), tiny.digest(trainer.model)


def test_a_finished_fit_with_a_name_returns_its_result(tmp_path):
    (first,) = run_processes(one_fit, 1, tmp_path, "main")
    (again,) = run_processes(one_fit, 1, tmp_path, "main")
    assert first[:2] == again[:2] == (4, "all epochs done")
    assert (first[2] > 0, again[2]) == (True, 0)
    assert first[3] == again[3]


def test_another_name_or_none_is_no_answer(tmp_path):
    run_processes(one_fit, 1, tmp_path, "main")
    (unnamed,) = run_outcomes(one_fit, 1, tmp_path)
    assert "this is the run's fit 0, which had a name, 'main'" in str(unnamed.error)
    (run_two,) = run_outcomes(script, 1, tmp_path / "two", 5)
    assert run_two.exitcode == 9
    (other,) = run_outcomes(one_fit, 1, tmp_path / "two", "main")
    assert "batch size: 16 there, 12 here" in str(other.error)  # it is meant, and has a name now


def test_a_fit_may_get_a_name_later(tmp_path):
    (whole,) = run_processes(one_fit, 1, tmp_path / "whole", "main")
    run_processes(one_fit, 1, tmp_path / "run")
    (again,) = run_processes(one_fit, 1, tmp_path / "run", "main")
    assert (again[0], again[2], again[3]) == (whole[0], 0, whole[3])


def test_a_fit_under_way_is_asked_for():
    with pytest.raises(ConfigError, match=r"in the midst of another: call fit\(name='a'\) first"):
        Fits([Fit("a")]).place("b")


SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
import dtrain, test_fits
from dtrain.callbacks import Checkpoint
trainer = test_fits.make({run_dir!r}, [Checkpoint()], sinks=[dtrain.sinks.Console()])
result = trainer.fit(test_fits.tiny.dataset(24), batch_size=12, epochs=2)
{after}
print(result.steps, result.stop_reason, len(result.history))
"""


def run_script(run_dir, after=""):
    text = SCRIPT.format(path=sys.path, run_dir=str(run_dir), after=after)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_script_that_was_killed_after_its_fit_gets_the_result_again(tmp_path):
    assert run_script(tmp_path / "killed", "os.kill(os.getpid(), 9)")[0] == -signal.SIGKILL
    assert "ValueError: a typo" in run_script(tmp_path / "killed", "raise ValueError('a typo')")[2]
    status, out, _ = run_script(tmp_path / "killed")
    assert status == 0
    assert "continuing at step 4" in out  # where there is nothing left to train
    assert out.splitlines()[-1] == "4 all epochs done 0"
    # It has ended now, so whoever starts it once more has something else in mind.
    status, _, err = run_script(tmp_path / "killed")
    assert status == 1
    assert "is finished (all epochs done; step 4, 2 epochs). To go on, ask for more" in err
    assert "name it, fit(name='main')" in err
    facts = json.loads((tmp_path / "killed" / "status.json").read_text())
    assert (facts["status"], facts["over"], facts["requeue"]) == ("finished", True, False)


class Leaves(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if ctx.progress.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def told_to_leave(run_dir, leaves):
    told = tiny.Words("message")
    trainer = make(run_dir, [Checkpoint(), *([Leaves()] if leaves else [])], sinks=[told])
    results = [trainer.fit(tiny.dataset(24), batch_size=12, max_steps=steps) for steps in (3, 4, 5)]
    return [(r.steps, r.preempted) for r in results], tiny.digest(trainer.model)


def test_a_run_that_is_told_to_leave_begins_no_further_fit(tmp_path):
    (whole,) = run_processes(told_to_leave, 1, tmp_path / "whole", False)
    (left,) = run_processes(told_to_leave, 1, tmp_path / "left", True)
    assert len({*left[0]}) == 1
    assert left[0][0][1]
    status = json.loads((tmp_path / "left" / "status.json").read_text())
    assert (status["status"], status["fit"]) == ("preempted", 0)
    (again,) = run_processes(told_to_leave, 1, tmp_path / "left", False)
    assert again == whole
    assert whole[0] == [(3, False), (7, False), (12, False)]


def folds(run_dir, leaves):
    """Cross-validation: a Trainer and a folder for each fold."""
    found = []
    for fold in range(3):
        more = [Leaves()] if leaves and fold == 1 else []
        trainer = make(run_dir / str(fold), [Checkpoint(), *more])
        result = trainer.fit(tiny.dataset(24), batch_size=12, max_steps=3)
        found.append((result.preempted, tiny.digest(trainer.model)))
        if result.preempted:
            break
    return found


def test_folds_that_were_left_go_on(tmp_path):
    (whole,) = run_processes(folds, 1, tmp_path / "whole", False)
    (left,) = run_processes(folds, 1, tmp_path / "left", True)
    assert [preempted for preempted, _ in left] == [False, True]
    (again,) = run_processes(folds, 1, tmp_path / "left", False)
    assert again == whole


def goes_on_all_the_same():
    told = tiny.Words("message")
    for callbacks in ([Leaves()], []):
        result = make(None, callbacks, sinks=[told]).fit(tiny.dataset(24), batch_size=12, epochs=1)
    assert not result.preempted
    return told.words


def test_another_trainer_says_that_the_process_was_told_to_leave():
    (words,) = run_processes(goes_on_all_the_same, 1)
    assert any("a fit of another Trainer was told to leave" in line for line in words)


# ------------------------------------------------------------------------------------- restore


def iterations(run_dir, at=-1, every=1):
    """As PPO is: what is trained on depends on the weights that there are."""
    trainer = make(run_dir, [Checkpoint(every_fits=every), Dies(at)])
    progress, trained = trainer.restore(), []
    for number in range(progress.phase, 4):
        with torch.no_grad():
            (x, y) = tiny.dataset(24)[:]
            x = x + 0.1 * trainer.model.eval()(x).mean()
        data = torch.utils.data.TensorDataset(x, y)
        trainer.fit(data, batch_size=12, epochs=1, name=f"iteration {number}")
        trained.append(number)
    return trained, tiny.digest(trainer.model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_script_that_asks_where_the_run_is_leaves_out_what_is_done(tmp_path, world_size):
    whole = run_processes(iterations, world_size, tmp_path / "whole")
    for at, every, left in ((3, 1, [1, 2, 3]), (5, 2, [2, 3]), (7, 2, [2, 3])):
        run_dir = tmp_path / f"{at}-{every}"
        run_outcomes(iterations, world_size, run_dir, at, every)
        again = run_processes(iterations, world_size, run_dir, -1, every)
        assert [trained for trained, _ in again] == [left] * world_size
        assert [digest for _, digest in again] == [digest for _, digest in whole]


def test_after_restore_fits_need_names(tmp_path):
    trainer = make(tmp_path)
    assert trainer.restore().phase == 0
    trainer.fit(tiny.dataset(24), batch_size=12, max_steps=1)
    with pytest.raises(ConfigError, match="a further fit needs a name"):
        trainer.fit(tiny.dataset(24), batch_size=12, max_steps=1)
    with pytest.raises(ConfigError, match="comes before the first fit"):
        trainer.restore()


def test_restore_loads_what_a_finished_run_has_left(tmp_path):
    digest = one_fit(tmp_path, "main")[3]
    trainer = make(tmp_path)
    assert tiny.digest(trainer.model) != digest
    progress = trainer.restore()
    assert (progress.phase, progress.step, progress.of_phase().step) == (1, 4, 0)
    assert tiny.digest(trainer.model) == digest
    with pytest.raises(ResumeError, match="another make-up"):
        make(tmp_path, model=nn.Linear(8, 2)).fit(
            tiny.dataset(24), batch_size=12, epochs=3, name="main"
        )
