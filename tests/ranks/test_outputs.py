"""Outputs of a whole evaluation set: each sample once, in order, at any number of ranks."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_tuning import swept_with_ddp
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    EvalOutputs,
    GradientAccumulation,
    LogSamples,
)
from dtrain.distributed import comm as comm_of
from dtrain.metrics import outputs as outputs_of
from dtrain.testing import run_processes, run_ranks, try_ranks

SAMPLES, FEATURES = 101, 8
RANKS = [1, 2, 3, 4]


def data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = (x[:, 0] + torch.randn(samples, generator=generator) > 0).long()
    y[: min(2, samples)] = torch.tensor([0, 1])[:samples]  # of both kinds, in small sets too
    return x, y


class ByRow(nn.Module):
    """What it makes of a sample does not depend on what is in the batch with it, bit for bit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.weight = nn.Parameter(torch.randn(FEATURES))

    def forward(self, x):
        return (x * self.weight).sum(-1)


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(FEATURES, 33), nn.Tanh(), nn.Linear(33, 1), nn.Flatten(0))


def scored(model, batch):
    x, y = batch
    score = model(x)
    return dtrain.Metrics({"hit": ((score > 0) == y).double().mean()}, outputs=(y, score))


class Auc:
    """Keeps what it was given: on rank 0 only."""

    def __init__(self):
        self.given = []

    def __call__(self, outputs):
        self.given.append(outputs)
        return roc_auc_score(*outputs)


def trainer(fn=scored, *callbacks, model=None, optimizer=None, **options):
    dtrain.init(seed=0)
    model = model or ByRow()
    return dtrain.Trainer(
        model,
        optimizer,
        options.pop("loss", fn),
        eval_fn=fn,
        callbacks=callbacks,
        sinks=[],
        **options,
    )


def told(outcomes):
    """What each rank's error says, with its notes."""
    return [
        " ".join([f"{type(one.error).__name__}: {one.error}", *getattr(one.error, "__notes__", ())])
        for one in outcomes
    ]


# ------------------------------------------------------------------------------- one is many


CASES = [(2, 1), (2, 200), (3, 2), (5, 1), (5, 3), (101, 7), (101, 32), (101, 200)]


def areas(make, *callbacks):
    auc = Auc()
    run = trainer(scored, EvalOutputs({"auc": auc}), *callbacks, model=make())
    found = [run.evaluate(TensorDataset(*data(n)), batch_size=size) for n, size in CASES]
    return found, auc.given


@pytest.mark.parametrize("ranks", RANKS)
def test_the_area_is_that_of_the_whole_set(ranks):
    everyones = run_ranks(areas, ranks, ByRow)
    for found, _ in everyones:
        assert found == everyones[0][0]
    assert [len(given) for _, given in everyones] == [len(CASES), *[0] * (ranks - 1)]
    for (n, _), figures, given in zip(CASES, *everyones[0], strict=True):
        x, y = data(n)
        score = ByRow()(x).detach()
        assert torch.equal(given[0], y)
        assert torch.equal(given[1], score)  # bit for bit
        assert figures["eval/auc"] == roc_auc_score(y, score)
        assert set(figures) == {"eval/auc", "eval/hit"}  # no loss is made up


def test_micro_batches_of_one_size_are_cut_alike_at_every_world_size():
    """Where a matrix product rounds otherwise in batches of another shape."""
    first = None
    for ranks in RANKS:
        _found, given = run_ranks(
            lambda: areas(net, GradientAccumulation(micro_batch_size=5)), ranks
        )[0]
        first = first or given
        for (y, score), (first_y, first_score) in zip(given, first, strict=True):
            assert torch.equal(y, first_y)
            assert torch.equal(score, first_score)


# ------------------------------------------------------------------------------- orders and sets


