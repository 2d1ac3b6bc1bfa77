"""What may differ where a run goes on, and what becomes of the optimizer and of files."""

import json
import os
import shutil
import threading

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import StepLR

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    LRSchedule,
    ParamSchedule,
    StochasticWeightAveraging,
)
from dtrain.checkpoint import disk
from dtrain.errors import ConfigError, RankMismatch, RemoteError, ResumeError
from dtrain.sinks import CSV, Dispatcher, JSONLines, Report
from dtrain.testing import run_ranks


class Rates(dtrain.Callback):
    """Keeps the rate of each step."""

    def __init__(self):
        self.rates = []

    def on_step_start(self, ctx, step):
        self.rates.append(round(float(ctx.optimizer.param_groups[0]["lr"]), 6))


def fit(run_dir=None, callbacks=(), *, optimizer=tiny.adam, sinks=(), config=None, net=None, **how):
    """Trains; returns the trainer, the result, and what was told."""
    dtrain.init(seed=0)
    told = tiny.Words("message")
    trainer = dtrain.Trainer(
        net or tiny.model(),
        optimizer,
        tiny.loss_fn,
        callbacks=list(callbacks),
        sinks=[told, *sinks],
        run_dir=run_dir,
        config=config,
    )
    data = how.pop("data", None) or tiny.dataset(32)
    result = trainer.fit(data, **{"batch_size": 8, "epochs": 1, "log_every": 1} | how)
    return trainer, result, told


def of(optimizer, name):
    return [group[name] for group in optimizer.param_groups]


# ------------------------------------------------------------------- the optimizer's values


def adam(lr=1e-2, **options):
    return lambda net: torch.optim.AdamW(net.parameters(), lr, **options)


def test_another_lr_is_told_and_the_old_is_kept(tmp_path):
    fit(tmp_path, [Checkpoint()], config={"lr": 1e-2, "depth": 2})
    trainer, _, told = fit(
        tmp_path,
        [Checkpoint()],
        optimizer=adam(1e-4, weight_decay=0.5),
        config={"lr": 1e-4, "depth": 2},
        epochs=2,
    )
    assert of(trainer.optimizer, "lr") == [1e-2]
    assert of(trainer.optimizer, "weight_decay") == [1e-2]
    assert told.words[1:] == [
        "lr 0.01 there, 0.0001 here: 0.01 is kept; fit(override={'lr': 0.0001}) takes the new one",
        "weight_decay 0.01 there, 0.5 here: 0.01 is kept; fit(override={'weight_decay': 0.5}) "
        "takes the new one",
    ]
    in_force = json.loads((tmp_path / "config.json").read_text())
    assert in_force == {"lr": 1e-2, "weight_decay": 1e-2, "depth": 2}


def test_an_override_is_taken_and_stays(tmp_path):
    fit(tmp_path, [Checkpoint()])
    override = {"lr": 1e-4}
    trainer, _, told = fit(tmp_path, [Checkpoint()], epochs=2, override=override)
    assert of(trainer.optimizer, "lr") == [1e-4]
    assert told.words[1:] == ["lr 0.0001 is taken, not 0.01 (override)"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1e-4}
    # The same command again says nothing new, and without the override the rate is kept.
    trainer, _, told = fit(tmp_path, [Checkpoint()], epochs=3, override=override)
    assert (of(trainer.optimizer, "lr"), told.words[1:]) == ([1e-4], [])
    trainer, _, told = fit(tmp_path, [Checkpoint()], epochs=4)
    assert of(trainer.optimizer, "lr") == [1e-4]
    assert told.words[1].startswith("lr 0.0001 there, 0.01 here: 0.0001 is kept; ")


def test_values_that_schedules_set_are_no_difference(tmp_path):
    def callbacks():
        decay = ParamSchedule("weight_decay", lambda p: 0.1 * (p.step + 1))
        return [decay, LRSchedule(lambda opt, n: StepLR(opt, 1)), Checkpoint()]

    fit(tmp_path, callbacks())
    _, _, told = fit(tmp_path, callbacks(), epochs=2)
    assert told.words[1:] == []


