"""The lane: what ranks say inside the gradient reduction, and what comes of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.step.lane import Lane, LaneSilent, Slot, Verdict, idle

NAN, INF = float("nan"), float("inf")
QUIET = {slot.name: 0.0 for slot in Slot}


def lane(rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> Lane:
    return Lane(nn.Linear(2, 1, dtype=dtype), rank=rank, size=size)


def said(one: Lane) -> dict[str, float]:
    return {slot.name: value for slot, value in zip(Slot, one.message().tolist(), strict=True)}


def loss(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def reduce(lanes: list[Lane]) -> Verdict:
    """Does what DDP does: each lane gets the sum over ranks of gradient times 1 / world size."""
    mean = (torch.stack([one.message() for one in lanes]) * (1 / len(lanes))).sum(0)
    for one in lanes:
        one.param.grad = mean.clone()
    verdicts = [one.listen().verdict() for one in lanes]
    assert [repr(verdict) for verdict in verdicts] == [repr(verdicts[0])] * len(lanes)
    return verdicts[0]


# ----------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_parameter_is_a_few_zeros(dtype: torch.dtype) -> None:
    one = lane(dtype=dtype)
    assert one.param.tolist() == [0.0] * len(Slot)
    assert one.param.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.float64)])
    assert Lane(mixed, rank=0, size=1).param.dtype == torch.float64
    for parameter in mixed[1].parameters():
        parameter.requires_grad_(False)
    assert Lane(mixed, rank=0, size=1).param.dtype == torch.float32


def test_what_is_said_in_a_step() -> None:
    one = lane()
    one.open()
    assert said(one) == QUIET | {"CANARY": 1}
    one.expect(8)
    terms = []
    for value, weight, samples in ((2.0, 4, 4), (3.0, torch.tensor(2.0), 5)):
        terms.append(loss(value))
        assert one.add(terms[-1], weight, samples) is terms[-1]
        one.backward(None, terms[-1])
    assert [term.grad.item() for term in terms if term.grad is not None] == [4 / 8, 2 / 8]
    one.say(Slot.STOP)
    one.say(Slot.SKIPPED, 2)
    one.say(Slot.SKIPPED)
    spoken = {"CANARY": 1, "WEIGHT": 6 / 8, "LOSS": 1.75, "SAMPLES": 9, "STOP": 1, "SKIPPED": 3}
    assert said(one) == QUIET | spoken
    one.open()  # the next step begins with nothing
    assert said(one) == QUIET | {"CANARY": 1}
    assert one.param.grad is None


def test_only_rank_0_says_the_world_size_to_the_canary() -> None:
    for rank, value in ((0, 5), (1, 1)):
        one = lane(rank, size=5)
        one.open()
        assert said(one) == QUIET | {"CANARY": value}


def test_the_lane_travels_with_backward() -> None:
    weight = nn.Parameter(torch.tensor(3.0))
    one = lane()
    one.open()
    one.expect(4)
    term = one.add(5 * weight, 2, 7)
    voice = one.attach()
    one.say(Slot.SAVE)  # what is said until backward still counts
    assert term.item() == 15
    one.backward(voice, term)
    assert weight.grad is not None
    assert weight.grad.item() == 2.5  # 5 * 2 / 4
    verdict = one.listen().verdict()
    assert verdict == Verdict(
        weight=2.0,
        loss_mean=15.0,
        factor=2.0,
        samples=7,
        undone=True,  # no rank had data
        stop=0,
        save=1,
        preempt=0,
        skipped=0,
        errors=0,
        nonfinite=0,
        fed=0,
        ending=0,
        starved=0,
        leaving=0,
        changed=0,
    )
    # Normalised, the gradient is that of the mean.
    assert weight.grad.item() * verdict.factor == 5


def test_the_message_is_what_was_said_and_not_a_view() -> None:
    one = lane()
    one.open()
    before = one.message()
    one.say(Slot.STOP)
    assert before[Slot.STOP] == 0


@pytest.mark.parametrize(
    ("slot", "field"),
    [
        (Slot.SAMPLES, "samples"),
        (Slot.STOP, "stop"),
        (Slot.SAVE, "save"),
        (Slot.PREEMPT, "preempt"),
        (Slot.SKIPPED, "skipped"),
        (Slot.ERROR, "errors"),
        (Slot.NONFINITE, "nonfinite"),
        (Slot.FED, "fed"),
        (Slot.ENDING, "ending"),
        (Slot.STARVED, "starved"),
        (Slot.LEAVING, "leaving"),
        (Slot.CHANGED, "changed"),
    ],
)
def test_each_slot_has_its_place_in_the_verdict(slot: Slot, field: str) -> None:
    one = lane()
    one.open()
    one.say(slot, 3)
    verdict = reduce([one])
    counts = {
        name: getattr(verdict, name)
        for name in Verdict._fields
        if name not in ("loss_mean", "undone")
    }
    assert counts == dict.fromkeys(counts, 0) | {field: 3}


@pytest.mark.parametrize("slot", [Slot.ERROR, Slot.STARVED, Slot.LEAVING, Slot.ENDING, Slot.STOP])
def test_a_step_is_undone_where_a_rank_failed_or_has_to_leave(slot: Slot) -> None:
    one = lane()
    one.open()
    one.say(Slot.FED)
    assert not reduce([one]).undone
    one.open()
    one.say(Slot.FED)
    one.say(slot)
    assert reduce([one]).undone is (slot not in (Slot.ENDING, Slot.STOP))


# ----------------------------------------------------------------------------- many ranks


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 41, 49, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_verdict_is_that_of_the_global_batch(size: int, dtype: torch.dtype) -> None:
    lanes = [lane(rank, size, dtype) for rank in range(size)]
    for rank, one in enumerate(lanes):
        one.open()
        one.expect(2 * size)
        one.add(loss(float(rank)), rank % 3, rank % 3)
        one.say(Slot.STOP, int(rank % 2))
        one.say(Slot.ERROR, int(rank == size - 1))
    weights = [rank % 3 for rank in range(size)]
    total = sum(weights)
    verdict = reduce(lanes)
    near = pytest.approx if dtype == torch.float64 else lambda x: pytest.approx(x, rel=1e-6)
    assert verdict.weight == near(total)
    assert verdict.samples == total
    assert (verdict.stop, verdict.errors, verdict.skipped) == (size // 2, 1, 0)
    if total:
        mean = sum(rank * weight for rank, weight in enumerate(weights)) / total
        assert verdict.loss_mean == near(mean)
        # What DDP leaves is sum / (reference * size): the factor makes it the mean's gradient.
        assert verdict.factor == near(2 * size / total)


@pytest.mark.parametrize("size", [3, 10, 12, 24, 48])
def test_equal_shares_need_no_factor_at_any_world_size(size: int) -> None:
    """Though a ring adds them up to 0.9999998 or 1.0000001."""
    ranks = [lane(rank, size) for rank in range(size)]
    mean = torch.zeros(len(Slot))
    for one in ranks:
        one.expect(15 * size)
        one.open()
        one.add(loss(2.0), 15, 15)
        mean += one.message() * (1 / size)
    ranks[0].param.grad = mean
    heard = ranks[0].listen()
    assert (heard.verdict().weight, heard.verdict().factor) == (15 * size, 1)
    assert (heard.factor(), heard.divisor(), heard.veto()) == (1, 1, False)
    assert heard.verdict().loss_mean == pytest.approx(2, rel=1e-6)


def test_samples_are_counted_beyond_what_float32_holds() -> None:
    """A float32 holds whole numbers to 2^24, and DDP's mean over 1000 ranks is inexact."""
    lanes = [lane(rank, 1000) for rank in range(1000)]
    for rank, one in enumerate(lanes):
        one.open()
        for _ in range(3):
            one.add(loss(1.0), 1, 300_000 + rank)
    assert reduce(lanes).samples == 3 * sum(300_000 + rank for rank in range(1000))  # 9 * 10^8


