"""What a step does with its numbers where they are on a device: meta, which has none to read.

Reading one is an error there, and each copy between host and device is seen.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtrain import accelerator
from dtrain.accelerator import Accelerator
from dtrain.metrics.means import Means
from dtrain.step.device_lane import DeviceLane
from dtrain.step.gradients import Gradients
from dtrain.step.lane import Slot
from dtrain.step.precision import Precision, ScaledAutocast
from dtrain.step.strategy import Gate, joint_norm

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Keeps whatever has to do with tensors of both."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append((str(func), (kwargs or {}).get("non_blocking")))
        return out


class OnMeta(Accelerator):
    """Its memory has no numbers; the host's has."""

    def pinned(self, count, dtype):
        return torch.zeros(count, dtype=dtype)

    def captured(self, compute):
        return compute


@pytest.mark.parametrize("weight", [4, torch.ones((), device=META)], ids=["number", "tensor"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "fp16"])
def test_nothing_is_read_and_only_the_message_is_copied(monkeypatch, weight, size, scaled):
    monkeypatch.setattr(OnMeta, "event", lambda self: None)
    monkeypatch.setattr(accelerator, "of", OnMeta)
    model = nn.Linear(4, 2, device=META)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    lane, means = DeviceLane(model, 0, size, accelerator=OnMeta(META)), Means("train", META)
    precision = ScaledAutocast("cpu", torch.float16, 8.0, 10) if scaled else Precision()
    strategy = SimpleNamespace(
        gradients=lambda _: [p.grad for p in model.parameters()],
        gradient_norm=lambda _: joint_norm([p.grad for p in model.parameters()]),
    )
    gradients = Gradients(strategy, precision, may_wait=True, on_host=False)
    with Copies() as copies:
        lane.open()
        voice = lane.attach()
        loss = model(torch.ones(4, 4, device=META)).mean()
        lane.say(Slot.FED)
        lane.backward(voice, lane.add(loss, weight, 4, precision.scale(loss)))
        heard = lane.listen()
        gate = Gate(heard.factor(), heard.divisor(), heard.veto(), undone=False, waits=False)
        gradients.take(optimizer, gate)
        norm = gradients.clip(1.0)
        assert gradients.divisor.device == META
        gradients.tensors()
        means.add("norm", norm, weight)
        means.add_logged("logged", [norm, 1.0, norm], "mean")
        means.add("norm", 0.5, 1)
        if scaled and isinstance(gate.closed, torch.Tensor):
            precision._scaler.update_unless(gate.closed)
    alone = size == 1 and isinstance(weight, int)
    assert isinstance(gate.closed, bool) == alone
    assert copies.seen == [("aten._to_copy.default", True)] * (not alone)


def test_the_check_can_fail():
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.ones((), device=META).item()
    with Copies() as copies:
        torch.ones(()).to(META)
    assert copies.seen == [("aten._to_copy.default", None)]
