"""Weighted means: summed locally, agreed by all ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import dtrain
from dtrain.context.step import Mean
from dtrain.distributed.comm import Comm
from dtrain.errors import LossError
from dtrain.metrics.means import Means, as_metrics
from dtrain.testing import run_processes

NAN = float("nan")


def means() -> Means:
    return Means("train", torch.device("cpu"))


def test_means_are_weighted() -> None:
    one = means()
    for value, weight in ((1.0, 1), (4.0, 2), (torch.tensor(0.5), torch.tensor(4))):
        one.add("loss", value, weight)
    one.add("loss", Mean(10.0, 3), 100)  # has a weight of its own
    assert one.agree(Comm()) == {"loss": (1 + 8 + 2 + 10) / (1 + 2 + 4 + 3)}


def test_all_kinds_of_numbers_count() -> None:
    one = means()
    kinds = [1, 2.0, True, np.float32(4), np.int64(8), torch.tensor(16), torch.tensor([[32.0]])]
    kinds += [torch.tensor(64.0, dtype=torch.bfloat16), torch.tensor(1.0, requires_grad=True)]
    for number in kinds:
        one.add("x", number, 1)
    assert one.agree(Comm()) == {"x": 129 / 9}


def test_sums_are_exact_in_float64() -> None:
    one = means()
    one.add("tokens", Mean(2**53 - 1, 1), 1)
    for _ in range(10):
        one.add("tenth", 0.1, 3)
    assert one.agree(Comm()) == {"tokens": 2**53 - 1, "tenth": pytest.approx(0.1, rel=1e-15)}


@pytest.mark.parametrize("value", [NAN, float("inf"), torch.tensor(NAN), Mean(NAN, 0), Mean(5, 0)])
def test_weight_zero_counts_for_nothing(value: Any) -> None:
    one = means()
    one.add("x", value, 0)
    assert one.agree(Comm()) == {}
    one.add("x", 3.0, 2)
    one.add("x", value, torch.tensor(0.0))
    assert one.agree(Comm()) == {"x": 3}


def test_a_nan_with_a_weight_is_told() -> None:
    one = means()
    one.add("bad", NAN, 1)
    one.add("good", 2.0, 1)
    agreed = one.agree(Comm())
    assert math.isnan(agreed["bad"])
    assert agreed["good"] == 2


def test_each_agreement_begins_anew_in_the_order_of_first_use() -> None:
    one = means()
    assert one.agree(Comm()) == {}
    one.add("b", 1, 1)
    one.add("a", 2, 1)
    assert list(one.agree(Comm()).items()) == [("b", 1), ("a", 2)]
    one.add("c", 4, 1)
    one.add("a", 3, 1)
    assert list(one.agree(Comm()).items()) == [("a", 3), ("c", 4)]
    one.add("c", 5, 1)
    one.add("b", 6, 1)
    assert list(one.agree(Comm()).items()) == [("b", 6), ("c", 5)]
    assert one.agree(Comm()) == {}


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", 0.4), ("sum", 1.2), ("max", 0.7), ("last", 0.4)]
)
def test_logged_values_become_one(reduce: Any, expected: float) -> None:
    one = means()
    for _ in range(2):
        one.add_logged("x", [0.1, 0.7, 0.4], reduce)
        assert one.agree(Comm()) == {"x": pytest.approx(expected, rel=1e-15)}
        assert one.agree(Comm()) == {}


def test_tensors_of_one_element_are_logged_like_numbers() -> None:
    one = means()
    one.add_logged("x", [torch.tensor(2), torch.tensor([5.5]), 3], "max")
    assert one.agree(Comm()) == {"x": 5.5}


@pytest.mark.parametrize(
    ("value", "weight", "words"),
    [
        (torch.ones(3), 1, "metric 'acc' is a tensor of shape [3]; a metric is one number"),
        (torch.ones(0), 1, "metric 'acc' is a tensor of shape [0]"),
        (1.0, torch.ones(2), "metric 'acc' is a tensor of shape [2]"),
        (Mean(torch.ones(2), 1), 1, "metric 'acc' is a tensor of shape [2]"),
        (Mean("a lot", 1), 1, "metric 'acc' is 'a lot'"),
        (Mean(1, None), 1, "metric 'acc' is None"),
        ("high", 1, "metric 'acc' is 'high'"),
        (None, 1, "metric 'acc' is None"),
        ([1.0], 1, "metric 'acc' is [1.0]"),
        (1j, 1, "metric 'acc' is 1j"),
    ],
)
def test_what_is_no_number_is_refused(value: Any, weight: Any, words: str) -> None:
    with pytest.raises(LossError) as raised:
        means().add("acc", value, weight)
    assert words in str(raised.value)


def test_metrics_are_a_mapping() -> None:
    assert as_metrics({"a": 1}) == {"a": 1}
    with pytest.raises(LossError, match="must be a dict from name to number, not list"):
        as_metrics([1.0])  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- ranks


def agree_on_ranks() -> list[list[tuple[str, float]]]:
    told = []
    with dtrain.init() as world:
        rank, one = world.rank, means()

        def agree() -> None:
            told.append(list(one.agree(world.comm).items()))

        agree()  # nobody has anything
        one.add("loss", float(rank), rank + 1)
        agree()
        if rank == 1:
            one.add("only rank 1", 5.0, 2)
        agree()
        if rank == 2:  # the others have no data left
            one.add("loss", 7.0, 1)
            one.add("only rank 2", 1.0, 1)
        else:
            one.add(f"new on {rank}", rank, 1)
        agree()
        one.add("loss", NAN if rank == 0 else 2.0, rank)  # rank 0's has no weight
        agree()
        one.add_logged("max", [rank, -rank], "max")
        one.add_logged("sum", [rank, 1], "sum")
        one.add_logged("last", [100, rank], "last")
        agree()
        if rank == 1:
            one.add_logged("max", [-3.0], "max")
        agree()
    return told


def test_ranks_agree_on_the_mean_over_all_of_them() -> None:
    ranks = run_processes(agree_on_ranks, 3, timeout_s=30)
    assert ranks[0] == ranks[1] == ranks[2]
    nothing, loss, one, mixed, weighted, logged, last = ranks[0]
    assert nothing == []
    assert loss == [("loss", (0 * 1 + 1 * 2 + 2 * 3) / 6)]
    assert one == [("only rank 1", 5)]
    assert mixed == [("loss", 7), ("new on 0", 0), ("new on 1", 1), ("only rank 2", 1)]
    assert weighted == [("loss", 2)]
    assert sorted(logged) == [("last", 1), ("max", 2), ("sum", 6)]
    assert last == [("max", -3)]
