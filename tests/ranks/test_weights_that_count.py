"""One notion of a run's weights: after fit, in its files, in evaluations, and when it goes on."""

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import dtrain
from dtrain.callbacks import EMA, Checkpoint, EarlyStopping, StochasticWeightAveraging
from dtrain.checkpoint import format as files
from dtrain.cli import app
from dtrain.errors import CheckpointError, ConfigError
from dtrain.testing import run_ranks

EPOCHS, STEPS = 4, 16


class Follow(dtrain.Callback):
    """Keeps the weights after each step, and at the end of each evaluation, with its loss."""

    def __init__(self):
        self.steps, self.evaluated, self.losses = {}, {}, {}

    def on_step_end(self, ctx, step):
        self.steps[ctx.progress.step] = tiny.digest(ctx.model)

    def on_eval_end(self, ctx, metrics):
        self.evaluated[ctx.progress.step] = tiny.digest(ctx.model)
        self.losses[ctx.progress.step] = metrics["eval/loss"]


class Hears(dtrain.Sink):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def write(self, report):
        self.said.append(report.text)


class Worse(dtrain.Callback):
    """Uphill from the third epoch on, so that the best is not the last."""

    def on_step_start(self, ctx, step):
        for group in ctx.optimizer.param_groups:
            group["lr"] = 0.01 if step.number < 8 else 0.3


def fit(run_dir, callbacks, epochs=EPOCHS, **saves):
    follow = Follow()
    saves = Checkpoint(**({"keep": None} | saves))
    trainer = tiny.trainer([Worse(), *callbacks, saves, follow], run_dir=run_dir)
    data = tiny.dataset(96)
    result = trainer.fit(data, batch_size=24, epochs=epochs, eval_set=data)
    return trainer, result, follow


def loaded(path, which="final"):
    net = tiny.model()
    dtrain.load_model(path, net, which=which)
    return tiny.digest(net)


def stops():
    return EarlyStopping("eval/loss", patience=9, restore_best=True)


# By name: what is in the list, and whether the weights in the end are those of the last evaluation.
KINDS = {
    "none": (list, True),
    "EMA": (lambda: [EMA(0.9)], True),
    "EMA that is only evaluated": (lambda: [EMA(0.9, use_at_end=False)], False),
    "SWA": (lambda: [StochasticWeightAveraging(1)], False),
    "best": (lambda: [stops()], False),
    "best of EMA": (lambda: [stops(), EMA(0.9)], False),
    "best of EMA, the other way round": (lambda: [EMA(0.9), stops()], False),
    "EMA, then SWA": (lambda: [StochasticWeightAveraging(1), EMA(0.9)], False),
}


def each_kind(folder):
    found = {}
    for name, (make, _) in KINDS.items():
        trainer, result, follow = fit(folder / name, make())
        after = tiny.digest(trainer.model)
        with trainer._engine.stand_in.stands_aside():  # as for a checkpoint
            assert tiny.digest(trainer.model) == follow.steps[STEPS]
        assert tiny.digest(trainer.model) == after
        best = min(follow.losses, key=follow.losses.get)
        found[name] = after, follow.evaluated, follow.steps, best, result
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_after_fit_in_files_and_exported_they_are_the_same(tmp_path, world_size):
    everyones = run_ranks(each_kind, world_size, tmp_path)
    for name, (_, is_last) in KINDS.items():
        after, evaluated, steps, best, result = everyones[0][name]
        assert all(found[name][0] == after for found in everyones)
        run = tmp_path / name
        assert loaded(run) == loaded(result.last_checkpoint) == after, name
        dtrain.export_model(run, tmp_path / "a.safetensors")
        plain = tiny.model()
        plain.load_state_dict(load_file(tmp_path / "a.safetensors"))
        assert tiny.digest(plain) == after, name
        assert loaded(run, "raw") == steps[STEPS], name
        assert (after == evaluated[STEPS]) == is_last, name
        assert result.last_checkpoint == run / "checkpoints" / f"step-{STEPS:08d}"
        assert result.best_checkpoint is None
        if name.startswith("best"):
            assert best < STEPS
            assert after == evaluated[best] == loaded(run, "best"), name
        # On the way, what evaluations looked at: of these weights are the checkpoint's figures.
        on_the_way = evaluated[8] if "only" not in name else steps[8]
        assert loaded(run, 8) == loaded(run / "checkpoints" / "step-00000008") == on_the_way, name


