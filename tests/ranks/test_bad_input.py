"""Bad input, and failures on one rank: a clear error on every rank, or it works. Never a hang."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
)
from dtrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LossError,
    RankMismatch,
    RemoteError,
    ResumeError,
    UnusedParameters,
)
from dtrain.sinks import JSONLines
from dtrain.testing import run_outcomes, run_processes

# A hang is a failure: a launch takes seconds, and so do all cases of a table.
TIMEOUT_S = 30.0
FEATURES = 3
HERE = Path(__file__).name


def rank():
    return int(os.environ["RANK"])


def rows(samples=16):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True).tanh()


def dataset(samples=16):
    return TensorDataset(*rows(samples))


def make_model(width=4):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 1))
    return layers.double()


def mse(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def sgd(model):
    return SGD(model.parameters(), lr=0.1)


def make_trainer(loss_fn=mse, callbacks=(), *, model=None, optimizer=sgd, sinks=(), **options):
    """A Trainer that prints nothing.

    Without a watchdog: by its posts, a rank that failed finds out where the others wait, which
    takes a second each time.
    """
    dtrain.init(seed=0)
    options.setdefault("hang_after_s", None)
    model = model or make_model()
    return dtrain.Trainer(model, optimizer, loss_fn, callbacks=callbacks, sinks=sinks, **options)


def fit(loss_fn=mse, callbacks=(), data=None, *, trainer=None, **options):
    """Two epochs of four steps, evaluated; ``options`` go to the Trainer or to ``fit``."""
    of_trainer = {"model", "optimizer", "sinks", "run_dir", "seed", "strategy", "eval_fn"}
    made_of = {key: value for key, value in options.items() if key in of_trainer}
    plan = {key: value for key, value in options.items() if key not in of_trainer}
    data = dataset() if data is None else data
    if isinstance(data, TensorDataset):
        plan.setdefault("batch_size", 4)
    if "max_steps" not in plan:
        plan.setdefault("epochs", 2)
    trainer = trainer or make_trainer(loss_fn, callbacks, **made_of)
    return trainer.fit(data, **plan)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(ours, theirs):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def told(fn, *args):
    """Returns what ``fn`` raised: its type and its message; None where it returned."""
    try:
        fn(*args)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the test compares it
        return type(error), str(error)
    return None


def assert_told(found, kind, words):
    assert found is not None, "nothing was raised"
    assert found[0] is kind, f"{found[0].__name__}: {found[1]}"
    for word in words:
        assert word in found[1]


def assert_failed(found, failing, kind, words, where=None, step=None):
    """The original on the rank that failed; the others were told rank, place and error."""
    for here, one in enumerate(found):
        if here == failing:
            assert_told(one, kind, words)
        else:
            assert_told(one, RemoteError, [*words, f"rank {failing} on ", f"{kind.__name__}: "])
            # ...: rank, host, hook or phase, step, type, message and file:line
            told_where, told_step, told_place = re.search(
                rf"rank {failing} on \S+ failed in (.+?) at step (\d+): .*\((.+:\d+)\)$",
                one[1],
                re.DOTALL,
            ).groups()
            if where is not None:
                assert told_where == where
            if step is not None:
                assert int(told_step) == step
            if "planted" in words:
                assert HERE in told_place


def outcomes(fn, *args, world_size=2, timeout_s=TIMEOUT_S):
    """What each rank was told; that a rank did not come back at all is an error here."""
    found = []
    for outcome in run_outcomes(fn, world_size, *args, timeout_s=timeout_s):
        assert outcome.exitcode in (0, 1), f"{outcome.error}\n{outcome.output}"
        error = outcome.error
        found.append(None if error is None else (type(error), str(error)))
    return found


# -- what every rank asks for alike, and no rank gets ----------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A call that cannot work, and what all ranks are told."""

    call: object  # gets a folder of its own
    kind: type
    words: tuple[str, ...]
    main_only: bool = False  # found out by rank 0; the others are told that it failed


class Renamed(GradientAccumulation):
    pass


class Shortened(MixedPrecision):
    pass


def planned(**options):
    """A call of ``fit`` with a dataset, and no ``epochs`` unless given."""
    return make_trainer().fit(dataset(), **options)


def one_argument(model):
    return mse(model, rows())


def four_arguments(model, batch, ctx, extra):
    return mse(model, batch)


def misspelt_hook():
    class Late(dtrain.Callback):
        def on_steps_end(self, ctx, step):
            pass


def other_optimizer():
    return make_trainer(optimizer=sgd(make_model(width=2)))


def all_frozen():
    return make_trainer(model=make_model().requires_grad_(False))


def frozen_on_rank_1():
    model = make_model()
    model[0].weight.requires_grad_(rank() != 1)
    return make_trainer(model=model)


def plateau(monitor, **options):
    schedule = LRSchedule(lambda opt, steps: ReduceLROnPlateau(opt), monitor=monitor)
    return fit(callbacks=[schedule], **options)


def file_in_the_way(folder):
    path = folder / "file"
    if rank() == 0:
        path.touch()
    return fit(run_dir=path / "run")


def finished_again(folder):
    run = {"run_dir": folder / "run", "epochs": 1}
    fit(callbacks=[Checkpoint()], **run)
    return fit(callbacks=[Checkpoint()], **run)


def generator_twice():
    x, y = rows()
    return fit(data=((x[i : i + 2], y[i : i + 2]) for i in range(0, 16, 2)))


