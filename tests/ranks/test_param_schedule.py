"""ParamSchedule sets what it says, at every step, on every rank, and after a resume."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import LRSchedule
from dtrain.callbacks.param_schedule import ParamSchedule
from dtrain.errors import ConfigError
from dtrain.schedules import warmup_cosine
from dtrain.testing import run_processes

BATCH_SIZE, STEPS = 12, 24  # three epochs of 96 samples


def decay(progress):
    return 0.1 * (1 - progress.step / progress.total_steps)


def model(dtype=torch.float32):
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5))
    body.register_buffer("warmth", torch.ones(()))
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(16, 2))).to(dtype)


def groups(net, **options):
    """AdamW with two groups: weights, which decay, and biases."""
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim == 1]
    named = [{"params": weights, "name": "weights"}, {"params": biases, "name": "biases"}]
    return torch.optim.AdamW(named, lr=1e-2, weight_decay=0.5, **options)


class Read(dtrain.Callback):
    """Keeps what the optimizer and the model say in each step, when its update is made."""

    def __init__(self, read):
        self.read = read
        self.values = []

    def on_grads_ready(self, ctx, step):
        self.values.append(self.read(ctx))


class Leave(dtrain.Callback):
    """Asks to save and go after a step, as a scheduler's signal would."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            ctx.request.preempt("as planned")


def values(schedules, read, optimizer=groups):
    reader = Read(read)
    trainer = tiny.trainer([*schedules, reader], net=model(), optimizer=optimizer)
    result = trainer.fit(tiny.dataset(), batch_size=BATCH_SIZE, epochs=3, log_every=1)
    return reader.values, result.history


def of_groups(key):
    return lambda ctx: [group[key] for group in ctx.optimizer.param_groups]


def tensor_lr(net):
    return torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-2, dtype=torch.float64))


def train(run_dir=None, leave_at=-1):
    """Weight decay, dropout and the rate move; with a checkpoint's help, or in one go."""
    net = model()
    callbacks = [
        LRSchedule(warmup_cosine(5)),
        ParamSchedule("weight_decay", decay),
        ParamSchedule("dropout", lambda p: 0.5 - p.step / 100, module="body.1:p"),
        Leave(leave_at),
    ]
    trainer = tiny.trainer(callbacks, net=net, optimizer=groups, run_dir=run_dir)
    result = trainer.fit(tiny.dataset(), batch_size=BATCH_SIZE, epochs=3)
    return result.steps, tiny.digest(net)


def in_double():
    """SGD whose momentum and weight decay move; the model, and the pairs it was trained on."""
    net = tiny.model(dtype=torch.float64)
    x, y = tiny.dataset().tensors
    schedules = [
        ParamSchedule("weight_decay", decay),
        ParamSchedule("momentum", lambda p: 0.5 + 0.4 * p.epoch / p.total_epochs),
    ]
    trainer = tiny.trainer(
        schedules, net=net, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
    )
    fed = dtrain.Data(TensorDataset(x.double(), y), BATCH_SIZE, shuffle=False)
    trainer.fit(fed, epochs=3)
    return net.state_dict()


def everything(folder):
    """All runs of this file, on one set of ranks."""
    found = {
        "all": values([ParamSchedule("weight_decay", decay)], of_groups("weight_decay")),
        "place": values([ParamSchedule("lr", decay, group=1, log=False)], of_groups("lr")),
        "name": values(
            [
                ParamSchedule("weight_decay", decay, group="weights"),
                ParamSchedule("weight_decay", lambda p: 0.0, group="biases"),
            ],
            of_groups("weight_decay"),
        ),
        "function": values(
            [ParamSchedule("eps", lambda p: 1e-6, group=lambda g: g["params"][0].ndim == 1)],
            of_groups("eps"),
        ),
        "betas": values(
            [ParamSchedule("betas", lambda p: (0.9, 0.99 if p.epoch else 0.9))],
            of_groups("betas"),
        ),
        "module": values(
            [
                ParamSchedule("dropout", lambda p: p.step / 100, module="body.1:p"),
                ParamSchedule("warmth", lambda p: 1.0 + p.step, module="body:warmth"),
            ],
            lambda ctx: (ctx.model.body[1].p, ctx.model.body.warmth.item()),
        ),
        "tensor": values(
            [ParamSchedule("lr", decay)],
            lambda ctx: [(float(g["lr"]), g["lr"].dtype) for g in ctx.optimizer.param_groups],
            optimizer=tensor_lr,
        ),
        "double": in_double(),
        "whole": train(),
        "resumed": [],
    }
    if dtrain.init(seed=0).size < 3:  # bits are equal up to two ranks
        for at in (3, 11):
            found["resumed"].append((train(folder / str(at), at), train(folder / str(at))))
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory):
    return run_processes(everything, request.param, tmp_path_factory.mktemp("runs"), timeout_s=60)


