"""Callbacks, and the order in which their hooks fire."""

import difflib
import dis
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dtrain import accelerator
from dtrain.context import Context, Step
from dtrain.distributed import Activity, Phase
from dtrain.errors import ConfigError

P = ParamSpec("P")
S = TypeVar("S")

#: As what a callback's weights may count; see :meth:`Callback.weights`.
CountAs = Literal["evaluated", "final", "averaged", "best"]


class Callback:
    """One tweak of the training, whole in itself. Override the hooks you need; others cost nothing.

    Hooks fire on every rank, in the order below; within a hook, the order of the list counts. In
    ``on_step_start``, ``on_grads_ready`` and ``on_step_end``, prefer ``ctx.request`` and
    ``ctx.log``, which cost nothing, to ``ctx.comm``, which waits for all ranks.

    Example::

        class StopAtTarget(Callback):
            def __init__(self, accuracy: float) -> None:
                self.accuracy = accuracy

            def on_eval_end(self, ctx, metrics):
                if metrics["eval/accuracy"] >= self.accuracy:
                    ctx.request.stop(f"reached {self.accuracy:.1%}")

    Attributes:
        name: identifies the callback in checkpoints and messages; unique in a run. The
            class's name, unless set.
        late_step_end: ``on_step_end`` may be called late: at any time before the next update
            of the parameters. On CUDA ``step.applied`` is known by then without waiting.
        asks_for_gradients: ``on_grads_ready`` looks at gradients by way of ``ctx`` only, or calls
            ``ctx.gradients()`` before it looks at any ``p.grad``. On CUDA, gradients that nobody
            asks for are normalised and clipped by the optimizer itself. Not inherited by a class
            with an ``on_grads_ready`` of its own.
        completes_gradients: ``on_grads_ready`` adds what belongs to the loss, and is called before
            that of all others, which look at the gradients of the whole loss.
        monitors: the metrics that the callback judges by, such as ``("eval/loss",)``. One that
            cannot exist is an error when ``fit`` begins.
        adds: what ``on_eval_end`` adds to the figures of each set, such as ``("auc",)``. Who judges
            by it must come later in the list.
        whole_weights: it works on whole weights or gradients, of which a rank holds some rows only
            under ``strategy="fsdp"``, where it is refused.

    Ranks: all.
    """

    name: str = ""
    late_step_end: bool = False
    asks_for_gradients: bool = False
    completes_gradients: bool = False
    monitors: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    whole_weights: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if "on_grads_ready" in vars(cls) and "asks_for_gradients" not in vars(cls):
            cls.asks_for_gradients = False
        for name in _TAKES:
            method = inspect.getattr_static(cls, name)  # it may come from a class that is mixed in
            if inspect.isfunction(method) and method is not vars(Callback)[name]:
                _check_method(cls.__name__, name, method)
        for attribute, value in vars(cls).items():
            if attribute.startswith("on_") and callable(value) and attribute not in HOOK_NAMES:
                close = difflib.get_close_matches(attribute, HOOK_NAMES, n=1)
                hint = f"did you mean `{close[0]}`? " if close else ""
                raise TypeError(
                    f"{cls.__name__}.{attribute} is no hook: {hint}The hooks are "
                    f"{', '.join(HOOK_NAMES)}."
                )

    def on_fit_start(self, ctx: Context) -> None:
        """``fit`` begins; model and progress are restored, other state is restored next."""

    def on_epoch_start(self, ctx: Context) -> None:
        """An epoch begins, or goes on after a resume."""

    def on_step_start(self, ctx: Context, step: Step) -> None:
        """A global step begins: set any hyper-parameter here."""

    def on_batch(self, ctx: Context, step: Step) -> None:
        """Each micro-batch, before the forward: ``step.batch`` may be replaced."""

    def on_loss(self, ctx: Context, step: Step) -> None:
        """The loss is computed, not yet backward: ``step.loss.mean`` may be added to."""

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        """Gradients are summed over micro-batches and ranks, weighted and unscaled."""

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """The optimizer has stepped, if ``step.applied``."""

    def on_eval_start(self, ctx: Context) -> None:
        """An evaluation begins, ``fit``'s (``ctx.in_fit``) or one of ``Trainer.evaluate``."""

    def on_eval_batch(self, ctx: Context, step: Step) -> None:
        """Each micro-batch of an evaluation; ``step.loss.outputs`` is what was returned."""

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        """The metrics are agreed; more may be added, equal on all ranks."""

    def on_save(self, ctx: Context) -> None:
        """A checkpoint is about to be made."""

    def on_epoch_end(self, ctx: Context) -> None:
        """An epoch is over; its evaluation and checkpoint are done."""

    def on_fit_end(self, ctx: Context) -> None:
        """``fit`` is about to return; not called where it raises."""

    def on_error(self, ctx: Context, error: BaseException) -> None:
        """``fit`` (or ``Trainer.evaluate``) is about to raise ``error``."""

    def weights(self, which: CountAs) -> Mapping[str, Tensor] | None:
        """Returns weights that count in place of the model's own, by name; None where those do.

        What is left out is the model's own. Keep the tensors in ``state_dict``, too: checkpoints
        hold them once. Of several callbacks the last in the list counts; but at the end, weights
        that are not evaluated as well go first.

        Args:
            which: ``"evaluated"``, in evaluations in ``fit``; ``"final"``, in the model after
                ``fit`` and for ``load_model``; ``"averaged"``, ``"best"``, if asked for.

        Ranks: all, local; equal on all.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: JSON values and tensors, nested at will.

        Equal on all ranks: rank 0's is saved, and a warning names it if others differ.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; called after ``on_fit_start``."""

    def rank_state_dict(self) -> dict[str, Any]:
        """Returns what is this rank's own, such as what it has seen of its data; of that form."""
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`rank_state_dict` returned on the rank of the same number.

        Not called where there was none, nor on a rank that the saved run did not have.
        """


HOOK_NAMES = tuple(name for name in vars(Callback) if name.startswith("on_"))
_QUICK = ("on_step_start", "on_batch", "on_loss", "on_grads_ready", "on_step_end", "on_eval_batch")
_AMID = ("on_step_start", "on_grads_ready", "on_step_end")  # beside a reduction of gradients
_ORDER = {"on_step_start": 1, "on_grads_ready": 5, "on_step_end": 6}  # among the phases of a step
_PHASES = {n: Phase(n, slow=n not in _QUICK, order=_ORDER.get(n, 0)) for n in HOOK_NAMES}
_LATE_STEP_END = Phase("on_step_end", order=4)  # of the step before, in the middle of one
#: What each method of a callback is called with.
_TAKES = {
    name: list(inspect.signature(method).parameters)
    for name, method in vars(Callback).items()
    if name in (*HOOK_NAMES, "state_dict", "load_state_dict")
}


def _check_method(owner: str, name: str, method: Callable[..., Any]) -> None:
    """Raises TypeError where it could not be called as it will be, or its body would not run."""
    right = f"write `def {name}({', '.join(_TAKES[name])})`"
    flags = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    if method.__code__.co_flags & flags:
        raise TypeError(f"{owner}.{name} is async or has a yield, so it would never run: {right}")
    signature = inspect.signature(method)
    try:
        signature.bind(*_TAKES[name])
    except TypeError:
        raise TypeError(f"{owner}.{name}{signature} takes other arguments: {right}") from None


class Hooks:
    """Which callbacks override which hook, found out once."""

    def __init__(self, callbacks: Iterable[Callback], activity: Activity | None = None) -> None:
        self.callbacks = tuple(callbacks)
        self._activity = activity or Activity()
        self.error: BaseException | None = None  # what a hook raised
        self.failed_in = ""  # which hook, for messages
        #: Takes what a hook beside a reduction raises, or raises it: other ranks may wait there.
        #: Weak: whoever takes it holds these hooks.
        self.carry: Callable[[], Callable[[Exception], None] | None] = lambda: None
        self._bound: dict[Any, tuple[Callable[..., None], ...]] = {}
        for name in HOOK_NAMES:
            base = vars(Callback)[name]
            overriding = [c for c in self.callbacks if _overrides(c, name)]
            if name == "on_grads_ready":
                overriding.sort(key=lambda callback: not callback.completes_gradients)
            self._bound[base] = tuple(getattr(callback, name) for callback in overriding)
        ends = [c for c in self.callbacks if _overrides(c, "on_step_end")]
        self._prompt = tuple(c.on_step_end for c in ends if not c.late_step_end)
        self._late = tuple(c.on_step_end for c in ends if c.late_step_end)

    def fire(
        self, hook: Callable[Concatenate[Callback, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Calls ``hook``, as ``Callback.on_save``, of all that override it, in the list's order."""
        self._call(_PHASES[hook.__name__], self._bound[hook], *args, **kwargs)

    def fire_step_end(self, context: Context, step: Step, *, late: bool) -> None:
        """Calls ``on_step_end`` of those that may be called late, or of the others."""
        phase = _LATE_STEP_END if late else _PHASES["on_step_end"]
        self._call(phase, self._late if late else self._prompt, context, step)

    def _call(
        self, phase: Phase, methods: tuple[Callable[..., None], ...], *args: Any, **kwargs: Any
    ) -> None:
        self.failed_in = ""
        if not methods:
            return
        before = self._activity.enter(phase)
        try:
            for method in methods:
                method(*args, **kwargs)
                self._activity.enter(phase)
            self._activity.enter(before)
        except BaseException as error:
            self.failed_in = phase.name
            self.error = error
            carry = self.carry()
            if carry is None or phase.name not in _AMID or not isinstance(error, Exception):
                raise
            carry(error)
            self._activity.enter(before)

    def tell(self, context: Context, error: BaseException) -> None:
        """Calls ``on_error`` of all callbacks; what one raises is a note on ``error``."""
        self.error = None  # by its frames it holds these hooks
        accelerator.give_up(error)  # before any of them lets go of what is on the device
        for callback in self.callbacks:
            try:
                callback.on_error(context, error)
            except Exception as another:  # noqa: BLE001 -- must not hide the first error
                error.add_note(f"({callback.name}.on_error raised as well: {another!r})")

    def has(self, hook: Callable[Concatenate[Callback, P], None]) -> bool:
        """Says whether any callback overrides ``hook``."""
        return bool(self._bound[hook])

    def by_name(self) -> dict[str, tuple[str, ...]]:
        """Returns the callbacks' names by hook, in the order in which they are called."""
        names: dict[str, tuple[str, ...]] = {}
        for hook in HOOK_NAMES:
            overriding = tuple(c.name for c in self.callbacks if _overrides(c, hook))
            names |= {hook: overriding} if overriding else {}
        return names

    def come_after_steps(self) -> bool:
        """Says whether any is called, and may log, between a fit's last step and its end."""
        return self.has(Callback.on_epoch_end) or self.has(Callback.on_save)

    def all_ask_for_gradients(self) -> bool:
        """Says whether nobody looks at gradients without having asked for them."""
        looking = (c for c in self.callbacks if _overrides(c, "on_grads_ready"))
        return all(c.asks_for_gradients and not vars(c).get("on_grads_ready") for c in looking)


