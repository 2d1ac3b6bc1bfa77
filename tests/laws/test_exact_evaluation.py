"""Evaluation is exact: every sample once, at any number of ranks, in any batch size.

1 to 101 samples at 1 to 4 ranks: fewer samples than ranks, ragged last batches, ranks without
any. Counts are equal to those made by hand on the whole set; the loss, a sum in another order, is
within 1e-12. All ranks have the same bits.
"""

import warnings

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix

import dtrain
from dtrain.callbacks import GradientAccumulation
from dtrain.testing import run_processes

MOST, FEATURES, CLASSES = 101, 5, 3
# Every number of samples, in batch sizes that take turns; the smallest batches for some.
CASES = [(n, (7, 32, 101)[n % 3]) for n in range(1, MOST + 1)]
CASES += [(n, batch_size) for n in (1, 2, 3, 4, 5, 50, 101) for batch_size in (1, 3, 200)]
# These also with torchmetrics' objects, which take most of the time.
FEW = [(1, 7), (2, 3), (3, 1), (5, 7), (8, 3), (50, 7), (101, 7), (101, 32), (101, 200)]
STREAMS = [1, 2, 3, 5, 20, 101]


def make_data(samples):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(MOST, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (MOST,), generator=generator)
    return x[:samples], y[:samples]


def make_model(*layers):
    torch.manual_seed(4)
    return nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES)).double()


class Confusion(MulticlassConfusionMatrix):
    """Its counts, as a metric of several numbers."""

    def compute(self):
        counts = super().compute()
        return {f"{t}{p}": counts[t, p] for t in range(CLASSES) for p in range(CLASSES)}


def is_first(y):
    return (y == 0).long()


def score(x):
    """Rounded, so that there are ties; a function of the sample alone."""
    return (x[:, 0].sigmoid() * 10).round() / 10


def plain_loss(model, batch):
    x, y = batch
    logits = model(x)
    right = logits.argmax(-1) == y
    return dtrain.Loss(
        F.cross_entropy(logits, y),
        metrics={"right": dtrain.Mean(right.sum(), len(y)), "mean_right": right.double().mean()},
        outputs=logits,
    )


class WithObjects:
    def __init__(self):
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.confusion = Confusion(CLASSES)
        self.squared_error = torchmetrics.MeanSquaredError().set_dtype(torch.float64)
        self.auroc = BinaryAUROC(thresholds=None)  # keeps every score: a list for a state

    def __call__(self, model, batch):
        x, y = batch
        loss = plain_loss(model, batch)
        logits = loss.outputs.detach()
        self.accuracy.update(logits, y)
        self.confusion.update(logits, y)
        self.squared_error.update(logits[:, 0], x[:, 0])
        self.auroc.update(score(x), is_first(y))
        objects = {
            "accuracy": self.accuracy,
            "confusion": self.confusion,
            "squared_error": self.squared_error,
            "auroc": self.auroc,
        }
        return dtrain.Loss(loss.mean, metrics=loss.metrics | objects)


def by_hand(model, samples):
    """Exact figures, then those that depend on the order of a sum; from the whole set at once."""
    x, y = make_data(samples)
    with torch.no_grad():
        logits = model(x)
    said = logits.argmax(-1)
    right = int((said == y).sum())
    pairs = list(zip(y.tolist(), said.tolist(), strict=True))
    exact = {
        "eval/right": right / samples,
        # torchmetrics divides in float32.
        "eval/accuracy": float(torch.tensor(float(right)) / torch.tensor(float(samples))),
    }
    for t in range(CLASSES):
        exact |= {f"eval/confusion/{t}{p}": pairs.count((t, p)) for p in range(CLASSES)}
    inexact = {
        "eval/loss": F.cross_entropy(logits, y).item(),
        "eval/mean_right": right / samples,
        "eval/squared_error": ((logits[:, 0] - x[:, 0]) ** 2).mean().item(),
    }
    return exact, inexact, area_by_pairs(score(x), is_first(y))


def area_by_pairs(scores, positive):
    """How often a positive's score is larger than a negative's; ties are half. 0 without pairs."""
    over = scores[positive == 1][:, None] - scores[positive == 0]
    return ((over > 0).double() + 0.5 * (over == 0)).mean().item() if over.numel() else 0.0


class Stream:
    """Every so-manieth sample, in batches of 3: some ranks have more of them, some none."""

    def __init__(self, samples, world):
        columns = [column[world.rank :: world.size] for column in make_data(samples)]
        self.batches = list(zip(*(column.split(3) for column in columns), strict=True))

    def __iter__(self):
        return (list(batch) for batch in self.batches if len(batch[0]))