def test_an_override_of_each_group_at_the_first_start_and_in_a_further_fit():
    def groups(net):
        return torch.optim.SGD([{"params": p, "lr": 0.1} for p in net.parameters()], lr=0.1)

    trainer, _, told = fit(optimizer=groups, override={"lr": [0.1, 0.2, 0.3, 0.4]})
    assert of(trainer.optimizer, "lr") == [0.1, 0.2, 0.3, 0.4]
    assert told.words[-1] == "lr [0.1, 0.2, 0.3, 0.4] is taken, not 0.1 (override)"
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=2, override={"lr": 0.5})
    assert of(trainer.optimizer, "lr") == [0.5] * 4
    with pytest.raises(ConfigError, match="no such value; did you mean 'lr'"):
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=3, override={"lrr": 0.5})
    with pytest.raises(ConfigError, match="one value for each parameter group, and there are 4"):
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=3, override={"lr": [0.5]})


def overridden(run_dir):
    fit(run_dir, [Checkpoint()])
    trainer, _, told = fit(run_dir, [Checkpoint()], epochs=2, override={"lr": 1e-4})
    mine = 0.1 + dtrain.init().rank
    with pytest.raises(RankMismatch, match="override"):
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=3, override={"lr": mine})
    return of(trainer.optimizer, "lr"), told.words[1:]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"lr": "0.1"}, "cannot take the place of 0.01"),
        ({"lr": float("nan")}, "cannot take the place of 0.01"),
        ({"lr": torch.tensor(0.1)}, "cannot take the place of 0.01"),
        ({"lr": [True]}, "cannot take the place of 0.01"),
        ({"betas": 0.9}, "cannot take the place of (0.9, 0.999)"),
        ({"betas": (0.9,)}, "cannot take the place of (0.9, 0.999)"),
        ({"amsgrad": 1}, "cannot take the place of False"),
        ({"amsgrad": True}, "keeps a state from its first step on"),
    ],
)
def test_an_override_that_cannot_be_taken_is_refused(tmp_path, override, words):
    trainer, _, _ = fit(tmp_path, [Checkpoint()])
    with pytest.raises(ConfigError, match="override"):
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=2, override=override)
    with pytest.raises(ConfigError, match="override") as raised:
        fit(tmp_path, [Checkpoint()], epochs=2, override=override)
    assert words in str(raised.value)
    if override.get("amsgrad") is True:  # before the first step it can
        fit(None, override=override)
    fit(tmp_path, [Checkpoint()], epochs=2, override={"betas": (0.8, 0.99), "foreach": False})


def test_an_override_is_of_all_ranks(tmp_path):
    said = ["lr 0.0001 is taken, not 0.01 (override)"]
    assert run_ranks(overridden, 2, tmp_path) == [([1e-4], said), ([1e-4], [])]


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def grouped(*groups, named=False):
    def make(net):
        held = dict(net.named_parameters())
        params = [[(n, held[n]) if named else held[n] for n in names] for names in groups]
        return torch.optim.AdamW(
            [{"params": p, "weight_decay": 0.1 * i} for i, p in enumerate(params)], lr=1e-2
        )

    return make


@pytest.mark.parametrize("named", [False, True])
def test_parameters_in_another_order_get_their_own_state(tmp_path, named):
    make = grouped(NAMES[::2], NAMES[1::2], named=named)
    fit(tmp_path / "a", [Checkpoint()], optimizer=make)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    same, _, _ = fit(tmp_path / "a", [Checkpoint()], optimizer=make, epochs=3)
    # The groups, and the parameters within them; each group's own values come along.
    turned = grouped(NAMES[1::2][::-1], NAMES[::2][::-1], named=named)
    other, _, told = fit(tmp_path / "b", [Checkpoint()], optimizer=turned, epochs=2)
    assert told.words[1].startswith("weight_decay [0.1, 0.0] there, [0.0, 0.1] here: [0.1, 0.0] is")
    other, _, _ = fit(tmp_path / "b", [Checkpoint()], optimizer=turned, epochs=3)
    assert tiny.digest(same.model) == tiny.digest(other.model)
    if named:
        assert of(other.optimizer, "param_names") == [NAMES[1::2][::-1], NAMES[::2][::-1]]


def test_other_groups_are_refused_and_leave_the_run_as_it_was(tmp_path):
    fit(tmp_path, [Checkpoint()])
    before = (tmp_path / "status.json").read_text()
    net = tiny.model()
    fresh = tiny.digest(net)
    with pytest.raises(ResumeError) as raised:
        fit(tmp_path, [Checkpoint()], optimizer=grouped(NAMES[:3], NAMES[3:]), epochs=2, net=net)
    first, *differing, last = str(raised.value).splitlines()
    assert first == (
        f"the run in {tmp_path} cannot go on with this optimizer: it has 1 parameter group of 4 "
        "parameters there, 2 parameter groups of 4 parameters here, and they hold other parameters:"
    )
    assert differing == [
        "  there, group 0: 4 parameters (0.weight, 0.bias, 2.weight, 2.bias)",
        "  here, group 0: 3 parameters (0.weight, 0.bias, 2.weight)",
        "  here, group 1: 1 parameters (2.bias)",
    ]
    assert "resume='never'" in last
    assert (tmp_path / "status.json").read_text() == before
    assert tiny.digest(net) == fresh


