"""Comm on real ranks: what verbs return, and what every rank learns when one goes wrong."""

import os
import signal
import socket
import sys

import pytest
import torch

import dtrain
from dtrain.distributed.comm import Comm
from dtrain.errors import CheckpointError, CommError, ConfigError, RankMismatch, RemoteError
from dtrain.testing import run_outcomes, run_processes

TIMEOUT_S = 30
ONE = torch.ones(1)
HERE = os.path.basename(__file__)


def line():
    """The line after the caller's."""
    return sys._getframe(1).f_lineno + 1


def play(*scenes):
    """Plays scenes on this rank, one after the other; returns what each returned or raised.

    A scene notes in `lines` where it makes the call that counts.
    """
    told = {}
    with dtrain.init() as world:
        for scene in scenes:
            lines = []
            try:
                told[scene.__name__] = scene(world.comm, world.rank, world.size, lines)
            except Exception as error:  # noqa: BLE001 -- told to the test
                told[scene.__name__] = (type(error), str(error), (lines or [None])[-1])
            world.comm.mark_step(0)
            world.comm.barrier(f"after {scene.__name__}")  # all ranks go on together
    return told


def by_scene(scenes, size):
    """Returns, by scene, what each rank told."""
    ranks = run_processes(play, size, *scenes, timeout_s=TIMEOUT_S)
    return {scene: [told[scene] for told in ranks] for scene in ranks[0]}


# ----------------------------------------------------------------------------- results


def reductions(comm, rank, size, lines):
    given = torch.tensor([[float(rank), 1.0], [-rank, rank * rank]])
    kept = given.clone()
    found = {op: comm.all_reduce("r", given, op).tolist() for op in ("sum", "mean", "max", "min")}
    assert torch.equal(given, kept)
    return found


def kinds(comm, rank, size, lines):
    """Kinds of tensors: by name, what comes back."""
    base = torch.arange(6.0).reshape(2, 3)
    given = {
        "turned": base.t() + rank,
        "wide": torch.tensor([1.0 + rank]).expand(3),
        "empty": torch.zeros(0),
        "number": torch.tensor(rank),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "bfloat16": torch.tensor(1.0, dtype=torch.bfloat16),
        "learnt": torch.nn.Parameter(torch.tensor([1.0])),
    }
    found = {}
    for name, tensor in given.items():
        out = comm.all_reduce(name, tensor)
        assert out.dtype == tensor.dtype
        assert not out.requires_grad
        assert comm.all_gather(name, tensor).shape == (size, *tensor.shape)
        assert comm.broadcast(name, tensor).shape == tensor.shape
        found[name] = out.tolist()
    return found


def gathers(comm, rank, size, lines):
    mine = torch.tensor([rank, 10 * rank])
    objects = comm.gather_objects("o", {"rank": rank, "all": list(range(rank * 1000))})
    assert [len(told["all"]) for told in objects] == [1000 * r for r in range(size)]
    nothing = comm.gather_objects("n", None)
    return comm.all_gather("g", mine).tolist(), [told["rank"] for told in objects], nothing


def broadcasts(comm, rank, size, lines):
    given = torch.tensor([7.5 + rank])
    out = comm.broadcast("b", given)
    assert given.item() == 7.5 + rank
    return out.tolist()


def votes(comm, rank, size, lines):
    """By rule: the answers to 0, 1, ... all ranks saying yes, highest ranks first."""
    return {
        rule: [comm.vote("v", rank >= size - yes, rule) for yes in range(size + 1)]
        for rule in ("any", "majority", "all")
    }


def mains(comm, rank, size, lines):
    calls = []
    result = comm.on_main("m", lambda: calls.append(rank) or {"from": rank, "pid": os.getpid()})
    assert calls == [0] * (rank == 0)
    assert (result["pid"] == os.getpid()) == (rank == 0)
    return result["from"], comm.on_main("none", lambda: None), comm.on_main("t", lambda: ONE).item()


