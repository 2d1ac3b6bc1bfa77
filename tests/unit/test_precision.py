"""The precision slot: full, bfloat16, and float16 with its loss scale."""

import pytest
import torch
from torch import nn

from dtrain.callbacks import MixedPrecision
from dtrain.errors import ConfigError
from dtrain.step.precision import Autocast, Order, Precision, ScaledAutocast


def parameter(value: float = 1.0) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([value]))
    return weight, torch.optim.SGD([weight], lr=1.0)


def test_full_precision_does_nothing() -> None:
    precision, (weight, optimizer) = Precision(), parameter()
    loss = 3 * weight.sum()
    assert precision.scale(loss) is loss
    loss.backward()
    precision.unscale(optimizer, 1.0)
    assert weight.grad is not None
    assert weight.grad.item() == 3
    assert precision.step(optimizer, Order()) is False
    assert weight.item() == -2
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert precision.values() == precision.state_dict() == {}
    precision.load_state_dict({})
    assert precision.name == "full precision"


@pytest.mark.parametrize(
    ("wanted", "dtype", "kind"),
    [("bf16", torch.bfloat16, Autocast), ("fp16", torch.float16, ScaledAutocast)],
)
def test_the_loss_function_computes_in_16_bits(
    wanted: str, dtype: torch.dtype, kind: type[Autocast]
) -> None:
    precision = MixedPrecision(wanted).make_precision("cpu")  # type: ignore[arg-type]
    assert type(precision) is kind
    assert precision.name == f"{str(dtype).removeprefix('torch.')} autocast"
    model = nn.Linear(2, 1)
    with precision.autocast():
        out = model(torch.ones(1, 2))
    assert out.dtype == dtype
    assert model.weight.dtype == torch.float32
    out.sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32


def scaled(init_scale: float = 8.0, growth_interval: int = 2) -> ScaledAutocast:
    return ScaledAutocast("cpu", torch.float16, init_scale, growth_interval)


def one_step(
    precision: Precision, weight: nn.Parameter, optimizer: torch.optim.Optimizer, slope: float
) -> bool:
    optimizer.zero_grad()
    precision.scale(slope * weight.sum()).backward()
    precision.unscale(optimizer, 1.0)
    return not precision.step(optimizer, Order())


def test_gradients_are_scaled_and_unscaled() -> None:
    precision, (weight, optimizer) = scaled(), parameter()
    precision.scale(3 * weight.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.item() == 24
    precision.unscale(optimizer, 1.0)
    assert weight.grad.item() == 3
    assert precision.step(optimizer, Order()) is False
    assert weight.item() == -2


def test_the_scale_grows_and_an_overflow_halves_it() -> None:
    precision, (weight, optimizer) = scaled(), parameter()
    seen = []
    for slope in (1.0, 1.0, float("inf"), 1.0, 1.0, float("nan")):
        before = weight.item()
        applied = one_step(precision, weight, optimizer, slope)
        seen.append((applied, precision.values()["loss_scale"]))
        assert weight.item() == before - applied  # a vetoed step leaves the weight as it was
    assert seen == [(True, 8), (True, 16), (False, 8), (True, 8), (True, 16), (False, 8)]


def test_an_overflow_leaves_no_momentum_behind() -> None:
    """A fused SGD that is called in spite of it keeps one that was never written."""
    weight = nn.Parameter(torch.ones(64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    precision = scaled()
    assert not one_step(precision, weight, optimizer, float("inf"))
    assert optimizer.state_dict()["state"] == {}
    assert one_step(precision, weight, optimizer, 2.0)
    assert torch.equal(weight, torch.full((64,), -1.0))


def test_a_step_that_is_vetoed_and_overflows_is_not_taken_off_twice() -> None:
    """A fused optimizer takes what blocks it off its count of steps."""
    weight = nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    precision = scaled()
    for slope, veto in ((1.0, 0.0), (float("inf"), 1.0)):
        optimizer.zero_grad()
        precision.scale(slope * weight.sum()).backward()
        precision.unscale(optimizer, 1.0)
        blocked = precision.step(optimizer, Order(torch.tensor(veto), waits=False))
        assert blocked.item() == veto
        assert optimizer.state[weight]["step"].item() == 1
    assert precision.values() == {"loss_scale": 8.0}  # a veto leaves it, whatever overflowed


def test_a_closed_step_changes_neither_weight_nor_scale() -> None:
    precision, (weight, optimizer) = scaled(), parameter()
    for slope in (1.0, float("inf")):
        optimizer.zero_grad()
        precision.scale(slope * weight.sum()).backward()
        precision.unscale(optimizer, 1.0)
        assert precision.step(optimizer, Order(closed=True)) is True
    assert precision.values() == {"loss_scale": 8.0}
    assert weight.item() == 1


def test_a_step_in_which_no_parameter_got_a_gradient() -> None:
    precision, (weight, optimizer) = scaled(), parameter()
    precision.unscale(optimizer, 1.0)
    assert precision.step(optimizer, Order(closed=True)) is True
    assert precision.values() == {"loss_scale": 8.0}
    assert weight.item() == 1


def test_a_skipped_step_still_adapts_the_scale() -> None:
    precision, (weight, optimizer) = scaled(), parameter()
    for slope, scale in ((float("inf"), 4.0), (1.0, 4.0), (1.0, 8.0)):
        optimizer.zero_grad()
        precision.scale(slope * weight.sum()).backward()
        precision.unscale(optimizer, 1.0)
        precision.skip()
        assert precision.values() == {"loss_scale": scale}
    assert weight.item() == 1


def test_a_resumed_scale_grows_when_the_other_would_have() -> None:
    one, another = scaled(growth_interval=3), scaled(growth_interval=3)
    (weight, optimizer) = parameter()
    one_step(one, weight, optimizer, float("inf"))
    one_step(one, weight, optimizer, 1.0)
    another.load_state_dict(one.state_dict())
    scales = []
    for precision in (one, another):
        for _ in range(2):
            one_step(precision, weight, optimizer, 1.0)
            scales.append(precision.values()["loss_scale"])
    assert scales == [4, 8, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "fp32"}, "MixedPrecision('fp32'): choose 'bf16' or 'fp16'"),
        ({"dtype": "fp16", "init_scale": 0.0}, "init_scale=0.0 must be more than 0"),
        ({"dtype": "fp16", "growth_interval": 0}, "growth_interval=0 1 or more"),
    ],
)
def test_arguments_that_are_off_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        MixedPrecision(**arguments)  # type: ignore[arg-type]
    assert words in str(raised.value)
