"""Callbacks: their hooks, their order, their names and their slots."""

from typing import Any

import pytest

from dtrain import callbacks
from dtrain.callback import HOOK_NAMES, Callback, Hooks, check_names, the_only
from dtrain.callbacks import Checkpoint, EarlyStopping, GradientAccumulation, MixedPrecision
from dtrain.checkpoint import CheckpointSlot
from dtrain.data.shares import AccumulationSlot
from dtrain.errors import ConfigError
from dtrain.step.precision import PrecisionSlot

CTX: Any = object()  # hooks only hand it on
STEP: Any = object()


def test_the_hooks_in_the_order_they_fire() -> None:
    assert HOOK_NAMES == (
        "on_fit_start",
        "on_epoch_start",
        "on_step_start",
        "on_batch",
        "on_loss",
        "on_grads_ready",
        "on_step_end",
        "on_eval_start",
        "on_eval_batch",
        "on_eval_end",
        "on_save",
        "on_epoch_end",
        "on_fit_end",
        "on_error",
    )


@pytest.mark.parametrize(
    ("hook", "hint"),
    [
        ("on_step_ended", "did you mean `on_step_end`? "),
        ("on_train_start", "did you mean `on_eval_start`? |did you mean `on_fit_start`? "),
        ("on_gradients_ready", "did you mean `on_grads_ready`? "),
        ("on_xyz", ""),
    ],
)
def test_a_misspelt_hook_is_refused_when_the_class_is_made(hook: str, hint: str) -> None:
    with pytest.raises(TypeError) as raised:
        type("Mine", (Callback,), {hook: lambda self, ctx: None})
    told = [f"Mine.{hook} is no hook: {h}The hooks are on_fit_start, " for h in hint.split("|")]
    assert any(str(raised.value).startswith(text) for text in told)


def test_what_only_looks_like_a_hook_is_left_alone() -> None:
    class Fine(Callback):
        on_the_way = 3
        once = staticmethod(len)

        def _on_step_ended(self) -> None: ...

        def only_helper(self) -> None: ...

    assert Fine.name == "Fine"


def test_names_are_the_classes_unless_set() -> None:
    class One(Callback): ...

    class Named(Callback):
        name = "other"

    class Heir(Named): ...

    assert (One().name, Named().name, Heir().name) == ("One", "other", "Heir")


def test_names_are_unique() -> None:
    class One(Callback): ...

    class Same(Callback):
        name = "One"

    for pair in ([One(), One()], [One(), Same()]):
        with pytest.raises(ConfigError) as raised:
            check_names(pair)
        assert "two callbacks are named 'One'" in str(raised.value)
        assert "second.name = 'One2'" in str(raised.value)
    second = One()
    second.name = "One2"
    check_names([One(), second])
    check_names([])


@pytest.mark.parametrize("wrong", [print, "Checkpoint", Checkpoint])
def test_what_is_no_callback_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"is no dtrain\.Callback"):
        check_names([wrong])


# ----------------------------------------------------------------------------- Hooks


