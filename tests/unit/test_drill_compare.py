"""What a drill calls a difference, and which one comes first."""

import json
from dataclasses import asdict

import torch

from dtrain.trials.drill_compare import (
    DrilledRun,
    LastCheckpoint,
    RankRecord,
    StartRecord,
    compare,
    compare_resized,
    tolerance_of,
)
from dtrain.trials.drill_trial import Disturbance, Start, draw, make_trial
from dtrain.trials.records import EventLog


def one_rank(steps, *, samples="abcd", loss=0.5):
    return RankRecord(
        began_at=min(steps),
        samples={step: [f"{step}{letter}" for letter in samples] for step in steps},
        reports={("train", step + 1, 0): {"train/loss": loss + step} for step in steps},
        ended=True,
    )


def a_run(*starts, weight=1.0, count=3, step=4):
    model = {"weight": torch.full((4,), weight), "seen": torch.tensor(count)}
    final = LastCheckpoint(step, model, {"optimizer/lr": 0.1})
    return DrilledRun(tuple(StartRecord(one) for one in starts), final)


def undisturbed():
    return a_run((one_rank(range(4)),))


def test_steps_that_were_taken_twice_alike_are_no_difference():
    assert compare(undisturbed(), a_run((one_rank(range(3)),), (one_rank(range(2, 4)),))) == []


def test_what_comes_first_in_time_is_first():
    drilled = a_run((one_rank([0, 1]),), (one_rank([2, 3], loss=0.75, samples="abdc"),), weight=1.5)
    first, second, *_, last = compare(undisturbed(), drilled)
    assert (first.what, first.step) == ("samples", 3)
    assert first.words == (
        "step 3 consumed other samples after 1 restart: the first that differs is number 3 of the "
        "global batch of 4, and 0 are not of this step at all"
    )
    assert (second.what, second.name, second.step) == ("metric", "train/loss", 3)
    assert second.words == (
        "train/loss of the train report at step 3 is 2.75 after 1 restart; undisturbed it is 2.5 "
        "(off by 2.5e-01)"
    )
    assert last.words == "weight differs in 4 of 4 values, by up to 5.0e-01"


def test_a_step_redone_otherwise_counts_though_its_last_time_was_right():
    drilled = a_run((one_rank([0, 1, 2], loss=0.6),), (one_rank([1, 2, 3]),))
    assert [one.step for one in compare(undisturbed(), drilled)] == [1, 2, 3]


def test_what_was_left_out_is_a_difference():
    words = [one.words for one in compare(undisturbed(), a_run((one_rank([0, 1, 3]),), step=3))]
    assert "step 3 was never done" in words
    assert "train/loss of the train report at step 3 was never reported" in words
    assert "the last checkpoint is of step 3; undisturbed it is of step 4" in words


def test_bits_count_where_values_are_equal():
    found = compare(
        a_run((one_rank(range(4)),), weight=0.0), a_run((one_rank(range(4)),), weight=-0.0)
    )
    assert [one.name for one in found] == ["weight"]


def test_nan_is_equal_to_itself():
    nan = float("nan")
    one = a_run((one_rank(range(4), loss=nan),), weight=nan)
    assert compare(one, a_run((one_rank(range(4), loss=nan),), weight=nan)) == []


def test_the_same_global_batch_on_other_ranks():
    reference = a_run((one_rank(range(4)),))
    halves = tuple(one_rank(range(4), samples=half) for half in ("ab", "cd"))
    assert compare_resized(reference, a_run(halves)) == []
    assert [one.what for one in compare(reference, a_run(halves))] == ["samples"] * 4
    crossed = compare_resized(reference, a_run(halves[::-1]))
    assert [(one.what, one.step) for one in crossed] == [("samples", s) for s in (1, 2, 3, 4)]


def test_law_1_has_a_tolerance_and_no_more():
    reference = undisturbed()
    near = a_run((one_rank(range(4)),), weight=1 + 1e-7)
    far = a_run((one_rank(range(4)),), weight=1 + 1e-5)
    assert compare_resized(reference, near) == []
    (found,) = compare_resized(reference, far)
    assert "of their norm, more than 1e-06; most of it in weight" in found.words
    assert tolerance_of({"a": torch.zeros(1).double()}) == 1e-12


def test_a_rank_that_was_killed_keeps_what_it_told(tmp_path):
    log = EventLog(tmp_path, 0)
    log.tell("began", step=4)
    log.tell("step", step=4, samples=["a"])
    log.tell("report", kind="train", step=5, values={"loss": float("inf")})
    log.tell("report", kind="train", step=5, values={"late": 1.0})
    record = StartRecord.read(tmp_path, 2)
    assert record.main.began_at == 4
    assert record.main.reports == {
        ("train", 5, 0): {"loss": float("inf")},
        ("train", 5, 1): {"late": 1.0},
    }
    assert record.batches() == {}  # the other rank has not done it
    assert not record.finished


def test_disturbances_follow_from_the_seed_and_lie_within_the_run():
    drawn = draw(kills=9, ranks=3, steps=20, save_every=4, seed=5)
    assert drawn == draw(kills=9, ranks=3, steps=20, save_every=4, seed=5)
    assert drawn != draw(kills=9, ranks=3, steps=20, save_every=4, seed=6)
    kinds = [one.kind for one in drawn]
    in_steps = ["kill all", "kill one"] * 4 + ["kill all"]
    in_saves = ["kill writing", "kill renaming"] * 2 + ["kill writing"]
    assert kinds == [*in_steps, *in_saves, "preempt"]
    assert {one.rank for one in drawn if one.kind == "kill writing"} != {0}
    for one in drawn:
        assert 1 <= one.step < 20
        assert 0 <= one.rank < 3
        if one.kind in in_saves:
            assert one.step % 4 == 0
            assert 0 <= one.place < (5 if one.rank == 0 else 2)
        if one.kind == "kill renaming":
            assert (one.rank, one.place) in ((0, 0), (0, 1))


def test_a_start_comes_back_from_json(tmp_path):
    for one in (None, Disturbance("kill writing", step=4, rank=1, place=1)):
        start = Start("somewhere", 20, 4, one)
        assert make_trial(json.loads(json.dumps(asdict(start))), tmp_path).start == start


def padded(steps, *, samples, rows):
    record = one_rank(steps, samples=samples)
    record.rows = {step: [10 * step + row for row in rows] for step in steps}
    return record


def test_other_padding_on_other_ranks_is_no_other_sample():
    reference = a_run((padded(range(4), samples="abcd", rows=range(4)),))
    halves = (
        padded(range(4), samples="aB", rows=[0, 1]),
        padded(range(4), samples="Cd", rows=[2, 3]),
    )
    assert compare_resized(reference, a_run(halves)) == []
    found = compare_resized(reference, a_run(halves[::-1]))
    assert [one.step for one in found] == [1, 2, 3, 4]
    assert found[0].words.endswith(
        "number 1 of the global batch of 4, and 0 are not of this step at all"
    )


def test_what_the_same_samples_hold_is_compared_as_well():
    reference = a_run((padded(range(4), samples="abcd", rows=range(4)),))
    redrawn = padded(range(2, 4), samples="abXd", rows=range(4))
    first, *_ = compare(
        reference, a_run((padded(range(2), samples="abcd", rows=range(4)),), (redrawn,))
    )
    assert first.words == (
        "step 3 consumed the same samples after 1 restart, but what they hold differs, first in "
        "number 3 of the global batch of 4: random numbers of the dataset, say"
    )
