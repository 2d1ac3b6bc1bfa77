"""What was a bare Python error, or nothing at all: it works now, or says what to do."""

import functools
import threading
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import (
    ClipGradients,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LabelSmoothing,
    LRSchedule,
    MixedPrecision,
    Mixup,
)
from dtrain.errors import ConfigError, DataError, LossError, RemoteError
from dtrain.testing import run_processes, run_ranks, try_ranks

SIZES = pytest.mark.parametrize("size", [1, 2])


def fit(callbacks=(), *, trains=None, epochs=1, batch_size=24, **options):
    trainer = tiny.trainer(callbacks, **options)
    data = tiny.dataset() if trains is None else trains
    return trainer.fit(data, batch_size=batch_size, epochs=epochs)


def refused(fn, size, kind, *words):
    """All ranks raise it, or are told of it; at least one has the original."""
    errors = [outcome.error for outcome in try_ranks(fn, size)]
    assert any(type(error) is kind for error in errors), errors
    for error in errors:
        assert isinstance(error, kind | RemoteError), error
        told = " ".join([str(error), *getattr(error, "__notes__", ())])
        for word in words:
            assert word in told, told


# -- the optimizer ---------------------------------------------------------------------------------


def adam_and_schedule(net):
    adam = torch.optim.Adam(net.parameters())
    return [adam], [torch.optim.lr_scheduler.StepLR(adam, 10)]


@SIZES
@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (adam_and_schedule, ("several (list, list)", "LRSchedule")),
        (lambda net: [*adam_and_schedule(net)[0], None], ("several (Adam, NoneType)",)),
        (lambda net: {"optimizer 1": tiny.adam(net)}, ("named 'optimizer 1'", "a plain word")),
        (torch.optim.AdamW, ("takes parameters, not a model", "lambda m: AdamW(m.parameters()")),
        (functools.partial(torch.optim.SGD, lr=0.1), ("lambda m: SGD(m.parameters(), ...)",)),
        (
            lambda net: [torch.optim.LBFGS(net[0].parameters()), tiny.adam(net[2])],
            ("LBFGS cannot be one of several", "closure"),
        ),
        ("adam", ("'adam', no torch.optim.Optimizer",)),
    ],
)
def test_what_is_no_optimizer_for_a_trainer_is_refused(size, optimizer, words):
    refused(lambda: tiny.trainer(optimizer=optimizer), size, ConfigError, *words)


@SIZES
def test_a_function_that_fails_to_make_the_optimizer_is_named(size):
    swapped = functools.partial(tiny.trainer, optimizer=plain, loss=tiny.adam)
    refused(swapped, size, TypeError, "(while the optimizer was made: <function plain at ")


# -- the loss function -----------------------------------------------------------------------------


