"""Whether the run in a folder is gone on with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saved import save

from dtrain.checkpoint import status
from dtrain.checkpoint.resume import Asked, Decision, decide, look
from dtrain.checkpoint.status import Status
from dtrain.errors import ConfigError, ResumeError

MAKE_UP = {"model": "abc", "batch size": 64, "callbacks": ["Checkpoint"]}


def old_run(run_dir: Path, state: Any = "running", *, saved: int | None = 30, **more: Any) -> None:
    """A run of 3 epochs and 30 steps, with a checkpoint, unless told otherwise."""
    if saved is not None:
        save(run_dir / "checkpoints", saved)
    facts = {"reason": "all epochs done", "step": 30, "epoch": 3, "fingerprint": MAKE_UP} | more
    status.write(run_dir, Status(state, **facts))


def choose(
    run_dir: Path, mode: Any = "auto", epochs: int | None = 3, max_steps: int | None = None
) -> Decision:
    return asked(run_dir, mode, MAKE_UP, epochs, max_steps)


def asked(
    run_dir: Path, mode: Any, make_up: Any, epochs: int | None, max_steps: int | None = None
) -> Decision:
    """What becomes of a run's only fit."""
    found = look(run_dir, mode)
    if found.saved is None:
        return found
    goes_on, notes = decide(found, make_up, Asked(0, None, epochs, max_steps))
    assert goes_on
    return replace(found, notes=(*found.notes, *notes))


# ----------------------------------------------------------------------------- nothing there


@pytest.mark.parametrize("mode", ["auto", "never"])
@pytest.mark.parametrize("made", [True, False])
def test_where_nothing_is_a_run_begins(tmp_path: Path, mode: str, made: bool) -> None:
    run_dir = tmp_path if made else tmp_path / "none"
    assert choose(run_dir, mode) == Decision(None, ())


def test_must_insists_on_a_run(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=f"there is no run in {tmp_path}"):
        choose(tmp_path, "must")
    old_run(tmp_path, saved=None)
    with pytest.raises(ResumeError, match=f"there is no intact checkpoint in {tmp_path}"):
        choose(tmp_path, "must")