DECAYS = [0.1 * (1 - step / STEPS) for step in range(STEPS)]


def test_sets_every_group_or_one(ranks):
    for rank in ranks:
        assert rank["all"][0] == [[value, value] for value in DECAYS]
        assert rank["place"][0] == [[1e-2, value] for value in DECAYS]
        assert rank["name"][0] == [[value, 0.0] for value in DECAYS]
        assert rank["function"][0] == [[1e-8, 1e-6]] * STEPS


def test_sets_tuples_tensors_and_attributes_of_modules(ranks):
    for rank in ranks:
        assert rank["betas"][0] == [[(0.9, 0.9)] * 2] * 8 + [[(0.9, 0.99)] * 2] * 16
        assert rank["module"][0] == [(step / 100, 1.0 + step) for step in range(STEPS)]
        assert rank["tensor"][0] == [[(value, torch.float64)] for value in DECAYS]


def test_reports_numbers_under_its_name(ranks):
    for rank in ranks:
        reported = [report["weight_decay"] for report in rank["all"][1]]
        assert reported == pytest.approx(DECAYS, rel=1e-12)
        assert {"weight_decay/weights", "weight_decay/biases"} <= set(rank["name"][1][0])
        assert rank["module"][1][5]["dropout"] == pytest.approx(0.05)
        # Rates are reported in any case, each group's.
        used = [[row["lr/weights"], row["lr/biases"]] for row in rank["place"][1]]
        assert used == rank["place"][0]
        assert "betas" not in rank["betas"][1][0]  # no number


def test_trains_as_plain_torch_with_these_values(ranks):
    net = tiny.model(dtype=torch.float64)
    x, y = tiny.dataset().tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        epoch, batch = divmod(step, 8)
        rows = slice(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        optimizer.param_groups[0].update(weight_decay=DECAYS[step], momentum=0.5 + 0.4 * epoch / 3)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows].double()), y[rows]).backward()
        optimizer.step()
    for rank in ranks:
        for name, wanted in net.state_dict().items():
            distance = (rank["double"][name] - wanted).norm()
            assert float(distance) <= 1e-12 * float(wanted.norm()), name


def test_a_resumed_run_ends_with_the_same_bits(ranks):
    for rank in ranks:
        assert rank["whole"][0] == STEPS
        assert len(rank["resumed"]) == (2 if len(ranks) < 3 else 0)
        for left, again in rank["resumed"]:
            assert left[0] < STEPS
            assert again == rank["whole"]


# -- refusals -----------------------------------------------------------------------------------


def constant(progress):
    return 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ParamSchedule("weight_deacy", constant),
            "parameter group 0 has no 'weight_deacy'; did you mean 'weight_decay'? there are lr,",
        ),
        (lambda: ParamSchedule("params", constant), "has no 'params'"),
        (
            lambda: ParamSchedule("lr", constant, group=2),
            "no such parameter group; there are 0 'weights', 1 'biases'",
        ),
        (lambda: ParamSchedule("lr", constant, group="weight"), "there are 0 'weights'"),
        (lambda: ParamSchedule("lr", constant, group=lambda g: False), "no such parameter group"),
        (
            lambda: ParamSchedule("drop", constant, module="bdy.1:p"),
            "no module 'bdy.1'; did you mean 'body.1'? there are body, body.0, body.1, head",
        ),
        (
            lambda: ParamSchedule("drop", constant, module="body.1:q"),
            "Dropout 'body.1' has no 'q'; there are training, p, inplace",
        ),
        (lambda: ParamSchedule("drop", constant, module="body:forward"), "has no 'forward'"),
        (lambda: ParamSchedule("drop", constant, module="body.1"), "'path.to.module:attribute'"),
        (
            lambda: ParamSchedule("drop", constant, module="body.1:p", group=0),
            "cannot be combined with group",
        ),
        (lambda: ParamSchedule("betas", constant), "0.1 cannot take the place of (0.9, 0.999)"),
        (lambda: ParamSchedule("lr", 0.1), "pass a function of the progress"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(make, words):
    net = model()
    opt = groups(net)
    with pytest.raises(ConfigError) as caught:
        make().on_fit_start(
            SimpleNamespace(model=net, optimizer_of=lambda _: opt, progress=dtrain.Progress())
        )
    assert words in str(caught.value)


def test_says_that_the_number_of_steps_is_unknown():
    net = model()
    opt = groups(net)
    with pytest.raises(TypeError) as caught:
        ParamSchedule("lr", decay).on_fit_start(
            SimpleNamespace(model=net, optimizer_of=lambda _: opt, progress=dtrain.Progress())
        )
    assert caught.value.__notes__ == ["(progress.total_steps is None: pass max_steps to fit)"]