def sizes(comm, rank, size, lines):
    """Tensors and objects on both sides of what travels in a header, and how often ranks met."""
    for length in (29, 30, 31, 1000):
        counted = torch.arange(length, dtype=torch.float64)
        mine = counted + rank
        everyones = torch.stack([counted + r for r in range(size)])
        assert torch.equal(comm.all_gather("g", mine), everyones)
        assert torch.equal(comm.all_reduce("s", mine), everyones.sum(0))
        assert torch.equal(comm.all_reduce("m", mine, "max"), everyones[-1])
    for longest in range(200, 240):  # with what pickling adds, the border is among them
        objects = comm.gather_objects("o", b"x" * (longest if rank == size - 1 else rank))
        assert [len(one) for one in objects] == [*range(size - 1), longest]
    if size == 1:
        return {}
    transport, found = comm._exchange.transport, {}
    comm._exchange.transport = counting = Counting(transport)
    verbs = {
        "barrier": lambda: comm.barrier("b"),
        "vote": lambda: comm.vote("v", True),
        "30 numbers": lambda: comm.all_reduce("s", torch.zeros(30, dtype=torch.float64)),
        "31 numbers": lambda: comm.all_reduce("s", torch.zeros(31, dtype=torch.float64)),
        "a word": lambda: comm.gather_objects("o", "word"),
        "a text": lambda: comm.gather_objects("o", "text" * 100),
    }
    for name, verb in verbs.items():
        counting.calls = 0
        verb()
        found[name] = counting.calls
    comm._exchange.transport = transport
    return found


class Counting:
    """A transport that counts how often it is used."""

    def __init__(self, transport):
        self.transport, self.calls = transport, 0

    def all_gather(self, parts, mine):
        self.calls += 1
        self.transport.all_gather(parts, mine)

    def all_reduce(self, buffer, op="sum"):
        self.calls += 1
        self.transport.all_reduce(buffer, op)


def refusals(comm, rank, size, lines):
    """What is refused before anybody is met."""
    told = []
    for attempt in (
        lambda: comm.all_reduce("r", ONE, "avg"),
        lambda: comm.vote("v", True, "most"),
        lambda: comm.barrier(""),
        lambda: comm.broadcast(ONE, ONE),
    ):
        with pytest.raises(ConfigError) as raised:
            attempt()
        told.append(str(raised.value))
    return told


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_verbs_return(size):
    scenes = (reductions, kinds, gathers, broadcasts, votes, mains, sizes, refusals)
    told = by_scene(scenes, size)
    ranks, total = range(size), sum(range(size))
    squares = sum(r * r for r in ranks)
    assert (
        told["reductions"]
        == [
            {
                "sum": [[total, size], [-total, squares]],
                "mean": [[total / size, 1], [-total / size, pytest.approx(squares / size)]],
                "max": [[size - 1, 1], [0, (size - 1) ** 2]],
                "min": [[0, 1], [1 - size, 0]],
            }
        ]
        * size
    )
    turned = [[0, 3], [1, 4], [2, 5]]
    assert (
        told["kinds"]
        == [
            {
                "turned": [[size * x + total for x in row] for row in turned],
                "wide": [size + total] * 3,
                "empty": [],
                "number": total,
                "float64": pytest.approx(0.1 * size, rel=1e-15),
                "bfloat16": size,
                "learnt": [size],
            }
        ]
        * size
    )
    everyones = [[r, 10 * r] for r in ranks]
    assert told["gathers"] == [(everyones, list(ranks), [None] * size)] * size
    assert told["broadcasts"] == [[7.5]] * size
    assert (
        told["votes"]
        == [
            {
                "any": [yes >= 1 for yes in range(size + 1)],
                "majority": [2 * yes > size for yes in range(size + 1)],
                "all": [yes == size for yes in range(size + 1)],
            }
        ]
        * size
    )
    assert told["mains"] == [(0, None, 1.0)] * size
    once = {"barrier": 1, "vote": 1, "30 numbers": 1, "a word": 1}
    twice = {"31 numbers": 2, "a text": 2}
    assert told["sizes"] == [once | twice if size > 1 else {}] * size
    for op, rule, empty, no_text in told["refusals"]:
        assert op == "all_reduce('r'): op='avg'; choose one of ['max', 'mean', 'min', 'sum']"
        assert rule == "vote('v'): rule='most'; choose one of ['all', 'any', 'majority']"
        assert empty == "barrier: the first argument is a label (text), got ''"
        assert no_text.startswith("broadcast: the first argument is a label (text), got tensor")


DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.float16, torch.complex64)


def dtypes(comm, rank, size, lines):
    found = {}
    for dtype in DTYPES:
        tensor = torch.ones(2, dtype=dtype)
        for name, verb in {
            "sum": lambda t: comm.all_reduce("r", t),
            "mean": lambda t: comm.all_reduce("r", t, "mean"),
            "gather": lambda t: comm.all_gather("g", t),
            "broadcast": lambda t: comm.broadcast("b", t),
        }.items():
            try:
                found[dtype, name] = verb(tensor).dtype
            except CommError as error:
                found[dtype, name] = type(error)
    return found


def test_dtypes_are_those_of_a_world_of_one():
    one = dtypes(Comm(), 0, 1, [])
    two, other = by_scene([dtypes], 2)["dtypes"]
    assert two == other
    assert {key: (one[key], two[key]) for key in one if one[key] != two[key]} == {}


# ----------------------------------------------------------------------------- mismatches


def other_line(comm, rank, size, lines):
    """The same verb, label and shape: on a plain process group, the sums would be mixed."""
    if rank == 0:
        lines.append(line())
        comm.all_reduce("loss", ONE)
    lines.append(line())
    comm.all_reduce("loss", ONE)


def other_shape(comm, rank, size, lines):
    lines.append(line())
    comm.all_gather("x", torch.ones(2 + rank))


def other_dtype(comm, rank, size, lines):
    lines.append(line())
    comm.broadcast("x", torch.ones(2, dtype=torch.float64 if rank else torch.float32))


def other_op(comm, rank, size, lines):
    lines.append(line())
    comm.all_reduce("x", ONE, "max" if rank else "sum")


def other_rule(comm, rank, size, lines):
    lines.append(line())
    comm.vote("x", True, "all" if rank else "any")


def other_label(comm, rank, size, lines):
    lines.append(line())
    comm.barrier(f"x{rank}")


def other_verb(comm, rank, size, lines):
    if rank == size - 1:
        lines.append(line())
        comm.on_main("x", lambda: 1)
    lines.append(line())
    comm.gather_objects("x", 1)


def other_order(comm, rank, size, lines):
    if rank == 0:
        lines.append(line())
        comm.barrier("a")
    lines.append(line())
    comm.barrier("b")
    comm.barrier("a")


def other_step(comm, rank, size, lines):
    comm.mark_step(40 + rank)
    lines.append(line())
    comm.barrier("x")


MISMATCHES = {
    other_line: lambda rank, size: "step 0  all_reduce('loss')  sum float32[1]",
    other_shape: lambda rank, size: f"step 0  all_gather('x')  float32[{2 + rank}]",
    other_dtype: lambda rank, size: f"step 0  broadcast('x')  float{64 if rank else 32}[2]",
    other_op: lambda rank, size: f"step 0  all_reduce('x')  {'max' if rank else 'sum'} float32[1]",
    other_label: lambda rank, size: f"step 0  barrier('x{rank}')  -",
    other_verb: lambda rank, size: (
        f"step 0  {'on_main' if rank == size - 1 else 'gather_objects'}('x')  -"
    ),
    other_order: lambda rank, size: f"step 0  barrier('{'b' if rank else 'a'}')  -",
    other_step: lambda rank, size: f"step {40 + rank}  barrier('x')  -",
}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_meet_in_different_calls_are_told_who_was_where(size):
    for scene, ranks in by_scene(MISMATCHES, size).items():
        said = MISMATCHES[globals()[scene]]
        rows = [
            f"  rank {rank}: {said(rank, size)}  at {HERE}:{ranks[rank][2]}" for rank in range(size)
        ]
        for kind, text, _ in ranks:
            assert kind is RankMismatch, scene
            assert text.startswith("ranks met in different calls; each verb must be called by all")
            assert text.splitlines()[1:] == rows, scene


