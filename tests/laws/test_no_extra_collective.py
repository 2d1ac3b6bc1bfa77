"""A step pays for nothing it does not use: no collective besides DDP's own buckets.

Collectives are counted by torch's profiler, which sees each where it is issued (``c10d::``) and
where gloo works on it (``gloo:``). What DDP needs is counted too, on a loop written by hand; and
that the counter would see one more is shown by planting one.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.profiler import ProfilerActivity, profile, record_function

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LossSpikeGuard,
    LRSchedule,
    NonFiniteGuard,
    ParamSchedule,
    Throughput,
    TimeLimit,
)
from dtrain.strategies import DDP
from dtrain.testing import run_processes

STEPS = 6  # an epoch; its last step ends at a sync point and is not looked at
BATCH_SIZE = 12
# Seven weights of 1024 bytes, then one of 256, whose gradient arrives last. The buckets, and the
# size in MiB beyond which a bucket is closed: after all, after all seven, after each of them.
CAPS = {1: 25.0, 2: 7100 / 2**20, 8: 1000 / 2**20}
# This one is closed after the last weight, too: what dtrain says then has a bucket of its own.
CAPS[9] = 200 / 2**20
ALL_REDUCE = "c10d::allreduce_"


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16, bias=False), *(nn.Linear(16, 16, bias=False) for _ in range(7))
    )


def make_data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(STEPS * BATCH_SIZE, 4, generator=generator))


def loss_fn(model, batch):
    return model(batch[0]).square().mean()


def mark(name):
    with record_function(name):
        pass


class Mark(dtrain.Callback):
    """First in the list, so that what other callbacks do in a step comes after its mark."""

    def on_step_start(self, ctx, step):
        mark("step")

    def on_batch(self, ctx, step):
        mark("micro-batch")


def steps_of(runs):
    """Runs all under one profiler; returns marks and collectives, by run and step.

    The last step of each is left out: after it comes the end of an epoch.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for name, run in runs.items():
            mark(f"run {name}")
            run()
    # As recorded: profiler.events() would first make a tree of them, for many seconds.
    events = profiler.profiler.kineto_results.events()
    names = [event.name() for event in sorted(events, key=lambda event: event.start_ns())]
    issued = [name for name in names if name.startswith("c10d::")]
    # Gloo's threads tell of the same ones, one by one, so none was made behind c10d's back.
    assert len(issued) == sum(name.startswith("gloo:") for name in names)
    found = {}
    for name in names:
        if name.startswith("run "):
            found[name.removeprefix("run ")] = steps = []
        elif name == "step":
            steps.append([])
        elif steps and (name == "micro-batch" or name.startswith("c10d::")):
            steps[-1].append(name)
    return {name: steps[:-1] for name, steps in found.items()}


class Planted(dtrain.Callback):
    """A collective in a hook, where the rank is ready for one."""

    def __init__(self, hook, collective):
        self.hook, self.collective = hook, collective

    def on_step_start(self, ctx, step):
        if self.hook == "on_step_start":
            self.collective(ctx)

    def on_grads_ready(self, ctx, step):
        if self.hook == "on_grads_ready":
            self.collective(ctx)

    def on_step_end(self, ctx, step):
        if self.hook == "on_step_end":
            self.collective(ctx)


class SkipOnRank1(dtrain.Callback):
    def on_batch(self, ctx, step):
        if dtrain.init(seed=0).rank == 1:
            ctx.request.skip("not this one")


def two_losses(model, batch):
    hidden = model[:4](batch[0])
    yield "first", hidden.square().mean()
    yield "last", model[4:](hidden).square().mean()


def train(*callbacks, buckets=1, data=None, updates=1, strategy=None, **options):
    """Trains an epoch."""
    dtrain.init(seed=0)
    model = make_model()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-3), loss_fn
    if updates == 2:
        parts = {"first": model[:4], "last": model[4:]}
        optimizer = {n: torch.optim.AdamW(p.parameters(), lr=1e-3) for n, p in parts.items()}
        loss = two_losses
    trainer = dtrain.Trainer(
        model,
        optimizer,
        loss,
        callbacks=[Mark(), *callbacks],
        strategy=strategy or DDP(bucket_cap_mb=CAPS[buckets]),
        sinks=[],
    )
    options = {"log_every": 1000, "epochs": 1} | options
    if data is None:
        data = dtrain.Data(make_data(), BATCH_SIZE)
    trainer.fit(data, **options)


