"""Metrics: torchmetrics objects, what callbacks log, several sets, and when they are reported."""

import json
import warnings

import pytest
import tiny
import torch
import torchmetrics
from torch.utils.data import TensorDataset
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

import dtrain
from dtrain.callbacks import Checkpoint, GradientAccumulation
from dtrain.errors import LossError, RemoteError
from dtrain.testing import run_processes

FEATURES = 3


def dataset(samples, seed=5):
    """Features, labels, and scores that look at the labels a little; ties among the scores."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (samples,), generator=generator)
    scores = ((x[:, 0].sigmoid() + 0.3 * y) / 1.3 * 20).round() / 20
    return TensorDataset(x, y, scores)


class Objects:
    """A loss function that updates one metric of each kind. Scores do not depend on the model."""

    def __init__(self):
        self.f1 = BinaryF1Score()
        self.auroc = BinaryAUROC(thresholds=None)
        self.mean = torchmetrics.MeanMetric()
        self.largest = torchmetrics.MaxMetric()
        self.several = torchmetrics.MetricCollection(
            {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score(), "auroc": BinaryAUROC()}
        )

    def __call__(self, net, batch):
        x, y, scores = batch
        self.f1.update(scores, y)
        self.auroc.update(scores, y)
        self.mean.update(x[:, 1], weight=scores)
        self.largest.update(x[:, 2])
        self.several.update(scores, y)
        return dtrain.Loss(
            torch.nn.functional.cross_entropy(net(x), y),
            metrics={
                "f1": self.f1,
                "auroc": self.auroc,
                "mean": self.mean,
                "largest": self.largest,
                "several": self.several,
                "plain": scores.mean(),
            },
        )


def expected(samples):
    """The same metrics, by torchmetrics itself, on all data at once."""
    x, y, scores = (torch.stack(column) for column in zip(*samples, strict=True))
    mean = torchmetrics.MeanMetric(sync_on_compute=False)
    mean.update(x[:, 1], weight=scores)
    return {
        "f1": BinaryF1Score()(scores, y).item(),
        "auroc": BinaryAUROC()(scores, y).item(),
        "mean": mean.compute().item(),
        "largest": x[:, 2].max().item(),
        "several/accuracy": BinaryAccuracy()(scores, y).item(),
        "several/f1": BinaryF1Score()(scores, y).item(),
        "several/auroc": BinaryAUROC()(scores, y).item(),
        "plain": scores.mean().item(),
    }


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def trainer(loss, *callbacks, **options):
    net = tiny.model(FEATURES, torch.float64)
    return tiny.trainer(callbacks, net=net, optimizer=sgd, loss=loss, **options)


class KeepBatches(dtrain.Callback):
    """The samples that each step trained on, over all ranks."""

    def __init__(self):
        self.mine = []

    def on_loss(self, ctx, step):
        self.mine.append((step.number, [column.tolist() for column in step.batch]))

    def samples(self, comm, steps):
        every = comm.gather_objects("batches", self.mine)
        rows = []
        for number, columns in (one for mine in every for one in mine):
            if number in steps:
                rows += [tuple(torch.tensor(v) for v in row) for row in zip(*columns, strict=True)]
        return [(x.double(), y, s.double()) for x, y, s in rows]


def without(prefix, values):
    found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    found.pop("loss", None)
    return found


def train_and_evaluate():
    """Figures of each train report with what they should be, and the same of evaluations."""
    comm = dtrain.init(seed=0).comm
    found = {}
    # Ragged: 30 = 4 batches of 7 and one of 2, which some ranks have no part in.
    for name, callbacks in (("plain", []), ("accumulated", [GradientAccumulation(steps=2)])):
        kept = KeepBatches()
        run = trainer(Objects(), kept, *callbacks)
        sets = {"small": dataset(3, seed=1), "large": dataset(25, seed=2)}
        result = run.fit(
            dataset(30), batch_size=7, epochs=2, log_every=2, eval_set=sets, eval_every=4
        )
        rows = [row for row in result.history if "train/loss" in row]
        bounds = [0, *(row["step"] for row in rows)]
        found[name, "train"] = [
            (without("train/", row), expected(kept.samples(comm, range(start, stop))))
            for start, stop, row in zip(bounds, bounds[1:], rows, strict=False)
        ]
        evaluated = [row for row in result.history if "eval/small/loss" in row]
        found[name, "steps"] = [row["step"] for row in rows], [row["step"] for row in evaluated]
        found[name, "eval"] = [
            (without(f"eval/{which}/", row), expected(sets[which]))
            for row in evaluated
            for which in sets
        ]
    # The fewest samples: some ranks, or all but one, have none.
    run = trainer(Objects())
    found["few"] = [
        (without("eval/", run.evaluate(dataset(n), batch_size=4)), expected(dataset(n)))
        for n in range(1, 10)
    ]
    return found


def objects():
    return train_and_evaluate(), special()


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def at_each_size(request):
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        # So few samples may be of one class, of which AUROC is 0, on both sides.
        warnings.filterwarnings("ignore", "No (positive|negative) samples in targets")
        return run_processes(objects, request.param)


def test_objects_are_those_of_one_process_on_all_data(at_each_size):
    found, _ = at_each_size[0]
    assert all(one == found for one, _ in at_each_size)  # bit for bit, between ranks
    for name in ("plain", "accumulated"):
        assert found[name, "steps"] == ([2, 4, 5, 6, 8, 10], [4, 8, 10])
        assert len(found[name, "train"]) == 6
        assert len(found[name, "eval"]) == 6
        pairs = [*found[name, "train"], *found[name, "eval"], *found["few"]]
        for values, truth in pairs:
            assert values == pytest.approx(truth, rel=1e-6, abs=1e-12)
    # Not the mean of the batches' values: that would be another number.
    values, _ = found["plain", "eval"][1]
    assert 0 < values["auroc"] < 1
    assert values["several/f1"] == values["f1"]


# -------------------------------------------------------------------- objects in special situations


class Special:
    def __init__(self, metric, update):
        self.metric, self.update = metric, update

    def __call__(self, net, batch):
        x, y, scores = batch
        self.update(self.metric, x, y, scores)
        loss = torch.nn.functional.cross_entropy(net(x), y)
        return dtrain.Loss(loss, metrics={"m": self.metric})


def by_class(metric, x, y, scores):
    metric.update((scores > 0.5).long(), y)


def retrieve(metric, x, y, scores):
    # Scores without ties: among equal ones the order of samples counts.
    metric.update(x[:, 1].float(), y, indexes=(x[:, 0] > 0).long())


def look(metric, x, y, scores):
    metric.update(scores, y)
    metric.compute()


def call(metric, x, y, scores):
    metric(scores, y)


class Sometimes:
    """Only the micro-batch with one certain sample has a metric."""

    def __init__(self, first):
        self.first = first
        self.metric = torchmetrics.SumMetric()

    def __call__(self, net, batch):
        x, y, _ = batch
        loss = torch.nn.functional.cross_entropy(net(x), y)
        if not (x[:, 0] == self.first).any():
            return loss
        self.metric.update(1.0)
        return dtrain.Loss(loss, metrics={"m": self.metric})


SPECIAL = {
    "macro": (lambda: MulticlassAccuracy(num_classes=2, average="macro"), by_class),
    # Its forward, which updates as well.
    "called": (BinaryF1Score, call),
    # States that are lists, with an entry for each update: of unequal length on the ranks.
    "lists": (RetrievalMAP, retrieve),
    # Looked at before, as for a progress bar: the value that it keeps is of this rank only.
    "looked at": (lambda: BinaryF1Score(sync_on_compute=False), look),
}


def alone(metric, update, data):
    """The metric on all data at once, without other ranks."""
    metric.distributed_available_fn = lambda: False
    update(metric, *data.tensors)
    return metric.compute()


def special():
    """Evaluates with dtrain, and with torchmetrics on all at once."""
    found = {}
    data = dataset(26, seed=3)
    for name, (make, update) in SPECIAL.items():
        run = trainer(Special(make(), update))
        values = without("eval/", run.evaluate(data, batch_size=6))
        found[name] = values, {"m": float(alone(make(), update, data))}
    run = trainer(Sometimes(data.tensors[0][0, 0]))
    found["rare"] = without("eval/", run.evaluate(data, batch_size=6)), {"m": 1.0}
    return found


@pytest.mark.parametrize("name", [*SPECIAL, "rare"])
def test_objects_in_special_situations(at_each_size, name):
    for _, found in at_each_size:
        values, truth = found[name]
        assert values == pytest.approx(truth, rel=1e-6)


def update(metric, x, y, scores):
    metric.update(scores, y)


WRAPPERS = {
    "classwise": (lambda: ClasswiseWrapper(MulticlassAccuracy(2, average=None)), by_class),
    "minmax": (lambda: MinMaxMetric(BinaryF1Score()), update),
    "sum": (lambda: BinaryF1Score() + 1.0, update),
}


def wrappers():
    found = []
    for samples in (20, 1):  # of one sample, the second rank has nothing
        data = dataset(samples, seed=3)
        for make, update in WRAPPERS.values():
            run = trainer(Special(make(), update))
            found.append(without("eval/", run.evaluate(data, batch_size=6)))
    return found


def test_metrics_inside_of_metrics():
    by_rank = run_processes(wrappers, 2)
    assert by_rank[0] == by_rank[1]
    truths = []
    for samples in (20, 1):
        for make, update in WRAPPERS.values():
            truth = alone(make(), update, dataset(samples, seed=3))
            named = truth.items() if isinstance(truth, dict) else [("", truth)]
            truths.append({f"m/{key}".rstrip("/"): float(value) for key, value in named})
    for values, truth in zip(by_rank[0], truths, strict=True):
        assert values == pytest.approx(truth, rel=1e-6)


class Grows:
    """States that begin as one number and become one for each class, in the first update."""

    def __init__(self, sizes):
        self.metric = torchmetrics.SumMetric()
        self.sizes = sizes

    def __call__(self, net, batch):
        x, y, _ = batch
        self.metric.sum_value = self.metric.sum_value + torch.ones(self.sizes[len(x)])
        self.metric._update_count = 1
        return dtrain.Loss(
            torch.nn.functional.cross_entropy(net(x), y),
            metrics={"m": self.metric},
        )


def exchanges():
    """What travels besides the packed reduction, in three evaluations; and where shapes differ."""
    comm = dtrain.init(seed=0).comm
    gather, labels, sent = comm.gather_objects, [], []
    comm.gather_objects = lambda label, value: (labels.append(label), gather(label, value))[1]
    reduce = comm.all_reduce
    comm.all_reduce = lambda label, t: (sent.append((label, len(t))), reduce(label, t))[1]
    found = {}
    data = dataset(12, seed=3)
    for name, metric, how in (
        ("sums", MulticlassConfusion(), by_class),
        ("list", BinaryAUROC(thresholds=None), update),
    ):
        run = trainer(Special(metric, how))
        for again in range(3):
            labels.clear()
            sent.clear()
            value = run.evaluate(data, batch_size=6)["eval/m"]
            found[name, again] = value, list(labels), [size for _, size in sent]
    found["truth"] = [
        float(alone(MulticlassConfusion(), by_class, data)),
        float(alone(BinaryAUROC(thresholds=None), update, data)),
    ]
    run = trainer(Grows({3: 2, 2: 5}))
    try:
        run.evaluate(dataset(5), batch_size=5)
    except LossError as error:
        found["shapes"] = str(error)
    return found


class MulticlassConfusion(torchmetrics.classification.MulticlassConfusionMatrix):
    """A sum state of 40 x 40, of which one number is the value."""

    def __init__(self):
        super().__init__(num_classes=40)

    def compute(self):
        return self.confmat[0, 1]


def test_sums_ride_in_the_packed_reduction():
    by_rank = run_processes(exchanges, 2)
    assert by_rank[0] == by_rank[1]
    found = by_rank[0]
    sums, list_ = found["truth"]
    # Six flags, the loss's sum and weight, one count; the matrix from the second time on.
    first = "gathers of a loss function"  # a run's first evaluation finds out that there are none
    states = "eval: metric states"
    assert found["sums", 0] == (sums, [first, "eval: new names"], [6])
    assert found["sums", 1] == found["sums", 2] == (sums, [], [6 + 2 + 1 + 40 * 40])
    assert found["list", 0] == (list_, [first, "eval: new names", states], [6])
    assert found["list", 1] == found["list", 2] == (list_, [states], [6 + 2 + 1])
    assert "'eval/m' have the shapes [[2]] on one rank and [[5]] on another" in (found["shapes"])


def refusals():
    found = []
    for metric, update in (
        (MulticlassAccuracy(num_classes=2, average="none"), by_class),
        ("a text", lambda *args: None),
        (torch.zeros(3), lambda *args: None),
    ):
        run = trainer(Special(metric, update))
        try:
            run.evaluate(dataset(8), batch_size=4)
        except (LossError, RemoteError) as error:
            found.append(str(error))
    return found


def test_what_is_no_single_number_is_refused_by_name(at_two_ranks):
    for told in at_two_ranks["refusals"]:
        for text, words in zip(
            told,
            (
                r"the metric 'eval/m' computes a tensor of shape [2]",
                r"metric 'eval/m' is 'a text'; a metric is a number, a 0-dim tensor",
                r"metric 'eval/m' is a tensor of shape [3]",
            ),
            strict=True,
        ):
            assert words in text


# --------------------------------------------------------------- what is logged, at two ranks


def two_ranks(folder):
    return {
        "refusals": refusals(),
        "logged": logged(),
        "when": when(),
        "config": with_config(folder),
    }


@pytest.fixture(scope="module")
def at_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        results = run_processes(two_ranks, 2, folder)
    return {"folder": folder} | {case: [one[case] for one in results] for case in results[0]}


EXACT = {"tenth": 0.1, "bytes": 2**40 + 1, "clock": 1.7e9 + 0.25}


class Logs(dtrain.Callback):
    """Logs under each way of reduction: 10 x step + rank + 1, on some ranks in some steps."""

    def __init__(self):
        self.rank = dtrain.init(seed=0).rank

    def on_step_end(self, ctx, step):
        value = 10 * step.number + self.rank + 1
        for reduce in ("mean", "sum", "max", "last"):
            ctx.log(f"{reduce}_number", value, reduce)
            ctx.log(f"{reduce}_tensor", torch.tensor(float(value)), reduce)
        if self.rank == 1:
            ctx.log("only_rank_1", value, "sum")
            ctx.log("only_rank_1_max", -value, "max")
        if step.number == 2:
            ctx.log("late", value)
        for name, value in EXACT.items():
            ctx.log(name, value, "max")


def logged():
    run = tiny.trainer([Logs()])
    data = tiny.dataset()
    result = run.fit(data, batch_size=12, max_steps=5, log_every=2, eval_set=data, eval_first=True)
    names = ("loss", "accuracy")
    return [
        {k: v for k, v in row.items() if k.rpartition("/")[2] not in names}
        for row in result.history
    ]


def test_values_logged_by_callbacks(at_two_ranks):
    by_rank = at_two_ranks["logged"]
    assert by_rank[0] == by_rank[1]
    # Steps 0 and 1, 2 and 3, then 4: before it, after it, and nothing of it twice.
    first, *trained, last = by_rank[0]
    assert first == {"step": 0, "epoch": 0}
    assert last == {"step": 5, "epoch": 0}
    for row, numbers in zip(map(dict, trained), ([0, 1], [2, 3], [4]), strict=True):
        values = {rank: [10 * n + rank + 1 for n in numbers] for rank in (0, 1)}
        every = values[0] + values[1]
        lasts = [values[rank][-1] for rank in (0, 1)]
        truth = {
            "mean": sum(every) / len(every),
            "sum": sum(every),
            "max": max(every),
            "last": sum(lasts) / 2,
        }
        for reduce, value in truth.items():
            assert row.pop(f"{reduce}_number") == pytest.approx(value, rel=1e-12), reduce
            assert row.pop(f"{reduce}_tensor") == pytest.approx(value, rel=1e-12), reduce
        assert row.pop("only_rank_1") == sum(values[1])
        assert row.pop("only_rank_1_max") == max(-value for value in values[1])
        assert row.pop("late", None) == (21.5 if 2 in numbers else None)
        for name in EXACT:
            row.pop(name)
        assert set(row) == {"step", "epoch", "lr"}


class LogsLive(dtrain.Callback):
    """Logs a tensor that it goes on to write into: 1, 2, 3, 4."""

    def __init__(self):
        self.count = torch.zeros(())

    def on_step_end(self, ctx, step):
        self.count += 1
        for reduce in ("mean", "sum", "max", "last"):
            ctx.log(f"count_{reduce}", self.count, reduce)


def test_what_is_logged_is_what_it_was_then():
    figures = tiny.trainer([LogsLive()]).fit(tiny.dataset(), batch_size=12, max_steps=4).metrics
    found = [figures[f"count_{reduce}"] for reduce in ("mean", "sum", "max", "last")]
    assert found == [2.5, 10, 4, 4]


def test_a_maximum_is_exact(at_two_ranks):
    for row in at_two_ranks["logged"][0][1:-1]:
        assert {name: row[name] for name in EXACT} == EXACT


# --------------------------------------------------------------------------------- when, and config


def when():
    found = {}
    data = tiny.dataset()
    for name, options in (
        ("epoch", {"epochs": 2}),
        ("first", {"epochs": 2, "eval_first": True}),
        ("steps", {"epochs": 2, "eval_every": 3}),
        ("steps and first", {"max_steps": 5, "eval_every": 2, "eval_first": True}),
        ("within an epoch", {"max_steps": 6}),
        ("never", {"epochs": 1, "eval_every": None, "eval_first": True}),
    ):
        run = tiny.trainer()
        result = run.fit(data, batch_size=24, eval_set=data, **options)
        found[name] = [row["step"] for row in result.history if "eval/loss" in row]
        if "eval/loss" in result.metrics:
            again = run.evaluate(data, batch_size=24)
            assert {k: result.metrics[k] for k in again} == again
    return found


def test_when_is_evaluated(at_two_ranks):
    for found in at_two_ranks["when"]:
        assert found == {
            "epoch": [4, 8],
            "first": [0, 4, 8],
            "steps": [3, 6, 8],
            "steps and first": [0, 2, 4, 5],
            "within an epoch": [4, 6],
            "never": [],
        }


CONFIG = {"lr": 0.1, "model": {"depth": 3, "sizes": [1, 2]}, "note": "größe", "none": None}


def with_config(folder):
    configs = []

    class Seen(dtrain.Sink):
        def write(self, report):
            if report.kind == "start":
                configs.append(dict(report.config))

    for epochs in (1, 2):  # the second goes on
        dtrain.init(seed=0)
        run = dtrain.Trainer(
            tiny.model(),
            tiny.adam,
            tiny.loss_fn,
            callbacks=[Checkpoint(keep=None)],
            sinks=[Seen()],
            run_dir=folder,
            config=CONFIG | {"epochs": epochs},
        )
        run.fit(tiny.dataset(), batch_size=24, epochs=epochs)
    return configs


def test_config_is_kept_with_the_run_and_in_each_checkpoint(at_two_ranks):
    seen = at_two_ranks["config"]
    assert seen == [[CONFIG | {"epochs": 1}, CONFIG | {"epochs": 2}], []]
    folder = at_two_ranks["folder"]
    assert json.loads((folder / "config.json").read_text()) == CONFIG | {"epochs": 2}
    for step, epochs in ((4, 1), (8, 2)):
        state = folder / "checkpoints" / f"step-{step:08d}" / "state.json"
        assert json.loads(state.read_text())["config"] == CONFIG | {"epochs": epochs}