def test_ranks_that_vote_by_different_rules_are_told():
    for kind, text, at in by_scene([other_rule], 2)["other_rule"]:
        assert kind is RankMismatch
        assert f"{HERE}:{at}" in text


# ----------------------------------------------------------------------------- failures


def fails_on(failing, comm, rank, lines, where="the phase"):
    with comm.lockstep(where):
        if rank in failing:
            lines.append(line())
            raise ValueError(f"planted on {rank}")
        comm.barrier("others wait")


def first_fails(comm, rank, size, lines):
    comm.mark_step(5)
    fails_on({0}, comm, rank, lines)


def last_fails(comm, rank, size, lines):
    comm.mark_step(5)
    fails_on({size - 1}, comm, rank, lines, lambda: "the phase")


def two_fail(comm, rank, size, lines):
    comm.mark_step(5)
    fails_on({0, 1}, comm, rank, lines)


def nested(comm, rank, size, lines):
    comm.mark_step(5)
    with comm.lockstep("an outer phase"):
        fails_on({size - 1}, comm, rank, lines)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_fails_in_lockstep_makes_the_others_fail(size):
    failing = {first_fails: {0}, last_fails: {size - 1}, two_fail: {0, 1}, nested: {size - 1}}
    for scene, ranks in by_scene(failing, size).items():
        guilty = failing[globals()[scene]]
        cause = "; ".join(
            f"rank {rank} on {socket.gethostname()} failed in the phase at step 5: ValueError: "
            f"planted on {rank} ({__file__}:{ranks[rank][2]})"
            for rank in sorted(guilty)
        )
        for rank, (kind, text, _) in enumerate(ranks):
            if rank in guilty:
                assert (kind, text) == (ValueError, f"planted on {rank}"), scene
            else:
                assert (kind, text) == (RemoteError, cause), scene


def caught_and_again(comm, rank, size, lines):
    """A script may catch what it was told, on all ranks, and go on."""
    told = []
    for attempt in range(3):
        with pytest.raises((ValueError, RemoteError)) as raised:
            fails_on({attempt % size}, comm, rank, lines)
        told.append(str(raised.value).rpartition(" (")[0] or str(raised.value))
        comm.barrier("all know")
        told.append(comm.explain(RuntimeError("a later one")))  # not explained by the old one
        comm.barrier("all asked")
    return told


def converted(comm, rank, size, lines):
    """An error that all ranks know already, raised again in other words."""
    with comm.lockstep("the phase"):
        try:
            comm.on_main("write", lambda: os.stat("/no/such/file"))
        except OSError as error:
            raise CheckpointError("could not be written") from error


def converted_by_all(comm, rank, size, lines):
    """The same, where the other ranks find other words as well."""
    with comm.lockstep("the phase"):
        try:
            comm.on_main("write", lambda: os.stat("/no/such/file"))
        except (OSError, RemoteError) as error:
            raise CheckpointError("could not be written") from error


def test_after_a_failure_comes_the_next():
    told = by_scene([caught_and_again], 2)["caught_and_again"]
    assert [rank[1::2] for rank in told] == [[None] * 3] * 2
    told = [rank[::2] for rank in told]
    by = [f"rank {r} on {socket.gethostname()} failed in the phase at step 0: " for r in range(2)]
    assert told[0] == ["planted on 0", f"{by[1]}ValueError: planted on 1", "planted on 0"]
    assert told[1] == [
        f"{by[0]}ValueError: planted on 0",
        "planted on 1",
        f"{by[0]}ValueError: planted on 0",
    ]


