"""A training for the tests, and the same written by hand."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients, MixedPrecision

BATCH, CLIP = 32, 0.5


def dataset(samples):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 64, generator=generator)
    return TensorDataset(x, x[:, :10].argmax(1))


def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 256), nn.GELU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def loss_fn(net, batch):
    x, y = batch
    logits = net(x)
    accuracy = (logits.argmax(-1) == y).float().mean()
    return dtrain.Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy})


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


@dataclass
class Figures:
    """What became of a training.

    Attributes:
        losses: of each step.
        scales: the loss scale after each step, or nothing.
        weights: all parameters, one after the other, on the CPU.
        steps: what the optimizer has counted, or nothing.
    """

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    weights: torch.Tensor | None = None
    steps: list[float] = field(default_factory=list)

    def finish(self, net, optimizer):
        self.weights = flat(net)
        self.steps = sorted({float(s["step"]) for s in optimizer.state.values() if "step" in s})
        return self


def flat(net):
    return torch.cat([p.detach().cpu().reshape(-1) for p in net.parameters()])


def by_hand(device, *, steps, dtype=None, optimizer=adamw, scale=None, compiled=None, spikes=()):
    """The loop that one would write; in ``spikes``, steps, the loss is a million times larger."""
    net = model().to(device)
    call = net if compiled is None else torch.compile(net, backend=compiled)
    opt, found = optimizer(net), Figures()
    scaler = torch.amp.GradScaler(
        device.type, init_scale=scale or 1.0, growth_interval=4, enabled=scale is not None
    )
    rows = [tensor.to(device) for tensor in dataset(steps * BATCH).tensors]
    for number in range(steps):
        x, y = (tensor[number * BATCH : (number + 1) * BATCH] for tensor in rows)
        opt.zero_grad()
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(call(x), y) * (1e6 if number in spikes else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        scaler.step(opt)
        scaler.update()
        found.losses.append(loss.item())
        if scale is not None:
            found.scales.append(scaler.get_scale())
    return found.finish(net, opt)


class Watch(dtrain.Callback):
    """Looks at each step once it has arrived, so that the training need not wait."""

    late_step_end = True

    def __init__(self, trainer=None):
        self.figures = Figures()
        self.applied = []
        self.precision = None

    def on_step_end(self, ctx, step):
        self.figures.losses.append(step.loss_mean)
        self.applied.append(step.applied)


class Scales(dtrain.Callback):
    """The loss scale after each step; reading it waits."""

    def __init__(self):
        self.seen = []
        self.precision = None

    def on_step_end(self, ctx, step):
        self.seen += self.precision.values().values()


def with_dtrain(
    *, steps, precision=None, optimizer=adamw, scale=None, compiled=None, spikes=(), callbacks=()
):
    """The same by dtrain; returns its figures, which steps were applied, and the trainer."""
    dtrain.init(seed=0)
    net = model()
    watch, scales = Watch(), Scales()
    options = {} if scale is None else {"init_scale": scale, "growth_interval": 4}

    def loss(net, batch, ctx):
        x, y = batch
        return F.cross_entropy(net(x), y) * (1e6 if ctx.progress.step in spikes else 1.0)

    trainer = dtrain.Trainer(
        net if compiled is None else torch.compile(net, backend=compiled),
        optimizer,
        loss,
        callbacks=[
            *([] if precision is None else [MixedPrecision(precision, **options)]),
            ClipGradients(CLIP),
            watch,
            *([] if scale is None else [scales]),
            *callbacks,
        ],
        sinks=[],
        strategy="ddp",  # in one flat tensor, a norm is added up in another order
    )
    scales.precision = trainer.precision
    trainer.fit(dtrain.Data(dataset(steps * BATCH), BATCH, shuffle=False), max_steps=steps)
    watch.figures.scales = scales.seen
    return watch.figures.finish(net, trainer.optimizer), watch.applied, trainer
