"""They mix: every pair of callbacks, and random subsets in random order, at two ranks.

Each case trains three epochs of a small model twice: in one go, and stopped in the middle and
resumed in a new Trainer. Both must end with the same bits, on both ranks, without a warning. Some
of the cases run with a sharded model, too, and with the numbers of one that is not.
"""

import itertools
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain import schedules
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    CheckpointActivations,
    ClipGradients,
    EarlyStopping,
    Freeze,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LabelSmoothing,
    LogSamples,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    Mixup,
    NonFiniteGuard,
    OverfitBatches,
    ParamSchedule,
    Profile,
    StochasticWeightAveraging,
    Throughput,
    TimeLimit,
    hard_labels,
)
from dtrain.distributed import whole
from dtrain.errors import ConfigError
from dtrain.strategies import FSDP
from dtrain.testing import run_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

MAKE = {
    "EMA": lambda: EMA(0.9),
    "CheckpointActivations": lambda: CheckpointActivations([torch.nn.Linear]),
    "ClipGradients": lambda: ClipGradients(max_norm=0.1),
    "ClipGradients by value": lambda: ClipGradients(max_value=0.01),
    "EarlyStopping": lambda: EarlyStopping("eval/loss", patience=9, restore_best=True),
    "Freeze": lambda: Freeze("0", until_epoch=1),
    "GradientAccumulation": lambda: GradientAccumulation(micro_batch_size=3),
    "GradientNoise": lambda: GradientNoise(0.01),
    "GradientStats": lambda: GradientStats(every=2),
    "L1L2Penalty": lambda: L1L2Penalty(l1=1e-4, l2=1e-3),
    "LabelSmoothing": lambda: LabelSmoothing(0.1, 3),
    "LogSamples": lambda: LogSamples(lambda outputs, batch: {"y": str(outputs[0].item())}),
    "LossSpikeGuard": lambda: LossSpikeGuard(window=4),
    "LRSchedule by step": lambda: LRSchedule(lambda opt, n: CosineAnnealingLR(opt, n)),
    "LRSchedule by epoch": lambda: LRSchedule(schedules.step_decay(0.5, 1), every="epoch"),
    "MixedPrecision bf16": lambda: MixedPrecision("bf16"),
    "MixedPrecision fp16": lambda: MixedPrecision("fp16", init_scale=256.0),
    "Mixup": lambda: Mixup(0.4, 3),
    "NonFiniteGuard": lambda: NonFiniteGuard("skip"),
    "OverfitBatches": lambda: OverfitBatches(2),
    "ParamSchedule": lambda: ParamSchedule("weight_decay", lambda p: 0.1 / (1 + p.step)),
    "Profile": lambda: Profile((1, 2)),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1),
    "Throughput": lambda: Throughput(),
    "TimeLimit": lambda: TimeLimit("1h"),
}
# Two of these would be two of one kind, which is refused (tested below).
ONE_OF = [
    ("ClipGradients", "ClipGradients by value"),
    ("LRSchedule by step", "LRSchedule by epoch"),
    ("MixedPrecision bf16", "MixedPrecision fp16"),
]
# A loss scale is refused.
NOT_SHARDED = {"MixedPrecision fp16"}
# Saves are many here, and not what is tested.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
# Batches kept in memory are gone in a new process; its documentation says so.
NOT_RESUMABLE = {"OverfitBatches"}
# Among these, order does not matter: none looks at what another changes.
COMMUTE = {
    "CheckpointActivations",
    "GradientStats",
    "LogSamples",
    "LRSchedule by step",
    "MixedPrecision bf16",
    "GradientAccumulation",
    "Throughput",
    "TimeLimit",
    "L1L2Penalty",
    "ParamSchedule",
}


class Interrupt(dtrain.Callback):
    """Asks, on one rank, to save and leave at a step; the loop makes it agreed."""

    def __init__(self, at):
        self.mine = dtrain.init(seed=0).rank == 1
        self.at = at

    def on_step_start(self, ctx, step):
        if self.mine and step.number == self.at:
            ctx.request.preempt("interrupted")


def loss_fn(net, batch):
    x, y = batch
    logits = net(x)
    labels = hard_labels(y)
    right = (logits.argmax(-1) == labels).float().mean()
    loss = F.cross_entropy(logits, y)
    return dtrain.Loss(loss, metrics={"accuracy": right}, outputs=logits.argmax(-1))


def two_losses(net, batch):
    yield "first", loss_fn(net, batch)
    yield "last", loss_fn(net, batch)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)


#: Optimizers and loss function, by how many updates a step has.
JOBS = {
    1: (adamw, loss_fn),
    2: (lambda net: {"first": adamw(net[0]), "last": adamw(net[3])}, two_losses),
}
OF_TWO = {  # these look at one of them, or leave it something to train
    "Freeze": lambda: Freeze("0.bias", until_epoch=1),
    "LossSpikeGuard": lambda: LossSpikeGuard(window=4, optimizer="last"),
    "ClipGradients": lambda: ClipGradients(max_norm=0.1, optimizer="first"),
    "GradientStats": lambda: GradientStats(every=2, optimizer="last"),
    "LRSchedule by step": lambda: LRSchedule(
        lambda opt, n: CosineAnnealingLR(opt, n), optimizer="last"
    ),
}


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(22, 5, generator=generator).to(dtype)
    return torch.utils.data.TensorDataset(x, x[:, :3].argmax(-1))


