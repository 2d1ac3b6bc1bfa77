"""The lane on an accelerator says what the host's says; the CPU stands in for the device."""

import gc
import math
from typing import Any
from weakref import ref

import pytest
import torch
from stand_in import StandIn
from torch import nn

from dtrain.step.device_lane import DeviceLane
from dtrain.step.lane import Heard, Lane, Slot

NAN, INF = float("nan"), float("inf")

STEPS: dict[str, list[Any]] = {  # what each rank has in a step: losses, weights, and what it says
    "equal": [[(1.5, 4.0)], [(2.5, 4.0)]],
    "ragged": [[(1.5, 4.0)], [(2.5, 1.0)]],
    "accumulated": [[(1.5, 4.0), (0.5, 4.0), (3.0, 2.0)], [(2.5, 4.0), (1.0, 4.0)]],
    "many": [[(float(n), 1.0) for n in range(20)], [(float(-n), 2.0) for n in range(19)]],
    "one is idle": [[(1.5, 4.0)], []],
    "none has any": [[], []],
    "not finite": [[(NAN, 4.0), (1.0, 4.0)], [(INF, 4.0)]],
    "an error": [[(1.5, 4.0), Slot.ERROR], [(2.5, 4.0)]],
    "leaving": [[(1.5, 4.0)], [Slot.LEAVING]],
    "some have changed": [[(1.5, 4.0), Slot.CHANGED], [(2.5, 4.0)]],
    "all have changed": [[(1.5, 4.0), Slot.CHANGED], [(2.5, 4.0), Slot.CHANGED]],
    "votes": [[(1.5, 300.0), Slot.STOP, Slot.FED], [(2.5, 4.0), Slot.SAVE, Slot.SKIPPED]],
}


def take_step(lanes: list[Any], step: list[Any], *, on_device: bool = False) -> list[Heard]:
    """Has ranks say what they have, and hear the mean; weights may be known to the device only."""
    grads = []
    for one, had in zip(lanes, step, strict=False):
        one.open()
        one.expect(8.0)
        for what in had:
            if isinstance(what, Slot):
                one.say(what)
                continue
            loss = torch.tensor(what[0], requires_grad=True)
            weight = torch.tensor(what[1]) if on_device else what[1]
            one.backward(None, one.add(loss, weight, int(what[1])))
            assert loss.grad is not None
            grads.append(loss.grad.item())
    size = len(lanes)
    mean = (torch.stack([one.message().clone() for one in lanes]) * (1 / size)).sum(0)
    heard = [one.listen(None if one.is_alone() else mean) for one in lanes]
    assert grads == [
        what[1] * size / 8 for had in step[:size] for what in had if what.__class__ is tuple
    ]
    return heard


def lanes(kind: type[Lane], size: int, **more: Any) -> list[Lane]:
    return [kind(nn.Linear(2, 1), rank, size, **more) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("on_device", [False, True], ids=["known weights", "weights on the device"])
def test_it_says_what_the_hosts_says(case: str, size: int, on_device: bool) -> None:
    step = STEPS[case]
    here, there = lanes(Lane, size), lanes(DeviceLane, size, accelerator=StandIn())
    for turn in range(3):  # buffers take turns
        known = take_step(here, step)
        found = take_step(there, step, on_device=on_device)
        for one, other in zip(known, found, strict=True):
            verdict = one.verdict()
            factor, divisor, veto, loss = (
                float(x) for x in (other.factor(), other.divisor(), other.veto(), other.loss())
            )
            other.send(other.veto())
            assert other.blocked() == bool(veto)
            near = pytest.approx(verdict._asdict(), rel=1e-6, nan_ok=True)
            assert other.verdict()._asdict() == near, turn
            assert factor == pytest.approx(verdict.factor, rel=1e-6)
            assert divisor == pytest.approx(1 / verdict.factor if verdict.factor else 1, rel=1e-6)
            some_changed = 0 < verdict.changed < size
            gone = verdict.errors + verdict.leaving > 0 or some_changed
            assert bool(veto) == (gone or not verdict.weight > 0)
            mean = 0.0 if size > 1 and not verdict.weight else verdict.loss_mean
            if verdict.weight:
                assert loss == pytest.approx(mean, rel=1e-6, nan_ok=True)


def test_a_reduction_that_did_not_happen_is_vetoed() -> None:
    for divided in (False, True):
        for one in lanes(DeviceLane, 3, accelerator=StandIn()):
            one.open()
            one.add(torch.tensor(1.0, requires_grad=True), 4.0, 4)
            message = one.message() / (3 if divided else 1)
            assert float(one.listen(message).veto()) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_what_came_of_the_update_comes_home_with_the_rest(size: int) -> None:
    counts = (stand_in := StandIn()).counts
    one = lanes(DeviceLane, size, accelerator=stand_in)[0]
    made = dict(counts)
    for blocked, held in ((1.0, None), (0.0, 0.0), (1.0, 1.0), (0.0, None)):
        one.open()
        one.add(torch.tensor(3.0, requires_grad=True), 4.0, 4)
        heard = one.listen(None if size == 1 else one.message().clone())
        flag = torch.tensor(blocked)
        heard.send(flag, None if held is None else torch.tensor(held))
        flag.fill_(7.0)  # on its way by then
        assert heard.blocked() is (blocked > 0)
        assert heard.held() == (0 if not blocked else held)
        if size == 1:
            assert heard.verdict().loss_mean == 3
    assert counts["records"] == 4
    assert {name: counts[name] for name in made} == made  # no new buffer, no new event


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("sends", [False, True], ids=["a step that failed", "a step"])
def test_nothing_of_it_is_left_for_the_garbage_collector(size: int, sends: bool) -> None:
    """Which does not know how much of the device's memory waits for it."""
    one = DeviceLane(nn.Linear(2, 1), 0, size, accelerator=StandIn())
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            one.open()
            one.add(loss := torch.tensor(3.0, requires_grad=True), 4.0, 4)
            heard = one.listen(None if size == 1 else one.message().clone())
            if sends:
                heard.send(False)
        kept = [ref(turn) for turn in one._turns] + [ref(one._turns[0].heeded), ref(loss)]
        del one, heard, loss
        assert [turn() for turn in kept] == [None] * 4
    finally:
        gc.enable()


def test_who_asks_before_the_update_gets_the_same() -> None:
    one = lanes(DeviceLane, 1, accelerator=StandIn())[0]
    one.open()
    one.add(torch.tensor(3.0, requires_grad=True), 4.0, 4)
    heard = one.listen()
    assert heard.verdict().loss_mean == 3  # as a guard does in on_grads_ready
    heard.send(torch.tensor(1.0))
    assert heard.blocked() is True
    assert heard.verdict().loss_mean == 3


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_nobody_looked_at_keeps_its_own(size: int) -> None:
    """An exception may have come between: two steps later its buffers are filled anew."""
    one = lanes(DeviceLane, size, accelerator=StandIn())[0]
    heard = []
    for value in (1.0, 2.0, 3.0, 4.0):
        one.open()
        one.add(torch.tensor(value, requires_grad=True), 4.0, 4)
        mean = one.message() * (torch.arange(len(Slot)) != 0) + (torch.arange(len(Slot)) == 0) * (
            (2 * size - 1) / size
        )
        heard.append(one.listen(None if size == 1 else mean))
        heard[-1].send(False)
    assert [round(each.verdict().loss_mean, 5) for each in heard] == [1, 2, 3, 4]
    assert not any(each.blocked() for each in heard)
    assert math.isfinite(heard[0].verdict().weight)
