"""A range test of learning rates, a batch size that fits: equal on all ranks, nothing is left."""

import copy
import functools
import random
import threading
import xml.etree.ElementTree as ElementTree

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import StepLR

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    Freeze,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
)
from dtrain.distributed import derive_seed
from dtrain.testing import run_ranks, try_ranks

DATA = tiny.dataset(96)
DOUBLES = torch.utils.data.TensorDataset(DATA.tensors[0].double(), DATA.tensors[1])


def told(outcomes):
    """What each rank's error says, with its notes."""
    return [
        " ".join([f"{type(one.error).__name__}: {one.error}", *getattr(one.error, "__notes__", ())])
        for one in outcomes
    ]


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def swept(*callbacks, strategy="auto", **options):
    run = tiny.trainer(
        callbacks, net=tiny.model(dtype=torch.float64), optimizer=sgd, strategy=strategy
    )
    return dtrain.lr_range_test(
        run, DOUBLES, batch_size=16, **({"steps": 30, "end": 100.0} | options)
    )


@functools.cache
def plain(steps=30, start=1e-7, end=100.0):
    """The same by hand: epochs in dtrain's order follow one another."""
    net = tiny.model(dtype=torch.float64)
    opt, order, losses = sgd(net), dtrain.data.Shuffled(96, derive_seed(0, 4)), []
    for step in range(steps):
        epoch, at = divmod(step, 6)
        rows = order.indices(epoch, at * 16, at * 16 + 16)
        opt.param_groups[0]["lr"] = start * (end / start) ** (step / (steps - 1))
        loss = tiny.loss_fn(net, DOUBLES[rows]).mean
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("ranks", "callbacks"), [(1, ()), (2, (GradientAccumulation(3),)), (3, ())]
)
def test_its_losses_are_those_of_one_process(ranks, callbacks):
    first, *others = run_ranks(swept, ranks, *callbacks)
    assert all(other == first for other in others)
    assert 10 < len(first.losses) <= 30
    assert first.losses == pytest.approx(plain()[: len(first.losses)], rel=1e-9)
    assert first.losses[:20] == pytest.approx(plain()[:20], rel=1e-12)
    assert first.rates[0] == 1e-7
    assert len(first.rates) == len(first.smoothed) == len(first.losses)
    assert 1e-3 < first.suggestion < 10


def swept_with_ddp():  # also in processes: test_outputs.py
    return swept(strategy="ddp").losses


