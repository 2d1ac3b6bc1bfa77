"""How batches get to an accelerator: what stands in for one copies as late as a GPU may."""

from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from stand_in import StandIn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import dtrain
from dtrain.data import Data, packing, shipping, split_share
from dtrain.data.map_feed import MapFeed
from dtrain.data.packing import Layout, kind_of
from dtrain.data.shipping import Shipper
from dtrain.data.streams import StreamFeed
from dtrain.distributed import Comm, World
from dtrain.errors import DataError
from dtrain.testing import run_ranks

CPU = torch.device("cpu")


class Late(StandIn):
    """Nothing is copied before somebody waits for it on the host, and all memory is new."""

    def __init__(self):
        super().__init__()
        self._due = []
        self.log = []
        self._on = "computes"

    def install(self, monkeypatch):
        monkeypatch.setattr(packing, "_BESIDE", 0)  # no batch here is large enough
        return super().install(monkeypatch)

    def pinned(self, count, dtype):
        return super().pinned(count, dtype).fill_(77)

    def copied(self, tensor):
        super().copied(tensor)
        copy = torch.full_like(tensor, 99)
        self._due.append((copy, tensor))
        self.log.append(f"copies {tensor.numel()} on the one that {self._on}")
        return copy

    @contextmanager
    def on_another_stream(self):
        self._on = "copies"
        yield
        self._on = "computes"

    def event(self, **options):
        event, arrive = super().event(**options), self.arrive
        record, synchronize = event.record, event.synchronize

        def recorded():
            record()
            self.log.append(f"an event on the one that {self._on}")

        def waited():
            synchronize()
            arrive()

        event.record, event.synchronize = recorded, waited
        return event

    def wait_for(self, event):
        super().wait_for(event)
        self.log.append(f"the one that {self._on} waits")

    def lend(self, tensor):
        super().lend(tensor)
        self.log.append(f"the one that {self._on} uses {tensor.numel()}")

    def arrive(self):
        for copy, tensor in self._due:
            copy.copy_(tensor)
        self._due.clear()


@pytest.fixture
def card(monkeypatch):
    return Late().install(monkeypatch)


def world(rank=0, size=1):
    return World(rank, rank, size, "here", CPU, "none", "solo", 0, Comm())


def in_two(share):
    return split_share(share, steps=2)


def taken(feed, epochs=(0, 1), first_step=0):
    """Returns what all micro-batches are; each is held until the last is there."""
    return [
        step.next()
        for epoch in epochs
        for step in feed.epoch(epoch, first_step)
        for _ in range(step.micros)
    ]


def steps_of(tensor):
    """Its strides, but where none is taken."""
    sized = zip(tensor.shape, tensor.stride(), strict=True)
    return [step for size, step in sized if size > 1 and tensor.numel()]