# ------------------------------------------------------------------------------ what may differ


class Keeps(dtrain.Callback):
    name = "Keeps"

    def state_dict(self):
        return {"count": 3}


def test_more_data_and_other_callbacks_are_told(tmp_path):
    fit(tmp_path, [Keeps(), Checkpoint()])
    _, result, told = fit(tmp_path, [Checkpoint(keep=1)], epochs=2, data=tiny.dataset(40))
    assert result.steps == 4 + 5
    assert told.words == [
        f"continuing at step 4 from {tmp_path}/checkpoints/step-00000004 (the same make-up: model, "
        "optimizer, precision, batch size, order, seed)",
        "callbacks: ['Keeps', 'Checkpoint'] there, ['Checkpoint'] here (those here are used)",
        "samples: 32 there, 40 here (an epoch's order is drawn from those here; in one under way, "
        "some may come twice or not at all)",
        "Keeps is not among the callbacks any more: its state is dropped",
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"batch_size": 4}, "batch size: 8 there, 4 here"),
        ({"data": dtrain.Data(tiny.dataset(32), 8, shuffle=False)}, "order: 'shuffled' there, 'as"),
    ],
)
def test_what_must_be_the_same_is_refused_by_a_restart_and_by_a_further_fit(tmp_path, how, words):
    trainer, _, _ = fit(tmp_path / "run", [Checkpoint()], name="main")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    with pytest.raises(ResumeError, match=words):
        fit(tmp_path / "again", [Checkpoint()], epochs=2, name="main", **how)
    again = {"batch_size": 8, "data": tiny.dataset(32), "name": "main"} | how
    if isinstance(again["data"], dtrain.Data):
        again.pop("batch_size")
    data = again.pop("data")
    for _ in range(2):
        with pytest.raises(ConfigError, match=words):
            trainer.fit(data, epochs=2, **again)
    assert trainer.fit(tiny.dataset(32), batch_size=8, epochs=2, name="main").steps == 8


@pytest.mark.parametrize("world_size", [1, 2])
def test_callbacks_of_another_trainer_take_nothing_along(tmp_path, world_size):
    def study():
        def refused(make):
            with pytest.raises((ConfigError, RemoteError), match="Make new callbacks"):
                make()

        data, base, saves = tiny.dataset(8), tmp_path / str(world_size), Checkpoint()
        for kept in (EMA(), StochasticWeightAveraging(0), EarlyStopping("eval/loss"), saves):
            fit(base / kept.name, [kept], eval_set=data)
            refused(lambda kept=kept: fit(base / "another", [kept], eval_set=data))
        own = Rates()
        for _ in range(2):  # what has no state has nothing to take along but what is meant
            fit(None, [own])
        assert len(own.rates) == 8
        fit(base / "Checkpoint", [saves], epochs=2, eval_set=data)  # a resume

    run_ranks(study, world_size)


class Scores(dtrain.Callback):
    """Adds one figure that rises with each evaluation, and one that falls."""

    def on_eval_end(self, ctx, metrics):
        metrics |= {"eval/up": 0.1 * ctx.progress.epoch, "eval/down": 9.0 - ctx.progress.epoch}


def judge(ctx):
    return 9.0 - ctx.progress.epoch


def test_what_judged_by_something_else_judges_anew(tmp_path):
    asks = {"up": ("eval/up", "max"), "down": ("eval/down", "min"), "by hand": (judge, "min")}
    for before, after in (("up", "down"), ("up", "by hand"), ("by hand", "up")):
        run_dir = tmp_path / f"{before} {after}"

        def run(which, do, run_dir=run_dir):
            monitor, mode = asks[which]
            early = EarlyStopping(monitor, mode=mode, patience=2)
            how = {"best": monitor, "mode": mode} if monitor is not judge else {}
            leaves = At("step_start", 7, do)
            callbacks = [Scores(), early, Checkpoint(every_epochs=9, keep=1, **how), leaves]
            return fit(run_dir, callbacks, epochs=6, eval_set=tiny.dataset(8), eval_every="epoch")

        run(before, lambda ctx: ctx.request.preempt("leave"))
        _, result, told = run(after, lambda ctx: None)
        assert (result.epochs, result.stop_reason) == (6, "all epochs done")
        line = f"EarlyStopping: {'a function' if before == 'by hand' else f'eval/{before}'} ("
        assert sum(word.startswith(line) and word.endswith("anew") for word in told.words) == 1


