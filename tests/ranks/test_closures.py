"""Optimizers that evaluate the loss several times in a step: LBFGS, SAM."""

import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import test_updates
import tiny
import torch
from torch.nn import functional as F
from torch.optim import LBFGS, SGD

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation, MixedPrecision
from dtrain.errors import ConfigError
from dtrain.testing import run_processes, run_ranks, try_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "lbfgs.py"
STEPS = 8


class SAM(torch.optim.Optimizer):
    """As usually written (Foret et al., ICLR 2021): the closure is called once, amid a step."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho} | options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        olds = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / (norm + 1e-12)))
            p.grad = None
        torch.enable_grad()(closure)()
        for p, old in zip(params, olds, strict=True):
            p.copy_(old)
        self.base.step()


def lbfgs(net):
    return LBFGS(net.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


def sam(net):
    return dtrain.WithClosure(SAM(net.parameters(), SGD, lr=0.1, momentum=0.9))


MAKES = {"lbfgs": lbfgs, "sam": sam}


def loss_fn(net, batch):
    return F.cross_entropy(net(batch[0].double()), batch[1])


def train(name, strategy="auto", micros=1, more=(), loss=loss_fn, run_dir=None, steps=STEPS):
    run = tiny.trainer(
        [GradientAccumulation(micros), ClipGradients(0.5), *more],
        net=tiny.model(dtype=torch.float64),
        optimizer=MAKES[name],
        loss=loss,
        strategy=strategy,
        run_dir=run_dir,
    )
    result = run.fit(tiny.dataset(50), batch_size=22, max_steps=steps, log_every=2)
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}, result


def by_hand(name):
    batches = []

    class See(dtrain.Callback):
        def on_batch(self, ctx, step):
            batches.append(step.batch)

    train(name, more=[See()])
    assert len(batches) == STEPS
    net = tiny.model(dtype=torch.float64)
    optimizer = MAKES[name](net)
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_fn(net, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            return loss

        closure()
        optimizer.step(closure)
    return {n: p.detach() for n, p in net.named_parameters()}


def train_both(strategy, micros):
    return [train(name, strategy, micros) for name in MAKES]


@pytest.mark.parametrize(
    ("world_size", "strategy", "micros"),
    [(1, "flat", 3), (2, "flat", 1), (2, "ddp", 2), (3, "ddp", 1)],
)
def test_the_parameters_are_those_of_a_loop_by_hand(world_size, strategy, micros):
    expected = [by_hand(name) for name in MAKES]
    ranks = run_processes(train_both, world_size, strategy, micros, timeout_s=60)
    for found in ranks:
        for (params, result), truth, first in zip(found, expected, ranks[0], strict=True):
            assert result.updates == STEPS
            for name, value in params.items():
                assert (value - truth[name]).norm() <= 1e-12 * truth[name].norm(), name
                assert torch.equal(value, first[0][name])


def failing(evaluation, seen):
    def loss(net, batch, ctx):
        seen.append(ctx.progress.step)
        if dtrain.init().rank == 1 and seen.count(2) == evaluation:
            raise ValueError("planted")
        return loss_fn(net, batch)

    return loss


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_error_in_a_later_evaluation_is_everybodys(tmp_path, evaluation):
    def fit():
        train("lbfgs", more=[Checkpoint()], loss=failing(evaluation, []), run_dir=tmp_path)

    for one in try_ranks(fit, 2):
        words = " ".join([str(one.error), *getattr(one.error, "__notes__", [])])
        assert "planted" in words
        assert ("there is no state before it any more" in words) == (evaluation == 2)
    assert (tmp_path / "emergency").exists() == (evaluation == 1)


def test_a_skip_and_a_metric_count_once():
    class Skip(dtrain.Callback):
        def on_batch(self, ctx, step):
            if dtrain.init().rank == 1:
                ctx.request.skip("told to")

    def loss(net, batch):
        return dtrain.Loss(loss_fn(net, batch), metrics={"n": dtrain.Mean(len(batch[1]), 1)})

    def fit():
        return train("lbfgs", more=[Skip()], loss=loss, steps=2)[1]

    for result in run_ranks(fit, 2):
        (row,) = [row for row in result.history if "skipped" in row][:1]
        assert row["skipped"] == 2
        assert row["train/n"] == 11


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    class Leave(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if step.number == 3:
                ctx.request.preempt("told to")

    def interrupted():
        train("lbfgs", more=[Checkpoint(), Leave()], run_dir=tmp_path)
        return train("lbfgs", more=[Checkpoint()], run_dir=tmp_path)[0]

    def straight():
        return train("lbfgs")[0]

    for whole, parts in zip(run_ranks(straight, 2), run_ranks(interrupted, 2), strict=True):
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="LBFGS evaluates the loss several times in a step"):
        tiny.trainer([MixedPrecision("fp16")], optimizer=lbfgs)
    with pytest.raises(ConfigError, match="LBFGS cannot be one of several optimizers"):
        tiny.trainer(
            optimizer=lambda net: [LBFGS(net[0].parameters()), SGD(net[2].parameters(), lr=0.1)]
        )


@pytest.mark.parametrize("what", ["closure", "updates"])
def test_a_trainer_goes_with_its_last_reference(what):
    gc.collect()
    gc.disable()
    try:
        if what == "closure":
            run = tiny.trainer(optimizer=lbfgs)
        else:
            run = test_updates.trainer()
        run.fit(tiny.dataset(32), batch_size=8, max_steps=2)
        model = weakref.ref(run.model)
        del run
        assert model() is None
    finally:
        gc.enable()


def digits():
    spec = importlib.util.spec_from_file_location("lbfgs", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    dtrain.init(seed=0)
    torch.manual_seed(0)
    return example, torch.nn.Linear(64, 10).double(), example.make_data()


def train_digits(cases):
    found = []
    for strategy, micros in cases:
        example, model, data = digits()
        trainer = dtrain.Trainer(
            model,
            example.make_optimizer(model),
            example.loss_fn,
            callbacks=[GradientAccumulation(micros)],
            sinks=[],
            strategy=strategy,
        )
        trainer.fit(data, batch_size=len(data), max_steps=5)
        found.append((model.weight.detach().clone(), model.bias.detach().clone()))
    return found


@pytest.mark.slow  # it loads the data once in each process
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_example_is_the_loop_by_hand(world_size):
    example, model, data = digits()
    optimizer = example.make_optimizer(model)

    def closure():
        optimizer.zero_grad()
        loss = example.loss_fn(model, data.tensors)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    for rank in run_processes(train_digits, world_size, [("flat", 1), ("ddp", 2), ("flat", 3)]):
        for weight, bias in rank:
            assert (weight - model.weight).norm() <= 1e-12 * model.weight.norm()
            assert (bias - model.bias).norm() <= 1e-12 * model.bias.norm()
