"""Ranks that part are found, named, and not saved; buffers are equal where nothing shared them."""

import math

import pytest
import tiny
import torch
from torch import nn

import dtrain
from dtrain.callbacks import EMA, Checkpoint
from dtrain.checkpoint import format as files
from dtrain.distributed import digests
from dtrain.errors import ConfigError, RankMismatch
from dtrain.testing import run_processes, run_ranks, try_ranks


class Says(dtrain.Sink):
    def __init__(self):
        self.words, self.reports = [], []

    def open(self, run_dir):
        pass

    def write(self, report):
        self.reports.append(report)
        self.words += [report.text] if report.kind == "message" else []

    def close(self):
        pass


def fit(net, callbacks=(), *, run_dir=None, loss=tiny.loss_fn, data=None, trainer=None, **options):
    """Trains; returns what was said and the Trainer."""
    says = Says()
    options = {"batch_size": 16, "epochs": 2} | options
    dtrain.init(seed=0)
    made = dtrain.Trainer(
        net,
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        loss,
        callbacks=callbacks,
        sinks=[says],
        run_dir=run_dir,
        **(trainer or {}),
    )
    made.fit(data or tiny.dataset(), **options)
    return says, made


# ----------------------------------------------------------------------------- the digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 20_000])
def test_a_digest_sees_every_number_and_its_place(size, dtype):
    tensor = torch.arange(size, dtype=torch.float32).to(dtype) + 1
    seen = {digests([tensor])[0]}
    for place in {0, size // 2, size - 1}:
        other = tensor.clone()
        other[place] = -other[place]
        seen.add(digests([other])[0])
    assert len(seen) == 1 + len({0, size // 2, size - 1})
    swapped = tensor.clone()
    swapped[[0, size - 1]] = swapped[[size - 1, 0]]
    assert (digests([swapped]) == digests([tensor])) == (size == 1)
    assert digests([tensor.clone(), tensor.view(1, -1)]) == digests([tensor, tensor])


@pytest.mark.parametrize("name", ["bool", "int8", "uint16", "int32", "float8_e4m3fn", "float16"])
def test_every_dtype_has_a_digest(name):
    ones = torch.ones(5).to(getattr(torch, name))
    zeros = torch.zeros(5).to(getattr(torch, name))
    assert len({*digests([ones, zeros, ones[:4], torch.zeros(0), ones[0]])}) >= 4


# ----------------------------------------------------------------------------- parameters


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6, max_norm=1.0)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.table(x))


class Clamps(nn.Sequential):
    """Writes a parameter by what its own rank sees."""

    def forward(self, x):
        if self.training:
            self[0].weight.data.clamp_(-float(x.abs().mean()) / 5, float(x.abs().mean()) / 5)
        return super().forward(x)


def clamps():
    torch.manual_seed(3)
    return Clamps(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def looks(strategy):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(20, (40,), generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    data = torch.utils.data.TensorDataset(rows, labels)
    fit(Looked(), data=data, batch_size=8, log_every=1, trainer={"strategy": strategy})


def writes(strategy):
    fit(clamps(), log_every=1, trainer={"strategy": strategy})


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_forward_that_writes_parameters_is_an_error_that_names_them(strategy):
    for fn, name, cause in (
        (looks, "table.weight: ", "Likely cause: table has a max_norm"),
        (writes, "0.weight: ", "a forward that writes parameters by what its own rank sees"),
    ):
        for outcome in try_ranks(fn, 3, strategy):
            assert type(outcome.error) is RankMismatch
            told = str(outcome.error)
            assert "no longer equal at step 1;" in told
            assert name in told
            assert "on rank 1" in told
            assert "on rank 2" in told
            assert cause in told
            assert "No checkpoint is made" in told


class Parts(dtrain.Callback):
    """Changes a weight on the last rank, in the last bits."""

    def __init__(self, step=math.inf, at_end=False):
        self.step, self.at_end = step, at_end

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.step:
            self.part(ctx)

    def on_fit_end(self, ctx):
        if self.at_end:
            self.part(ctx)

    def part(self, ctx):
        world = dtrain.init(seed=0)
        if world.rank == world.size - 1:
            weight = ctx.model[2].weight.data
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def parts_before_a_save(run_dir):
    fit(tiny.model(), [Parts(8), Checkpoint(every_steps=6)], run_dir=run_dir, log_every=1000)


class Masked(nn.Sequential):
    """Has a parameter with whose numbers nothing can be computed."""

    def __init__(self, dtype):
        torch.manual_seed(3)
        super().__init__(nn.Linear(8, 2))
        self.mask = nn.Parameter(torch.zeros(8).to(dtype), requires_grad=False)


class Masks(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if dtrain.init().rank:
            ctx.model.mask.data.view(torch.uint8)[0] = 1


def masks(dtype):
    fit(Masked(dtype), [Masks()], log_every=1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_a_parameter_of_any_dtype_that_parted_is_named(dtype):
    for outcome in try_ranks(masks, 2, dtype):
        assert type(outcome.error) is RankMismatch
        assert "  mask: " in str(outcome.error)


def test_no_checkpoint_is_made_of_ranks_that_parted(tmp_path):
    for outcome in try_ranks(parts_before_a_save, 2, tmp_path):
        assert type(outcome.error) is RankMismatch
        assert "no longer equal at step 12;" in str(outcome.error)
        assert "2.weight: " in str(outcome.error)
        assert "0.weight" not in str(outcome.error)
    saved, damage = files.find(tmp_path / "checkpoints")
    assert (saved.step, damage) == (6, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def parts_while_nobody_reports(check_ranks, at_end):
    parts = Parts(at_end=True) if at_end else Parts(11)
    fit(tiny.model(), [parts], max_steps=11, trainer={"check_ranks": check_ranks}, log_every=1000)


@pytest.mark.parametrize("at_end", [False, True])
def test_the_end_of_fit_looks_once_more(at_end):
    for outcome in try_ranks(parts_while_nobody_reports, 2, True, at_end):
        assert type(outcome.error) is RankMismatch
        assert "2.weight: " in str(outcome.error)
    assert not any(one.error for one in try_ranks(parts_while_nobody_reports, 2, False, at_end))
    assert not any(one.error for one in try_ranks(parts_while_nobody_reports, 1, True, at_end))


def looked_at():
    fit(tiny.model(), epochs=40, log_every=7)


def test_reports_look_every_fifty_steps(monkeypatch):
    marks = []
    mark = dtrain.distributed.Replicas.mark

    def marked(self, step):
        found = mark(self, step)
        marks.append((step, found > 0))
        return found

    monkeypatch.setattr(dtrain.distributed.Replicas, "mark", marked)
    run_ranks(looked_at, 2)
    due = sorted({step for step, found in marks if found})
    assert due[-1] > 200
    assert {step for step, _ in marks} > {*due}
    later = [step for step in due if step >= 50]
    assert len({step // 50 for step in later}) == len(later)


# ----------------------------------------------------------------------------- buffers


class Spectral(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        norm = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16))
        super().__init__(norm, nn.Tanh(), nn.Linear(16, 2))


class Normed(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))


class Averages(nn.Sequential):
    """Keeps a statistic of its own, as a codebook does."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen.lerp_(x.mean(0), 0.1)
            self.count[int(x[0, 0] > 0)] += 1
        return super().forward(x)


def moves(kind, samples, log_every):
    net = kind()
    says, _ = fit(net, data=tiny.dataset(samples), batch_size=7, log_every=log_every)
    return [[b.tolist() for b in net.buffers()], [p.tolist() for p in net.parameters()], says.words]


# With 29, rank 1 is idle in an epoch's last step, which BatchNorm's one sample would not bear.
@pytest.mark.parametrize(
    ("kind", "samples"), [(Spectral, 29), (Averages, 29), (Averages, 28), (Normed, 28)]
)
def test_buffers_are_equal_after_fit_where_nothing_shared_them(kind, samples):
    (*one, words), (*two, _) = run_ranks(moves, 2, kind, samples, 1000)
    assert one == two
    assert not [w for w in words if "buffers" in w] or kind is Averages


def test_buffers_that_ranks_write_differently_are_named_once():
    for kind in (Spectral, Normed, Averages):
        (*one, words), (*two, _) = run_ranks(moves, 2, kind, 28 if kind is Normed else 29, 1)
        assert one == two
        told = [word for word in words if "buffers" in word]
        assert len(told) == (kind is Averages)
        if told:
            assert "the ranks' buffers seen, count differed at step 1" in told[0]


# ----------------------------------------------------------------------------- odd ones

ODD = {
    "int16": lambda: torch.arange(3, dtype=torch.int16),
    "uint16": lambda: torch.arange(3).to(torch.uint16),
    "uint32": lambda: torch.arange(3).to(torch.uint32),
    "float8": lambda: torch.arange(3.0).to(torch.float8_e4m3fn),
    "bool": lambda: torch.tensor(True),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "NaN": lambda: torch.full((2,), math.nan),
    "empty": lambda: torch.zeros(0),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
}


def with_odd_buffers(run_dir, epochs):
    net = tiny.model()
    for name, make in ODD.items():
        net[0].register_buffer(name, make())
    if dtrain.init(seed=0).rank == 1:
        net[0].int16 += 1  # what is made equal at the start
    says, made = fit(net, [Checkpoint()], run_dir=run_dir, epochs=epochs, eval_set=tiny.dataset(16))
    words = [w for w in says.words if "equal" in w or "warning" in w]
    return {name: repr(net[0].get_buffer(name)) for name in ODD}, words, made.context.progress.step


def odd_twice(run_dir):
    return with_odd_buffers(run_dir, 1), with_odd_buffers(run_dir, 2)


def test_odd_buffers_train_are_saved_and_come_back(tmp_path):
    wanted = {name: repr(make().contiguous()) for name, make in ODD.items()}
    for size, run in ((2, run_processes), (1, run_ranks)):
        for first, second in run(odd_twice, size, tmp_path / str(size)):
            assert {n: r.replace(", requires_grad=True", "") for n, r in first[0].items()} == wanted
            assert first[0] == second[0]
            assert (first[2], second[2]) == (6, 12)
    assert len(first[1]) == 0


def sparse_buffer():
    net = tiny.model()
    net[0].register_buffer("adjacency", torch.eye(3).to_sparse())
    fit(net)


def complex_buffer(run_dir):
    net = tiny.model()
    net[0].register_buffer("waves", torch.zeros(3, dtype=torch.complex128))
    fit(net, [Checkpoint()], run_dir=run_dir)


def test_what_cannot_be_kept_is_named(tmp_path):
    for size in (1, 2):
        for outcome in try_ranks(sparse_buffer, size):
            assert isinstance(outcome.error, ConfigError | dtrain.DtrainError)
            assert "adjacency is torch.sparse_coo" in str(outcome.error)
        for outcome in try_ranks(complex_buffer, size, tmp_path / str(size)):
            assert "0.waves (model) cannot be saved" in str(outcome.error)
            assert "view_as_real" in str(outcome.error)


class Registers(dtrain.Callback):
    """Gives the model of one rank a buffer more, in the middle of an epoch."""

    def on_step_end(self, ctx, step):
        if step.number == 1 and dtrain.init().rank == 1:
            ctx.model.register_buffer("late", torch.zeros(3))


def test_a_buffer_that_one_rank_has_alone_is_named():
    for outcome in try_ranks(lambda: fit(tiny.model(), [Registers()], epochs=1), 2):
        assert isinstance(outcome.error, RankMismatch), outcome.trace
        words = "the ranks' buffers late do not look alike: none on rank 0, [3] on rank 1"
        assert words in str(outcome.error)


# ----------------------------------------------------------------------------- extra state


class Scaled(nn.Linear):
    """Keeps a dict in checkpoints that is no parameter."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = {"calls": 0, "words": ("a", None), "scale": torch.zeros(2), 3: 1.5}

    def forward(self, x):
        self.extra["calls"] += self.training
        self.extra["scale"] += self.training
        return super().forward(x)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class AnObject(nn.Linear):
    def get_extra_state(self):
        return object()

    def set_extra_state(self, state):
        pass


def scales(run_dir, kind, epochs):
    torch.manual_seed(3)
    net = nn.Sequential(kind(8, 16), nn.Tanh(), nn.Linear(16, 2))
    stop = dtrain.callbacks.EarlyStopping("eval/loss", restore_best=True, patience=100)
    fit(net, [Checkpoint(), stop], run_dir=run_dir, epochs=epochs, eval_set=tiny.dataset(16))
    return repr(net[0].extra)


class Grows(nn.Sequential):
    """Keeps a cache as long as the longest batch that its rank has seen, made by the forward."""

    def __init__(self, persistent):
        torch.manual_seed(3)
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.persistent = persistent

    def forward(self, x):
        if self.training:
            size = len(x) + dtrain.init(seed=0).rank
            self.register_buffer("cache", torch.zeros(size), persistent=self.persistent)
            if dtrain.init(seed=0).rank:
                self.register_buffer("late", torch.ones(2).expand(3, 2), persistent=False)
        return super().forward(x)


def grows(persistent, run_dir):
    net = Grows(persistent)
    says, _ = fit(net, [Checkpoint()], run_dir=run_dir, log_every=1, eval_set=tiny.dataset(16))
    return list(net.cache.shape), len([word for word in says.words if "buffers" in word])


def test_caches_of_each_ranks_own_length_are_left_alone(tmp_path):
    assert run_ranks(grows, 2, False, tmp_path / "a") == [([8], 0), ([9], 0)]
    for outcome in try_ranks(grows, 2, True, tmp_path / "b"):
        assert type(outcome.error) is RankMismatch
        told = "the ranks' buffers cache do not look alike: [8] on rank 0, [9] on rank 1"
        assert told in str(outcome.error)


@pytest.mark.parametrize("size", [1, 2])
def test_extra_state_is_saved_and_comes_back(size, tmp_path):
    first = run_ranks(scales, size, tmp_path / "a", Scaled, 1)
    second = run_ranks(scales, size, tmp_path / "a", Scaled, 2)
    assert "'calls': 6, 'words': ('a', None), 'scale': tensor([6., 6.]), 3: 1.5" in first[0]
    assert second[0] == first[0].replace("6", "12") == second[-1]
    again = nn.Sequential(Scaled(8, 16), nn.Tanh(), nn.Linear(16, 2))
    dtrain.load_model(tmp_path / "a", again)
    assert repr(again[0].extra) == second[0]
    for outcome in try_ranks(scales, size, tmp_path / "b", AnObject, 1):
        assert "0._extra_state is object; a checkpoint holds dicts" in str(outcome.error)


class WritesNaN(dtrain.Callback):
    """All ranks have NaN at the same place, with other bits."""

    def on_step_end(self, ctx, step):
        weight = ctx.model[2].weight.data
        weight[0, 0] = torch.tensor([0x7FC00000 + dtrain.init(seed=0).rank]).int().view(torch.float)


def has_nan(run_dir):
    fit(tiny.model(), [WritesNaN(), Checkpoint()], run_dir=run_dir, log_every=1)


def test_nan_of_other_bits_is_no_parting(tmp_path):
    run_ranks(has_nan, 2, tmp_path)
    assert [path.name for path in (tmp_path / "not-finite").iterdir()] == ["step-00000012"]


# ----------------------------------------------------------------------------- odd strides


class OneNumber(nn.Module):
    """Of a single number, torch takes any stride for contiguous; it cannot be seen as bytes so."""

    def __init__(self):
        super().__init__()
        self.net = tiny.model()
        self.scale = nn.Parameter(torch.ones(1, 8)[:, 0])
        self.register_buffer("shift", torch.ones(1, 8)[:, 0])

    def forward(self, x):
        return self.net(x) * self.scale + self.shift


def with_one_number(folder, strategy):
    callbacks = [EMA(0.9), Checkpoint(every_steps=1, trainable_only=strategy == "flat")]
    _, made = fit(
        OneNumber(), callbacks, run_dir=folder, max_steps=2, trainer={"strategy": strategy}
    )
    other = OneNumber()
    dtrain.load_model(folder, other)
    comm, column = made.world.comm, torch.arange(16.0).view(2, 8)[:1, 3]
    sent = comm.all_reduce("a", column, op="max"), comm.broadcast("b", column)
    assert comm.all_gather("c", column).shape == (made.world.size, 1)
    return [float(one) for one in sent], torch.equal(other.scale, made.model.scale)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "flat"), (2, "flat"), (2, "ddp")])
def test_a_single_number_with_any_stride(ranks, strategy, tmp_path):
    found = run_ranks(with_one_number, ranks, tmp_path, strategy)
    assert found == [([3.0, 3.0], True)] * ranks