class WithMore(nn.Module):
    """The model and a small parameter, such as what dtrain says to the other ranks."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.more = nn.Parameter(torch.zeros(11))

    def forward(self, x):
        return self.more.sum() + self.model(x).square().mean()


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean()


def plain_ddp(wrapped, buckets):
    """The truth, by hand. DDP's first step has other buckets, and its second makes them anew."""
    ddp = DistributedDataParallel(wrapped, bucket_cap_mb=CAPS[buckets])

    for _ in range(5):
        mark("step")
        ddp(torch.ones(3, 4)).backward()


CALLBACKS = {
    "clip": lambda: [ClipGradients(max_norm=0.1)],
    "schedule": lambda: [LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps))],
    "ema": lambda: [EMA(0.9)],
    "early stopping": lambda: [EarlyStopping("eval/loss")],
    "all of them": lambda: [
        ClipGradients(max_norm=0.1),
        LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
        EMA(0.9),
        EarlyStopping("eval/loss"),
        ParamSchedule("weight_decay", lambda progress: 0.1 / (1 + progress.step)),
        GradientNoise(0.01),
        L1L2Penalty(l2=1e-3),
        NonFiniteGuard("skip"),
        LossSpikeGuard(window=4),
        Throughput(),
        TimeLimit("1h"),
    ],
    "skips on one rank": lambda: [SkipOnRank1()],
}


class Stream:
    """Batches of this rank's own; rank 0 has one less than the others."""

    def __iter__(self):
        return iter([[torch.ones(3, 4)]] * (STEPS - (dtrain.init(seed=0).rank == 0)))


def runs():
    def verb(ctx):
        ctx.comm.all_reduce("planted", torch.ones(2))

    def raw(ctx):
        dist.all_reduce(torch.ones(2))

    def broadcast(ctx):
        dist.broadcast(torch.ones(2), src=0)

    all_runs = {}
    for n in CAPS:
        all_runs |= {
            f"{n} by hand": partial(plain_ddp, WithMore(make_model()), n),
            f"{n} by hand, no more": partial(plain_ddp, Plain(make_model()), n),
            f"{n} dtrain": partial(train, buckets=n),
            f"{n} accumulated": partial(train, GradientAccumulation(3), buckets=n),
        }
    for name, make in CALLBACKS.items():
        all_runs[name] = partial(train, *make(), buckets=2, eval_set=make_data())
    return all_runs | {
        "two updates": partial(train, updates=2),
        "two updates, flat": partial(train, updates=2, strategy="flat"),
        "two updates, accumulated": partial(train, GradientAccumulation(3), updates=2),
        "two updates, skips": partial(train, SkipOnRank1(), updates=2),
        "two updates, callbacks": partial(
            train,
            ClipGradients(max_norm=0.1, optimizer="first"),
            LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps), optimizer="last"),
            EMA(0.9),
            GradientStats(),
            NonFiniteGuard("skip"),
            LossSpikeGuard(window=4, optimizer="last"),
            updates=2,
        ),
        "stream": partial(train, buckets=2, data=dtrain.Data(Stream())),
        "reports": partial(train, log_every=3),
        "planted verb": partial(train, Planted("on_step_end", verb)),
        "planted raw": partial(train, Planted("on_grads_ready", raw)),
        "planted broadcast": partial(train, Planted("on_step_start", broadcast)),
    }


def collectives():
    dtrain.init(seed=0)
    return steps_of(runs())


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def by_rank(request):
    return run_processes(collectives, request.param)