class Recorder(Callback):
    """Records two of the hooks."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls

    def on_step_end(self, *given: Any) -> None:
        self.calls.append((self.name, "on_step_end", *given))

    def on_eval_end(self, *given: Any) -> None:
        self.calls.append((self.name, "on_eval_end", *given))


class Heir(Recorder):
    """Overrides one of them again, and inherits the other."""

    def on_step_end(self, *given: Any) -> None:
        super().on_step_end(*given)
        self.calls.append((self.name, "again"))


class Failing(Callback):
    def on_step_end(self, ctx: Any, step: Any) -> None:
        raise ValueError("planted")


def test_callbacks_are_called_in_the_order_of_the_list() -> None:
    calls: list[tuple[Any, ...]] = []
    hooks = Hooks([Recorder("b", calls), Heir("c", calls), Callback(), Recorder("a", calls)])
    hooks.fire(Callback.on_step_end, CTX, STEP)
    hooks.fire(Callback.on_eval_end, CTX, {"eval/loss": 1.0})
    hooks.fire(Callback.on_fit_end, CTX)  # nobody's
    assert calls == [
        ("b", "on_step_end", CTX, STEP),
        ("c", "on_step_end", CTX, STEP),
        ("c", "again"),
        ("a", "on_step_end", CTX, STEP),
        ("b", "on_eval_end", CTX, {"eval/loss": 1.0}),
        ("c", "on_eval_end", CTX, {"eval/loss": 1.0}),
        ("a", "on_eval_end", CTX, {"eval/loss": 1.0}),
    ]


def test_a_hook_that_nobody_overrides_is_known_to_be_nobodys() -> None:
    hooks = Hooks([Callback(), Heir("a", [])])
    overridden = {name for name in HOOK_NAMES if hooks.has(vars(Callback)[name])}
    assert overridden == {"on_step_end", "on_eval_end"}
    assert not any(Hooks([]).has(vars(Callback)[name]) for name in HOOK_NAMES)


def test_a_hook_that_nobody_overrides_is_not_called() -> None:
    # Whatever Callback itself did in it would not happen: nothing is bound.
    assert all(bound == () for bound in Hooks([Callback()])._bound.values())


def test_the_hook_that_failed_is_remembered_until_the_next_one_works() -> None:
    calls: list[tuple[Any, ...]] = []
    hooks = Hooks([Recorder("a", calls), Failing(), Recorder("b", calls)])
    assert hooks.failed_in == ""
    with pytest.raises(ValueError, match="planted"):
        hooks.fire(Callback.on_step_end, CTX, STEP)
    assert hooks.failed_in == "on_step_end"
    assert [call[0] for call in calls] == ["a"]  # those after it are not asked
    hooks.fire(Callback.on_eval_end, CTX, {})
    assert hooks.failed_in == ""  # or a later error elsewhere would be put down to this hook


# ----------------------------------------------------------------------------- slots


class OwnCheckpoint(Callback):
    """Fills the slot by its shape alone."""

    background = True
    trainable_only = False

    def select(self, model: Any) -> dict[str, Any]:
        return dict(model.state_dict())

    def due_after_step(self, progress: Any) -> bool:
        return False

    def due_after_epoch(self, progress: Any) -> bool:
        return False

    def due_for(self, kind: Any, figures: Any) -> bool:
        return False

    def prune(self, saved: Any) -> list[int]:
        return []


def test_early_stopping_knows_three_ways_to_count_votes() -> None:
    for vote in ("any", "majority", "all"):
        EarlyStopping(lambda ctx: 0.0, vote=vote)
    with pytest.raises(ConfigError, match="vote='most'"):
        EarlyStopping(lambda ctx: 0.0, vote="most")


def test_accumulation_splits_by_number_or_by_size() -> None:
    assert GradientAccumulation(3).split(8) == [3, 3, 2]
    assert GradientAccumulation(micro_batch_size=3).split(8) == [3, 3, 2]
    assert GradientAccumulation(micro_batch_size=4).split(8) == [4, 4]


@pytest.mark.parametrize(
    ("slot", "one", "another", "what"),
    [
        (PrecisionSlot, MixedPrecision("bf16"), MixedPrecision("fp16"), "precision"),
        (AccumulationSlot, GradientAccumulation(2), GradientAccumulation(3), "accumulation"),
        (CheckpointSlot, Checkpoint(), OwnCheckpoint(), "checkpoint"),
    ],
)
def test_a_slot_is_filled_once(slot: Any, one: Any, another: Any, what: str) -> None:
    assert the_only(slot, []) is None
    assert the_only(slot, [Callback(), one]) is one
    assert the_only(slot, [another, Callback()]) is another
    with pytest.raises(ConfigError) as raised:
        the_only(slot, [one, Callback(), another])
    names = f"{type(one).__name__} and {type(another).__name__}"
    assert str(raised.value) == f"{names} both decide the {what} of this run; keep one of them"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: callbacks.EMA(0.9, every=None), r"EMA\(every=None\): must be 1 or more$"),
        (lambda: callbacks.GradientStats(every=None), r"GradientStats\(every=None\): must be 1"),
        (lambda: callbacks.LossSpikeGuard(window=None), r"\(window=None\): must be 2 or more$"),
        (
            lambda: callbacks.LossSpikeGuard(patience=0),
            r"\(patience=0\): must be 1 or more, or None",
        ),
        (
            lambda: callbacks.NonFiniteGuard(patience=0),
            r"\(patience=0\): must be 1 or more, or None",
        ),
    ],
)
def test_a_count_is_none_only_where_that_means_something(make, told):
    with pytest.raises(ConfigError, match=told):
        make()
    callbacks.NonFiniteGuard(patience=None)
