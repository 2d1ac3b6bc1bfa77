"""Replicas of a sharded model (HSDP): sharded within a group of ranks, summed over the groups."""

import os
import signal
from unittest.mock import patch

import pytest
import sharding
import torch
from sharding import distance, whole
from test_fsdp import (
    CASES,
    EXACT,
    SLOW,
    WHOLE,
    Count,
    Plant,
    Stream,
    Weigh,
    callback_of,
    fit_with,
    moments,
)

import dtrain
from dtrain.distributed import grid_of, hosts_of
from dtrain.errors import ConfigError, RankMismatch
from dtrain.strategies import FSDP
from dtrain.testing import run_outcomes, run_processes

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
    return {case: train(FSDP(replicas=replicas) if replicas else "flat", case) for case in cases}


QUICK = ["odd, a batch smaller than the world", "skips after", "halves"]


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


# ------------------------------------------------------------------- one rank fails, all know


def fail_and_go_on(places, micros, at):
    """Fails on each rank in turn, and calls fit again; returns what all were told, and the end."""
    world = dtrain.init(seed=0)
    fit = {"batch_size": 9, "max_steps": 5}
    straight = sharding.trainer(FSDP(replicas=2), micros=micros, model="odd")
    straight.fit(sharding.dataset(), **fit)
    expected = whole(straight.model)
    found = {}
    for place, rank in places:
        plant = Plant(rank == world.rank, place, *at)
        trainer, told, same = fit_with(plant, FSDP(replicas=2), fit, micros=micros, model="odd")
        trainer.fit(sharding.dataset(), **fit)
        found[place, rank] = told, same, distance(whole(trainer.model), expected)
    return found


BACK = "backward of blocks.1.norm"
EVERYWHERE = [(p, r) for p in ("blocks.0", "blocks.1.a", "loss", BACK) for r in range(4)]


@pytest.mark.parametrize(
    ("micros", "at", "places"),
    [
        (2, (1, 1), [("blocks.1.a", 0), (BACK, 3)]),
        (1, (0, 0), [("blocks.1.a", 3)]),
        pytest.param(1, (0, 0), EVERYWHERE, **SLOW),
        pytest.param(2, (3, 1), EVERYWHERE, **SLOW),
    ],
)
def test_a_failure_in_one_replica_is_agreed_by_all(micros, at, places):
    ranks = run_processes(fail_and_go_on, 4, places, micros, at, timeout_s=200)
    for rank, cases in enumerate(ranks):
        assert [*cases] == places
        for (place, failing), (told, same, far) in cases.items():
            where = (place, failing, rank)
            words = "ValueError: planted in" if rank == failing else f"rank {failing}"
            assert words in told, (where, told)
            assert same, where
            assert far <= EXACT, (where, far)


def vanish():
    world = dtrain.init(seed=0)

    class Goes(dtrain.Callback):
        def on_loss(self, ctx, step):
            if world.rank == 3 and step.number == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = sharding.trainer(FSDP(replicas=2), callbacks=[Goes()], hang_after_s=3.0)
    trainer.fit(sharding.dataset(), batch_size=6, epochs=2)


@pytest.mark.slow
def test_a_rank_that_is_gone_is_named_in_all_replicas():
    outcomes = run_outcomes(vanish, 4, timeout_s=40)
    for outcome in outcomes[:3]:
        told = f"{outcome.error} {outcome.output}"
        assert "rank 3 on" in told, told
        assert "gone" in told, told


# ------------------------------------------------------------------- checkpoints


def go_on(run_dir, replicas, epochs):
    dtrain.init(seed=0)
    weigh = Weigh()
    strategy = "flat" if replicas is None else FSDP(replicas=replicas)
    callbacks = [weigh, dtrain.callbacks.Checkpoint(every_epochs=1, keep=9)]
    trainer = sharding.trainer(strategy, model="odd", callbacks=callbacks, run_dir=run_dir)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=epochs)
    files = {path.name for path in (run_dir / "checkpoints").glob("*/*")}
    files = {name for name in files if not name.startswith("rank-")}
    return weigh.begin, (whole(trainer.model), moments(trainer)), files


@pytest.mark.slow
def test_a_run_goes_on_with_other_replicas_and_other_numbers_of_ranks(tmp_path):
    chain = [(4, 2), (4, 1), (1, 1), (4, 2), (2, None)]
    _, straight, files = run_processes(go_on, 2, tmp_path / "straight", None, len(chain))[0]
    before = None
    for epochs, (size, replicas) in enumerate(chain, 1):
        begin, end, written = run_processes(go_on, size, tmp_path / "run", replicas, epochs)[-1]
        for found, expected in zip(begin, before, strict=True) if before else ():
            assert found.keys() == expected.keys()
            assert all(torch.equal(t, expected[n]) for n, t in found.items()), (size, replicas)
        before = end
    assert distance(end[0], straight[0]) <= EXACT
    assert distance(end[1], straight[1]) <= EXACT
    assert written == files


