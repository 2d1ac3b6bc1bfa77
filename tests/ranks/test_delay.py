"""Steps that are not waited for, as on CUDA: the same run, though outcomes arrive a step later.

No GPU is needed: the loop's mode is forced, with fused optimizers of the CPU, which honour
``found_inf`` as those of CUDA do.
"""

import pytest
import tiny
import torch
from ahead import run_ahead
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

import dtrain
import dtrain.trainer
from dtrain.callbacks import (
    EMA,
    ClipGradients,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    StochasticWeightAveraging,
)
from dtrain.errors import DtrainError, UnusedParameters
from dtrain.testing import run_processes


class Watch(dtrain.Callback):
    """What hooks see, without asking for anything that is on its way."""

    def __init__(self):
        self.rates = {}
        self.steps = []

    def on_grads_ready(self, ctx, step):
        self.rates[step.number] = ctx.optimizer.param_groups[0]["lr"]

    def on_step_end(self, ctx, step):
        self.steps.append((step.number, ctx.progress.step, ctx.progress.epoch))


class Skips(dtrain.Callback):
    """All ranks skip step 3, rank 0 skips step 5."""

    def on_batch(self, ctx, step):
        first = step.batch[1].numel() and dtrain.init(seed=0).rank == 0
        if step.number == 3 or (step.number == 5 and first):
            ctx.request.skip("planted")


def nan_at_four(net, batch, ctx):
    loss = tiny.loss_fn(net, batch)
    if ctx.progress.step == 4 and dtrain.init(seed=0).rank == 0:
        loss.mean = loss.mean * float("nan")
    return loss


def fused(kind, **options):
    return lambda net: kind(net.parameters(), lr=1e-2, fused=True, **options)


def schedule():
    return LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.9))


ADAM = fused(torch.optim.AdamW)
CASES = {
    "plain": (lambda: [schedule()], ADAM, tiny.loss_fn, torch.float64),
    "skips": (lambda: [Skips(), schedule()], ADAM, tiny.loss_fn, torch.float64),
    "momentum": (
        lambda: [Skips(), schedule(), ClipGradients(0.1)],
        fused(torch.optim.SGD, momentum=0.9),
        tiny.loss_fn,
        torch.float64,
    ),
    "accumulated": (
        lambda: [Skips(), ClipGradients(0.5), GradientAccumulation(3), EMA(0.9), schedule()],
        ADAM,
        tiny.loss_fn,
        torch.float64,
    ),
    # Counted in updates, which a step is not among before its outcome is known.
    "every": (
        lambda: [Skips(), EMA(0.9, every=2), StochasticWeightAveraging(1, every_steps=3)],
        ADAM,
        tiny.loss_fn,
        torch.float64,
    ),
    "guard": (lambda: [NonFiniteGuard("skip"), schedule()], ADAM, nan_at_four, torch.float64),
    # A scale that overflows at first, grows, and must not change where all ranks skip.
    "fp16": (
        lambda: [
            MixedPrecision("fp16", init_scale=2.0**19, growth_interval=2),
            Skips(),
            ClipGradients(0.5),
            schedule(),
        ],
        ADAM,
        tiny.loss_fn,
        torch.float32,
    ),
}


def train(name, delays):
    run_ahead(delays)
    callbacks, optimizer, loss, dtype = CASES[name]
    watch = Watch()
    dtrain.init(seed=0)
    run = tiny.trainer(
        [*callbacks(), watch], net=tiny.model(dtype=dtype), optimizer=optimizer, loss=loss
    )
    x, y = tiny.dataset(90).tensors
    data = torch.utils.data.TensorDataset(x.to(dtype), y)
    result = run.fit(data, batch_size=24, epochs=4, log_every=3, eval_set=data)
    progress = run.context.progress
    return {
        "bits": (tiny.digest(run.model), repr(run.optimizer.state_dict())),
        "weights": torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]).tolist(),
        "history": result.history,
        "counts": (progress.step, progress.updates, progress.samples, progress.epoch),
        "scale": run.precision.values(),
        "rates": watch.rates,
        "steps": watch.steps,
    }


