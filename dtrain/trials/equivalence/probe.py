"""Runs a user's script on one rank, with a Trainer that keeps records and stops early.

The script is not changed. It gets a Trainer that leaves out what would write files or round
numbers, takes a few steps, records them, and ends the script after its first ``fit``.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callback import Callback
from dtrain.callbacks import GradientAccumulation, Mixup
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Step
from dtrain.data import AccumulationSlot, Data, Feed, as_data
from dtrain.distributed import current, seed_everything
from dtrain.loop import Loop
from dtrain.plan import Plan
from dtrain.sinks import Dispatcher
from dtrain.step import PrecisionSlot, adapt
from dtrain.trainer import FitResult, Trainer
from dtrain.trials.equivalence import samples as of
from dtrain.trials.equivalence.examine import examine
from dtrain.trials.equivalence.hosting import Enough, host
from dtrain.trials.equivalence.lens import Lens
from dtrain.trials.equivalence.record import Examined, Record, gradients_name, write_tensors
from dtrain.trials.equivalence.setup import Setup


class Probe:
    """Keeps one rank's record of one run.

    Args:
        setup: how to run.
        folder: where to write.

    Ranks: all, local.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.folder = folder
        self.record = Record()
        self.lens = Lens(double=setup.double, without=frozenset(setup.without))
        self.batches: list[tuple[Any, int]] = []
        self.done = False

    def finish(self, ctx: Context, rank: int) -> None:
        """Writes what was recorded."""
        self.record.steps = ctx.progress.step
        self.record.seen = sorted({*self.record.seen, *self.lens.seen})
        parameters = dict(ctx.model.named_parameters())
        self.record.own_parameters = _digest(parameters)
        if rank == 0:
            write_tensors(self.folder, "final", parameters)
        self.record.write(self.folder, rank)
        self.done = True


