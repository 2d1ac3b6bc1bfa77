"""Law 1: any number of ranks and micro-batches gives the parameters of one process.

float64, 50 AdamW steps with weight decay, clipping and a schedule; data that does not divide,
token weights of random length, skips by place in the data. Each tensor is within 1e-12 of its
norm; those whose true gradient is zero (a bias before a norm) are left out by name.

The second half draws cases: micro-batches skipped at random on random ranks, and streams that
give each rank batches of its own until it runs dry. What one process without skips and streams
would do is no truth for these, so the truth is plain torch, written out here, on the samples that
were used.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, LRSchedule
from dtrain.testing import run_processes

STEPS = 50
LENGTH = 7


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.gru(x)[0])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(1, 6)
        self.head = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.first(x.transpose(1, 2))))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(3, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.into(x)))


def perceptron():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


MODELS = {
    "mlp": perceptron,
    "conv": Convolutional,
    "gru": Recurrent,
    "transformer": Attention,
}
# A softmax does not see a constant added to all its scores, so the keys' bias has no gradient;
# it is one third of this tensor.
ZERO_GRADIENT = {"block.self_attn.in_proj_bias"}

# World sizes and micro-batches, global batches, samples: none divides another.
CASES = [(1, 2, 7, 45), (1, 3, 16, 50), (2, 1, 7, 45), (2, 2, 16, 50), (2, 3, 9, 31)]
CASES += [(3, 1, 16, 50), (3, 2, 64, 101), (3, 3, 7, 45), (4, 1, 7, 45), (4, 2, 16, 50)]
CASES += [(4, 3, 64, 101), (4, 1, 3, 10)]  # the last: a batch smaller than the world


class SkipMarked(dtrain.Callback):
    """Skips micro-batches of one sample that is marked, wherever it lands: a weight of 0."""

    def on_batch(self, ctx, step):
        x, y, lengths = step.batch
        # A place in the data, not a rank: the marked samples weigh nothing in any split.
        lengths = torch.where(x[:, 0, 0] > 1.5, torch.zeros_like(lengths), lengths)
        if int(lengths.sum()) == 0:
            ctx.request.skip("every sample is marked")
        step.batch = (x, y, lengths)


TWO = "mlp in two updates"  # each of half of the parameters; the second sees what the first did


def two_losses(model, batch):
    yield "weights", loss_fn(model, batch)
    yield "biases", loss_fn(model, batch)


def two_optimizers(model):
    parts = {"weights": [], "biases": []}
    for p in model.parameters():
        parts["weights" if p.dim() > 1 else "biases"].append(p)
    return {n: torch.optim.AdamW(part, lr=3e-3, weight_decay=0.1) for n, part in parts.items()}


class SAM(torch.optim.Optimizer):
    """The usual implementation: its step calls the closure once, where the loss is worst nearby."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho} | options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.old = {}

    def params(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self.params()]).norm()
        self.old = {p: p.clone() for p in self.params()}
        for p in self.params():
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, old in self.old.items():
            p.copy_(old)
        self.base.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


CLOSURES = {
    "mlp by SAM": lambda p: SAM(p, torch.optim.SGD, lr=0.05, momentum=0.9),
    # More of its history would magnify rounding by more than what is allowed here.
    "mlp by LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.2, max_iter=2, history_size=1),
}


def loss_fn(model, batch):
    x, y, lengths = batch
    mask = torch.arange(LENGTH) < lengths[:, None]
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    return dtrain.Loss.from_sum((each * mask).sum(), weight=mask.sum())


