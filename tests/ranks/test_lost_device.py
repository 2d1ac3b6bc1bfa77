"""A kernel has failed on a rank's GPU: nothing there is touched any more, and all ranks are told.

No GPU is here: errors are torch's own, with its own words, and after one of them each call of CUDA,
and each operation on what a card would hold, is noted.
"""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from ahead import run_ahead
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dtrain
import dtrain.trainer
from dtrain import accelerator
from dtrain.accelerator import faults
from dtrain.callbacks import EMA, Checkpoint, ClipGradients, MixedPrecision, NonFiniteGuard, Profile
from dtrain.step.figures import Figures
from dtrain.step.strategy import StepResult
from dtrain.testing import run_outcomes

ASSERT = (
    "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in https://docs.nvidia"
    ".com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel "
    "errors might be asynchronously reported at some other API call, so the stacktrace below might "
    "be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with "
    "`TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
AT = 5  # the step in which it fails; there is a checkpoint of step 4
IN_A_STEP = ["data", "on_batch", "loss_fn", "backward", "on_grads_ready", "update", "on_step_end"]
BETWEEN = ["verdict", "on_epoch_end", "evaluation", "on_eval_end", "on_save", "figures"]


class Card(TorchDispatchMode):
    """Notes what is done with tensors on it, and what is asked of CUDA, once it is lost."""

    def __init__(self, held):
        super().__init__()
        self.held, self.touched, self.is_lost = held, [], False

    def lose(self):
        self.is_lost = True
        self.places = {t.untyped_storage().data_ptr() for t in tree_leaves(self.held()) if is_(t)}
        raise torch.AcceleratorError(ASSERT)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mine = [t for t in tree_leaves((args, kwargs)) if is_(t)]
        if self.is_lost and any(t.untyped_storage().data_ptr() in self.places for t in mine):
            self.touched.append(str(func))
        return func(*args, **(kwargs or {}))

    def pretend(self, patch):
        """CUDA is there, as far as torch says."""

        def stand_in(name, answer):
            def asked(*args, **kwargs):
                if self.is_lost:
                    self.touched.append(f"torch.cuda.{name}")
                    raise torch.AcceleratorError(ASSERT)
                return answer

            patch.setattr(torch.cuda, name, asked)

        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        stand_in("get_rng_state", torch.zeros(16, dtype=torch.uint8))
        for name in ("set_rng_state", "synchronize", "current_stream", "Event", "Stream"):
            stand_in(name, None)
        for name in ("memory_allocated", "empty_cache", "mem_get_info"):
            stand_in(name, None)


def is_(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fail()
        return grad, None


class Fails(dtrain.Callback):
    def __init__(self, where, mine):
        self.where, self.mine, self.card, self.step = where, mine, None, -1

    def check(self, where):
        if self.mine and where == self.where and self.step >= AT and not self.card.is_lost:
            self.card.lose()

    def on_step_start(self, ctx, step):
        self.step = step.number

    def on_batch(self, ctx, step):
        self.check("on_batch")

    def on_grads_ready(self, ctx, step):
        self.check("on_grads_ready")

    def on_step_end(self, ctx, step):
        self.check("on_step_end")

    def on_epoch_end(self, ctx):
        self.check("on_epoch_end")

    def on_eval_end(self, ctx, metrics):
        self.check("on_eval_end")

    def on_save(self, ctx):
        self.check("on_save")


class Rows:
    def __init__(self, fails):
        self.fails, self.data = fails, tiny.dataset(64)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        self.fails.check("data")
        return self.data[row]


def one(folder, where, failing, strategy, delays):
    with pytest.MonkeyPatch.context() as patch:
        return fit(patch, folder, where, failing, strategy, delays)


def fit(patch, folder, where, failing, strategy, delays):
    run_ahead(delays, patch)
    world = dtrain.init(seed=0)
    fails = Fails(where, world.rank == failing)
    net = tiny.model()

    def loss_fn(net, batch):
        fails.check("loss_fn" if net.training else "evaluation")
        x, y = batch
        logits = net(x)
        if net.training:
            logits = FailsInBackward.apply(logits, lambda: fails.check("backward"))
        return torch.nn.functional.cross_entropy(logits, y)

    class AdamW(torch.optim.AdamW):
        def step(self, closure=None):
            fails.check("update")
            return super().step(closure)

    # Once it is lost, whatever would be read of the device raises; here, what is read next.
    verdict, agree = StepResult.verdict, Figures.agree
    patch.setattr(StepResult, "verdict", lambda self: (fails.check("verdict"), verdict(self))[1])
    patch.setattr(
        Figures, "agree", lambda self, *args: (fails.check("figures"), agree(self, *args))[1]
    )
    patch.setattr(faults, "_kept", [])
    ema = EMA(0.9)
    trainer = dtrain.Trainer(
        net,
        AdamW(net.parameters(), lr=1e-2, fused=True),
        loss_fn,
        callbacks=[
            fails,
            MixedPrecision("bf16"),
            ClipGradients(1.0),
            NonFiniteGuard(),
            # One that is not ended spoils the next of the process.
            *([Profile((3, 40), ranks=[failing])] if world.size > 1 else []),
            ema,
            Checkpoint(every_steps=2),
        ],
        sinks=[],
        strategy=strategy,
        run_dir=folder,
    )
    grads = lambda: [p.grad for p in net.parameters()]  # noqa: E731
    fails.card = card = Card(
        lambda: [*net.parameters(), grads(), trainer.optimizer.state_dict(), ema.state_dict()]
    )
    card.pretend(patch)
    caught = None
    try:
        with card:
            trainer.fit(Rows(fails), batch_size=8, epochs=2, eval_set=tiny.dataset(16), log_every=3)
    except (RuntimeError, dtrain.errors.DtrainError) as error:
        caught = error
    notes = getattr(caught, "__notes__", [])
    return type(caught).__name__, str(caught), notes, card.touched, faults._kept == [caught]


def check(found, folder, failing):
    for rank, (kind, words, notes, touched, kept) in enumerate(found):
        if rank != failing:
            assert kind == "RemoteError", words
            assert words.startswith(f"rank {failing} on ")
            assert "AcceleratorError: CUDA error: device-side assert triggered" in words
            assert not kept
            continue
        assert kind == "AcceleratorError"
        assert words.startswith(ASSERT)
        assert touched == []
        assert kept
        (hint,) = [note for note in notes if "CUDA_LAUNCH_BLOCKING=1" in note]
        assert "nothing was saved from there" in hint
        newest = max(folder.glob("checkpoints/step-*"))
        assert f"(the newest checkpoint is {newest})" in notes
        assert not any("could not be saved" in note for note in notes)
    assert not (folder / "emergency").exists()
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert "device-side assert" in status["reason"]


def alone(folder):
    cases = [(where, delays) for where in IN_A_STEP + BETWEEN for delays in (False, True)]
    return {case: one(folder / f"{case}", case[0], 0, "flat", case[1]) for case in cases}


def test_alone(tmp_path):
    (outcome,) = run_outcomes(alone, 1, tmp_path)
    assert outcome.error is None, outcome
    assert len(outcome.value) == 26
    for case, found in outcome.value.items():
        check([found], tmp_path / f"{case}", 0)


# Where the others are when one fails: in a reduction, in a bucket of backward, or in a verb.
SHARED = [("loss_fn", "flat"), ("backward", "ddp"), ("verdict", "flat"), ("evaluation", "ddp")]
SHARED += [("update", "ddp"), ("backward", "flat"), ("figures", "ddp"), ("on_step_end", "flat")]


@pytest.mark.parametrize(
    ("failing", "case"),
    [
        (1, SHARED[0]),
        *(pytest.param(at % 2, case, marks=pytest.mark.slow) for at, case in enumerate(SHARED[1:])),
    ],
)
def test_the_others_learn_of_it(tmp_path, failing, case):
    outcomes = run_outcomes(one, 2, tmp_path, case[0], failing, case[1], True, timeout_s=30)
    assert [outcome.error for outcome in outcomes] == [None, None], outcomes
    check([outcome.value for outcome in outcomes], tmp_path, failing)


SCRIPT = """
import atexit, multiprocessing, os, sys
import torch, dtrain
from torch.utils.data import TensorDataset

class Pinned:
    '''What is freed on such a device aborts the process.'''
    def __del__(self):
        os.abort()

def loss_fn(model, batch):
    buffer = Pinned()
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

held = Pinned()
atexit.register(print, "an exit handler was called")
forks = multiprocessing.get_context("fork")
child = forks.Process(target=forks.Event().wait, daemon=True)
child.start()
net = torch.nn.Linear(2, 2)
trainer = dtrain.Trainer(net, torch.optim.SGD(net.parameters()), loss_fn, sinks=[])
call = lambda: trainer.fit(TensorDataset(torch.ones(8, 2)), batch_size=4, epochs=1)
"""
ENDS = {
    "uncaught": "call()",
    "caught and dropped": "try: call()\nexcept RuntimeError: print('goes on')",
    "another made of it": (
        "try: call()\nexcept RuntimeError as error: cause = error\nraise ValueError() from cause"
    ),
    "left": "try: call()\nexcept RuntimeError: sys.exit(0)",
}


@pytest.mark.parametrize(
    "ends", [pytest.param(one, marks=[pytest.mark.slow] * (one != "uncaught")) for one in ENDS]
)
def test_the_process_ends_with_1_and_is_not_aborted(ends):
    code = SCRIPT + ENDS[ends]
    # Its child holds the pipe, so that one that was left would be waited for.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    assert "an exit handler was called" in done.stdout
    assert ("goes on" in done.stdout) == (ends == "caught and dropped")
    if ends in ("uncaught", "another made of it"):
        assert "an illegal memory access was encountered" in done.stderr
        assert "CUDA_LAUNCH_BLOCKING=1 has the error raised where it is" in done.stderr


LOST = ["device-side assert triggered", "an illegal memory access was encountered"]
LOST += [
    "unspecified launch failure",
    "misaligned address",
    "an illegal instruction was encountered",
]
LOST += ["the launch timed out and was terminated", "uncorrectable ECC error encountered"]
LOST += ["operation not supported on global/shared address space", "hardware stack error"]
WELL = ["invalid device function", "no kernel image is available for execution on the device"]
WELL += ["out of memory", "invalid configuration argument", "invalid device ordinal"]


def test_which_errors_say_that_the_device_is_lost():
    for words in LOST:
        assert accelerator.is_lost(torch.AcceleratorError(f"CUDA error: {words}"))
        assert accelerator.is_lost(RuntimeError(f"HIP error: {words}"))
        assert not accelerator.is_lost(ValueError(words))
    for words in WELL:
        assert not accelerator.is_lost(torch.AcceleratorError(f"CUDA error: {words}"))
    assert not accelerator.is_lost(None)
    # A loader's worker has a device of its own; and another rank's is not this one's.
    in_worker = f"Caught AcceleratorError in DataLoader worker process 0.\nCUDA error: {LOST[0]}"
    assert not accelerator.is_lost(RuntimeError(in_worker))
    assert not accelerator.is_lost(dtrain.RemoteError(f"rank 1 on a failed: CUDA error: {LOST[0]}"))


def test_what_a_script_makes_of_such_an_error_counts_as_well():
    made = ValueError("a bad label?")
    made.__context__ = torch.AcceleratorError(ASSERT)
    assert accelerator.is_lost(made)
    made.__context__.__context__ = made  # a ring
    assert accelerator.is_lost(made)
    ring = ValueError("1")
    ring.__context__ = ValueError("2")
    ring.__context__.__context__ = ring
    assert not accelerator.is_lost(ring)


@pytest.mark.parametrize("is_well", [True, False])
def test_a_librarys_words_leave_it_to_the_device(monkeypatch, is_well):
    class Stream:
        def query(self):
            if not is_well:
                raise torch.AcceleratorError(ASSERT)

    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")
    assert not accelerator.is_lost(error)  # CUDA was never used here
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert accelerator.is_lost(error) == (not is_well)
