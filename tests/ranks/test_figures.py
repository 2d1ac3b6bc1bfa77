"""What a figure belongs to: its weights, its epoch, its step; and whose name it bears."""

import io
import json
import math

import pytest
import tiny
import torch
import torchmetrics
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import dtrain
from dtrain.callbacks import EMA, Checkpoint, EarlyStopping, LRSchedule, ParamSchedule, TimeLimit
from dtrain.sinks import CSV, Console, JSONLines
from dtrain.testing import run_processes, run_ranks, try_ranks

NAN = math.nan
DATA = tiny.dataset(32)


class Scores(dtrain.Callback):
    """Adds planted values to the evaluations."""

    def __init__(self, values, name="eval/score"):
        self.values, self.metric = iter(values), name

    def on_eval_end(self, ctx, metrics):
        value = next(self.values)
        metrics[self.metric] = value[dtrain.init().rank] if isinstance(value, tuple) else value


class Planted(dtrain.Callback):
    """As its on_eval_end, which others can read, adds a metric."""

    def on_eval_end(self, ctx, metrics):
        metrics["eval/planted"] = 1.0


def told(ranks):
    """What each rank was told, where all failed."""
    return [f"{type(one.error).__name__}: {one.error}" for one in ranks]


def manifests(run_dir):
    folders = sorted((run_dir / "checkpoints").iterdir())
    return {int(p.name[5:]): json.loads((p / "manifest.json").read_text()) for p in folders}


# ---------------------------------------------------------------------- the best checkpoint


def keep_best(run_dir, values, mode="min"):
    best = Checkpoint(every_epochs=1, keep=1, best="eval/score", mode=mode, background=False)
    run = tiny.trainer([best, Scores(values)], run_dir=run_dir)
    run.fit(DATA, batch_size=16, epochs=len(values), eval_set=DATA)


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([NAN, 0.3, 0.9, 0.8, 0.7], "min", 4),
        ([0.3, NAN, 0.9, 0.8, 0.7], "max", 6),
        ([-math.inf, 0.5, 0.4, 0.6], "min", 6),
        ([0.5, math.inf, 0.6, 0.4], "max", 6),
    ],
)
def test_what_is_not_finite_is_never_the_best(tmp_path, values, mode, best):
    run_ranks(keep_best, 2, tmp_path, values, mode)
    assert list(manifests(tmp_path)) == sorted({best, 2 * len(values)})


class Diverges(dtrain.Callback):
    """Spoils the weights after the first evaluation."""

    def on_step_start(self, ctx, step):
        for group in ctx.optimizer.param_groups:
            group["lr"] = 0.5 if step.number < 6 else -2.0


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


def diverge(run_dir, options, fit):
    saves = Checkpoint(keep=1, best="eval/loss", background=False, **options)
    run = tiny.trainer([saves, Diverges()], optimizer=sgd, run_dir=run_dir)
    run.fit(tiny.dataset(), batch_size=16, eval_set=tiny.dataset(), **fit)


def loss_of(folder):
    net = tiny.model()
    dtrain.load_model(folder, net)
    x, y = tiny.dataset().tensors
    return F.cross_entropy(net(x), y).item()


@pytest.mark.parametrize(
    ("options", "fit", "kept"),
    [
        ({"every_steps": 4}, {"max_steps": 20, "eval_every": "epoch"}, [6, 20]),
        ({"every_steps": 5}, {"max_steps": 10, "eval_every": 3}, [6, 10]),
        ({"every_epochs": 3}, {"epochs": 3}, [6, 18]),
        # Worse from the first step on, and saved before the last evaluation, in the same step.
        ({"every_steps": 2}, {"max_steps": 2, "eval_every": 100}, [2]),
        ({"every_steps": 4}, {"max_steps": 6, "eval_every": 2, "eval_first": True}, [6]),
    ],
)
def test_the_best_has_the_weights_that_its_figure_says(tmp_path, options, fit, kept):
    run_ranks(diverge, 2, tmp_path, options, fit)
    saved = manifests(tmp_path)
    assert list(saved) == kept
    figures = {step: one["metrics"].get("eval/loss") for step, one in saved.items()}
    assert figures[kept[0]] is not None
    for step, figure in figures.items():
        if figure is not None:
            weights = tmp_path / "checkpoints" / f"step-{step:08d}"
            assert figure == pytest.approx(loss_of(weights), rel=1e-5)


class Worse(dtrain.Callback):
    def on_step_start(self, ctx, step):
        ctx.optimizer.param_groups[0]["lr"] = -1.0