def loader_of_samples():
    return fit(data=DataLoader(dataset(), batch_size=8, drop_last=True, num_workers=0))


class SkipAt(dtrain.Callback):
    """Asks for a skip in a hook where there is nothing to skip."""

    def on_step_start(self, ctx, step):
        ctx.request.skip("too late")


REFUSALS = {
    "an empty dataset": Refusal(
        lambda folder: fit(data=dataset(0)),
        DataError,
        ("the dataset (TensorDataset) is empty",),
    ),
    "batch_size=0": Refusal(
        lambda folder: fit(batch_size=0), ConfigError, ("batch_size=0: ", "whole number")
    ),
    "batch_size=-1": Refusal(
        lambda folder: fit(batch_size=-1), ConfigError, ("batch_size=-1: ", "whole number")
    ),
    "batch_size=True": Refusal(
        lambda folder: fit(batch_size=True), ConfigError, ("batch_size=True: ", "whole number")
    ),
    "batch_size=2.5": Refusal(
        lambda folder: fit(batch_size=2.5), ConfigError, ("batch_size=2.5: ", "whole number")
    ),
    "no batch_size": Refusal(
        lambda folder: fit(batch_size=None), ConfigError, ("TensorDataset has samples",)
    ),
    "no data at all": Refusal(
        lambda folder: make_trainer().fit(7, epochs=1), DataError, ("cannot train on int",)
    ),
    "a DataLoader over samples": Refusal(
        lambda folder: loader_of_samples(),
        ConfigError,
        (
            "would give every rank all of the data",
            "dtrain.Data(tensordataset, batch_size=8 * world.size, shuffle=False, drop_last=True)",
        ),
    ),
    "a generator for two epochs": Refusal(
        lambda folder: generator_twice(),
        DataError,
        ("no rank's stream gave a batch in epoch 1", "generator gives its batches once"),
    ),
    "neither epochs nor max_steps": Refusal(
        lambda folder: planned(batch_size=4), ConfigError, ("pass epochs, max_steps",)
    ),
    "epochs=0": Refusal(
        lambda folder: planned(batch_size=4, epochs=0), ConfigError, ("epochs=0: ", "1 or more")
    ),
    "epochs=True": Refusal(
        lambda folder: planned(batch_size=4, epochs=True), ConfigError, ("epochs=True: ",)
    ),
    "epochs=1.5": Refusal(
        lambda folder: planned(batch_size=4, epochs=1.5), ConfigError, ("epochs=1.5: ",)
    ),
    "max_steps='9'": Refusal(
        lambda folder: planned(batch_size=4, max_steps="9"), ConfigError, ("max_steps='9': ",)
    ),
    "eval_every='never'": Refusal(
        lambda folder: fit(eval_every="never"), ConfigError, ("eval_every='never': 'epoch', ",)
    ),
    "eval_every=True": Refusal(
        lambda folder: fit(eval_every=True, eval_set=dataset()), ConfigError, ("eval_every=True: ",)
    ),
    "other epochs on each rank": Refusal(
        lambda folder: fit(epochs=1 + rank()),
        RankMismatch,
        ("  rank 0: ", "epochs=1", "  rank 1: ", "epochs=2"),
    ),
    "data of other lengths": Refusal(
        lambda folder: fit(data=dataset(16 - 4 * rank())),
        RankMismatch,
        ("  rank 0: ", "  rank 1: ", "different length"),
    ),
    "data of other lengths in as many steps": Refusal(
        lambda folder: fit(data=dataset(16 - rank())),
        RankMismatch,
        ("  rank 0: ", "16", "  rank 1: ", "15"),
    ),
    "other batch sizes in as many steps": Refusal(
        lambda folder: fit(batch_size=12 + rank()),
        RankMismatch,
        ("  rank 0: ", "12", "  rank 1: ", "13"),
    ),
    "evaluation data of other lengths": Refusal(
        lambda folder: fit(eval_set=dataset(8 - rank())),
        RankMismatch,
        ("  rank 0: ", "8", "  rank 1: ", "7"),
    ),
    "evaluation data on one rank": Refusal(
        lambda folder: fit(eval_set=None if rank() else dataset()),
        RankMismatch,
        ("  rank 0: ", "eval_every='epoch'", "  rank 1: ", "eval_every=None"),
    ),
    "other seeds": Refusal(
        lambda folder: fit(seed=rank()), RankMismatch, ("  rank 0: ", "  rank 1: ", "seed")
    ),
    "models of other shapes": Refusal(
        lambda folder: make_trainer(model=make_model(width=4 + rank())),
        RankMismatch,
        ("different models", "  rank 0: ", "  rank 1: ", "0.weight [5, 3]", "0.weight [4, 3]"),
    ),
    "a parameter frozen on one rank": Refusal(
        lambda folder: frozen_on_rank_1(),
        RankMismatch,
        ("different models", "  rank 0: ", "  rank 1: ", "0.weight"),
    ),
    "a model without trainable parameters": Refusal(
        lambda folder: all_frozen(), ConfigError, ("nothing to train",)
    ),
    "another model's optimizer": Refusal(
        lambda folder: other_optimizer(),
        ConfigError,
        ("4 of the optimizer's 4 parameters are not the model's", "[2, 3]", "lambda m:"),
    ),
    "a function that returns no optimizer": Refusal(
        lambda folder: make_trainer(optimizer=lambda model: None), ConfigError, ("optimizer",)
    ),
    "an unknown strategy": Refusal(
        lambda folder: make_trainer(strategy="dpp"), ConfigError, ("strategy='dpp': choose 'auto'",)
    ),
    "a loss_fn of one argument": Refusal(
        lambda folder: make_trainer(one_argument),
        LossError,
        ("must take (model, batch) or (model, batch, ctx)", "one_argument", "takes model"),
    ),
    "a loss_fn of four arguments": Refusal(
        lambda folder: make_trainer(four_arguments),
        LossError,
        ("must take (model, batch)", "takes model, batch, ctx, extra"),
    ),
    "two precisions": Refusal(
        lambda folder: make_trainer(callbacks=[MixedPrecision("bf16"), Shortened("bf16")]),
        ConfigError,
        ("MixedPrecision and Shortened both decide the precision of this run",),
    ),
    "two accumulations": Refusal(
        lambda folder: make_trainer(callbacks=[GradientAccumulation(2), Renamed(4)]),
        ConfigError,
        ("GradientAccumulation and Renamed both decide the accumulation of this run",),
    ),
    "two callbacks of one name": Refusal(
        lambda folder: make_trainer(callbacks=[ClipGradients(1.0), ClipGradients(2.0)]),
        ConfigError,
        ("two callbacks are named 'ClipGradients'", "second.name = 'ClipGradients2'"),
    ),
    "no callback": Refusal(
        lambda folder: make_trainer(callbacks=[print]),
        ConfigError,
        ("<built-in function print> is no dtrain.Callback",),
    ),
    "a callback's class": Refusal(
        lambda folder: make_trainer(callbacks=[GradientAccumulation]),
        ConfigError,
        ("GradientAccumulation'> is no dtrain.Callback", "did you mean `GradientAccumulation()`?"),
    ),
    "a misspelt hook": Refusal(
        lambda folder: misspelt_hook(),
        TypeError,
        ("Late.on_steps_end is no hook", "did you mean `on_step_end`?", "on_fit_start, "),
    ),
    "early stopping without evaluation": Refusal(
        lambda folder: fit(callbacks=[EarlyStopping("eval/loss")]),
        ConfigError,
        ("EarlyStopping('eval/loss') needs fit(eval_set=...)",),
    ),
    "early stopping by half a name": Refusal(
        lambda folder: fit(callbacks=[EarlyStopping("loss")], eval_set=dataset()),
        ConfigError,
        ("EarlyStopping('loss')", "begins with 'train/' or 'eval/'"),
    ),
    "early stopping by an unknown eval metric": Refusal(
        lambda folder: fit(callbacks=[EarlyStopping("eval/los")], eval_set=dataset()),
        ConfigError,
        ("no metric 'eval/los'; there are eval/loss",),
    ),
    "early stopping by an unknown train metric": Refusal(
        lambda folder: fit(callbacks=[EarlyStopping("train/los")]),
        ConfigError,
        ("no metric 'train/los'; there are train/loss (means of an epoch",),
    ),
    "a plateau of an unknown metric": Refusal(
        lambda folder: plateau("eval/los", eval_set=dataset()),
        ConfigError,
        ("LRSchedule: no metric 'eval/los'; there are eval/loss",),
    ),
    "a plateau without evaluation": Refusal(
        lambda folder: plateau("eval/loss"), ConfigError, ("needs fit(eval_set=...)",)
    ),
    "a plateau of no metric": Refusal(
        lambda folder: plateau(None, eval_set=dataset()),
        ConfigError,
        ("ReduceLROnPlateau needs monitor='eval/loss'",),
    ),
    "a schedule of unknown length": Refusal(
        lambda folder: fit(
            callbacks=[LRSchedule(lambda opt, steps: StepLR(opt, steps))], data=[rows(), rows()]
        ),
        ConfigError,
        ("needs to know how many steps there will be: pass max_steps",),
    ),
    "Checkpoint without run_dir": Refusal(
        lambda folder: make_trainer(callbacks=[Checkpoint()]),
        ConfigError,
        ("checkpoints need a place: pass Trainer(run_dir=",),
    ),
    "JSONLines without run_dir": Refusal(
        lambda folder: fit(sinks=[JSONLines()]),
        ConfigError,
        ("JSONLines writes metrics.jsonl", "Trainer(run_dir="),
        main_only=True,
    ),
    "a sink's class": Refusal(
        lambda folder: fit(sinks=[JSONLines]),
        ConfigError,
        ("is no dtrain.Sink", "did you mean `JSONLines()`?"),
    ),
    "a file where run_dir shall be": Refusal(
        lambda folder: file_in_the_way(folder),
        ConfigError,
        ("run_dir", "file/run cannot be written: "),
        main_only=True,
    ),
    "a finished run again": Refusal(
        lambda folder: finished_again(folder),
        ResumeError,
        (
            "is finished (all epochs done; step 4, 1 epochs)",
            "larger epochs or max_steps",
            "another run_dir",
            "resume='never'",
        ),
        main_only=True,
    ),
    "resume='must' without a run": Refusal(
        lambda folder: fit(run_dir=folder / "nothing", resume="must"),
        ResumeError,
        ("resume='must', but there is no run in ",),
        main_only=True,
    ),
    "resume='must' without run_dir": Refusal(
        lambda folder: fit(resume="must"), ConfigError, ("resume='must' needs a run_dir",)
    ),
    "resume='sometimes'": Refusal(
        lambda folder: fit(resume="sometimes"),
        ConfigError,
        ("resume='sometimes': choose one of auto, never, must",),
    ),
    "request.skip where nothing can be skipped": Refusal(
        lambda folder: fit(callbacks=[SkipAt()]),
        ConfigError,
        ("request.skip('too late') works in on_batch and on_loss only",),
    ),
}


