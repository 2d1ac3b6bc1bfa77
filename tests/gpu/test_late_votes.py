"""Steps are not waited for: what is asked, or goes wrong, in one is acted on in the next."""

import pytest
import torch
import training

import dtrain
from dtrain.callbacks import MixedPrecision
from dtrain.data import packing


class Stop(dtrain.Callback):
    """Asks once, in a hook of step 4."""

    def __init__(self, hook):
        self._hook = hook

    def on_batch(self, ctx, step):
        self._ask("on_batch", ctx, step)

    def on_step_end(self, ctx, step):
        self._ask("on_step_end", ctx, step)

    def _ask(self, hook, ctx, step):
        if hook == self._hook and step.number == 4:
            ctx.request.stop("enough")


def trainer(callbacks=(), loss=training.loss_fn, optimizer=training.adamw):
    dtrain.init(seed=0)
    return dtrain.Trainer(
        training.model(), optimizer, loss, callbacks=[MixedPrecision("bf16"), *callbacks], sinks=[]
    )


def fit(run, **options):
    data = training.dataset(20 * training.BATCH)
    return run.fit(data, batch_size=training.BATCH, name="main", **options)


@pytest.mark.parametrize(("hook", "carried_by"), [("on_batch", 5), ("on_step_end", 6)])
def test_a_stop_takes_effect_a_step_later(hook, carried_by):
    """Carried by the step in which it was asked, or by the next; noticed a step after that."""
    run = trainer([Stop(hook)])
    result = fit(run, epochs=2)
    assert result.stop_reason.endswith("enough")
    assert result.steps == carried_by + 1
    progress = run.context.progress
    assert (progress.step, progress.updates) == (result.steps, result.steps)
    assert progress.samples == result.steps * training.BATCH
    other = trainer()
    fit(other, max_steps=result.steps)
    assert torch.equal(training.flat(run.model), training.flat(other.model))


def test_without_a_fused_optimizer_a_step_sooner():
    run = trainer([Stop("on_batch")], optimizer=lambda net: torch.optim.AdamW(net.parameters()))
    assert fit(run, epochs=2).steps == 5


def test_an_error_is_raised_with_nothing_applied():
    planted = [3]

    def loss(net, batch, ctx):
        if ctx.progress.step in planted:
            raise ValueError("planted")
        return training.loss_fn(net, batch)

    run, untouched = trainer(loss=loss), trainer()
    with pytest.raises(ValueError, match="planted"):
        fit(run, epochs=1)
    fit(untouched, max_steps=3)
    assert run.context.progress.step == run.context.progress.updates == 3
    assert torch.equal(training.flat(run.model), training.flat(untouched.model))
    counts = {float(state["step"]) for state in run.optimizer.state.values()}
    assert counts == {3.0}

    planted.clear()  # once it is mended, the step is taken again
    for one in (run, untouched):
        assert fit(one, max_steps=10).steps == 10
    assert torch.equal(training.flat(run.model), training.flat(untouched.model))


def test_a_step_that_is_skipped_changes_nothing():
    class Skip(dtrain.Callback):
        def on_batch(self, ctx, step):
            if step.number == 5:
                ctx.request.skip("planted")

    run = trainer([Skip()])
    fit(run, max_steps=8)
    assert (run.context.progress.step, run.context.progress.updates) == (8, 7)
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {7.0}


def on_another_stream():
    return torch.cuda.current_stream() != torch.cuda.default_stream()


@pytest.mark.parametrize("is_large", [False, True])
def test_batches_are_on_their_way_from_pinned_memory(device, monkeypatch, is_large):
    """Large ones on a stream of their own, for which the one that computes waits."""
    monkeypatch.setattr(packing, "_BESIDE", 0 if is_large else 2**30)
    seen = []
    to = torch.Tensor.to

    def watched(tensor, *args, **options):
        if options.get("non_blocking") and tensor.device.type == "cpu":
            seen.append(tensor.is_pinned() and on_another_stream() == is_large)
        return to(tensor, *args, **options)

    class Look(dtrain.Callback):
        def on_step_start(self, ctx, step):
            monkeypatch.setattr(torch.Tensor, "to", watched)

        def on_batch(self, ctx, step):
            monkeypatch.setattr(torch.Tensor, "to", to)
            assert all(tensor.device.type == device.type for tensor in step.batch)

    fit(trainer([Look()]), max_steps=4)
    # One copy a step. What is there already is not sent: on the CPU, nothing.
    assert seen == [True] * (4 if device.type == "cuda" else 0)
