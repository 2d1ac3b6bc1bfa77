"""The front door: takes what the user has, checks it, assembles the loop, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.callback import (
    AccumulationSlot,
    Callback,
    CheckpointSlot,
    Hooks,
    PrecisionSlot,
    Sink,
    check_names,
    the_only,
)
from dtrain.checkpoint import files, rng, status
from dtrain.checkpoint.files import Saved
from dtrain.checkpoint.status import ResumeMode, Status
from dtrain.data import Data, Feed, MapFeed, StreamFeed, as_data
from dtrain.errors import CommError, ConfigError, DtrainError, RankMismatch, RemoteError
from dtrain.evaluation import evaluate, share_buffers
from dtrain.lane import Lane
from dtrain.loop import Loop, Plan
from dtrain.metrics import Means
from dtrain.microstep import MicroStep, UserLoss, adapt
from dtrain.precision import Precision
from dtrain.reporting import Reporter
from dtrain.sinks import Console
from dtrain.state import Context, Progress, Request
from dtrain.strategies import DDP, Strategy
from dtrain.world import current, derive_seed, init, seed_everything

_RANK_STREAM, _SHARED_STREAM, _OWN_STREAM, _ORDER_STREAM = 0, 1, 2, 4


@dataclass(frozen=True, slots=True)
class FitResult:
    """What ``fit`` returns. Equal on all ranks.

    Attributes:
        steps: global steps taken since the run began, over restarts.
        epochs: epochs finished.
        stop_reason: why it ended, in plain words.
        metrics: the newest agreed metrics, such as ``train/loss`` and ``eval/accuracy``.
        history: one dict a report of this call, with ``step`` and ``epoch``.
        preempted: the run was told to leave and is to be continued by another start.
    """

    steps: int
    epochs: int
    stop_reason: str
    metrics: dict[str, float]
    history: list[dict[str, float]]
    preempted: bool = False


class Trainer:
    """Trains a model on all ranks as if they were one.

    Example::

        trainer = dtrain.Trainer(model, optimizer, loss_fn, callbacks=[ClipGradients(1.0)])
        result = trainer.fit(train_set, batch_size=64, epochs=10, eval_set=val_set)

    Args:
        model: your module, on any device; it is moved to this rank's.
        optimizer: an optimizer of the model's parameters, or a function from the model to one.
        loss_fn: from ``(model, batch)`` or ``(model, batch, ctx)`` to a scalar mean or a
            :class:`~dtrain.Loss`; runs on every rank, with its own micro-batch.
        callbacks: tweaks; within a hook they run in this order.
        sinks: where figures go; ``[Console()]`` if None.
        strategy: how gradients meet: ``"ddp"``, or a :class:`~dtrain.strategies.Strategy`.
        run_dir: a folder for checkpoints, metrics and status; None writes nothing.
        seed: of the order of data and the ranks' random streams; ``dtrain.init``'s if None.
        eval_fn: another function for evaluation, of the same form as ``loss_fn``.

    Raises:
        ConfigError: what was asked for cannot work.
        RankMismatch: the ranks have different models.

    Ranks: all, communicates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Callable[[nn.Module], Optimizer],
        loss_fn: UserLoss,
        *,
        callbacks: Sequence[Callback] = (),
        sinks: Sequence[Sink] | None = None,
        strategy: str | Strategy = "ddp",
        run_dir: str | Path | None = None,
        seed: int | None = None,
        eval_fn: UserLoss | None = None,
    ) -> None:
        world = current() or init(seed=seed or 0)
        self.world = world
        self._seed = world.seed if seed is None else seed
        self._sinks = tuple(sinks) if sinks is not None else (Console(),)
        self._strategy = _choose(strategy)
        check_names(callbacks)
        self._precision_slot = the_only(PrecisionSlot, callbacks)  # type: ignore[type-abstract]
        self._accumulation = the_only(AccumulationSlot, callbacks)  # type: ignore[type-abstract]
        self._checkpoint = the_only(CheckpointSlot, callbacks)  # type: ignore[type-abstract]
        self._strategy.check(accumulates=self._accumulation is not None)
        if self._checkpoint is not None and run_dir is None:
            raise ConfigError("checkpoints need a place: pass Trainer(run_dir='runs/...')")
        self.precision = (
            Precision()
            if self._precision_slot is None
            else self._precision_slot.make_precision(world.device.type)
        )
        self._loss_fn = adapt(loss_fn)
        self._eval_fn = adapt(eval_fn or loss_fn)
        self.hooks = Hooks(callbacks)

        model.to(world.device)
        self.model = self._strategy.prepare_model(model, world)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("no parameter of the model requires a gradient: nothing to train")
        self.optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer(self.model)
        notes = _check_optimizer(self.optimizer, self.model)
        _check_same_model(self.model, world.comm)
        changed = self._strategy.make_equal(self.model, world)
        if world.comm.vote("models differ", bool(changed)):
            notes.append(
                "the ranks' models were not equal; all have rank 0's now. Call "
                "dtrain.init(seed=...) before the model is made, and they are equal from the start."
            )
        self.context = Context(
            model=self.model,
            optimizer=self.optimizer,
            progress=Progress(),
            comm=world.comm,
            request=Request(),
            rng=_generator(self._seed, _OWN_STREAM, world.rank),
            shared_rng=_generator(self._seed, _SHARED_STREAM),
            device=world.device,
            run_dir=None if run_dir is None else Path(run_dir),
            notes=notes,
        )
        self._means = Means("train", world.device)
        self._lane = Lane(self.model, rank=world.rank, size=world.size)
        self._micro_step = MicroStep(
            self.model,
            self._loss_fn,
            self._lane,
            precision=self.precision,
            hooks=self.hooks,
            context=self.context,
            means=self._means,
            find_unused=self._strategy.find_unused,
        )
        self._wrapped = False
        self._live = False  # a fit has begun in this process
        self._epoch_evaluated = False

    # -- the two things a user calls ------------------------------------------------------------

    def fit(
        self,
        train: Any,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        max_steps: int | None = None,
        eval_set: Any = None,
        eval_every: int | str | None = "epoch",
        log_every: int = 50,
        resume: ResumeMode = "auto",
    ) -> FitResult:
        """Trains until ``epochs`` or ``max_steps`` are reached, or a stop is agreed.

        Args:
            train: a map-style dataset, an iterable of ready batches, or :class:`~dtrain.Data`.
            batch_size: the *global* batch: samples that one optimizer step sees, over all
                ranks; where ``train`` is a dataset.
            epochs: how many epochs the run has in all, those before a restart included.
            max_steps: how many global steps the run has in all.
            eval_set: what to evaluate on, like ``train``; or a dict of several.
            eval_every: ``"epoch"``, or every so many steps.
            log_every: training figures are agreed and reported every so many steps.
            resume: ``"auto"`` continues an unfinished run in ``run_dir``; ``"must"`` insists
                on one; ``"never"`` begins anew and moves the old run's files aside. A second
                ``fit`` of a live trainer goes on in memory.

        Returns:
            What happened. The model holds the trained weights.

        Raises:
            ConfigError: what was asked for cannot work.
            DataError: the data cannot be trained on.
            ResumeError: the run in ``run_dir`` cannot be continued as asked.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        loop: Loop | None = None
        reporter = Reporter(self._sinks, self.context.run_dir, active=self.world.is_main)
        try:
            plan = _check_plan(epochs, max_steps, eval_every, log_every)
            data = as_data(train, batch_size, shuffle=True)
            feed = self._feed(data)
            evals = self._eval_feeds(eval_set, data)
            loop = self._assemble(plan, data, feed, evals, reporter)
            self._begin(loop, data, feed, resume)
            loop.run()
            self._finish(loop)
        except BaseException as error:
            self._fail(loop, error)
            reporter.close()
            cause = self.world.comm.explain(error)
            if cause is not None:
                raise cause from error
            raise
        reporter.close()
        progress = self.context.progress
        return FitResult(
            steps=progress.step,
            epochs=progress.epoch,
            stop_reason=loop.stop_reason,
            metrics=dict(self.context.metrics),
            history=loop.history,
            preempted=loop.preempted,
        )

    def evaluate(self, data: Any, *, batch_size: int | None = None) -> dict[str, float]:
        """Returns ``eval/loss`` and the other metrics over all of ``data``, each sample once.

        Args:
            data: like ``fit``'s ``eval_set``.
            batch_size: the global batch, where ``data`` is a dataset.

        Raises:
            DataError: the data cannot be evaluated on.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        with self.world.comm.lockstep("evaluate"):
            feeds = self._eval_feeds(data, None, batch_size)
            return self._evaluate(feeds)

    # -- assembling -----------------------------------------------------------------------------

    def _feed(self, data: Data) -> Feed:
        seed = derive_seed(self._seed, _ORDER_STREAM)
        if data.is_stream:
            batches = 1 if self._accumulation is None else self._accumulation.batches_per_step()
            return StreamFeed(data, self.world, batches)
        return MapFeed(data, self.world, self._split, seed)

    def _split(self, share: int) -> list[int]:
        return [share] if self._accumulation is None else self._accumulation.split(share)

    def _eval_feeds(
        self, eval_set: Any, train: Data | None, batch_size: int | None = None
    ) -> dict[str, Feed]:
        if eval_set is None:
            return {}
        sets = eval_set if isinstance(eval_set, Mapping) else {"": eval_set}
        feeds: dict[str, Feed] = {}
        for name, one in sets.items():
            size = batch_size
            if size is None and train is not None and not isinstance(one, Data):
                # A list of ready batches stays one; a dataset takes the training's batch size.
                size = train.batch_size if hasattr(one, "__getitem__") else None
            data = as_data(one, size, shuffle=False)
            label = f"eval/{name}" if name else "eval"
            if data.is_stream:
                feeds[label] = StreamFeed(data, self.world, 1)
            else:
                feeds[label] = MapFeed(data, self.world, self._split, 0)
        return feeds

    def _evaluate(self, feeds: dict[str, Feed]) -> dict[str, float]:
        share_buffers(self.model, self.world.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            metrics |= evaluate(
                feed,
                self._eval_fn,
                label=label,
                context=self.context,
                hooks=self.hooks,
                precision=self.precision,
            )
        return metrics

    def _assemble(
        self, plan: Plan, data: Data, feed: Feed, evals: dict[str, Feed], reporter: Reporter
    ) -> Loop:
        progress = self.context.progress
        progress.steps_per_epoch = feed.steps_per_epoch
        progress.total_epochs = plan.epochs
        totals = [] if plan.max_steps is None else [plan.max_steps]
        if plan.epochs is not None and feed.steps_per_epoch is not None:
            totals.append(plan.epochs * feed.steps_per_epoch)
        progress.total_steps = min(totals, default=None)
        self.context.has_eval = bool(evals)
        if data.batch_size is not None:
            self._lane.expect(data.batch_size / self.world.size)
        if not evals:
            plan = Plan(plan.epochs, plan.max_steps, None, plan.log_every)
        loop = Loop(
            plan=plan,
            feed=feed,
            context=self.context,
            hooks=self.hooks,
            strategy=self._strategy,
            micro_step=self._micro_step,
            lane=self._lane,
            precision=self.precision,
            optimizer=self.optimizer,
            means=self._means,
            reporter=reporter,
            world_size=self.world.size,
            evaluate=lambda: self._evaluate(evals),
            save=lambda: self._save(loop),
            checkpoint=self._checkpoint,
            epoch_evaluated=self._epoch_evaluated,
        )
        return loop

    def _begin(self, loop: Loop, data: Data, feed: Feed, resume: ResumeMode) -> None:
        """Everything before the first step: resume, hooks, wrapping, the start block."""
        comm, context, run_dir = self.world.comm, self.context, self.context.run_dir
        with comm.lockstep("the start of fit"):
            _check_same_plan(comm, feed, loop.plan)
            saved: Saved | None = None
            if run_dir is not None and not self._live:
                make_up = self._make_up(data)

                def look() -> status.Decision:
                    status.prepare(run_dir)
                    plan = loop.plan
                    return status.decide(
                        run_dir, resume, make_up, epochs=plan.epochs, max_steps=plan.max_steps
                    )

                decision = comm.on_main("resume", look)
                context.notes += decision.notes
                saved = decision.saved
            elif resume == "must" and not self._live:
                raise ConfigError("resume='must' needs a run_dir to resume from")
            if self._live and loop._finished():
                raise ConfigError(
                    f"this trainer has done {context.progress.epoch} epochs and "
                    f"{context.progress.step} steps already: epochs and max_steps count from the "
                    "run's beginning, so ask for more"
                )
            if saved is not None:
                self._restore_model(saved)
            comm.on_main("open sinks", loop.reporter.open)
            self.hooks.fire(Callback.on_fit_start, context)
            if saved is not None:
                self._restore_rest(saved, loop)
            elif not self._live:
                seed_everything(self._seed, _RANK_STREAM, self.world.rank)
            if not self._wrapped:
                self._strategy.wrap(self._micro_step, self.world)
                self._wrapped = True
            self._live = True
            self._data = data
            comm.on_main("status", lambda: self._write_status("running", loop))
        loop.tell("start", self._start_block(data, feed, loop.plan))

    def _finish(self, loop: Loop) -> None:
        state: status.State = "preempted" if loop.preempted else "finished"
        self._epoch_evaluated = loop.epoch_evaluated
        comm = self.world.comm
        with comm.lockstep("the end of fit"):
            comm.on_main("status", lambda: self._write_status(state, loop))
        metrics = self.context.metrics
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("eval/"))
        where = f"\nfiles are in {self.context.run_dir}" if self.context.run_dir else ""
        progress = self.context.progress
        loop.tell(
            "end",
            f"{state} after {progress.step} steps, {progress.epoch} epochs: {loop.stop_reason}"
            + (f"\n{shown}" if shown else "")
            + where,
        )

    def _fail(self, loop: Loop | None, error: BaseException) -> None:
        """What a rank does on its own before ``fit`` raises: no other rank is waited for."""
        comm = self.world.comm
        known = isinstance(error, RemoteError | RankMismatch | CommError)
        if not known:
            comm.record(error, self.hooks.failed_in or "fit")
        for callback in self.hooks.callbacks:
            try:
                callback.on_error(self.context, error)
            except Exception as another:  # noqa: BLE001 -- must not hide the first error
                error.add_note(f"({callback.name}.on_error raised as well: {another!r})")
        if loop is None or not self._live or not self.world.is_main:
            return
        try:
            self._write_status("failed", loop, f"{type(error).__name__}: {error}")
        except DtrainError as another:
            error.add_note(f"({another})")

    # -- state --------------------------------------------------------------------------------

    def _save(self, loop: Loop) -> None:
        run_dir, context, world = self.context.run_dir, self.context, self.world
        if run_dir is None:
            context.say("a checkpoint was asked for, but the Trainer has no run_dir: none is made")
            return
        share_buffers(self.model, world.comm)
        progress = context.progress
        folder = run_dir / "checkpoints"
        files.save(
            folder,
            step=progress.step,
            model=self.model.state_dict(),
            state={
                "optimizer": self.optimizer.state_dict(),
                "precision": self.precision.state_dict(),
                "callbacks": {c.name: c.state_dict() for c in self.hooks.callbacks},
                "progress": [
                    progress.step,
                    progress.updates,
                    progress.epoch,
                    progress.step_in_epoch,
                    progress.samples,
                ],
                "epoch_evaluated": loop.epoch_evaluated,
                "stop_reason": "" if loop.preempted else loop.stop_reason,
                "shared_rng": context.shared_rng.get_state(),
                "metrics": context.metrics,
            },
            rank_state={"rng": rng.capture(), "own_rng": context.rng.get_state()},
            metrics=context.metrics,
            rank=world.rank,
            comm=world.comm,
        )

        def prune() -> None:
            if self._checkpoint is None:
                return
            saved = files.listed(folder)
            for step in self._checkpoint.prune([(s.step, s.metrics) for s in saved]):
                files.remove(folder, step)
            self._write_status("running", loop)

        world.comm.on_main("checkpoint: prune", prune)

    def _restore_model(self, saved: Saved) -> None:
        self.model.load_state_dict(files.load_model(saved.path))

    def _restore_rest(self, saved: Saved, loop: Loop) -> None:
        state = files.load_state(saved.path)
        context, progress = self.context, self.context.progress
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        for callback in self.hooks.callbacks:
            callback.load_state_dict(state["callbacks"][callback.name])
        (
            progress.step,
            progress.updates,
            progress.epoch,
            progress.step_in_epoch,
            progress.samples,
        ) = state["progress"]
        loop.resumed(state["epoch_evaluated"], state["stop_reason"])
        context.shared_rng.set_state(state["shared_rng"])
        context.metrics.update(state["metrics"])
        mine = files.load_rank_state(saved.path, self.world.rank)
        if mine is not None:
            rng.restore(mine["rng"])
            context.rng.set_state(mine["own_rng"])
        else:  # there were fewer ranks: a stream that no rank has used
            seed_everything(self._seed, _RANK_STREAM, self.world.rank, progress.step)

    def _make_up(self, data: Data) -> dict[str, Any]:
        shapes = [(n, list(p.shape), str(p.dtype)) for n, p in self.model.state_dict().items()]
        length = len(data.dataset) if hasattr(data.dataset, "__len__") else None
        return {
            "model": files.fingerprint(shapes),
            "optimizer": type(self.optimizer).__name__,
            "callbacks": [callback.name for callback in self.hooks.callbacks],
            "precision": self.precision.name,
            "batch size": data.batch_size,
            "samples": length,
            "seed": self._seed,
        }

    def _write_status(self, state: status.State, loop: Loop, reason: str = "") -> None:
        if self.context.run_dir is None:
            return
        progress = self.context.progress
        status.write(
            self.context.run_dir,
            Status(
                status=state,
                reason=reason or loop.stop_reason,
                step=progress.step,
                epoch=progress.epoch,
                make_up=self._make_up(self._data),
            ),
        )

    # -- words --------------------------------------------------------------------------------

    def _start_block(self, data: Data, feed: Feed, plan: Plan) -> str:
        world, progress = self.world, self.context.progress
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines = [
            f"{type(self.model).__name__}: {count:,} trainable parameters, {self.precision.name}, "
            f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type} ({world.backend})"
        ]
        if data.batch_size is not None:
            share = -(-data.batch_size // world.size)
            micro = self._split(share)
            shown = (
                f"{world.size} rank{'s' * (world.size > 1)} x {len(micro)} x {max(micro)} samples"
            )
            even = world.size * len(micro) * max(micro) == data.batch_size
            lines.append(f"global batch {data.batch_size} = {'' if even else 'up to '}{shown}")
            if data.batch_size < world.size:
                lines.append(
                    f"warning: batch_size={data.batch_size} is smaller than the {world.size} "
                    "ranks; some have nothing to do in each step"
                )
            elif share < 4 and world.size > 1:
                lines.append(
                    f"warning: a rank's share is only {share} samples; `batch_size=... * "
                    "world.size` keeps ranks busy"
                )
        if progress.total_steps is not None:
            lines.append(f"{progress.total_steps:,} steps in all")
        return "\n".join(lines)


def _choose(strategy: str | Strategy) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    if strategy in ("ddp", "auto"):
        return DDP()
    raise ConfigError(f"strategy={strategy!r}: choose 'ddp', or pass a dtrain.strategies.Strategy")


def _generator(*stream: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(derive_seed(*stream))
    return generator


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns what to warn of; raises where the optimizer holds another model's parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in held if id(p) not in names]
    if strange:
        shapes = ", ".join(str(list(p.shape)) for p in strange[:5])
        raise ConfigError(
            f"{len(strange)} of the optimizer's {len(held)} parameters are not the model's (shapes "
            f"{shapes}). Make the optimizer from this model, after its last change; or pass a "
            "function: Trainer(model, lambda m: AdamW(m.parameters()), ...)"
        )
    ids = {id(p) for p in held}
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if not left:
        return []
    return [f"note: {', '.join(left)} require a gradient, but the optimizer does not have them"]


def _check_same_model(model: nn.Module, comm: Any) -> None:
    shapes = [(n, list(t.shape), str(t.dtype)) for n, t in model.state_dict().items()]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    everyones = comm.gather_objects("model", files.fingerprint([*shapes, frozen]))
    if len(set(everyones)) == 1:
        return
    described = comm.gather_objects("models", [f"{n} {s} {d}" for n, s, d in shapes] + frozen)
    first = set(described[0])
    rows = []
    for rank, lines in enumerate(described):
        extra = [line for line in lines if line not in first]
        lacking = [line for line in described[0] if line not in set(lines)]
        rows.append(f"  rank {rank}: has also {extra[:5]}, lacks {lacking[:5]}")
    raise RankMismatch(
        "the ranks have different models (compared with rank 0):\n" + "\n".join(rows)
    )


def _check_same_plan(comm: Any, feed: Feed, plan: Plan) -> None:
    mine = f"{plan}, {feed.steps_per_epoch} steps per epoch"
    plans = comm.gather_objects("plan", mine)
    if len(set(plans)) > 1:
        table = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(plans))
        raise RankMismatch(
            f"the ranks called fit with different arguments or data of different length:\n{table}"
        )


def _check_plan(
    epochs: int | None, max_steps: int | None, eval_every: int | str | None, log_every: int
) -> Plan:
    if epochs is None and max_steps is None:
        raise ConfigError("how long? pass epochs, max_steps, or both (the first reached counts)")
    for name, value in (("epochs", epochs), ("max_steps", max_steps), ("log_every", log_every)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}={value!r}: must be 1 or more")
    by_steps = isinstance(eval_every, int) and eval_every >= 1
    if not (eval_every is None or eval_every == "epoch" or by_steps):
        raise ConfigError(f"eval_every={eval_every!r}: 'epoch', a number of steps, or None")
    return Plan(epochs, max_steps, eval_every, log_every)
