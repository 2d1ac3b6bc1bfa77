"""What to train on, and how it reaches the ranks."""

import ast
import gc
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import chain, islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from dtrain.data import Data, EndOfStream, Feed, Sequential, Shuffled, Weighted, fetch, split_share
from dtrain.data.map_feed import MapFeed, fetch_whole
from dtrain.data.shares import Split
from dtrain.data.source import eval_sets
from dtrain.data.streams import StreamFeed
from dtrain.distributed.comm import Comm
from dtrain.distributed.world import World
from dtrain.errors import ConfigError, DataError

SEED = 3


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, "here", torch.device("cpu"), "none", "solo", 0, Comm())


def numbers(length: int) -> TensorDataset:
    return TensorDataset(torch.arange(length))


def whole(share: int) -> list[int]:
    return [share]


def in_three(share: int) -> list[int]:
    return split_share(share, steps=3)


def take(feed: Feed, epoch: int = 0, first_step: int = 0) -> list[list[tuple[Any, int]]]:
    """Returns the micro-batches and their sizes, by step."""
    steps = []
    for step in feed.epoch(epoch, first_step):
        micros = [micro for _ in range(step.micros) if (micro := step.next()) is not None]
        assert step.next() is None
        steps.append(micros)
    return steps


def rows(feed: Feed, epoch: int = 0, first_step: int = 0) -> list[list[int]]:
    """Returns the samples of a rank, by step, where a sample is its own number."""
    steps = take(feed, epoch, first_step)
    for micros in steps:
        assert [len(batch[0]) for batch, _ in micros] == [size for _, size in micros]
    return [[n for batch, _ in micros for n in batch[0].tolist()] for micros in steps]


# ----------------------------------------------------------------------------- Data


class Samples:
    """A map-style dataset that is no torch Dataset, and not iterable."""

    def __init__(self, length: int = 6) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> tuple[Tensor, str]:
        return torch.tensor([float(row)]), f"sample {row}"


class Batches(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(12.0).split(2))