def worse_from_the_start(run_dir):
    saves = Checkpoint(every_epochs=1, keep=1, best="eval/loss", background=False)
    run = tiny.trainer([saves, Worse()], optimizer=sgd, run_dir=run_dir)
    run.fit(DATA, batch_size=16, epochs=2, eval_set=DATA, eval_first=True)


def test_weights_that_were_best_before_the_first_step_are_kept(tmp_path):
    run_ranks(worse_from_the_start, 2, tmp_path)
    assert list(manifests(tmp_path)) == [0, 4]


def killed_and_continued(run_dir):
    class Dies(dtrain.Callback):
        def on_epoch_end(self, ctx):
            if ctx.progress.epoch == 1 and not (run_dir / "died").exists():
                ctx.comm.on_main("died", (run_dir / "died").touch)
                raise RuntimeError("planted")

    def start(values):
        saves = Checkpoint(every_epochs=1, keep=1, best="eval/score", background=False)
        run = tiny.trainer([saves, Scores(values), Dies()], run_dir=run_dir)
        run.fit(DATA, batch_size=16, epochs=4, eval_set=DATA)

    with pytest.raises(RuntimeError, match="planted"):
        start([0.3, 0.5])
    start([0.4, 0.6])


def test_the_best_of_before_a_kill_stays_the_best(tmp_path):
    run_ranks(killed_and_continued, 1, tmp_path)
    assert list(manifests(tmp_path)) == [2, 8]


def keep_best_of_training(run_dir):
    saves = Checkpoint(every_steps=1, keep=1, best="train/loss", mode="max", background=False)
    run = tiny.trainer([saves], optimizer=sgd, run_dir=run_dir)
    return run.fit(DATA, batch_size=16, epochs=3).history


def test_the_best_of_a_training_figure_is_that_of_an_epoch(tmp_path):
    [history, _] = run_ranks(keep_best_of_training, 2, tmp_path)
    assert list(manifests(tmp_path)) == [2, 6]
    best = manifests(tmp_path)[2]["metrics"]["epoch/loss"]
    assert best == next(row["epoch/loss"] for row in history if "epoch/loss" in row)


# ------------------------------------------------------------------------- figures of an epoch


class Judged(dtrain.Callback):
    def __init__(self):
        self.at_ends, self.losses, self.accuracies = [], [], []

    def on_step_end(self, ctx, step):
        self.losses.append(step.loss_mean)

    def on_epoch_end(self, ctx):
        names = ("train/loss", "epoch/loss", "epoch/accuracy")
        self.at_ends.append([ctx.metrics[name] for name in names])


def epochs_of(log_every):
    judged, stops = Judged(), EarlyStopping("train/loss", patience=100)
    run = tiny.trainer([judged, stops])
    result = run.fit(tiny.dataset(88), batch_size=8, epochs=3, log_every=log_every)
    rows = [row for row in result.history if "epoch/loss" in row]
    return judged.at_ends, judged.losses, rows, stops.best


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_figures_of_an_epoch_are_its_means(ranks):
    found = {log_every: run_ranks(epochs_of, ranks, log_every) for log_every in (50, 5, 3)}
    for by_rank in found.values():
        assert all(one == by_rank[0] for one in by_rank)
        at_ends, losses, rows, best = by_rank[0]
        means = [sum(losses[i * 11 : i * 11 + 11]) / 11 for i in range(3)]
        assert [one[0] for one in at_ends] == pytest.approx(means, rel=1e-12)
        assert [one[1] for one in at_ends] == [one[0] for one in at_ends]
        assert [row["epoch/loss"] for row in rows] == [one[0] for one in at_ends]
        assert [row["epoch/accuracy"] for row in rows] == [one[2] for one in at_ends]
        assert [(row["step"], row["epoch"]) for row in rows] == [(11, 0), (22, 1), (33, 2)]
        assert best == min(one[0] for one in at_ends)
    # However often is reported: the same, to the bit for the loss.
    first, *others = (by_rank[0] for by_rank in found.values())
    for other in others:
        assert [one[0] for one in other[0]] == [one[0] for one in first[0]]
        pairs = zip(other[0], first[0], strict=True)
        assert all(a[2] == pytest.approx(b[2], rel=1e-12) for a, b in pairs)