def test_which_weights(tmp_path):
    def both():
        return fit(tmp_path, [EMA(0.9)], best="eval/loss")[1:]

    [(result, follow)] = run_ranks(both, 1)
    best = min(follow.losses, key=follow.losses.get)
    assert best < STEPS
    assert result.best_checkpoint == tmp_path / "checkpoints" / f"step-{best:08d}"
    assert loaded(tmp_path, "best") == follow.evaluated[best]
    assert loaded(tmp_path, "averaged") == follow.evaluated[STEPS]
    assert loaded(result.best_checkpoint) == follow.evaluated[best]
    assert loaded(result.best_checkpoint, "raw") == follow.steps[best]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: 4, 8, 12, 16$"):
        loaded(tmp_path, 5)
    with pytest.raises(CheckpointError, match="is of step 16, not 5"):
        loaded(result.last_checkpoint, 5)
    for wrong in ("ema", True, None):
        with pytest.raises(ConfigError, match="'final', 'raw', 'averaged', 'best', or the number"):
            loaded(tmp_path, wrong)
    file = result.last_checkpoint / "model.safetensors"
    with pytest.warns(UserWarning, match="holds the model's own weights, and those of EMA count"):
        assert loaded(file) == follow.steps[STEPS]
    assert loaded(file, "raw") == follow.steps[STEPS]
    with pytest.raises(CheckpointError, match="one file, with one set of weights"):
        loaded(file, "averaged")


def test_what_a_run_does_not_have_is_named(tmp_path):
    run_ranks(lambda: fit(tmp_path, [])[1], 1)
    with pytest.raises(CheckpointError, match="holds no averaged weights: averaged are those of"):
        loaded(tmp_path, "averaged")
    with pytest.raises(CheckpointError, match="holds no best weights"):
        loaded(tmp_path, "best")


def test_what_is_not_finite_is_never_the_best():
    def saved(step, loss):
        return files.Saved(None, step, {} if loss is None else {"eval/loss": loss})

    every = [saved(1, math.nan), saved(2, 0.5), saved(3, 0.2), saved(4, None), saved(5, 0.2)]
    every += [saved(6, math.inf), saved(7, -math.inf)]
    assert files.best_of(every, "eval/loss", "min").step == 3
    assert files.best_of(every, "eval/loss", "max").step == 2
    assert files.best_of(every, "eval/accuracy", "max") is None


class Halves(dtrain.Callback):
    """A user's own: half of the weights count in the end."""

    def __init__(self, names=("0.weight",)):
        self.names = names
        self.halves = {}

    def on_step_end(self, ctx, step):
        named = ctx.model.state_dict()
        self.halves = {name: named.get(name, named["0.weight"]) / 2 for name in self.names}

    def weights(self, which):
        return self.halves if which == "final" else None


def test_a_users_callback_has_weights(tmp_path):
    def halve(**options):
        trainer, _, _ = fit(tmp_path, [Halves()])
        own, net = tiny.model(), tiny.model()
        dtrain.load_model(tmp_path, own, which="raw")
        dtrain.load_model(tmp_path, net)
        assert torch.equal(net[0].weight, own[0].weight / 2)
        assert torch.equal(net[2].weight, own[2].weight)
        return tiny.digest(trainer.model) == tiny.digest(net)

    assert run_ranks(halve, 1) == [True]


def test_weights_of_a_wrong_name_are_refused():
    def wrong():
        with pytest.raises(ConfigError, match=r"Halves.weights\(\) has 'no', and the model has no"):
            tiny.trainer([Halves(["no"])]).fit(tiny.dataset(), batch_size=24, epochs=1)

    run_ranks(wrong, 1)


class Writes(dtrain.Callback):
    """Changes the model where an evaluation ends."""

    def __init__(self, replaces):
        self.replaces = replaces

    def on_eval_end(self, ctx, metrics):
        if self.replaces:
            ctx.model[2] = nn.Linear(16, 2)
        else:
            ctx.model[2].weight.data.zero_()


def test_what_a_hook_of_an_evaluation_writes_under_averages_is_told():
    hears = Hears()
    dtrain.init(seed=0)
    callbacks = [Writes(False), EMA(0.5)]
    run = dtrain.Trainer(tiny.model(), tiny.adam, tiny.loss_fn, callbacks=callbacks, sinks=[hears])
    run.fit(tiny.dataset(), batch_size=24, epochs=2, eval_set=tiny.dataset())
    told = [one for one in hears.said if "wrote 2.weight while the model held" in one]
    assert len(told) == 1
    run = tiny.trainer([Writes(True), EMA(0.5)])
    with pytest.raises(ConfigError, match=r"a hook of an evaluation replaced 2\.weight while"):
        run.fit(tiny.dataset(), batch_size=24, epochs=2, eval_set=tiny.dataset())