def then_trained(folder, tries):
    """Trains, perhaps after both attempts; returns all that must not differ."""
    callbacks = [
        MixedPrecision("bf16"),
        ClipGradients(1.0),
        NonFiniteGuard(),
        EMA(0.9),
        LRSchedule(lambda opt, steps: StepLR(opt, 4)),
        Checkpoint(every_epochs=1),
    ]
    net = torch.nn.Sequential(tiny.model(), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.2))
    opt = tiny.adam(net, fused=True)
    opt.param_groups[0]["mine"] = 1
    run = tiny.trainer(callbacks, net=net, optimizer=opt, run_dir=folder)
    before = copy.deepcopy((net.state_dict(), opt.state_dict()))
    if tries:
        for result in (
            dtrain.lr_range_test(run, DATA, batch_size=16, steps=20, picture=folder / "a.svg"),
            dtrain.find_batch_size(run, DATA, batch_size=16),
        ):
            assert result
        (folder / "a.svg").unlink(missing_ok=True) if run.world.is_main else None
        run.world.comm.barrier("removed")
        assert not [*folder.iterdir()]
        now = net.state_dict(), opt.state_dict()
        assert str(now) == str(before)
        assert all(map(torch.equal, now[0].values(), before[0].values()))
        assert all(p.grad is None for p in net.parameters())
    result = run.fit(DATA, batch_size=16, epochs=2)
    return tiny.digest(net), result.metrics, torch.get_rng_state().tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_of_it_is_left(ranks, tmp_path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    with_it = run_ranks(then_trained, ranks, tmp_path / "with", True)
    without = run_ranks(then_trained, ranks, tmp_path / "without", False)
    assert with_it == without


def with_groups():
    net = tiny.model()
    opt = torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.2}]
    )

    class Rates(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            rates.append(tuple(group["lr"] for group in ctx.optimizer.param_groups))
            ctx.optimizer.param_groups[0]["extra"] = 1

        def __deepcopy__(self, memo):
            return self

    rates = []
    run = tiny.trainer([Rates()], net=net, optimizer=opt)
    found = dtrain.lr_range_test(run, DATA, batch_size=16, steps=5, start=0.01, end=0.16)
    assert "extra" not in opt.param_groups[0]
    return rates, found.rates, [group["lr"] for group in opt.param_groups]


def test_groups_keep_their_proportion():
    for rates, first, after in run_ranks(with_groups, 2):
        assert first == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
        assert rates == [(rate, 2 * rate) for rate in first]
        assert after == [0.1, 0.2]


def test_the_picture(tmp_path):
    found, other = run_ranks(lambda: swept(picture=tmp_path / "rates.svg"), 2)
    assert found.svg() == other.svg() == (tmp_path / "rates.svg").read_text()
    root = ElementTree.fromstring(found.svg())
    lines = [one for one in root if one.tag.endswith("polyline")]
    assert [len(one.get("points").split()) for one in lines] == [len(found.rates)] * 2
    words = [one.text for one in root if one.tag.endswith("text")]
    assert "1e-7" in words
    assert f"{found.suggestion:.2g}" in words


def no_number(net, batch):
    loss = tiny.loss_fn(net, batch).mean
    steps.append(1)
    return loss * float("nan") if len(steps) > 7 else loss


steps = []


def test_it_ends_where_the_loss_is_no_number():
    steps.clear()
    found = run_ranks(
        lambda: dtrain.lr_range_test(
            tiny.trainer(loss=no_number, optimizer=sgd), DATA, batch_size=16
        ),
        1,
    )[0]
    assert len(found.losses) == 7
    assert len(steps) < 12


class Skips(dtrain.Callback):
    def on_batch(self, ctx, step):
        ctx.request.skip("none of these")


def without_a_curve(skips):
    nan = lambda net, batch: tiny.loss_fn(net, batch).mean * float("nan")  # noqa: E731
    run = tiny.trainer([Skips()]) if skips else tiny.trainer(loss=nan)
    dtrain.lr_range_test(run, DATA, batch_size=16, steps=3)


@pytest.mark.parametrize(
    ("skips", "words"),
    [
        (True, "for all steps were skipped"),
        (False, "for at the first rate, 1e-07, the loss is nan"),
    ],
)
def test_where_there_is_no_curve_that_is_said(skips, words):
    for error in told(try_ranks(without_a_curve, 2, skips)):
        assert f"LossError: lr_range_test: there is no curve, {words}. That is not the" in error


def grows(net, batch):
    steps.append(1)
    return tiny.loss_fn(net, batch).mean * (9 if len(steps) > 7 else 1)


def test_it_ends_where_the_loss_has_grown():
    steps.clear()
    run = lambda: dtrain.lr_range_test(  # noqa: E731
        tiny.trainer(loss=grows, optimizer=sgd), DATA, batch_size=16, end=1e-6
    )
    (found,) = run_ranks(run, 1)
    over = [n for n, loss in enumerate(found.smoothed) if loss > 4 * min(found.smoothed)]
    assert over[0] > 8
    assert len(found.losses) <= over[0] + 2  # a request is heard in the next step


def after_a_fit(call):
    run = tiny.trainer(optimizer=sgd)
    run.fit(DATA, batch_size=16, max_steps=1)
    call(run, DATA, batch_size=16)


def fails_on_one(call):
    def loss(net, batch):
        if run.world.rank == 1:
            raise ValueError("torn")
        return tiny.loss_fn(net, batch)

    run = tiny.trainer(loss=loss, optimizer=sgd)
    before = tiny.digest(run.model)
    try:
        call(run, DATA, batch_size=16)
    finally:
        assert tiny.digest(run.model) == before


BOTH = [dtrain.lr_range_test, dtrain.find_batch_size]


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_be_is_told(call, ranks):
    for error in told(try_ranks(after_a_fit, ranks, call)):
        assert f"{call.__name__} comes before the Trainer's first fit: make a new Trainer" in error
    none = try_ranks(lambda: call(tiny.trainer(optimizer=None), DATA, batch_size=16), ranks)
    for error in told(none):
        assert "made without an optimizer" in error
    for error in told(try_ranks(fails_on_one, 2, call)):
        assert "torn" in error


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.0, "end": 1.0}, {"steps": 1}])
def test_rates_that_cannot_be(options):
    for error in told(try_ranks(lambda: swept(**options), 2)):
        assert "rates above 0 that grow, in 2 steps or more" in error