class Losses(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_step_end(self, ctx, step):
        self.values.append(step.loss_mean)


def make_data(samples, seed, shortest=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, LENGTH, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (samples, LENGTH), generator=generator)
    lengths = torch.randint(shortest, LENGTH + 1, (samples,), generator=generator)
    return x, y, lengths


def make_model(name):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def train(name, strategy, micros, batch_size, samples):
    dtrain.init(seed=0)
    model, optimizer = make_model(name if name in MODELS else "mlp")
    if name in CLOSURES:
        optimizer = CLOSURES[name](model.parameters())
    losses = Losses()
    trainer = dtrain.Trainer(
        model,
        two_optimizers(model) if name == TWO else optimizer,
        two_losses if name == TWO else loss_fn,
        callbacks=[
            SkipMarked(),
            GradientAccumulation(micros),
            ClipGradients(max_norm=0.5),
            LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
            losses,
        ],
        sinks=[],
        strategy=strategy,
    )
    data = torch.utils.data.TensorDataset(*make_data(samples, seed=samples))
    trainer.fit(data, batch_size=batch_size, max_steps=STEPS)
    return whole(model), losses.values


def whole(model):
    """The parameters by name, gathered where they are sharded."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    gathered = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in named.values()]
    return {name: p.clone() for name, p in zip(named, gathered, strict=True)}


def train_all(strategy, cases, names=(*MODELS, TWO)):
    if strategy == "fsdp":  # which refuses several updates
        names = [name for name in names if name != TWO]
    return {(name, case): train(name, strategy, *case) for name in names for case in cases}


def of_world(size):
    return [case[1:] for case in CASES if case[0] == size]


@pytest.fixture(scope="module")
def truth():
    """One process, the whole batch at once."""
    whole = sorted({(1, batch_size, samples) for _, _, batch_size, samples in CASES})
    (results,) = run_processes(train_all, 1, "ddp", whole, timeout_s=100)
    return results


SLOW = {"marks": pytest.mark.slow}
QUICK, REST = (
    [(1, "ddp"), (2, "ddp"), (2, "flat"), (3, "ddp")],
    [(3, "flat"), (4, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "fsdp")],
)
WORLDS = [*QUICK, *(pytest.param(*world, **SLOW) for world in REST)]


@pytest.mark.parametrize(("world_size", "strategy"), WORLDS)
def test_the_parameters_are_those_of_one_process(world_size, strategy, truth):
    ranks = run_processes(train_all, world_size, strategy, of_world(world_size), timeout_s=100)
    check(ranks, truth)


@pytest.mark.slow
def test_optimizers_that_evaluate_the_loss_again_are_those_of_one_process():
    cases = [(2, 16, 50), (1, 7, 45)]
    whole = [(1, *case[1:]) for case in cases]
    (truth,) = run_processes(train_all, 1, "ddp", whole, [*CLOSURES], timeout_s=100)
    for world_size, strategy in [(2, "ddp"), (3, "flat")]:
        check(run_processes(train_all, world_size, strategy, cases, [*CLOSURES]), truth)


def check(ranks, truth):
    world_size = len(ranks)
    for (name, (micros, batch_size, samples)), (params, losses) in ranks[0].items():
        case = f"{name}, {world_size} ranks x {micros}, batch {batch_size} of {samples}"
        expected, expected_losses = truth[name, (1, batch_size, samples)]
        assert losses == pytest.approx(expected_losses, rel=1e-12, abs=1e-12, nan_ok=True), case
        for tensor, value in params.items():
            if tensor in ZERO_GRADIENT:
                continue
            distance = (value - expected[tensor]).norm() / expected[tensor].norm()
            assert distance <= 1e-12, f"{case}: {tensor} is {distance:.1e} away"
        for other in ranks[1:]:
            theirs, _ = other[name, (micros, batch_size, samples)]
            assert all(torch.equal(theirs[n], value) for n, value in params.items()), case


# ------------------------------------------------- skips on random ranks, and streams that run dry


class Case(NamedTuple):
    """One training. ``streams``: sizes of the batches, by epoch and rank; None for a dataset.

    A dataset is cut into micro-batches and batches of two ``sizes``; of a stream, ``micros``
    batches make a step.
    """

    model: str
    micros: int
    sizes: tuple[int, int]
    skip: float
    hook: str
    seed: int
    samples: int
    streams: list | None

    def accumulation(self):
        if self.streams is None:
            return GradientAccumulation(micro_batch_size=self.sizes[0])
        return GradientAccumulation(self.micros)


def cases(world_size, model, kind):
    """A strategy for a case of that kind."""
    stream = kind == "stream"
    # A rank's stream may be empty, if another's is not.
    lengths = st.lists(st.integers(1, 6), max_size=12)
    epoch = st.tuples(*[lengths] * world_size).filter(any)
    # So many whole micro-batches for each rank, and one sample more for some of them: ranks
    # differ in how many micro-batches they have.
    split = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, max(1, world_size - 1)))
    split = split.map(lambda t: (t[0], t[0] * t[1] * world_size + t[2]))
    split = split.filter(lambda t: 7 <= t[1] <= 64)
    return st.builds(
        Case,
        model=st.just(model),
        micros=st.integers(1, 3),
        sizes=split,
        skip=st.sampled_from([0.2, 0.5, 0.8, *([0.0] if stream else [])]),
        hook=st.sampled_from(["on_batch", "on_loss"]),
        seed=st.integers(0, 2**20),
        samples=st.integers(20, 110),
        streams=st.lists(epoch, min_size=1, max_size=3) if stream else st.none(),
    )


def draw(world_size, rounds, models=MODELS):
    """Draws cases from a fixed seed: in each round, every model with a dataset and a stream."""
    drawn = []
    kinds = itertools.product(models, ("dataset", "stream"))

    @seed(world_size)
    @settings(
        max_examples=rounds + 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*(cases(world_size, *kind) for kind in kinds)))
    def note(some):
        drawn.append(some)

    note()
    # The first example is the simplest there is: no skips, streams of one batch.
    return [case for some in drawn[1:] for case in some]


class Stream:
    """A rank's batches: samples one after the other, so many at a time. Each epoch goes on."""

    def __init__(self, case, rank):
        self.case, self.rank, self.epoch = case, rank, -1
        self.columns = [*make_data(case.samples, case.seed, 0), torch.arange(case.samples)]

    def __iter__(self):
        self.epoch += 1
        for rows in stream_rows(self.case, self.rank, self.epoch):
            yield [column[torch.tensor(rows)] for column in self.columns]


def stream_rows(case, rank, epoch):
    """The samples in each of a rank's batches in an epoch; the drawn epochs come in turn."""
    at = 31 * rank + 17 * epoch
    for size in case.streams[epoch % len(case.streams)][rank]:
        yield [(at + i) % case.samples for i in range(size)]
        at += size


class SkipAtRandom(dtrain.Callback):
    """Draws, on each rank for itself, which micro-batches to skip; notes all it has seen."""

    def __init__(self, case):
        self.case = case
        self.seen = []

    def draw(self, ctx, step, hook):
        if hook != self.case.hook:
            return
        skipped = bool(torch.rand((), generator=ctx.rng) < self.case.skip)
        self.seen.append((step.number, step.update, step.batch[3].tolist(), skipped))
        if skipped:
            ctx.request.skip("drawn")

    def on_batch(self, ctx, step):
        self.draw(ctx, step, "on_batch")

    def on_loss(self, ctx, step):
        self.draw(ctx, step, "on_loss")


def make_updates(name):
    """A model, and the optimizer of each update of a step; of its only one, without a name."""
    model, optimizer = make_model("mlp" if name == TWO else name)
    return model, two_optimizers(model) if name == TWO else {"": optimizer}


def train_drawn(strategy, drawn):
    rank = dtrain.init(seed=0).rank
    found = []
    for case in drawn:
        dtrain.init(seed=0)
        model, optimizers = make_updates(case.model)
        skips, losses = SkipAtRandom(case), Losses()
        loss = two_losses if case.model == TWO else loss_fn
        trainer = dtrain.Trainer(
            model,
            optimizers if case.model == TWO else optimizers[""],
            lambda model, batch, loss=loss: loss(model, batch[:3]),
            callbacks=[
                skips,
                case.accumulation(),
                ClipGradients(max_norm=0.5),
                LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, STEPS)),
                losses,
            ],
            sinks=[],
            strategy=strategy,
        )
        if case.streams is None:
            columns = [*make_data(case.samples, case.seed, 0), torch.arange(case.samples)]
            data = dtrain.Data(torch.utils.data.TensorDataset(*columns), case.sizes[1])
        else:
            data = dtrain.Data(Stream(case, rank))
        result = trainer.fit(data, max_steps=STEPS, log_every=7)
        found.append(
            {
                "seen": skips.seen,
                "params": whole(model),
                "losses": losses.values,
                "history": result.history,
                "lr": trainer.optimizer.param_groups[0]["lr"],
                "updates": trainer.context.progress.updates,
            }
        )
    return found


