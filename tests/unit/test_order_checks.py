"""An order that gives other rows than asked for, or is of other data, is told so in numbers."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from test_data import numbers, rows, whole, world
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dtrain.data import Bucketed, Data, Order, Sequential, Shuffled, Weighted
from dtrain.data.map_feed import MapFeed
from dtrain.errors import ConfigError, DataError


class Given:
    """Gives what a function makes of the positions."""

    def __init__(self, made: Any, length: int = 12) -> None:
        self.made, self.length = made, length

    def __len__(self) -> int:
        return self.length

    def indices(self, epoch: int, start: int, stop: int) -> Any:
        return self.made(np.arange(start, stop))


class Above(Sequential):
    def at(self, epoch: int, positions: Any) -> Any:
        return positions + 1


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (Given(lambda r: r[:-1]), r"\(Given\) was asked for 4 rows and gave 3"),
        (Given(lambda r: np.append(r, r[0])), "asked for 4 rows and gave 5"),
        (Given(lambda r: r[:, None]), r"asked for 4 rows and gave shape \[4, 1\]"),
        (Given(lambda r: r + 0.5), "no whole numbers: float64, such as 0.5"),
        (Given(lambda r: r > 1), "no whole numbers: bool"),
        (Given(lambda r: r + 9), "gave row 12; the dataset has 12 samples, 0 to 11"),
        (Given(lambda r: r - 1), "gave row -1; the dataset has 12"),
        (Given(lambda r: torch.from_numpy(r + 100)), "gave row 103"),
        (Above(12), r"\(Above\) gave row 12; the dataset has 12"),
    ],
)
def test_rows_are_counted_and_whole(order: Order, words: str) -> None:
    with pytest.raises(DataError, match=words):
        rows(MapFeed(Data(numbers(12), 4, order=order), world(), whole, 0))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (Weighted([1.0] * 10, 0), r"Weighted\(...\) is of 10 samples; .* \(TensorDataset\) has 32"),
        (Weighted([1.0] * 60, 0, length=32), "is of 60 samples; .* has 32"),
        (Bucketed([1.0] * 31, 8, 0), "is of 31 samples; .* has 32"),
        (Bucketed([1.0] * 32, 4, 0), r"Bucketed\(batch_size=4\) .* it is 8 here"),
        (Sequential(33), "is of 33 samples; .* has 32"),
        (Shuffled(33, 0), "is of 33 samples; .* has 32"),
        ([[0, 1], [2, 3]], r"a list of whole numbers.*shape \[2, 2\] of int64. Batches are made"),
        ([[0, 1], [2]], "a list of whole numbers"),
        ([0.0, 1.0], r"shape \[2\] of float64"),
        ({"a": 1}, "order=dict: pass a list of rows, or an object with"),
        ("shuffled", "order=str: pass a list of rows"),
        (
            WeightedRandomSampler([1.0] * 32, 64),
            r"Sampler: pass order=dtrain.data.Weighted\(sampler.weights, seed=0, length=64\)",
        ),
        (WeightedRandomSampler([1.0] * 32, 8, replacement=False), r"or list\(sampler\) for"),
        (SubsetRandomSampler(range(8)), r"Subset\(dataset, sampler.indices\)"),
        (RandomSampler(range(32)), "RandomSampler: leave it out: .* anew in each epoch"),
        (SequentialSampler(range(32)), "pass shuffle=False instead"),
        (DistributedSampler(range(32), 2, 0), "leave it out: each rank gets its share"),
        (BatchSampler(range(32), 8, False), "leave it out: batches are made by batch_size"),
    ],
)
def test_what_is_no_order_of_this_data_is_refused(order: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Data(numbers(32), 8, order=order)


def test_rows_that_the_dataset_does_not_have_are_refused_at_once() -> None:
    for order in ([0, 32], [-1, 3], range(31, 34)):
        with pytest.raises(DataError, match="the dataset has 32 samples, 0 to 31"):
            Data(numbers(32), 8, order=order)


class Own(Sampler[int]):
    def __iter__(self) -> Any:
        return iter([2, 0, 5])

    def __len__(self) -> int:
        return 3


def test_a_list_of_rows_is_an_order_the_same_in_every_epoch() -> None:
    with pytest.raises(ConfigError, match=r"list\(sampler\) for the same rows in every epoch"):
        Data(numbers(32), 2, order=Own())
    for order in (list(Own()), (2, 0, 5), np.array([2, 0, 5], np.int32), torch.tensor([2, 0, 5])):
        feed = MapFeed(Data(numbers(32), 2, order=order), world(), whole, 0)
        assert rows(feed, 0) == rows(feed, 3) == [[2, 0], [5]]
    parts = [MapFeed(Data(numbers(32), 2, order=[2, 0, 5]), world(r, 2), whole, 0) for r in (0, 1)]
    assert [rows(part) for part in parts] == [[[2], [5]], [[0], []]]


def test_an_order_and_a_dataset_of_other_lengths_are_looked_at_in_each_epoch() -> None:
    order, data = Given(lambda r: r), numbers(12)
    feed = MapFeed(Data(data, 4, order=order), world(), whole, 0)
    assert rows(feed) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    order.length = 6
    feed.begin(1)
    assert feed.steps_per_epoch == 2
    assert rows(feed, 1) == [[0, 1, 2, 3], [4, 5]]
    listed = [3, 1]
    feed = MapFeed(Data(data, 4, order=listed), world(), whole, 0)
    listed[:] = [5, 6]
    assert rows(feed, 1) == [[5, 6]]
    feed = MapFeed(Data(data, 8), world(), whole, 0)
    data.tensors = (torch.arange(20),)
    feed.begin(1)
    assert sorted(chain(*rows(feed, 1))) == list(range(20))
    data.tensors = (torch.arange(0),)
    with pytest.raises(DataError, match="is empty"):
        feed.begin(2)
    weighted = MapFeed(Data(numbers(3), 2, order=Weighted([1, 1, 1], 0)), world(), whole, 0)
    weighted._data.dataset.tensors = (torch.arange(4),)
    with pytest.raises(ConfigError, match=r"is of 3 samples; .* has 4"):
        weighted.begin(1)