class SizedBatches(Batches):
    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Data(numbers(6)), ConfigError, ["TensorDataset has samples", "pass batch_size"]),
        (lambda: Data(Samples()), ConfigError, ["Samples has samples", "pass batch_size"]),
        (lambda: Data(7), DataError, ["cannot train on int", "nor an iterable"]),
        (lambda: Data([1], drop_last=True), ConfigError, ["drop_last", "map-style"]),
        (lambda: Data([1], num_workers=1), ConfigError, ["num_workers", "map-style"]),
        (lambda: Data([1], collate_fn=list), ConfigError, ["collate_fn", "map-style"]),
        (lambda: Data([1], order=Sequential(1)), ConfigError, ["order", "map-style"]),
        (lambda: Data(numbers(6), 0), ConfigError, ["batch_size=0", "1 or more"]),
        (lambda: Data(numbers(6), True), ConfigError, ["batch_size=True"]),
        (lambda: Data(numbers(6), 1.5), ConfigError, ["batch_size=1.5", "whole number"]),
        (lambda: Data(numbers(6), 2, num_workers=-1), ConfigError, ["num_workers=-1"]),
        (lambda: Data(numbers(6), 2, timeout_s=0), ConfigError, ["timeout_s=0"]),
        (lambda: Data(numbers(6), 2, persistent_workers=True), ConfigError, ["num_workers=1"]),
        (
            lambda: Data(numbers(6), 2, multiprocessing_context="fork"),
            ConfigError,
            ["multiprocessing_context", "num_workers=1"],
        ),
        (lambda: Data([1], seed_samples=True), ConfigError, ["seed_samples", "map-style"]),
        (lambda: Data(numbers(6), 2, prefetch=-1), ConfigError, ["prefetch=-1"]),
        (
            lambda: Data(numbers(6), 2, num_workers=3, prefetch=0),
            ConfigError,
            ["prefetch=0 with num_workers=3", "workers fetch ahead", "use num_workers=0"],
        ),
        (lambda: Data(Batches(), 2), ConfigError, ["Batches is an iterable", "batch_size out"]),
        (lambda: Data(SizedBatches(), 2), ConfigError, ["SizedBatches is an iterable"]),
        (lambda: Data(iter([1]), 2), ConfigError, ["list_iterator is an iterable"]),
        (lambda: Data(numbers(0), 2), DataError, ["TensorDataset", "is empty"]),
        (lambda: Data(numbers(6), 2, order=Sequential(0)), DataError, ["Sequential", "is empty"]),
        (lambda: Data(numbers(6), 7, drop_last=True), DataError, ["6 samples", "a batch 7"]),
        (lambda: Data(numbers(6), 3, drop_last=True, order=Sequential(2)), DataError, ["2 samp"]),
        (lambda: Data.of(Data([1]), 4, shuffle=True), ConfigError, ["batch_size", "stream|ready"]),
        (lambda: Data.of(Data(numbers(6), 2), 4, shuffle=True), ConfigError, ["4 here and 2 in"]),
        (lambda: Data(DataLoader(Batches(), 2), 2), ConfigError, ["leave it out"]),
    ],
)
def test_what_cannot_work_is_refused(
    make: Callable[[], Data], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        make()
    for word in words:
        assert any(part in str(raised.value) for part in word.split("|")), word


def test_what_works() -> None:
    assert Data([torch.ones(2)]).is_stream
    assert Data(Batches()).is_stream
    assert Data(DataLoader(Batches(), batch_size=None)).is_stream
    assert not Data(numbers(6), 6, drop_last=True).is_stream
    assert not Data(Samples(), 2).is_stream
    assert not Data([1, 2, 3], 2).is_stream  # a list has __len__ and __getitem__
    data = Data(numbers(6), 2)
    assert Data.of(data, None, shuffle=True) is data
    assert Data.of(data, 2, shuffle=True) is data
    assert not Data.of(data, 2, shuffle=False).shuffle
    assert data.shuffle
    stream = Data(Batches())
    assert Data.of(stream, None, shuffle=False) is stream
    assert not Data.of(numbers(6), 4, shuffle=False).shuffle


def first(samples: list[Any]) -> Any:
    return samples[0]


@pytest.mark.parametrize(
    ("loader", "told"),
    [
        (
            DataLoader(numbers(6), 16, shuffle=True),
            "dtrain.Data(tensordataset, batch_size=16 * world.size)",
        ),
        (
            DataLoader(numbers(6), 4, drop_last=True, collate_fn=first, num_workers=2),
            "dtrain.Data(tensordataset, batch_size=4 * world.size, shuffle=False, drop_last=True, "
            "collate_fn=first, num_workers=2)",
        ),
        (
            DataLoader(numbers(6), batch_sampler=[[0, 1]]),
            "dtrain.Data(tensordataset, batch_size=... * world.size, shuffle=False)",
        ),
        (
            DataLoader(Samples(), 2, shuffle=True, collate_fn=lambda samples: samples),
            "dtrain.Data(samples, batch_size=2 * world.size, collate_fn=...)",
        ),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_loader_is_refused_with_what_to_write_instead(
    loader: DataLoader[Any], told: str, batch_size: int | None
) -> None:
    with pytest.raises(ConfigError, match="give every rank all of the data") as raised:
        Data(loader, batch_size)
    assert f"    {told}\n" in str(raised.value)
    ast.parse(told)  # to be pasted, it must be Python


def test_a_loader_with_a_sampler_is_told_that_its_order_needs_a_word() -> None:
    loader = DataLoader(numbers(6), 2, sampler=WeightedRandomSampler([1.0] * 6, 6))
    with pytest.raises(ConfigError, match="order="):
        Data(loader)


# ----------------------------------------------------------------------------- MapFeed


@pytest.mark.parametrize("split", [whole, in_three])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("length", "batch", "drop_last", "sizes"),
    [
        (24, 8, False, [8, 8, 8]),
        (30, 8, False, [8, 8, 8, 6]),  # the last is ragged
        (25, 8, False, [8, 8, 8, 1]),  # and leaves most ranks without a sample
        (30, 8, True, [8, 8, 8]),
        (10, 3, False, [3, 3, 3, 1]),  # smaller than four ranks
        (2, 8, False, [2]),
        (5, 1, False, [1] * 5),
    ],
)
def test_ranks_share_the_batches_of_one(
    length: int, batch: int, drop_last: bool, sizes: list[int], shuffle: bool, split: Split
) -> None:
    data = Data(numbers(length), batch, shuffle=shuffle, drop_last=drop_last)
    for epoch in (0, 1):
        one = rows(MapFeed(data, world(), whole, SEED), epoch)
        assert [len(step) for step in one] == sizes
        order = Shuffled(length, SEED) if shuffle else Sequential(length)
        assert [*chain(*one)] == order.indices(epoch, 0, sum(sizes)).tolist()
        for size in (1, 2, 3, 4):
            feeds = [MapFeed(data, world(rank, size), split, SEED) for rank in range(size)]
            assert {feed.steps_per_epoch for feed in feeds} == {len(sizes)}
            assert {feed.samples for feed in feeds} == {sum(sizes)}
            parts = [rows(feed, epoch) for feed in feeds]
            for step, together in enumerate(one):
                assert [n for part in parts for n in part[step]] == together
                lengths = [len(part[step]) for part in parts]
                assert max(lengths) - min(lengths) <= 1


def test_micro_batches_are_the_splits_of_a_share() -> None:
    data = Data(numbers(15), 10, shuffle=False)
    steps = take(MapFeed(data, world(1, 2), in_three, SEED))
    assert [[batch[0].tolist() for batch, _ in micros] for micros in steps] == [
        [[5, 6], [7, 8], [9]],
        [[13], [14]],
    ]


def test_a_rank_without_samples_takes_part_idle() -> None:
    feed = MapFeed(Data(numbers(2), 2), world(2, 3), whole, SEED)
    (step,) = feed.epoch(0, 0)
    assert step.micros == 1
    assert step.next() is None


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_the_middle(workers: int) -> None:
    data = Data(numbers(30), 8, num_workers=workers)
    feed = MapFeed(data, world(1, 2), in_three, SEED)
    plain = MapFeed(Data(numbers(30), 8), world(1, 2), in_three, SEED)
    for epoch in (0, 1):
        for first_step in (2, 0, 3, 1, 4):
            assert rows(feed, epoch, first_step) == rows(plain, epoch)[first_step:]
        next(iter(feed.epoch(epoch, 0))).next()  # left in the middle, as by a stop


def test_a_user_order_takes_the_place_of_shuffle() -> None:
    class Backwards:
        def __len__(self) -> int:
            return 4

        def indices(self, epoch: int, start: int, stop: int) -> Any:
            return Sequential(10).indices(epoch, start, stop)[::1] * -1 + 9

    feed = MapFeed(Data(numbers(10), 3, order=Backwards()), world(), whole, SEED)
    assert rows(feed) == [[9, 8, 7], [6]]


def test_a_subclass_of_an_order_is_asked_what_it_overrides() -> None:
    class Reversed(Sequential):
        def indices(self, epoch: int, start: int, stop: int) -> Any:
            return torch.arange(stop - 1, start - 1, -1)  # any kind of whole numbers

    feed = MapFeed(Data(numbers(6), 3, order=Reversed(6)), world(), whole, SEED)
    assert rows(feed) == [[2, 1, 0], [5, 4, 3]]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool])