def plain(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


class Module(nn.Module):
    def forward(self, net, batch):
        return plain(net, batch)


class ModuleOfThree(nn.Module):
    def forward(self, net, batch, ctx):
        assert isinstance(ctx, dtrain.Context)
        return plain(net, batch)


def seen_by(seen):
    """Loss functions that are handed a context, in every way there is to ask for one."""

    def keep(net, batch, ctx):
        seen.append(ctx)
        return plain(net, batch)

    def by_place(net, batch, ctx):
        return keep(net, batch, ctx)

    def optional(net, batch, ctx=None):
        return keep(net, batch, ctx)

    def after_another(net, batch, scale=1.0, ctx=None):
        assert scale == 1.0
        return keep(net, batch, ctx)

    def by_keyword(net, batch, *, ctx):
        return keep(net, batch, ctx)

    def annotated(net, batch, context: dtrain.Context = None):
        return keep(net, batch, context)

    @functools.wraps(optional)
    def decorated(*args, **kwargs):
        return optional(*args, **kwargs)

    def of_any(*args):
        return keep(*args)

    def by_another_name(net, batch, c):
        return keep(net, batch, c)

    class WithCall:
        def __call__(self, net, batch, ctx=None):
            return keep(net, batch, ctx)

        def method(self, net, batch, ctx=None):
            return keep(net, batch, ctx)

    partial = functools.partial(after_another, scale=1.0)
    named = {f.__name__: f for f in (by_place, optional, after_another, by_keyword, annotated)}
    named |= {"decorated": decorated, "of_any": of_any, "partial": partial}
    named["by another name"] = by_another_name
    return named | {"object": WithCall(), "method": WithCall().method}


@SIZES
def test_a_context_is_given_to_whoever_asks_for_it(size):
    def contexts():
        found = {}
        for name, loss in seen_by(seen := []).items():
            fit(loss=loss)
            found[name] = {type(ctx) for ctx in seen}, len(seen)
            seen.clear()
        return found

    for found in run_ranks(contexts, size):
        assert found == dict.fromkeys(seen_by([]), ({dtrain.Context}, 4))


@SIZES
def test_loss_functions_that_want_none_get_none(size):
    @functools.wraps(plain)
    def decorated(*args, **kwargs):
        return plain(*args, **kwargs)

    def scaled(net, batch, scale=1.0):
        return plain(net, batch) * scale

    own = functools.partial(lambda net, batch, ctx=None: plain(net, batch) + ctx, ctx=0.0)

    def losses():
        kinds = [plain, Module(), ModuleOfThree(), decorated, scaled, own]
        return [fit(loss=loss).metrics["train/loss"] for loss in kinds]

    for found in run_ranks(losses, size):
        assert found == [found[0]] * 6


class Trained(Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def bare_decorator(loss):
    return lambda *args: loss(*args)


@SIZES
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(), ("CrossEntropyLoss() takes (input, target)", "criterion(model(")),
        (F.mse_loss, ("takes (input, target)",)),
        (lambda pred, targets: 0, ("takes (pred, targets)",)),
        (lambda batch, batch_idx: 0, ("in this order", "takes (batch, batch_idx)")),
        (nn.CrossEntropyLoss, ("must take (model, batch)",)),
        (lambda net, batch, *, scale: 0, ("takes net, batch, scale",)),
        (lambda net, batch, scale, ctx=None: 0, ("takes net, batch, scale, ctx",)),
        (max, ("must be a function",)),
        (None, ("must be a function",)),
        (Trained(), ("parameters of its own", "scale")),
    ],
)
def test_what_is_no_loss_function_is_refused(size, loss, words):
    refused(lambda: tiny.trainer(loss=loss), size, LossError, *words)


@SIZES
def test_a_decorator_that_hides_what_it_wraps_is_named(size):
    refused(lambda: fit(loss=bare_decorator(plain)), size, TypeError, "functools.wraps")


def labelled(y, features=8):
    return TensorDataset(torch.ones(len(y), features), y)


@SIZES
@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        (torch.arange(96) % 7, IndexError, ("int64 [", " to 6; ", "from 0 to 1")),
        (torch.ones(96, dtype=torch.int32), RuntimeError, ("the target int32 [", "must be int64")),
        (torch.ones(96), RuntimeError, ("F.cross_entropy: the input is float32 [", "float32 [")),
        (torch.ones(96, 3), RuntimeError, ("or else floats [",)),
    ],
)
def test_labels_that_do_not_fit_are_described_to_all_ranks(size, labels, kind, words):
    refused(lambda: fit(loss=plain, trains=labelled(labels)), size, kind, *words)

    def evaluate():
        dtrain.init(seed=0)
        trainer = tiny.trainer(loss=plain)
        trainer.evaluate(labelled(labels), batch_size=24)

    refused(evaluate, size, kind, *words)


def test_the_other_rank_is_told_of_labels_as_well():
    labels = torch.arange(96) % 2
    labels[-12:] = 7  # rank 1's share of the last batch

    def train():
        fit(loss=plain, trains=dtrain.Data(labelled(labels), 24, shuffle=False), batch_size=None)

    other, own = (outcome.error for outcome in try_ranks(train, 2))
    assert (type(other), type(own)) == (RemoteError, IndexError)
    assert own.__notes__[0] in str(other)
    assert "the target int64 [12] from 7 to 7; class indices" in str(other)


def test_other_losses_of_torch_are_described_as_well():
    def broken(net, batch):
        return F.binary_cross_entropy(net(batch[0])[:, 0], batch[1].float() * 3)

    words = "F.binary_cross_entropy: the input is float32 [24], the target float32 [24] from 0 to 3"
    refused(lambda: fit(loss=broken), 1, RuntimeError, words)


def test_labels_of_pictures_are_described_by_their_classes():
    def segments(net, batch):
        scores = net(batch[0])[:, :, None, None].expand(-1, -1, 5, 4)
        return F.cross_entropy(scores, batch[1][:, None, None].expand(-1, 5, 4) + 2)

    words = "the input is float32 [24, 2, 5, 4], the target int64 [24, 5, 4]"
    refused(lambda: fit(loss=segments), 1, IndexError, words, "from 0 to 1")


