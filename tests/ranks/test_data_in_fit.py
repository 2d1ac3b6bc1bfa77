"""What data do in a run: how much they weigh, which epoch they are told, and how they fail."""

import re
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, default_collate

import dtrain
from dtrain.callbacks import Checkpoint, GradientAccumulation
from dtrain.distributed.comm import Comm
from dtrain.errors import ConfigError, DataError, RankMismatch, RemoteError
from dtrain.testing import run_ranks, try_ranks

X = torch.arange(1.0, 17)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.w * x.double()


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=1e-4)


def mean(net, batch):
    """Its gradient is the mean of the samples, so the weight tells whom each one counted for."""
    return net(batch).mean()


def trainer(callbacks=(), loss=mean, **options):
    return tiny.trainer(callbacks, net=Line(), optimizer=sgd, loss=loss, **options)


def errors(fn, world_size=2):
    """What each rank was told: kind and words."""
    return [(type(one.error), str(one.error)) for one in try_ranks(fn, world_size)]


# ----------------------------------------------------------------------------- samples left out


def below_10(samples):
    """Leaves samples out, in some micro-batches all of them."""
    left = [sample for sample in samples if sample < 10]
    return torch.stack(left) if left else torch.zeros(0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_collate_leaves_out_has_no_weight(ranks):
    def both():
        data = dtrain.Data(X, 6, shuffle=False, collate_fn=below_10, count=len)
        run = trainer([GradientAccumulation(2)])
        figures = run.evaluate(data)["eval/loss"]
        run.fit(data, epochs=1)
        return figures, run.model.w.item(), run.context.progress.samples

    for loss, w, samples in run_ranks(both, ranks):
        assert loss == pytest.approx(X[:9].mean().item(), rel=1e-12)
        assert w == pytest.approx(1 - 1e-4 * (X[:6].mean() + X[6:9].mean()).item(), rel=1e-9)
        assert samples == 9


def test_a_collate_that_leaves_samples_out_is_asked_about_on_all_ranks():
    def left_out():
        trainer().evaluate(dtrain.Data(X, 6, shuffle=False, collate_fn=below_10))

    for found, words in errors(left_out):
        assert found in (DataError, RemoteError)
        assert re.search(r"given [23] samples and made Tensor of them \(itself \[0\]\)", words)
        assert "Pass Data(..., count=...)" in words


class Holes(Dataset):
    """Rows of which some cannot be read."""

    def __init__(self, holes):
        self.holes = holes

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return None if row in self.holes else X[row]


def readable(samples):
    left = [sample for sample in samples if sample is not None]
    return default_collate(left) if left else None


def test_a_step_in_which_nothing_can_be_read_is_no_end_of_the_epoch():
    holes = {1, 4, 5, 6, 7, 9}  # all of the second of three steps

    def both():
        data = dtrain.Data(Holes(holes), 4, shuffle=False, collate_fn=readable)
        run = trainer()
        figures = run.evaluate(data)["eval/loss"]
        result = run.fit(data, epochs=1)
        progress = run.context.progress
        return figures, result.steps, progress.updates, progress.samples

    expected = X.double()[[row for row in range(12) if row not in holes]].mean().item()
    for ranks in (1, 2):
        for figures, *counts in run_ranks(both, ranks):
            assert figures == pytest.approx(expected, rel=1e-12)
            assert counts == [3, 2, 6]


@dataclass
class Pair:
    x: torch.Tensor
    names: list


@pytest.mark.parametrize("ranks", [1, 2])
def test_streams_of_dataclasses_work_like_datasets_of_them(ranks):
    def loss(net, batch):
        assert type(batch) is Pair
        return net(batch.x).mean()

    def pair(samples):
        return Pair(torch.stack(samples), ["name"])

    def both():
        world = dtrain.init(seed=0)
        halves = [X[start + 8 * world.rank // world.size :][: 8 // world.size] for start in (0, 8)]
        found = []
        for data in (
            dtrain.Data([Pair(half, ["name"]) for half in halves]),
            dtrain.Data(X, 8, shuffle=False, collate_fn=pair),
        ):
            run = trainer(loss=loss)
            figures = run.evaluate(data)["eval/loss"]
            run.fit(data, epochs=1)
            found.append((figures, run.model.w.item(), run.context.progress.samples))
        return found

    for stream, dataset in run_ranks(both, ranks):
        assert stream == dataset
        assert dataset[2] == 16


def test_a_graph_stream_is_asked_about_and_weighed_as_told():
    graphs = [
        {
            "edge_index": torch.zeros(2, 5 * n),
            "x": torch.ones(3 * n),
            "y": torch.full((n,), 1.0 * n),
        }
        for n in (2, 10)
    ]

    def loss(net, batch):
        return net(batch["y"]).mean()

    def told():
        return trainer(loss=loss).evaluate(dtrain.Data(graphs, count=lambda b: len(b["y"])))

    for figures in run_ranks(told, 2):
        assert figures["eval/loss"] == pytest.approx((2 * 2 + 10 * 10) / 12, rel=1e-12)
    for _, words in errors(lambda: trainer(loss=loss).fit(dtrain.Data(graphs), epochs=1)):
        assert "a stream yielded dict whose tensors differ in their first dimension" in words
        assert "edge_index [2, 10], x [6], y [2]" in words


# ----------------------------------------------------------------------------- weights of nothing


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0)])
def test_a_loss_of_weight_0_needs_no_gradient(weight):
    def some(net, batch):
        kept = batch[batch > 4]
        if not len(kept):
            return dtrain.Loss(torch.zeros(()), weight=weight, metrics={"kept": torch.tensor(0.0)})
        return dtrain.Loss(net(kept).mean(), weight=len(kept), metrics={"kept": 1.0})

    def both():
        run = trainer(loss=some)
        result = run.fit(dtrain.Data(X[:12], 4, shuffle=False), epochs=1, eval_set=X[:12])
        progress = run.context.progress
        return result.steps, progress.updates, run.model.w.item(), result.metrics["train/kept"]

    w = 1 - 1e-4 * (X[4:8].mean() + X[8:12].mean()).item()
    for ranks in (1, 2):
        for found in run_ranks(both, ranks):
            assert found == (3, 2, pytest.approx(w, rel=1e-9), 1.0)
    for found, words in errors(
        lambda: trainer(loss=lambda n, b: b.mean()).fit(X, batch_size=4, epochs=1)
    ):
        assert "the loss has no gradient" in words, found  # of a weight of 2