def test_with_one_share_losses_are_as_large_as_in_one_process() -> None:
    terms = []
    for size in (1, 3, 8):
        one = Lane(nn.Linear(2, 1), rank=0, size=size, shares=1)
        one.expect(96)
        assert (one.reference, one.expected) == (96, 96)
        one.open()
        term = one.add(loss(2.0), 4, 4)
        one.backward(None, term)
        assert term.grad is not None
        terms.append(2 * term.grad.item())
    assert terms == [pytest.approx(2.0 * 4 / 96, rel=1e-6)] * 3
    assert len(set(terms)) == 1


def test_a_step_without_any_weight_has_no_mean() -> None:
    lanes = [lane(rank, 2) for rank in range(2)]
    for one in lanes:
        one.open()
    verdict = reduce(lanes)
    assert (verdict.weight, verdict.factor, verdict.samples) == (0, 0, 0)
    assert math.isnan(verdict.loss_mean)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_that_is_not_finite_touches_its_slot_only(bad: float, size: int) -> None:
    lanes = [lane(rank, size) for rank in range(size)]
    for rank, one in enumerate(lanes):
        one.open()
        one.add(loss(1.0), 2, 2)
        if rank == size - 1:
            one.add(loss(bad), 3, 3)
            one.add(loss(-bad), 3, 3)
            one.say(Slot.SAVE)
    verdict = reduce(lanes)
    assert not math.isfinite(verdict.loss_mean)
    assert (verdict.weight, verdict.samples) == (2 * size + 6, 2 * size + 6)
    assert (verdict.nonfinite, verdict.save, verdict.stop, verdict.errors) == (2, 1, 0, 0)
    assert math.isfinite(verdict.factor)