def test_indices_beyond_a_table_are_described():
    def looks_up(net, batch):
        return F.embedding(batch[1] + 2, net[2].weight).mean()

    words = (
        "the indices are int64 [12] from 2 to 3; the table has 2 rows, so they must be from 0 to 1"
    )
    refused(lambda: fit(loss=looks_up), 2, IndexError, words)


def test_a_complex_loss_is_refused():
    def spectrum(net, batch):
        return torch.fft.fft(net(batch[0])).mean()

    refused(lambda: fit(loss=spectrum), 2, LossError, "the loss is complex (torch.complex64)")


# -- callbacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "method", "words"),
    [
        ("on_step_end", lambda self, ctx: None, "on_step_end(self, ctx) takes other arguments"),
        (
            "on_eval_end",
            lambda self, ctx, a, b: None,
            "write `def on_eval_end(self, ctx, metrics)`",
        ),
        ("on_save", lambda: None, "write `def on_save(self, ctx)`"),
        ("state_dict", lambda self, ctx: {}, "write `def state_dict(self)`"),
        ("load_state_dict", lambda self: None, "write `def load_state_dict(self, state)`"),
    ],
)
def test_a_hook_with_other_arguments_is_refused_when_the_class_is_made(hook, method, words):
    with pytest.raises(TypeError) as caught:
        type("Mine", (dtrain.Callback,), {hook: method})
    assert str(caught.value).startswith(f"Mine.{hook}(")
    assert words in str(caught.value)


def test_a_hook_that_is_mixed_in_is_looked_at_as_well():
    class Other:
        def on_epoch_end(self, trainer, module):
            pass

    with pytest.raises(
        TypeError, match=r"^Mine\.on_epoch_end\(self, trainer, module\) takes other"
    ):
        type("Mine", (Other, dtrain.Callback), {})
    type("Fine", (dtrain.Callback, Other), {})  # dtrain's own comes first


def test_a_hook_that_would_never_run_is_refused():
    async def waits(self, ctx):
        pass

    def yields(self, ctx, step):
        yield

    for hook, method in (("on_save", waits), ("on_step_end", yields)):
        with pytest.raises(
            TypeError, match=f"Mine.{hook} is async or has a yield, so it would never"
        ):
            type("Mine", (dtrain.Callback,), {hook: method})


def test_hooks_may_be_written_in_other_ways():
    class Fine(dtrain.Callback):
        def on_step_end(self, ctx, step, verbose=False):
            pass

        def on_save(self, *args, **kwargs):
            pass

        @torch.no_grad()
        def on_eval_end(self, context, found):
            pass

        on_fit_start = staticmethod(lambda ctx: None)
        on_batch = functools.partialmethod(lambda self, more, ctx, step: None, 1)

    fit([Fine()])


def test_a_hook_of_an_object_is_called():
    def steps():
        seen, callback = [], dtrain.Callback()
        callback.name = "seen"
        callback.on_step_end = lambda ctx, step: seen.append(step.number)
        fit([callback])
        return seen

    assert run_ranks(steps, 2) == [[0, 1, 2, 3]] * 2


@SIZES
def test_callbacks_that_are_none_or_no_list_are_told(size):
    def scheduler():
        net = tiny.model()
        optimizer = tiny.adam(net)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        tiny.trainer([schedule], net=net, optimizer=optimizer)

    hint = "did you mean `dtrain.callbacks.LRSchedule(scheduler)`?"
    refused(scheduler, size, ConfigError, "is no dtrain.Callback", hint)
    for no_list in (None, ClipGradients(1.0)):
        words = "must be a list: `callbacks=[...]`"
        refused(functools.partial(tiny.trainer, no_list), size, ConfigError, words)


def test_sinks_that_are_no_list_are_told():
    dtrain.init(seed=0)
    with pytest.raises(ConfigError, match=r"must be a list: `sinks=\[...\]`"):
        dtrain.Trainer(tiny.model(), tiny.adam, plain, sinks=dtrain.Sink())


def test_a_generator_of_callbacks_is_heeded():
    seen = []

    class See(dtrain.Callback):
        def on_step_end(self, ctx, step):
            seen.append(step.number)

    fit(callback for callback in [See()])
    assert seen == [0, 1, 2, 3]


def test_all_callbacks_are_there_after_a_mere_import():
    assert dtrain.callbacks.EMA
    assert dtrain.sinks.JSONLines
    assert dtrain.strategies.DDP
    assert dtrain.schedules
    assert dtrain.data.Weighted
    assert dtrain.testing.run_ranks