def all_refusals(folder):
    found = {}
    for number, (name, refusal) in enumerate(REFUSALS.items()):
        own = Path(folder) / str(number)
        own.mkdir(exist_ok=True)
        found[name] = told(refusal.call, own)
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What both ranks were told by each case: one launch, one case after another."""
    folder = str(tmp_path_factory.mktemp("refused"))
    return run_processes(all_refusals, 2, folder, timeout_s=2 * TIMEOUT_S)


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_are_told_why_it_cannot_work(refused, name):
    refusal = REFUSALS[name]
    first, second = (found[name] for found in refused)
    assert_told(first, refusal.kind, refusal.words)
    if refusal.main_only:
        assert_told(second, RemoteError, ("rank 0 on ", refusal.kind.__name__, *refusal.words))
    else:
        assert_told(second, refusal.kind, refusal.words)


# -- what goes wrong in a step, on one rank or on all ----------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What fails in a step: in the loss function, in what on_loss leaves, or in the data."""

    kind: type
    words: tuple[str, ...]
    loss_fn: object = mse  # on the ranks and in the step that fail; elsewhere it is mse
    data: object = dataset  # from (failing ranks, step) to what is trained on
    where: str = "loss_fn"
    step: int = 0


def planted(*args):
    raise ValueError("planted")


