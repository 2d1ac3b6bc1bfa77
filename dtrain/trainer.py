"""The front door: takes what the user has, checks it, assembles the loop, and runs it."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from dtrain.callback import Callback, Hooks, check_monitors, check_names, listed, the_only
from dtrain.checkpoint import (
    CheckpointSlot,
    ResumeMode,
    RunFiles,
    RunState,
    copy_state,
    json_values,
)
from dtrain.cluster import Deadline, Launcher, Signals
from dtrain.context import Context, Optimizers, Outbox, Progress, Request, Several, as_one
from dtrain.data import AccumulationSlot, Data, Feed, open_feed
from dtrain.distributed import (
    Replicas,
    check_same_call,
    current,
    derive_seed,
    init_late,
    launcher_gone,
    seeded_generator,
)
from dtrain.errors import ConfigError
from dtrain.inference import Inference
from dtrain.loop import Loop
from dtrain.plan import FitResult, Phases, Plan, Recorder
from dtrain.sinks import Console, Dispatcher, History, Sink, describe_end, describe_start
from dtrain.step import (
    Engine,
    Precision,
    PrecisionSlot,
    UpdatePlan,
    UserLoss,
    adapt,
    check_trains,
    may_delay,
    take_model,
    unwrapped,
)
from dtrain.strategies import Strategy, choose
from dtrain.watchdog import HANG_AFTER_S, Watchdog

_SHARED_STREAM, _OWN_STREAM, _ORDER_STREAM = 1, 2, 4  # 0 is a rank's own


class Trainer(Inference):
    """Trains a model on all ranks as if they were one.

    Example::

        trainer = dtrain.Trainer(model, optimizer, loss_fn, callbacks=[ClipGradients(1.0)])
        result = trainer.fit(train_set, batch_size=64, epochs=10, eval_set=val_set)

    Args:
        model: your module, on any device; it is moved to this rank's. It may be compiled, whole or
            in parts; from DistributedDataParallel it is unwrapped.
        optimizer: an optimizer of the model's parameters, or a list or dict of several
            (docs/updates.md), or a function from the model to one of these. None for evaluating and
            predicting only, also where the model is frozen.
        loss_fn: from ``(model, batch)`` or ``(model, batch, ctx)`` to a scalar mean or a
            :class:`~dtrain.Loss`; runs on every rank, with its own micro-batch. A ``ctx`` may
            be optional, by that name.
        callbacks: tweaks; within a hook they run in this order.
        sinks: where figures go; ``[Console()]`` if None.
        strategy: how gradients meet: ``"flat"`` (at once, after backward), ``"ddp"`` (in buckets,
            during it), ``"auto"`` (flat up to 25 MiB of gradients, where DDP has nothing to
            overlap), ``"fsdp"`` (each rank holds a part of the model: docs/sharded.md), or a
            :class:`~dtrain.strategies.Strategy`.
        run_dir: a folder for checkpoints, metrics and status (``~`` is expanded); None writes
            nothing.
        seed: of the order of data and the ranks' random streams; ``dtrain.init``'s if None.
        eval_fn: another function for evaluation, of the same form as ``loss_fn``; it may return
            :class:`~dtrain.Metrics`, without a loss (docs/evaluation.md).
        config: your own settings (JSON values), kept in ``run_dir/config.json``, in checkpoints
            and in sinks.
        hang_after_s: a rank that makes no progress for this long (or for ten times the slowest
            recent step, where that is longer) is ended, with its stack. Whoever waits for it says
            so after 5 seconds; what is known to be wrong (a process that is gone or stopped, calls
            that only some ranks make) ends the run within seconds: docs/hangs.md. A hook that takes
            longer says so by ``ctx.heartbeat()``. None switches all this off, as one rank does.
        check_ranks: compare ranks' parameters, by a digest, at reports (every 50 steps at most),
            checkpoints and the end of ``fit``; False is for machines that round differently.
        keep_modes: leave parts of the model in train or eval mode as they are (as all are after
            ``fit``). Else a model in eval mode, as pretrained ones come, is trained in train mode,
            but for parts without a parameter to train; one in train mode may have parts in eval.
        graph: replay the loss function and its backward as CUDA graphs, for batches of one shape;
            what these cannot hold (``.item()``, ``ctx.progress``) is refused (docs/gpu.md).
        updates: of a dict of optimizers, the names of those that a step updates, in order, as a
            function of ``ctx.progress``; each once if None.

    Raises:
        ConfigError: what was asked for cannot work.
        RankMismatch: the ranks have different models.

    Ranks: all, communicates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers | None,
        loss_fn: UserLoss,
        *,
        callbacks: Sequence[Callback] = (),
        sinks: Sequence[Sink] | None = None,
        strategy: str | Strategy = "auto",
        run_dir: str | Path | None = None,
        seed: int | None = None,
        eval_fn: UserLoss | None = None,
        config: Mapping[str, Any] | None = None,
        hang_after_s: float | None = HANG_AFTER_S,
        check_ranks: bool = True,
        keep_modes: bool = False,
        graph: bool = False,
        updates: UpdatePlan | None = None,
    ) -> None:
        self.world = world = current() or init_late(seed or 0)
        self._seed = world.seed if seed is None else seed
        self._sinks = (Console(),) if sinks is None else listed("sinks", sinks)
        self._outbox = Outbox()
        # What fails on one rank only (its own data, its own code) reaches all of them.
        with world.comm.lockstep("Trainer(...)"):
            settings = json_values(config)
            self._watchdog = Watchdog(world, hang_after_s)
            callbacks = check_names(callbacks)
            self.hooks = Hooks(callbacks, world.comm.activity)
            slot = the_only(PrecisionSlot, callbacks)  # type: ignore[type-abstract]
            self.precision = slot.make_precision(world.device.type) if slot else Precision()
            self._accumulation = the_only(AccumulationSlot, callbacks)  # type: ignore[type-abstract]
            self._checkpoint = the_only(CheckpointSlot, callbacks)  # type: ignore[type-abstract]
            if self._checkpoint is not None and run_dir is None:
                raise ConfigError("checkpoints need a place: pass Trainer(run_dir='runs/...')")
            model, told = unwrapped(model)
            strategy = choose(strategy, model, graphed=graph and world.size > 1)
            accumulates = self._accumulation is not None
            strategy.check(accumulates=accumulates, callbacks=callbacks)
            module, made, notes = take_model(model, optimizer, strategy, world)
            self._outbox.notes = told + notes
            self._trains_only = eval_fn is None
            eval_fn, loss_fn = adapt(eval_fn or loss_fn), adapt(loss_fn, module)
            self.context = Context(
                model=module,
                optimizer=made,
                progress=Progress(),
                comm=world.comm,
                request=Request(),
                rng=seeded_generator(self._seed, _OWN_STREAM, strategy.samples_of(world).rank),
                shared_rng=seeded_generator(self._seed, _SHARED_STREAM),
                device=world.device,
                run_dir=None if run_dir is None else Path(run_dir).expanduser().absolute(),
                loss_scaled=self.precision.scales_loss,
                _outbox=self._outbox,
            )
        self._run_state = RunState(
            self.context, self.precision, self.hooks.callbacks, world, settings, self._checkpoint
        )
        replicas = Replicas(self.model, world.comm, active=check_ranks and world.size > 1)
        self._engine = Engine(
            context=self.context,
            outbox=self._outbox,
            world=world,
            loss_fn=loss_fn,
            eval_fn=eval_fn,
            precision=self.precision,
            strategy=strategy,
            hooks=self.hooks,
            replicas=replicas,
            keep_modes=keep_modes,
            graph=graph,
            plan=updates,
        )
        # Weakly: a model must not wait for the garbage collector to be freed.
        self.context._engine = weakref.ref(self._engine)
        self._files = RunFiles(self.context.run_dir, world, self._run_state, replicas)
        self.recorder = Recorder()  # what a trial of the script changes, and is told
        own = [name for sink in self._sinks for name in sink.files]
        parts = self.context, self._files, self._run_state, self._engine, self.hooks
        self._phases = Phases(*parts, own, self._seed)

    @property
    def model(self) -> nn.Module:
        """The model, which is trained in place; another one takes another Trainer."""
        return self.context.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, also for hooks; another one may be set on all ranks between two fits."""
        return self.context.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | Several) -> None:
        self.context.optimizer = as_one(optimizer)  # looked at when fit begins, or in the next step

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a Trainer cannot be pickled or copied (it holds connections to other ranks), nor what "
            "holds one, such as a dataset with workers: send what it is made from, or its model"
        )

    # -- what a user calls, beside what the base has --------------------------------------------

    def fit(
        self,
        train: Any,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        max_steps: int | None = None,
        eval_set: Any = None,
        eval_every: int | str | None = "epoch",
        eval_first: bool = False,
        log_every: int = 50,
        history: int | None = None,
        resume: ResumeMode = "auto",
        override: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> FitResult:
        """Trains until ``epochs`` or ``max_steps`` are reached, or a stop is agreed.

        A script may call it several times: each call is a fit of the run, with a plan, an order of
        the data, schedules and a patience of its own. Started again, the script's calls of fits
        that are over return their result at once, and the one that was interrupted goes on
        (docs/fits.md).

        Args:
            train: a map-style dataset, an iterable of ready batches, or :class:`~dtrain.Data`.
            batch_size: the *global* batch: samples that one optimizer step sees, over all
                ranks; where ``train`` is a dataset.
            epochs: how many epochs the fit has in all, those before a restart included.
            max_steps: how many global steps the fit has in all.
            eval_set: what to evaluate on, like ``train``; or a dict of several (one of columns is
                taken for one set where ``train`` has the same columns).
            eval_every: ``"epoch"``, or every so many steps.
            eval_first: evaluate before the first step, too.
            log_every: training figures are agreed and reported every so many steps.
            history: how many of the newest reports the result keeps; all of them if None.
            resume: ``"auto"`` continues an unfinished run in ``run_dir``; ``"must"`` insists
                on one; ``"never"`` begins anew and moves the old run's files aside;
                ``"emergency"`` continues from what was saved when the run failed. A further
                ``fit`` of a live trainer goes on in memory.
            override: values of the optimizer for this and later starts, such as ``{"lr": 1e-3}``
                (or a list: one for each group), where a run keeps those that it was begun with.
            name: tells this fit from the run's others; its number does if None. A call with the
                name of the fit before goes on with that.

        A TERM, HUP, USR1, USR2 or INT (Ctrl-C) to any one rank ends the run in order: all ranks
        stop after the same step and save, and ``status.json`` says ``preempted``. A second INT ends
        the process at once. Signals that the script handles itself are left alone. So does the
        approaching end of a SLURM job (docs/launching.md), or of a torchrun that was killed.

        What is drawn at random comes from streams of the Trainer's own, by its seed; the script's
        are as before, afterwards. The model holds the trained weights.

        Raises:
            ConfigError: what was asked for cannot work.
            DataError: the data cannot be trained on.
            ResumeError: the run in ``run_dir`` cannot be continued as asked.
            RunTaken: another start of this run writes to ``run_dir``.
            RankMismatch: the ranks' parameters are no longer equal; it names them.
            RemoteError: another rank failed.

        Ranks: all, communicates. Where a rank hangs, the process ends (docs/hangs.md).
        """

        def take() -> tuple[Plan, Data]:
            check_trains(self.model, self.optimizer)
            plan = Plan(epochs, max_steps, eval_every, log_every, eval_first, history)
            return plan, Data.of(train, batch_size, shuffle=True)

        with self._watchdog, self._engine.in_fit(), self._files.in_fit():
            result = self._fit(take, eval_set, resume, override or {}, name)
        self._say_apart()
        return result

    def restore(self) -> Progress:
        """Loads weights and progress of the run in ``run_dir``, if there is one to go on with.

        For scripts that need them before their first ``fit``; fits then need names. What is
        returned counts the fits that are over (``phase``), and steps.

        Raises:
            ConfigError: a fit has begun in this process.
            ResumeError: what there is cannot be read.

        Ranks: all, communicates.
        """
        with self._watchdog, self._files.in_fit(), self.world.comm.lockstep("restore"):
            progress = self._phases.restore()
        self._say_apart()
        return progress

    def _fit(
        self,
        take: Callable[[], tuple[Plan, Data]],
        eval_set: Any,
        resume: ResumeMode,
        override: Mapping[str, Any],
        name: str | None,
    ) -> FitResult:
        loop: Loop | None = None
        comm = self.world.comm
        dispatcher = Dispatcher(self._sinks, self.context.run_dir, active=self.world.is_main)
        preempt, phases = self.context.request.preempt, self._phases
        if phases.must_end:
            return phases.left_undone()
        try:
            main, gone = self.world.is_main, launcher_gone(self.world)
            with Signals(preempt), Deadline(preempt, active=main), Launcher(preempt, gone):
                with comm.lockstep(lambda: self.hooks.failed_in or "the start of fit"):
                    plan, data = take()
                    self._run_state.override = override
                    if over := phases.enter(name, data, plan, resume):
                        return over
                    evals = self._open_evals(eval_set, data.batch_size, data)
                    loop = self._assemble(plan, data, evals)
                    self._begin(loop, data, dispatcher)
                loop.run()
                with comm.lockstep("the end of fit"):
                    phases.ended(loop.stop_reason, preempted=loop.preempted)
                    words = describe_end(self.context, loop.stop_reason, preempted=loop.preempted)

                    def tell() -> None:  # once that is noted
                        loop.history.report("end", {}, words)
                        dispatcher.finish()

                    last, best = self._files.finish(loop.stop_reason, loop.preempted, tell)
        except BaseException as error:
            self._fail(loop, error, dispatcher)
            raise
        reached = loop.stop_reason, loop.preempted, list(loop.history.rows), last, best
        return FitResult.of(self.context.progress, dict(self.context.metrics), *reached)

    # -- assembling -----------------------------------------------------------------------------

    def _assemble(self, plan: Plan, data: Data, evals: dict[str, Feed]) -> Loop:
        context, engine, slot = self.context, self._engine, self._accumulation
        fingerprint = self._run_state.fingerprint
        phase = (context.progress.phase,) if context.progress.phase else ()
        feed = open_feed(
            data,
            self.recorder.samples_of(self._engine.seat),
            self._split,
            seed=derive_seed(self._seed, _ORDER_STREAM, *phase),
            batches_per_step=slot.batches_per_step() if slot and data.is_stream else 1,
            copy_state=None if context.run_dir is None else copy_state,
        )
        if not evals:
            plan = replace(plan, eval_every=None)
        check_monitors(self.hooks.callbacks, evals, evaluates=bool(plan.eval_every))
        # A stream is each rank's own, and so is its length.
        same = {k: v for k, v in fingerprint.items() if not (data.is_stream and k == "samples")}
        same |= {"evaluation": {label: str(one) for label, one in evals.items()}}
        plan.begin(context.progress, feed.steps_per_epoch)
        self._run_state.fits.plan(context.progress)
        same |= {"fit": self._run_state.fits.words(context.progress.phase)}
        same |= {"override": self._run_state.override, "plan": plan, "updates": engine.ahead()}
        check_same_call(same, self.world.comm, parted=engine.parted)
        engine.restart(data.batch_size or 0)
        context.has_eval = bool(evals)
        return Loop(
            plan=self.recorder.plan(plan),
            feed=feed,
            evals=evals,
            engine=engine,
            files=self._files,
            checkpoint=self._checkpoint,
            saves=self.recorder.saves,
            runs_ahead=may_delay(self.world.device, self.optimizer, data),
        )

    def _begin(self, loop: Loop, data: Data, dispatcher: Dispatcher) -> None:
        """Everything before the first step: resume, hooks, wrapping, the start block."""
        context, files, plan = self.context, self._files, loop.plan
        saved, live = self._phases.saved, self._phases.live
        self._run_state.begin(live=live, resumes=saved is not None)
        files.saver.flush = dispatcher.flush
        state = {} if saved is None else self._run_state.restore(saved, weights=True)
        tell = self.recorder.report if self.world.is_main else None
        loop.history = History(context.progress, self._outbox, dispatcher, tell, plan.history)
        files.open(dispatcher.open, live=live)
        self._engine.modes.wake()
        self.hooks.fire(Callback.on_fit_start, context)
        if live and self._phases.new:
            self._run_state.note_groups()  # as the script may have changed them
            self._engine.figures.restore_epoch({})
        self._engine.streams.begin()  # what is drawn from here on is the training's
        if saved is not None:
            mine = self._run_state.restore_rest(saved, state, self._phases.seed_rank)
            loop.load_state_dict(state["loop"], mine)
        elif not live:
            self._phases.seed_rank()
        self._engine.begin()
        if not live:
            files.open_saver()
        self._phases.live = True
        files.start(live=live)
        words = describe_start(
            context,
            self.world,
            precision=self.precision.name,
            strategy=self._engine.strategy.describe(),
            batch_size=data.batch_size,
            split=self._split,
            fit=self._run_state.fits.words(context.progress.phase),
        )
        loop.history.start(words, self._run_state.config, self.world, self.hooks.by_name())

    # -- failures -------------------------------------------------------------------------------

    def _fail(self, loop: Loop | None, error: BaseException, dispatcher: Dispatcher) -> None:
        """What a rank does on its own before ``fit`` raises: no other rank is waited for.

        Raises the other rank's failure, if that is why; else leaves ``error`` for others.
        """
        comm = self.world.comm
        phase = comm.activity.phase.name
        cause: BaseException | None = self._watchdog.explain(error)
        if cause is None and error is not self.hooks.error:
            cause = comm.explain(error)
        if cause is None:
            comm.record(error, self.hooks.failed_in or phase)
        self.hooks.tell(self.context, error)
        # A further fit must not take up what was asked or logged in this one.
        self._engine.agreement.drop()
        self._outbox.logged.clear()
        if loop is not None and self._phases.live:
            if loop.failed_together:
                state, here = loop.state_dict, self._engine.agreement.trouble is not None
                self._files.save_emergency(state, loop.data_state, failed_here=here, error=error)
            self._files.fail(error, cause)
        self._phases.failed()
        if history := getattr(loop, "history", None):  # there is none before sinks are open
            history.say()
        dispatcher.close()
        self.world.tell_launcher(cause or error)
        if cause is not None:
            try:
                raise cause from error
            finally:
                del cause  # its traceback has this frame
