"""A captured micro-step computes what it does when it runs by itself, and is replayed."""

import pytest
import torch
import training
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    GradientAccumulation,
    L1L2Penalty,
    MixedPrecision,
    NonFiniteGuard,
    Throughput,
)
from dtrain.errors import LossError

STEPS = 12  # of an epoch; its last batch is ragged
SAMPLES = STEPS * training.BATCH - 5


def net():
    """No bias before BatchNorm, which takes it off again: its gradient is what rounding leaves.

    Adam makes steps of full length of that, so that two trainings that only add up in another order
    (a compiled model has other kernels after a ragged batch) are 5e-4 of the norm apart, all of it
    in that bias and in the running mean; without it 1e-8.
    """
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 10)
    )


def train(*callbacks, graph, loss=training.loss_fn, compiled=False, **options):
    """Returns each step's loss, weights and buffers, and the trainer."""
    dtrain.init(seed=0)
    model, watch = net(), training.Watch()
    trainer = dtrain.Trainer(
        torch.compile(model) if compiled else model,
        training.adamw,
        loss,
        callbacks=[*callbacks, watch],
        sinks=[],
        graph=graph,
        **options,
    )
    data = training.dataset(SAMPLES)
    trainer.fit(data, batch_size=training.BATCH, epochs=3, eval_set=training.dataset(64))
    state = torch.cat([t.detach().cpu().double().reshape(-1) for t in model.state_dict().values()])
    return watch.figures.losses, state, trainer


def compare(*made, **options):
    (losses, state, _), (plain_losses, plain_state, _) = (
        train(*(one() for one in made), graph=graph, **options) for graph in (True, False)
    )
    off = float((state - plain_state).norm() / plain_state.norm())
    print(f"\nlosses equal: {losses == plain_losses}, state differs by {off:.1e} of its norm")
    assert len(losses) == 3 * STEPS
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert off < 1e-4


@pytest.fixture
def replays(monkeypatch, device):
    """Counts replays, and captures."""
    counted = {"capture": 0, "replay": 0}
    if device.type == "cuda":
        begin, replay = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay

        def count(name, real):
            def counting(self, *args, **kwargs):
                counted[name] += 1
                return real(self, *args, **kwargs)

            return counting

        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", count("capture", begin))
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count("replay", replay))
    return counted


CALLBACKS = {
    "plain": [],
    "bf16": [lambda: MixedPrecision("bf16"), lambda: ClipGradients(0.5)],
    "fp16": [lambda: MixedPrecision("fp16"), lambda: ClipGradients(0.5)],
    "accumulated": [lambda: GradientAccumulation(2), lambda: ClipGradients(0.5)],
    "callbacks": [lambda: EMA(0.9), NonFiniteGuard, Throughput, lambda: L1L2Penalty(l2=1e-4)],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_same_figures_as_one_by_one(device, replays, name):
    compare(*CALLBACKS[name])
    if device.type == "cuda":
        assert replays["capture"] >= 2
        assert replays["replay"] >= 2 * (3 * (STEPS - 1) - 3)


def test_each_replay_draws_other_random_numbers(device):
    """As dropout does, from the device's generator; again the same in a second training."""

    def loss(model, batch):
        x, y = batch
        return 0.0 * F.cross_entropy(model(x), y) + torch.rand_like(x).mean()

    (losses, _, _), (again, _, _) = (train(graph=True, loss=loss) for _ in range(2))
    assert len(set(losses)) == len(losses)
    assert losses == again


def test_compiled(device):
    if device.type == "cpu":
        pytest.skip("inductor needs a compiler of C++")
    compare(compiled=True)


def test_saves_in_the_background_do_not_disturb_a_capture(device, tmp_path):
    save = Checkpoint(every_steps=5, keep=2)
    losses, state, _ = train(save, graph=True, run_dir=tmp_path)
    plain_losses, plain_state, _ = train(graph=False)
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert torch.allclose(state, plain_state, rtol=1e-3, atol=1e-4)


class FreezesAndRests(dtrain.Callback):
    """In the middle of the second epoch."""

    def on_step_start(self, ctx, step):
        if step.number == STEPS + 3:
            ctx.model[0].requires_grad_(requires_grad=False)
            ctx.model[1].eval()


def test_what_changes_is_captured_anew(device):
    compare(FreezesAndRests)


def test_a_number_that_is_read_is_named_by_its_line(device):
    def loss(model, batch):
        value = F.cross_entropy(model(batch[0]), batch[1])
        return value if value.item() > 0 else -value

    line = loss.__code__.co_firstlineno + 2
    where = f"test_graph.py:{line}" if device.type == "cuda" else "local_scalar"
    with pytest.raises(LossError, match=f"waits for the device in .*{where}"):
        train(graph=True, loss=loss)


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1.0 if grad.sum().item() == 0 else 2.0)


def test_after_a_capture_that_failed_another_training_is_right(device):
    if device.type == "cpu":
        pytest.skip("what stands in can read while it is captured")

    def loss(model, batch):
        return F.cross_entropy(ReadsInBackward.apply(model(batch[0])), batch[1])

    with pytest.raises(LossError, match="cannot be captured"):
        train(graph=True, loss=loss)
    assert len(set(torch.rand(9, device=device).tolist())) == 9  # the generator draws again
    compare()


@pytest.mark.parametrize("mode", ["reduce-overhead", "graphed callable"])
def test_graphs_of_the_users_own_go_on_working(device, mode):
    """Without ``graph=True``: nothing of dtrain's holds what they overwrite."""
    if device.type == "cpu":
        pytest.skip("needs CUDA graphs")
    dtrain.init(seed=0)
    watch, model = training.Watch(), training.model().cuda()
    if mode == "reduce-overhead":
        called = torch.compile(model, mode=mode)
    else:
        called = torch.cuda.make_graphed_callables(
            model, (torch.zeros(training.BATCH, 64, device="cuda"),)
        )
    trainer = dtrain.Trainer(
        called, training.adamw, training.loss_fn, callbacks=[watch], sinks=[], strategy="ddp"
    )
    rows = dtrain.Data(training.dataset(STEPS * training.BATCH), training.BATCH, shuffle=False)
    trainer.fit(rows, max_steps=STEPS)
    assert watch.figures.losses[-1] < watch.figures.losses[0]
