"""What does not fit into memory is told with its step, its batch, and what would help."""

import pytest
import tiny
import torch

import dtrain
from dtrain.callbacks import GradientAccumulation, MixedPrecision
from dtrain.step import memory_words
from dtrain.testing import run_ranks

TOLD = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
ALL = {
    "GradientAccumulation": GradientAccumulation(2),
    "MixedPrecision": MixedPrecision("bf16"),
    "checkpoint": None,
}


def raise_it(*args):
    raise torch.OutOfMemoryError(TOLD)


class Fails(dtrain.Callback):
    def __init__(self, where, at=3, micro=0):
        self.where, self.at, self.micro = where, at, micro

    def check(self, where, step):
        if where == self.where and step.number == self.at and step.micro == self.micro:
            raise_it()

    def on_batch(self, ctx, step):
        self.check("on_batch", step)

    def on_step_start(self, ctx, step):
        self.check("on_step_start", step)

    def on_grads_ready(self, ctx, step):
        if self.where == "on_grads_ready":
            raise_it()


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise_it()


def loss_that(where, at=3):
    def loss_fn(net, batch, ctx):
        if where == "evaluation" and not net.training:
            raise_it()
        if where == "loss_fn" and ctx.progress.step == at:
            raise_it()
        x, y = batch
        logits = net(x)
        if where == "backward" and ctx.progress.step == at:
            logits = InBackward.apply(logits)
        return torch.nn.functional.cross_entropy(logits, y)

    return loss_fn


def note_of(trainer, **options):
    options = {"batch_size": 8, "epochs": 1} | options
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.fit(tiny.dataset(64), **options)
    assert str(raised.value) == TOLD
    (note,) = [one for one in raised.value.__notes__ if one.startswith("(out of memory in ")]
    return note


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("where", ["loss_fn", "backward"])
def test_the_note_says_where_and_what(where, strategy):
    note = note_of(tiny.trainer(loss=loss_that(where), strategy=strategy))
    assert note.startswith(
        f"(out of memory in {where} at step 3, micro-batch 1 of 1, of 8 samples (float32 [8, 8], "
        "int64 [8]). What helps: GradientAccumulation(steps=2), the same training in micro-batches "
    )
    assert '; MixedPrecision("bf16"); activation checkpointing: callbacks.Check' in note
    assert "GiB" not in note  # of the CPU's memory nothing is known


@pytest.mark.parametrize("where", ["on_batch", "on_step_start"])
def test_hooks_are_named(where):
    note = note_of(tiny.trainer([Fails(where)]))
    assert note.startswith(f"(out of memory in {where} at step 3")
    assert ("of 8 samples" in note) == (where == "on_batch")


def test_the_micro_batch_that_failed_is_the_one():
    note = note_of(tiny.trainer([GradientAccumulation(3), Fails("on_batch", micro=1)]))
    assert ", micro-batch 2 of 3, of 3 samples (float32 [3, 8], int64 [3])" in note
    assert "GradientAccumulation" not in note
    assert "MixedPrecision" in note


def test_what_is_in_use_is_not_advised():
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gradient_checkpointing = tiny.model(), True

        def forward(self, x):
            return self.inner(x)

    callbacks = [GradientAccumulation(2), MixedPrecision("bf16")]
    note = note_of(tiny.trainer(callbacks, net=Blocks(), loss=loss_that("loss_fn")))
    assert note.endswith(". What helps: smaller batches)")


def test_torchs_checkpointing_is_seen_in_the_trace():
    def loss_fn(net, batch):
        return torch.utils.checkpoint.checkpoint(raise_it, batch[0], use_reentrant=False)

    assert "activation checkpointing" not in note_of(tiny.trainer(loss=loss_fn))


def test_one_sample_cannot_be_split():
    note = note_of(tiny.trainer(loss=loss_that("loss_fn")), batch_size=1)
    assert "of 1 samples" in note
    assert "GradientAccumulation" not in note


def test_nor_helps_autocast_where_weights_are_in_16_bits():
    def loss_fn(net, batch):
        raise_it()

    net = tiny.model(dtype=torch.bfloat16)
    assert "MixedPrecision" not in note_of(tiny.trainer(net=net, loss=loss_fn))


