"""``Trainer(graph=True)``: replayed, a micro-step computes what it does when it runs by itself.

The CPU stands in for the device, and its graphs for CUDA's: they compute nothing while they are
captured, and a replay overwrites what was written before.
"""

import gc
import random
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import tiny
from stand_in import StandIn
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dtrain
from dtrain.accelerator import Accelerator
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LabelSmoothing,
    LossSpikeGuard,
    MixedPrecision,
    Mixup,
    NonFiniteGuard,
    ParamSchedule,
    StochasticWeightAveraging,
    Throughput,
)
from dtrain.errors import ConfigError, LossError, UnusedParameters
from dtrain.step.graphed import _Captured, _Replayed
from dtrain.strategies import DDP, Flat
from dtrain.testing import run_ranks


@pytest.fixture
def device(monkeypatch):
    return StandIn().install(monkeypatch)


class Watch(dtrain.Callback):
    """Keeps each step's loss, without waiting for it."""

    late_step_end = True

    def __init__(self):
        self.losses = []

    def on_step_end(self, ctx, step):
        self.losses.append(step.loss_mean)


def noisy():
    """A model with dropout, and with buffers that each forward changes."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 2)
    )


def soft_loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def fused(net):
    return tiny.adam(net, fused=True)


def train(*, graph, callbacks=(), samples=52, fit=None, **options):
    """Trains, with a ragged last batch; returns all that must not depend on ``graph``."""
    watch = Watch()
    options = {"net": noisy(), "optimizer": fused, "strategy": "flat"} | options
    trainer = tiny.trainer([*callbacks, watch], graph=graph, **options)
    data, more = tiny.dataset(samples), {"batch_size": 12, "epochs": 2, "log_every": 7}
    result = trainer.fit(data, eval_set=tiny.dataset(10), **(more | (fit or {})))
    metrics = {k: v for k, v in result.metrics.items() if not k.startswith("throughput")}
    return tiny.digest(trainer.model), watch.losses, repr(metrics), result.updates  # NaN: equal


CALLBACKS = {
    "none": list,
    "clipped": lambda: [ClipGradients(0.3)],
    "bf16": lambda: [MixedPrecision("bf16"), ClipGradients(0.3)],
    "fp16": lambda: [MixedPrecision("fp16", init_scale=2.0**20), ClipGradients(0.3)],
    "averages": lambda: [EMA(0.9), GradientStats(), Throughput()],
    "guards": lambda: [NonFiniteGuard(), LossSpikeGuard(), GradientNoise(0.01)],
    "penalty": lambda: [L1L2Penalty(l1=1e-3, l2=1e-3), Throughput(count_flops=True)],
}


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("name", CALLBACKS)
def test_same_bits_as_one_by_one(device, name, split):
    made, strategy = CALLBACKS[name], "ddp" if name == "clipped" else "flat"
    more = [GradientAccumulation(split)] if split > 1 else []
    plain = train(graph=False, callbacks=[*made(), *more], strategy=strategy)
    assert not device.counts["captures"]
    graphed = train(graph=True, callbacks=[*made(), *more], strategy=strategy)
    assert device.counts["captures"] == 1
    # Of ten steps, two are ragged; the first three of a form run one by one.
    assert device.counts["replays"] == 2 * (8 * split - 3)
    if (name, split) == ("penalty", 2):  # a penalty's gradient is added by itself
        assert graphed[1] == pytest.approx(plain[1], rel=1e-6)
    else:
        assert graphed == plain


class Doubles(dtrain.Callback):
    """Has the gradient be twice as large, in one of three ways."""

    def __init__(self, how):
        self._how = how

    def on_loss(self, ctx, step):
        mean = step.loss.mean
        if self._how == "another loss":
            step.loss.mean = 2 * mean
        elif self._how == "a hook":
            mean.register_hook(lambda grad: 2 * grad)
        else:
            mean.mul_(2)


@pytest.mark.parametrize("how", [None, "another loss", "a hook", "in place"])
def test_a_backward_that_is_only_replayed_needs_no_autograd(device, monkeypatch, how):
    asked, backward = [], _Replayed.backward

    def counting(ctx, *grads):
        asked.append(1)
        return backward(ctx, *grads)

    monkeypatch.setattr(_Replayed, "backward", staticmethod(counting))
    made = [] if how is None else [Doubles(how)]
    plain, graphed = (train(graph=graph, callbacks=made) for graph in (False, True))
    assert graphed == plain
    assert device.counts["replays"] == 2 * 5
    assert len(asked) == (0 if how is None else 5)


def test_a_loss_in_another_precision(device):
    plain, graphed = (
        train(graph=graph, net=noisy().double(), loss=double_loss) for graph in (False, True)
    )
    assert graphed == plain
    assert device.counts["captures"] == 1


def double_loss(net, batch):
    return soft_loss(net, (batch[0].double(), batch[1]))


def test_targets_that_are_mixed(device):
    for made in (lambda: [LabelSmoothing(0.1, 2)], lambda: [Mixup(0.4, 2)]):
        plain, graphed = (
            train(graph=graph, callbacks=made(), loss=soft_loss) for graph in (False, True)
        )
        assert graphed == plain
    assert device.counts["captures"] == 2


@pytest.mark.parametrize("split", [1, 2])
def test_two_ranks(device, split):
    """Their shares of a batch differ, and so do the graphs."""

    def both(graph):
        more = [GradientAccumulation(2)] if split > 1 else []
        fit = {"batch_size": 13}
        return train(graph=graph, callbacks=[ClipGradients(0.3), *more], strategy="auto", fit=fit)

    plain, graphed = (run_ranks(both, 2, graph) for graph in (False, True))
    assert graphed == plain
    assert device.counts["captures"] == 2


def test_several_ranks_meet_after_backward():
    def strategies():
        with pytest.raises(ConfigError, match=r"'ddp' reduces in the middle.*strategy='flat'"):
            tiny.trainer(strategy="ddp", graph=True)
        with pytest.raises(ConfigError, match="'ddp' reduces in the middle"):
            tiny.trainer(strategy=DDP(), graph=True)
        net = nn.Sequential(nn.Embedding(4, 2, sparse=True))
        with pytest.raises(ConfigError, match="several ranks: gradients of 0 are sparse"):
            tiny.trainer(net=net, optimizer=sgd, graph=True)
        large = nn.Linear(8, 1_000_000)
        return isinstance(tiny.trainer(net=large, optimizer=sgd, graph=True)._engine.strategy, Flat)

    assert run_ranks(strategies, 2) == [True, True]
    assert isinstance(tiny.trainer(strategy="ddp", graph=True)._engine.strategy, DDP)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_resumed_and_fitted_again(device, tmp_path):
    """A graph is of one fit; p.grad, which a replay has written, may be there when one begins."""

    def train_on(*, graph):
        place = tmp_path / str(graph)
        ends = []
        for fits in ([6, 12], [18]):
            callbacks = [Checkpoint(every_epochs=1), StochasticWeightAveraging(start_epoch=1)]
            net = noisy()
            run = tiny.trainer(callbacks, net=net, optimizer=fused, graph=graph, run_dir=place)
            for steps in fits:
                run.fit(tiny.dataset(52), batch_size=12, max_steps=steps, name="main")
            ends.append(tiny.digest(net))
        return ends

    assert train_on(graph=True) == train_on(graph=False)
    assert device.counts["captures"] == 3


class Changes(dtrain.Callback):
    """Changes what is trained, or how, in the middle of an epoch."""

    def __init__(self, change):
        self._change = change

    def on_step_start(self, ctx, step):
        if step.number == 6:
            self._change(ctx.model)


def freeze(net):
    net[0].requires_grad_(requires_grad=False)


def rest(net):
    net[1].eval()


def move(net):
    net[0].weight.data = net[0].weight.data.clone()


def replace(net):
    net[1].register_buffer("running_mean", torch.ones(16))


def drop_more(net):
    net[2].p = 0.5


@pytest.mark.parametrize("change", [freeze, rest, move, replace, drop_more])
def test_what_changes_is_captured_anew(device, change):
    plain, graphed = (
        train(graph=graph, callbacks=[Changes(change)], fit={"epochs": 3})
        for graph in (False, True)
    )
    assert graphed == plain
    assert device.counts["captures"] == 2


class Skips(dtrain.Callback):
    def __init__(self, hook):
        self._hook = hook

    def on_batch(self, ctx, step):
        self._skip("on_batch", ctx, step)

    def on_loss(self, ctx, step):
        self._skip("on_loss", ctx, step)
        step.loss.mean += 0.5 * step.loss.mean  # in place

    def _skip(self, hook, ctx, step):
        if hook == self._hook and step.number % 5 == 2 and step.micro == 0:
            ctx.request.skip("planted")


@pytest.mark.parametrize("hook", ["on_batch", "on_loss"])
def test_skips_and_losses_changed_in_place(device, hook):
    plain, graphed = (
        train(graph=graph, callbacks=[Skips(hook), GradientAccumulation(2)])
        for graph in (False, True)
    )
    assert graphed == plain
    assert device.counts["captures"] == 1


def test_batches_of_many_parts_and_weights(device):
    """Dicts and tuples in one another, what is no tensor, and a weight and means on the device."""

    def nested(graph):
        rows = tiny.dataset(100)
        data = [
            {"x": (x,), "y": y, "w": torch.tensor(1.0 + n % 3)} for n, (x, y) in enumerate(rows)
        ]

        def loss(net, batch):
            each = F.cross_entropy(net(batch["x"][0]), batch["y"], reduction="none")
            total, weight = (each * batch["w"]).sum(), batch["w"].sum()
            means = {"own": dtrain.Mean(total.detach(), weight), "two": 2.0, "all": each.mean()}
            return dtrain.Loss.from_sum(total, weight, metrics=means)

        watch = Watch()
        run = tiny.trainer([watch], loss=loss, optimizer=fused, graph=graph)
        result = run.fit(data, batch_size=12, epochs=3)
        return watch.losses, result.metrics, tiny.digest(run.model)

    (losses, metrics, _), (plain_losses, plain_metrics, _) = nested(True), nested(False)
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    assert metrics == pytest.approx(plain_metrics, rel=1e-6)
    assert device.counts["replays"] > 40


LARGE = tiny.dataset(100).tensors[0][:, 0].sort().values[-2].item()


def bad_once(net, batch):
    """NaN in the batch that has one of the rows."""
    x, y = batch
    return F.cross_entropy(net(x), y) * torch.where((x[:, 0] > LARGE).any(), torch.nan, 1.0)


def test_a_loss_that_is_not_finite_is_left_out(device):
    """The guard looks for the cause by itself, one by one, and puts buffers back."""

    def guarded(graph):
        words, watch = tiny.Words(), Watch()
        run = tiny.trainer(
            [NonFiniteGuard(), watch], net=noisy(), loss=bad_once, optimizer=fused, graph=graph
        )
        run._sinks = (words,)
        result = run.fit(tiny.dataset(100), batch_size=12, epochs=3)
        told = [text for text in "\n".join(words.words).splitlines() if "NaN" in text]
        return tiny.digest(run.model), repr(watch.losses), result.updates, told

    plain, graphed = guarded(graph=False), guarded(graph=True)
    assert graphed == plain
    assert "nan" in plain[1]
    assert plain[2] < 27
    assert plain[3]
    assert device.counts["captures"] == 1


def test_a_replayed_micro_step_takes_two_launches_beside_its_graphs(device, monkeypatch):
    """One that copies the batch, and one that copies the figures."""
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    def watched(real):
        def called(*args, **options):
            with Ops():
                return real(*args, **options)

        return called

    monkeypatch.setattr("stand_in._Graph.replay", lambda self: seen.append("replay"))
    monkeypatch.setattr(_Captured, "run", watched(_Captured.run))
    monkeypatch.setattr(_Captured, "run_backward", watched(_Captured.run_backward))
    train(graph=True)
    assert seen[:5] == ["_foreach_copy_", "replay", "_foreach_mul", "copy_", "replay"]
    assert seen[5:] == 4 * ["_foreach_copy_", "replay", "_foreach_mul", "replay"]


# -- what a graph cannot hold ------------------------------------------------------------------


def reads_progress(net, batch, ctx):
    return soft_loss(net, batch) * (1 + ctx.progress.step)


def logs(net, batch, ctx):
    ctx.log("x", 1.0)
    return soft_loss(net, batch)


def gathers(net, batch, ctx):
    ctx.comm.gather_with_grad("x", batch[0])
    return soft_loss(net, batch)


def skips(net, batch, ctx):
    ctx.request.skip("no")
    return soft_loss(net, batch)


def draws(net, batch):
    return soft_loss(net, batch) * random.random()


def draws_numpy(net, batch):
    return soft_loss(net, batch) * np.random.random()  # noqa: NPY002


def weighs_by_hand(net, batch):
    return dtrain.Loss(soft_loss(net, batch), weight=float(batch[0].sum().abs()) + 1)


class Object:
    def update(self): ...
    def compute(self): ...


def keeps_score(net, batch):
    return dtrain.Loss(soft_loss(net, batch), metrics={"f1": Object()})


REFUSED = {
    reads_progress: (ConfigError, "uses ctx.progress, and a graph would keep"),
    logs: (ConfigError, "uses ctx.log"),
    gathers: (ConfigError, "uses ctx.comm"),
    skips: (ConfigError, "uses ctx.request"),
    draws: (LossError, r"draws random numbers on the host \(random\)"),
    draws_numpy: (LossError, r"draws random numbers on the host \(numpy.random\)"),
    weighs_by_hand: (LossError, "the loss's weight is a number of the host that was .* and is"),
    keeps_score: (LossError, "the metric 'f1' is an object that adds up on the host"),
}


@pytest.mark.parametrize("has_device", [True, False], ids=["device", "cpu"])
@pytest.mark.parametrize("loss", REFUSED, ids=lambda loss: loss.__name__)
def test_what_a_graph_would_freeze_is_refused(monkeypatch, loss, has_device):
    """Also where there is none, so that a script behaves alike; before anything is captured."""
    stand_in = StandIn().install(monkeypatch) if has_device else None
    kind, words = REFUSED[loss]
    run = tiny.trainer(loss=loss, graph=True)
    with pytest.raises(kind, match=words):
        run.fit(tiny.dataset(), batch_size=12, epochs=1)
    assert run.context.progress.step < 2
    assert stand_in is None or not stand_in.counts["captures"]
    plain = tiny.trainer(loss=loss if loss is not keeps_score else tiny.loss_fn)
    plain.fit(tiny.dataset(), batch_size=12, max_steps=3)


class Scaled(nn.Linear):
    """With a number of the host, and one on the device; it counts its calls."""

    def __init__(self):
        super().__init__(8, 2)
        self.scale, self.calls = 1.0, 0
        self.register_buffer("other", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.scale * self.other


def test_a_number_of_a_module_that_changes_in_each_step_must_be_a_buffer(device):
    def run(name, graph):
        torch.manual_seed(3)
        schedule = ParamSchedule(name, lambda progress: 1.0 + progress.step, module=f":{name}")
        net = Scaled()
        trainer = tiny.trainer([schedule], net=net, loss=soft_loss, optimizer=sgd, graph=graph)
        trainer.fit(tiny.dataset(52), batch_size=12, epochs=2, eval_set=tiny.dataset(10))
        return tiny.digest(net)

    assert run("other", True) == run("other", False)
    assert device.counts["captures"] == 1
    with pytest.raises(ConfigError, match=r"the model\.scale was 1\.0 .*and is 2\.0.* a buffer"):
        run("scale", True)


def reads(net, batch):
    loss = soft_loss(net, batch)
    return loss * 2 if loss.item() < 0 else loss


def test_a_number_that_is_read_is_told_of_before_a_capture(device):
    """On CUDA, by its line."""
    run = tiny.trainer(loss=reads, graph=True)
    with pytest.raises(LossError, match=r"waits for the device in aten\._local_scalar_dense"):
        run.fit(tiny.dataset(), batch_size=12, epochs=1)
    assert run.context.progress.step == 2
    assert not device.counts["captures"]


def test_a_capture_that_fails_leaves_nothing(device):
    calls = []

    def loss(net, batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")
        return soft_loss(net, batch)

    run, plain = tiny.trainer(loss=loss, graph=True), tiny.trainer(loss=soft_loss)
    with pytest.raises(LossError, match=r"cannot be captured.*not permitted.*leave out"):
        run.fit(tiny.dataset(), batch_size=12, epochs=1)
    plain.fit(tiny.dataset(), batch_size=12, max_steps=3)
    assert run.context.progress.step == 3
    assert tiny.digest(run.model) == tiny.digest(plain.model)
    assert run._engine.graphed._captured is None


def test_an_unused_parameter_is_told_of(device):
    net = nn.ModuleDict({"used": nn.Linear(8, 2), "spare": nn.Linear(8, 2)})
    run = tiny.trainer(net=net, loss=lambda n, b: soft_loss(n["used"], b), graph=True)
    with pytest.raises(UnusedParameters, match=r"spare\.weight"):
        run.fit(tiny.dataset(), batch_size=12, epochs=1)


def told_by(trainer):
    words = tiny.Words()
    trainer._sinks = (words,)
    return words.words


def test_most_steps_one_by_one_are_told_of_once(device):
    run = tiny.trainer(graph=True)
    rows = [tiny.dataset(80)[:n] for n in range(2, 76)]
    words = told_by(run)
    run.fit(rows, epochs=1)
    told = [text for text in "\n".join(words).splitlines() if "ran one by one" in text]
    assert len(told) == 1
    assert "32 of 32 micro-steps" in told[0]
    assert "nothing is captured yet; the newest: float32 [33, 8], int64 [33]" in told[0]


def test_without_a_device_steps_run_one_by_one():
    run = tiny.trainer(graph=True)
    words = told_by(run)
    run.fit(tiny.dataset(), batch_size=12, epochs=2)
    plain = tiny.trainer()
    plain.fit(tiny.dataset(), batch_size=12, epochs=2)
    assert tiny.digest(run.model) == tiny.digest(plain.model)
    assert "\n".join(words).count("no CUDA here, so steps run one by one") == 1


def test_a_trainer_that_nobody_holds_is_freed(device):
    run = tiny.trainer(graph=True, optimizer=fused)
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    engine = weakref.ref(run._engine)
    assert device.counts["captures"] == 1
    del run
    assert engine() is None


# -- what is asked of CUDA ---------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """Returns what was asked, in its order, of a CUDA that does nothing."""
    asked = []

    class Stream:
        name = "side"

        def __init__(self, device):
            pass

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def capture_begin(self, **options):
            asked.append(f"begin {options['pool']} {options['capture_error_mode']}")

        def capture_end(self):
            asked.append("end")
            if "breaks" in asked:
                raise RuntimeError("capture was invalidated")

        def replay(self):
            asked.append("replay")

    def set_mode(mode):
        asked.append(f"mode {mode}")
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)

    says = {
        "synchronize": lambda device: asked.append("synchronize"),
        "empty_cache": lambda: asked.append("empty_cache"),
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda device: SimpleNamespace(
            name="main", wait_stream=lambda other: asked.append(f"main waits for {other.name}")
        ),
        "stream": lambda stream: nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": set_mode,
    }
    for name, what in says.items():
        monkeypatch.setattr(torch.cuda, name, what)
    return asked


def test_computations_are_captured_on_another_stream_into_one_pool(cuda):
    graphs = Accelerator(torch.device("cpu", 0)).graphs()
    one, two = graphs.capture(lambda: [gc.isenabled()], lambda: cuda.append("computes") or [2])
    assert (one.outputs, two.outputs) == ([False], [2])
    assert gc.isenabled()
    two.replay()
    begin = "begin pool thread_local"
    assert cuda == [
        *("synchronize", "empty_cache", "side waits for main"),
        *(begin, "end", begin, "computes", "end", "main waits for side", "replay"),
    ]


def test_a_capture_that_breaks_is_ended(cuda, monkeypatch):
    """And what torch leaves open: memory of the pool, and the device's generator."""

    def close(device, pool):
        cuda.append(f"close {pool} of {device}")
        cuda.remove("breaks")  # what is captured now ends well

    def breaks():
        cuda.append("breaks")
        raise ValueError("first")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", close, raising=False)
    with pytest.raises(ValueError, match="first"):
        Accelerator(torch.device("cpu", 0)).graphs().capture(breaks)
    begin = "begin pool thread_local"
    assert cuda[3:] == [begin, "end", "close pool of 0", begin, "end", "main waits for side"]
    assert gc.isenabled()


def test_lines_that_wait_are_noticed_and_other_warnings_let_through(cuda, recwarn):
    with Accelerator(torch.device("cpu", 0)).graphs().noticing_waits() as found:
        warnings.warn("called a synchronizing CUDA operation (triggered ...)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [line.rsplit("/", 1)[1].split(":")[0] for line in found] == ["test_graph.py"]
    assert [str(one.message) for one in recwarn] == ["another"]
    assert cuda == ["mode warn", "mode 0"]