def make_trainer(loss_fn, *callbacks, model=None):
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dtrain.Trainer(model, optimizer, loss_fn, callbacks=callbacks, sinks=[])


def with_two_updates():
    """A Trainer whose steps have two updates evaluates by a function of its own."""

    def losses(model, batch):
        yield "weight", plain_loss(model, batch)
        yield "bias", plain_loss(model, batch)

    model = make_model()
    parts = {"weight": [model[0].weight], "bias": [model[0].bias]}
    optimizers = {name: torch.optim.SGD(params, lr=0.1) for name, params in parts.items()}
    return dtrain.Trainer(model, optimizers, losses, eval_fn=WithObjects(), sinks=[])


def evaluate_all():
    world = dtrain.init(seed=0)
    found = {}
    for name, trainer, cases in (
        ("plain", make_trainer(plain_loss), CASES),
        ("objects", make_trainer(WithObjects()), FEW),
        ("objects, accumulated", make_trainer(WithObjects(), GradientAccumulation(3)), FEW[::2]),
        ("objects, two updates", with_two_updates(), FEW[::2]),
    ):
        for samples, batch_size in cases:
            data = torch.utils.data.TensorDataset(*make_data(samples))
            found[name, samples, batch_size] = trainer.evaluate(data, batch_size=batch_size)
    trainer = make_trainer(WithObjects())
    for samples in STREAMS:
        found["objects, streams", samples, 3] = trainer.evaluate(Stream(samples, world))
    return found


def check(found, model, samples, case):
    exact, inexact, area = by_hand(model, samples)
    if "eval/auroc" in found:
        assert found["eval/auroc"] == pytest.approx(area, abs=1e-6), case  # float32, inside of it
        assert len(found) == len(exact) + len(inexact) + 1, case
    else:
        exact = {name: value for name, value in exact.items() if name in found}
        inexact = {name: value for name, value in inexact.items() if name in found}
        assert found.keys() == {"eval/loss", "eval/right", "eval/mean_right"}, case
    assert {name: found[name] for name in exact} == exact, case
    wanted = pytest.approx(inexact, rel=1e-12, abs=1e-15)
    assert {name: found[name] for name in inexact} == wanted, case


@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]
)
def test_figures_are_those_of_the_whole_set(world_size):
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        # One sample is of one class; torchmetrics then says 0, and so does the truth here.
        warnings.filterwarnings("ignore", "No (positive|negative) samples in targets")
        ranks = run_processes(evaluate_all, world_size)
    assert all(found == ranks[0] for found in ranks)  # bit for bit
    assert len(ranks[0]) == len(CASES) + len(FEW) + 2 * len(FEW[::2]) + len(STREAMS)
    model = make_model()
    for case, found in ranks[0].items():
        assert ("eval/auroc" in found) == case[0].startswith("objects"), case
        check(found, model, case[1], case)


# ------------------------------------------------------------------------------ BatchNorm's buffers


def with_batch_norm():
    """Trains; returns the buffers before and after an evaluation, and what it found."""
    world = dtrain.init(seed=0)
    model = make_model(nn.BatchNorm1d(FEATURES))
    trainer = make_trainer(WithObjects(), model=model)
    data = torch.utils.data.TensorDataset(*make_data(MOST))
    # Ragged, with two samples a rank at least: of one, BatchNorm knows no variance.
    trainer.fit(data, batch_size=31, epochs=2)

    def buffers():
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    # After fit they are equal; a forward of each rank's own parts them again.
    with torch.no_grad():
        model.train()(data.tensors[0][world.rank :: world.size])
    before = buffers()
    metrics = trainer.evaluate(data, batch_size=31)
    return before, buffers(), metrics, model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_norms_buffers_are_made_equal_first(world_size):
    ranks = run_processes(with_batch_norm, world_size)
    own, after, metrics, state = ranks[0]
    for theirs, theirs_after, theirs_metrics, theirs_state in ranks[1:]:
        # Each rank had seen samples of its own; the statistics of rank 0 then are everybody's.
        assert not torch.equal(theirs["0.running_mean"], own["0.running_mean"])
        assert not torch.equal(theirs["0.running_var"], own["0.running_var"])
        assert same(theirs_after, own)
        assert theirs_metrics == metrics
        assert same(theirs_state, state)
    assert same(after, own)
    assert (
        own["0.num_batches_tracked"] == 9
    )  # 2 epochs of 31, 31, 31 and 8 samples, and that forward
    model = make_model(nn.BatchNorm1d(FEATURES))
    model.load_state_dict(state)
    check(metrics, model.eval(), MOST, "with BatchNorm")