def same(one, other):
    """Types, dtypes, shapes, strides and bits alike."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape, one.layout) == (other.dtype, other.shape, other.layout)
        assert one.requires_grad == other.requires_grad
        if one.layout == torch.strided:
            assert steps_of(one) == steps_of(other)
            assert torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (one, other)))
        else:
            assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, dict):
        assert [*one] == [*other]
        same([*one.values()], [*other.values()])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert np.array_equal(one, other)
    return True


# ----------------------------------------------------------------------------- arrays


def array(dtype, *shape):
    return (np.random.default_rng(0).random((21, *shape)) * 9).astype(dtype)


def read_only(tmp_path):
    array("float32", 3).tofile(tmp_path / "file")
    return np.memmap(tmp_path / "file", "float32", "r", shape=(21, 3))


class Rows(Dataset):
    def __len__(self):
        return 21

    def __getitem__(self, row):
        return torch.full((2, 1), float(row)), f"row {row}"


KINDS = "bool uint8 int8 int16 int32 int64 uint16 uint32 float16 float32 float64 complex64"
DATA = {
    "numbers": lambda: TensorDataset(*(torch.from_numpy(array(kind)) for kind in KINDS.split())),
    "rows": lambda: tuple(array(kind, 3, 2) for kind in KINDS.split()),
    "array": lambda: array("float64", 5),
    "tensor": lambda: torch.randn(21, 3, generator=torch.Generator().manual_seed(0)),
    "dict": lambda: {"x": array("float32", 3), "y": torch.arange(21), "z": [1, 2, 3] * 7},
    "narrow": lambda: TensorDataset(torch.randn(21, 3).bfloat16(), torch.ones(21, 2).half()),
    "strided": lambda: (torch.arange(126).view(6, 21).t()[:, ::2], array("int16", 6)[:, ::-2]),
    "channels last": lambda: torch.randn(21, 3, 4, 4).to(memory_format=torch.channels_last),
    "backwards": lambda: (array("float32", 2)[::-1], array("int8")),
    "nothing in it": lambda: (torch.ones(21, 0), np.ones((21, 3, 0)), torch.arange(21)),
    "nothing at all": lambda: torch.ones(21, 0),
    "complex": lambda: (torch.arange(21.0).to(torch.complex64).conj(), torch.arange(21).bool()),
    "subset": lambda: Subset(Subset(TensorDataset(torch.arange(50)), range(2, 44, 2)), range(21)),
    "counted from the end": lambda: Subset(TensorDataset(torch.arange(50)), [*range(-21, 0)]),
    "text": lambda: {"x": array("float32", 3), "name": np.array(list("abcdefghijklmnopqrstu"))},
    "samples": Rows,
}


@pytest.mark.parametrize("threads", ["several", "one"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", DATA)
def test_all_kinds_of_data_come_as_they_do_on_the_cpu(monkeypatch, kind, size, threads):
    if threads == "one":  # gathers rows, though few
        monkeypatch.setattr(shipping, "_OF_SEVERAL", 0)

    def of_all(first_step=0):
        torch.manual_seed(0)
        data = Data(DATA[kind](), 8)  # the last is ragged
        feeds = [MapFeed(data, world(rank, size), in_two, 5) for rank in range(size)]
        return [taken(feed, first_step=first_step) for feed in feeds]

    plain, resumed = of_all(), of_all(first_step=1)
    card = Late().install(monkeypatch)
    late, late_resumed = of_all(), of_all(first_step=1)
    card.arrive()
    assert same(late, plain)
    assert same(late_resumed, resumed)
    micros = sum(len(one) - one.count(None) for one in [*plain, *resumed])
    copies, asked = micros, card.counts
    assert [asked[what] for what in ("copies", "records", "waits", "lent")] == [copies] * 4
    assert (asked["events"], asked["pinned"]) == (4 * size, 4 * size)  # of two feeds, two turns


def test_a_memory_map_that_may_only_be_read(card, tmp_path):
    column = read_only(tmp_path)
    (batch, _), *_ = taken(MapFeed(Data(column, 8, shuffle=False), world(), in_two, 0))
    card.arrive()
    assert torch.equal(batch, torch.from_numpy(column[:4].copy()))


def test_a_gradient_goes_on_to_the_data(card):
    column = torch.arange(21.0, requires_grad=True)
    feed = MapFeed(Data(TensorDataset(column), 21, shuffle=False), world(), lambda n: [n], 0)
    ((batch, _),) = taken(feed, epochs=(0,))
    (2 * batch[0]).sum().backward()
    assert column.grad.tolist() == [2.0] * 21
    assert not card.counts["copies"]
    with torch.no_grad():
        ((batch, _),) = taken(feed, epochs=(0,))
    card.arrive()
    assert batch[0].tolist() == [*range(21)]
    assert (batch[0].requires_grad, card.counts["copies"]) == (False, 1)


@pytest.mark.parametrize("least", [0, 2**15])
def test_columns_may_be_replaced_at_any_time(card, monkeypatch, least):
    monkeypatch.setattr(shipping, "_OF_SEVERAL", least)
    dataset = TensorDataset(torch.arange(12.0), torch.arange(12))
    feed = MapFeed(Data(dataset, 2, shuffle=False), world(), lambda n: [n], 0)
    batches = []
    for number, step in enumerate(feed.epoch(0, 0)):
        batches.append(step.next()[0])
        if number == 0:
            dataset.tensors = (torch.arange(12.0) * 10, torch.arange(12))
        if number == 1:
            dataset.tensors[0].mul_(10)
        if number == 2:
            dataset.tensors[0].data = torch.ones(12, 2)
        if number == 3:
            dataset.tensors[0].data = torch.ones(12, 2).double()
        if number == 4:
            dataset.tensors = (torch.zeros(12),)
    card.arrive()
    assert [batch[0].flatten().tolist() for batch in batches] == [
        [0, 1], [20, 30], [400, 500], [1] * 4, [1] * 4, [0, 0]
    ]  # fmt: skip
    assert batches[4][0].dtype == torch.float64
    assert card.counts["copies"] == 6


# ----------------------------------------------------------------------------- what goes round


def test_after_its_largest_batch_nothing_is_made_anew(card):
    feed = MapFeed(Data(torch.ones(1000, 100), 250), world(), in_two, 0)
    taken(feed, epochs=[0])
    assert (card.counts["pinned"], card.counts["events"]) == (2, 2)
    taken(feed, epochs=range(1, 5))
    assert (card.counts["pinned"], card.counts["events"]) == (2, 2)
    assert card.counts["copies"] == card.counts["records"] == 5 * 8
    assert card.counts["synchronized"] == 5 * 8 - 2


def test_a_buffer_grows_with_the_batches(card):
    shipper = Shipper(CPU)
    batches = [torch.arange(float(n)) for n in (10, 10, 5000, 10, 100, 5000, 8192, 3, 8192, 8193)]
    made = [shipper.ship([batch, batch.bool()]) for batch in batches]
    card.arrive()
    assert same(made, [[batch, batch.bool()] for batch in batches])
    # 1 KiB each, then 32 (for 19.5 + 5), 64 (for 40), and 64 for the other turn.
    assert card.counts["pinned"] <= 6
    assert card.counts["events"] == 2
    before = card.counts["pinned"]
    for batch in batches:
        shipper.ship([batch, batch.bool()])
    assert card.counts["pinned"] <= before + 1


def test_batches_of_many_shapes_are_not_remembered_for_ever(card):
    shipper = Shipper(CPU)
    made = [shipper.ship(torch.full((n,), n)) for n in range(1, 400)]
    card.arrive()
    assert all(one.tolist() == [n] * n for n, one in enumerate(made, 1))
    assert max(len(turn.packed) for turn in shipper._ring._turns) <= 64


def test_a_copy_runs_beside_what_the_current_stream_computes(card):
    Shipper(CPU).ship({"x": torch.ones(2), "y": [torch.ones(200)]})
    assert card.log == [
        "copies 1536 on the one that copies",
        "an event on the one that copies",
        "the one that computes waits",
        "the one that computes uses 1536",
    ]


def test_a_small_one_is_copied_by_the_stream_that_computes(card, monkeypatch):
    monkeypatch.setattr(packing, "_BESIDE", 1536 + 1)
    shipper = Shipper(CPU)
    made = [shipper.ship({"x": torch.full((2,), n), "y": [torch.ones(200)]}) for n in range(6)]
    assert card.log == 6 * [
        "copies 1536 on the one that computes",
        "an event on the one that computes",  # before which the buffer is not filled again
    ]
    card.arrive()
    assert [one["x"].tolist() for one in made] == [[n, n] for n in range(6)]
    card.all_pinned = True
    shipper.ship([torch.ones(300), torch.ones(84)])
    assert card.counts["lent"] == card.counts["waits"] == 0
    shipper.ship([torch.ones(300), torch.ones(85)])
    assert (card.counts["lent"], card.counts["waits"]) == (2, 1)


def test_a_batch_in_place_spoils_no_other_tensor(card):
    x, y = Shipper(CPU).ship([torch.ones(3), torch.ones(3)])
    card.arrive()
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * x).sum()
    y.mul_(2)  # x is kept for backward, and autograd counts its changes
    loss.backward()
    assert weight.grad.tolist() == [1.0] * 3
    assert [one.untyped_storage().nbytes() for one in (x, y)] == [12, 12]  # for torch.compile
    del x
    assert y.tolist() == [2.0] * 3


def test_an_error_in_between_leaves_the_ring_whole(card, monkeypatch):
    shipper = Shipper(CPU)
    kept = shipper.ship(torch.arange(5))
    copied = card.copied
    monkeypatch.setattr(card, "copied", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shipper.ship(torch.arange(5) + 10)
    monkeypatch.setattr(card, "copied", copied)
    others = [shipper.ship(torch.arange(5) + 10 * n) for n in range(5)]
    card.arrive()
    assert kept.tolist() == [*range(5)]
    assert [one[0].item() for one in others] == [0, 10, 20, 30, 40]
    assert card.counts["events"] == 2


def test_a_layout_is_aligned_and_dense():
    tensors = [torch.ones(3, dtype=torch.bool), torch.ones(5, 7).double().t(), torch.ones(2)]
    layout = Layout(map(kind_of, tensors))
    memory = torch.zeros(layout.bytes, dtype=torch.uint8)
    made = layout.tensors(memory)
    begin = memory.data_ptr()
    assert [one.data_ptr() - begin for one in made] == [0, 512, 1024]
    assert [one.stride() for one in made] == [(1,), (1, 7), (1,)]
    sliced = torch.ones(4, 6)[:, ::2]
    assert kind_of(sliced) == (torch.float32, (4, 3), (3, 1))
    assert kind_of(torch.ones(1, 3).expand(4, 3))[2] == (3, 1)


# ----------------------------------------------------------------------------- on the card


@pytest.fixture
def quick(monkeypatch):
    """An accelerator whose copies are there at once, as those that compute with them see it."""
    return StandIn().install(monkeypatch)


def on_card(card, *tensors):
    card.card += tensors
    return tensors


@pytest.mark.parametrize("kind", ["rows", "columns", "one", "subset", "backwards"])
def test_what_lies_on_the_card_is_indexed_there(quick, kind):
    x, y = on_card(quick, torch.randn(300, 2), torch.arange(300))
    rows = {"subset": [*range(0, 300, 2)], "backwards": [*range(-1, -300, -2)]}.get(
        kind, range(300)
    )
    pair = TensorDataset(x, y)
    data = {"rows": pair, "columns": {"x": x, "y": y}, "one": y}.get(kind, Subset(pair, rows))
    feed = MapFeed(Data(data, 8), world(0, 2), in_two, 5)
    order = [row for step in range(feed.steps_per_epoch) for row in feed.rows(0, step)]
    numbers = [rows[row] % 300 for row in order]
    batches = [batch for batch, _ in taken(feed, epochs=[0])]
    made = [[*one.values()] if kind == "columns" else one for one in batches]
    assert torch.cat(made if kind == "one" else [one[-1] for one in made]).tolist() == numbers
    if kind != "one":
        assert same(torch.cat([one[0] for one in made]), x[numbers])
    assert (quick.counts["copies"], quick.counts["pinned"], quick.counts["events"]) == (1, 1, 1)


def test_an_order_of_the_users_own_is_asked_for_what_comes_next(quick):
    class Mine:
        def __len__(self):
            return 6

        def indices(self, epoch, start, stop):
            return np.arange(stop, start, -1) - 1

    (y,) = on_card(quick, torch.arange(6))
    feed = MapFeed(Data(y, 2, order=Mine()), world(), lambda n: [n], 5)
    assert [batch.tolist() for batch, _ in taken(feed, epochs=[0])] == [[1, 0], [3, 2], [5, 4]]
    assert quick.counts["copies"] == 3


def test_a_subset_of_what_is_not_there_is_refused(quick):
    (y,) = on_card(quick, torch.arange(6))
    for rows in ([0, 6], [-7, 0]):
        feed = MapFeed(Data(Subset(TensorDataset(y), rows), 2), world(), lambda n: [n], 5)
        with pytest.raises(DataError, match=r"\(Subset\) gave row .*; the dataset has 6 samples"):
            taken(feed)


@pytest.mark.parametrize("backwards", [False, True])
def test_columns_may_lie_here_and_there(quick, backwards):
    there, also = on_card(quick, torch.arange(30), torch.arange(30.0))
    here = array("float32", 3)[:10].repeat(3, 0)
    data = {"a": there, "here": here, "b": also}
    if backwards:
        data = Subset(Data(data, 8).dataset, range(-30, 0))
    feed = MapFeed(Data(data, 8), world(), in_two, 5)
    order = [row for step in range(4) for row in feed.rows(0, step)]
    batches = [batch for batch, _ in taken(feed, epochs=[0])]
    assert [*batches[0]] == ["a", "here", "b"]
    assert torch.cat([one["a"] for one in batches]).tolist() == order
    assert torch.cat([one["b"] for one in batches]).tolist() == order
    assert torch.equal(torch.cat([one["here"] for one in batches]), torch.from_numpy(here[order]))
    assert quick.counts["copies"] == 8


def test_data_that_move_to_the_card_in_an_epoch(quick):
    x = torch.arange(12)
    data = TensorDataset(x.clone())
    feed = MapFeed(Data(data, 2, shuffle=False), world(), lambda n: [n], 5)
    steps = feed.epoch(0, 0)
    seen = next(steps).next()[0][0].tolist()
    data.tensors = on_card(quick, x)
    seen += [n for _ in range(2) for n in next(steps).next()[0][0].tolist()]
    assert seen == [*range(6)]
    steps = feed.epoch(1, 0)
    seen = next(steps).next()[0][0].tolist()
    data.tensors = (torch.arange(12),)  # and back
    seen += next(steps).next()[0][0].tolist()
    data.tensors = (np.arange(12),)
    seen += next(steps).next()[0][0].tolist()
    assert seen == [*range(6)]


# ----------------------------------------------------------------------------- ready batches


@dataclass(frozen=True)
class Parts:
    x: Tensor
    more: dict
    length: int = 3
    names: list = field(default_factory=lambda: ["a"])


Pair = namedtuple("Pair", "x y")

READY = {
    "tensor": lambda: torch.randn(3, 2),
    "list": lambda: [torch.randn(3, 2), torch.arange(3)],
    "nested": lambda: {"x": torch.randn(3), "more": (torch.arange(3), ["text", None, 4]), "n": []},
    "channels last": lambda: torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last),
    "sliced": lambda: (torch.ones(3, 8)[:, ::3], torch.ones(3, 1).expand(3, 4), torch.eye(3).t()),
    "zero dimensions": lambda: [torch.ones(3), torch.tensor(4.0)],
    "named": lambda: Pair(torch.ones(3), torch.zeros(3)),
    "odd": lambda: [torch.ones(3), nn.Linear(3, 3).weight, torch.eye(3).to_sparse(), np.ones(3)],
    "needs a gradient": lambda: (torch.ones(3), torch.ones(3, requires_grad=True)),
}  # fmt: skip
# How many of their tensors are known well enough, where not one: the others go by accelerate.
MOVED = {"list": 2, "nested": 2, "sliced": 3, "zero dimensions": 2, "named": 0}


def sent(part):
    """As torch sends a tensor elsewhere: dense, with the order of its dimensions."""
    plain = type(part) is Tensor and part.layout == torch.strided and not part.requires_grad
    return part.to(CPU, copy=True) if plain else part


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", READY)
def test_ready_batches_come_as_they_are(card, kind, pinned):
    torch.manual_seed(0)
    batches = [READY[kind]() for _ in range(5)]
    expected = tree_map(sent, batches)
    card.all_pinned = pinned
    feed = StreamFeed(Data(batches, count=lambda batch: 3), world(), 1)
    made = [step.next()[0] for step, _ in zip(feed.epoch(0, 0), batches, strict=False)]
    card.arrive()
    assert same(made, expected)
    asked, tensors = card.counts, MOVED.get(kind, 1)
    assert asked["records"] == asked["waits"] == (5 if tensors else 0)
    assert asked["events"] == (2 if tensors else 0)
    assert asked["copies"] == asked["lent"] == (5 * tensors if pinned else asked["records"])
    assert asked["pinned"] == (0 if pinned else asked["events"])


def test_what_is_pinned_already_is_not_packed(card, monkeypatch):
    monkeypatch.setattr(card, "is_pinned", lambda tensor: tensor.dtype == torch.int64)
    batch = [torch.arange(3), torch.ones(3), torch.arange(2), torch.zeros(2)]
    made = Shipper(CPU).ship(batch)
    card.arrive()
    assert same(made, tree_map(sent, batch))
    assert (card.counts["copies"], card.counts["records"]) == (3, 1)


def test_a_dataclass_is_looked_into(card):
    batch = Parts(torch.ones(3), {"y": torch.arange(3)})
    made = Shipper(CPU).ship(batch)
    card.arrive()
    assert (made.x.tolist(), made.more["y"].tolist()) == ([1.0] * 3, [0, 1, 2])
    assert (type(made), made.length, made.names, made.x is batch.x) == (Parts, 3, ["a"], False)
    assert card.counts["copies"] == 1


def test_what_lies_on_the_card_stays_there(quick):
    (there,) = on_card(quick, torch.ones(3))
    made = Shipper(CPU).ship([there, torch.zeros(3)])
    assert made[0] is there
    assert quick.counts["copies"] == 1


def test_elsewhere_all_goes_as_accelerate_sends_it():
    meta = Shipper(torch.device("meta"))
    assert meta.ship({"x": (torch.ones(1), "text")})["x"][0].device.type == "meta"
    assert not meta.holds(torch.ones(1, device="meta"))
    for kind in (list, tuple):  # what is left where it is, in a list of its own
        rows = kind([torch.ones(1), torch.zeros(1)])
        shipped = Shipper(CPU).ship(rows)
        assert type(shipped) is kind
        assert shipped is not rows or kind is tuple
        assert [*map(id, shipped)] == [*map(id, rows)]


# ----------------------------------------------------------------------------- in a training


class Stream(IterableDataset):
    def __init__(self, rank):
        self._rank = rank

    def __iter__(self):
        generator = torch.Generator().manual_seed(self._rank)
        for n in (4, 4, 3):
            yield {"x": torch.randn(n, 3, generator=generator), "y": torch.ones(n)}


class Noisy(Dataset):
    def __len__(self):
        return 21

    def __getitem__(self, row):
        return {"x": torch.randn(3) + row, "y": torch.tensor(float(row))}


class Breaks(dtrain.Callback):
    def __init__(self):
        self.at = 4

    def on_batch(self, ctx, step):
        if step.number == self.at:
            self.at = None
            raise ValueError("planted")


COLUMNS = {"x": array("float32", 3), "y": array("float32")}
TRAININGS = {
    "arrays": lambda rank: Data(COLUMNS, 8),
    "collated": lambda rank: Data(Noisy(), 8, seed_samples=True),
    "a stream": lambda rank: Data(Stream(rank)),
}


def trained(kind, device):
    """Returns losses and weights; an error comes in between, and evaluations."""
    world = dtrain.init(seed=0)
    losses, breaks = [], Breaks()

    class Keep(dtrain.Callback):
        def on_batch(self, ctx, step):
            batches.append((step.batch["x"], step.batch["x"].clone()))

        def on_eval_batch(self, ctx, step):
            losses.append(step.loss.mean.item())

    def loss_fn(model, batch):
        loss = F.mse_loss(model(batch["x"])[:, 0], batch["y"])
        losses.append(loss.item())
        return loss

    batches = []
    trainer = dtrain.Trainer(
        nn.Linear(3, 1),
        lambda net: torch.optim.SGD(net.parameters(), 1e-3),
        loss_fn,
        callbacks=[Keep(), breaks],
        sinks=[],
    )
    options = {"epochs": 3, "eval_set": Data(COLUMNS, 5), "eval_every": 2}
    with pytest.raises(ValueError, match="planted"):
        trainer.fit(TRAININGS[kind](world.rank), **options)
    trainer.fit(TRAININGS[kind](world.rank), **options)
    for kept, as_it_was in batches:
        assert torch.equal(kept, as_it_was)
    return losses, trainer.model.weight.tolist()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", TRAININGS)
def test_a_training_is_the_same(monkeypatch, kind, size):
    def caught():
        return run_ranks(trained, size, kind, "cpu")

    plain = caught()
    card = StandIn().install(monkeypatch)
    assert caught() == plain
    assert card.counts["copies"] > 10
