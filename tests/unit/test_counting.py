"""How many samples a batch has: what shows is counted, and all else asked for."""

import re
from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, ones
from torch.nn.utils.rnn import pack_sequence

from dtrain.data import Data, tensors_of
from dtrain.data.counting import count_made, count_ready
from dtrain.data.shipping import Shipper
from dtrain.errors import ConfigError, DataError

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True, slots=True)
class Inner:
    mask: Tensor
    length: int = 7


@dataclass
class Batch:
    x: Tensor
    inner: Inner
    names: list[str] = field(default_factory=list)
    late: Tensor = field(init=False)  # may never be set


class Graphs:
    """As those of PyTorch Geometric: no mapping, nor a list of anything."""

    num_graphs = 4


def batch_of(n: int) -> Batch:
    return Batch(ones(n, 3), Inner(ones(n)), ["a"])


READY: dict[str, tuple[Any, int]] = {
    "a tensor": (ones(5, 2), 5),
    "a pair": ([ones(5, 2), ones(5)], 5),
    "named": (Pair(ones(5), ones(5)), 5),
    "nested": (((ones(5), ones(5, 1)), {"y": ones(5)}), 5),
    "a mapping that is no dict": (UserDict({"x": ones(5), "n": 3}), 5),
    "a dataclass": (batch_of(5), 5),
    "numbers beside": ({"x": ones(5), "scale": torch.tensor(2.0), "name": ["a"]}, 5),
}


@pytest.mark.parametrize("name", READY)
def test_what_all_tensors_say_is_the_count(name: str) -> None:
    batch, samples = READY[name]
    assert count_ready(batch, None) == samples
    assert count_made(batch, samples, None) == samples


def test_a_graph_batch_of_a_stream_is_asked_about_with_its_shapes() -> None:
    batch = {"edge_index": ones(2, 10), "x": ones(6, 4), "y": ones(2)}
    words = "edge_index [2, 10], x [6, 4], y [2]), so its number of samples is unknown: pass Data("
    with pytest.raises(DataError, match=re.escape(words)):
        count_ready(batch, None)
    assert count_ready(batch, lambda batch: len(batch["y"])) == 2
    assert count_ready(batch, lambda batch: torch.tensor(3)) == 3  # any kind of whole number


@pytest.mark.parametrize("told", [-1, 2.0, True, None, "5"])
def test_what_is_no_count_is_refused(told: Any) -> None:
    with pytest.raises(DataError, match=r"count\(batch\) returned"):
        count_ready(ones(5), lambda batch: told)


def test_count_must_be_a_function() -> None:
    with pytest.raises(ConfigError, match="count=5"):
        Data([ones(5)], count=5)  # type: ignore[arg-type]


def images(n: int) -> tuple[Tensor, ...]:
    return tuple(ones(3, 8, 8 + i) for i in range(n))


def boxes(n: int) -> tuple[dict[str, Tensor], ...]:
    return tuple({"boxes": ones(i + 1, 4), "labels": ones(i + 1)} for i in range(n))


#: What a collate_fn makes of 4 samples.
SHOWS: dict[str, Any] = {
    "lists of images and targets, as torchvision's": (images(4), boxes(4)),
    "images of one size, with captions": ([ones(3, 8, 8)] * 4, ["a", "b", "c", "d"]),
    "text": ["a", "b", "c", "d"],
    "columns of text": {"text": ["a"] * 4, "label": [1, 2, 3, 4]},
    "sizes beside": {"x": ones(4, 2), "size": (224, 224), "classes": ["cat", "dog"]},
    "arrays": {"x": np.ones((4, 2)), "y": [0] * 4},
}


@pytest.mark.parametrize("name", SHOWS)
def test_what_a_collate_fn_made_is_counted_where_it_shows(name: str) -> None:
    assert count_made(SHOWS[name], 4, None) == 4
    with pytest.raises(DataError, match="was given 5 samples"):
        count_made(SHOWS[name], 5, None)


#: What hides whether samples were left out, by how many were given.
HIDES: dict[str, tuple[Any, int]] = {
    "one of a pair was left out": ((ones(1, 4), ones(1)), 2),
    "one of three, of three tensors": ([ones(2, 4), ones(2), ones(2)], 3),
    "two inputs, one sample of two": (((ones(1), ones(1)), ["a"]), 2),
    "graphs": ({"edge_index": ones(2, 9), "x": ones(7, 3), "y": ones(1)}, 2),
    "steps first": ((ones(9, 4), ones(9, 4)), 4),
    "steps first, and labels": ((ones(9, 4, 2), ones(4)), 4),
    "two views of each": (ones(8, 2), 4),
    "packed into one row": ({"ids": ones(1, 30), "labels": ones(1, 30)}, 4),
    "packed sequences": (pack_sequence([ones(4), ones(3), ones(2), ones(2)]), 4),
    "an object": (Graphs(), 4),
    "samples as they are": ([(ones(3, 2), 1)] * 4, 4),
}


@pytest.mark.parametrize("name", HIDES)
def test_what_does_not_show_is_asked_for(name: str) -> None:
    batch, given = HIDES[name]
    with pytest.raises(
        DataError, match=rf"given {given} samples.*Pass Data\(\.\.\., count="
    ) as told:
        count_made(batch, given, None)
    assert type(batch).__name__ in str(told.value)
    assert count_made(batch, given, lambda batch: 3) == 3


def test_no_batch_is_right_only_where_no_sample_is_left() -> None:
    assert count_made(None, 0, None) == 0
    assert count_made(None, 4, lambda batch: 0 if batch is None else len(batch)) == 0
    assert count_ready(None, lambda batch: 0 if batch is None else len(batch)) == 0
    for count in (None, len, lambda batch: batch.size(0), lambda batch: 4):
        with pytest.raises(DataError, match="None for 4 samples: does it lack a `return`"):
            count_made(None, 4, count)
        with pytest.raises(DataError, match="yielded NoneType without"):
            count_ready(None, count)


def test_a_dataclass_is_looked_into_and_moved() -> None:
    batch = batch_of(2)
    assert [tensor.tolist() for tensor in tensors_of(batch)] == [[[1.0] * 3] * 2, [1.0] * 2]
    moved = Shipper(torch.device("meta")).ship(batch)
    assert type(moved) is Batch
    assert type(moved.inner) is Inner
    assert moved.x.device.type == moved.inner.mask.device.type == "meta"
    assert (moved.names, moved.inner.length, batch.x.device.type) == (["a"], 7, "cpu")