def resumed_epoch(run_dir, kill):
    class Dies(dtrain.Callback):
        def on_step_start(self, ctx, step):
            if kill and step.number == 9 and not (run_dir / "died").exists():
                ctx.comm.on_main("died", (run_dir / "died").touch)
                raise RuntimeError("planted")

    def start():
        saves = Checkpoint(every_steps=4, background=False)
        run = tiny.trainer([saves, Dies()], run_dir=run_dir)
        return run.fit(tiny.dataset(), batch_size=16, epochs=2, log_every=3)

    if kill:
        with pytest.raises(RuntimeError, match="planted"):
            start()
    return [row for row in start().history if "epoch/loss" in row][-1]


def test_an_epoch_that_was_interrupted_has_the_same_figures(tmp_path):
    whole, killed = (run_ranks(resumed_epoch, 1, tmp_path / str(k), k) for k in (False, True))
    assert whole == killed


def into_files(run_dir):
    run = tiny.trainer(run_dir=run_dir)
    run._sinks = (JSONLines(), CSV())
    run.fit(DATA, batch_size=16, epochs=2, eval_set=DATA)


def test_figures_of_an_epoch_reach_sinks_as_such(tmp_path):
    run_ranks(into_files, 1, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "epoch", "eval"] * 2
    assert set(rows[1]) - {"step", "epoch", "kind", "seconds", "samples"} == {
        "epoch/loss",
        "epoch/accuracy",
    }
    head, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "epoch/loss" in head.split(",")
    assert [line.split(",")[2] for line in lines] == ["train", "epoch", "eval"] * 2


class SkipAll(dtrain.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_batch(self, ctx, step):
        if ctx.progress.epoch == self.epoch:
            ctx.request.skip("all of it")


def stop_by_nothing(metric, mode, epoch):
    stops = EarlyStopping(metric, mode=mode, patience=1)
    run = tiny.trainer([SkipAll(epoch), stops], optimizer=sgd)
    return run.fit(DATA, batch_size=16, epochs=5), stops.bad_checks


@pytest.mark.parametrize(
    ("metric", "mode", "epoch"), [("train/accuracy", "max", 1), ("train/loss", "min", 0)]
)
def test_an_epoch_without_a_figure_is_no_improvement(metric, mode, epoch):
    for result, bad in run_ranks(stop_by_nothing, 2, metric, mode, epoch):
        assert (result.epochs, bad) == (epoch + 1, 1)
        assert f"{metric} has not improved 1 times" in result.stop_reason


def plateau_of_training():
    schedule = LRSchedule(
        # The first is an improvement, and nothing after it.
        lambda opt, epochs: ReduceLROnPlateau(
            opt, factor=0.5, patience=0, threshold=100, threshold_mode="abs"
        ),
        every="epoch",
        monitor="train/loss",
    )
    run = tiny.trainer([schedule], optimizer=sgd)
    run.fit(DATA, batch_size=16, epochs=4)
    return run.optimizer.param_groups[0]["lr"], schedule._scheduler.best


def test_a_plateau_of_a_training_figure_is_judged_once_an_epoch():
    [(lr, best), other] = run_ranks(plateau_of_training, 2)
    assert other == (lr, best)
    assert lr == 0.1 * 0.5**3
    assert 0 < best < 2


def planted_infinity(kind):
    values = [0.5, -math.inf, 0.6, NAN, 0.4]
    if kind == "early stopping":
        judge = EarlyStopping("eval/score", patience=100)
    else:
        judge = LRSchedule(
            lambda opt, epochs: ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.0),
            every="epoch",
            monitor="eval/score",
        )
    run = tiny.trainer([Scores(values), judge], optimizer=sgd)
    run.fit(DATA, batch_size=16, epochs=5, eval_set=DATA)
    lr = run.optimizer.param_groups[0]["lr"]
    return judge.best if kind == "early stopping" else (judge._scheduler.best, lr)


def test_what_is_not_finite_is_no_improvement():
    assert run_ranks(planted_infinity, 2, "early stopping") == [0.4, 0.4]
    assert run_ranks(planted_infinity, 2, "plateau") == [(0.4, 0.1 / 8)] * 2


# ------------------------------------------------------------------------ what cannot be judged


def judged_by(make, evaluates=True, **fit):
    steps = []

    class Counts(dtrain.Callback):
        def on_step_end(self, ctx, step):
            steps.append(step.number)

    callbacks, options = make()
    run = tiny.trainer([*callbacks, Counts()], **options)
    sets = DATA if evaluates is True else evaluates
    try:
        run.fit(DATA, batch_size=16, epochs=2, eval_set=sets, **fit)
    except dtrain.DtrainError as error:
        return f"{type(error).__name__}: {error}", len(steps)
    return "", len(steps)


def plateau(monitor):
    return LRSchedule(lambda opt, n: ReduceLROnPlateau(opt), monitor=monitor)