# ------------------------------------------------------------------------------- of any make


class Sam(torch.optim.Optimizer):
    """With an optimizer within, whose state is its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        self.state[self.param_groups[0]["params"][0]]["seen"] = torch.ones(1)
        self.base.step()
        torch.enable_grad()(closure)()


def two(net):
    return [
        torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(net[2].parameters(), lr=0.2),
    ]


def plan(progress):
    return ("out", "hidden") if progress.step % 2 else ("out",)


def in_turn(net, batch, ctx):
    """Of two losses, the second only in every second step, of what the first has changed."""
    yield "out", tiny.loss_fn(net, batch).mean
    if ctx.progress.step % 2:
        yield "hidden", 2 * tiny.loss_fn(net, batch).mean


MAKES = {
    "a list": {"optimizer": two},
    "a dict": {
        "optimizer": lambda net: dict(zip(("hidden", "out"), two(net), strict=True)),
        "loss": in_turn,
        "updates": plan,
    },
    "LBFGS": {"optimizer": lambda net: torch.optim.LBFGS(net.parameters(), max_iter=3)},
    "SAM": {"optimizer": lambda net: dtrain.WithClosure(Sam(net.parameters()))},
}


def held(optimizer):
    """All that an optimizer keeps, as text, but for a parameter's own values."""
    parts = dtrain.context.parts_of(optimizer).values()
    each = [*parts, *(one.base for one in parts if hasattr(one, "base"))]
    names = [str(vars(one).get("calls")) for one in each]
    return [
        (str([*one.state.values()]), str(one.state_dict()["param_groups"])) for one in each
    ], names


