"""The whole state of a run, as it goes into a checkpoint and comes out of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.callback import Callback, CountAs, take_on, weights_of
from dtrain.checkpoint import format as files
from dtrain.checkpoint import tree
from dtrain.checkpoint.fits import Fits
from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.optimizer_state import (
    Group,
    arrange,
    check_override,
    differences,
    groups_of,
    place,
    put_override,
)
from dtrain.checkpoint.status import renamed
from dtrain.checkpoint.stored import fill_shards
from dtrain.checkpoint.writer import Content
from dtrain.context import Context, Progress, kind_of
from dtrain.distributed import (
    World,
    digest_of,
    digests,
    load_named,
    named_parameters,
    named_state,
    random_state,
    random_state_of_host,
    restore_random_state,
    shapes_of,
    some_of,
    unsharded,
)
from dtrain.errors import CheckpointError, ConfigError

_PROGRESS = ("step", "updates", "epoch", "step_in_epoch", "samples")
#: As what weights may count in a checkpoint, wherever in the run it was made.
AS_SAVED: tuple[CountAs, ...] = ("evaluated", "averaged", "best")


class _HasState(Protocol):
    name: str

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class CheckpointSlot(Protocol):
    """Fills the checkpoint slot: when to save and what to keep."""

    background: bool  # training goes on while a checkpoint is written
    trainable_only: bool  # a checkpoint may lack weights that were never trained

    def select(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what to save of the model's state, by plain name; equal on all ranks."""

    def due_after_step(self, progress: Progress) -> bool:
        """Says whether this step is to be saved; equal on all ranks, must not communicate."""

    def due_after_epoch(self, progress: Progress) -> bool:
        """The same, asked after an epoch and its evaluation."""

    def due_for(self, kind: Literal["eval", "epoch"], figures: Mapping[str, float]) -> bool:
        """The same, told the figures of an evaluation, or the means of an epoch, as they come."""

    def prune(self, saved: list[tuple[int, dict[str, float]]]) -> list[int]:
        """Returns the steps to delete, given each saved step (oldest first) and its own metrics.

        Ranks: rank 0 only; perhaps in a thread beside the training.
        """


@runtime_checkable
class BestSlot(Protocol):
    """Says also by which metric a checkpoint is the best, if it does."""

    best_by: tuple[str, str] | None  # its name, and "min" or "max"