def test_the_best_by_another_metric_is_the_best_from_there_on(tmp_path):
    for best, mode, at in (("eval/up", "max", 7), ("eval/down", "min", 13)):
        leaves = At("step_start", at, lambda ctx: ctx.request.preempt("leave"))
        saves = Checkpoint(every_epochs=9, keep=None, best=best, mode=mode)
        fit(tmp_path, [Scores(), saves, leaves], epochs=6, eval_set=tiny.dataset(8))
    assert steps_of(tmp_path) == [4, 8, 12, 14]  # of the second, each evaluation was the best


class Fails(dtrain.Callback):
    """Fails in its own step end; what it kept is in the emergency's checkpoint."""

    def on_batch(self, ctx, step):
        if ctx.progress.step == 2:
            raise ValueError("planted")

    def state_dict(self):
        return {"seen": 2}


def removed(folder):
    whole, _, _ = fit(folder / "whole")
    with pytest.raises((ValueError, dtrain.DtrainError), match="planted"):
        fit(folder / "run", [Fails()])
    trainer, _, told = fit(folder / "run", resume="emergency")
    return tiny.digest(trainer.model) == tiny.digest(whole.model), told.words


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_callback_that_failed_may_be_removed(tmp_path, world_size):
    same, words = run_ranks(removed, world_size, tmp_path)[0]
    assert same
    assert "Fails is not among the callbacks any more: its state is dropped" in words


# ------------------------------------------------------------------------------- early stopping


def test_after_an_early_stop_the_advice_is_true(tmp_path):
    def callbacks():
        return [EarlyStopping("eval/loss", mode="max", patience=1), Checkpoint()]

    data = tiny.dataset(32)
    trainer, result, _ = fit(tmp_path / "run", callbacks(), epochs=9, eval_set=data)
    assert result.epochs < 9
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    with pytest.raises(ResumeError) as raised:
        fit(again, callbacks(), epochs=20, eval_set=data)
    assert "larger epochs" not in str(raised.value)
    assert "It stopped by itself, and a larger plan does not undo that" in str(raised.value)
    assert f"dtrain.load_model('{again}', model)" in str(raised.value)
    # In the same process a further fit is a wish of its own.
    more = trainer.fit(data, batch_size=8, epochs=20, eval_set=data)
    assert more.epochs > result.epochs


# ------------------------------------------------------------------------ evaluations and saves


class At(dtrain.Callback):
    """Does something once, after a step or in a hook, and counts evaluations."""

    def __init__(self, hook="", step=0, do=lambda ctx: None):
        self.hook, self.step, self.do = hook, step, do
        self.evaluated = []

    def _at(self, hook, ctx):
        if hook == self.hook and ctx.progress.step == self.step:
            self.do(ctx)

    def on_fit_start(self, ctx):
        self._at("fit_start", ctx)

    def on_step_end(self, ctx, step):
        self._at("step_end", ctx)

    def on_step_start(self, ctx, step):
        self._at("step_start", ctx)

    def on_eval_end(self, ctx, metrics):
        self.evaluated.append(ctx.progress.step)
        self._at("eval_end", ctx)

    def on_epoch_end(self, ctx):
        self._at("epoch_end", ctx)

    def on_fit_end(self, ctx):
        self._at("fit_end", ctx)


def steps_of(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("fit_start", 0, [1]),
        ("step_start", 1, [2]),
        ("step_end", 1, [2]),
        ("step_end", 4, [4]),
        ("step_end", 8, [8]),
        ("eval_end", 8, [8]),
        ("epoch_end", 4, [5]),
        ("epoch_end", 8, [8]),
        ("fit_end", 8, [8]),
    ],
)
def test_a_save_may_be_asked_for_at_any_moment_without_checkpoint(tmp_path, hook, step, saved):
    asks = At(hook, step, lambda ctx: ctx.request.save("why not"))
    fit(tmp_path, [asks], epochs=2, eval_set=tiny.dataset(8))
    assert steps_of(tmp_path) == saved