def as_loss(**options):
    return lambda model, batch: dtrain.Loss(mse(model, batch), **options)


class FailingRows(TensorDataset):
    """Fails on ``ranks`` in the first fetch of ``step``; a rank has two samples in each."""

    def __init__(self, ranks, step):
        super().__init__(*rows())
        self.fetches_left = 2 * step if rank() in ranks else 1000

    def __getitem__(self, index):
        if self.fetches_left == 0:
            planted()
        self.fetches_left -= 1
        return super().__getitem__(index)


def failing_rows(ranks, step):
    return dtrain.Data(FailingRows(ranks, step), 4)


def failing_collate(ranks, step):
    batches_left = [step if rank() in ranks else 1000]

    def collate(samples):
        if batches_left[0] == 0:
            planted()
        batches_left[0] -= 1
        return [torch.stack(parts) for parts in zip(*samples, strict=True)]

    return dtrain.Data(dataset(), 4, collate_fn=collate)


def failing_stream(ranks, step):
    x, y = rows()
    for number in range(8):
        if rank() in ranks and number == step:
            planted()
        yield x[:2], y[:2]


def stream_of_text(ranks, step):
    x, y = rows()
    return [(x, y) if rank() not in ranks or n != step else ["text"] for n in range(4)]


FAILURES = {
    "a loss of many numbers": Failure(
        LossError,
        ("the loss has shape [2, 1], not one number", "Loss.from_sum"),
        lambda model, batch: model(batch[0]),
    ),
    "a detached loss": Failure(
        LossError,
        ("the loss has no gradient: it was detached",),
        lambda model, batch: mse(model, batch).detach(),
    ),
    "no loss": Failure(
        LossError,
        ("loss_fn returned NoneType; return a scalar tensor or dtrain.Loss",),
        lambda model, batch: None,
    ),
    "a loss read with item()": Failure(
        LossError, ("loss_fn returned float",), lambda model, batch: mse(model, batch).item()
    ),
    "a Loss of a float": Failure(
        LossError, ("Loss.mean is float, not a tensor",), lambda model, batch: dtrain.Loss(1.0)
    ),
    "a loss of the wrong type in the fourth step": Failure(
        LossError, ("loss_fn returned dict",), lambda model, batch: {}, step=3
    ),
    "a loss_fn that raises": Failure(ValueError, ("planted",), planted),
    "a loss_fn that raises in the fourth step": Failure(
        ValueError, ("planted",), planted, step=3
    ),
    "a metric of many numbers": Failure(
        LossError,
        ("each' is a tensor of shape [2, 1]", "Loss(outputs=...)"),
        lambda model, batch: as_loss(metrics={"each": batch[1]})(model, batch),
    ),
    "a metric in words": Failure(
        LossError,
        ("state' is 'good'; a metric is a number",),
        as_loss(metrics={"state": "good"}),
    ),
    "metrics that are no dict": Failure(
        LossError, ("Loss(metrics=...) must be a dict", "not list"), as_loss(metrics=[1.0])
    ),
    "a metric named loss": Failure(
        LossError, ("metric", "'loss'"), as_loss(metrics={"loss": 1.0})
    ),
    "a negative weight": Failure(
        LossError, ("weight -1", "must be 0 or more"), as_loss(weight=-1)
    ),
    "a negative weight in a tensor": Failure(
        LossError, ("weight -0.5", "must be 0 or more"), as_loss(weight=torch.tensor(-0.5))
    ),
    "a weight that is NaN": Failure(LossError, ("weight nan",), as_loss(weight=float("nan"))),
    "an infinite weight": Failure(LossError, ("weight inf",), as_loss(weight=float("inf"))),
    "a weight for each sample": Failure(
        LossError, ("weight", "[2]"), as_loss(weight=torch.ones(2))
    ),
    "a loss of many numbers left by on_loss": Failure(
        LossError,
        ("the loss has shape [2, 1], not one number",),
        lambda model, batch: dtrain.Loss(model(batch[0])),
        where="on_loss",
        step=2,
    ),
    "a detached loss left by on_loss": Failure(
        LossError,
        ("the loss has no gradient: it was detached",),
        lambda model, batch: dtrain.Loss(mse(model, batch).detach()),
        where="on_loss",
    ),
    "no loss left by on_loss": Failure(
        LossError, ("on_loss left no loss",), lambda model, batch: None, where="on_loss"
    ),
    "a dataset that raises": Failure(
        ValueError, ("planted",), data=failing_rows, where="data", step=2
    ),
    "a collate_fn that raises": Failure(
        ValueError, ("planted",), data=failing_collate, where="data", step=1
    ),
    "a stream that raises": Failure(
        ValueError, ("planted",), data=failing_stream, where="data", step=3
    ),
    "a stream without tensors": Failure(
        DataError, ("a stream yielded list without a tensor in it",), data=stream_of_text,
        where="data", step=1,
    ),
}  # fmt: skip
WHO_FAILS = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}