def _overrides(callback: Callback, name: str) -> bool:
    """Says whether a callback has a hook of its own, be it given to the object only."""
    return getattr(type(callback), name) is not vars(Callback)[name] or name in vars(callback)


def the_only(slot: type[S], callbacks: Iterable[Callback]) -> S | None:
    """Returns the callback that fills ``slot``, or None; raises ConfigError if several do."""
    # By shape, so that the loop knows no concrete callback.
    found = [callback for callback in callbacks if isinstance(callback, slot)]
    if len(found) > 1:
        names = " and ".join(type(callback).__name__ for callback in found)
        what = slot.__name__.removesuffix("Slot").lower()
        raise ConfigError(f"{names} both decide the {what} of this run; keep one of them")
    return found[0] if found else None


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """Returns what is in a list that was given under that name; ConfigError if it is none."""
    if not isinstance(given, Iterable):
        raise ConfigError(f"{name} is {given!r}, and must be a list: `{name}=[...]`")
    return tuple(given)


def check_names(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """Returns them; raises ConfigError where two callbacks share a name, or one is none."""
    seen: dict[str, Callback] = {}
    for callback in listed("callbacks", callbacks):
        if not isinstance(callback, Callback):
            hint = f"; did you mean `{callback.__name__}()`?" if isinstance(callback, type) else ""
            if isinstance(callback, LRScheduler):
                hint = "; did you mean `dtrain.callbacks.LRSchedule(scheduler)`?"
            raise ConfigError(f"callbacks: {callback!r} is no dtrain.Callback{hint}")
        if callback.name in seen:
            raise ConfigError(
                f"two callbacks are named {callback.name!r}; checkpoints could not tell them "
                f"apart. Remove one, or name it: `second.name = '{callback.name}2'`"
            )
        seen[callback.name] = callback
    return tuple(seen.values())


def take_on(callbacks: Iterable[Callback], run: object, *, anew: bool) -> None:
    """Notes in callbacks of which run they are from now on.

    Raises ConfigError where one has state of another run, and this one begins ``anew``. Ranks: all,
    local.
    """
    for callback in callbacks:
        other = vars(callback).get("_run", run) is not run
        if anew and other and (callback.state_dict() or callback.rank_state_dict()):
            raise ConfigError(
                f"{callback.name} was in another Trainer's fit, and holds what it kept there: a "
                "new run would go on with that. Make new callbacks for each Trainer"
            )
        vars(callback)["_run"] = run


def check_monitors(callbacks: Iterable[Callback], sets: Iterable[str], *, evaluates: bool) -> None:
    """Raises ConfigError where a callback is to judge by what cannot be there when it does.

    ``sets`` are what an evaluation's figures begin with: ``eval``, or ``eval/name`` of several.
    """
    callbacks, sets = tuple(callbacks), tuple(sets)
    for place, callback in enumerate(callbacks):
        for name in callback.monitors:
            who = f"{type(callback).__name__}({name!r})"
            if not name.startswith(("train/", "eval/")):
                raise ConfigError(f"{who}: a metric's name begins with 'train/' or 'eval/'")
            if name.startswith("train/"):
                continue
            if not evaluates:
                off = " and eval_every: with eval_every=None nothing is evaluated" * bool(sets)
                raise ConfigError(f"{who} needs fit(eval_set=...){off}")
            others = callbacks[:place] + callbacks[place + 1 :]
            if not (name.startswith(tuple(f"{one}/" for one in sets)) or any(map(_adds, others))):
                raise ConfigError(f"{who}: the evaluation's metrics are {'/..., '.join(sets)}/...")
            judges = type(callback).on_eval_end is not Callback.on_eval_end
            for later in callbacks[place + 1 :] if judges else ():
                adds = {f"{one}/{added}" for one in sets for added in later.adds}
                if name in adds | _added_by(later):
                    raise ConfigError(
                        f"{who} stands before {later.name} in callbacks=[...], which adds this "
                        "metric: put it after that"
                    )


def _adds(callback: Callback) -> bool:
    """Says whether it may add metrics to an evaluation; dtrain's own do not."""
    hook = type(callback).on_eval_end
    is_own = getattr(hook, "__module__", "").startswith("dtrain.callbacks.")
    return hook is not Callback.on_eval_end and not is_own


def _added_by(callback: Callback) -> set[str]:
    """Returns what its ``on_eval_end`` adds by ``metrics["name"] = ...``, as its code shows."""
    code = getattr(type(callback).on_eval_end, "__code__", None)
    pairs = pairwise(dis.get_instructions(code)) if code is not None else ()
    return {
        key.argval
        for key, store in pairs
        if (key.opname, store.opname) == ("LOAD_CONST", "STORE_SUBSCR")
    }


def weights_of(
    callbacks: Iterable[Callback], which: CountAs, *, ended: bool = True
) -> tuple[str, Mapping[str, Tensor]]:
    """Returns whose weights count as ``which``, and these; two of nothing for the model's own.

    Before a fit has ``ended``, those that are final only do not count yet.
    """
    found = [(callback, held) for callback in callbacks if (held := callback.weights(which))]
    if which == "final":
        running = [one for one in found if one[0].weights("evaluated")]
        at_end = [one for one in found if not one[0].weights("evaluated")]
        found = (at_end if ended else []) or running
    return (found[-1][0].name, found[-1][1]) if found else ("", {})