def test_the_update_is_another_matter():
    class Large(torch.optim.SGD):
        def step(self, closure=None):
            raise_it()

    note = note_of(tiny.trainer(optimizer=lambda net: Large(net.parameters(), lr=0.1)))
    assert note.startswith("(out of memory in update at step 0, micro-batch 1 of 1, of 8 samples")
    assert "fewer parameters that are trained (Freeze)" in note
    assert "GradientAccumulation" not in note


def test_so_is_an_evaluation():
    trainer = tiny.trainer(loss=loss_that("evaluation"))
    note = note_of(trainer, eval_set=tiny.dataset(12))
    assert note.startswith(
        "(out of memory in evaluation (eval) at step 8, batch 0, micro-batch 1 of 1, of 8 samples"
    )
    assert "GradientAccumulation" in note
    assert "activation checkpointing" not in note
    with pytest.raises(torch.OutOfMemoryError) as raised:
        tiny.trainer(loss=loss_that("evaluation")).evaluate(tiny.dataset(12), batch_size=4)
    assert "of 4 samples" in str(raised.value.__notes__)


def test_many_tensors_are_cut_short():
    def loss_fn(net, batch):
        raise_it()

    rows = [{f"column {n}": torch.zeros(n) for n in range(12)} for _ in range(8)]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        tiny.trainer(loss=loss_fn).fit(rows, batch_size=4, epochs=1)
    (note,) = raised.value.__notes__[:1]
    assert "(float32 [4, 0], float32 [4, 1], " in note
    assert "float32 [4, 7], ...)" in note


def test_on_a_card_what_is_taken_there(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 75.5 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.25 * gib, 79 * gib))
    assert memory_words._figures(torch.device("cuda", 1)) == (
        "; this process has 70 GiB allocated on cuda:1 and had at most 75.5, and 1.25 of 79 GiB "
        "are free there"
    )


def test_so_it_is_of_any_library():
    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "[enforce fail] DefaultCPUAllocator"):
        error = RuntimeError(words)
        trainer = tiny.trainer()
        memory_words.explain_memory(error, "loss_fn", None, trainer._engine)
        memory_words.explain_memory(error, "loss_fn", None, trainer._engine)
        (note,) = error.__notes__
        assert note.startswith("(out of memory in loss_fn at step 0. What helps: ")
    other = RuntimeError("another")
    memory_words.explain_memory(other, "loss_fn", None, trainer._engine)
    assert not hasattr(other, "__notes__")


def several(where):
    world = dtrain.init(seed=0)
    mine = where if world.rank == 1 else "nowhere"
    told, trainer = [], tiny.trainer(loss=loss_that(mine))
    try:
        trainer.fit(tiny.dataset(64), batch_size=8, epochs=1)
    except (torch.OutOfMemoryError, dtrain.RemoteError) as error:
        told = [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    other = tiny.trainer().fit(tiny.dataset(64), batch_size=8, epochs=1)
    return told, trainer.context.progress.step, other.steps


@pytest.mark.parametrize("where", ["loss_fn", "backward"])
def test_all_ranks_agree_and_hear_what_helps(where):
    found = run_ranks(several, 3, where)
    for rank, (told, step, other) in enumerate(found):
        assert (step, other) == (3, 8)
        assert told[0] == ("OutOfMemoryError" if rank == 1 else "RemoteError")
        assert f"(out of memory in {where} at step 3, micro-batch 1 of 1, of 3" in " ".join(told)
        assert "GradientAccumulation(steps=2)" in " ".join(told)


def held(trainer):
    return trainer._engine.micro_step.under_way


def test_between_steps_no_batch_is_kept():
    seen = []

    class Look(dtrain.Callback):
        def on_eval_start(self, ctx):
            seen.append(held(trainer))

    trainer = tiny.trainer([Look()])
    trainer.fit(tiny.dataset(16), batch_size=8, epochs=1, eval_set=tiny.dataset(8))
    assert [*seen, held(trainer)] == [None, None]