def test_tensors_of_any_dtype_are_fetched_whole(dtype: torch.dtype) -> None:
    column = torch.arange(6).to(dtype)
    assert torch.equal(fetch_whole(column, [3, 5]), torch.stack([column[3], column[5]]))
    (chosen,) = fetch_whole(Subset(TensorDataset(column), [-1, 0]), [0, 1])
    assert torch.equal(chosen, torch.stack([column[-1], column[0]]))


def test_a_user_order_is_asked_only_for_what_comes_next() -> None:
    asked = []

    class Live:
        def __len__(self) -> int:
            return 10

        def indices(self, epoch: int, start: int, stop: int) -> Any:
            asked.append((start, stop))
            return np.arange(start, stop)

    steps = MapFeed(Data(numbers(10), 4, order=Live()), world(1, 2), whole, SEED).epoch(0, 0)
    for expected in ([(2, 4)], [(2, 4), (6, 8)], [(2, 4), (6, 8), (9, 10)]):
        next(steps).next()
        assert asked == expected


@pytest.mark.parametrize("kind", [Shuffled, lambda n, seed: Weighted(np.arange(n), seed)])
def test_positions_are_looked_up_alike_one_by_one_and_together(kind: Any) -> None:
    order = kind(5000, SEED)
    alone = [int(order.indices(3, i, i + 1)[0]) for i in range(0, 5000, 97)]
    assert order.indices(3, 0, 5000)[::97].tolist() == alone
    feed = MapFeed(Data(numbers(5000), 7, order=order), world(1, 3), whole, SEED)
    assert rows(feed, 3, 5)[0] == order.indices(3, 5 * 7 + 3, 5 * 7 + 5).tolist()
    assert rows(feed, 3)[5:] == rows(feed, 3, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_fn_makes_the_batch(workers: int) -> None:
    def join(samples: list[tuple[Tensor, str]]) -> dict[str, Any]:
        return {"x": torch.stack([x[0] for x, _ in samples]), "names": [n for _, n in samples]}

    data = Data(Samples(5), 3, shuffle=False, collate_fn=join, num_workers=workers)
    steps = take(MapFeed(data, world(), whole, SEED))
    assert [(b["x"].tolist(), b["names"], n) for micros in steps for b, n in micros] == [
        ([0, 1, 2], ["sample 0", "sample 1", "sample 2"], 3),
        ([3, 4], ["sample 3", "sample 4"], 2),
    ]


class Noisy(Dataset):
    """Each sample comes with noise, as an augmentation adds it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Tensor:
        return torch.cat([torch.tensor([float(row)]), torch.rand(1)])


def noise(feed: MapFeed, epoch: int, first_step: int = 0) -> list[list[float]]:
    return [
        row for micros in take(feed, epoch, first_step) for b, _ in micros for row in b.tolist()
    ]


def test_noise_of_workers_is_drawn_from_the_seed() -> None:
    data = Data(Noisy(), 4, num_workers=1)
    zero, one = (noise(MapFeed(data, world(), whole, seed), 0) for seed in (0, 1))
    assert noise(MapFeed(data, world(), whole, 0), 0) == zero
    assert len({value for _, value in zero + one}) == 24  # none is drawn twice


@pytest.mark.parametrize(("epoch", "first_step"), [(1, 0), (0, 1)])
def test_noise_of_workers_is_the_same_after_a_restart(epoch: int, first_step: int) -> None:
    """A resumed run has new workers; one that was never stopped has had them for a while."""
    data = Data(Noisy(), 4, num_workers=1)
    feed = MapFeed(data, world(), whole, SEED)
    unbroken = [noise(feed, 0), noise(feed, 1)][epoch][4 * first_step :]
    resumed = noise(MapFeed(data, world(), whole, SEED), epoch, first_step)
    assert resumed == unbroken


def draw() -> list[float]:
    """From all three generators."""
    return [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002 -- that one


class AllKinds(Dataset):
    """Each sample draws from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Tensor:
        return torch.tensor([row, *draw()], dtype=torch.float64)


def drawn(size: int, split: Any, workers: int, epoch: int = 0) -> dict[float, list[float]]:
    """What each sample drew, over all ranks."""
    data = Data(AllKinds(), 5, num_workers=workers, seed_samples=True)
    feeds = [MapFeed(data, world(rank, size), split, SEED) for rank in range(size)]
    rows = [row for feed in feeds for row in noise(feed, epoch)]
    assert len(rows) == 12
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("size", "split", "workers"), [(1, in_three, 0), (3, whole, 0), (1, whole, 2), (2, in_three, 1)]
)
def test_seeded_samples_draw_the_same_wherever_they_are_fetched(size, split, workers) -> None:
    first = drawn(1, whole, 0)
    assert drawn(size, split, workers) == first
    assert len({value for values in first.values() for value in values}) == 36
    other = drawn(size, split, workers, epoch=1)
    assert all(first[row] != other[row] for row in first)


