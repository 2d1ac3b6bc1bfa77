"""What is trained may change at any moment: alike on all ranks, as in one process, or refused."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from ahead import run_ahead
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, StepLR

import dtrain
import dtrain.trainer
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation, LRSchedule
from dtrain.errors import ConfigError, LossError, RankMismatch, RemoteError, UnusedParameters
from dtrain.step.parameters import Parameters
from dtrain.testing import run_processes, run_ranks, try_ranks

LR, STEPS, AT = 0.5, 8, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head, self.extra = nn.Linear(8, 16), nn.Linear(16, 2), None

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + (0 if self.extra is None else self.extra(hidden))


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def sgd(net):
    return torch.optim.SGD(net.parameters(), LR, momentum=0.9)


def new(seed=5):
    torch.manual_seed(seed)
    return nn.Linear(16, 2)


def thaw(net, optimizer):
    net.body.requires_grad_(True)


def freeze(net, optimizer):
    net.body.requires_grad_(False)


def grow(net, optimizer):
    net.extra = new()
    optimizer.add_param_group({"params": list(net.extra.parameters())})


def replace(net, optimizer):
    net.head = new()
    optimizer.param_groups[0]["params"][2:] = list(net.head.parameters())


CHANGES = {change.__name__: change for change in (thaw, freeze, grow, replace)}


class At(dtrain.Callback):
    """Calls a function of model and optimizer in one hook, of one step."""

    def __init__(self, hook, change, ranks=None):
        self.hook, self.change, self.ranks = hook, change, ranks

    def _do(self, hook, number, ctx):
        if not (self.hook == hook and number == AT):
            return
        if self.ranks is None or self.ranks == dtrain.init().rank:
            self.change(ctx.model, ctx.optimizer)

    def on_step_start(self, ctx, step):
        self._do("on_step_start", step.number, ctx)

    def on_batch(self, ctx, step):
        if not step.micro:
            self._do("on_batch", step.number, ctx)

    def on_step_end(self, ctx, step):
        self._do("on_step_end", step.number + 1, ctx)

    def on_epoch_start(self, ctx):
        self._do("on_epoch_start", ctx.progress.step, ctx)


def model_for(change):
    net = Net()
    if change == "thaw":
        net.body.requires_grad_(False)
    return net


def by_hand(change):
    """One process, without dtrain."""
    net = model_for(change)
    optimizer = sgd(net)
    x, y = tiny.dataset(12 * STEPS).tensors
    for step in range(STEPS):
        if step == AT:
            CHANGES[change](net, optimizer)
        optimizer.zero_grad()
        batch = slice(12 * step, 12 * step + 12)
        loss_of(net, (x[batch], y[batch])).backward()
        optimizer.step()
    return flat(net)


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def by_dtrain(strategy, hook, change, accumulates=False):
    dtrain.init(seed=0)
    callbacks = [At(hook, CHANGES[change]), ClipGradients(1e9)]
    callbacks += [GradientAccumulation(2)] * accumulates
    run = tiny.trainer(
        callbacks, net=model_for(change), optimizer=sgd, loss=loss_of, strategy=strategy
    )
    data = tiny.dataset(12 * STEPS)
    run.fit(dtrain.Data(data, 12, shuffle=False), epochs=1)
    return flat(run.model)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_any_hook_as_by_hand(strategy, change):
    right = by_hand(change)
    for world_size in (1, 3):
        for hook in ("on_step_start", "on_batch", "on_step_end"):
            ranks = run_ranks(by_dtrain, world_size, strategy, hook, change, hook == "on_batch")
            for found in ranks:
                assert torch.equal(found, ranks[0]), (world_size, hook)
                torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


class SetsModules(Net):
    def forward(self, x):
        self.cache = nn.Identity()
        return super().forward(x)


def set_modules():
    run = tiny.trainer(net=SetsModules(), optimizer=sgd, loss=loss_of)
    return run.fit(tiny.dataset(), batch_size=12, epochs=2).steps


def test_modules_without_parameters_are_nobodys_business(monkeypatch):
    monkeypatch.setattr(dtrain.strategies.Strategy, "adopt", None)
    assert run_ranks(set_modules, 2) == [16, 16]


def remove(net, optimizer):
    net.head = None
    del optimizer.param_groups[0]["params"][2:]


def add_to_an_empty_part(net, optimizer):
    net.act.register_parameter("scale", nn.Parameter(torch.ones(1)))


def append_to_the_last_group(net, optimizer):
    optimizer.param_groups[-1]["params"].append(nn.Parameter(torch.ones(1)))


def drop_the_last_of_a_group(net, optimizer):
    del optimizer.param_groups[-1]["params"][-1]


def assign_equal_ones(net, optimizer):
    net.head.bias = nn.Parameter(net.head.bias.detach().clone())


def set_data(net, optimizer):
    net.head.weight.data = net.head.weight.data.clone()


def set_a_module(net, optimizer):
    net.cache = nn.Identity()
    net.act.inner = nn.Tanh()


def finds(net, edit):
    progress = dtrain.Progress()
    context = SimpleNamespace(model=net, optimizer=sgd(net), progress=progress, _taken=0)
    trained = Parameters(context)
    trained.take()
    assert not trained.changed()
    edit(net, context.optimizer)
    found = trained.changed()
    assert trained.changed() == found  # also when it is asked again
    trained.take()
    assert not trained.changed()
    return found


def test_a_look_finds_what_was_changed():
    edits = [thaw, freeze, grow, replace, remove, add_to_an_empty_part, assign_equal_ones]
    edits += [append_to_the_last_group, drop_the_last_of_a_group, set_data, set_a_module]
    for edit in edits:
        net = model_for(edit.__name__)
        net.act = nn.Tanh()
        assert finds(net, edit) == (edit not in (set_data, set_a_module)), edit


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_look_finds_what_was_changed_in_a_scripted_module():
    net = torch.jit.script(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    assert finds(net, lambda net, optimizer: net[2].bias.requires_grad_(False))
    assert finds(net, drop_the_last_of_a_group)
    assert not finds(net, lambda net, optimizer: None)


# ------------------------------------------------------------------------------ on one rank only


def test_a_rate_that_is_a_tensor_is_compared_by_its_value():
    def on_one():
        def turn(net, optimizer):
            optimizer.param_groups[0]["lr"].fill_(0.25)

        dtrain.init(seed=0)
        turns = At("on_step_end", turn, ranks=1)
        make = lambda net: torch.optim.SGD(net.parameters(), torch.tensor(0.5))  # noqa: E731
        run = dtrain.Trainer(Net(), make, loss_of, callbacks=[turns], sinks=[], check_ranks=False)
        run.fit(tiny.dataset(), batch_size=12, epochs=2)

    for outcome in try_ranks(on_one, 2):
        assert "rank 1: has lr=0.25 in group 0; lacks lr=0.5" in str(outcome.error), outcome.trace


def set_rate(net, optimizer):
    optimizer.param_groups[0]["lr"] = 0.25


def on_one_rank(strategy, hook, change):
    run = tiny.trainer(
        [At(hook, change, ranks=1)],
        net=model_for(change.__name__),
        optimizer=sgd,
        loss=loss_of,
        strategy=strategy,
    )
    run.fit(tiny.dataset(), batch_size=12, epochs=2)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_changed_on_one_rank_is_refused_by_name_on_all(strategy):
    for change, words in (
        (thaw, "has body.weight [16, 8] torch.float32, body.bias"),
        (freeze, "has body.weight [16, 8] torch.float32 frozen"),
        (grow, "has extra.weight [2, 16] torch.float32 new, extra.bias"),
        (replace, "has head.weight [2, 16] torch.float32 new, head.bias"),
        (set_rate, "has lr=0.25 in group 0; lacks lr=0.5 in group 0"),
    ):
        hooks = ["on_step_start", "on_batch", "on_step_end"] if change is not set_rate else []
        for hook in [*hooks, "on_step_end"]:
            for outcome in try_ranks(on_one_rank, 3, strategy, hook, change):
                assert type(outcome.error) is RankMismatch, outcome.trace
                assert f"rank 1: {words}" in str(outcome.error)
                assert "rank 2: as rank 0" in str(outcome.error)
                assert "alike on all" in str(outcome.error)


def replaced_unseeded(strategy):
    says = []

    def replace(net, optimizer):
        net.head = nn.Linear(16, 2)  # each rank draws other numbers
        optimizer.param_groups[0]["params"][2:] = list(net.head.parameters())

    class Hears(dtrain.Sink):
        def open(self, run_dir): ...
        def close(self): ...
        def write(self, report):
            says.append(report.text)

    dtrain.init(seed=0)
    run = dtrain.Trainer(
        Net(),
        sgd,
        loss_of,
        callbacks=[At("on_step_start", replace)],
        sinks=[Hears()],
        strategy=strategy,
    )
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    return flat(run.model), says


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_new_parameters_that_differ_are_made_equal_and_said(strategy):
    (one, says), (two, _) = run_ranks(replaced_unseeded, 2, strategy)
    assert torch.equal(one, two)
    assert any("parameters that were added differed between ranks" in text for text in says)


# ------------------------------------------------------------------------------ not waited for


def delayed(hook, change, ranks):
    digests = []

    class Looks(dtrain.Callback):
        def on_error(self, ctx, error):
            digests.append(tiny.digest(ctx.model))

    run = tiny.trainer(
        [At(hook, change, ranks), Looks()],
        net=model_for(change.__name__),
        optimizer=lambda net: torch.optim.AdamW(net.parameters(), 1e-2, fused=True),
        loss=loss_of,
    )
    try:
        run.fit(dtrain.Data(tiny.dataset(12 * STEPS), 12, shuffle=False), epochs=1)
    except RankMismatch as error:
        return digests[0], str(error)
    return tiny.digest(run.model), flat(run.model)


def test_changed_where_steps_are_not_waited_for(monkeypatch):
    run_ahead(patch=monkeypatch)
    for name, change in CHANGES.items():
        for hook in ("on_step_start", "on_step_end"):
            (_, weights), *others = [
                found for size in (1, 2) for found in run_ranks(delayed, size, hook, change, None)
            ]
            assert others[0][0] == others[1][0]
            torch.testing.assert_close(others[0][1], weights, rtol=1e-4, atol=1e-6)
            # What one rank alone has found is applied by none.
            (one, words), (two, _) = run_ranks(delayed, 2, hook, change, 1)
            assert one == two or name in ("grow", "replace")
            assert "rank 1: has" in words


# ------------------------------------------------------------------------------ the optimizer


def lacks(strategy, hook, when):
    net = Net()
    net.body.requires_grad_(False)

    def thaw(net, optimizer):
        if when == "assigned in it":
            assign(net)
        net.body.requires_grad_(True)

    def assign(net):
        net.load_state_dict({k: t.clone() for k, t in net.state_dict().items()}, assign=True)

    run = tiny.trainer(
        [At(hook, thaw)],
        net=net,
        optimizer=lambda net: torch.optim.SGD(net.head.parameters(), LR),
        loss=loss_of,
        strategy=strategy,
    )
    if when == "before":
        net.head = new()
    elif when == "assigned before":
        assign(net)
    elif when == "thawed before":
        net.body.requires_grad_(True)
    run.fit(tiny.dataset(36), batch_size=12, epochs=3)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_what_the_optimizer_lacks_is_refused_by_name(strategy, world_size):
    strange = "2 of the optimizer's 2 parameters are not the model's (shapes [2, 16], [2]; it lacks"
    lacking = "the optimizer does not have body.weight, body.bias, which were added or thawed"
    for hook, when, words in (
        ("on_step_start", "", lacking),
        ("on_step_end", "", lacking),
        ("on_batch", "", lacking),
        ("on_epoch_start", "", lacking),
        ("", "thawed before", lacking),
        ("", "before", strange),
        ("", "assigned before", strange),
        ("on_epoch_start", "assigned in it", strange),
        ("on_step_end", "assigned in it", strange),
    ):
        for outcome in try_ranks(lacks, world_size, strategy, hook, when):
            assert type(outcome.error) is ConfigError, (hook, when, outcome.trace)
            assert words in str(outcome.error)


def between_two_fits(strategy, run_dir):
    run = tiny.trainer(
        [Checkpoint(every_epochs=1)],
        net=Net(),
        optimizer=lambda net: torch.optim.Adam(net.parameters(), 1e-2),
        loss=loss_of,
        strategy=strategy,
        run_dir=run_dir,
    )
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    torch.manual_seed(dtrain.init().rank)
    run.model.head = nn.Linear(16, 2)
    before = run.model.head.weight.detach().clone()
    run.optimizer.param_groups[0]["params"][2:] = list(run.model.head.parameters())
    run.fit(tiny.dataset(), batch_size=12, epochs=3)
    saved = Net()
    dtrain.load_model(run_dir, saved)
    assert not torch.equal(before, run.model.head.weight)
    assert torch.equal(flat(saved), flat(run.model))
    assert len(run.optimizer.state) == 4
    return flat(run.model)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_head_replaced_between_two_fits(tmp_path, strategy):
    one, two = run_ranks(between_two_fits, 2, strategy, tmp_path)
    assert torch.equal(one, two)


def exchanged():
    rates = []

    class Rates(dtrain.Callback):
        def on_step_end(self, ctx, step):
            rates.append(ctx.optimizer.param_groups[0]["lr"])

    told = tiny.Words()
    dtrain.init(seed=0)
    schedule = LRSchedule(lambda opt, steps: LinearLR(opt, 1.0, 0.1, steps))
    callbacks = [schedule, Rates()]
    run = dtrain.Trainer(tiny.model(), tiny.adam, tiny.loss_fn, callbacks=callbacks, sinks=[told])
    run.fit(tiny.dataset(), batch_size=24, epochs=1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), 0.2)
    assert run.context.optimizer is run.optimizer
    run.fit(tiny.dataset(), batch_size=24, epochs=2)
    assert run.optimizer.param_groups[0]["lr"] == rates[-1] < rates[4] < 0.2
    words = "note: trained by another optimizer from now on"
    assert told.words.count(words) == (dtrain.init().rank == 0)


def grown_under_a_schedule(strategy, into_a_group):
    def grow_in_place(net, optimizer):
        net.extra = new()
        optimizer.param_groups[0]["params"] += net.extra.parameters()

    schedule = LRSchedule(lambda opt, steps: LinearLR(opt, 1.0, 0.1, steps))
    change = At("on_step_end", grow_in_place if into_a_group else grow)
    run = tiny.trainer(
        [schedule, change], net=Net(), optimizer=sgd, loss=loss_of, strategy=strategy
    )
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    return flat(run.model), len(run.optimizer.state)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_parameters_that_are_added_under_a_schedule(strategy):
    (one, held), (two, _) = run_ranks(grown_under_a_schedule, 2, strategy, True)
    assert torch.equal(one, two)
    assert held == 6
    for outcome in try_ranks(grown_under_a_schedule, 2, strategy, False):
        assert type(outcome.error) is ConfigError
        assert "2 groups, and the scheduler was made for 1" in str(outcome.error)


def exchanged_in_fit():
    class Exchanges(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if step.number == AT:
                ctx.optimizer = sgd(ctx.model)

    tiny.trainer([Exchanges()]).fit(tiny.dataset(), batch_size=12, epochs=1)


def exchanged_under_a_scheduler():
    net = Net()
    optimizer = sgd(net)
    run = tiny.trainer([LRSchedule(StepLR(optimizer, 1))], net=net, optimizer=lambda _: optimizer)
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    run.optimizer = sgd(net)
    run.fit(tiny.dataset(), batch_size=12, epochs=2)


def test_a_scheduler_of_the_optimizer_before_is_refused_as_such():
    for outcome in try_ranks(exchanged_under_a_scheduler, 2):
        assert type(outcome.error) is ConfigError
        assert "the scheduler must be of the Trainer's own optimizer" in str(outcome.error)


def test_an_exchanged_optimizer_is_taken_over_between_two_fits_only():
    run_ranks(exchanged, 2)
    for outcome in try_ranks(exchanged_in_fit, 2):
        assert type(outcome.error) is ConfigError
        assert "set trainer.optimizer between two fits" in str(outcome.error)


# ------------------------------------------------------------------------------ before a fit


def loaded_on_rank_0(strategy):
    hears = tiny.Words()
    dtrain.init(seed=0)
    run = dtrain.Trainer(Net(), sgd, loss_of, sinks=[hears], strategy=strategy)
    if dtrain.init().rank == 0:
        run.model.head.load_state_dict(new(9).state_dict())
    figures = [run.evaluate(tiny.dataset(), batch_size=12)["eval/loss"]]
    if dtrain.init().rank == 0:
        run.model.head.load_state_dict(new(8).state_dict())
    run.fit(tiny.dataset(), batch_size=12, epochs=1)
    figures.append(run.evaluate(tiny.dataset(), batch_size=12)["eval/loss"])
    return flat(run.model), figures, hears.words


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_weights_loaded_on_one_rank_reach_all_and_it_is_said(strategy):
    ((alone, right, _),) = run_ranks(loaded_on_rank_0, 1, strategy)
    (one, figures, says), (two, _, _) = run_ranks(loaded_on_rank_0, 2, strategy)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, alone)
    assert figures == pytest.approx(right)
    assert any("the ranks' models were no longer equal; all have rank 0's now" in t for t in says)


# ------------------------------------------------------------------------------ backward


def hooked():
    says = tiny.Words()
    dtrain.init(seed=0)
    net = Net()
    net.head.weight.register_hook(lambda grad: grad.clamp(-1, 1))
    run = dtrain.Trainer(net, sgd, loss_of, sinks=[says])
    run.fit(tiny.dataset(), batch_size=12, max_steps=1)
    return says.words


def test_hooks_on_gradients_of_one_rank_are_told():
    for ranks, told in ((1, False), (2, True)):
        words = " ".join(run_ranks(hooked, ranks)[0])
        assert ("hooks on gradients (head.weight: register_hook)" in words) == told


def with_a_backward(strategy, kind):
    def loss_fn(net, batch):
        loss = loss_of(net, batch)
        loss.backward(retain_graph=kind == "retained")
        if kind == "stepped":
            net.zero_grad()
        return loss

    run = tiny.trainer(net=Net(), optimizer=sgd, loss=loss_fn, strategy=strategy)
    run.fit(tiny.dataset(), batch_size=12, epochs=1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_backward_of_the_users_own_is_refused_with_the_reason(strategy, world_size):
    for kind in ("once", "retained", "stepped"):
        first = try_ranks(with_a_backward, world_size, strategy, kind)[0]
        assert type(first.error) is LossError, first.trace
        assert "a backward() ran in the loss function or a hook" in str(first.error)
        assert "torch.autograd.grad" in str(first.error)


def gradient_penalty(strategy):
    def loss_fn(net, batch):
        x = batch[0].clone().requires_grad_(True)
        logits = net(x)
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, batch[1]) + grad.square().mean()

    run = tiny.trainer(net=Net(), optimizer=sgd, loss=loss_fn, strategy=strategy)
    return run.fit(tiny.dataset(), batch_size=12, epochs=1).steps


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_gradient_that_the_loss_is_made_of(strategy):
    assert run_ranks(gradient_penalty, 2, strategy) == [8, 8]


# ------------------------------------------------------------------------------ memory


class Moves(dtrain.Callback):
    """Does something to the model and gives it back as it was."""

    def __init__(self, how):
        self.how = how

    def on_step_end(self, ctx, step):
        if self.how == "cast" and step.number == AT:
            ctx.model.double().float()
        elif self.how == "format":
            ctx.model.to(memory_format=torch.channels_last)
            ctx.model.to(memory_format=torch.contiguous_format)
        elif self.how == "data":
            for p in ctx.model.parameters():
                p.data = p.data.clone()

    def on_grads_ready(self, ctx, step):
        for p in ctx.model.parameters():
            if self.how == "clamped":
                p.grad = p.grad.clamp(-0.01, 0.01)
            elif self.how == "clamped in data":
                p.grad.data = p.grad.data.clamp(-0.01, 0.01)


def moved(strategy, how):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(4, 2)
    )
    callbacks = [Moves(how), ClipGradients(0.05)]
    run = tiny.trainer(callbacks, net=net, optimizer=sgd, loss=loss_of, strategy=strategy)
    run.fit(dtrain.Data(tiny.dataset(60), 12, shuffle=False), epochs=1)
    return flat(run.model)


def all_moved(strategy):
    hows = ("nothing", "cast", "format", "data", "clamped", "clamped in data")
    found = {how: moved(strategy, how) for how in hows}
    if strategy == "ddp":  # which threads have no twin of
        found |= {change: by_dtrain(strategy, "on_batch", change, True) for change in CHANGES}
    return found


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_model_that_was_moved_and_gradients_that_were_set(strategy):
    one, two = (run_ranks if strategy == "flat" else run_processes)(all_moved, 2, strategy)
    for how in ("cast", "format", "data"):
        torch.testing.assert_close(one[how], one["nothing"], rtol=1e-5, atol=1e-7)
    assert torch.equal(one["clamped in data"], one["clamped"])
    for change in CHANGES if strategy == "ddp" else ():
        torch.testing.assert_close(one[change], by_hand(change), rtol=1e-4, atol=1e-6)
    for case, found in one.items():
        assert torch.equal(found, two[case]), case


def left_changed(strategy, how):
    def change(net, optimizer):
        if how == "cast":
            net.double()
        else:
            net.head.weight.data = torch.zeros(3, 16)

    run = tiny.trainer(
        [At("on_step_end", change)], net=Net(), optimizer=sgd, loss=loss_of, strategy=strategy
    )
    run.fit(tiny.dataset(), batch_size=12, epochs=1)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_model_that_stays_in_another_form_is_refused_by_name(strategy):
    for how, words in (
        ("cast", "body.weight was torch.float32 cpu [16, 8] (8, 1), and is torch.float64 cpu"),
        ("resized", "head.weight was torch.float32 cpu [2, 16] (16, 1), and is torch.float32 cpu "),
    ):
        for outcome in try_ranks(left_changed, 2, strategy, how):
            assert type(outcome.error) in (ConfigError, RemoteError)
            assert words in str(outcome.error)


# ------------------------------------------------------------------------------ DDP's own


class Sometimes(Net):
    """Whose head is used in every other forward."""

    uses = 0

    def forward(self, x):
        self.uses += 1
        hidden = self.body(x)
        return self.head(hidden) if self.uses % 2 else hidden[:, :2]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(8, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs()


def train_a_complex_model(strategy):
    class Skips(dtrain.Callback):
        def on_batch(self, ctx, step):
            if step.number == AT and dtrain.init().rank == 1:
                ctx.request.skip("planted")

    run = tiny.trainer(
        [Skips(), ClipGradients(0.1)], net=Complex(), optimizer=sgd, loss=loss_of, strategy=strategy
    )
    run.fit(dtrain.Data(tiny.dataset(), 12, shuffle=False), epochs=1)
    return torch.view_as_real(run.model.weight.detach())


def with_ddp():
    flat, ddp = train_a_complex_model("flat"), train_a_complex_model("ddp")
    run = tiny.trainer(
        [GradientAccumulation(2)], net=Sometimes(), optimizer=sgd, loss=loss_of, strategy="ddp"
    )
    with pytest.raises(UnusedParameters) as unused:
        run.fit(tiny.dataset(), batch_size=12, epochs=1)
    return flat, ddp, str(unused.value)


def test_complex_parameters_and_those_that_only_the_first_micro_batch_used():
    for flat_ones, ddp_ones, words in run_processes(with_ddp, 2):
        torch.testing.assert_close(ddp_ones, flat_ones)
        assert "reached head.weight (in the last micro-batch), head.bias" in words
        assert "`from dtrain.strategies import DDP`" in words