def plan(case, world_size):
    """What each rank is to see in each step, as one sorted list of samples.

    For a dataset only how many: the order is shuffled, and is checked to be a permutation.
    """
    steps = []
    for epoch in itertools.count():
        if case.streams is None:
            sizes = range(0, case.samples, case.sizes[1])
            steps += [min(case.sizes[1], case.samples - first) for first in sizes]
        else:
            micros = case.micros
            ranks = [list(stream_rows(case, rank, epoch)) for rank in range(world_size)]
            for first in range(0, max(map(len, ranks)), micros):
                window = [rows for batches in ranks for rows in batches[first : first + micros]]
                steps.append(sorted(itertools.chain(*window)))
        if len(steps) >= STEPS:
            return steps[:STEPS]
    return None


def by_hand(case, steps):
    """Plain torch: trains on the samples of each update of each step.

    Returns what train_drawn does, the losses and weights of each step's last update, and how many
    steps had an update.
    """
    x, y, lengths = make_data(case.samples, case.seed, 0)
    model, optimizers = make_updates(case.model)
    schedules = [CosineAnnealingLR(one, STEPS) for one in optimizers.values()]
    for one in optimizers.values():
        one._opt_called = True  # one that waits for its first update is no mistake
    losses, weights, updates = [], [], 0
    for used in steps:
        applied = False
        for name, optimizer in optimizers.items():
            rows = used[name]
            weight, loss = int(lengths[rows].sum()), math.nan
            if weight:  # else nothing is left: no update
                mask = torch.arange(LENGTH) < lengths[rows][:, None]
                each = F.cross_entropy(model(x[rows]).transpose(1, 2), y[rows], reduction="none")
                mean = (each * mask).sum() / weight
                model.zero_grad()
                mean.backward()
                params = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(params, 0.5)
                optimizer.step()
                loss, applied = mean.item(), True
        losses.append(loss)
        weights.append(weight)
        for schedule in schedules if applied else ():  # it waits for steps without an update
            schedule.step()
        updates += applied
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    return params, losses, weights, optimizer.param_groups[0]["lr"], updates