def in_other_orders():
    given = {}
    x, y = data(23)
    fns = {"n": lambda out: given.setdefault(len(given), out)["x"].sum().item()}
    fn = lambda model, batch: dtrain.Metrics(outputs={"x": batch[0]})  # noqa: E731
    run = trainer(fn, EvalOutputs(fns))
    lengths = [n % 7 for n in range(23)]
    sets = {
        "a": dtrain.Data(TensorDataset(x, y), 8, order=dtrain.data.Bucketed(lengths, 8, seed=0)),
        "b": dtrain.Data(TensorDataset(x, y), 4, order=[3, 1, 2, 9, 9]),
        "c": dtrain.Data(TensorDataset(x, y), 64),
    }
    found = run.evaluate(sets)
    return list(found), [out["x"] for out in given.values()]


@pytest.mark.parametrize("ranks", RANKS)
def test_several_sets_come_in_the_datasets_order(ranks):
    names, (a, b, c) = run_ranks(in_other_orders, ranks)[0]
    assert names == ["eval/a/n", "eval/b/n", "eval/c/n"]
    x, _ = data(23)
    assert torch.equal(a, x)
    assert torch.equal(b, x[[1, 2, 3, 9, 9]])
    assert torch.equal(c, x)


def of_streams(each):
    given = []
    fn = lambda model, batch: dtrain.Metrics(outputs=batch)  # noqa: E731
    run = trainer(fn, EvalOutputs({"n": lambda out: given.append(out) or len(out)}))
    rank = run.world.rank
    batches = [torch.arange(2) + 10 * rank + 2 * n for n in range(each[rank])]
    return run.evaluate(batches)["eval/n"], given


def test_a_stream_comes_rank_by_rank():
    (found, given), other, none = run_ranks(of_streams, 3, [2, 3, 0])
    assert found == other[0] == none[0] == 10
    assert given[0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 14, 15]


class Rows(dtrain.Callback):
    def on_eval_start(self, ctx):
        self.rows = []

    def on_eval_batch(self, ctx, step):
        self.rows.append((step.prefix, step.rows, step.batch[:, 0].tolist()))


def rows_of_batches(*callbacks):
    rows = Rows()
    run = trainer(lambda model, x: dtrain.Metrics({"n": 1.0}), rows, *callbacks)
    run.evaluate(
        {"a": dtrain.Data(torch.arange(11.0)[:, None], 4), "b": dtrain.Data([torch.ones(2, 1)])}
    )
    return rows.rows


@pytest.mark.parametrize("callbacks", [(), (GradientAccumulation(2),)])
def test_a_hook_knows_the_rows_of_a_batch(callbacks):
    seen = [one for each in run_ranks(rows_of_batches, 3, *callbacks) for one in each]
    assert {prefix for prefix, *_ in seen} == {"eval/a", "eval/b"}
    assert all(rows is None for prefix, rows, _ in seen if prefix == "eval/b")
    of_a = [(rows, values) for prefix, rows, values in seen if prefix == "eval/a"]
    assert all(rows == values for rows, values in of_a)
    assert sorted(row for rows, _ in of_a for row in rows) == list(range(11))


# ------------------------------------------------------------------------------- kinds of outputs


def kinds(model, batch):
    x, y = batch
    rows = [row[: 1 + int(n)] for row, n in zip(x, y, strict=True)]  # each of its own length
    return dtrain.Metrics(
        outputs={
            "texts": [f"<{value:.3f}>" for value in x[:, 0].tolist()],
            "ragged": rows,
            "half": x.bfloat16(),
            "complex": torch.complex(x, -x).conj(),
            "bits": (x > 0, y.to(torch.uint8)),
            "empty": x[:, :0],
            "column": x[:, 1],  # of a batch of one, its stride may be anything
            "numpy": x.double().numpy(),
            "names": np.array([f"n{int(v)}" for v in y]),
            "objects": [{"y": v, "none": None} for v in y.tolist()],
        }
    )


def all_kinds(size):
    given = []
    run = trainer(kinds, EvalOutputs({"n": lambda out: given.append(out) or 1}))
    run.evaluate(TensorDataset(*data(23)), batch_size=size)
    return given