@pytest.mark.parametrize(
    "make",
    [
        lambda count: GradientAccumulation(count),
        lambda count: GradientAccumulation(micro_batch_size=count),
        lambda count: GradientStats(count),
    ],
)
def test_counts_are_whole_numbers(make):
    for count in (2.5, 2.0, "2", True):
        with pytest.raises(ConfigError, match=r"whole number"):
            make(count)
    make(np.int64(2))


def test_counts_of_a_fit_may_be_numpys(tmp_path):
    def both():
        trainer = tiny.trainer(run_dir=tmp_path)
        counts = dict.fromkeys(("epochs", "max_steps", "log_every", "history", "eval_every"), 2)
        numbers = {name: np.int64(count) for name, count in counts.items()}
        data = tiny.dataset()
        result = trainer.fit(data, batch_size=np.int32(24), eval_set=data, **numbers)
        return result.steps, len(result.history)

    assert run_ranks(both, 2) == [(2, 2)] * 2
    for wrong in (np.float64(2), np.int64(0), np.bool_(True), np.array([2])):
        words = "must be a whole number of 1 or more"
        refused(functools.partial(fit, epochs=wrong), 2, ConfigError, words)


# -- the learning rate -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.optim.lr_scheduler.ExponentialLR, "it takes 'gamma' there: pass `lambda opt, total"),
        (torch.optim.lr_scheduler.OneCycleLR, "it takes 'max_lr' there"),
        (torch.optim.lr_scheduler.StepLR, "it takes 'step_size' there"),
        (lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1), "this does not take two"),
        (functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1), "does not take two"),
    ],
)
def test_a_schedule_that_would_take_the_total_for_another_number_is_told(given, words):
    """A factor of 400 a step, or a rate of 400, ran without a word."""
    with pytest.raises(ConfigError, match="how often it will be stepped in all") as told:
        LRSchedule(given)
    assert words in str(told.value)


def test_a_schedule_of_torchs_that_takes_the_total_first_is_taken():
    for given in (
        torch.optim.lr_scheduler.CosineAnnealingLR,
        torch.optim.lr_scheduler.PolynomialLR,
    ):
        result = fit([LRSchedule(given)], batch_size=24)
        assert result.metrics["lr"] < 1e-2


def test_a_scheduler_of_another_optimizer_is_told():
    def other():
        schedule = torch.optim.lr_scheduler.StepLR(tiny.adam(tiny.model()), 1)
        fit([LRSchedule(schedule)])

    refused(other, 2, ConfigError, "the scheduler must be of the Trainer's own optimizer")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr", "a dict, such as {'lr': 1e-4}"),
        ([1], "a dict, such as {'lr': 1e-4}"),
        ({"lr": "1e-4"}, "{'lr': '1e-4'}): cannot take the place of 0.01"),
        ({"lr": float("nan")}, "{'lr': nan}): cannot take the place of 0.01"),
        ({"betas": 0.9}, "cannot take the place of (0.9, 0.999)"),
        ({"amsgrad": 1}, "cannot take the place of False"),
    ],
)
def test_an_override_of_another_kind_is_told(override, words):
    def start():
        tiny.trainer().fit(tiny.dataset(), batch_size=24, epochs=1, override=override)

    refused(start, 2, ConfigError, words)


# -- the data --------------------------------------------------------------------------------------


class Unbounded(torch.utils.data.Dataset):
    def __getitem__(self, row):
        return row


@pytest.mark.parametrize("options", [{}, {"batch_size": 8}])
@pytest.mark.parametrize("given", ["a/path", None, TensorDataset, tiny.dataset])
def test_what_is_no_data_is_told(given, options):
    with pytest.raises(DataError, match=r"cannot train on .*: neither a dataset \(__len__ and"):
        dtrain.Data(given, **options)


def test_a_dataset_without_a_length_is_no_iterable():
    with pytest.raises(DataError, match="cannot train on Unbounded: neither a dataset"):
        dtrain.Data(Unbounded(), 8)