def test_seeding_samples_leaves_the_trainings_own_streams_alone() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    drawn(1, whole, 0)
    assert draw() == expected


class Stuck(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Tensor:
        threading.Event().wait()
        raise AssertionError("it was waited for in vain")


def test_a_worker_that_gives_nothing_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits for it to leave, before it is killed: 5 seconds by default.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 1.0)
    feed = MapFeed(Data(Stuck(), 2, num_workers=1, timeout_s=1), world(), whole, SEED)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        rows(feed)


def test_workers_leave_with_their_feed() -> None:
    """A feed in a reference cycle would keep them until some collection, which waits 5 s each."""
    gc.collect()
    gc.disable()
    before = set(active_children())
    try:
        rows(MapFeed(Data(numbers(12), 4, num_workers=2), world(), whole, SEED))
        assert set(active_children()) <= before  # with each epoch, by default
        data = Data(numbers(12), 4, num_workers=2, persistent_workers=True)
        feed = MapFeed(data, world(), whole, SEED)
        rows(feed)
        assert len(set(active_children()) - before) == 2
        del feed
        assert set(active_children()) <= before
    finally:
        gc.enable()


# ----------------------------------------------------------------------------- fetch


def test_fetching_whole_equals_collating() -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(
        torch.randn(9, 3, 2, generator=generator), torch.arange(9), torch.rand(9) < 0.5
    )
    for chosen in ([0], [3, 1, 8, 1], list(range(9))):
        fast = fetch(dataset, chosen, None)
        slow = default_collate([dataset[row] for row in chosen])
        assert type(fast) is type(slow) is list
        for one, other in zip(fast, slow, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert fetch(dataset, [2, 0], lambda samples: [int(s[1]) for s in samples]) == [2, 0]


def same(one: Any, other: Any) -> bool:
    """Types, dtypes and bits alike."""
    if isinstance(one, Tensor):
        return (
            type(other) is Tensor
            and one.dtype == other.dtype
            and one.stride() == other.stride()
            and torch.equal(one, other)
        )
    if isinstance(one, dict):
        alike = isinstance(other, dict) and list(one) == list(other)
        return alike and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class HuggingFace:
    """As their datasets answer: one row, or a dict of columns that is cut into samples again."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> dict[str, Any]:
        if isinstance(rows, int):
            return {name: column[rows] for name, column in self.columns.items()}
        return {name: [column[row] for row in rows] for name, column in self.columns.items()}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        batch = self[rows]
        count = len(next(iter(batch.values())))
        return [{name: column[i] for name, column in batch.items()} for i in range(count)]


def array(dtype: str, *shape: int) -> np.ndarray:
    return (np.random.default_rng(0).random((9, *shape)) * 9).astype(dtype)


KINDS = "bool uint8 int8 int16 int32 int64 uint16 uint32 float16 float32 float64 complex64"
ARRAYS: dict[str, Any] = {
    **{f"{kind} row": array(kind, 3, 2) for kind in KINDS.split()},
    **{f"{kind} number": array(kind) for kind in KINDS.split()},
    "strided": array("float32", 6)[:, ::2],
    "tensor": torch.arange(18.0).reshape(9, 2).t().contiguous().t(),
    "bfloat16": torch.arange(9).bfloat16(),
    "tuple": (array("float32", 3), torch.arange(9), array("int16")),
    "dict": {"x": array("float32", 3), "y": torch.arange(9)},
    "of a subset": torch.utils.data.Subset(TensorDataset(torch.arange(20)), list(range(2, 20, 2))),
}
ONE_BY_ONE: dict[str, Any] = {
    "text": {"x": array("float32", 3), "name": np.array(list("abcdefghi"))},
    "hugging face": HuggingFace({"x": [[n, 0.5] for n in range(9)], "y": list(range(9))}),
    "subset": torch.utils.data.Subset(
        HuggingFace({"x": [[n, 0.5] for n in range(9)], "name": list("abcdefghi")}), range(9)
    ),
    "list": [torch.full((2,), float(n)) for n in range(9)],
}


@pytest.mark.parametrize("name", [*ARRAYS, *ONE_BY_ONE])
def test_each_way_to_fetch_gives_the_batch_of_collating(name: str) -> None:
    dataset = Data((ARRAYS | ONE_BY_ONE)[name], 2).dataset
    assert len(dataset) == 9
    for chosen in ([0], [3, 1, 8, 1], list(range(9))):
        slow = default_collate([dataset[row] for row in chosen])
        assert same(fetch(dataset, chosen, None), slow)
        assert (fetch_whole(dataset, chosen) is None) == (name in ONE_BY_ONE)
    assert fetch(dataset, [2, 0], len) == 2  # a collate_fn is given samples


def test_a_memory_map_is_fetched_whole(tmp_path: Path) -> None:
    array("float32", 3).tofile(tmp_path / "file")
    dataset = np.memmap(tmp_path / "file", "float32", "r+", shape=(9, 3))
    slow = default_collate([dataset[row] for row in (4, 0)])
    assert same(fetch_whole(Data(dataset, 2).dataset, [4, 0]), slow)


def test_columns_of_other_lengths_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="equally long: 'x' 9, 'y' 8"):
        Data({"x": array("int8"), "y": torch.arange(8)}, 2)


def test_a_subclass_of_tensor_dataset_is_asked_itself() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, row: int) -> Any:
            return tuple(2 * tensor for tensor in super().__getitem__(row))

    (batch,) = fetch(Doubled(torch.arange(5)), [4, 2], None)
    assert batch.tolist() == [8, 4]


def test_getitems_is_asked_for_all_rows_at_once() -> None:
    asked: list[list[int]] = []

    class Bulk(Samples):
        def __getitem__(self, row: int) -> Any:
            raise AssertionError("one by one")

        def __getitems__(self, rows: list[int]) -> list[int]:
            asked.append(rows)
            return [10 * row for row in rows]

    feed = MapFeed(Data(Bulk(5), 3, shuffle=False), world(), whole, SEED)
    assert [batch.tolist() for micros in take(feed) for batch, _ in micros] == [
        [0, 10, 20],
        [30, 40],
    ]
    assert asked == [[0, 1, 2], [3, 4]]


# ----------------------------------------------------------------------------- StreamFeed


def stream(feed: StreamFeed, steps: int, first_step: int = 0) -> list[list[tuple[Any, int]]]:
    return [
        [step.next() for _ in range(step.micros)]
        for step in islice(feed.epoch(0, first_step), steps)
    ]


def test_consecutive_batches_of_a_stream_make_a_step() -> None:
    feed = StreamFeed(Data(Batches()), world(), 2)
    assert feed.steps_per_epoch is None
    steps = stream(feed, 3)
    assert [[(b.tolist(), n) for b, n in step] for step in steps] == [
        [([0, 1], 2), ([2, 3], 2)],
        [([4, 5], 2), ([6, 7], 2)],
        [([8, 9], 2), ([10, 11], 2)],
    ]
    # Each epoch asks the iterable anew, and a resume goes on in the middle.
    assert [b.tolist() for b, _ in stream(feed, 1, first_step=2)[0]] == [[8, 9], [10, 11]]


def test_the_end_of_a_stream_is_told_each_time() -> None:
    steps = StreamFeed(Data([torch.ones(3)]), world(), 2).epoch(0, 0)
    step = next(steps)
    assert step.micros == 2
    assert step.next()[1] == 3
    for again in (step, next(steps), next(steps)):
        with pytest.raises(EndOfStream):
            again.next()
    with pytest.raises(EndOfStream):  # resumed beyond its end
        next(StreamFeed(Data([torch.ones(3)]), world(), 2).epoch(0, 9)).next()


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(5, 2),
        [torch.ones(5), torch.ones(5, 1), torch.tensor(3.0)],
        {"x": (torch.ones(5),), "name": ["a"]},
        {"name": ["a", "b", "c", "d", "e"], "x": torch.ones(5)},  # the tensor comes last
    ],
)
def test_the_samples_of_a_ready_batch_are_counted(batch: Any) -> None:
    assert stream(StreamFeed(Data([batch]), world(), 1), 1)[0][0][1] == 5


@pytest.mark.parametrize("batch", ["text", 3, None, ["a"], [], {}, torch.tensor(1.0)])
def test_a_ready_batch_without_a_countable_tensor_is_refused(batch: Any) -> None:
    step = next(StreamFeed(Data([batch]), world(), 1).epoch(0, 0))
    with pytest.raises(DataError, match=type(batch).__name__):
        step.next()


# ----------------------------------------------------------------------------- columns, or sets


@pytest.mark.parametrize(
    "given",
    [
        (torch.ones(6, 2), torch.ones(6)),
        (np.ones(6), [0, 1] * 3),
        ([[1.0, 2.0]] * 6, [0, 1] * 3),
        {"x": torch.ones(6, 2), "y": torch.ones(6)},
        {"x": [1] * 6},
        torch.ones(6, 2),
        np.ones((6, 2)),
    ],
)
def test_arrays_without_a_batch_size_are_no_stream(given: Any) -> None:
    with pytest.raises(ConfigError, match="each sample has one row: pass batch_size"):
        Data(given)
    assert len(Data(given, 2).dataset) == 6


def test_columns_that_are_lists_are_rows_too() -> None:
    data = Data(([[0.5, 1.5]] * 6, [0, 1] * 3), 4, shuffle=False).dataset
    x, y = fetch(data, [1, 4], None)
    assert (x.dtype, x.tolist(), y.tolist()) == (torch.float32, [[0.5, 1.5]] * 2, [1, 0])
    data = Data({"text": list("abcdef"), "n": list(range(6)), "ids": [[1], [2, 3]] * 3}, 4).dataset
    assert fetch(data, [1, 4], list) == [
        {"text": "b", "n": 1, "ids": [2, 3]},
        {"text": "e", "n": 4, "ids": [1]},
    ]
    pictures = Data({"x": [torch.full((2,), float(n)) for n in range(6)]}, 4).dataset
    assert fetch(pictures, [1, 4], None)["x"].tolist() == [[1.0, 1.0], [4.0, 4.0]]
    with pytest.raises(DataError, match="equally long: 0 6, 1 5"):
        Data(([0] * 6, [0] * 5), 2)
    with pytest.raises(DataError, match="'x' is ndarray, 'y' is tuple"):
        Data({"x": np.ones(2), "y": (1, 2)}, 2)
    assert len(Data(((1, 2), (3, 4), (5, 6)), 2).dataset) == 3  # a tuple of samples


def test_which_dict_is_it() -> None:
    x, y = torch.ones(6, 2), torch.zeros(6)
    columns, lists = Data({"x": x, "y": y}, 2), Data({"x": [1] * 6}, 2)
    (one,) = eval_sets({"y": y, "x": x}, 4, columns).items()
    assert (one[0], one[1].batch_size, one[1].shuffle, len(one[1].dataset)) == ("", 4, False, 6)
    assert [*eval_sets({"x": [1] * 3}, 4, lists)] == [""]
    assert [*eval_sets({"a": x, "b": x}, 4, Data(x, 2))] == ["a", "b"]  # trained on an array, too
    assert [*eval_sets({"a": columns, "b": numbers(3)}, 4, columns)] == ["a", "b"]
    assert [*eval_sets({"a": [ones := torch.ones(2)], "b": [ones]}, None, None)] == ["a", "b"]
    assert eval_sets(None, 4, columns) == {}
    with pytest.raises(ConfigError, match=r"2 sets to evaluate on have no names: pass a dict"):
        eval_sets([numbers(3), numbers(4)], 4, columns)
    for train in (columns, Data(numbers(3), 2), None):
        with pytest.raises(ConfigError, match=r"one set, of the columns x, z, or several.*Data\("):
            eval_sets({"x": x, "z": y}, 4, train)


# ----------------------------------------------------------------------------- samples that fail


class Broken(Dataset):
    """The sample 5 fails in one of several ways."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> Tensor:
        if row == 5:
            raise self.how
        return torch.tensor(float(row))


def told(fn: Callable[[], Any]) -> tuple[type, str]:
    """Returns what it raised, and lets go of its frames, which would keep workers alive."""
    try:
        fn()
    except Exception as error:  # noqa: BLE001 -- looked at by the test
        traceback.clear_frames(error.__traceback__)
        return type(error), "\n".join([str(error), *getattr(error, "__notes__", ())])
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("how", [ValueError("torn"), StopIteration(), KeyError("name")])
def test_an_error_of_a_sample_names_it(how: Exception) -> None:
    kind = DataError if isinstance(how, StopIteration) else type(how)
    for workers in (0, 1):
        data = Data(Broken(how), 4, shuffle=False, num_workers=workers)
        found, words = told(lambda data=data: rows(MapFeed(data, world(), whole, 0)))
        assert (found, "(in Broken, sample 5)" in words) == (kind, True), words
    found, words = told(lambda: fetch(Subset(Broken(how), [7, 5]), [0, 1], None))
    assert (found, "(in Broken, sample 5)" in words) == (kind, True), words


def test_an_error_of_a_batch_names_its_samples() -> None:
    def torn(samples: Any) -> Any:
        raise ValueError("torn")

    with pytest.raises(ValueError, match=r"torn \(in torn, samples 3, 4\)"):
        fetch(numbers(6), [3, 4], torn)
    with pytest.raises(RuntimeError, match=r"\(in default_collate, samples 1, 2\)"):
        fetch([torch.ones(1), torch.ones(2), torch.ones(3)], [1, 2], None)

    class Few(Samples):
        def __getitems__(self, rows: list[int]) -> list[int]:
            return rows[1:]

    with pytest.raises(DataError, match=r"Few.__getitems__ gave 2 samples for 3 rows \(samples 0"):
        fetch(Few(), [0, 1, 2], None)


# ----------------------------------------------------------------------------- samples left out


class Holes(Samples):
    """Every third sample cannot be read."""

    def __getitem__(self, row: int) -> Any:
        return None if row % 3 == 0 else super().__getitem__(row)


def without_holes(samples: list[Any]) -> Any:
    left = [sample for sample in samples if sample is not None]
    return default_collate(left) if left else None


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"seed_samples": True}])
def test_samples_that_are_none_are_not_counted(options: Any) -> None:
    data = Data(Holes(7), 3, shuffle=False, collate_fn=without_holes, **options)
    steps = take(MapFeed(data, world(), whole, 0))
    assert [[count for _, count in micros] for micros in steps] == [[2], [2], [0]]
    assert steps[2][0] == (None, 0)