@pytest.mark.parametrize("ranks", [1, 3])
def test_outputs_of_all_kinds_come_whole(ranks):
    x, y = data(23)
    wanted = kinds(None, (x, y)).outputs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = run_ranks(all_kinds, ranks, 7)[0]
    assert list(found) == list(wanted)
    for name in ("half", "complex", "empty", "column"):
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name])
    assert all(map(torch.equal, found["bits"], wanted["bits"]))
    assert all(map(torch.equal, found["ragged"], wanted["ragged"]))
    assert (found["numpy"] == wanted["numpy"]).all()
    assert (found["names"] == wanted["names"]).all()
    assert found["texts"] == wanted["texts"]
    assert found["objects"] == wanted["objects"]


def some_bytes_at_once():
    sent = []
    outputs_of._AT_ONCE, outputs_of._AT_LEAST = 3000, 1
    run = trainer(kinds, EvalOutputs({"n": lambda out: len(out["texts"])}))
    gather = type(run.world.comm).all_gather

    def all_gather(self, label, tensor):
        if label == "EvalOutputs: outputs":
            sent.append(tensor.nbytes)
        return gather(self, label, tensor)

    run.world.comm.all_gather = all_gather.__get__(run.world.comm)
    return run.evaluate(TensorDataset(*data(60)), batch_size=30)["eval/n"], sent


def test_outputs_travel_some_bytes_at_once(monkeypatch):
    for name in ("_AT_ONCE", "_AT_LEAST"):
        monkeypatch.setattr(outputs_of, name, getattr(outputs_of, name))  # put back
    for found, sent in run_ranks(some_bytes_at_once, 3):
        assert found == 60
        assert max(sent) == 1000
        assert sum(size == 1000 for size in sent) > 3


def kept_after():
    callback = EvalOutputs({"n": len})
    fn = lambda model, batch: dtrain.Metrics(outputs=batch[1])  # noqa: E731
    run = trainer(fn, callback)
    run.evaluate(TensorDataset(*data(23)), batch_size=7)
    return callback._sets


def test_nothing_is_kept_after_an_evaluation():
    assert run_ranks(kept_after, 2) == [{}, {}]


# ------------------------------------------------------------------------------- what is refused


def evaluated(fn, figures, batch_size=8, samples=23):
    run = trainer(fn, EvalOutputs(figures))
    return run.evaluate(TensorDataset(*data(samples)), batch_size=batch_size)


def giving(outputs, **options):
    return lambda model, batch: dtrain.Metrics(outputs=outputs(*batch), **options)


def raises(outputs):
    raise ValueError("one class only")


def none_in_some(x, y):
    return None if len(x) < 4 else x


REFUSED = {
    "no outputs": (giving(lambda x, y: None), len, ("returned no outputs", "Metrics(outputs=")),
    "none of some": (
        giving(none_in_some),
        len,
        ("some batches of 'eval' had outputs, and others",),
    ),
    "a mean": (giving(lambda x, y: x.mean()), len, ("outputs is of shape []", "a batch of 4 samp")),
    "a number": (
        giving(lambda x, y: {"a": 1.0}),
        len,
        ("outputs['a'] is float: outputs are a te",),
    ),
    "one text": (giving(lambda x, y: (x, "text")), len, ("outputs[1] is str: outputs are a ten",)),
    "a list of outputs": (giving(lambda x, y: [x, y]), len, ("a list of 2, for a batch of 4 sam",)),
    "several for each": (
        giving(lambda x, y: [*y.tolist()] * 2),
        len,
        ("a list of 8, for", "2 for each sample go in a list of their own, [[...], ...]"),
    ),
    "bfloat16": (
        giving(lambda x, y: x.bfloat16()),
        lambda out: out[:, 0].numpy().sum(),
        ("(NumPy has no bfloat16: return outputs in float32, x.float())",),
    ),
    "rows that lack": (giving(lambda x, y: x[1:]), len, ("of shape [3, 8], for a batch of 4 sa",)),
    "padded": (
        giving(lambda x, y: x[:, : 3 + len(x)]),
        len,
        ("another shape in another batch ([6] and [7])", "`[row[:n] for row, n in zip(rows"),
    ),
    "other keys": (
        giving(lambda x, y: {"a": x} if len(x) == 4 else {"b": x}),
        len,
        ("outputs differs from batch to batch: ('a',) and ('b',)",),
    ),
    "other kinds": (
        giving(lambda x, y: x if len(x) == 4 else x.numpy()),
        len,
        ("outputs differs from batch to batch: Tensor and ndarray",),
    ),
    "not to be sent": (
        giving(lambda x, y: [lambda: 0] * len(x)),
        len,
        ("they must be picklable",),
    ),
    "a figure that raises": (
        giving(lambda x, y: x),
        raises,
        ("one class only", "(in EvalOutputs' 'auc', of 23 samples)"),
    ),
    "no number": (giving(lambda x, y: x), lambda out: "high", ("metric 'auc' is 'high'",)),
    "several numbers": (giving(lambda x, y: x), lambda out: out[0], ("tensor of shape [8]",)),
    "a name that is there": (
        giving(lambda x, y: x, metrics={"auc": 1.0}),
        len,
        ("EvalOutputs adds 'eval/auc', and there is such a figure already",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_told_on_all_ranks(name):
    fn, figure, words = REFUSED[name]
    for error in told(try_ranks(evaluated, 2, fn, {"auc": figure})):
        for word in words:
            assert word in error


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "a dict from name to function"),
        (len, "a dict from name to function"),
        ({"loss": len}, "'loss' cannot be a figure's name"),
        ({"auc": 1}, "'auc' is 1, and must be a function"),
    ],
)
def test_figures_that_cannot_be(figures, words):
    with pytest.raises(dtrain.ConfigError, match=words):
        EvalOutputs(figures)