def test_an_error_that_all_know_is_not_told_twice_in_other_words():
    one, two = by_scene([converted], 2)["converted"]
    assert one[:2] == (CheckpointError, "could not be written")
    assert two[0] is RemoteError
    assert "failed in on_main('write') at step 0: FileNotFoundError" in two[1]
    for kind, text, _ in by_scene([converted_by_all], 2)["converted_by_all"]:
        assert (kind, text) == (CheckpointError, "could not be written")


# ----------------------------------------------------------------------------- on_main


def main_fails(comm, rank, size, lines):
    comm.mark_step(3)

    def download():
        lines.append(line())
        raise ValueError("planted")

    comm.on_main("download", download)


def main_fails_in_lockstep(comm, rank, size, lines):
    with comm.lockstep("the phase"):
        main_fails(comm, rank, size, lines)


def main_returns_what_cannot_be_sent(comm, rank, size, lines):
    with comm.lockstep("the phase"):
        comm.on_main("open", lambda: open(os.devnull))  # noqa: SIM115 -- it cannot be pickled


@pytest.mark.parametrize("size", [2, 3])
def test_a_failure_on_rank_0_reaches_all(size):
    told = by_scene([main_fails, main_fails_in_lockstep, main_returns_what_cannot_be_sent], size)
    for scene in ("main_fails", "main_fails_in_lockstep"):
        first, *others = told[scene]
        assert first[:2] == (ValueError, "planted")
        cause = (
            f"rank 0 on {socket.gethostname()} failed in on_main('download') at step 3: "
            f"ValueError: planted ({__file__}:{first[2]})"
        )
        assert [other[:2] for other in others] == [(RemoteError, cause)] * (size - 1)
    first, *others = told["main_returns_what_cannot_be_sent"]
    assert first[:2] == (TypeError, "cannot pickle '_io.TextIOWrapper' object")
    assert [kind for kind, *_ in others] == [RemoteError] * (size - 1)
    assert all("on_main('open')" in text and "cannot pickle" in text for _, text, _ in others)


def gathers_what_cannot_be_sent(comm, rank, size, lines):
    with comm.lockstep("the phase"):
        comm.gather_objects("o", (lambda: 1) if rank == 1 else 1)


def test_a_value_that_cannot_be_sent_reaches_all():
    one, two = by_scene([gathers_what_cannot_be_sent], 2)["gathers_what_cannot_be_sent"]
    assert one[0] is RemoteError
    assert "rank 1 on " in one[1]
    assert "gathers_what_cannot_be_sent" in one[1]  # the local function that cannot be pickled
    assert two[0] is AttributeError


def verb_on_main():
    with dtrain.init(timeout_s=20) as world:
        world.comm.on_main("mine", lambda: world.comm.barrier("inside"))


def test_a_verb_inside_on_main_is_refused_at_once():
    one, two = run_outcomes(verb_on_main, 2, timeout_s=TIMEOUT_S)
    assert type(one.error) is ConfigError
    assert "barrier" in str(one.error)
    assert "on_main" in str(one.error)
    assert type(two.error) is RemoteError


# ----------------------------------------------------------------------------- agreed failures


def failures_of(*failing):
    def scene(comm, rank, size, lines):
        comm.mark_step(2)
        error = KeyError(f"of {rank}") if rank in failing else None
        comm.raise_failures("failures", error, "loss_fn" if error else "")
        return "fine"

    return scene


def no_failures(comm, rank, size, lines):
    return failures_of()(comm, rank, size, lines)


def one_failure(comm, rank, size, lines):
    return failures_of(1)(comm, rank, size, lines)


def two_failures(comm, rank, size, lines):
    return failures_of(0, 2)(comm, rank, size, lines)