@dataclass
class RunState:
    """Collects and restores what a run is in the middle of.

    Restoring goes in two parts: the model and the progress before ``on_fit_start``, in which
    callbacks look at them; all else after it, because a scheduler that is made there changes
    the optimizer.
    """

    context: Context
    precision: _HasState
    callbacks: tuple[Callback, ...]
    world: World
    config: dict[str, Any]  # the user's settings
    slot: CheckpointSlot | None
    # What must be the same for the run to be continued.
    fingerprint: dict[str, Any] = field(default_factory=dict)
    # The optimizer's groups, with the values that are in force before any schedule.
    groups: list[Group] = field(default_factory=list)
    override: Mapping[str, Any] = field(default_factory=dict)  # of the optimizer's, by ``fit``
    fits: Fits = field(default_factory=Fits)  # that the run has had
    _mark: object = field(default_factory=object)  # that callbacks bear: no reference to the run

    def describe(self, data: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Returns what of the run is compared when it is continued. Ranks: all, local."""
        return {
            "model": digest_of(shapes_of(self.context.model)),
            "optimizer": kind_of(self.context.optimizer),
            "callbacks": [callback.name for callback in self.callbacks],
            "precision": self.precision.name,
            **data,
            "seed": seed,
        }

    def begin(self, *, live: bool, resumes: bool) -> None:
        """Notes what the optimizer was made with, and sets in it what ``fit`` was told to."""
        take_on(self.callbacks, self._mark, anew=not (live or resumes))
        now, override = groups_of(self.context.optimizer, self.context.model), self.override
        check_override(override, now)
        if live:  # schedules have changed values since: what was noted is in force
            by_names = {tuple(group["params"]): group for group in self.groups}
            now = [by_names.get(tuple(group["params"]), group) for group in now]
        self.groups = now
        if not resumes:  # else in what was saved
            in_force, lines = differences(now, now, override)
            optimizer = self.context.optimizer
            put_override(override, optimizer.param_groups, now, begun=bool(optimizer.state))
            self._tell(in_force, lines)

    def note_groups(self) -> None:
        """Notes what values the optimizer has now, before schedules. Ranks: all, local."""
        self.groups = groups_of(self.context.optimizer, self.context.model)

    def _tell(self, in_force: dict[str, Any], lines: list[str]) -> None:
        self.config = self.config | in_force
        for line in lines:
            self.context.say(line)

    def take(
        self,
        loop: dict[str, Any],
        data: dict[str, Any] | None,
        *,
        device_is_well: bool = True,
        ended: bool = False,
    ) -> Content:
        """Returns what a checkpoint of the run must hold; nothing is copied yet.

        ``loop`` and ``data`` are the states of the loop and of this rank's stream of data. Where
        the device is not well, no more of it is touched than names. Once ``fit`` has ``ended``,
        other weights may count.
        """
        context, held, last = self.context, self._held(), None
        if ended and (reason := loop["stop_reason"]):
            last = self.fits.as_ended(context.progress, reason, context.metrics)
        capture = random_state if device_is_well else random_state_of_host
        own = {c.name: state for c in self.callbacks if (state := c.rank_state_dict())}
        return Content(
            step=context.progress.step,
            model=_tensors_in(held),
            state=tree.split(
                {
                    "optimizer": context.optimizer.state_dict(),
                    "groups": self.groups,
                    "precision": self.precision.state_dict(),
                    "callbacks": {c.name: c.state_dict() for c in self.callbacks},
                    "progress": {name: getattr(context.progress, name) for name in _PROGRESS},
                    "fits": self.fits.as_text(last),
                    "loop": loop,
                    "shared_rng": context.shared_rng.get_state(),
                    "metrics": context.metrics,
                    # What modules return from get_extra_state, if that is no tensor.
                    "extra": {n: v for n, v in held.items() if not isinstance(v, Tensor)},
                    "config": self.config,
                    "fingerprint": self.fingerprint,
                    "weights": self._weights(ended),  # last: tensors are named where they first are
                }
            ),
            rank_state=tree.split(
                {
                    "rng": capture(),
                    "own_rng": context.rng.get_state(),
                    "data": data,
                    "callbacks": own,
                }
            ),
            metrics=context._figures_of_this_step(),
        )

    def bulk(self) -> Callable[[], Content | None]:
        """Returns what another thread may ask for most of what a checkpoint will hold.

        It is None until a step is done: before that, an optimizer has no state.
        """
        context, began = self.context, self.context.progress.step
        model = _tensors_in(self._held())

        def look() -> Content | None:
            if context.progress.step == began:
                return None
            every = (one.values() for one in list(context.optimizer.state.values()))
            tensors = [t for held in every for t in list(held) if isinstance(t, Tensor)]
            for which in AS_SAVED:
                tensors += weights_of(self.callbacks, which)[1].values()
            once = {str(number): t for number, t in enumerate({id(t): t for t in tensors}.values())}
            return Content(began, model, tree.Split({}, once), tree.Split({}, {}), {})

        return look

    def _held(self) -> dict[str, Any]:
        """Returns what is kept of the model's state, by plain name."""
        model = self.context.model
        return named_state(model) if self.slot is None else self.slot.select(model)

    def digests(self, content: Content) -> dict[str, str]:
        """Returns a digest of each state in ``content`` that is to be equal on all ranks. Local."""
        plain, tensors = content.state
        parts = {f"callbacks/{name}": state for name, state in plain["callbacks"].items()}
        parts |= {f"extra/{name}": state for name, state in plain["extra"].items()}
        found = {}
        for path, state in parts.items():
            mine = (t for name, t in tensors.items() if f"{name}/".startswith(f"{path}/"))
            held = digests(unsharded(mine))  # of others each rank has rows of its own
            found[path] = digest_of([json.dumps(state, sort_keys=True), held])
        return found

    def differing(self, mine: Mapping[str, str]) -> list[str]:
        """Returns whose state is not equal on all ranks, of which ``mine`` are this one's digests.

        Ranks: all, communicates.
        """
        by_rank = self.world.comm.gather_objects("states of callbacks, by name", dict(mine))
        paths = {path: None for one in by_rank for path in one}
        return [
            path.partition("/")[2] for path in paths if len({one.get(path) for one in by_rank}) > 1
        ]

    def _weights(self, ended: bool) -> dict[str, Any]:
        """Returns whose weights count as what, and where among ``held`` these are."""
        counts = {"final": weights_of(self.callbacks, "final", ended=ended)}
        counts |= {which: weights_of(self.callbacks, which) for which in AS_SAVED}
        held: dict[str, Mapping[str, Tensor]] = {}  # by what they first counted as
        whose: dict[str, list[str]] = {}
        for which, (name, weights) in counts.items():
            if name:
                place = next((at for at, known in held.items() if known is weights), which)
                held[place], whose[which] = weights, [name, place]
        return {
            "whose": whose,
            "held": {place: self._with_ties(weights) for place, weights in held.items()},
            "best_by": None if self.best_by is None else [*self.best_by],
        }

    def _with_ties(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns weights under each name of their parameters, as the model's own are saved."""
        names: dict[int, list[str]] = {}
        for name, p in named_parameters(self.context.model, remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        held = [(tied, name) for tied in names.values() for name in tied if name in weights]
        return {other: weights[name] for tied, name in held for other in tied} | dict(weights)

    @property
    def best_by(self) -> tuple[str, str] | None:
        """By which metric a checkpoint is the best, and whether the least or the most."""
        return self.slot.best_by if isinstance(self.slot, BestSlot) else None

    def restore(self, saved: Saved, *, weights: bool) -> dict[str, Any]:
        """Restores progress and (but where ``weights`` is False) parameters and buffers.

        Returns the rest, for :meth:`restore_rest`.
        """
        state = files.load_state(saved.path, optimizer=False)
        run = str(saved.path.parent.parent)
        there, here = state.get("groups"), self.groups
        state["optimizer"], state["groups"] = arrange(state["optimizer"], there, here, run)
        if there is None:  # compared with the optimizer once schedules are made, as it was saved
            self.groups = []
        if weights:
            self.restore_weights(saved, state.get("extra", {}))
        self.restore_progress(state)
        return state

    def restore_weights(
        self, saved: Saved, extra: Mapping[str, Any], *, over: bool = False
    ) -> None:
        """Restores the model: as training goes on; or, once a fit is over, as that has left it."""
        tensors: dict[str, Any] = files.load_model(saved.path) | dict(extra)
        tensors |= fill_shards(self.context.model, files.stored_model(saved.path))
        if over:
            tensors |= files.load_held(saved.path, "final")
        missing = [name for name in named_state(self.context.model) if name not in tensors]
        if missing and not (self.slot is not None and self.slot.trainable_only):
            raise CheckpointError(
                f"{saved.path} lacks {len(missing)} of the model's tensors, such as {missing[0]}: "
                "it was made with Checkpoint(trainable_only=True). Pass that again, and load the "
                "base model before fit."
            )
        load_named(self.context.model, tensors, strict=not missing)

    def restore_progress(self, state: Mapping[str, Any]) -> None:
        """Takes up how far the run was."""
        for name in _PROGRESS:
            setattr(self.context.progress, name, state["progress"][name])

    def restore_rest(
        self, saved: Saved, state: dict[str, Any], new_rank: Callable[[], None]
    ) -> dict[str, Any] | None:
        """Restores all of ``state`` but the loop; returns what was saved as this rank's ``data``.

        ``new_rank`` is called on a rank that the saved run did not have, to seed its streams.
        """
        context = self.context
        there, here = state["groups"], self.groups or groups_of(context.optimizer, context.model)
        self._tell(*differences(there, here, self.override))
        saved_groups, begun = state["optimizer"]["param_groups"], bool(state["optimizer"]["state"])
        put_override(self.override, saved_groups, there, begun=begun)
        self.groups = there
        place(context.optimizer, state["optimizer"])
        context.optimizer.load_state_dict(state["optimizer"])
        _undo_casts(context.optimizer, state["optimizer"])
        if renamed(state)["fingerprint"].get("precision") == self.fingerprint.get("precision"):
            self.precision.load_state_dict(state["precision"])
        kept = dict(state["callbacks"])
        for callback in self.callbacks:
            if callback.name in kept:
                callback.load_state_dict(kept.pop(callback.name))
        for name in (name for name, held in kept.items() if held):
            context.say(f"{name} is not among the callbacks any more: its state is dropped")
        context.shared_rng.set_state(state["shared_rng"])
        context.metrics.update(state["metrics"])
        context._take(saved.metrics)  # of these weights: another save at this step holds them, too
        # Ranks that compute the same samples (tensor parallel) have left the same.
        of_rank = context.data_rank * state["loop"].get("each", 1)
        mine = files.load_rank_state(saved.path, of_rank)
        if mine is None:
            new_rank()
            return None
        own = mine.get("callbacks", {})
        if own and (ranks := state["loop"]["ranks"]) != context.data_size:  # rank 0 says it
            context.say(
                f"the checkpoint is of {ranks} ranks, not of {context.data_size}: of what "
                f"{some_of([*own])} kept for each, a rank takes up what the rank of its number left"
            )
        for callback in self.callbacks:
            if callback.name in own:
                callback.load_rank_state_dict(own[callback.name])
        restore_random_state(mine["rng"])
        context.rng.set_state(mine["own_rng"])
        data: dict[str, Any] | None = mine["data"]
        return data


def _tensors_in(held: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _undo_casts(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Gives an optimizer's state the dtypes that were saved, and its parameters' memory format.

    ``Optimizer.load_state_dict`` casts all state to the dtype of its parameter: masks, counts,
    and what is kept in float32 beside bfloat16. And files hold contiguous tensors only.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        state = optimizer.state.get(p, {})
        for name, value in saved["state"].get(number, {}).items():
            if not isinstance(value, Tensor) or not isinstance(state.get(name), Tensor):
                continue
            if value.dtype != state[name].dtype:
                state[name] = value.to(state[name].device)
            if value.shape == p.shape and state[name].stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(state[name])


def json_values(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the user's settings as a dict of JSON values."""
    try:
        # Through JSON and back: what is kept is what can be read again.
        values: object = json.loads(json.dumps(config if config is not None else {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Trainer(config=...) must hold JSON values only: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Trainer(config=...) must be a dict, not {type(config).__name__}")
    return values