def test_an_iterable_with_a_batch_size_is_told_of_single_samples():
    """Who only left the batch size out trained on single samples, one at a time."""
    with pytest.raises(ConfigError, match=r"single samples, torch's DataLoader makes batches"):
        dtrain.Data(iter([1]), 8)


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_datasets_are_told(kind):
    several = kind([tiny.dataset(), tiny.dataset()])
    words = f"a {kind.__name__} of datasets (TensorDataset, TensorDataset) is no dataset"

    def judge():
        tiny.trainer().fit(tiny.dataset(), batch_size=24, epochs=1, eval_set=several)

    refused(lambda: fit(trains=several), 2, ConfigError, words, "ConcatDataset")
    refused(judge, 2, ConfigError, "2 sets to evaluate on have no names", "{'easy': one, ")


def test_a_loader_in_order_is_told_of_no_other_order():
    with pytest.raises(ConfigError, match="over a map-style dataset") as told:
        dtrain.Data(torch.utils.data.DataLoader(tiny.dataset(), 8))
    assert "shuffle=False)" in str(told.value)


# -- accumulation ----------------------------------------------------------------------------------


class Split(dtrain.Callback):
    """Fills the accumulation slot by a table."""

    def __init__(self, sizes):
        self.sizes = sizes

    def split(self, share):
        return self.sizes[share]

    def batches_per_step(self):
        return 1


@pytest.mark.parametrize(
    "sizes", [[6, 5], [12, 1], [], [6, 0, 6], [14, -2], [6.0, 6.0]], ids=lambda sizes: str(sizes)
)
def test_a_split_that_is_not_its_share_is_refused(sizes):
    words = f"Split.split(12) returned {sizes}: sizes of micro-batches"
    refused(lambda: fit([Split({12: sizes})]), 2, ConfigError, words)


def test_a_smaller_share_in_more_micro_batches_is_refused():
    # Of 25 samples rank 0 has 13, and rank 1 has 12, of which the second half would be lost.
    split = {13: [13], 12: [6, 6], 11: [11], 10: [10]}
    words = "splits 12 samples into 2 micro-batches, but another rank's 13 into 1"
    refused(lambda: fit([Split(split)], batch_size=25), 2, ConfigError, words)
    split[12] = [12]
    run_ranks(lambda: fit([Split(split)], batch_size=25), 2)


def test_a_split_of_the_last_batch_is_looked_at_before_the_first_step():
    class Steps(dtrain.Callback):
        def on_step_start(self, ctx, step):
            raise AssertionError("a step was taken")

    split = Split({18: [9, 9], 12: [6, 5]})
    words = "Split.split(12) returned [6, 5]"
    refused(lambda: fit([split, Steps()], batch_size=36), 2, ConfigError, words)


# -- complex and sparse numbers --------------------------------------------------------------------


class Spectral(nn.Module):
    """Complex weights, and a sparse table."""

    def __init__(self, dtype=torch.complex128, sparse=False):
        super().__init__()
        self.wave = nn.Parameter(torch.randn(8, 4, dtype=dtype))
        self.table = nn.Embedding(2, 4, sparse=True, dtype=dtype.to_real()) if sparse else None
        self.out = nn.Linear(4, 2, dtype=dtype.to_real())

    def forward(self, x):
        found = (x.to(self.wave.dtype) @ self.wave).abs()
        if self.table is not None:
            found = found + self.table((x[:, 0] > 0).long())
        return self.out(found)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.1)


def spectral(callbacks, dtype, strategy, sparse=False):
    torch.manual_seed(5)
    net = Spectral(dtype, sparse)
    fit(callbacks, net=net, optimizer=sgd, strategy=strategy, loss=weighted)
    return net.state_dict()


def weighted(net, batch):
    """Weighs other than samples, so that a factor is applied that the lane has told."""
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    units = 1 + 2 * batch[1]
    return dtrain.Loss.from_sum((units * losses).sum(), units.sum())