@pytest.mark.parametrize("how", ["generator", "weights"])
def test_an_evaluation_that_weighs_nothing_is_told_on_all_ranks(how):
    def nothing(net, batch):
        return dtrain.Loss(net(batch).mean(), weight=0)

    def run():
        if how == "weights":
            return trainer(eval_fn=nothing).fit(X, batch_size=4, epochs=2, eval_set=X)
        sets = {"val": dtrain.Data(batch for batch in X.split(4))}
        return trainer().fit(X, batch_size=4, epochs=2, eval_set=sets)

    for found, words in errors(run):
        assert found is DataError
        assert (
            f"the evaluation ({'eval' if how == 'weights' else 'eval/val'}) weighs nothing" in words
        )
        assert "an object whose __iter__ begins anew" in words


def test_metrics_with_a_weight_of_their_own_are_enough():
    def counts(net, batch):
        return dtrain.Loss(net(batch).mean(), weight=0, metrics={"n": dtrain.Mean(len(batch), 1)})

    assert run_ranks(lambda: trainer(eval_fn=counts).evaluate(X, batch_size=8), 1) == [
        {"eval/n": 8}
    ]


# ----------------------------------------------------------------------------- epochs


class Told(IterableDataset):
    """A stream whose batches say which epoch it was told; begins where it was loaded."""

    def __init__(self, stateful):
        self.epoch, self.at, self.heard = -1, 0, []
        if stateful:
            self.state_dict = lambda: {"at": self.at}
            self.load_state_dict = lambda state: setattr(self, "at", state["at"])

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.heard.append(epoch)

    def __iter__(self):
        while self.at < 3:
            self.at += 1
            yield torch.full((2,), 100.0 * self.epoch + self.at)
        self.at = 0


@pytest.mark.parametrize("stateful", [False, True])
def test_a_stream_is_told_its_epoch_also_where_it_goes_on(tmp_path, stateful):
    seen = []

    def part(name, **plan):
        class See(dtrain.Callback):
            def on_batch(self, ctx, step):
                seen.append(int(step.batch[0]))

        stream = Told(stateful)
        trainer([See(), Checkpoint()], run_dir=tmp_path / name).fit(dtrain.Data(stream), **plan)
        return stream.heard

    whole = [100 * epoch + at for epoch in range(3) for at in (1, 2, 3)]
    assert run_ranks(lambda: part("whole", epochs=3), 1) == [[0, 1, 2]]
    assert seen == whole
    for steps in range(1, 9):
        seen.clear()
        run_ranks(lambda steps=steps: part(str(steps), epochs=3, max_steps=steps), 1)
        run_ranks(lambda steps=steps: part(str(steps), epochs=3), 1)
        assert seen == whole, steps