def fail_in_a_step(failure, ranks):
    """Returns what this rank was told, and the model it was left with."""

    def loss_fn(model, batch, ctx):
        due = failure.where == "loss_fn" and ctx.progress.step == failure.step
        return (failure.loss_fn if due and rank() in ranks else mse)(model, batch)

    class Leaves(dtrain.Callback):
        def on_loss(self, ctx, step):
            if step.number == failure.step and rank() in ranks:
                step.loss = failure.loss_fn(ctx.model, step.batch)

    callbacks = [Leaves()] if failure.where == "on_loss" else []
    data = failure.data(ranks, failure.step) if failure.where == "data" else dataset()
    model = make_model()
    return told(lambda: fit(loss_fn, callbacks, data=data, model=model)), parameters(model)


def before_the_failure(failure):
    """Returns the model after the steps that went well."""
    model = make_model()
    if failure.step > 0:
        data = failure.data((), 0) if failure.where == "data" else dataset()
        fit(data=data, model=model, max_steps=failure.step)
    return parameters(model)


def all_failures():
    found = {}
    for name, failure in FAILURES.items():
        before = before_the_failure(failure)
        for who, ranks in WHO_FAILS.items():
            error, after = fail_in_a_step(failure, ranks)
            unchanged = equal(before, after)
            found[name, who] = error, unchanged
    return found


@pytest.fixture(scope="module")
def failed():
    """What both ranks were told: one launch, one failed run after another."""
    return run_processes(all_failures, 2, timeout_s=2 * TIMEOUT_S)


@pytest.mark.parametrize("who", WHO_FAILS)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_in_a_step_reaches_all_ranks_in_that_step(failed, name, who):
    failure, ranks = FAILURES[name], WHO_FAILS[who]
    errors, unchanged = zip(*(each[name, who] for each in failed), strict=True)
    if len(ranks) == 1:
        assert_failed(errors, ranks[0], failure.kind, failure.words, failure.where, failure.step)
    else:
        for error in errors:
            assert_told(error, failure.kind, failure.words)
    assert unchanged == (True, True)  # by the failed step


# -- a hook that raises on one rank ----------------------------------------------------------------


def raise_in(hook, ranks):
    """A callback that raises in ``hook`` on ``ranks``: in the steps' hooks, in the third step."""

    def raises(self, ctx, *args):
        in_a_step = args and hook not in ("on_eval_batch", "on_eval_end")
        if rank() in ranks and (not in_a_step or args[0].number == 2):
            raise ValueError(f"planted in {hook}")

    return type("Raises", (dtrain.Callback,), {hook: raises})()


def run_into(hook, ranks, folder):
    callbacks = [raise_in(hook, ranks), Checkpoint(every_epochs=1)]
    return fit(callbacks=callbacks, run_dir=folder, eval_set=dataset(8))


# From the hook to the step that messages name: the last one that was begun. After a failure in
# one of these, ranks meet again: the failed runs of a launch follow one another.
HOOKS = {
    "on_fit_start": 0,
    "on_batch": 2,
    "on_loss": 2,
    "on_eval_start": 3,
    "on_eval_batch": 3,
    "on_eval_end": 3,
    "on_save": 3,
    "on_epoch_end": 3,
    "on_fit_end": 7,
}
# What fails in these is noticed when the process ends: a launch for each.
LONELY_HOOKS = {"on_epoch_start": 0, "on_step_start": 2, "on_grads_ready": 2, "on_step_end": 2}


def test_every_hook_is_in_a_table():
    hooks = {name for name in vars(dtrain.Callback) if name.startswith("on_")}
    assert {*HOOKS, *LONELY_HOOKS, "on_error"} == hooks


def all_hooks(folder):
    return {
        (hook, who): told(run_into, hook, ranks, Path(folder) / f"{hook} {who}")
        for hook in HOOKS
        for who, ranks in WHO_FAILS.items()
    }


@pytest.fixture(scope="module")
def hooks_failed(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("hooks"))
    return run_processes(all_hooks, 2, folder, timeout_s=2 * TIMEOUT_S)