def apart(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_complex128_is_trained_in_double_precision():
    """The lane told the weight in float32 where no parameter was of float64: 4.5e-8 apart."""

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.wave = nn.Parameter(torch.randn(8, 2, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(self.wave.dtype) @ self.wave).abs()

    def weights():
        torch.manual_seed(5)
        net = Complex()
        fit(net=net, optimizer=sgd, loss=weighted, strategy="flat", epochs=3, batch_size=20)
        return net.state_dict()

    (alone,), pair = run_ranks(weights, 1), run_ranks(weights, 3)
    for one in pair:
        assert apart(one, alone) < 1e-14


COMPLEX = {
    "stats": lambda: [GradientStats(1)],
    "stats by module": lambda: [GradientStats(1, per="module")],
    "penalty": lambda: [L1L2Penalty(1e-2, 1e-2)],
    "noise": lambda: [GradientNoise(1e-3)],
    "value": lambda: [ClipGradients(max_value=1e-3)],
    "norm": lambda: [ClipGradients(1e-2)],
}


@pytest.mark.parametrize("name", COMPLEX)
def test_callbacks_take_complex_gradients(name):
    def train():
        return spectral(COMPLEX[name](), torch.complex128, "flat")

    (alone,), two = run_ranks(train, 1), run_ranks(train, 2)
    for one in two:
        assert apart(one, alone) < 1e-13


class Look(dtrain.Callback):
    def __init__(self, name):
        self.name, self.found = name, {}

    def on_grads_ready(self, ctx, step):
        if not self.found:
            named = ctx.model.named_parameters()
            self.found = {n: p.grad.to_dense().clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_all_kinds_against_their_formulas(sparse):
    def looked(callback):
        before, after = Look("before"), Look("after")
        torch.manual_seed(5)
        trainer = tiny.trainer(
            [before, callback, after], net=Spectral(sparse=sparse), optimizer=sgd, loss=weighted
        )
        fitted = trainer.fit(tiny.dataset(), batch_size=24, max_steps=1)
        return before.found, after.found, fitted.metrics

    def check():
        before, after, metrics = looked(GradientStats(1))
        for name, grad in before.items():
            norm = float(torch.linalg.vector_norm(grad))
            assert metrics[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-12)
        largest = 0.3 * float(before["wave"].abs().max())
        before, after, _ = looked(ClipGradients(max_value=largest))
        for name, grad in before.items():
            factor = (largest / grad.abs()).clamp(max=1)
            torch.testing.assert_close(after[name], grad * factor, rtol=1e-14, atol=1e-16)
        before, after, _ = looked(GradientNoise(1e-3))
        assert all(not torch.equal(after[name], grad) for name, grad in before.items())
        return apart(before, after)

    (alone,) = run_ranks(check, 1)
    if not sparse:  # ranks that are threads do not sum sparse ones
        assert run_ranks(check, 2) == [pytest.approx(alone)] * 2


@SIZES
def test_a_loss_scale_for_complex_weights_is_refused(size):
    def train():
        return fit([MixedPrecision("fp16")], net=Spectral(), optimizer=sgd)

    refused(train, size, ConfigError, "cannot unscale gradients of complex parameters")


def test_the_penalty_of_complex_weights():
    def penalty():
        torch.manual_seed(5)
        net = Spectral()
        size = net.wave.abs().detach()
        squares = size.square().sum() + net.out.weight.detach().square().sum()
        expected = 0.1 * (size.sum() + net.out.weight.detach().abs().sum()) + 0.2 * squares
        trainer = tiny.trainer([L1L2Penalty(0.1, 0.2)], net=net, optimizer=sgd, loss=weighted)
        found = trainer.fit(tiny.dataset(), batch_size=24, max_steps=1).metrics["train/penalty"]
        return found, float(expected)

    for found, expected in run_ranks(penalty, 2):
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_penalty_on_sparse_weights_is_refused():
    def penalty():
        return fit([L1L2Penalty(l2=1e-2)], net=Spectral(sparse=True), optimizer=sgd)

    refused(penalty, 1, ConfigError, "gradients of table are sparse", "startswith('table')")


def sparse_everywhere():
    callbacks = [GradientStats(1), ClipGradients(max_value=1e-3), GradientNoise(1e-3)]
    return spectral(callbacks, torch.complex128, "ddp", sparse=True)["table.weight"]


# -- metrics ---------------------------------------------------------------------------------------

NUMBERS = {
    "python": lambda t: t.item(),
    "tensor": lambda t: t,
    "numpy scalar": lambda t: np.float64(t.item()),
    "numpy float32": lambda t: np.float32(t.item()),
    "numpy array": lambda t: t.detach().numpy(),
    "array of one": lambda t: t.detach().numpy().reshape(1, 1),
    "mean of numpy": lambda t: dtrain.Mean(np.float64(t.item() * 24), np.int64(24)),
}


@SIZES
def test_metrics_of_all_kinds_are_one_number(size):
    def metrics(kind):
        def loss(net, batch):
            half = batch[1].double().mean() / 2
            return dtrain.Loss(plain(net, batch), metrics={"half": NUMBERS[kind](half)})

        class Log(dtrain.Callback):
            def on_step_end(self, ctx, step):
                if "mean" not in kind:
                    ctx.log("logged", NUMBERS[kind](torch.tensor(0.5)), "max")

        trainer = tiny.trainer([Log()], loss=loss)
        data = tiny.dataset()
        found = trainer.fit(data, batch_size=48, epochs=1, eval_set=data).metrics
        return [found[name] for name in ("train/half", "eval/half")], found.get("logged", 0.5)

    mean = float(tiny.dataset().tensors[1].double().mean()) / 2
    for kind in NUMBERS:
        for found, logged in run_ranks(metrics, size, kind):
            assert found == pytest.approx([mean, mean], rel=1e-7 if "32" in kind else 1e-14)
            assert logged == 0.5


@SIZES
def test_a_metric_of_few_bits_is_weighted_in_double_precision(size):
    """200 in eight bits times a weight of 24 was 192; 0.1 in sixteen times 2**20 was infinite."""

    def metrics():
        def loss(net, batch):
            small = {
                "bytes": torch.tensor(200, dtype=torch.uint8),
                "halves": torch.tensor(0.1).half(),
            }
            return dtrain.Loss(plain(net, batch), weight=2**20, metrics=small)

        return fit(loss=loss).metrics

    for found in run_ranks(metrics, size):
        assert found["train/bytes"] == 200
        assert found["train/halves"] == float(torch.tensor(0.1).half())


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (1 + 2j, "metric 'train/x' is (1+2j); a metric is a real number"),
        (torch.tensor(1 + 2j), "a metric is a real number"),
        (np.complex64(1 + 2j), "a metric is a real number"),
        (np.ones(3), "is an array of shape [3]; a metric is one number"),
        (dtrain.Mean(1j, 2), "a metric is a real number"),
        ("0.5", "a metric is a number, a 0-dim tensor"),
    ],
)
def test_a_metric_that_is_no_number_is_refused(metric, words):
    def loss(net, batch):
        return dtrain.Loss(plain(net, batch), metrics={"x": metric})

    refused(lambda: fit(loss=loss), 2, LossError, words)


@pytest.mark.parametrize("weight", [1j, [24], np.ones(2)], ids=repr)
def test_a_weight_that_is_no_number_is_refused(weight):
    def loss(net, batch):
        return dtrain.Loss(plain(net, batch), weight=weight)

    refused(lambda: fit(loss=loss), 2, LossError, f"the loss has weight {weight!r}, not one number")


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-1, "weight -1.0; it must be 0 or more"),
        (float("nan"), "weight nan; it must be 0 or more, and finite"),
        (torch.tensor(float("inf")), "weight inf; it must be 0 or more, and finite"),
        (torch.ones(2), "the loss has a weight of shape [2], not one number"),
        ("many", "the loss has weight 'many', not one number"),
    ],
)
def test_a_weight_in_an_evaluation_is_looked_at_too(weight, words):
    """Losses of weights below 0 were taken off from the mean."""

    def judge():
        def loss(net, batch):
            return dtrain.Loss(plain(net, batch), weight=weight)

        tiny.trainer(loss=loss).evaluate(tiny.dataset(), batch_size=24)

    refused(judge, 2, LossError, words)