def test_failures_of_a_step_are_raised_on_all_ranks():
    told = by_scene([no_failures, one_failure, two_failures], 3)
    assert told["no_failures"] == ["fine"] * 3
    for scene, guilty in (("one_failure", (1,)), ("two_failures", (0, 2))):
        cause = "; ".join(
            f"rank {rank} on {socket.gethostname()} failed in loss_fn at step 2: KeyError: "
            f"'of {rank}' (unknown place)"
            for rank in guilty
        )
        for rank, (kind, text, _) in enumerate(told[scene]):
            assert kind is (KeyError if rank in guilty else RemoteError)
            assert text == (f"'of {rank}'" if rank in guilty else cause)


# ----------------------------------------------------------------------------- ranks that leave


def recorded():
    with dtrain.init() as world:
        comm, broken = world.comm, RuntimeError("connection reset")
        told = [comm.explain(broken)]
        comm.mark_step(9)
        comm.barrier("nothing yet")
        if world.rank == 1:
            comm.record(RemoteError("only heard of it"), "elsewhere")  # not a cause
            comm.record(ValueError("the first"), "backward")
            comm.record(ValueError("the second"), "later")
        comm.barrier("recorded")
        told += [comm.explain(broken), comm.explain(RemoteError("known"))]
        comm.barrier("explained")
        return [None if error is None else (type(error), str(error)) for error in told]


def test_the_first_recorded_failure_explains_a_broken_collective():
    one, two, three = run_processes(recorded, 3, timeout_s=TIMEOUT_S)
    cause = (
        f"rank 1 on {socket.gethostname()} failed in backward at step 9: ValueError: the first "
        "(unknown place)"
    )
    assert one == three == [None, (RemoteError, cause), None]
    assert two == [None, None, None]  # its own


def leaves(how):
    with dtrain.init() as world:
        comm = world.comm
        comm.mark_step(4)
        if world.rank == 1:
            if how == "raises":
                comm.leave(error := ValueError("planted"), "backward")
                raise error
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        comm.all_reduce("the loss", ONE)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_killed_is_missed_by_the_others(size):
    outcomes = run_outcomes(leaves, size, "killed", timeout_s=TIMEOUT_S)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in {*range(size)} - {1}:
        assert type(outcomes[rank].error) is CommError
        text = f"rank {rank} on {socket.gethostname()} lost the other ranks in 'the loss' at step 4"
        assert str(outcomes[rank].error).startswith(text)
        assert outcomes[rank].exitcode == 1


def test_a_rank_that_exits_is_missed_by_the_others():
    one, two = run_outcomes(leaves, 2, "exits", timeout_s=TIMEOUT_S)
    assert type(one.error) is CommError
    assert "none of them said why" in str(one.error)
    assert two.exitcode == 3


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_raises_alone_is_named_by_the_others(size):
    outcomes = run_outcomes(leaves, size, "raises", timeout_s=TIMEOUT_S)
    assert type(outcomes[1].error) is ValueError
    for rank in {*range(size)} - {1}:
        assert type(outcomes[rank].error) is RemoteError
        text = f"rank 1 on {socket.gethostname()} failed in backward at step 4: ValueError: planted"
        assert str(outcomes[rank].error).startswith(text)


# ----------------------------------------------------------------------------- a world of one


def test_in_a_world_of_one_errors_are_left_as_they_are():
    comm = Comm()
    with pytest.raises(ValueError, match="planted"), comm.lockstep("the phase"):
        raise ValueError("planted")
    comm.leave(ValueError("planted"), "the phase")
    with pytest.raises(ZeroDivisionError):
        comm.on_main("m", lambda: 1 / 0)
    with pytest.raises(KeyError):
        comm.raise_failures("f", KeyError("x"), "here")
    comm.raise_failures("f", None, "")
    assert comm.explain(RuntimeError("broken")) is None


def test_in_a_world_of_one_results_are_copies():
    comm, given = Comm(), torch.ones(2)
    for out in (
        comm.all_reduce("r", given),
        comm.broadcast("b", given),
        comm.all_gather("g", given),
    ):
        out += 1
    assert given.tolist() == [1, 1]