def updates_of(case):
    return ["weights", "biases"] if case.model == TWO else [""]


def check_data(case, by_rank):
    """Every sample was seen once an epoch, in batches of the right size; returns what was used."""
    steps = plan(case, len(by_rank))
    names = updates_of(case)
    seen, used = [[] for _ in steps], [{name: [] for name in names} for _ in steps]
    for rank in by_rank:
        for number, update, rows, skipped in rank["seen"]:
            seen[number] += rows if update == names[0] else []
            for name in [update] if case.hook == "on_loss" else names:
                used[number][name] += [] if skipped else rows
    if case.streams is not None:
        assert [sorted(rows) for rows in seen] == steps, case
        return used
    assert [len(rows) for rows in seen] == steps, case
    per_epoch = -(-case.samples // case.sizes[1])
    for first in range(0, STEPS, per_epoch):
        epoch = sorted(itertools.chain(*seen[first : first + per_epoch]))
        assert len(epoch) == len(set(epoch)), case
        if first + per_epoch <= STEPS:
            assert epoch == list(range(case.samples)), case
    return used


def check_reports(case, history, losses, weights, skipped):
    """Each report is the mean over its steps' tokens; every skip is counted once."""
    done = 0
    name = f"train/{updates_of(case)[-1]}/loss".replace("//", "/")
    for row in history:
        if name not in row:
            continue
        window = range(done, done := row["step"])
        total = math.fsum(losses[i] * weights[i] for i in window if weights[i])
        mean = total / sum(weights[i] for i in window)
        assert row[name] == pytest.approx(mean, rel=1e-12, abs=1e-12), case
    assert sum(row.get("skipped", 0.0) for row in history) == pytest.approx(skipped), case
    assert sum(weights[done:]) == 0, case


@pytest.mark.parametrize(
    ("world_size", "strategy", "models"),
    [
        *((*world, MODELS) for world in QUICK),
        *(pytest.param(*world, MODELS, **SLOW) for world in REST),
        pytest.param(2, "ddp", [TWO], **SLOW),
        pytest.param(3, "flat", [TWO], **SLOW),
    ],
)
def test_random_skips_and_streams_are_the_same_by_hand(world_size, strategy, models):
    drawn = draw(world_size, 1 if models is MODELS else 2, models)
    by_rank = run_processes(train_drawn, world_size, strategy, drawn, timeout_s=100)
    happened = {"some skipped": 0, "all skipped": 0, "some ran dry": 0, "ragged micro-batches": 0}
    for case, *ranks in zip(drawn, *by_rank, strict=True):
        used = check_data(case, ranks)
        params, losses, weights, lr, updates = by_hand(case, used)
        for found in ranks:
            assert found["losses"] == pytest.approx(losses, rel=1e-12, abs=1e-12, nan_ok=True), case
            assert found["lr"] == pytest.approx(lr, rel=1e-14), case
            assert found["updates"] == updates, case
            for name, value in found["params"].items():
                assert torch.equal(value, ranks[0]["params"][name]), case
        for name, value in ranks[0]["params"].items():
            if name not in ZERO_GRADIENT:
                distance = (value - params[name]).norm() / params[name].norm()
                assert distance <= 1e-12, f"{case}: {name} is {distance:.1e} away"
        skipped = sum(skip for found in ranks for *_, skip in found["seen"])
        check_reports(case, ranks[0]["history"], losses, weights, skipped)
        names = updates_of(case) if case.hook == "on_loss" else updates_of(case)[:1]
        for place in itertools.product(range(STEPS), names):
            each = [[skip for *at, _, skip in found["seen"] if (*at,) == place] for found in ranks]
            flat = [skip for skips in each for skip in skips]
            happened["some skipped"] += any(flat) and not all(flat)
            happened["all skipped"] += all(flat)
            happened["some ran dry"] += case.streams is not None and not all(each)
            counts = {len(skips) for skips in each}
            happened["ragged micro-batches"] += case.streams is None and len(counts) > 1
    if world_size == 1:  # there is nobody to differ from
        del happened["some ran dry"], happened["ragged micro-batches"]
    # The cases would prove nothing if these did not occur in them.
    assert all(happened.values()), happened
