"""A check's trial: it leaves out what writes files or rounds numbers, and records a few steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dtrain.callback import Callback
from dtrain.callbacks import GradientAccumulation, Mixup
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Step
from dtrain.data import AccumulationSlot, Data
from dtrain.distributed import World, seed_everything
from dtrain.plan import FitResult, Plan
from dtrain.step import PrecisionSlot, adapt
from dtrain.trainer import Trainer
from dtrain.trials import samples as of
from dtrain.trials.call_overrides import CallOverrides
from dtrain.trials.check_record import Record, gradients_name
from dtrain.trials.examine import examine
from dtrain.trials.records import digest_of_tensors, write_tensors
from dtrain.trials.report import plural
from dtrain.trials.runner import Trial

#: What makes numbers depend on the number of ranks, and can be taken out of a script's training.
#: ``--allow`` takes these, and takes them out; experiments do the same.
SWITCHES = {
    "dropout": "dropout is switched off",
    "batchnorm": "BatchNorm runs in eval mode",
    "augmentation": "each sample's random augmentation is seeded by its index",
    "mixup": "Mixup is left out",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """How a script is to be run."""

    ranks: int
    micro_batches: int  # into how many each rank's share is split
    steps: int  # global steps to take
    double: bool = True  # compute everything in float64
    without: tuple[str, ...] = ()  # names from SWITCHES
    #: Every rank gets rank 0's samples and random streams, so that whatever still differs
    #: between ranks depends on the rank.
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
    trial = CheckTrial(Setup(**setup | {"without": tuple(setup["without"])}), folder)
    if trial.setup.double:
        torch.set_default_dtype(torch.float64)
    return trial


class CheckTrial(Trial):
    """Takes a few steps by the user's own plan, and keeps one rank's record in ``folder``.

    Ranks: all, local.
    """

    saves = False

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.folder = folder
        self.record = Record()
        self.overrides = CallOverrides(double=setup.double, without=frozenset(setup.without))
        self.batches: list[tuple[Any, int]] = []

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        """Leaves out what saves, rounds or splits, and adds callbacks that record."""
        model: nn.Module = given["model"]
        if self.setup.double:
            model.double()  # in place: an optimizer that holds the parameters still does
        self.record.given_model = digest_of_tensors(model.state_dict())
        self._loss_fn = adapt(given["loss_fn"])
        seed = given.get("seed")
        self._seed = world.seed if seed is None else seed
        callbacks = [
            _First(self, world.rank),
            *self._kept(given.get("callbacks", ())),
            _Last(self),
        ]
        return given | {
            "callbacks": callbacks,
            "sinks": [],
            "hang_after_s": None,  # a check has a time limit, and says where ranks were
            # Callbacks may want a place for their files; it is not the user's.
            "run_dir": None if given.get("run_dir") is None else self.folder / "run",
        }

    def _kept(self, callbacks: Sequence[Callback]) -> list[Callback]:
        setup = self.setup
        slots = (AccumulationSlot, CheckpointSlot, PrecisionSlot)
        kept = [callback for callback in callbacks if not isinstance(callback, slots)]
        if any(isinstance(callback, Mixup) for callback in kept):
            self.record.seen.append("mixup")
        if "mixup" in setup.without or setup.twins:
            kept = [callback for callback in kept if not isinstance(callback, Mixup)]
        if setup.micro_batches > 1:
            kept.append(GradientAccumulation(steps=setup.micro_batches))
        return kept

    def fit_arguments(self, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        """Gives the data this check's batch size, and samples that do not depend on ranks."""
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
        """Gives twins rank 0's samples."""
        return replace(world, rank=0) if self.setup.twins else world

    def around_fit(self) -> CallOverrides:
        """Around all of it: backward may run the forward again (activation checkpointing)."""
        return self.overrides

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        """Examines if that was asked for, and writes what was recorded."""
        record, model, rank = self.record, trainer.model, trainer.world.rank
        if self.batches:
            without = frozenset({"dropout", "batchnorm"})

            def loss_of(batch: Any) -> Any:
                with CallOverrides(double=self.setup.double, without=without):
                    return self._loss_fn(model, batch, trainer.context)

            record.examined = examine(
                model,
                loss_of,
                self.batches,
                None if self._data.is_stream else self._data,
                keeps_state=bool(record.moving_buffers),
            )
        record.steps = result.steps
        record.seen = sorted({*record.seen, *self.overrides.seen})
        parameters = dict(model.named_parameters())
        record.own_parameters = digest_of_tensors(parameters)
        if rank == 0:
            write_tensors(self.folder, "final", parameters)
        record.write(self.folder, rank)
        self.done = True


class _First(Callback):
    """First in the list: sees batches as they come, and gradients before anybody changes them."""

    name = "check: first"

    def __init__(self, trial: CheckTrial, rank: int) -> None:
        self._trial, self._record, self._writes = trial, trial.record, rank == 0

    def on_fit_start(self, ctx: Context) -> None:
        self._buffers = {name: b.detach().clone() for name, b in _own_buffers(ctx.model)}
        if self._writes:
            write_tensors(self._trial.folder, "initial", dict(ctx.model.named_parameters()))

    def on_step_start(self, ctx: Context, step: Step) -> None:
        self._record.samples.append([])
        # Asked here, this step's reduction carries it.
        if step.number + 1 >= self._trial.setup.steps:
            ctx.request.stop("the check has seen enough")

    def on_batch(self, ctx: Context, step: Step) -> None:
        self._record.samples[-1] += of.digests(step.batch, step.samples)
        if self._trial.setup.twins:
            # Equal on all ranks, unless the data depend on the rank; then the loss function is
            # to be judged apart from that.
            batch = step.batch
            step.batch = ctx.comm.on_main("a batch for all ranks", lambda: of.copy(batch))
        if self._trial.setup.double:
            step.batch = of.widen(step.batch)

    def on_loss(self, ctx: Context, step: Step) -> None:
        assert step.loss is not None
        assert step.loss.weight is not None
        self._record.own_losses.append(float(step.loss.mean.detach()))
        self._record.own_weights.append(float(step.loss.weight))
        self._record.dtype = str(step.loss.mean.dtype).removeprefix("torch.")

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        self._record.losses.append(step.loss_mean)
        self._record.settings.append([_numbers(group) for group in ctx.optimizer.param_groups])
        if self._writes:
            grads = {  # none counts as zero: what an optimizer makes of either, parameters tell
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in ctx.model.named_parameters()
                if p.requires_grad
            }
            write_tensors(self._trial.folder, gradients_name(step.number), grads)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._record.moving_buffers = [
            name
            for name, buffer in _own_buffers(ctx.model)
            if name in self._buffers and not torch.equal(buffer, self._buffers[name])
        ]


class _Last(Callback):
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


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers among an optimizer's settings of one group."""
    kept: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, bool | int | float):
            kept[name] = value
        elif isinstance(value, tuple) and all(isinstance(v, int | float) for v in value):
            kept[name] = list(value)
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            kept[name] = float(value)
    return kept