def test_a_save_asked_for_at_the_end_holds_the_weights_of_the_end(tmp_path):
    def change(ctx):
        ctx.request.save("of the end")
        with torch.no_grad():
            ctx.model[0].bias.fill_(7.0)

    fit(tmp_path, [At("fit_end", 4, change), Checkpoint()])
    net = tiny.model()
    dtrain.load_model(tmp_path, net)
    assert net[0].bias.tolist() == [7.0] * 16


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize("plan", [{"epochs": 2}, {"epochs": None, "max_steps": 8}])
@pytest.mark.parametrize("step", [4, 8])
def test_told_to_leave_after_an_epochs_last_step_a_run_saves_first(tmp_path, every, plan, step):
    def run(run_dir, at):
        look = At("step_start", at - 1, lambda ctx: ctx.request.preempt("leave"))
        how = {"eval_set": tiny.dataset(8), "eval_every": every} | plan
        early = EarlyStopping("eval/loss", patience=50)
        _, result, _ = fit(run_dir, [look, early, Checkpoint()], sinks=[JSONLines()], **how)
        return look.evaluated, result, early.state_dict()

    whole, result, early = run(tmp_path / "whole", 99)
    first, left, _ = run(tmp_path / "run", step)
    assert (left.preempted, left.steps) == (True, step)
    assert first == [at for at in whole if at < step]
    second, end, patience = run(tmp_path / "run", 99)
    assert first + second == whole
    assert patience == early
    assert (end.metrics, end.epochs) == (result.metrics, result.epochs)
    rows = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")
    ]
    kinds = [[(r["step"], r["kind"]) for r in map(json.loads, lines)] for lines in rows]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("every", [2, "epoch"])
@pytest.mark.parametrize("samples", [32, 64])  # the last step is an epoch's last, or not
def test_the_last_evaluation_is_not_repeated(tmp_path, every, samples):
    def run(do):
        look = At("fit_end", 4, do)
        how = {"eval_set": tiny.dataset(8), "eval_every": every, "data": tiny.dataset(samples)}
        callbacks = [look, Checkpoint(every_steps=2)]
        fit(tmp_path, callbacks, sinks=[JSONLines()], max_steps=4, epochs=None, **how)
        return look.evaluated

    def die(ctx):
        raise KeyboardInterrupt  # the checkpoint of the last step is there

    with pytest.raises(KeyboardInterrupt):
        run(die)
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert run(lambda ctx: None) == []
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_the_first_evaluation_is_not_repeated(tmp_path):
    def run(run_dir, do=lambda ctx: None):
        look, early = At("eval_end", 0, do), EarlyStopping("eval/loss", patience=9)
        how = {"eval_set": tiny.dataset(8), "eval_first": True}
        fit(run_dir, [look, early, Checkpoint()], sinks=[JSONLines()], **how)
        return look.evaluated, early.state_dict(), (run_dir / "metrics.jsonl").read_text()

    whole, patience, _ = run(tmp_path / "whole")
    first, _, _ = run(tmp_path / "run", lambda ctx: ctx.request.preempt("leave"))
    second, end, rows = run(tmp_path / "run")
    assert (first, first + second, end) == ([0], whole, patience)
    assert [json.loads(row)["step"] for row in rows.splitlines() if '"eval"' in row] == [0, 4]


def test_a_checkpoint_made_again_after_a_resume_keeps_its_figures(tmp_path):
    def run(do=lambda ctx: None):
        averages = StochasticWeightAveraging(0)  # count at the end, so the last one is made again
        saves = Checkpoint(best="eval/loss")
        callbacks = [At("epoch_end", 4, do), averages, saves]
        return fit(tmp_path, callbacks, eval_set=tiny.dataset(8))[1]

    assert run(lambda ctx: ctx.request.preempt("leave")).preempted
    assert run().best_checkpoint == tmp_path / "checkpoints" / "step-00000004"


# ----------------------------------------------------------------------------------- the files


def test_a_relative_run_dir_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    moves = At("step_end", 2, lambda ctx: os.chdir(tmp_path / "b"))
    fit("run", [moves, Checkpoint(every_steps=1)], sinks=[JSONLines()])
    assert (tmp_path / "a" / "run" / "checkpoints" / "step-00000004").is_dir()
    assert list((tmp_path / "b").iterdir()) == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    trainer, _, _ = fit("~/run", [Checkpoint()])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    net = tiny.model()
    dtrain.load_model("~/run", net)
    assert tiny.digest(net) == tiny.digest(trainer.model)
    assert dtrain.export_model("~/run", "~/weights.safetensors") == 4
    assert (tmp_path / "home" / "weights.safetensors").exists()