@pytest.mark.parametrize("who", WHO_FAILS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_ends_all_ranks(hooks_failed, hook, who):
    assert_hook_failed([found[hook, who] for found in hooks_failed], hook, who, HOOKS[hook])


@pytest.mark.parametrize("who", ["rank 0", "rank 1"])
@pytest.mark.parametrize("hook", LONELY_HOOKS)
def test_a_hook_that_raises_between_meetings_ends_all_ranks(tmp_path, hook, who):
    found = outcomes(run_into, hook, WHO_FAILS[who], tmp_path)
    assert_hook_failed(found, hook, who, LONELY_HOOKS[hook])


def lonely_hooks_on_both(folder):
    return {hook: told(run_into, hook, (0, 1), Path(folder) / hook) for hook in LONELY_HOOKS}


def test_each_rank_raises_its_own_error_between_meetings(tmp_path):
    for found in run_processes(lonely_hooks_on_both, 2, str(tmp_path), timeout_s=TIMEOUT_S):
        for hook, error in found.items():
            assert_told(error, ValueError, (f"planted in {hook}",))


def assert_hook_failed(found, hook, who, step):
    words = ("planted", f"planted in {hook}")
    if who == "both":
        for error in found:
            assert_told(error, ValueError, words)
    else:
        assert_failed(found, WHO_FAILS[who][0], ValueError, words, hook, step)


# -- one rank alone --------------------------------------------------------------------------------


def on_rank_1(value, otherwise):
    return value if rank() == 1 else otherwise


def optimizer_fails(folder):
    return make_trainer(optimizer=on_rank_1(planted, sgd))


def empty_on_rank_1(folder):
    return fit(data=dataset(on_rank_1(0, 16)))


def evaluation_data_fails(folder):
    return fit(eval_set=on_rank_1(7, dataset()))


def evaluation_fails(folder):
    return fit(eval_set=dataset(), eval_fn=on_rank_1(planted, mse))


def evaluate_fails(folder):
    return make_trainer(eval_fn=on_rank_1(planted, mse)).evaluate(dataset(), batch_size=4)


def state_fails(folder):
    class Stateful(dtrain.Callback):
        def state_dict(self):
            return {"seen": on_rank_1({1, 2}, [])}  # a set

    return fit(callbacks=[Stateful(), Checkpoint()], run_dir=folder)


def logged_words(folder):
    class Words(dtrain.Callback):
        def on_step_end(self, ctx, step):
            ctx.log("mood", on_rank_1("good", 1.0))

    return fit(callbacks=[Words()])


ALONE = {
    "the optimizer's function": (optimizer_fails, 1, ValueError, ("planted",)),
    "empty data": (empty_on_rank_1, 1, DataError, ("is empty",)),
    "evaluation data that are none": (evaluation_data_fails, 1, DataError, ("int",)),
    "eval_fn, in fit": (evaluation_fails, 1, ValueError, ("planted",)),
    "eval_fn, in evaluate": (evaluate_fails, 1, ValueError, ("planted",)),
    "a logged value": (logged_words, 1, LossError, ("metric 'mood' is 'good'",)),
    # Written by rank 0 for all.
    "a callback's state": (state_fails, 1, CheckpointError, ("callbacks/Stateful/seen is set",)),
}


def all_alone(folder):
    found = {}
    for number, (name, (call, *_)) in enumerate(ALONE.items()):
        found[name] = told(call, Path(folder) / str(number))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_processes(all_alone, 2, folder, timeout_s=2 * TIMEOUT_S)


@pytest.mark.parametrize("name", ALONE)
def test_what_fails_on_one_rank_reaches_the_other(alone, name):
    _, failing, kind, words = ALONE[name]
    assert_failed([found[name] for found in alone], failing, kind, words)


class AskToSave(dtrain.Callback):
    def on_step_end(self, ctx, step):
        ctx.request.save("now")


def save_without_a_place():
    return fit(callbacks=[AskToSave(), raise_in("on_save", (1,))])


def test_on_save_that_raises_where_nothing_is_saved():
    found = outcomes(save_without_a_place)
    assert_failed(found, 1, ValueError, ("planted in on_save",), "on_save")


def callback_on_rank_0(folder):
    return fit(callbacks=[] if rank() else [Checkpoint(every_steps=1)], run_dir=folder)


def test_a_callback_on_one_rank_only(tmp_path):
    for error in outcomes(callback_on_rank_0, tmp_path):
        assert_told(error, RankMismatch, ("  rank 0: ", "  rank 1: ", "Checkpoint"))


def leave_in_a_step(hook):
    def leave(self, ctx, step):
        if rank() == 1 and step.number == 2:
            raise SystemExit("planted")

    return fit(callbacks=[type("Leaves", (dtrain.Callback,), {hook: leave})()])


@pytest.mark.parametrize("hook", ["on_loss", "on_step_end"])
def test_a_rank_that_leaves_with_sys_exit(hook):
    found = outcomes(leave_in_a_step, hook)
    assert_failed(found, 1, SystemExit, ("planted",), hook, 2)


# -- unused parameters -----------------------------------------------------------------------------


def skip_first_layer(model, batch):
    x, y = batch
    return F.mse_loss(model[2](torch.cat([x, x[:, :1]], 1)), y)


def fit_unused(ranks):
    model = make_model()
    before = parameters(model)
    error = told(lambda: fit(skip_first_layer if rank() in ranks else mse, model=model))
    assert equal(before, model.parameters())
    return error


@pytest.mark.parametrize("world_size", [1, 2])
def test_unused_parameters_are_named(world_size):
    for error in run_processes(fit_unused, world_size, (0, 1), timeout_s=TIMEOUT_S):
        words = ("no gradient reached 0.weight, 0.bias, so", "nothing was updated")
        assert_told(error, UnusedParameters, (*words, "Flat(find_unused_parameters=True)"))


def fit_unused_and_raise(ranks, strategy):
    fit(skip_first_layer if rank() in ranks else mse, strategy=strategy)


def test_unused_parameters_on_one_rank():
    for strategy in ("flat", "ddp"):
        other, failing = outcomes(fit_unused_and_raise, (1,), strategy)
        words = "no gradient reached 0.weight, 0.bias"
        assert_told(failing, UnusedParameters, (words,))
        assert_told(other, RemoteError, ("rank 1 on", "at step 0", words))


# -- what works ------------------------------------------------------------------------------------


def smaller_than_the_world(world_size):
    model = make_model()
    result = fit(data=dataset(5), batch_size=1, epochs=3, model=model)
    assert result.steps == 15
    return parameters(model)


def frozen(world_size):
    model = make_model()
    model[0].requires_grad_(False)
    before = parameters(model)
    fit(model=model)
    after = parameters(model)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])
    return after


