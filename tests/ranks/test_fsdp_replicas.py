"""Replicas of a sharded model (HSDP): sharded within a group of ranks, summed over the groups."""

import os
import signal
from unittest.mock import patch

import pytest
import sharding
import torch
from sharding import distance, loss_fn, make, strategy_of, whole
from test_fsdp import (
    CASES,
    EXACT,
    SLOW,
    WHOLE,
    Count,
    Keeps,
    Plant,
    Stream,
    Weigh,
    callback_of,
    loss_with,
    moments,
)

import dtrain
from dtrain.errors import ConfigError, RankMismatch
from dtrain.strategies import FSDP
from dtrain.testing import RanksFailed, run_outcomes, run_processes

# ------------------------------------------------------------------- the numbers of one process


class Halves(Stream):
    """All ranks of the last replica are without a batch, in the very first step and in others."""

    def __iter__(self):
        self.epoch += 1
        data = sharding.dataset(60)
        idle = self.rank >= 2 and self.epoch == 1
        for number in range(0 if idle else 2 + self.rank % 3):
            yield data[10 * self.rank + 3 * number : 10 * self.rank + 3 * number + 2]


def train(strategy, case):
    given, fit = CASES.get(case) or ({"model": "odd", "micros": 2}, {})
    given = dict(given)
    given["callbacks"] = [callback_of(*one) for one in given.get("callbacks", ())]
    rank = dtrain.init(seed=0).rank
    streams = given.pop("stream", False) or case not in CASES
    stream = Stream(rank) if case in CASES else Halves(rank)
    data = dtrain.Data(stream) if streams else sharding.dataset()
    evaluates = {} if streams else {"eval_set": sharding.dataset(9)}
    trainer = sharding.trainer(strategy, **given)
    result = trainer.fit(data, **fit, epochs=2, **evaluates)
    return whole(trainer.model), result.metrics


def train_all(replicas, cases):
    dtrain.init(seed=0)
    # Strategies are of one Trainer.
    return {
        case: train(FSDP(replicas=replicas) if replicas else "flat", case) for case in cases
    }


QUICK = ["odd, a batch smaller than the world", "skips after", "streams, accumulated", "halves"]


@pytest.mark.parametrize(
    ("size", "replicas", "cases"),
    [
        (4, 2, QUICK),
        pytest.param(4, 2, [*CASES, "halves"], **SLOW),
        pytest.param(6, 3, [*QUICK, "plain", "accumulated unevenly"], **SLOW),
        pytest.param(6, 2, QUICK, **SLOW),
    ],
    ids=["some", "2x2", "3x2", "2x3"],
)
def test_the_numbers_are_those_of_one_process(size, replicas, cases):
    sharded = run_processes(train_all, size, replicas, cases, timeout_s=200)
    truth = run_processes(train_all, size, None, cases, timeout_s=100)[0]
    truth |= run_processes(train_all, 1, None, [case for case in cases if case in WHOLE])[0]
    for case, (expected, metrics) in truth.items():
        for found, figures in (ranks[case] for ranks in sharded):
            assert distance(found, expected) <= EXACT, case
            assert figures["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-12)
            assert all(torch.equal(t, sharded[0][case][0][n]) for n, t in found.items()), case