class Levels(Dataset):
    """Changed by a callback, and told the epoch; each sample says both."""

    level, epoch, length = 0, -1, 4

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return torch.tensor([float(self.level), float(self.epoch)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_is_seen_as_on_epoch_start_left_it(workers):
    def levels():
        dataset, seen = Levels(), []

        class Raise(dtrain.Callback):
            def on_epoch_start(self, ctx):
                dataset.level = 10 * ctx.progress.epoch
                assert dataset.epoch == ctx.progress.epoch - 1  # told after this

            def on_batch(self, ctx, step):
                seen.append(step.batch[0].tolist())

        within = ConcatDataset([dataset])
        data = dtrain.Data(within, 4, num_workers=workers)
        trainer([Raise()]).fit(data, epochs=3, eval_set=dtrain.Data(dataset, 4))
        return seen, dataset.epoch

    assert run_ranks(levels, 1) == [([[0, 0], [10, 1], [20, 2]], 2)]


class Growing:
    """An order that a callback makes longer."""

    def __init__(self):
        self.length = 4

    def __len__(self):
        return self.length

    def indices(self, epoch, start, stop):
        return np.arange(start, stop)


class Grow(dtrain.Callback):
    """Four positions more in each epoch, on the ranks that take part."""

    def __init__(self, order, ranks=(0, 1)):
        self.order, self.ranks, self.totals = order, ranks, []

    def on_epoch_start(self, ctx):
        if dtrain.init().rank in self.ranks:
            self.order.length = 4 * (ctx.progress.epoch + 1)

    def on_step_start(self, ctx, step):
        progress = ctx.progress
        self.totals.append((progress.epoch, progress.steps_per_epoch, progress.total_steps))


def test_an_order_that_grows_is_asked_in_each_epoch_also_after_a_resume(tmp_path):
    def grow(name, **plan):
        order = Growing()
        callback, sink = Grow(order), tiny.Words("message")
        run = tiny.trainer(
            [callback, Checkpoint()], net=Line(), optimizer=sgd, loss=mean, run_dir=tmp_path / name
        )
        run._sinks = (sink,)
        run.fit(dtrain.Data(X, 2, order=order), **plan)
        return run.model.w.item(), callback.totals, "\n".join(sink.words)

    (end, totals, said), (other, _, _) = run_ranks(lambda: grow("whole", epochs=3), 2)
    assert end == other
    assert totals == [(0, 2, 6)] * 2 + [(1, 4, 10)] * 4 + [(2, 6, 12)] * 6
    assert "epoch 1 has 4 steps, where 2 were planned" in said
    run_ranks(lambda: grow("parts", epochs=3, max_steps=5), 2)
    for again, rest, _ in run_ranks(lambda: grow("parts", epochs=3), 2):
        assert again == end
        assert rest == totals[5:]


def test_an_order_that_grows_on_one_rank_is_told_to_all():
    def grow():
        order = Growing()
        trainer([Grow(order, ranks=(1,))]).fit(dtrain.Data(X, 2, order=order), epochs=3)

    for found, words in errors(grow):
        assert found is RankMismatch
        assert "epoch 1: 4 in batches of 2 on rank 0, 8 in batches of 2 on rank 1. Change" in words


# ----------------------------------------------------------------------------- failures, and words


class Torn(Dataset):
    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def __getitem__(self, row):
        if row == 5:
            raise self.how
        return X[row]


@pytest.mark.parametrize("how", [ValueError("torn"), KeyError("name"), StopIteration()])
def test_all_ranks_are_told_which_sample_failed(how):
    def fit():
        trainer().fit(dtrain.Data(Torn(how), 4, shuffle=False), epochs=1)

    main, other = try_ranks(fit, 2)
    assert type(other.error) is RemoteError or type(main.error) is RemoteError
    remote = main.error if type(main.error) is RemoteError else other.error
    assert "(in Torn, sample 5)" in str(remote)


def test_a_dict_of_the_same_columns_is_a_set_to_evaluate_on():
    columns = {"x": X, "y": X.tolist()}

    def loss(net, batch):
        return net(batch["x"] - batch["y"] + 1).mean()

    def both():
        run = trainer(loss=loss)
        result = run.fit(columns, batch_size=4, epochs=1, eval_set=columns)
        return sorted(name for name in result.metrics if name.startswith("eval/"))

    assert run_ranks(both, 2) == [["eval/loss"]] * 2
    for found, words in errors(
        lambda: trainer(loss=loss).evaluate(columns | {"y": X}, batch_size=4)
    ):
        assert (found, "may be one set, of the columns x, y" in words) == (ConfigError, True)


def test_outputs_are_let_go_of_before_the_next_batch_is_made():
    class Outputs:
        pass

    def run():
        alive, most = [], []

        def loss(net, batch):
            most.append(sum(one() is not None for one in alive))
            outputs = Outputs()
            alive.append(weakref.ref(outputs))
            return dtrain.Loss(net(batch).mean(), outputs=outputs)

        trainer(loss=loss).fit(X, batch_size=4, epochs=2, eval_set=X, eval_every=3)
        return max(most), sum(one() is not None for one in alive)

    assert run_ranks(run, 1) == [(0, 0)]


# ------------------------------------------------------------- each rank has other samples


def splits(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.utils.data.random_split(X, [8, 8], generator=generator)[0]


OTHER_SAMPLES = {
    "a split without a seed": (splits, "epoch 0, or another order of them"),
    "rows of its own": (lambda rank: torch.utils.data.Subset(X, range(rank, 16, 2)), "row"),
    "arrays of its own": (
        lambda rank: X[rank::2],
        "and those that follow hold other numbers on rank 1",
    ),
    "an order of its own": (
        lambda rank: dtrain.Data(X, 4, order=np.random.default_rng(rank).permutation(16)),
        "or another order of them, which begins here with row",
    ),
    "draws of its own": (
        lambda rank: dtrain.Data(X, 4, order=dtrain.data.Weighted(X, seed=rank)),
        "another order of them",
    ),
}


@pytest.mark.parametrize("how", OTHER_SAMPLES)
def test_ranks_with_other_samples_or_another_order_are_told(how):
    """Each would train on a part of its own part, and nobody would notice."""
    given, words = OTHER_SAMPLES[how]

    def train():
        run = trainer()
        run.fit(given(run.world.rank), batch_size=4, epochs=1)

    def judge():
        run = trainer()
        run.evaluate(given(run.world.rank), batch_size=4)

    def judge_in_fit():
        run = trainer()
        run.fit(X, batch_size=4, epochs=1, eval_set=given(run.world.rank))

    for kind, said in errors(train):
        assert kind is RankMismatch
        assert words in said
        assert "come several times" in said
    for part in (judge, judge_in_fit):
        for kind, said in errors(part):
            assert kind is RankMismatch
            assert "ranks have other samples in the evaluation (eval)" in said


class Named(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, name):
        return X["abcd".index(name)]


@pytest.mark.parametrize(
    "given",
    [
        torch.utils.data.Subset(Named(), "abcd"),
        X.diag().to_sparse(),
        X.view(16, 1)[:, :0],
        X.bool(),
    ],
    ids=["keys", "sparse", "empty", "bool"],
)
def test_the_same_samples_of_any_kind_are_the_same(given):
    def train():
        def loss(net, batch):
            return net(batch.to_dense().sum())

        return trainer(loss=loss).fit(given, batch_size=4, epochs=1).steps

    assert run_ranks(train, 2) == [len(given) // 4] * 2


def test_an_order_that_parts_in_a_later_epoch_is_told():
    class Parts(Growing):
        def indices(self, epoch, start, stop):
            rank = dtrain.init().rank if epoch else 0
            return (np.arange(start, stop) + rank) % 16

    def train():
        trainer().fit(dtrain.Data(X, 2, order=Parts()), epochs=2)

    for kind, said in errors(train):
        assert kind is RankMismatch
        assert "other samples in epoch 1" in said


def test_the_same_data_rounded_otherwise_are_the_same():
    def train():
        run = trainer()
        x = X * (1 + 1e-7 * run.world.rank)
        assert not run.world.rank or not torch.equal(x, X)
        run.evaluate(x, batch_size=4)
        return run.fit(x, batch_size=4, epochs=1).steps

    assert run_ranks(train, 2) == [4, 4]


# ----------------------------------------------------------------- streams that are all the same


class Wrapped:
    """Hides a loader, as a progress bar does."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("own", [True, False])
def test_streams_that_are_the_same_on_all_ranks_are_told_of_once(ranks, own):
    def stream():
        rank, told = dtrain.init(seed=0).rank, tiny.Words("message")
        dataset = X[rank :: dtrain.init().size] if own else X
        loader = Wrapped(torch.utils.data.DataLoader(dataset, batch_size=2))
        run = dtrain.Trainer(Line(), sgd, mean, sinks=[told])
        run.fit(loader, epochs=3, log_every=2)
        return [words for words in told.words if "the same first batch" in words]

    for rank, words in enumerate(run_ranks(stream, ranks)):
        assert len(words) == (0 if own or ranks == 1 or rank else 1)


def test_what_is_evaluated_on_is_compared_once(monkeypatch):
    asked, gather = [], Comm.all_gather

    def noted(self, label, mine):
        asked.append(label)
        return gather(self, label, mine)

    monkeypatch.setattr(Comm, "all_gather", noted)

    def fit():
        run = dtrain.Trainer(Line(), sgd, mean, sinks=[])
        run.fit(X, batch_size=4, epochs=3, eval_set=X[:8])

    run_ranks(fit, 2)
    assert asked.count("samples of the evaluation (eval)") == 2  # one for each rank
    assert asked.count("samples of epoch 2") == 2