def both_ways():
    return {name: (train(name, False), train(name, True)) for name in CASES}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_delayed_run_is_the_same_run(world_size):
    for found in run_processes(both_ways, world_size, timeout_s=100):
        for name, (at_once, delayed) in found.items():
            rates = delayed.pop("rates"), at_once.pop("rates")
            rows = delayed.pop("history"), at_once.pop("history")
            weights = delayed.pop("weights"), at_once.pop("weights")
            if world_size == 1:
                # On an accelerator its gradients are not flat: a norm is added up otherwise.
                bits = delayed.pop("bits"), at_once.pop("bits")
                assert "ClipGradients" in str(CASES[name][0]()) or bits[0] == bits[1], name
                near = {"abs": 1e-6} if name == "fp16" else {"rel": 1e-12}
                assert weights[0] == pytest.approx(weights[1], **near), name
            assert delayed == at_once, name
            # One rank alone adds its losses up on the host, in 64 bits.
            rel = 1e-6 if name == "fp16" else 1e-12
            for row, other in zip(*rows, strict=True):
                assert row == pytest.approx(other, rel=rel, nan_ok=True), name
            # Also in a step that all skip, with gradients of zero.
            assert rates[0] == rates[1], name
            assert len(rates[0]) == 16, name
            assert len(at_once["steps"]) == 16
        assert found["skips"][0]["counts"][1] == (14 if world_size == 1 else 15)
        assert found["guard"][0]["counts"][1] == 15
        assert 8 < found["fp16"][0]["counts"][1] < 15


# ------------------------------------------------------------------------------ noticed late


class StopAtStep(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if step.number == 4 and dtrain.init(seed=0).rank == 0:
            ctx.request.stop("enough")


class Reads(dtrain.Callback):
    """Whoever asks is told the truth, in the step itself."""

    def __init__(self):
        self.seen = []

    def on_grads_ready(self, ctx, step):
        self.seen.append((step.loss_mean, step.weight, step.nonfinite))

    def on_step_end(self, ctx, step):
        self.seen.append(step.applied)


def noticed(delays):
    run_ahead(delays)
    found = {}

    def fit(callbacks, loss=tiny.loss_fn, net=None, **options):
        run = tiny.trainer(callbacks, optimizer=ADAM, loss=loss, net=net)
        try:
            result = run.fit(tiny.dataset(90), batch_size=24, **options)
            return run, (result.steps, result.stop_reason)
        except (DtrainError, ValueError) as error:
            return run, f"{type(error).__name__}: {error}"

    run, found["stop"] = fit([StopAtStep()], epochs=4)
    reads = Reads()
    fit([reads, Skips()], epochs=2)
    found["reads"] = reads.seen

    planted = [dtrain.init(seed=0).size - 1]

    def fails(net, batch, ctx):
        if ctx.progress.step == 3 and dtrain.init(seed=0).rank in planted:
            raise ValueError("planted")
        return tiny.loss_fn(net, batch)

    run, found["error"] = fit([], loss=fails, epochs=4)
    found["left"] = tiny.digest(run.model)
    planted.clear()
    run.fit(tiny.dataset(90), batch_size=24, max_steps=8)
    found["went on"] = tiny.digest(run.model), run.context.progress.samples
    run, _ = fit([], max_steps=3, name="main")
    found["before"] = tiny.digest(run.model)
    run.fit(tiny.dataset(90), batch_size=24, max_steps=8, name="main")
    found["unbroken"] = tiny.digest(run.model), run.context.progress.samples

    class Unused(torch.nn.Module):
        """From step 5 on, a layer is left out."""

        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)

        def forward(self, x, late):
            return self.used(x) if late else self.used(x) + self.unused(x)

    def leaves_out(net, batch, ctx):
        return F.cross_entropy(net(batch[0], ctx.progress.step >= 5), batch[1])

    torch.manual_seed(0)
    run, found["unused"] = fit([], loss=leaves_out, net=Unused(), epochs=4)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_noticed_late_has_changed_nothing(world_size):
    at_once = run_processes(noticed, world_size, False)
    delayed = run_processes(noticed, world_size, True)
    for found, first in zip(delayed, at_once, strict=True):
        assert first["stop"] == (6, first["stop"][1])
        assert found["stop"] == (7, first["stop"][1])  # one step later, at every world size
        assert found["reads"][:3] == first["reads"][:3]
        assert [one for one in found["reads"] if isinstance(one, bool)] == [
            one for one in first["reads"] if isinstance(one, bool)
        ]
        assert "planted" in found["error"]
        assert found["error"] == first["error"]
        assert found["left"] == found["before"] == first["left"]
        # The failed step is taken again.
        assert found["went on"] == found["unbroken"]
        assert first["went on"] == first["unbroken"]
        if world_size > 1:
            assert found["unused"].startswith(UnusedParameters.__name__)
            assert "unused.weight, unused.bias" in found["unused"]