AT_THE_START = {
    "no eval_set, Checkpoint": (
        lambda run_dir: ([Checkpoint(best="eval/loss")], {"run_dir": run_dir}),
        {"evaluates": None},
        "Checkpoint('eval/loss') needs fit(eval_set=...)",
    ),
    "no eval_set, plateau": (
        lambda run_dir: ([plateau("eval/loss")], {}),
        {"evaluates": None},
        "LRSchedule('eval/loss') needs fit(eval_set=...)",
    ),
    "evaluation off": (
        lambda run_dir: ([EarlyStopping("eval/loss")], {}),
        {"eval_every": None},
        "needs fit(eval_set=...) and eval_every: with eval_every=None nothing is evaluated",
    ),
    "another set": (
        lambda run_dir: ([Checkpoint(best="eval/loss"), EMA(0.9)], {"run_dir": run_dir}),
        {"evaluates": {"a": DATA, "b": DATA}},
        "Checkpoint('eval/loss'): the evaluation's metrics are eval/a/..., eval/b/...",
    ),
    "half a name": (
        lambda run_dir: ([Checkpoint(best="loss")], {"run_dir": run_dir}),
        {},
        "Checkpoint('loss'): a metric's name begins with 'train/' or 'eval/'",
    ),
    "stands before": (
        lambda run_dir: ([EarlyStopping("eval/planted"), Planted()], {}),
        {},
        "EarlyStopping('eval/planted') stands before Planted in callbacks=[...], which adds this",
    ),
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_what_cannot_exist_is_refused_at_the_start(tmp_path, name):
    make, options, words = AT_THE_START[name]
    for error, steps in run_ranks(lambda: judged_by(lambda: make(tmp_path), **options), 2):
        assert error.startswith("ConfigError: ")
        assert words in error
        assert steps == 0


WHEN_ASKED = {
    "Checkpoint": (
        lambda run_dir: ([Checkpoint(best="eval/los")], {"run_dir": run_dir}),
        "Checkpoint: no metric 'eval/los'; there are eval/accuracy, eval/loss (a callback that",
    ),
    "Checkpoint of training": (
        lambda run_dir: ([Checkpoint(best="train/los")], {"run_dir": run_dir}),
        "Checkpoint: no metric 'train/los'; there are train/accuracy, train/loss (means of an ",
    ),
    "before one that hides it": (
        lambda run_dir: ([EarlyStopping("eval/score"), Scores([1.0])], {}),
        "EarlyStopping: no metric 'eval/score'; there are eval/accuracy, eval/loss (a callback ",
    ),
}


@pytest.mark.parametrize("name", WHEN_ASKED)
def test_what_is_not_there_when_asked_for_is_an_error(tmp_path, name):
    make, words = WHEN_ASKED[name]
    for error, steps in run_ranks(judged_by, 2, lambda: make(tmp_path)):
        assert error.startswith(f"ConfigError: {words}")
        assert steps == 2


def fits(make):
    callbacks, options = make()
    return tiny.trainer(callbacks, **options).fit(DATA, batch_size=16, epochs=1, eval_set=DATA)


class Reads(dtrain.Callback):
    def on_eval_end(self, ctx, metrics):
        assert metrics["eval/planted"] == 1.0


def test_a_monitor_after_the_callback_that_adds_finds_it(tmp_path):
    order = [Planted, lambda: EarlyStopping("eval/planted"), Reads]
    run_ranks(fits, 2, lambda: ([make() for make in order], {}))
    # Checkpoint judges once all have added theirs.
    made = {"run_dir": tmp_path}
    run_ranks(fits, 2, lambda: ([Checkpoint(best="eval/planted"), Planted()], made))


# ----------------------------------------------------------------------- what callbacks add


def added(value, name="eval/score"):
    run = tiny.trainer([Scores([value], name)])
    return run.evaluate(DATA, batch_size=16)


def test_a_metric_that_differs_between_ranks_is_found():
    ranks = try_ranks(added, 2, (0.5, 0.25))
    for error in told(ranks):
        assert error.startswith("RankMismatch: on_eval_end left other metrics on some ranks")
        assert "  eval/score: 0.5 on rank 0, 0.25 on rank 1\n" in error
        assert "eval/loss:" not in error
    assert [one["eval/score"] for one in run_ranks(added, 2, 0.5)] == [0.5, 0.5]
    assert all(math.isnan(one["eval/score"]) for one in run_ranks(added, 2, (NAN, NAN)))
    assert run_ranks(added, 1, torch.tensor(0.5))[0]["eval/score"] == 0.5


class OnlyRank0(dtrain.Callback):
    def on_eval_end(self, ctx, metrics):
        if dtrain.init().rank == 0:
            metrics["eval/bleu"] = 12.5


def only_rank_0():
    run = tiny.trainer([OnlyRank0()])
    run.fit(DATA, batch_size=16, epochs=1, eval_set=DATA)


def test_a_metric_that_only_one_rank_adds_is_found():
    for error in told(try_ranks(only_rank_0, 2)):
        assert error.startswith("RankMismatch: ")
        assert "  eval/bleu: 12.5 on rank 0, not there on rank 1\n" in error


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("eval/loss", 0.0, "ConfigError: on_eval_end made 'eval/loss' 0, and the evaluation found"),
        ("lr", 0.0, "ConfigError: 'lr' is the name of a figure that dtrain itself reports"),
        ("train/loss", 0.0, "ConfigError: on_eval_end added 'train/loss': an evaluation's"),
        ("eval/x", torch.zeros(2), "LossError: metric 'eval/x' is a tensor of shape [2]"),
        ("eval/x", "good", "LossError: metric 'eval/x' is 'good'"),
    ],
)
def test_what_callbacks_may_not_add_is_refused(name, value, words):
    for error in told(try_ranks(added, 2, value, name)):
        assert error.startswith(words)


