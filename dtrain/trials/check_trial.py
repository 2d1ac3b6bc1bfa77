"""A check's trial: it leaves out what writes files or rounds numbers, and records a few steps."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dtrain.callback import Callback
from dtrain.callbacks import GradientAccumulation, Mixup
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Loss, Step
from dtrain.data import AccumulationSlot, Data, fetch
from dtrain.distributed import World, seed_everything, tensors_of_state, whole
from dtrain.errors import LossError
from dtrain.plan import FitResult, Plan, Recorder
from dtrain.step import LossFn, PrecisionSlot, UserLoss, adapt
from dtrain.trainer import Trainer
from dtrain.trials import records as of
from dtrain.trials.call_overrides import CallOverrides
from dtrain.trials.check_compare import Record, gradients_name
from dtrain.trials.examine import examine
from dtrain.trials.report import plural
from dtrain.trials.runner import Trial


@dataclass(frozen=True, slots=True)
class Setup:
    """How a script is to be run."""

    ranks: int
    micro_batches: int  # into how many each rank's share is split
    steps: int  # global steps to take
    double: bool = True  # compute everything in float64
    without: tuple[str, ...] = ()  # names from SWITCHES
    #: All ranks get rank 0's samples and random streams: what still differs depends on the rank.
    twins: bool = False
    examine: bool = False  # look at the loss function and the data after the last step
    batch_size: int | None = None  # to be used in place of the script's own

    @property
    def title(self) -> str:
        """For people: ``2 ranks x 1 micro-batch``."""
        micros = f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}"
        return f"{plural(self.ranks, 'rank')} x {micros}"


def make_trial(setup: dict[str, Any], folder: Path) -> "CheckTrial":
    """Returns the trial of one rank; ``setup`` is a :class:`Setup`, from JSON."""
    return CheckTrial(Setup(**setup | {"without": tuple(setup["without"])}), folder)


class CheckTrial(Trial):
    """Takes a few steps by the user's own plan, and keeps one rank's record in ``folder``.

    As the first callback, it sees batches as they come, and gradients before anybody changes them.
    """

    saves = False

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.record = Record()
        self.overrides = CallOverrides(double=setup.double, without=frozenset(setup.without))
        self.batches: list[tuple[Any, int]] = []
        self.rows: list[list[int]] = []  # of each step, if they are to be looked at

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        setup, model = self.setup, given["model"]
        if setup.double:
            model.double()  # in place: an optimizer that holds the parameters still does
        self.record.given_model = of.digest_of_tensors(tensors_of_state(model))
        self._rank = world.rank
        self._loss_fn = adapt(given["loss_fn"])
        if setup.double:  # also where no hook sees a batch: in evaluations, and in what is tried
            given |= {n: _widening(f) for n in ("loss_fn", "eval_fn") if (f := given.get(n))}
        seed = given.get("seed")
        self._seed = world.seed if seed is None else seed
        slots = (AccumulationSlot, CheckpointSlot, PrecisionSlot)
        callbacks = [one for one in given.get("callbacks", ()) if not isinstance(one, slots)]
        if any(isinstance(one, Mixup) for one in callbacks):
            self.record.seen.append("mixup")
        if "mixup" in setup.without or setup.twins:
            callbacks = [one for one in callbacks if not isinstance(one, Mixup)]
        if setup.micro_batches > 1:
            callbacks.append(GradientAccumulation(steps=setup.micro_batches))
        return given | {
            "callbacks": [*callbacks, _Last(self)],
            "sinks": [],
            "hang_after_s": None,  # a check has a time limit, and says where ranks were
            "check_ranks": False,  # it compares them itself, and tells more
            # Callbacks may want a place for their files; it is not the user's.
            "run_dir": None if given.get("run_dir") is None else self.folder / "run",
        }

    def fit_arguments(self, trainer: Trainer, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        self.record.batch_size = data.batch_size
        if self.setup.batch_size is not None:
            data.batch_size = self.setup.batch_size
        wrap = "augmentation" in self.setup.without and not data.is_stream
        if wrap and not isinstance(data.dataset, TensorDataset):
            data.dataset = of.SeededByIndex(data.dataset, self._seed)
        self._data = data
        return given | {"resume": "never"}

    def plan(self, plan: Plan) -> Plan:
        """Never evaluates. How long to train stays as it is, because schedules go by it."""
        return replace(plan, eval_every=None)

    def samples_of(self, world: World) -> World:
        return replace(world, rank=0) if self.setup.twins else world

    def around_fit(self) -> CallOverrides:
        """Around all of it: backward may run the forward again (activation checkpointing)."""
        return self.overrides

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        record, model = self.record, trainer.model
        if self.batches:
            without = frozenset({"dropout", "batchnorm"})

            def loss_of(batch: Any) -> Any:
                with CallOverrides(double=self.setup.double, without=without):
                    return _whole(self._loss_fn(model, batch, trainer.context))

            data = None if self._data.is_stream else self._data

            def fetched(rows: list[int]) -> Any:
                assert data is not None
                batch = fetch(data.dataset, rows, data.collate_fn)
                return of.placed(batch, trainer.context.device, double=self.setup.double)

            def at(step: int) -> None:  # some losses ask for it
                trainer.context.progress.step = step

            examine(model, loss_of, self.batches, data, record, fetched, self.rows, at)
            at(result.steps)
        record.steps = result.steps
        record.seen = sorted({*record.seen, *self.overrides.seen})
        parameters = {name: whole(p) for name, p in model.named_parameters()}
        record.own_parameters = of.digest_of_tensors(parameters)
        self._write("final", parameters)
        record.write(self.folder, self._rank)
        self.done = True

    def on_fit_start(self, ctx: Context) -> None:
        self._buffers = {name: b.detach().clone() for name, b in _own_buffers(ctx.model)}
        self._write("initial", dict(ctx.model.named_parameters()))

    def on_step_start(self, ctx: Context, step: Step) -> None:
        self.record.samples.append([])
        if self.setup.examine:
            rows = self.feed.rows(ctx.progress.epoch, ctx.progress.step_in_epoch)
            self.rows += [] if rows is None else [rows]
        # Asked here, this step's reduction carries it.
        if step.number + 1 >= self.setup.steps:
            ctx.request.stop("the check has seen enough")

    def on_batch(self, ctx: Context, step: Step) -> None:
        self.record.samples[-1] += of.digests(step.batch, step.samples)
        if self.setup.twins:
            # Equal on all ranks, unless the data depend on the rank; then the loss function is
            # to be judged apart from that.
            batch = step.batch
            step.batch = ctx.comm.on_main("a batch for all ranks", lambda: of.copy(batch))
        if self.setup.double:
            step.batch = of.widen(step.batch)

    def on_loss(self, ctx: Context, step: Step) -> None:
        assert step.loss is not None
        assert step.loss.weight is not None
        self.record.own_losses.append(float(step.loss.mean.detach()))
        self.record.own_weights.append(float(step.loss.weight))
        self.record.dtype = str(step.loss.mean.dtype).removeprefix("torch.")

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        self.record.losses.append(step.loss_mean)
        if not step.done[1:]:
            self._grads: dict[str, torch.Tensor] = {}
        named = [(name, p) for name, p in ctx.model.named_parameters() if p.requires_grad]
        given = {name: p.grad for name, p in named if p.grad is not None}
        # Those of an earlier update may be clipped before they are written.
        self._grads |= given if step.ends else {name: g.clone() for name, g in given.items()}
        if step.ends:
            groups = ctx.optimizer.param_groups
            self.record.settings.append([_numbers(group) for group in groups])
            # None counts as zero: what an optimizer makes of either, parameters tell.
            grads = {name: self._grads.get(name, torch.zeros_like(p)) for name, p in named}
            self._write(gradients_name(step.number), grads)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self.record.moving_buffers = [
            name
            for name, buffer in _own_buffers(ctx.model)
            if name in self._buffers and not torch.equal(buffer, self._buffers[name])
        ]

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        every = {key: whole(tensor) for key, tensor in tensors.items()}  # all ranks are here
        if self._rank == 0:
            of.write_tensors(self.folder, name, every)


def _widening(fn: UserLoss) -> LossFn:
    adapted = adapt(fn)
    return lambda model, batch, ctx: adapted(model, of.widen(batch), ctx)


class _Last(Recorder, Callback):
    """Last in the list: sees what the loss function is about to get."""

    name = "check: last"

    def __init__(self, trial: CheckTrial) -> None:
        self._trial = trial

    def on_step_start(self, ctx: Context, step: Step) -> None:
        if self._trial.setup.twins:  # the same random streams
            seed_everything(step.number)
            ctx.rng.manual_seed(step.number)

    def on_batch(self, ctx: Context, step: Step) -> None:
        if self._trial.setup.examine:
            self._trial.batches.append((of.copy(step.batch), step.samples))


def _own_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the model's buffers, without BatchNorm's."""
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            yield from module.named_buffers(prefix, recurse=False)


def _whole(returned: Any) -> Any:
    """Returns one loss of what a loss function has yielded for several updates: their sum."""
    if not isinstance(returned, Generator):
        return returned
    each = [loss if isinstance(loss, Loss) else Loss(loss) for _, loss in returned]
    weights = [one.weight for one in each]
    if len({None if weight is None else float(weight) for weight in weights}) > 1:
        raise LossError("its updates have different weights")
    total = sum((one.mean for one in each[1:]), each[0].mean)
    return Loss(total, weights[0])


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers among an optimizer's settings of one group, also tuples of some."""
    kept: dict[str, Any] = {}
    for name, value in group.items():
        several = value if isinstance(value, tuple) else (value,)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            kept[name] = float(value)
        elif all(isinstance(one, int | float) for one in several):
            kept[name] = value
    return kept