# ------------------------------------------------------------------- what is said, counted, refused


class Drift(dtrain.Callback):
    """A hook that changes rows on one rank only."""

    def __init__(self, drifts):
        self.drifts = drifts

    def on_step_end(self, ctx, step):
        if self.drifts and step.number == 2:
            with torch.no_grad():
                ctx.model.blocks[1].a.weight.to_local()[:1].add_(1e-9)


def once():
    """Callbacks that are to count each row once, and to do the same to each copy of it."""
    return [
        dtrain.callbacks.L1L2Penalty(l1=0.01, l2=0.1),
        dtrain.callbacks.GradientNoise(eta=1e-4),
        dtrain.callbacks.GradientStats(every=1),
    ]


def by_hand(count):
    """Returns what a step of torch's own costs, on a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "ranks"))
    model, _ = sharding.make()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    for _ in range(3):
        count.counts.update(dict.fromkeys(count.counts, 0))
        model(torch.ones(2, sharding.WIDTH, dtype=torch.float64)).sum().backward()
    return {name: n for name, n in count.counts.items() if n}


def told(run_dir, replicas):
    """What is said on two hosts of two ranks; what a step costs; that drift is noticed."""
    rank = int(os.environ["RANK"])
    with patch.dict(os.environ, {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}):
        dtrain.init(seed=0, health=False)
    said = {}
    for given in (3, 4):
        with pytest.raises(ConfigError) as refused:
            sharding.trainer(FSDP(replicas=given))
        said[given] = str(refused.value)
    count = Count()
    trainer = sharding.trainer(FSDP(replicas=replicas), callbacks=[count])
    trainer.fit(sharding.dataset(21), batch_size=4, epochs=2)
    said["costs"] = count.found
    said["by hand"] = by_hand(count)
    said["start"] = trainer._engine.strategy.describe()
    said["default"] = sharding.trainer(FSDP())._engine.strategy.describe()
    trainer = sharding.trainer(FSDP(replicas=replicas), callbacks=once())
    said["norms"] = trainer.fit(sharding.dataset(), batch_size=4, max_steps=2).metrics
    trainer = sharding.trainer(
        FSDP(replicas=replicas), callbacks=[Drift(rank == 3)], run_dir=run_dir
    )
    with pytest.raises(RankMismatch) as drifted:
        trainer.fit(sharding.dataset(), batch_size=4, max_steps=4)
    said["drift"] = str(drifted.value)
    return said


def norms():
    dtrain.init(seed=0)
    trainer = sharding.trainer("flat", callbacks=once())
    return trainer.fit(sharding.dataset(), batch_size=4, max_steps=2).metrics


def test_what_is_said_and_what_a_step_costs(tmp_path):
    expected = run_processes(norms, 1)[0]
    for said in run_processes(told, 4, tmp_path / "run", "hosts", timeout_s=100):
        assert "4 ranks cannot be divided into 3 replicas" in said[3]
        assert "into 2 they can" in said[3]
        assert "each rank would hold the whole model" in said[4]
        plain = {"all_gather_single": 7, "reduce_scatter_single": 4, "all_reduce": 4}
        assert said["by hand"] == plain
        assert len(said["costs"]) == 10
        assert all(one == plain | {"all_reduce": 4 + 1} for one in said["costs"]), said["costs"]
        assert "sharded over 2 ranks, in 2 replicas, one for each host: 3 x Block" in said["start"]
        assert "sharded over 4 ranks on 2 hosts (with FSDP(replicas='hosts')" in said["default"]
        names = [name for name in expected if name.startswith("grad_norm")]
        assert len(names) == 23
        names += ["train/loss", "train/penalty"]
        for name in names:
            assert said["norms"][name] == pytest.approx(expected[name], rel=1e-12), name
        assert "replicas of the sharded model were no longer equal" in said["drift"]
        assert "blocks.1.a.weight (part 1): ranks 1 and 3" in said["drift"], said["drift"]


@pytest.mark.parametrize("replicas", [True, 0, -2, 2.0, "nodes"])
def test_other_values_are_refused(replicas):
    with pytest.raises(ConfigError, match="'hosts' for one on each host, how many"):
        FSDP(replicas=replicas)


@pytest.mark.parametrize(
    ("places", "hosts"),
    [
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], [[0, 1], [2, 3]]),
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], [[0, 2], [1, 3]]),  # dealt out in turn
        ([("a", 0), ("a", 1), ("a", 0), ("a", 1)], [[0, 1], [2, 3]]),  # hosts of one name
    ],
)
def test_hosts_are_found_in_any_order_of_ranks(places, hosts):
    assert hosts_of(places) == hosts
    assert grid_of("hosts", hosts) == tuple(map(tuple, hosts))


def test_hosts_with_different_numbers_of_ranks_are_refused():
    with pytest.raises(ConfigError, match="the hosts have 2, 1 ranks"):
        grid_of("hosts", [[0, 1], [2]])