def test_a_weight_of_numpy_counts_with_all_digits():
    def losses(kind):
        def loss(net, batch):
            units = 1 + batch[1].sum().item() / 7
            return dtrain.Loss(plain(net, batch), weight=kind(units))

        return fit(loss=loss, batch_size=20).metrics["train/loss"]

    expected = run_ranks(losses, 2, float)
    assert run_ranks(losses, 2, np.float64) == run_ranks(losses, 2, np.array) == expected
    assert run_ranks(losses, 2, np.float32) == pytest.approx(expected, rel=1e-6)


# -- targets in any place --------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")
X, Y = torch.rand(6, 4), torch.arange(6) % 3

BATCHES = {
    "dict": ({"x": X, "labels": Y}, "labels", lambda b: (b["x"], b["labels"])),
    "triple": ((X, Y, X * 2), 1, lambda b: (b[0], b[1])),
    "from the end": ((X, X * 2, Y), -1, lambda b: (b[0], b[2])),
    "nested": (
        (X, {"labels": Y, "names": ["a"] * 6}),
        (1, "labels"),
        lambda b: (b[0], b[1]["labels"]),
    ),
    "named": (Pair(X, Y), None, lambda b: (b.x, b.y)),
    "list": ([X, Y], None, lambda b: (b[0], b[1])),
    "small integers": ((X, Y.to(torch.uint8)), None, lambda b: (b[0], b[1])),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    "make", [lambda **o: Mixup(1.0, 3, **o), lambda **o: LabelSmoothing(0.1, 3, **o)]
)
def test_targets_are_found_where_they_are_said_to_be(name, make):
    batch, target, parts = BATCHES[name]

    def after(given, target):
        context = SimpleNamespace(rng=torch.Generator().manual_seed(3))
        step = dtrain.Step(0, batch=given)
        make(target=target).on_batch(context, step)
        return step.batch

    found = after(batch, target)
    expected = after((X, Y), None)
    assert type(found) is type(batch)
    for one, other in zip(parts(found), expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(parts(batch)[1].long(), Y)  # what was handed in is as it was


@pytest.mark.parametrize("owner", ["Mixup", "LabelSmoothing"])
@pytest.mark.parametrize(
    ("batch", "target", "words"),
    [
        ({"x": X, "labels": Y}, None, "must be a pair (x, y), and this is dict with 'x', 'labels'"),
        ({"x": X, "labels": Y}, "label", "(target='label'): no 'label' in dict with 'x', 'labels'"),
        ((X, Y), 2, "(target=2): no 2 in (torch.float32 [6, 4], torch.int64 [6])"),
        ((X, Y + 1), None, "(num_classes=3): targets must be from 0 to 2; these are from 1 to 3"),
        ((X, Y - 1), None, "these are from -1 to 1"),
    ],
)
def test_targets_that_are_not_there_are_told(owner, batch, target, words):
    callback = {"Mixup": Mixup, "LabelSmoothing": LabelSmoothing}[owner](0.5, 3, target=target)
    with pytest.raises(DataError) as caught:
        callback.on_batch(SimpleNamespace(rng=torch.Generator()), dtrain.Step(0, batch=batch))
    assert str(caught.value).startswith(owner)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "index": torch.arange(6), "labels": Y}, "torch.int64 [6]"),
        ({"x": X, "mask": torch.ones(3), "labels": Y}, "torch.float32 [3]"),
        ({"name": ["a"] * 6, "labels": Y}, "they are none"),
    ],
)
def test_mixup_refuses_what_it_cannot_mix(batch, words):
    context = SimpleNamespace(rng=torch.Generator())
    with pytest.raises(DataError) as caught:
        Mixup(0.5, 3, target="labels").on_batch(context, dtrain.Step(0, batch=batch))
    assert words in str(caught.value)