def of_any_make(tries):
    """Trains, perhaps after both attempts; returns all that must not differ."""
    found = {}
    for name, make in MAKES.items():
        torch.set_num_threads(1)
        run = tiny.trainer(net=tiny.model(dtype=torch.float64), **make)
        before = tiny.digest(run.model), held(run.optimizer)
        if tries:
            which = {"optimizer": "out"} if name == "a dict" else {}
            curve = dtrain.lr_range_test(run, DOUBLES, batch_size=16, steps=7, end=0.1, **which)
            assert len(curve.losses) == 7
            assert dtrain.find_batch_size(run, DOUBLES, batch_size=16) == -(-16 // run.world.size)
            assert (tiny.digest(run.model), held(run.optimizer)) == before
        found[name] = run.fit(DOUBLES, batch_size=16, max_steps=4).metrics, tiny.digest(run.model)
    return found


def test_nothing_is_left_in_any_optimizers():
    assert run_ranks(of_any_make, 2, True) == run_ranks(of_any_make, 2, False)


def of_one(key):
    run = tiny.trainer(net=tiny.model(dtype=torch.float64), **MAKES["a dict"])
    options = {"steps": 8, "start": 0.01, "end": 1.0}
    found = dtrain.lr_range_test(run, DOUBLES, batch_size=16, optimizer=key, **options)
    return found.losses, found.rates


@functools.cache
def of_one_by_hand(key):
    net = tiny.model(dtype=torch.float64)
    hidden, out = two(net)
    order, losses = dtrain.data.Shuffled(96, derive_seed(0, 4)), []
    for step in range(8):
        epoch, at = divmod(step, 6)
        batch = DOUBLES[order.indices(epoch, at * 16, at * 16 + 16)]
        rate = 0.01 * 100 ** (step / 7)
        (out if key == "out" else hidden).param_groups[0]["lr"] = rate
        for name, one in (("out", out), ("hidden", hidden))[: 1 + step % 2]:
            loss = (1 + (name == "hidden")) * tiny.loss_fn(net, batch).mean
            net.zero_grad()
            loss.backward()
            one.step()
            if name == key:
                losses.append((rate, loss.item()))
    return losses


@pytest.mark.parametrize("ranks", [1, 3])
def test_of_several_losses_one_has_a_curve(ranks):
    for key in ("out", "hidden"):
        rates, losses = zip(*of_one_by_hand(key), strict=True)
        for found in run_ranks(of_one, ranks, key):
            assert found[0] == pytest.approx(losses, rel=1e-12)
            assert found[1] == pytest.approx(rates, rel=1e-12)


def test_which_of_several_must_be_known():
    for key, words in ((None, "pass optimizer='hidden' or optimizer='out'"), ("in", "no such opt")):
        for error in told(try_ranks(of_one, 2, key)):
            assert words in error


class Sees(dtrain.Callback):
    """Holds parts of the Trainer; notes what the attempt's one is made of."""

    def __init__(self, net, seen):
        self.net, self.seen = net, seen

    def __deepcopy__(self, memo):
        return Sees(copy.deepcopy(self.net, memo), self.seen)

    def on_grads_ready(self, ctx, step):
        engine = ctx._engine()
        trained = [n for n, p in ctx.model.named_parameters() if p.grad is not None]
        made = (
            engine.keep_modes,
            engine.replicas.active,
            engine.graph,
            engine.precision.name,
            engine.eval_fn(None, [], ctx),
            type(engine.strategy).__name__,
        )
        self.seen.append((self.net is ctx.model, made, ctx.model.training, trained))


class Counts(dtrain.Callback):
    count = 0

    def on_loss(self, ctx, step):
        self.count += 1
        torch.rand(1, generator=ctx.rng)
        torch.rand(1, generator=ctx.shared_rng)
        torch.rand(1), random.random()


def streams(run):
    own = [one.get_state().tolist() for one in (run.context.rng, run.context.shared_rng)]
    return own, torch.get_rng_state().tolist(), random.getstate()


def of_the_same_make():
    net, seen, counts = tiny.model().eval(), [], Counts()
    callbacks = [Freeze("0", until_epoch=99), Sees(net, seen), EMA(0.9), NonFiniteGuard(), counts]
    run = tiny.trainer(
        [*callbacks, MixedPrecision("bf16")],
        net=net,
        strategy="ddp",
        keep_modes=True,
        check_ranks=False,
        eval_fn=lambda net, batch: "the evaluation's own",
    )
    before = streams(run)
    dtrain.lr_range_test(run, DATA, batch_size=16, steps=2)
    dtrain.find_batch_size(run, DATA, batch_size=16)
    assert all(p.requires_grad for p in net.parameters())
    assert (streams(run), counts.count) == (before, 0)
    return seen, run._outbox.notes


def test_what_is_tried_is_of_the_same_make_and_what_is_not_is_said():
    for seen, notes in run_ranks(of_the_same_make, 2):
        options = True, False, False, "bfloat16 autocast", "the evaluation's own"
        made = [(True, (*options, name), False, ["2.weight", "2.bias"]) for name in ("DDP", "Flat")]
        assert [one for n, one in enumerate(seen) if one not in seen[:n]] == made
        told = [note for note in notes if "without" in note]
        assert told == [f"{c.__name__} tries it without EMA, NonFiniteGuard" for c in BOTH]


class Moving(torch.nn.Module):
    """Puts buffers in the place of others, counts, keeps tensors that cannot be written to."""

    def __init__(self):
        super().__init__()
        self.net, self.count, self.cache = tiny.model(), 0, torch.ones(1).expand(4)
        self.register_buffer("center", torch.zeros(2))
        with torch.inference_mode():
            self.table = torch.ones(2)

    def forward(self, x):
        self.count += 1
        out = self.net(x)
        self.center = 0.9 * self.center + out.detach().mean(0)
        return out - self.center


class Rebuilds(dtrain.Callback):
    def on_grads_ready(self, ctx, step):
        pass

    def on_fit_end(self, ctx):
        ctx.model.net[0].weight.requires_grad_(False)
        ctx.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def moved():
    net = Moving()
    center = net.center
    run = tiny.trainer([Rebuilds()], net=net)
    dtrain.lr_range_test(run, DATA, batch_size=16, steps=2)
    assert net.net[0].weight.requires_grad
    assert len(run.optimizer.param_groups) == 1
    return net.center is center, net.center.tolist(), net.count


def test_what_a_forward_replaces_and_counts_is_put_back():
    assert run_ranks(moved, 1) == [(True, [0.0, 0.0], 0)]


class Stream:
    """Goes on where it was, in a second pass, too."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            yield DATA[self.at : self.at + 4]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def of_batches():
    stream = Stream()
    next(iter(stream))
    dtrain.lr_range_test(tiny.trainer(), stream, steps=3)
    assert stream.at == 1
    dtrain.lr_range_test(tiny.trainer(), iter([DATA[:4]]), steps=3)


class Locked(dtrain.Callback):
    def __init__(self):
        self.lock = threading.Lock()

    def on_loss(self, ctx, step):
        pass


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (of_batches, "the data are an iterator, which gives its batches once"),
        (
            lambda: dtrain.lr_range_test(tiny.trainer([Locked()]), DATA, batch_size=16),
            "Locked cannot be copied (TypeError: cannot pickle '_thread.lock' object)",
        ),
    ],
)
def test_what_could_not_be_put_back_is_refused(run, words):
    for error in told(try_ranks(run, 2)):
        assert words in error


# ------------------------------------------------------------------------------- a batch size


def later(kind):
    """On the last rank, more than 3 samples do not fit: a second update, a second evaluation."""
    seen = []

    def full(batch):
        seen.append(1)
        is_late = kind == "update" or len(seen) % 3 == 0
        if run.world.rank == run.world.size - 1 and len(batch[0]) > 3 and is_late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def updates(net, batch):
        yield "hidden", tiny.loss_fn(net, batch).mean
        full(batch)
        yield "out", tiny.loss_fn(net, batch).mean

    def plain(net, batch):
        full(batch)
        return tiny.loss_fn(net, batch).mean

    if kind == "update":
        run = tiny.trainer(optimizer=MAKES["a dict"]["optimizer"], loss=updates)
    else:
        run = tiny.trainer(optimizer=MAKES["LBFGS"]["optimizer"], loss=plain)
    before = tiny.digest(run.model)
    micro = dtrain.find_batch_size(run, DATA, batch_size=12)
    return micro, tiny.digest(run.model) == before


@pytest.mark.parametrize("kind", ["update", "closure"])
def test_what_does_not_fit_later_in_a_step_does_not_fit(kind):
    assert run_ranks(later, 2, kind) == [(3, True)] * 2


def fitting(limit, batch_size=64, strategy="auto", where="loss_fn"):
    """On the last rank, more samples than the limit do not fit."""
    tried = []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def loss(net, batch):
        found = tiny.loss_fn(net, batch)
        if run.world.rank == run.world.size - 1:
            tried.append(len(batch[0]))
            if len(batch[0]) > limit and where == "loss_fn":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if len(batch[0]) > limit:
                found.mean = Full.apply(found.mean)
        return found

    run = tiny.trainer([GradientAccumulation(2)], loss=loss, optimizer=sgd, strategy=strategy)
    before = tiny.digest(run.model)
    micro = dtrain.find_batch_size(run, DATA, batch_size=batch_size)
    assert tiny.digest(run.model) == before
    return micro, tried


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("where", ["loss_fn", "backward"])
@pytest.mark.parametrize(("ranks", "limit", "micro"), [(1, 9, 8), (2, 12, 11)])
def test_the_largest_micro_batch_that_fits_on_all_ranks(ranks, limit, micro, where, strategy):
    found = run_ranks(fitting, ranks, limit, 64, strategy, where)
    assert [one for one, _ in found] == [micro] * ranks
    assert max(n for n in found[-1][1] if n <= limit) == micro


def of_few():
    return [dtrain.find_batch_size(tiny.trainer(), DATA, batch_size=n) for n in (1, 2, 3, 999)]


def test_no_more_is_said_to_fit_than_was_tried():
    assert run_ranks(of_few, 2) == [[1, 1, 2, 48]] * 2


def test_one_sample_that_does_not_fit():
    first, second = told(try_ranks(fitting, 2, 0))
    assert "RemoteError: rank 1 on" in first
    assert "OutOfMemoryError: CUDA out of memory" in second
    assert "(find_batch_size: with micro-batches of 1, the smallest)" in second


def test_ready_batches_have_their_size():
    def run():
        dtrain.find_batch_size(tiny.trainer(optimizer=sgd), [DATA[:4]])

    for error in told(try_ranks(run, 2)):
        assert "find_batch_size takes a dataset with a batch_size" in error