def test_a_step_has_the_buckets_of_plain_ddp(by_rank):
    for found in by_rank:
        for n in CAPS:
            # The second step of a loop by hand has DDP's messages about its new buckets.
            rebuild, *by_hand = found[f"{n} by hand"][1:]
            assert by_hand == [[ALL_REDUCE] * n] * 2
            # Where the last bucket has room for what dtrain says, that costs nothing.
            alone = 8 if n == 9 else n
            assert found[f"{n} by hand, no more"][2:] == [[ALL_REDUCE] * alone] * 2
            first, *later = found[f"{n} dtrain"]
            assert later == [["micro-batch", *by_hand[0]]] * (STEPS - 2)
            # dtrain takes DDP's first step, which is idle, before a run; this is the second.
            # In its first micro-batch, ranks also find out that loss functions do not gather.
            meeting = "c10d::allgather_"
            assert sorted(first) == sorted(["micro-batch", meeting, *rebuild])


def test_only_the_last_micro_batch_has_collectives(by_rank):
    for found in by_rank:
        for n in CAPS:
            step = ["micro-batch"] * 3 + [ALL_REDUCE] * n
            assert found[f"{n} accumulated"][1:] == [step] * (STEPS - 2)


def test_an_update_has_the_reduction_of_its_own_parameters_and_none_more(by_rank):
    for found in by_rank:
        steps = {name: found[name][1:] for name in found if name.startswith("two updates")}
        assert len(steps) == 5
        for name, taken in steps.items():
            micros = ["micro-batch"] * (3 if "accumulated" in name else 1)
            assert taken == [[*micros, ALL_REDUCE, ALL_REDUCE]] * (STEPS - 2), name


def test_callbacks_skips_and_streams_add_nothing(by_rank):
    for found in by_rank:
        for name in CALLBACKS:
            expected = [["micro-batch", ALL_REDUCE, ALL_REDUCE]] * (STEPS - 2)
            assert found[name][1:] == expected, name
    # Rank 0's stream ends in the step before the last: it takes part in the reductions, and
    # nobody had to be asked. In the last, all streams have ended.
    idle = [ALL_REDUCE] * 2
    for rank, found in enumerate(by_rank):
        own = [] if rank == 0 else ["micro-batch"]
        whole = [["micro-batch", *idle]] * (STEPS - 2)
        assert found["stream"][1:] == [*whole, [*own, *idle]]


def test_the_counter_sees_what_is_planted(by_rank):
    gather, broadcast = "c10d::allgather_", "c10d::broadcast_"
    for found in by_rank:
        plain = ["micro-batch", ALL_REDUCE]
        expected = {
            "planted verb": [*plain, gather],  # its header carries what is reduced
            "planted raw": [*plain, ALL_REDUCE],
            "planted broadcast": [broadcast, *plain],
        }
        for name, step in expected.items():
            assert found[name][1:] == [step] * (STEPS - 2), name
        # A report is a sync point, here after step 3; no other step is.
        reported = [*plain, gather]
        assert found["reports"][1:] == [plain, reported, plain, plain]


def short_fits(run_dir):
    """Returns how many collectives a further fit of one step has, without a save and with one."""
    dtrain.init(seed=0)
    found = []
    for callbacks in ([], [Checkpoint()]):
        model = make_model()
        trainer = dtrain.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            loss_fn,
            callbacks=callbacks,
            sinks=[],
            run_dir=run_dir if callbacks else None,
        )
        for _ in range(3):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                trainer.fit(make_data(), batch_size=BATCH_SIZE, max_steps=1)
            names = [event.name() for event in profiler.profiler.kineto_results.events()]
        found.append(sum(name.startswith("c10d::") for name in names))
    return found


def test_a_short_fit_begins_and_ends_with_few_collectives(tmp_path):
    # The gradients'; what is called, the lock and the sinks (2), the model, the data, what is
    # trained, gathers; the figures twice, requests twice, the model, how it ended (2). And where a
    # checkpoint is made: the model, what it holds, its folder (2), what was written (2), its place
    # (2).
    assert run_processes(short_fits, 2, str(tmp_path)) == [[15, 23]] * 2