def optimizer_of_a_function(world_size):
    model = make_model()
    fit(model=model, optimizer=lambda m: Adam(m.parameters(), lr=0.01))
    return parameters(model)


def streams_of_unequal_length(world_size):
    """Rank 0 has 5 batches of 2, rank 1 has 3 of 3; alone, one rank has what they have together."""
    x, y = rows(19)
    streams = [
        [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)],
        [(x[i : i + 3], y[i : i + 3]) for i in range(10, 19, 3)],
    ]
    if world_size == 1:
        first, second = streams
        joined = [
            tuple(torch.cat(parts) for parts in zip(a, b, strict=True))
            for a, b in zip(first, second, strict=False)
        ]
        stream = [*joined, *first[3:]]
    else:
        stream = streams[rank()]
    model = make_model()
    result = fit(data=stream, model=model)
    assert (result.steps, result.epochs) == (10, 2)
    return parameters(model)


def nan_of_no_weight(world_size):
    """The second half of each batch is NaN and has no weight; alone, a rank has the first half."""

    def loss_fn(model, batch):
        x, _ = batch
        bad = bool((x[:, 0] > 10).any())
        mean = mse(model, batch)
        return dtrain.Loss(mean * float("nan") if bad else mean, weight=0 if bad else len(x))

    x, y = rows(8)
    if world_size == 2:
        halves = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
        x = torch.cat([torch.cat([a, torch.full_like(a, 99.0)]) for a, _ in halves])
        y = torch.cat([torch.cat([b, b]) for _, b in halves])
    data = dtrain.Data(TensorDataset(x, y), 2 * world_size, shuffle=False)
    model = make_model()
    trainer = make_trainer(loss_fn, model=model)
    result = trainer.fit(data, epochs=2)
    assert result.steps == 8
    assert trainer.context.progress.updates == 8
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return [*parameters(model), torch.tensor(result.metrics["train/loss"], dtype=torch.float64)]


WORKS = [
    smaller_than_the_world,
    frozen,
    optimizer_of_a_function,
    streams_of_unequal_length,
    nan_of_no_weight,
]


def all_works():
    world_size = dtrain.init(seed=0).size
    found = {case.__name__: case(world_size) for case in WORKS}
    if world_size == 2:
        found |= {case.__name__: case() for case in (no_weight, unequal_models, unequal_metrics)}
    return found


@pytest.fixture(scope="module")
def worked():
    """The same on one rank and on two: what each of the three was left with."""
    return [
        *run_processes(all_works, 1, timeout_s=TIMEOUT_S),
        *run_processes(all_works, 2, timeout_s=TIMEOUT_S),
    ]