def test_samples_that_a_collate_fn_leaves_out_are_asked_for() -> None:
    def short(samples: Any) -> Tensor:
        return torch.stack([x for (x,) in samples if x < 4])

    feed = MapFeed(Data(numbers(6), 3, shuffle=False, collate_fn=short), world(), whole, 0)
    with pytest.raises(
        DataError, match=r"given 3 samples and made Tensor of them \(itself \[1\]\)"
    ):
        rows(feed)
    data = Data(numbers(6), 3, shuffle=False, collate_fn=short, count=len)
    assert [n for micros in take(MapFeed(data, world(), whole, 0)) for _, n in micros] == [3, 1]


# ----------------------------------------------------------------------------- workers


class InWorkers(Dataset):
    """Tells who fetched it: the worker's number and seed, and the epoch it was told."""

    epoch, opened = -1, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> list[int]:
        info = get_worker_info()
        assert info is not None
        assert info.dataset is self
        return [self.opened, info.seed, self.epoch]


def open_file(worker: int) -> None:
    get_worker_info().dataset.opened = 10 + worker  # type: ignore[union-attr]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hold_the_users_dataset(persistent: bool) -> None:
    options = {"persistent_workers": persistent, "worker_init_fn": open_file}
    data = Data(InWorkers(), 2, num_workers=1, **options)
    ranks = [MapFeed(data, world(rank, 2), whole, 0) for rank in (0, 1)]
    seeds = []
    for epoch in (0, 1):
        for one in ranks:
            one.begin(epoch)
            batches = [batch for micros in take(one, epoch) for batch, _ in micros]
            assert [(batch[0].item(), batch[2].item()) for batch in batches] == [(10, epoch)] * 2
            seeds.append(batches[0][1].item())
    # Of each rank its own, and in each epoch, as long as workers do not stay.
    assert len({*seeds}) == (2 if persistent else 4)


@pytest.mark.slow
def test_workers_are_started_as_asked() -> None:
    data = Data(InWorkers(), 4, num_workers=1, multiprocessing_context="spawn")
    ((((_, _, epoch), _),),) = take(MapFeed(data, world(), whole, 0))
    assert epoch.tolist() == [-1] * 4  # told of none in an evaluation


def test_data_that_a_callback_exchanged_are_taken() -> None:
    data = Data(numbers(4), 4, shuffle=False)
    feed = MapFeed(data, world(), whole, 0)
    data.dataset, data.collate_fn = numbers(5), lambda samples: torch.stack([s[0] for s in samples])
    feed.begin(1)
    assert [batch.tolist() for micros in take(feed, 1) for batch, _ in micros] == [
        [0, 1, 2, 3],
        [4],
    ]


def test_workers_that_do_not_stay_see_a_changed_dataset() -> None:
    for persistent, expected in ((False, 7.0), (True, 0.0)):
        dataset = numbers(4)
        data = Data(dataset, 4, num_workers=1, persistent_workers=persistent)
        feed = MapFeed(data, world(), whole, 0)
        rows(feed)
        dataset.tensors = (torch.full((4,), 7),)
        assert min(rows(feed, 1)[0]) == expected
