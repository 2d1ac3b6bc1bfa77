"""Votes and errors with as many ranks as a small cluster has; all of them on this machine."""

import re
import socket

import pytest

import dtrain
from dtrain.errors import RemoteError
from dtrain.testing import run_processes, tiny_fit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

HOST = re.escape(socket.gethostname())


class Acts(dtrain.Callback):
    """Does something on one rank in the fourth step."""

    def __init__(self, rank, what):
        self.rank = rank
        self.what = what

    def on_loss(self, ctx, step):
        if dtrain.init().rank != self.rank or step.number != 3:
            return
        if self.what == "raise":
            raise ValueError("planted")
        if self.what == "skip":
            ctx.request.skip("planted")
        else:
            ctx.request.stop("planted")


def one_rank_acts(rank):
    fit = {"batch_size": 64, "samples": 256, "epochs": 3}
    skipped = tiny_fit([Acts(rank, "skip")], steps=6, **fit)
    stopped = tiny_fit([Acts(rank, "stop")], **fit)
    try:
        tiny_fit([Acts(rank, "raise")], **fit)
    except (ValueError, RemoteError) as error:
        told = (type(error), str(error))
    return {
        "losses": skipped.losses,
        "stopped": (stopped.result.steps, stopped.result.stop_reason),
        "told": told,
    }


@pytest.mark.parametrize(("size", "rank"), [(16, 0), (32, 31)])
def test_what_one_rank_asks_or_raises_reaches_all(size, rank):
    everyones = run_processes(one_rank_acts, size, rank, timeout_s=200)
    for here, one in enumerate(everyones):
        assert len(one["losses"]) == 6
        assert one["losses"] == everyones[0]["losses"]
        steps, reason = one["stopped"]
        assert steps == 4
        assert re.fullmatch(rf"planted \(asked by rank {rank} on {HOST}\)", reason)
        kind, message = one["told"]
        if here == rank:
            assert (kind, message) == (ValueError, "planted")
        else:
            assert kind is RemoteError
            where = rf"rank {rank} on {HOST} failed in on_loss at step 3: ValueError: planted"
            assert re.search(where, message), message
