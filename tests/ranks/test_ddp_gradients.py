"""With DDP, what is done to `ctx.gradients()` is done to all gradients, and to nothing else."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import dtrain
from dtrain.callbacks import ClipGradients, Freeze
from dtrain.step.gradients import Gradients
from dtrain.step.precision import Precision
from dtrain.step.strategy import Gate
from dtrain.testing import run_processes


class Twofold(nn.Module):
    """Convolutions, one of them with its channels last, and a part that may stay unused."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.second = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


class Looks(dtrain.Callback):
    """Compares gradients with what `ctx.gradients()` covers, before and after it is changed."""

    def __init__(self, *, replaces):
        self.replaces, self.stretches = replaces, []

    def on_grads_ready(self, ctx, step):
        grads = [p.grad for p in ctx.model.parameters() if p.grad is not None]
        if self.replaces and step.number > 1:
            grads[0].data = grads[0].data.clone()  # the same tensor, elsewhere in memory
        held = ctx.gradients()
        self.stretches.append(len(held))
        before = torch.cat([grad.flatten() for grad in grads])
        assert sum(one.numel() for one in held) == before.numel()
        assert torch.equal(torch.cat([one.flatten() for one in held]).sort()[0], before.sort()[0])
        assert torch.equal(ctx.gradient_norm(), torch.nn.utils.get_total_norm(grads))
        torch._foreach_mul_(held, 2.0)
        assert torch.equal(torch.cat([grad.flatten() for grad in grads]), 2 * before)


def look(case):
    dtrain.init(seed=0)
    looks = Looks(replaces=case == "replaced")
    strategy = dtrain.strategies.DDP(find_unused_parameters=case == "unused")
    net = Twofold()
    if case != "unused":
        del net.unused
    callbacks = [Freeze("first", until_epoch=1), looks] if case == "frozen" else [looks]
    images = torch.randn(24, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(24) % 3)
    tiny.trainer(
        callbacks,
        net=net,
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        strategy=strategy,
    ).fit(data, batch_size=6, epochs=2)
    return looks.stretches


@pytest.mark.parametrize("case", ["plain", "replaced", "frozen", "unused"])
def test_gradients_are_covered(case):
    for stretches in run_processes(look, 2, case):
        assert len(stretches) == 8
        if case in ("plain", "frozen"):
            assert set(stretches) == {1}  # one bucket
        if case == "replaced":
            assert stretches[0] == 1
            assert min(stretches[2:]) >= 2


def test_a_gradient_of_nan_is_clipped_to_nan():
    grads = [torch.tensor([torch.nan]), torch.tensor([1e6])]
    strategy = SimpleNamespace(
        gradients=lambda _: grads, gradient_norm=lambda _: torch.nn.utils.get_total_norm(grads)
    )
    gradients = Gradients(strategy, Precision(), may_wait=False, on_host=True)
    gradients.take(None, Gate(1.0, 1.0, closed=False, undone=False, waits=True))
    context = SimpleNamespace(clip_gradient_norm=gradients.clip, log=lambda name, value: None)
    ClipGradients(1.0).on_grads_ready(context, SimpleNamespace(update=""))
    assert all(bool(grad.isnan().all()) for grad in grads)