@pytest.mark.parametrize("name", [case.__name__ for case in WORKS])
def test_it_works_and_two_ranks_are_as_one(worked, name):
    alone, first, second = (found[name] for found in worked)
    for one, ours, theirs in zip(alone, first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.linalg.norm(ours - one) <= 1e-12 * torch.linalg.norm(one)


def no_weight():
    model = make_model()
    before = parameters(model)
    trainer = make_trainer(as_loss(weight=0), model=model)
    result = trainer.fit(dataset(), batch_size=4, epochs=1)
    assert equal(before, model.parameters())
    return result.steps, trainer.context.progress.updates, repr(result.metrics["train/loss"])


def test_steps_without_weight_change_nothing(worked):
    assert [found["no_weight"] for found in worked[1:]] == [(4, 0, "nan")] * 2


class Listen(dtrain.Sink):
    """Keeps what a person would be told."""

    def __init__(self):
        self.texts = []

    def write(self, report):
        self.texts.append(report.text)


def unequal_models():
    dtrain.init(seed=0)
    torch.manual_seed(10 + rank())
    model = nn.Linear(FEATURES, 1).double()
    before = parameters(model)
    sink = Listen()
    trainer = make_trainer(model=model, sinks=[sink])
    after = parameters(model)
    fit(trainer=trainer, epochs=1)
    return before, after, parameters(model), [t for t in sink.texts if "models" in t]


def test_models_of_unequal_values_are_made_equal_and_it_is_said(worked):
    first, second = (found["unequal_models"] for found in worked[1:])
    for ours, theirs, made_equal in zip(first[0], second[0], second[1], strict=True):
        assert not torch.equal(ours, theirs)
        assert torch.equal(ours, made_equal)  # rank 0's
    for ours, theirs in zip(first[2], second[2], strict=True):
        assert torch.equal(ours, theirs)
    assert len(first[3]) == 1
    assert "the ranks' models were not equal; all have rank 0's now" in first[3][0]
    assert "dtrain.init(seed=...)" in first[3][0]


def unequal_metrics():
    def loss_fn(model, batch, ctx):
        own = {"first": 1.0} if rank() == 0 else {"second": 3.0}
        # A name that turns up later, on one rank, in some steps.
        if rank() == 1 and ctx.progress.step >= 4:
            own["late"] = float(ctx.progress.step)
        own["rank"] = rank()
        own["third"] = dtrain.Mean(rank(), 1 + 2 * rank())
        return dtrain.Loss(mse(model, batch), metrics=own)

    result = fit(loss_fn, data=dataset(18), batch_size=6, log_every=3, eval_set=dataset(6))
    return result.history


def test_a_metric_is_a_mean_over_the_ranks_that_report_it(worked):
    first, second = (found["unequal_metrics"] for found in worked[1:])
    assert first == second
    of_train = [row for row in first if "train/loss" in row]
    of_eval = [row for row in first if "eval/loss" in row]
    assert [(row["step"], row.get("train/late")) for row in of_train] == [(3, None), (6, 4.5)]
    for kind, found in (("train", of_train), ("eval", of_eval)):
        assert len(found) == 2
        for row in found:
            assert row[f"{kind}/first"] == 1.0
            assert row[f"{kind}/second"] == 3.0
            assert row[f"{kind}/rank"] == 0.5
            assert row[f"{kind}/third"] == 0.25


# -- after a failure that the script caught --------------------------------------------------------


def raise_on_rank_1(step):
    """A loss function that raises once: on rank 1, in ``step``."""
    left = [planted] if rank() == 1 else []

    def loss_fn(model, batch, ctx):
        return left.pop()() if left and ctx.progress.step == step else mse(model, batch)

    return loss_fn


def go_on_with_a_new_trainer():
    unbroken = make_model()
    fit(model=unbroken)
    model = make_model()
    found = {"at first": told(lambda: fit(raise_on_rank_1(2)))}
    fit(model=model)
    found["at the start"] = told(lambda: fit(callbacks=[raise_in("on_fit_start", (0,))]))
    found["at last"] = told(lambda: fit(eval_set=dataset(), eval_fn=on_rank_1(planted, mse)))
    same = equal(unbroken.parameters(), model.parameters())
    return found, same


def go_on_with_the_same_trainer():
    unbroken = make_model()
    fit(model=unbroken)
    model = make_model()
    trainer = make_trainer(raise_on_rank_1(2), model=model)
    error = told(lambda: fit(trainer=trainer))
    result = fit(trainer=trainer)
    same = equal(unbroken.parameters(), model.parameters())
    return error, result.steps, same


class AskAndRaise(dtrain.Callback):
    """Logs, asks for all sorts of things, and raises, once."""

    def __init__(self):
        self.done = False

    def on_batch(self, ctx, step):
        if step.number == 2 and not self.done:
            self.done = True
            ctx.log("stale", torch.zeros(3))
            ctx.request.skip("stale")
            ctx.request.stop("stale")
            planted()


def leave_requests_behind():
    unbroken, model = make_model(), make_model()
    fit(model=unbroken)
    trainer = make_trainer(callbacks=[AskAndRaise()], model=model)
    told(lambda: fit(trainer=trainer))
    result = fit(trainer=trainer)
    return result.steps, sorted(result.metrics), equal(unbroken.parameters(), model.parameters())


def go_on():
    return go_on_with_a_new_trainer(), go_on_with_the_same_trainer(), leave_requests_behind()


@pytest.fixture(scope="module")
def went_on():
    return run_processes(go_on, 2, timeout_s=TIMEOUT_S)


def test_a_caught_failure_leaves_nothing_behind(went_on):
    (first, first_same), (second, second_same) = (new for new, *_ in went_on)
    words = ("planted",)
    assert_failed([first["at first"], second["at first"]], 1, ValueError, words, "loss_fn", 2)
    assert_failed([first["at the start"], second["at the start"]], 0, ValueError, words)
    assert_failed([first["at last"], second["at last"]], 1, ValueError, words, "evaluation")
    assert first_same
    assert second_same


def test_the_same_trainer_goes_on_after_a_caught_failure(went_on):
    found = [same for _, same, _ in went_on]
    assert_failed([error for error, _, _ in found], 1, ValueError, ("planted",), "loss_fn", 2)
    # The failed step changed nothing, so that taking it again ends where an unbroken run ends.
    assert [(steps, same) for _, steps, same in found] == [(8, True)] * 2


def test_a_failed_fit_leaves_no_requests_behind(went_on):
    assert [left for *_, left in went_on] == [(8, ["epoch/loss", "lr", "train/loss"], True)] * 2