def fails_on_one():
    def fn(model, batch):
        if run.world.rank == 1 and batch[0] is not None:
            raise ValueError("torn")
        return dtrain.Metrics(outputs=batch[1])

    run = trainer(fn, EvalOutputs({"n": len}))
    run.evaluate(TensorDataset(*data()), batch_size=8)


def test_a_function_that_raises_on_one_rank():
    for number, error in enumerate(told(try_ranks(fails_on_one, 3))):
        assert "torn" in error
        assert ("rank 1 on" in error) == (number != 1)


class Endless:
    """So that only a failure elsewhere ends it."""

    def __iter__(self):
        while True:
            yield torch.ones(1, 1)


def fails_beside_endless():
    """In a process of its own, which looks for failures more often than every two seconds."""
    comm_of._LOOK_EVERY_S = 0.1
    seen = []

    def fn(model, batch):
        seen.append(1)
        if run.world.rank == 1 and len(seen) > 20:  # after the first, ranks no longer meet
            raise ZeroDivisionError("by then")
        return batch.mean()

    run = trainer(fn)
    try:
        run.evaluate(Endless())
    except (dtrain.RemoteError, ZeroDivisionError) as error:
        told = str(error)
    run.world.comm.barrier("all have caught it, and go on")
    return told


def in_processes():
    return areas(ByRow)[0], swept_with_ddp(), fails_beside_endless()


def test_processes_find_what_threads_do_and_learn_of_a_failure_amid_an_evaluation():
    first, second = run_processes(in_processes, 2, timeout_s=60)
    assert first[0] == second[0] == run_ranks(areas, 2, ByRow)[0][0]
    assert first[1] == second[1] == run_ranks(swept_with_ddp, 2)[0]
    assert first[2].startswith("rank 1 on")
    assert "ZeroDivisionError: by then" in first[2]
    assert second[2] == "by then"


# ------------------------------------------------------------------------------- Metrics, and skips


def weighed():
    def fn(model, batch):
        x, y = batch
        weight = int(y.sum())
        return dtrain.Metrics(
            {"m": x[y == 1].sum() / max(weight, 1), "n": dtrain.Mean(1, 1)}, weight
        )

    return trainer(fn).evaluate(TensorDataset(*data()), batch_size=7)


@pytest.mark.parametrize("ranks", [1, 3])
def test_metrics_have_a_weight(ranks):
    x, y = data()
    for found in run_ranks(weighed, ranks):
        assert set(found) == {"eval/m", "eval/n"}
        assert found["eval/m"] == pytest.approx(float(x[y == 1].sum() / y.sum()), rel=1e-5)


