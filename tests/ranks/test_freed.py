"""A Trainer that nobody holds is gone at once, and its model with it: nobody waits for garbage."""

import gc
import io
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    Freeze,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LabelSmoothing,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    ParamSchedule,
    Profile,
    StochasticWeightAveraging,
    Throughput,
    TimeLimit,
)
from dtrain.sinks import CSV, Console, JSONLines
from dtrain.testing import run_processes


def left_over(strategy):
    dtrain.init(seed=0)
    gc.collect()
    gc.disable()
    try:
        trainer = tiny.trainer([ClipGradients(1.0), NonFiniteGuard(), EMA(0.9)], strategy=strategy)
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=1, eval_set=tiny.dataset(8))
        model, optimizer = weakref.ref(trainer.model), weakref.ref(trainer.optimizer)
        held = [model() is None, optimizer() is None]
        del trainer
        return held, [model() is None, optimizer() is None]
    finally:
        gc.enable()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_model_and_optimizer_go_with_the_trainer(world_size, strategy):
    torch.manual_seed(0)
    for before, after in run_processes(left_over, world_size, strategy):
        assert before == [False, False]
        assert after == [True, True]


FIRST = """
import gc, weakref
import torch, dtrain
gc.disable()

def made():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = dtrain.Trainer(model, optimizer, lambda model, batch: model(batch).sum(), sinks=[])
    return [weakref.ref(one) for one in (model, optimizer, trainer)]

dtrain.init(seed=0)
print([one() for one in made()])
"""


def test_the_first_optimizer_of_a_process_holds_nobodys_frames():
    said = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=60)
    assert said.stdout == "[None, None, None]\n", said.stderr


class Rows:
    def __init__(self, fail):
        self.fail, self.data = fail, tiny.dataset(32)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        self.fail("data")
        return self.data[row]


class Fails(dtrain.Callback):
    """Fails in one place of its life, and keeps weak references to what it is given."""

    def __init__(self, where, mine):
        self.where, self.mine, self.step, self.batches = where, mine, -1, []

    def fail(self, where):
        if self.mine and where == self.where and self.step >= 3:
            raise ValueError(f"planted in {where}")

    def on_step_start(self, ctx, step):
        self.step = step.number
        self.fail("on_step_start")

    def on_batch(self, ctx, step):
        self.batches = [weakref.ref(tensor) for tensor in step.batch]

    def on_grads_ready(self, ctx, step):
        self.fail("on_grads_ready")

    def on_step_end(self, ctx, step):
        self.fail("on_step_end")

    def on_epoch_end(self, ctx):
        self.fail("on_epoch_end")
        if self.mine and self.where == "a parameter nobody has":
            ctx.model[2].weight = torch.nn.Parameter(torch.zeros(2, 16))

    def on_eval_end(self, ctx, metrics):
        self.fail("on_eval_end")

    def on_save(self, ctx):
        self.fail("on_save")


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fail("backward")
        return grad, None


class FailingAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        self.fail("update")
        return super().step(closure)


CALLBACKS = {
    "usual": lambda: [
        MixedPrecision("bf16"),
        GradientAccumulation(2),
        ClipGradients(1.0),
        LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
        NonFiniteGuard(),
        GradientStats(every=3),
        Throughput(count_flops=True),
        EarlyStopping("eval/loss", restore_best=True),
        EMA(0.9),
        Checkpoint(every_steps=3),
        TimeLimit("1h"),
    ],
    "more": lambda: [
        LabelSmoothing(0.1, 2),
        Freeze("0.*", until_epoch=1),
        GradientNoise(0.1),
        L1L2Penalty(l2=1e-3),
        LossSpikeGuard(window=4),
        ParamSchedule("weight_decay", lambda progress: 0.1),
        Profile((1, 3)),
        StochasticWeightAveraging(0),
        Checkpoint(background=False),
    ],
    "none": list,
}


