"""Any rank may ask, all ranks act at the same step."""

import socket

import pytest
import tiny
import torch

import dtrain
from dtrain.callbacks import EarlyStopping
from dtrain.testing import run_processes


class StopAt(dtrain.Callback):
    """Asks for a stop on one rank, in one hook, at one step."""

    def __init__(self, rank, step, hook):
        self.mine = dtrain.init(seed=0).rank == rank
        self.step = step
        self.hook = hook

    def ask(self, ctx, hook, step):
        if self.mine and hook == self.hook and ctx.progress.step == step:
            ctx.request.stop("enough")

    def on_step_start(self, ctx, step):
        self.ask(ctx, "on_step_start", self.step)

    def on_loss(self, ctx, step):
        self.ask(ctx, "on_loss", self.step)

    def on_step_end(self, ctx, step):
        self.ask(ctx, "on_step_end", self.step + 1)  # the step is counted by now


def stop_in_hooks():
    world_size = dtrain.init(seed=0).size
    found = {}
    for rank in range(world_size):
        for hook in ("on_step_start", "on_loss", "on_step_end"):
            trainer = tiny.trainer([StopAt(rank, 4, hook)])
            result = trainer.fit(tiny.dataset(), batch_size=12, epochs=3)
            found[rank, hook] = (result.steps, result.stop_reason)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_ranks_stop_stops_all_after_the_same_step(world_size):
    results = run_processes(stop_in_hooks, world_size)
    for rank in range(world_size):
        by = f" (asked by rank {rank} on {socket.gethostname()})" if world_size > 1 else ""
        for found in results:
            # Carried by the reduction of step 4: that step is the last.
            assert found[rank, "on_step_start"] == (5, f"enough{by}")
            assert found[rank, "on_loss"] == (5, f"enough{by}")
            # Asked after the reduction of step 4, so carried by step 5's, at any world size.
            assert found[rank, "on_step_end"] == (6, f"enough{by}")


class StopBefore(dtrain.Callback):
    """Asks for a stop on rank 0 before the first step, or where a layer is frozen."""

    def __init__(self, hook):
        self.hook = hook
        self.mine = dtrain.init(seed=0).rank == 0

    def on_fit_start(self, ctx):
        if self.mine and self.hook == "on_fit_start":
            ctx.request.stop("enough")

    def on_epoch_start(self, ctx):
        if self.hook == "on_epoch_start" and ctx.progress.epoch == 1:
            next(ctx.model.parameters()).requires_grad_(False)
            if self.mine:
                ctx.request.stop("enough")


def stop_before_steps():
    trainers = [tiny.trainer([StopBefore(hook)]) for hook in ("on_fit_start", "on_epoch_start")]
    return [each.fit(tiny.dataset(), batch_size=12, epochs=3).steps for each in trainers]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_asked_before_a_step_is_carried_by_it(world_size):
    # Also where the model is wrapped in between.
    assert run_processes(stop_before_steps, world_size) == [[1, 9]] * world_size


def rank_local_criterion(vote, tired_after):
    """Each rank's monitor stops improving after its own number of epochs."""
    world = dtrain.init(seed=0)
    good_until = tired_after[world.rank]

    def monitor(ctx):
        return -min(ctx.progress.epoch, good_until)

    stopping = EarlyStopping(monitor, patience=1, vote=vote)
    trainer = tiny.trainer([stopping])
    result = trainer.fit(tiny.dataset(), batch_size=24, epochs=10)
    return result.steps, result.epochs, result.stop_reason


@pytest.mark.parametrize(
    ("tired_after", "vote", "epochs"),
    [
        ([1, 3], "any", 3),
        ([1, 3], "majority", 5),  # more than half of two ranks is both
        ([1, 3], "all", 5),
        ([1, 3, 5], "any", 3),
        ([1, 3, 5], "majority", 5),
        ([5, 1, 3], "majority", 5),
        ([1, 3, 5], "all", 7),
        ([2], "any", 4),
    ],
)
def test_a_rank_local_criterion_ends_at_the_same_step_on_all(tired_after, vote, epochs):
    # Tired after n: epoch n (counted from 0) is the last improvement, n + 1 shows none.
    results = run_processes(rank_local_criterion, len(tired_after), vote, tired_after)
    assert len(set(results)) == 1
    steps, done, reason = results[0]
    assert (steps, done) == (4 * epochs, epochs)
    assert reason.startswith("early stopping: the monitor has not improved")


def patience_on_a_metric(metric_values):
    class Planted(dtrain.Callback):
        def __init__(self):
            self.values = iter(metric_values)

        def on_eval_end(self, ctx, metrics):
            metrics["eval/planted"] = next(self.values)

    weights = []

    class Watch(dtrain.Callback):
        def on_eval_end(self, ctx, metrics):
            weights.append(tiny.digest(ctx.model))

    stopping = EarlyStopping("eval/planted", patience=2, min_delta=0.1, restore_best=True)
    trainer = tiny.trainer([Planted(), stopping, Watch()])
    data = tiny.dataset()
    result = trainer.fit(data, batch_size=24, epochs=10, eval_set=data)
    return result.epochs, weights.index(tiny.digest(trainer.model)), result.stop_reason