class Grows(dtrain.Callback):
    """Puts one more layer on top, where the second epoch begins."""

    def on_epoch_start(self, ctx):
        if ctx.progress.epoch == 1:
            torch.manual_seed(1)
            ctx.model.append(nn.Linear(2, 2))
            ctx.optimizer.add_param_group({"params": [*ctx.model[3].parameters()]})


class Falls(dtrain.Callback):
    def on_eval_end(self, ctx, metrics):
        metrics["eval/score"] = -ctx.progress.epoch


def test_the_best_of_a_model_that_has_grown_since_is_no_mixture():
    hears, follow = Hears(), Follow()
    stops = EarlyStopping("eval/score", mode="max", patience=9, restore_best=True)
    dtrain.init(seed=0)
    run = dtrain.Trainer(
        tiny.model(),
        tiny.adam,
        tiny.loss_fn,
        callbacks=[Grows(), follow, Falls(), stops],
        sinks=[hears],
    )
    run.fit(tiny.dataset(), batch_size=24, epochs=3, eval_set=tiny.dataset())
    assert tiny.digest(run.model) == follow.steps[8]  # the first evaluation of what it is now
    assert any("the model has other tensors than at its best check" in one for one in hears.said)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(self.two(torch.tanh(self.one(x))))


def test_tied_weights_count_under_all_their_names(tmp_path):
    def train():
        trainer = tiny.trainer([EMA(0.9), Checkpoint()], net=Tied(), run_dir=tmp_path)
        trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
        return tiny.digest(trainer.model)

    [after] = run_ranks(train, 1)
    dtrain.export_model(tmp_path, tmp_path / "a.safetensors")
    for path in (tmp_path, tmp_path / "a.safetensors"):
        net = Tied()
        dtrain.load_model(path, net)
        assert tiny.digest(net) == after


class ChangesAtEnd(dtrain.Callback):
    def on_fit_end(self, ctx):
        with torch.no_grad():
            ctx.model[0].bias.add_(1.0)


@pytest.mark.parametrize("changes", [True, False])
def test_what_changes_after_the_last_checkpoint_is_said(tmp_path, changes):
    def train():
        hears = Hears()
        dtrain.init(seed=0)
        trainer = dtrain.Trainer(
            tiny.model(),
            tiny.adam,
            tiny.loss_fn,
            callbacks=[Checkpoint(), *([ChangesAtEnd()] if changes else [EMA(0.9)])],
            sinks=[hears],
            run_dir=tmp_path,
        )
        trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
        return "a callback's on_fit_end changed the model (0.bias), and no" in "".join(hears.said)

    assert run_ranks(train, 1) == [changes]


# ----------------------------------------------------------------------------- going on


def goes_on(tampers):
    """Returns the weights of a fit in two parts, and of one in one, and what was said."""
    hears = Hears()

    def make():
        dtrain.init(seed=0)
        callbacks = [EMA(0.9), stops()]
        net = tiny.model()
        return dtrain.Trainer(net, tiny.adam, tiny.loss_fn, callbacks=callbacks, sinks=[hears])

    data = tiny.dataset()
    parts, whole = make(), make()
    parts.fit(data, batch_size=24, epochs=2, eval_set=data, name="main")
    if tampers:
        with torch.no_grad():
            parts.model[0].bias.add_(1.0)
    parts.fit(data, batch_size=24, epochs=4, eval_set=data, name="main")
    whole.fit(data, batch_size=24, epochs=4, eval_set=data)
    return tiny.digest(parts.model) == tiny.digest(whole.model), "\n".join(hears.said)


def test_the_same_fit_goes_on_from_the_models_own_weights():
    [(same, said)] = run_ranks(goes_on, 1, False)
    assert same
    assert "the model holds the weights of EarlyStopping, not the last step's" in said
    assert "was changed since" not in said


def test_what_was_changed_between_two_calls_stays_and_is_said():
    [(same, said)] = run_ranks(goes_on, 1, True)
    assert not same
    assert "the model was changed since fit left averaged or best weights in it (" in said
    assert "training goes on from these" in said


# ----------------------------------------------------------------------------- dtrain show