def train(names, run_dir, interrupt_at=-1, *, updates=1, sharded=False, dtype=torch.float32):
    interrupt = Interrupt(interrupt_at)  # before the model: it seeds
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    net, samples = net.to(dtype), data(dtype)
    make = MAKE | (OF_TWO if updates == 2 else {})
    callbacks = [interrupt, *(make[n]() for n in names)]
    callbacks.append(Checkpoint(every_epochs=2, keep=1))
    trainer = dtrain.Trainer(
        net,
        *JOBS[updates],
        eval_fn=loss_fn,
        callbacks=callbacks,
        sinks=[],
        run_dir=run_dir,
        strategy=FSDP(blocks=[nn.Linear]) if sharded else "auto",
    )
    result = trainer.fit(samples, batch_size=12, epochs=3, eval_set=samples, log_every=2)
    bits = [whole(p) if sharded else p.detach().clone() for p in net.state_dict().values()]
    return bits, result.preempted, result.steps


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run_case(folder, names, interrupt_at, **how):
    """Returns what is wrong, or nothing."""
    world = dtrain.init(seed=0)
    at_once, _, steps = train(names, folder / "whole", **how)
    if steps != 6:
        return f"took {steps} steps"
    everyones = world.comm.gather_objects("bits", [t.double().sum().item() for t in at_once])
    if everyones[0] != everyones[1]:
        return "the ranks have different parameters"
    if NOT_RESUMABLE & set(names):
        return ""
    _, preempted, _ = train(names, folder / "parts", interrupt_at, **how)
    if not preempted:
        return "was not interrupted"
    parts, _, steps = train(names, folder / "parts", **how)
    if steps != 6 or not same(at_once, parts):
        return f"resumed after step {interrupt_at}: other bits, or steps {steps}"
    if set(names) <= COMMUTE:
        backwards, _, _ = train(names[::-1], folder / "backwards", **how)
        if not same(at_once, backwards):
            return "another order gives other bits"
    return ""


def run_sharded(folder, names, interrupt_at, **how):
    """As :func:`run_case`; the numbers must also be those of a model that is not sharded."""
    how = {"sharded": True, "dtype": torch.float64}
    if told := run_case(folder, names, interrupt_at, **how):
        return told
    ours, _, _ = train(names, folder / "ours", **how)
    flat, _, _ = train(names, folder / "flat", dtype=torch.float64)
    close = 1e-2 if "MixedPrecision bf16" in names else 1e-10
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, flat, strict=True))
    return f"{far:.1e} off" if far > close else ""


def run_cases(cases, updates=1, run_case=run_case):
    """Runs cases on this rank; rank 0 makes and removes the folder."""
    world = dtrain.init(seed=0)
    wrong = []
    for number, (names, interrupt_at) in enumerate(cases):
        folder = Path(
            world.comm.on_main("folder", lambda: tempfile.mkdtemp(prefix="mix-", dir=MEMORY))
        )
        try:
            told = run_case(folder, names, interrupt_at, updates=updates)
        except Exception as error:
            raise AssertionError(f"case {number}: {names}, stopped at {interrupt_at}") from error
        world.comm.on_main("tidy", lambda folder=folder: shutil.rmtree(folder))
        if told:
            wrong.append(f"{names}, stopped at {interrupt_at}: {told}")
    return wrong


def allowed(names):
    return not any(a in names and b in names for a, b in ONE_OF)


def pairs():
    rng = random.Random(0)
    cases = [list(pair) for pair in itertools.combinations(MAKE, 2) if allowed(pair)]
    return [(rng.sample(names, 2), rng.randrange(5)) for names in cases]


def subsets(count):
    """Random subsets in random order, drawn by hypothesis from a fixed seed."""
    cases = []

    @seed(20)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.permutations(list(MAKE)), st.integers(3, len(MAKE)), st.integers(0, 4))
    def draw(order, size, interrupt_at):
        names = []
        for name in order[:size]:
            if allowed([*names, name]):
                names.append(name)
        cases.append((names, interrupt_at))

    draw()
    return cases[:count]


def test_every_pair_mixes():
    cases = pairs()
    assert len(cases) == len(MAKE) * (len(MAKE) - 1) // 2 - len(ONE_OF)
    assert run_processes(run_cases, 2, cases, timeout_s=400) == [[], []]


def test_random_subsets_in_random_order_mix():
    cases = subsets(200)
    assert len(cases) == 200
    assert run_processes(run_cases, 2, cases, timeout_s=400) == [[], []]


def test_random_subsets_mix_in_steps_of_two_updates():
    assert run_processes(run_cases, 2, subsets(24), 2, timeout_s=100) == [[], []]


def test_pairs_and_random_subsets_mix_where_the_model_is_sharded():
    pairs_of_it = [case for case in pairs() if not NOT_SHARDED & {*case[0]}]
    cases = random.Random(1).sample(pairs_of_it, 30)
    cases += [([n for n in names if n not in NOT_SHARDED], at) for names, at in subsets(16)]
    assert {name for names, _ in cases for name in names} == MAKE.keys() - NOT_SHARDED
    assert run_processes(run_cases, 2, cases, 1, run_sharded, timeout_s=400) == [[], []]


@pytest.mark.parametrize("names", ONE_OF)
def test_what_cannot_mix_is_refused_at_construction(names, tmp_path):
    with pytest.raises(ConfigError, match=r"both decide|are named"):
        train(list(names), tmp_path)