def test_patience_min_delta_and_restore_best():
    # 0.95 and 0.85 are no improvement by more than 0.1 over 1.0 and 0.9; NaN never is one.
    for values, epochs, best in (
        ([1.0, 0.95, 0.5, 0.45, float("nan")], 5, 2),
        ([1.0, 1.1, 0.95, 0.0], 3, 0),
    ):
        results = run_processes(patience_on_a_metric, 2, values)
        assert results[0] == results[1]
        assert results[0][:2] == (epochs, best)
        assert results[0][2] == "early stopping: eval/planted has not improved 2 times"


class SkipOn(dtrain.Callback):
    def __init__(self, ranks, step):
        self.mine = dtrain.init(seed=0).rank in ranks
        self.step = step

    def on_batch(self, ctx, step):
        if self.mine and step.number == self.step:
            ctx.request.skip("bad sample")


def skip(ranks):
    record = tiny.Record()
    trainer = tiny.trainer([SkipOn(ranks, 2), record])
    before = {}

    class Before(dtrain.Callback):
        def on_step_start(self, ctx, step):
            before[step.number] = tiny.digest(ctx.model)

    trainer = tiny.trainer([SkipOn(ranks, 2), record, Before()])
    result = trainer.fit(tiny.dataset(), batch_size=12, max_steps=6)
    return result.steps, record.applied, before[2] == before[3], tiny.digest(trainer.model)


def test_a_skip_leaves_the_others_and_a_skip_by_all_vetoes_the_step():
    one = run_processes(skip, 2, [1])
    assert one[0] == one[1]
    assert one[0][:3] == (6, [True] * 6, False)
    both = run_processes(skip, 2, [0, 1])
    assert both[0] == both[1]
    assert both[0][:3] == (6, [True, True, False, True, True, True], True)


def loss_scale_and_clip(scale):
    """Clipped gradients of the first step, with a loss scale and without any."""
    from dtrain.callbacks import ClipGradients, GradientAccumulation, MixedPrecision

    grads = {}

    class Keep(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            if step.number == 0:
                grads.update({n: p.grad.detach().clone() for n, p in ctx.model.named_parameters()})

    def in_fp32(net, batch):
        x, y = batch
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.cross_entropy(net(x), y)

    precision = [] if scale is None else [MixedPrecision("fp16", init_scale=scale)]
    callbacks = [*precision, ClipGradients(max_norm=0.05), Keep(), GradientAccumulation(steps=2)]
    trainer = tiny.trainer(callbacks, loss=in_fp32)
    trainer.fit(tiny.dataset(), batch_size=32, max_steps=2)
    return grads


def test_clip_sees_unscaled_gradients():
    plain = run_processes(loss_scale_and_clip, 2, None)
    scaled = run_processes(loss_scale_and_clip, 2, 2.0**20)
    norm = torch.cat([g.flatten() for g in plain[0].values()]).norm()
    assert norm.item() == pytest.approx(0.05, rel=1e-4)  # it was clipped at all
    for rank in (0, 1):
        for name, grad in plain[rank].items():
            torch.testing.assert_close(scaled[rank][name], grad, rtol=1e-6, atol=1e-9)


def idle_at_first():
    """In float16 a rank may have no loss to scale before its first update, or for long."""
    from dtrain.callbacks import MixedPrecision

    record = tiny.Record()
    trainer = tiny.trainer([MixedPrecision("fp16"), SkipOn([1], 0), record])
    trainer.fit(tiny.dataset(), batch_size=12, max_steps=3)
    small = tiny.trainer([MixedPrecision("fp16")])
    small.fit(tiny.dataset(5), batch_size=1, max_steps=5)
    return record.applied, tiny.digest(trainer.model), tiny.digest(small.model)


def test_a_rank_without_a_loss_has_a_loss_scale_too():
    found = run_processes(idle_at_first, 2)
    assert found[0] == found[1]
    assert found[0][0] == [True] * 3


def overflow():
    """A loss scale that overflows: the step is left out, schedules do not count it."""
    from torch.optim.lr_scheduler import StepLR

    from dtrain.callbacks import LRSchedule, MixedPrecision

    record = tiny.Record()
    schedule = LRSchedule(lambda opt, steps: StepLR(opt, 1, gamma=0.5))
    trainer = tiny.trainer([MixedPrecision("fp16", init_scale=2.0**40), schedule, record])
    result = trainer.fit(tiny.dataset(), batch_size=32, max_steps=40)
    lr = trainer.optimizer.param_groups[0]["lr"]
    return record.applied, lr, result.metrics["loss_scale"], trainer.context.progress.updates


def test_overflow_leaves_the_step_out_on_all_ranks():
    results = run_processes(overflow, 2)
    assert results[0] == results[1]
    applied, lr, scale, updates = results[0]
    left_out = applied.count(False)
    assert 0 < left_out < 40
    assert applied[:10] == [False] * 10
    assert scale == 2.0 ** (40 - left_out)
    assert updates == 40 - left_out
    assert lr == pytest.approx(1e-2 * 0.5**updates)