def trains_by_metrics():
    run = trainer(scored, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    run.fit(TensorDataset(*data()), batch_size=8, epochs=1)


class LooksAtTheLoss(dtrain.Callback):
    def on_eval_batch(self, ctx, step):
        return step.loss.mean


WRONG = {
    "training": (trains_by_metrics, "loss_fn returned dtrain.Metrics, which has no loss to train"),
    "a hook": (
        lambda: trainer(scored, LooksAtTheLoss()).evaluate(TensorDataset(*data()), batch_size=8),
        "a callback looked for the loss of an evaluation whose function returned dtrain.Metrics",
    ),
    "the name": (
        lambda: evaluated(giving(lambda x, y: x, metrics={"loss": 1.0}), {"n": len}),
        "a metric is named 'loss'",
    ),
    "the weight": (
        lambda: evaluated(giving(lambda x, y: x, weight=-1), {"n": len}),
        "dtrain.Metrics have weight -1",
    ),
    "no number": (
        lambda: evaluated(giving(lambda x, y: x, metrics={"m": x_of_all}), {"n": len}),
        "metric 'eval/m' is a tensor of shape [101, 8]",
    ),
    "nothing": (
        lambda: trainer(lambda model, batch: None).evaluate([torch.ones(2)]),
        "returned None",
    ),
}
x_of_all = data()[0]


@pytest.mark.parametrize("name", WRONG)
def test_metrics_that_cannot_be(name):
    run, words = WRONG[name]
    for error in told(try_ranks(run, 2)):
        assert words in error


def skips(which):
    def fn(model, batch, ctx):
        x, _y = batch
        if which(run.world.rank, x):
            ctx.request.skip("not these")
        return dtrain.Metrics({"m": x[:, 0].double().mean()}, outputs=x)

    given = []
    rows = Rows()
    rows.on_eval_batch = lambda ctx, step: rows.rows.append(step.samples)
    run = trainer(fn, EvalOutputs({"n": lambda out: given.append(out) or len(out)}), rows)
    found = run.evaluate(TensorDataset(*data(24)), batch_size=8)
    return found, given, rows.rows


def test_a_batch_that_is_skipped_counts_for_nothing():
    x, _ = data(24)
    (found, given, seen), (other, _, none) = run_ranks(skips, 2, lambda rank, x: rank == 1)
    left = torch.cat([x[:4], x[8:12], x[16:20]])
    assert found == other
    assert torch.equal(given[0], left)
    assert found["eval/m"] == pytest.approx(float(left[:, 0].double().mean()), rel=1e-12)
    assert (seen, none) == ([4, 4, 4], [])


def test_an_evaluation_of_nothing_but_skips():
    for error in told(try_ranks(skips, 2, lambda rank, x: True)):
        assert "weighs nothing" in error
        assert "or every batch was skipped" in error


class SkipsAndEvaluates(dtrain.Callback):
    def on_batch(self, ctx, step):
        ctx.request.skip("this one")
        self.run.evaluate(TensorDataset(*data(6)), batch_size=3)


def skipped_all():
    hook = SkipsAndEvaluates()
    run = hook.run = trainer(scored, hook, loss=lossy, optimizer=sgd)
    return run.fit(TensorDataset(*data()), batch_size=17, max_steps=2).updates


def test_an_evaluation_within_a_step_that_is_skipped():
    assert run_ranks(skipped_all, 2) == [0, 0]


def outputs_sometimes():
    asked = []
    run = trainer(
        lambda model, batch: dtrain.Metrics({"m": 1.0}, outputs=batch if asked else None),
        EvalOutputs({"n": len}),
    )
    with pytest.raises(dtrain.ConfigError, match="returned no outputs"):
        run.evaluate(data()[0], batch_size=8)
    asked.append(1)
    return run.evaluate(data()[0], batch_size=8)


def test_an_evaluation_after_one_without_outputs():
    assert run_ranks(outputs_sometimes, 1) == [{"eval/m": 1.0, "eval/n": 101.0}]


class SkipsTooLate(dtrain.Callback):
    def on_eval_end(self, ctx, metrics):
        ctx.request.skip("late")


def test_a_skip_after_the_batch_is_refused():
    def run():
        trainer(scored, SkipsTooLate()).evaluate(TensorDataset(*data()), batch_size=8)

    for error in told(try_ranks(run, 2)):
        assert "request.skip('late') works in on_batch and on_loss only, and in the loss" in error


# ------------------------------------------------------------------------------- in a fit


class Noisy(nn.Module):
    """With what evaluation switches off, or takes from training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.drop, self.out = nn.BatchNorm1d(FEATURES), nn.Dropout(0.5), ByRow()

    def forward(self, x):
        return self.out(self.drop(self.norm(x)))


def lossy(model, batch):
    x, y = batch
    score = model(x)
    loss = nn.functional.binary_cross_entropy_with_logits(score, y.float())
    return dtrain.Loss(loss, outputs=(y, score))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def in_fit(*callbacks, run_dir=None, epochs=2):
    auc = Auc()
    run = trainer(
        lossy, EvalOutputs({"auc": auc}), *callbacks, model=Noisy(), optimizer=sgd, run_dir=run_dir
    )
    train = TensorDataset(*data())
    result = run.fit(train, batch_size=17, epochs=epochs, eval_set=train)
    figures = [row["eval/auc"] for row in result.history if "eval/auc" in row]
    return figures, run.evaluate(train, batch_size=17)["eval/auc"], auc.given, result


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_in_fit_is_of_the_averages(ranks):
    figures, after, given, _ = run_ranks(lambda: in_fit(EMA(0.9)), ranks)[0]
    assert len(figures) == 2
    assert figures[-1] == after  # the model holds the averages after fit
    assert torch.equal(given[-1][1], given[-2][1])


def test_a_resumed_run_has_the_same_figures(tmp_path):
    def run(folder, epochs):
        stop = EarlyStopping("eval/auc", mode="max", patience=9)
        figures, after, _, _result = in_fit(
            stop,
            Checkpoint(every_epochs=1, best="eval/auc", mode="max"),
            run_dir=tmp_path / folder,
            epochs=epochs,
        )
        return figures, after, stop.best

    whole = run_ranks(run, 2, "whole", 4)
    begun = run_ranks(run, 2, "parts", 2)
    rest = run_ranks(run, 2, "parts", 4)
    for all_of_it, one, two in zip(whole, begun, rest, strict=True):
        assert all_of_it[0] == one[0] + two[0]
        assert all_of_it[1:] == two[1:]


def test_who_judges_before_it_is_there_is_told():
    def run():
        stop = EarlyStopping("eval/auc", mode="max")
        auc = EvalOutputs({"auc": Auc()})
        made = trainer(lossy, stop, auc, model=Noisy(), optimizer=sgd)
        made.fit(TensorDataset(*data()), batch_size=17, epochs=1, eval_set=TensorDataset(*data()))

    for error in told(try_ranks(run, 2)):
        assert "EarlyStopping('eval/auc') stands before EvalOutputs in callbacks=[...]" in error


def evaluates_within():
    class Within(dtrain.Callback):
        def on_eval_batch(self, ctx, step):
            run.evaluate({"other": TensorDataset(*data(6))}, batch_size=3)

    given = []
    figures = EvalOutputs({"n": lambda out: given.append(out) or len(out[0])})
    run = trainer(scored, figures, Within())
    return run.evaluate(TensorDataset(*data(16)), batch_size=8), given


def test_what_a_hook_evaluates_meanwhile_is_not_mixed_in():
    found, given = run_ranks(evaluates_within, 2)[0]
    assert set(found) == {"eval/hit", "eval/n"}
    assert found["eval/n"] == 16
    assert torch.equal(given[0][0], data(16)[1])


def test_other_callbacks_see_the_outputs_of_metrics():
    shown = []

    def run():
        made = trainer(
            scored,
            LogSamples(lambda outputs, batch: shown.append(len(outputs[0])) or {"first": "text"}),
            loss=lossy,
            model=Noisy(),
            optimizer=sgd,
        )
        made.fit(TensorDataset(*data()), batch_size=17, epochs=1, eval_set=TensorDataset(*data()))

    run_ranks(run, 2)
    assert shown == [9]