def logs(name):
    class Logs(dtrain.Callback):
        def on_step_end(self, ctx, step):
            ctx.log(name, 5.0)

    run = tiny.trainer([Logs()])
    return run.fit(DATA, batch_size=16, epochs=1).history


@pytest.mark.parametrize(
    "name",
    ["train/loss", "lr", "lr/head", "loss_scale", "step", "epoch", "kind", "samples", "epoch/x"],
)
def test_names_of_dtrains_own_are_refused(name):
    for error in told(try_ranks(logs, 2, name)):
        assert f"{name!r} is the name of a figure that dtrain itself reports" in error


def test_a_name_may_be_given_once():
    for error in told(try_ranks(logs, 2, "eval/loss")):
        assert "Add it to the evaluation's own figures: metrics['eval/loss'] = ..." in error
    for error in told(try_ranks(logs, 2, "train/accuracy")):
        assert "'train/accuracy' is logged by a callback and is a metric of the loss fun" in error
    assert run_ranks(logs, 2, "my/lr")[0][0]["my/lr"] == 5.0


def two_sets():
    def loss(net, batch):
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, metrics={"a/loss": 1.0})

    return tiny.trainer(loss=loss).evaluate({"": DATA, "a": DATA}, batch_size=16)


def test_two_sets_do_not_share_a_name():
    for error in told(try_ranks(two_sets, 2)):
        assert "two figures of the evaluation are named eval/a/loss" in error


# --------------------------------------------------------------------------- torchmetrics objects


def anew(each_time, trains):
    kept = torchmetrics.SumMetric()

    def loss(net, batch):
        count = torchmetrics.SumMetric() if each_time else kept
        count.update(len(batch[0]))
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, metrics={"count": count})

    run = tiny.trainer(loss=loss)
    if trains:
        return run.fit(DATA, batch_size=8, epochs=1).metrics["train/count"]
    return run.evaluate(DATA, batch_size=8)["eval/count"]


@pytest.mark.parametrize("trains", [False, True])
def test_a_metric_object_made_anew_in_each_batch_is_refused(trains):
    for error in told(try_ranks(anew, 2, True, trains)):
        where = "train" if trains else "eval"
        assert f"the metric '{where}/count' is another torchmetrics object than in the" in error
        assert "Make it once, outside of the loss function" in error
    assert run_ranks(anew, 2, False, trains) == [32.0, 32.0]


def epoch_of_an_object():
    f1 = torchmetrics.classification.BinaryF1Score()

    def loss(net, batch):
        f1.update(batch[1].float(), batch[1])
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, metrics={"f1": f1})

    run = tiny.trainer([EarlyStopping("train/f1", mode="max")], loss=loss)
    run.fit(DATA, batch_size=8, epochs=2)


def hand_over_an_idle_object(kind):
    hears = tiny.Words()
    metric = {
        "forgotten": torchmetrics.MeanMetric,
        "running": lambda: torchmetrics.RunningMean(window=3),
    }[kind]()

    def loss(net, batch):
        if kind == "running":
            metric.update(1.0)
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, metrics={"m": metric})

    dtrain.init(seed=0)
    run = dtrain.Trainer(tiny.model(), sgd, loss, sinks=[hears])
    result = run.fit(DATA, batch_size=16, epochs=2, eval_set=DATA)
    assert not {"train/m", "eval/m"} & {*result.metrics}
    return hears.words


