"""What a step does with its numbers where they are on a device: meta, which has none to read.

Reading one is an error there, and each copy between host and device is seen.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtrain.callbacks.clip_gradients import _clip
from dtrain.metrics.means import Means
from dtrain.step.lane import Heard, Lane, Slot
from dtrain.step.precision import ScaledAutocast
from dtrain.step.strategy import joint_norm

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


@pytest.mark.parametrize("weight", [4, torch.ones((), device=META)], ids=["number", "tensor"])
def test_nothing_is_read_and_only_the_message_is_copied(weight):
    model = nn.Linear(4, 2, device=META)
    optimizer = torch.optim.AdamW(model.parameters())
    lane, means = Lane(model, rank=0, size=1), Means("train", META)
    precision = ScaledAutocast("cpu", torch.float16, 8.0, 10)
    with Copies() as copies:
        lane.open()
        voice = lane.attach()
        loss = model(torch.ones(4, 4, device=META)).mean()
        lane.say(Slot.FED)
        lane.backward(voice, precision.scale(lane.add(loss, weight, 4)))
        assert lane.param.grad is not None
        heard = Heard(lane.param.grad, [], 1.0, 1, 1e-6)
        factor, veto = heard.factor(), heard.veto()
        assert precision.unscale(optimizer, factor) == 1.0
        grads = [p.grad for p in model.parameters()]
        torch._foreach_mul_(grads, factor)
        norm = joint_norm(grads)
        _clip(SimpleNamespace(gradients=lambda: grads), norm, 1.0)
        means.add("norm", norm, weight)
        means.add_logged("logged", [norm, 1.0, norm], "mean")
        means.add("norm", 0.5, 1)
        precision._scaler.update_unless(veto)
    assert copies.seen == [("aten._to_copy.default", True)]


def test_the_check_can_fail():
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.ones((), device=META).item()
    with Copies() as copies:
        torch.ones(()).to(META)
    assert copies.seen == [("aten._to_copy.default", None)]
