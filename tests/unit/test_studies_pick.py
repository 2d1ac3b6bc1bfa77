"""What of each run is compared: the metric, which way is better, and where it is looked at."""

import math

import pytest

from dtrain.errors import ConfigError
from dtrain.sinks import CSV, JSONLines, Report
from dtrain.studies import Pick, Run, check_metric, guess_mode, read_rows

NAN, INF = math.nan, math.inf


def run_of(values, *, every=100, metric="eval/loss", more=0, **about):
    rows = [
        {"step": float(every * n), "seconds": 10.0 * n, "kind": "eval", metric: value}
        for n, value in enumerate(values, 1)
    ]
    rows += [
        {"step": every * len(values) + n, "seconds": 10.0 * len(values) + n, "train/loss": 1.0}
        for n in range(1, more + 1)
    ]
    return Run("base", 0, "finished", rows, **about)


def picked(at, *runs, mode="min", metric="eval/loss"):
    points = Pick(metric, mode, at).points(runs)
    return [None if point is None else point[2] for point in points]


def test_final_is_the_last_there_is():
    assert picked("final", run_of([3, 1, 2]), run_of([3, 1])) == [2, 1]
    assert picked("final", run_of([3, NAN]))[0] is not None
    assert math.isnan(picked("final", run_of([3, NAN]))[0])  # never the last that is a number


def test_best_is_the_best_number_there_is():
    assert picked("best", run_of([3, 1, NAN, 2])) == [1]
    assert picked("best", run_of([3, 1, 2]), mode="max") == [3]
    assert picked("best", run_of([3, -INF, 2])) == [2]
    assert math.isnan(picked("best", run_of([INF, NAN]))[0])


def test_steps_and_time_are_where_all_have_come_to():
    assert picked("steps", run_of([3, 1, 2]), run_of([5, 4])) == [1, 4]
    assert picked("time", run_of([3, 1, 2]), run_of([5, 4], every=500)) == [1, 4]
    assert picked("steps", run_of([3, 1, 2]), run_of([5, 4], every=500)) == [2, None]
    assert picked("steps", run_of([3, 1, 2]), run_of([])) == [2, None]


def test_steps_and_seconds_that_are_asked_for():
    assert picked("steps=200", run_of([3, 1, 2])) == [1]
    assert picked("steps=250", run_of([3, 1, 2])) == [1]
    assert picked("time=10.5", run_of([3, 1, 2])) == [3]
    assert picked("steps=99", run_of([3, 1, 2])) == [None]


def test_a_run_that_never_came_so_far_has_no_value_there():
    """What it has is of an earlier step than that of the others."""
    assert picked("steps=301", run_of([3, 1, 2]), run_of([3, 1, 2], more=1)) == [None, 2]
    assert picked("time=31", run_of([3, 1, 2]), run_of([3, 1, 2], more=1)) == [None, 2]


def test_evaluate_is_what_the_script_saw():
    assert picked("evaluate", run_of([3], evaluated={"eval/loss": 7.0}), run_of([3])) == [7, None]


@pytest.mark.parametrize("at", ["", "last", "steps=", "steps=-1", "final=3", "best=2", "time=x"])
def test_an_unknown_place_is_an_error(at):
    with pytest.raises(ConfigError, match="choose final, best, steps, time, steps=500"):
        Pick("eval/loss", "min", at)


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ConfigError, match="mode 'lower': min"):
        Pick("eval/loss", "lower")


def test_words():
    assert Pick("f1", "max", "steps=500").words == "f1, at 500 steps"
    assert Pick("f1", "max", "time=1.5").words == "f1, at 1.5 seconds"
    assert Pick("f1", "max", "steps").words == "f1, at the last step that all came to"