@pytest.mark.parametrize("kind", ["forgotten", "running"])
def test_a_metric_object_that_was_not_updated_is_named_once(kind):
    told = " ".join(run_ranks(hand_over_an_idle_object, 2, kind)[0])
    for name in ("train/m", "eval/m"):
        assert told.count(f"no rank had updated the torchmetrics object {name}, so there was") == 1


def test_a_metric_object_has_no_figure_of_an_epoch():
    for error in told(try_ranks(epoch_of_an_object, 2)):
        assert "no metric 'train/f1'; there are train/loss (means of an epoch, which a" in error


def in_the_middle(hook):
    count = torchmetrics.SumMetric()

    def loss(net, batch):
        count.update(len(batch[0]))
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, metrics={"count": count})

    class Evaluates(dtrain.Callback):
        def on_step_end(self, ctx, step):
            self.found = run.evaluate(DATA, batch_size=8) if hook == "step" else None

        def on_epoch_end(self, ctx):
            self.found = run.evaluate(DATA, batch_size=8)

    evaluates = Evaluates()
    run = tiny.trainer([evaluates], loss=loss)
    run.fit(DATA, batch_size=8, epochs=1)
    return evaluates.found["eval/count"]


def test_a_metric_object_does_not_mix_training_and_evaluation():
    assert run_ranks(in_the_middle, 2, "epoch") == [32.0, 32.0]
    for error in told(try_ranks(in_the_middle, 2, "step")):
        assert "the torchmetrics object 'eval/count' holds batches of the training, too" in error


def never_judged():
    heard = []

    class Heard(dtrain.Sink):
        def write(self, report):
            heard.append(report.text)

    run = tiny.trainer([EarlyStopping("train/loss")])
    run._sinks = (Heard(),)
    run.fit(DATA, batch_size=8, max_steps=2)
    return heard


def test_a_stop_that_never_judged_says_so():
    [heard] = run_ranks(never_judged, 1)
    assert any(text.startswith("EarlyStopping has judged nothing") for text in heard)


# --------------------------------------------------------------------------- Trainer.evaluate


class Follows(dtrain.Callback):
    """Adds how many micro-batches were seen; asks and logs, as if it were a part of a training."""

    def __init__(self):
        self.calls = []

    def on_eval_start(self, ctx):
        self.calls.append(("start", ctx.in_fit))
        self.seen = 0

    def on_eval_batch(self, ctx, step):
        self.seen += step.samples

    def on_eval_end(self, ctx, metrics):
        self.calls.append(("end", ctx.in_fit))
        seen = ctx.comm.all_reduce("seen", torch.tensor(self.seen))
        metrics["eval/seen"] = seen.item()
        if not ctx.in_fit:
            ctx.log("outside", 1.0)
            ctx.request.stop("outside")
            ctx.request.preempt("outside")


def evaluate_outside():
    stops = EarlyStopping("eval/seen", patience=1)
    follows = Follows()
    limit = TimeLimit("1h")
    schedule = LRSchedule(
        lambda opt, n: ReduceLROnPlateau(opt, patience=0, threshold=1e9), monitor="eval/loss"
    )
    run = tiny.trainer([follows, stops, limit, schedule], optimizer=sgd)
    before = run.evaluate(DATA, batch_size=8)
    result = run.fit(DATA, batch_size=8, epochs=1, eval_set=DATA)
    checks = stops.bad_checks, stops.best, schedule._scheduler.last_epoch
    after = [run.evaluate({"test": DATA}, batch_size=8) for _ in range(3)]
    assert (stops.bad_checks, stops.best, schedule._scheduler.last_epoch) == checks
    assert all("outside" not in row for row in result.history)
    return before, result.metrics["eval/seen"], after, follows.calls, result.stop_reason


def test_evaluate_fires_the_hooks_of_an_evaluation():
    for before, within, after, calls, why in run_ranks(evaluate_outside, 2):
        assert before["eval/seen"] == within == after[0]["eval/seen"] == len(DATA)
        assert set(after[0]) == {"eval/test/loss", "eval/test/accuracy", "eval/seen"}
        outside, inside = ([(name, way) for name in ("start", "end")] for way in (False, True))
        assert calls == outside + inside + outside * 3
        assert why == "all epochs done"