@SIZES
def test_a_dict_is_smoothed_in_a_training(size):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, row):
            x, y = tiny.dataset()[row]
            return {"x": x, "labels": y}

    def loss(net, batch):
        return F.cross_entropy(net(batch["x"]), batch["labels"])

    def train(smooth, data, loss):
        return fit([smooth], trains=data, loss=loss).metrics["train/loss"]

    def both():
        smooth = LabelSmoothing(0.2, 2, target="labels")
        return train(smooth, Rows(), loss), train(LabelSmoothing(0.2, 2), tiny.dataset(), plain)

    for ours, theirs in run_ranks(both, size):
        assert ours == theirs


# -- sinks, verbs, processes -----------------------------------------------------------------------


class Threads(dtrain.Sink):
    def __init__(self):
        self.seen = []

    def open(self, run_dir):
        self.seen.append(("open", threading.get_ident()))

    def write(self, report):
        self.seen.append(("write", threading.get_ident()))

    def close(self):
        self.seen.append(("close", threading.get_ident()))


def test_a_sink_lives_in_one_thread():
    dtrain.init(seed=0)
    sink = Threads()
    trainer = dtrain.Trainer(tiny.model(), tiny.adam, plain, sinks=[sink])
    trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
    called = [name for name, _ in sink.seen]
    assert (called[0], called[-1], set(called[1:-1])) == ("open", "close", {"write"})
    assert len({thread for _, thread in sink.seen}) == 1
    assert threading.get_ident() not in {thread for _, thread in sink.seen}


@SIZES
def test_a_plain_number_is_no_tensor_for_any_verb(size):
    for verb in ("all_reduce", "all_gather", "broadcast"):
        refused(
            lambda verb=verb: getattr(dtrain.init().comm, verb)("sum", 3),
            size,
            ConfigError,
            "this verb takes a tensor, not 3: wrap it in torch.tensor(...)",
        )


def on_processes():
    """What threads cannot show: sparse gradients, which they do not sum."""
    dtrain.init(seed=0)
    return sparse_everywhere()


def test_on_real_ranks():
    one, two = run_processes(on_processes, 2)
    assert torch.equal(one, two)