def test_never_moves_what_is_dtrains_only(tmp_path):
    sinks = [JSONLines("mine.jsonl"), CSV()]
    fit(tmp_path, [Checkpoint()], sinks=sinks, config={"a": 1})
    for name in ("train.py", "slurm-1.out", "data/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    fit(tmp_path, [Checkpoint()], sinks=[JSONLines("mine.jsonl"), CSV()], resume="never")
    aside = {path.name for path in (tmp_path / "before-1").iterdir()}
    assert aside == {"status.json", "checkpoints", "config.json", "mine.jsonl", "metrics.csv"}
    assert {"train.py", "slurm-1.out", "data"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("background", [True, False])
def test_what_cannot_be_deleted_is_told_and_saving_goes_on(tmp_path, monkeypatch, background):
    real = disk.delete

    def delete(path):
        if "step-00000001" in path.name:
            raise OSError(16, "Device or resource busy: .nfs0001")
        real(path)

    monkeypatch.setattr(disk, "delete", delete)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    _, _, told = fit(tmp_path, [Checkpoint(every_steps=1, keep=1, background=background)])
    assert steps_of(tmp_path) == [4]
    (words,) = [line for line in told.words if "warning" in line]
    assert "Device or resource busy" in words
    assert words.endswith("Saving goes on.")


def test_strange_files_beside_and_in_checkpoints_do_no_harm(tmp_path):
    fit(tmp_path, [Checkpoint()])
    folder = tmp_path / "checkpoints"
    (folder / ".nfs0001").touch()
    (folder / "step-00000004" / ".nfs0002").touch()
    (folder / "step-00000009").touch()
    (folder / "step-00000010").mkdir(mode=0o000)
    (folder / ".writing-step-00000008-x").mkdir()
    _, result, _ = fit(tmp_path, [Checkpoint(keep=1)], epochs=2)
    assert result.steps == 8


def until_full(run_dir, fill):
    _, result, _ = fit(run_dir, [At("step_end", 2, fill)])
    return result.stop_reason


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_without_checkpoint_costs_no_result(tmp_path, monkeypatch, world_size):
    full = threading.Event()
    real = disk.write_bytes

    def write(file, content):
        if full.is_set():  # no new file can be made, but for those that are there
            raise OSError(28, "No space left on device")
        real(file, content)

    monkeypatch.setattr(disk, "write_bytes", write)
    ends = run_ranks(until_full, world_size, tmp_path, lambda ctx: full.set())
    assert ends == ["all epochs done"] * world_size
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", 4)


def test_rows_are_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    asked, found = threading.Event(), []
    flush, write, sync = Dispatcher.flush, JSONLines.write, disk.sync

    def note_flush(self, timeout_s=10.0):
        asked.set()
        flush(self, timeout_s)

    def write_late(self, report):
        assert report.kind != "train" or asked.wait(10)
        write(self, report)

    def note_sync(path):
        if path.is_dir() and path.name.startswith(".writing-step"):
            found.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
            asked.clear()
        sync(path)

    monkeypatch.setattr(Dispatcher, "flush", note_flush)
    monkeypatch.setattr(JSONLines, "write", write_late)
    monkeypatch.setattr(disk, "sync", note_sync)
    saves = Checkpoint(every_steps=1, background=False)  # else later rows may be there as well
    fit(tmp_path, [saves], sinks=[JSONLines()])
    assert found == [1, 2, 3, 5]  # the epoch's means, too


def test_a_sink_that_hangs_or_fails_holds_up_no_checkpoint(tmp_path):
    class Hangs(JSONLines):
        def __init__(self, held, error=None):
            super().__init__()
            self.held, self.error = held, error

        def write(self, report):
            self.held.wait(20)
            if self.error:
                raise self.error

    held, free = threading.Event(), threading.Event()
    free.set()
    dispatcher = Dispatcher([Hangs(held), Hangs(free, OSError("gone"))], tmp_path)
    dispatcher.open()
    dispatcher.send(Report("train", 1, 0))
    dispatcher.flush(timeout_s=0.1)
    assert [name for name, _ in dispatcher.failures] == ["Hangs (2)"]
    held.set()
    dispatcher.flush()
    dispatcher.close()