def evaluate_within():
    class Tests(dtrain.Callback):
        """Evaluates another set in an evaluation's end, and at an epoch's."""

        def on_eval_end(self, ctx, metrics):
            found = run.evaluate({"test": DATA}, batch_size=8)
            metrics.update(found)

        def on_epoch_end(self, ctx):
            self.found = run.evaluate(DATA, batch_size=8)

    tests, follows = Tests(), Follows()
    run = tiny.trainer([follows, tests], optimizer=sgd)
    result = run.fit(DATA, batch_size=8, epochs=1, eval_set=DATA)
    return result.metrics, tests.found, follows.calls


def test_a_hook_may_evaluate_another_set():
    for metrics, found, calls in run_ranks(evaluate_within, 2):
        assert metrics["eval/test/loss"] == metrics["eval/loss"] == found["eval/loss"]
        assert "eval/test/seen" not in metrics
        assert calls == [("start", True), ("end", True), ("start", False), ("end", False)]


def fit_within():
    class Fits(dtrain.Callback):
        def on_epoch_end(self, ctx):
            run.fit(DATA, batch_size=8, epochs=1)

    run = tiny.trainer([Fits()], optimizer=sgd)
    run.fit(DATA, batch_size=8, epochs=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fit_within_a_fit_is_refused(ranks):
    for words in told(try_ranks(fit_within, ranks)):
        assert "ConfigError: fit was called in a hook or a loss function" in words


def evaluate_alone(stream):
    dtrain.init(seed=0)
    sinks = [Console(stream)]
    run = dtrain.Trainer(tiny.model(), sgd, tiny.loss_fn, sinks=sinks)
    if dtrain.init().rank:
        run.model[0].bias.data += 1
    run.evaluate(DATA, batch_size=8)


def test_what_is_said_where_nothing_is_trained_is_printed():
    stream = io.StringIO()
    run_ranks(evaluate_alone, 2, stream)
    assert stream.getvalue().count("the ranks' models were no longer equal") == 1


class SaysAndFails(dtrain.Callback):
    def on_step_end(self, ctx, step):
        ctx.say("about to fail")
        raise ValueError("planted")

    def on_error(self, ctx, error):
        ctx.say("failed")


def test_what_was_said_before_a_failure_is_told():
    stream = io.StringIO()
    sinks = [Console(stream)]
    dtrain.init(seed=0)
    says = [SaysAndFails()]
    run = dtrain.Trainer(tiny.model(), sgd, tiny.loss_fn, callbacks=says, sinks=sinks)
    with pytest.raises(ValueError, match="planted"):
        run.fit(DATA, batch_size=8, epochs=1)
    assert stream.getvalue().endswith("about to fail\nfailed\n")


class FailsOutside(dtrain.Callback):
    """Puts something back where an evaluation fails; and fails at that, too."""

    def on_eval_batch(self, ctx, step):
        if not ctx.in_fit:
            raise RuntimeError("planted")

    def on_error(self, ctx, error):
        self.told = str(error)
        raise ValueError("planted, too")


def fail_outside():
    fails, ema = FailsOutside(), EMA(0.9, use_at_end=True)
    run = tiny.trainer([fails, ema], optimizer=sgd)
    run.fit(DATA, batch_size=8, epochs=1, eval_set=DATA)
    before = tiny.digest(run.model)
    with pytest.raises(dtrain.DtrainError if dtrain.init().rank else RuntimeError) as raised:
        run.evaluate(DATA, batch_size=1)  # rank 1 has none
    assert tiny.digest(run.model) == before
    return fails.told, raised.value.__notes__


def test_callbacks_are_told_of_an_evaluation_that_fails():
    first, second = run_ranks(fail_outside, 2)
    notes = ["(FailsOutside.on_error raised as well: ValueError('planted, too'))"]
    assert first == ("planted", notes)
    assert "on_eval_batch" in second[0]
    assert second[1] == notes


# ---------------------------------------------------------------------- an eval_set in its order


def order_of(data):
    seen = []

    class Sees(dtrain.Callback):
        def on_eval_batch(self, ctx, step):
            seen.extend(step.batch[0][:, 0].tolist())

    run = tiny.trainer([Sees()])
    run.fit(DATA, batch_size=8, epochs=1, eval_set=data)
    run.evaluate(data, batch_size=None if isinstance(data, dtrain.Data) else 8)
    return seen


def test_an_eval_set_is_not_shuffled():
    in_order = DATA.tensors[0][:, 0].tolist() * 2
    given = dtrain.Data(DATA, 8)
    assert run_ranks(order_of, 1, DATA) == run_ranks(order_of, 1, given) == [in_order]
    assert given.shuffle  # it may be what is trained on, too


# ----------------------------------------------------------------------------------- learning rates


def groups(net, names=(None, None), lrs=(1.0, 100.0)):
    made = [
        {"params": layer.parameters(), "lr": lr} | ({"name": name} if name else {})
        for layer, lr, name in zip((net[0], net[2]), lrs, names, strict=True)
    ]
    return torch.optim.SGD(made, lr=1.0)


class Used(dtrain.Callback):
    def __init__(self):
        self.rates = []

    def on_grads_ready(self, ctx, step):
        self.rates.append([float(group["lr"]) for group in ctx.optimizer.param_groups])


def rates_of(names, lrs=(1.0, 100.0), schedule=None):
    used = Used()
    schedule = schedule or LRSchedule(lambda opt, n: LambdaLR(opt, lambda s: (s + 1) / 10))
    run = tiny.trainer([used, schedule], optimizer=lambda net: groups(net, names, lrs))
    result = run.fit(DATA, batch_size=8, max_steps=4, log_every=1)
    rows = [row for row in result.history if "train/loss" in row]
    return [{k: v for k, v in row.items() if k[:2] == "lr"} for row in rows], used.rates


@pytest.mark.parametrize(
    ("names", "called"),
    [
        ((None, None), [("lr",), ("lr/1",)]),
        ((None, "head"), [("lr",), ("lr/head",)]),
        (("body", "head"), [("lr", "lr/body"), ("lr/head",)]),
        (("same", "same"), [("lr", "lr/same"), ("lr/1",)]),
    ],
)
def test_each_groups_rate_is_the_one_of_the_step(names, called):
    for rows, used in run_ranks(rates_of, 2, names):
        for row, rates in zip(rows, used, strict=True):
            pairs = zip(called, rates, strict=True)
            assert row == {name: rate for named, rate in pairs for name in named}
        assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_rate_that_is_a_tensor_is_the_one_of_the_step():
    lrs = (torch.tensor(1.0), torch.tensor(2.0))
    [(rows, used)] = run_ranks(rates_of, 1, (None, None), lrs)
    assert [row["lr"] for row in rows] == [rates[0] for rates in used]
    assert len({row["lr"] for row in rows}) == 4


def test_a_schedule_of_the_rate_is_reported_once():
    by_hand = ParamSchedule("lr", lambda p: 0.1 * (1 + p.step))
    [(rows, used)] = run_ranks(rates_of, 1, (None, "head"), (1.0, 1.0), by_hand)
    assert rows == [{"lr": a, "lr/head": b} for a, b in used]
    assert rows[1]["lr"] == 0.2


def unreported():
    run = tiny.trainer([ParamSchedule("momentum", lambda p: 0.5, log=False)], optimizer=sgd)
    result = run.fit(DATA, batch_size=16, epochs=1)
    assert run.optimizer.param_groups[0]["momentum"] == 0.5
    return result.history


def test_a_schedule_need_not_be_reported():
    assert all("momentum" not in row for row in run_ranks(unreported, 1)[0])


class NoRate(torch.optim.Optimizer):
    """A user's own optimizer, whose groups have no rate."""

    def __init__(self, params):
        super().__init__(params, {"scale": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["scale"])


def without_a_rate():
    run = tiny.trainer(optimizer=lambda net: NoRate(net.parameters()))
    return run.fit(DATA, batch_size=8, epochs=1).history


def test_an_optimizer_may_have_no_rate():
    assert all("lr" not in row for row in run_ranks(without_a_rate, 1)[0])


# --------------------------------------------------------------------------------- real processes


def on_processes(folder):
    keep_best(folder / "best", [NAN, 0.3, 0.9])
    rows, used = rates_of((None, "head"))
    at_ends, losses, *_ = epochs_of(5)
    errors = []
    for value in ((0.5, 0.25), "good"):
        try:
            added(value)
        except dtrain.DtrainError as error:
            errors.append(type(error).__name__)
    return rows, used, at_ends, losses, errors


def test_on_processes_as_on_threads(tmp_path):
    first, second = run_processes(on_processes, 2, tmp_path)
    assert first == second
    rows, used, at_ends, losses, errors = first
    assert [list(row.values()) for row in rows] == used
    means = [sum(losses[i * 11 : i * 11 + 11]) / 11 for i in range(3)]
    assert [one[0] for one in at_ends] == pytest.approx(means, rel=1e-12)
    assert errors == ["RankMismatch", "LossError"]
    assert list(manifests(tmp_path / "best")) == [4, 6]