def life(folder, kind, callbacks, strategy, where, failing):
    """A Trainer's, in a function; returns weak references to what it had."""
    fails = Fails(where, dtrain.init(seed=0).rank == failing)

    def loss(net, batch):
        fails.fail("loss_fn" if net.training else "evaluation")
        x, y = batch
        y = y.argmax(-1) if y.is_floating_point() else y  # LabelSmoothing's
        return torch.nn.functional.cross_entropy(Backward.apply(net(x), fails.fail), y)

    net = tiny.model()
    optimizer = FailingAdamW(net.parameters(), lr=1e-2, fused=True)
    optimizer.fail = fails.fail
    made = [fails, *CALLBACKS[callbacks]()]
    sinks = [Console(stream=io.StringIO()), JSONLines(), CSV()]
    options = {"callbacks": made, "sinks": sinks, "run_dir": folder, "strategy": strategy}
    trainer = dtrain.Trainer(net, optimizer, loss, **options)
    with_workers = dtrain.Data(tiny.dataset(32), 8, num_workers=1)
    data = with_workers if kind == "workers" else dtrain.Data(Rows(fails.fail), 8)
    raised = ""
    try:
        if kind == "evaluated":
            fails.step = 3
            trainer.evaluate(tiny.dataset(16), batch_size=8)
        elif kind != "made":
            trainer.fit(data, epochs=2, eval_set=tiny.dataset(16), log_every=3)
        if kind == "twice":
            trainer.fit(data, max_steps=10, eval_set=tiny.dataset(16))
    except (ValueError, dtrain.RemoteError, dtrain.errors.CheckpointError) as error:
        raised = str(error)
    held = {"model": net, "optimizer": optimizer, "trainer": trainer, "context": trainer.context}
    held |= {f"gradient {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    held |= {f"parameter {name}": p for name, p in net.named_parameters()}
    held |= {type(one).__name__: one for one in made}
    refs = {name: weakref.ref(one) for name, one in held.items()}
    return raised, refs | {f"batch {n}": ref for n, ref in enumerate(fails.batches)}


def lives(folder, cases):
    world, found = dtrain.init(seed=0), {}
    gc.collect()
    for number, case in enumerate(cases):
        gc.disable()
        try:
            raised, refs = life(folder / str(number), *case)
            found[case] = raised, [name for name, ref in refs.items() if ref() is not None]
        finally:
            gc.enable()
        world.comm.barrier("the next case")
    return found


ON_TWO = [1, pytest.param(2, marks=pytest.mark.slow)]
WHOLE = [("made", "usual", "ddp"), ("fit", "usual", "flat"), ("fit", "usual", "ddp")]
WHOLE += [("twice", "none", "ddp"), ("evaluated", "usual", "flat")]
SLOW = [("fit", "more", "flat"), ("workers", "none", "flat"), ("workers", "usual", "ddp")]


@pytest.mark.parametrize("world_size", ON_TWO)
def test_all_that_it_had_goes_with_it(tmp_path, world_size):
    cases = [(*case, "", 0) for case in WHOLE + SLOW * (world_size > 1)]
    for found in run_processes(lives, world_size, tmp_path, cases, timeout_s=100):
        assert found == dict.fromkeys(cases, ("", []))


WHERE = ["data", "loss_fn", "update", "evaluation", "on_step_start", "on_grads_ready"]
WHERE += ["on_step_end", "on_epoch_end", "on_eval_end", "on_save", "a parameter nobody has"]


@pytest.mark.parametrize("world_size", ON_TWO)
def test_an_error_holds_it_no_longer_than_the_script_holds_the_error(tmp_path, world_size):
    cases = [("fit", "usual", "flat", where, world_size - 1) for where in [*WHERE, "backward"]]
    cases += [("fit", "usual", "ddp", where, world_size - 1) for where in WHERE]
    cases += [("evaluated", "none", "flat", "evaluation", 0)]
    for found in run_processes(lives, world_size, tmp_path, cases, timeout_s=100):
        for case, (raised, left) in found.items():
            assert ("planted in " in raised) or case[3] == "a parameter nobody has", case
            assert raised, case
            assert left == [], case