def test_an_unknown_metric_is_told_with_those_there_are():
    with pytest.raises(ConfigError) as caught:
        check_metric(run_of([1], metric="eval/loss"), Pick("eval/los", "min"))
    assert str(caught.value) == (
        "the run has no metric 'eval/los'. Did you mean eval/loss? There are eval/loss."
    )
    with pytest.raises(ConfigError, match="In fact it has no figures at all"):
        check_metric(run_of([]), Pick("eval/loss", "min"))
    with pytest.raises(ConfigError, match=r"it never calls Trainer\.evaluate after its training"):
        check_metric(run_of([1]), Pick("eval/loss", "min", "evaluate"))
    check_metric(run_of([1]), Pick("eval/loss", "min"))


# ---- which way is better ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [
        "eval/accuracy",
        "top5_acc",
        "val/acc_top1",
        "acc@1",
        "eval/F1",
        "AUROC",
        "val/mIoU",
        "eval-psnr",
        "score",
    ],
)
def test_more_is_better(metric):
    assert guess_mode(metric) == "max"


@pytest.mark.parametrize(
    "metric",
    ["eval/loss", "val_loss", "eval/ppl", "test.rmse", "f1_error", "accuracy_loss", "WER", "nll"],
)
def test_less_is_better(metric):
    assert guess_mode(metric) == "min"


@pytest.mark.parametrize(
    "metric",
    [
        "eval/custom",
        "neg_mse",
        "negative_loss",
        "accuracy_gap",
        "loss_scale",
        "eval/mAP50-95",
        "throughput",
        "lr",
        "",
    ],
)
def test_what_is_not_known_is_asked_for(metric):
    with pytest.raises(ConfigError, match="Say --mode max or --mode min"):
        guess_mode(metric)


# ---- files -----------------------------------------------------------------------------------


def write(sink, folder, reports, *, start=0):
    sink.open(folder)
    sink.write(Report("start", start, 0))
    for step, seconds, values in reports:
        sink.write(Report("train", step, 0, values, seconds=seconds, samples=8 * step))
    sink.close()


SINKS = pytest.mark.parametrize("sink", [JSONLines, CSV])


@SINKS
def test_figures_come_back_as_they_were(sink, tmp_path):
    write(
        sink(),
        tmp_path,
        [
            (10, 0.5, {"train/loss": 0.1 + 0.2}),
            (20, 1.0, {"train/loss": NAN, "lr": 1e-3}),
            (30, 1.5, {"train/loss": -INF, 'a, "b"\u2028c é': 1.0}),
        ],
    )
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["train/loss"] == 0.1 + 0.2
    assert math.isnan(rows[1]["train/loss"])
    assert rows[1]["lr"] == 1e-3
    assert rows[2]["train/loss"] == -INF
    assert rows[2]['a, "b"\u2028c é'] == 1.0
    assert "lr" not in rows[0]
    assert rows[0]["kind"] == "train"


@SINKS
def test_seconds_count_on_over_restarts(sink, tmp_path):
    values = {"train/loss": 1.0}
    write(sink(), tmp_path, [(10, 3.0, values), (20, 6.0, values), (30, 9.0, values)])
    # It goes on from step 20, and what came after is dropped.
    write(sink(), tmp_path, [(30, 2.0, values), (40, 4.0, values)], start=20)
    write(sink(), tmp_path, [(50, 1.0, values)], start=40)
    assert [row["seconds"] for row in read_rows(tmp_path)] == [3, 6, 8, 10, 11]


@SINKS
def test_a_last_line_that_was_cut_short_is_left_out(sink, tmp_path):
    write(sink(), tmp_path, [(10, 1.0, {"loss é": 0.5}), (20, 2.0, {"loss é": 0.123456789})])
    file = tmp_path / sink().filename
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    # Anywhere, within a letter of two bytes too. A number that is cut is another number.
    for cut in range(1, len(lines[-1])):
        file.write_bytes(whole[:-cut])
        rows = read_rows(tmp_path)
        assert [row["loss é"] for row in rows] in ([0.5], [0.5, 0.123456789])


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    write(JSONLines(), tmp_path, [(10, 1.0, {"loss": 0.5}), (20, 2.0, {"loss": 0.4})])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace('{"step": 10', '{"st'))
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 1 is damaged: '\{\"st"):
        read_rows(tmp_path)


def test_a_run_without_figures_has_none(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_rows(tmp_path) == []