def test_must_says_what_is_damaged(tmp_path: Path) -> None:
    old_run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000030" / "state.json").write_text("{")
    with pytest.raises(ResumeError, match="no intact checkpoint") as raised:
        choose(tmp_path, "must")
    assert "left out, because it is damaged: " in str(raised.value)
    assert "step-00000030/state.json" in str(raised.value)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume='yes': choose one of auto, never, must"):
        choose(tmp_path, "yes")


# ----------------------------------------------------------------------------- unfinished


@pytest.mark.parametrize("mode", ["auto", "must"])
@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
@pytest.mark.parametrize("reason", ["", "all epochs done", "early stopping: no better"])
def test_an_unfinished_run_is_continued(tmp_path: Path, mode: str, state: str, reason: str) -> None:
    old_run(tmp_path, state, saved=20, reason=reason, step=25, epoch=2)
    decision = choose(tmp_path, mode)
    assert decision.saved is not None
    assert decision.saved.step == 20
    (note,) = decision.notes
    assert note == (
        f"continuing at step 20 from {tmp_path}/checkpoints/step-00000020 (the same make-up: "
        "model, batch size, callbacks)"
    )


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    old_run(tmp_path, saved=None)
    assert choose(tmp_path) == Decision(None, ())


def test_one_killed_after_a_fit_of_which_nothing_is_saved_begins_anew(tmp_path: Path) -> None:
    old_run(tmp_path, "finished", saved=None, process="another", over=False)
    assert choose(tmp_path) == Decision(None, ())
    old_run(tmp_path, "finished", saved=None, process="another", over=True)
    with pytest.raises(ResumeError, match="It left no intact checkpoint to go on from"):
        choose(tmp_path)


def test_the_newest_intact_checkpoint_is_taken_and_the_damage_told(tmp_path: Path) -> None:
    old_run(tmp_path, saved=10)
    save(tmp_path / "checkpoints", 20)
    harmed = save(tmp_path / "checkpoints", 30) / "model.safetensors"
    harmed.write_bytes(harmed.read_bytes()[:-1])
    decision = choose(tmp_path)
    assert decision.saved is not None
    assert decision.saved.step == 20
    assert decision.notes[0].startswith(f"left out, because it is damaged: {harmed} has ")
    assert decision.notes[1].startswith("continuing at step 20")


def test_all_damaged_is_told_where_a_run_begins_anew(tmp_path: Path) -> None:
    old_run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000030" / "manifest.json").unlink()
    decision = choose(tmp_path)
    assert decision.saved is None
    (note,) = decision.notes
    assert "manifest.json is missing: the checkpoint is not complete" in note


# ----------------------------------------------------------------------------- finished


@pytest.mark.parametrize(
    ("reason", "epochs", "max_steps", "more"),
    [
        ("all epochs done", 3, None, False),
        ("all epochs done", 2, None, False),
        ("all epochs done", 4, None, True),
        ("all epochs done", 4, 30, False),
        ("all epochs done", 4, 31, True),
        ("all epochs done", 3, 31, False),
        ("all epochs done", None, 30, False),
        ("all epochs done", None, 31, True),
        ("max_steps reached", None, 30, False),
        ("max_steps reached", None, 31, True),
        ("max_steps reached", 4, None, True),
        ("early stopping: eval/loss has not improved 3 times", 3, None, False),
        ("early stopping: eval/loss has not improved 3 times", 4, None, False),
        ("early stopping: eval/loss has not improved 3 times", None, 100, False),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "must"])
def test_a_finished_run_is_continued_by_a_larger_plan_only(
    tmp_path: Path, mode: str, reason: str, epochs: int | None, max_steps: int | None, more: bool
) -> None:
    old_run(tmp_path, "finished", reason=reason)
    if more:
        decision = choose(tmp_path, mode, epochs, max_steps)
        assert decision.saved is not None
        assert decision.saved.step == 30
        return
    with pytest.raises(ResumeError) as raised:
        choose(tmp_path, mode, epochs, max_steps)
    text = str(raised.value)
    assert f"the run in {tmp_path} is finished ({reason}; step 30, 3 epochs)" in text
    for choice in ("another run_dir", "resume='never'"):
        assert choice in text
    # True advice: what stopped by itself is not revived by a larger plan.
    assert ("a larger epochs or max_steps" in text) == (not reason.startswith("early stopping"))
    assert ("load_model" in text) == reason.startswith("early stopping")


@pytest.mark.parametrize("epochs", [3, 9])
def test_a_finished_run_without_checkpoints_is_not_overwritten(tmp_path: Path, epochs: int) -> None:
    old_run(tmp_path, "finished", saved=None)
    with pytest.raises(ResumeError, match="is finished"):
        choose(tmp_path, epochs=epochs)


# ----------------------------------------------------------------------------- another make-up


@pytest.mark.parametrize("state", ["running", "finished"])
def test_another_make_up_is_refused_with_the_differences(tmp_path: Path, state: str) -> None:
    there = {"model": "abd", "batch size": 32, "callbacks": ["Checkpoint", "EarlyStopping"]}
    old_run(tmp_path, state, fingerprint=there)
    with pytest.raises(ResumeError) as raised:
        asked(tmp_path, "auto", MAKE_UP, 9)
    first, *differences, last = str(raised.value).splitlines()
    assert first == f"the run in {tmp_path} is of another make-up:"
    assert differences == [
        "  model: 'abd' there, 'abc' here",
        "  batch size: 32 there, 64 here",
    ]
    assert "another run_dir" in last
    assert "resume='never'" in last


def test_what_may_differ_is_told_and_gone_on_with(tmp_path: Path) -> None:
    there = MAKE_UP | {"callbacks": ["EarlyStopping"], "precision": "bf16", "seed": 1}
    old_run(tmp_path, fingerprint=there)
    here = MAKE_UP | {"precision": "float32", "order": "shuffled", "seed": 1}
    decision = asked(tmp_path, "auto", here, 9)
    assert decision.saved is not None
    # "order" is younger than that run.
    assert decision.notes[0].endswith("(the same make-up: model, batch size, seed)")
    assert decision.notes[1:] == (
        "callbacks: ['EarlyStopping'] there, ['Checkpoint'] here (those here are used)",
        "precision: 'bf16' there, 'float32' here (what is here is used)",
    )


# ----------------------------------------------------------------------------- never


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_never_moves_the_old_run_aside_each_time(tmp_path: Path) -> None:
    for number in (1, 2):
        old_run(tmp_path, "finished", step=number)
        (tmp_path / "metrics.jsonl").touch()
        decision = choose(tmp_path, "never")
        aside = tmp_path / f"before-{number}"
        assert decision == Decision(None, (f"beginning anew; the old run's files are in {aside}",))
        assert names(tmp_path) == [f"before-{n + 1}" for n in range(number)]
        assert names(aside) == ["checkpoints", "metrics.jsonl", "status.json"]
        kept = status.read(aside)
        assert kept is not None
        assert kept.step == number
    # Nothing there any more: nothing is moved.
    assert choose(tmp_path, "never") == Decision(None, ())
    assert names(tmp_path) == ["before-1", "before-2"]
    assert choose(tmp_path, "auto") == Decision(None, ())


def test_never_leaves_no_checkpoint_that_a_later_start_would_find(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 30)  # its status.json was lost
    choose(tmp_path, "never")
    old_run(tmp_path, saved=None)
    assert choose(tmp_path).saved is None


# ----------------------------------------------------------------------------- no status


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"{}", b'{"status": "running", "x": 1}']
)
@pytest.mark.parametrize("mode", ["auto", "must"])
def test_a_status_that_cannot_be_read_is_named(tmp_path: Path, mode: str, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"status\.json cannot be read: .*Delete it"):
        choose(tmp_path, mode)


def test_never_helps_where_the_status_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(b"{")
    choose(tmp_path, "never")
    assert names(tmp_path) == ["before-1"]


@pytest.mark.parametrize("content", [None, b"{", b""])
@pytest.mark.parametrize("mode", ["auto", "must"])
def test_without_a_status_the_checkpoint_says_of_which_run_it_is(
    tmp_path: Path, mode: Any, content: bytes | None
) -> None:
    said = {"progress": {"epoch": 2}, "fingerprint": MAKE_UP}
    save(tmp_path / "checkpoints", 25, state=said)
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    decision = choose(tmp_path, mode)
    assert decision.saved is not None
    assert decision.saved.step == 25
    assert decision.before == Status("running", "", 25, 2, MAKE_UP, updated=decision.before.updated)
    *unreadable, lost, continuing = decision.notes
    assert lost == "there is no status.json to go by: the checkpoint says of which run it is"
    assert "continuing at step 25" in continuing
    assert len(unreadable) == (content is not None)
    # And so another run's is not mixed with this one.
    save(tmp_path / "checkpoints", 26, state=said | {"fingerprint": MAKE_UP | {"batch size": 32}})
    with pytest.raises(ResumeError, match="batch size: 32 there, 64 here"):
        choose(tmp_path, mode)
