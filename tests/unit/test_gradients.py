"""Normalisation and clipping as one number: what optimizers, callbacks and norms make of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.step.gradients import Gradients
from dtrain.step.precision import Precision
from dtrain.step.strategy import Gate, joint_norm

GRADS = [3.0, 4.0]  # of norm 5
FACTORS: dict[str, Any] = {
    "nothing": 1.0,
    "a number": 0.5,
    "a larger number": 4.0,
    "of the device": torch.tensor(0.5),
}


def made(factor: Any, *, fused: bool) -> tuple[Gradients, list[Tensor]]:
    grads = [torch.tensor([GRADS[0]]), torch.tensor([GRADS[1]])]
    strategy: Any = SimpleNamespace(
        gradients=lambda _: grads,
        norm_of=joint_norm,
        gradient_norm=lambda _: joint_norm(grads),
        norm_is_of=lambda given: given is grads,
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    gradients = Gradients(strategy, Precision(), may_wait=True, on_host=False)
    gate = Gate(factor, 1 / factor, closed=False, undone=False, waits=False)
    gradients.take(optimizer, gate)
    return gradients, grads


def final(gradients: Gradients, grads: list[Tensor]) -> list[float]:
    """As the optimizer uses them."""
    left = gradients.divisor
    by = 1.0 if left is None else gradients.number_of(left)
    assert left is None or (isinstance(by, Tensor) and by.dtype == torch.float32 and not by.dim())
    return [float(grad / by) for grad in grads]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("max_norm", [None, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("asks", ["nobody", "before", "after"])
def test_whoever_looks_finds_the_same(
    fused: bool, factor: Any, max_norm: float | None, asks: str
) -> None:
    gradients, grads = made(factor, fused=fused)
    wanted = [grad * float(factor) for grad in GRADS]
    if asks == "before":
        assert torch.cat(gradients.tensors()).tolist() == pytest.approx(wanted)
    assert float(gradients.norm()) == pytest.approx(5 * float(factor))
    assert torch.isfinite(gradients.check())
    if max_norm is not None:
        assert float(gradients.clip(max_norm)) == pytest.approx(5 * float(factor))
        shrunk = min(1.0, max_norm / (5 * float(factor) + 1e-6))
        wanted = [grad * shrunk for grad in wanted]
        norm = 5 * float(factor) * shrunk
        assert float(gradients.norm()) == pytest.approx(norm)
    if asks == "after":
        assert torch.cat(gradients.tensors()).tolist() == pytest.approx(wanted)
        assert gradients.divisor is None
        grads[0].mul_(2)  # changes what the norm is of
        assert float(gradients.norm()) == pytest.approx(
            (4 * wanted[0] ** 2 + wanted[1] ** 2) ** 0.5
        )
        wanted[0] *= 2
    assert final(gradients, grads) == pytest.approx(wanted)
    waits = fused and asks != "before" and asks != "after"
    assert (grads[0].item() == GRADS[0]) == (waits or wanted[0] == GRADS[0])


@pytest.mark.parametrize("looks", [False, True])
def test_a_guard_and_clipping_share_one_norm(monkeypatch: pytest.MonkeyPatch, looks: bool) -> None:
    """While nobody changes the gradients; then each computes its own."""
    computed: list[int] = []

    def counting(grads: list[Tensor]) -> Tensor:
        computed.append(len(grads))
        return joint_norm(grads)

    gradients, grads = made(0.5, fused=True)
    monkeypatch.setattr(gradients.strategy, "norm_of", counting)
    gradients.strategy.gradient_norm = lambda _: counting(grads)  # type: ignore[method-assign]
    assert float(gradients.check()) == 5
    if looks:
        gradients.tensors()[0].mul_(0.0)
    assert float(gradients.clip(1.0)) == pytest.approx(2.0 if looks else 2.5)
    assert len(computed) == 1 + looks


def test_a_norm_that_is_nearly_nothing_is_not_blown_up() -> None:
    """As torch's: 1e-6 is added to the norm, whatever it is divided by."""
    for factor in (1.0, 1e-3, torch.tensor(1e-3)):
        gradients, grads = made(factor, fused=True)
        for grad in grads:
            grad.mul_(1e-7 / float(factor))
        gradients.clip(1e-6)
        norm = 5e-7
        shrunk = min(1.0, 1e-6 / (norm + 1e-6))
        assert final(gradients, grads) == pytest.approx([3e-7 * shrunk, 4e-7 * shrunk], rel=1e-4)


def test_what_is_not_finite_is_seen_by_norm_and_check() -> None:
    for bad in (float("nan"), float("inf")):
        gradients, grads = made(0.5, fused=True)
        grads[1].fill_(bad)
        assert not torch.isfinite(gradients.check())
        assert not torch.isfinite(gradients.clip(1.0))
        assert not torch.isfinite(gradients.check())