def test_a_loss_beyond_float32_is_told_as_it_is() -> None:
    """Without a warning of NumPy's: the run says that the loss is not finite."""
    one = lane()
    one.open()
    one.add(loss(3e38), 4, 4)
    verdict = reduce([one])
    assert verdict.loss_mean == INF
    assert (verdict.weight, verdict.samples) == (4, 4)


# ----------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("weight", [1, 8, 9.5, 65536, 1e-3])
@pytest.mark.parametrize("size", [1, 3])
def test_the_reference_is_a_ranks_share_of_what_is_expected(weight: float, size: int) -> None:
    one = lane(0, size)
    assert (one.reference, one.expected) == (1, size)
    one.expect(weight)
    assert (one.reference, one.expected) == (weight / size, weight)
    for senseless in (0, -1, NAN, INF):
        one.expect(senseless)
        assert one.expected == weight


def verdict_of(weight: float) -> Verdict:
    return Verdict(weight, *[0] * (len(Verdict._fields) - 1))


@pytest.mark.parametrize(
    ("weight", "reference"),
    [(64, 16), (256, 16), (16, 16), (257, 64.25), (15.9, 15.9 / 4), (0, 16), (NAN, 16)],
)
def test_the_reference_moves_where_steps_weigh_four_times_otherwise(
    weight: float, reference: float
) -> None:
    one = lane(0, 4)
    one.expect(64)
    one.observe(verdict_of(weight))
    assert one.reference == reference


def test_the_reference_changes_no_result() -> None:
    results = []
    for expected in (1, 2**10, 2**-10):
        one = lane()
        one.open()
        one.expect(expected)
        value = loss(0.3)
        one.backward(one.attach(), one.add(value, 7, 7))
        verdict = one.listen().verdict()
        assert value.grad is not None
        results.append((verdict.loss_mean, verdict.weight, value.grad.item() * verdict.factor))
    assert results[0] == results[1] == results[2] == (pytest.approx(0.3), 7, 1)


class Clumsy(torch.autograd.Function):
    """A loss whose backward writes to what it is handed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mul_(3)


@pytest.mark.parametrize("weight", [8, 4])
def test_a_backward_that_writes_to_its_gradient_spoils_no_later_step(weight: float) -> None:
    one = lane()
    one.expect(8)
    for _ in range(3):
        one.open()
        value = loss(2.0)
        one.backward(None, one.add(Clumsy.apply(value), weight, 8))  # type: ignore[no-untyped-call]
        assert value.grad is not None
        assert value.grad.item() == 3 * weight / 8


# ----------------------------------------------------------------------------- silence


def alone(rank: int, size: int, divided: bool) -> Callable[[], Lane]:
    def make() -> Lane:
        one = lane(rank, size)
        one.open()
        one.backward(one.attach())  # what comes back without a reduction
        if divided:  # DDP divides on the way into a bucket
            assert one.param.grad is not None
            one.param.grad /= size
        return one

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lane(0, 2), "no gradient reached the lane"),
        *(
            (alone(rank, size, divided), "was not reduced")
            for size in (2, 3, 4, 7, 64, 10_000)
            for rank in (0, 1, size - 1)
            for divided in (False, True)
        ),
    ],
)
def test_silence_is_not_taken_for_consent(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(LaneSilent, match=words):
        make().listen().verdict()


def test_a_lane_of_nans_is_not_read() -> None:
    one = lane(0, 2)
    one.open()
    one.param.grad = torch.full_like(one.param, NAN)
    with pytest.raises(LaneSilent, match="was not reduced"):
        one.listen().verdict()


# ----------------------------------------------------------------------------- idle


def test_idle_gives_an_embedding_a_sparse_gradient_without_rows() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    head = nn.Linear(3, 2)
    idle([head.bias, table.weight, head.weight], [table.weight]).backward()
    grad = table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert (grad.shape, grad._nnz()) == ((5, 3), 0)
    real = torch.autograd.grad(table(torch.tensor([1])).sum(), table.weight)[0]
    assert (grad.sparse_dim(), grad.dense_dim()) == (real.sparse_dim(), real.dense_dim())
    assert head.weight.grad is not None
    assert not head.weight.grad.is_sparse


@pytest.mark.parametrize("value", [1.0, NAN, INF])
def test_idle_gives_each_parameter_a_gradient_of_zeros(value: float) -> None:
    params = [nn.Parameter(torch.full(shape, value)) for shape in ((2, 3), ())]
    zero = idle(params)
    assert zero.item() == 0
    zero.backward()
    for param in params:
        assert param.grad is not None
        assert param.grad.shape == param.shape
        assert param.grad.count_nonzero() == 0