class Opening(Callback):
    """First in the list: sees batches as they come, and gradients before anybody changes them."""

    name = "check: opening"

    def __init__(self, probe: Probe, rank: int) -> None:
        self._probe = probe
        self._rank = rank
        self._buffers: dict[str, torch.Tensor] = {}
        self.streams: list[torch.Tensor] = []

    def on_fit_start(self, ctx: Context) -> None:
        """Keeps the parameters and buffers that the run begins with."""
        self._buffers = {name: b.detach().clone() for name, b in _own_buffers(ctx.model)}
        if self._rank == 0:
            write_tensors(self._probe.folder, "initial", dict(ctx.model.named_parameters()))

    def on_step_start(self, ctx: Context, step: Step) -> None:
        """Ends the run in time. Asked here, this step's reduction carries it."""
        self._probe.record.samples.append([])
        if step.number + 1 >= self._probe.setup.steps:
            ctx.request.stop("the check has seen enough")

    def on_batch(self, ctx: Context, step: Step) -> None:
        """Notes which samples came, and widens them."""
        record, setup = self._probe.record, self._probe.setup
        record.samples[-1] += of.digests(step.batch, step.samples)
        shapes = of.shapes(step.batch)
        if shapes not in record.sample_shapes:
            record.sample_shapes.append(shapes)
        if setup.twins:
            # Equal on all ranks, unless the data depend on the rank; then the loss function is
            # to be judged apart from that.
            batch = step.batch
            step.batch = ctx.comm.on_main("a batch for all ranks", lambda: of.copy(batch))
        if setup.double:
            step.batch = of.widen(step.batch)
        self.streams = _streams(ctx)

    def on_loss(self, ctx: Context, step: Step) -> None:
        """Notes the loss as the loss function returned it."""
        assert step.loss is not None
        assert step.loss.weight is not None
        record = self._probe.record
        record.own_losses.append(float(step.loss.mean.detach()))
        record.own_weights.append(float(step.loss.weight))
        record.dtype = str(step.loss.mean.dtype).removeprefix("torch.")

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        """Keeps the gradient of the global batch, and the optimizer's numbers."""
        record = self._probe.record
        record.losses.append(step.loss_mean)
        record.settings.append([_numbers(group) for group in ctx.optimizer.param_groups])
        if self._rank == 0:
            # A gradient that is not there is none; what an optimizer makes of either, parameters
            # will tell.
            grads = {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in ctx.model.named_parameters()
                if p.requires_grad
            }
            write_tensors(self._probe.folder, gradients_name(step.number), grads)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Notes which buffers are no longer what they were."""
        self._probe.record.moving_buffers = [
            name
            for name, buffer in _own_buffers(ctx.model)
            if name in self._buffers and not torch.equal(buffer, self._buffers[name])
        ]


class Closing(Callback):
    """Last in the list: sees what the loss function is about to get."""

    name = "check: closing"

    def __init__(self, probe: Probe, opening: Opening) -> None:
        self._probe = probe
        self._opening = opening

    def on_step_start(self, ctx: Context, step: Step) -> None:
        """Gives twins the same random streams."""
        if self._probe.setup.twins:
            seed_everything(step.number)
            ctx.rng.manual_seed(step.number)

    def on_batch(self, ctx: Context, step: Step) -> None:
        """Keeps the batch, to look at the loss function with it."""
        now, before = _streams(ctx), self._opening.streams
        if any(not torch.equal(a, b) for a, b in zip(now, before, strict=True)):
            self._probe.record.callbacks_draw = True
        if self._probe.setup.examine:
            self._probe.batches.append((of.copy(step.batch), step.samples))


def probing(probe: Probe) -> type[Trainer]:
    """Returns a Trainer that does as ``probe`` wants."""
    setup, record = probe.setup, probe.record

    class ProbingTrainer(Trainer):
        """A Trainer that records a few steps and ends the script."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(Trainer).bind(*args, **kwargs).arguments
            seed, run_dir = given.get("seed"), given.get("run_dir")
            world = current() or dtrain.init(seed=seed or 0)
            model: nn.Module = given["model"]
            if setup.double:
                model.double()  # in place: an optimizer that holds the parameters still does
            record.given_model = _digest(model.state_dict())
            self._user_loss = adapt(given["loss_fn"])
            opening = Opening(probe, world.rank)
            kept = _kept(given.get("callbacks", ()), setup, record)
            given |= {
                "callbacks": [opening, *kept, Closing(probe, opening)],
                "sinks": [],
                "hang_after_s": None,  # a check has a time limit, and says where ranks were
                # Callbacks may want a place for their files; it is not the user's.
                "run_dir": None if run_dir is None else probe.folder / "run",
            }
            super().__init__(**given)

        def fit(self, train: Any, **options: Any) -> FitResult:
            """Takes a few steps by the user's own plan, and ends the script."""
            data = as_data(train, options.get("batch_size"), shuffle=True)
            record.batch_size = data.batch_size
            if setup.batch_size is not None:
                data.batch_size = setup.batch_size
            wrap = "augmentation" in setup.without and not data.is_stream
            if wrap and not isinstance(data.dataset, TensorDataset):
                data.dataset = of.SeededByIndex(data.dataset, self._seed)
            # Around all of it, not the loss function only: backward may run parts of the forward
            # again (activation checkpointing), which must see the same.
            with probe.lens:
                super().fit(data, **(options | {"batch_size": None, "resume": "never"}))
            if probe.batches:
                record.examined = self._examined(data)
            probe.finish(self.context, self.world.rank)
            raise Enough

        def _examined(self, data: Data) -> Examined:
            still = Lens(double=setup.double, without=frozenset({"dropout", "batchnorm"}))

            def loss_of(batch: Any) -> Any:
                with still:
                    return self._user_loss(self.model, batch, self.context)

            fetchable = None if data.is_stream else data
            return examine(
                self.model,
                loss_of,
                probe.batches,
                fetchable,
                keeps_state=bool(record.moving_buffers),
            )

        def _feed(self, data: Data) -> Feed:
            if not setup.twins or data.is_stream:
                return super()._feed(data)
            own = self.world
            try:
                self.world = replace(own, rank=0)  # rank 0's samples
                return super()._feed(data)
            finally:
                self.world = own

        def _assemble(
            self, plan: Plan, data: Data, evals: dict[str, Feed], dispatcher: Dispatcher
        ) -> Loop:
            # How long to train stays as it is, because schedules go by it. Callbacks may ask
            # whether there is a set to evaluate on; so it stays, and is never evaluated.
            loop = super()._assemble(plan, data, evals, dispatcher)
            loop.plan = replace(loop.plan, eval_every=None)
            return loop

        def _save(self, loop_state: dict[str, Any], data_state: dict[str, Any] | None) -> None:
            """No checkpoint: the training ends here."""

    return ProbingTrainer


def run_script(setup_text: str, folder: Path, script: str, args: Sequence[str]) -> int:
    """Runs the script as ``setup_text`` (a :class:`Setup` in JSON) says; returns an exit code.

    Ranks: all; communicates where the script does.
    """
    setup = Setup.from_json(setup_text)
    if setup.double:
        torch.set_default_dtype(torch.float64)
    probe = Probe(setup, folder)
    return host(probing(probe), script, args, lambda: probe.done)


def _kept(callbacks: Sequence[Callback], setup: Setup, record: Record) -> list[Callback]:
    """The user's callbacks, less those that save, round or split; and the split wanted here."""
    slots = (AccumulationSlot, CheckpointSlot, PrecisionSlot)
    kept = [callback for callback in callbacks if not isinstance(callback, slots)]
    if any(isinstance(callback, Mixup) for callback in kept):
        record.seen.append("mixup")
    if "mixup" in setup.without or setup.twins:
        kept = [callback for callback in kept if not isinstance(callback, Mixup)]
    if setup.micro_batches > 1:
        kept.append(GradientAccumulation(steps=setup.micro_batches))
    return kept


def _own_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's buffers, without BatchNorm's."""
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            yield from module.named_buffers(prefix, recurse=False)


def _streams(ctx: Context) -> list[torch.Tensor]:
    return [ctx.rng.get_state(), torch.get_rng_state()]


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among an optimizer's settings of one group."""
    kept: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, bool | int | float):
            kept[name] = value
        elif isinstance(value, tuple) and all(isinstance(v, int | float) for v in value):
            kept[name] = list(value)
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            kept[name] = float(value)
    return kept


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]