def test_the_show_and_export_commands(tmp_path):
    run_ranks(lambda: fit(tmp_path / "run", [stops(), EMA(0.9)], best="eval/loss")[1], 1)
    run = str(tmp_path / "run")
    done = CliRunner().invoke(app, ["show", run])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == f"{run}: finished, step 16, 4 epochs (all epochs done)"
    assert [line.split()[0] for line in lines[1:5]] == [f"step-{n:08d}" for n in (4, 8, 12, 16)]
    assert sum("best by eval/loss (min)" in line for line in lines) == 1
    assert lines[4].endswith("last")
    assert lines[5:] == [
        "the weights that count: EarlyStopping's, of step-00000016",
        "it holds also which='averaged': EMA's",
        "it holds also which='best': EarlyStopping's",
    ]
    run_ranks(lambda: fit(tmp_path / "plain", [])[1], 1)
    done = CliRunner().invoke(app, ["show", str(tmp_path / "plain")])
    assert done.exit_code == 0, done.output
    assert "best" not in done.output  # no `Checkpoint(best=...)`, as in most runs
    file = str(tmp_path / "a.safetensors")
    for which, good in (("raw", 0), ("8", 0), ("averaged", 0), ("5", 2), ("ema", 2)):
        done = CliRunner().invoke(app, ["export", "--which", which, run, file])
        assert done.exit_code == good, done.output
    done = CliRunner().invoke(app, ["show", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert done.output.startswith("dtrain show: no intact checkpoint is in ")


# ----------------------------------------------------------------------------- names


def compiled(how):
    net = tiny.model()
    if how == "whole":
        return torch.compile(net, backend="eager")
    if how == "parts":
        net[0] = torch.compile(net[0], backend="eager")
    return net


def test_compiled_and_plain_models_take_up_each_others(tmp_path):
    def train(run_dir, how, epochs):
        with dtrain.init(seed=0):
            saves = Checkpoint(every_epochs=1, trainable_only=True)
            callbacks = [EMA(0.9), stops(), saves]
            trainer = tiny.trainer(callbacks, net=compiled(how), run_dir=run_dir)
            data = tiny.dataset()
            result = trainer.fit(data, batch_size=24, epochs=epochs, eval_set=data)
            weights = [t.clone() for t in trainer.model.state_dict().values()]
            return result.steps, weights

    _, plain = train(tmp_path / "plain", "", 4)
    for epochs, how in enumerate(("whole", "", "parts", "whole"), start=1):
        steps, weights = train(tmp_path / "run", how, epochs)
        assert steps == 4 * epochs
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    names = set(tiny.model().state_dict())
    assert set(load_file(tmp_path / "run/checkpoints/step-00000016/model.safetensors")) == names
    for how in ("", "whole", "parts"):
        net = compiled(how)
        dtrain.load_model(tmp_path / "run", net)
        loaded = net.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(loaded, plain, strict=True))


def wrapped():
    hears = Hears()

    def train(net, loss, sinks=()):
        trainer = dtrain.Trainer(net, tiny.adam, loss, sinks=sinks)
        trainer.fit(tiny.dataset(90), batch_size=24, epochs=2)
        return tiny.digest(trainer.model)

    dtrain.init(seed=0)
    plain = train(tiny.model(), tiny.loss_fn)
    parallel = nn.parallel.DistributedDataParallel(tiny.model())
    assert train(parallel, tiny.loss_fn, [hears]) == plain
    if dtrain.init(seed=0).is_main:
        assert "the model came in DistributedDataParallel: its module is" in "".join(hears.said)
    # Also where the loss function has it from elsewhere: nothing is reduced twice.
    parallel = nn.parallel.DistributedDataParallel(tiny.model())
    assert train(parallel, lambda model, batch: tiny.loss_fn(parallel, batch)) == plain
    inside = nn.Sequential(nn.parallel.DistributedDataParallel(tiny.model()))
    with pytest.raises(ConfigError, match="'0' is wrapped in DistributedDataParallel, which"):
        dtrain.Trainer(inside, tiny.adam, tiny.loss_fn)


def test_a_wrapped_model_is_unwrapped_or_refused():
    dtrain.testing.run_processes(wrapped, 2)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LazyLinear(16), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_lazy_layers(tmp_path):
    def train():
        with pytest.raises(ConfigError, match=r"shapes yet \(body.weight, body.bias\).*one batch"):
            tiny.trainer(net=Lazy())
        net = Lazy()
        net(torch.zeros(2, 8))
        trainer = tiny.trainer([Checkpoint()], net=net, run_dir=tmp_path)
        trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
        return tiny.digest(trainer.model)

    [after] = run_ranks(train, 1)
    net = Lazy()  # takes its shapes from the file
    dtrain.load_model(tmp_path, net)
    assert tiny.digest(net) == after
    assert F.softmax(net(torch.zeros(1, 8)), -1).shape == (1, 2)
