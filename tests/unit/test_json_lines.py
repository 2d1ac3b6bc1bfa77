"""The file of figures: its lines, and what a resumed run makes of an older file."""

import json
from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.sinks import JSONLines
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.sink import Report


def line(step: int, kind: str = "train") -> str:
    return (
        f'{{"step": {step}, "epoch": 0, "kind": "{kind}", "seconds": 0.0, "samples": 0, '
        f'"{kind}/loss": 0.5}}\n'
    )


def write_all(run_dir: Path, *reports: Report) -> str:
    sink = JSONLines()
    sink.open(run_dir)
    for report in reports:
        sink.write(report)
    sink.close()
    return (run_dir / "metrics.jsonl").read_text(encoding="utf-8")


def train(step: int) -> Report:
    return Report("train", step, 0, {"train/loss": 0.5})


def test_a_line_for_each_train_and_eval_report(tmp_path: Path) -> None:
    values = {"train/loss": 0.8123, "lr": 1e-3}
    text = write_all(
        tmp_path,
        Report("start", 0, 0, text="hello", total_steps=230),
        Report("train", 50, 1, values, seconds=7.25, samples=3200, total_steps=230),
        Report("message", 50, 1, text="saved"),
        Report("eval", 50, 1, {"eval/loss": 1.0}, seconds=8.0, samples=3200),
        Report("end", 50, 2, text="bye"),
    )
    assert text == (
        '{"step": 50, "epoch": 1, "kind": "train", "seconds": 7.25, "samples": 3200, '
        '"train/loss": 0.8123, "lr": 0.001}\n'
        '{"step": 50, "epoch": 1, "kind": "eval", "seconds": 8.0, "samples": 3200, '
        '"eval/loss": 1.0}\n'
    )


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    sink = JSONLines()
    sink.open(tmp_path)
    sink.write(train(1))
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == line(1)
    sink.close()


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1.5}
    text = write_all(tmp_path, Report("train", 1, 0, values))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(text, parse_constant=refuse)
    assert [row[name] for name in "abcd"] == ["nan", "inf", "-inf", 1.5]
    assert float(row["c"]) == float("-inf")


def test_a_value_cannot_take_the_place_of_the_step(tmp_path: Path) -> None:
    text = write_all(tmp_path, Report("train", 7, 0, {"step": 1.0, "größe": 2.0}))
    assert text == (
        '{"step": 7, "epoch": 0, "kind": "train", "seconds": 0.0, "samples": 0, "größe": 2.0}\n'
    )


def test_another_file_name_and_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    sink = JSONLines("logs/figures.jsonl")
    sink.open(tmp_path / "runs" / "first")
    sink.write(train(1))
    sink.close()
    path = tmp_path / "runs" / "first" / "logs" / "figures.jsonl"
    assert path.read_text(encoding="utf-8") == line(1)


def test_a_run_without_a_folder_is_refused_in_plain_words() -> None:
    dispatcher = Dispatcher([JSONLines()], None)
    with pytest.raises(ConfigError) as caught:
        dispatcher.open()
    assert str(caught.value) == (
        "JSONLines writes metrics.jsonl into the run's folder, and this run has none: name one "
        'with Trainer(run_dir="runs/first"), or remove the sink'
    )


def test_write_before_open_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^JSONLines\.write\(\) was called before open\(\)$"):
        JSONLines().write(train(1))


def test_close_without_open_and_twice(tmp_path: Path) -> None:
    sink = JSONLines()
    sink.close()
    sink.open(tmp_path)
    sink.close()
    sink.close()


# --------------------------------------------------------------------------- a file that is there


def test_an_older_file_is_appended_to(tmp_path: Path) -> None:
    write_all(tmp_path, train(1), train(2))
    assert write_all(tmp_path, train(3)) == line(1) + line(2) + line(3)


def test_lines_about_steps_taken_again_are_dropped(tmp_path: Path) -> None:
    old = line(10) + line(20) + line(20, "eval") + line(30) + line(30, "eval") + line(40)
    (tmp_path / "metrics.jsonl").write_text(old, encoding="utf-8")
    text = write_all(tmp_path, Report("start", 20, 0), train(30))
    assert text == line(10) + line(20) + line(20, "eval") + line(30)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_start_that_repeats_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(10) + line(20), encoding="utf-8")
    inode = path.stat().st_ino
    assert write_all(tmp_path, Report("start", 20, 0)) == line(10) + line(20)
    assert path.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_start_from_scratch_drops_what_an_earlier_run_wrote(tmp_path: Path) -> None:
    write_all(tmp_path, train(1), train(2))
    assert write_all(tmp_path, Report("start", 0, 0), train(1)) == line(1)


def test_lines_that_say_no_step_stay(tmp_path: Path) -> None:
    foreign = '{"note": "by hand"}\n# a comment\n{"step": "ten"}\n[1, 2]\n'
    (tmp_path / "metrics.jsonl").write_text(foreign + line(9), encoding="utf-8")
    assert write_all(tmp_path, Report("start", 5, 0)) == foreign


@pytest.mark.parametrize("length", [1, 30, len(line(3)) - 2])
def test_a_torn_last_line_is_dropped(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3)[:length], encoding="utf-8")
    assert write_all(tmp_path, train(3)) == line(1) + line(2) + line(3)


def test_a_last_line_torn_within_a_character_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1).encode() + '{"gr\u00f6'.encode()[:-1])
    assert write_all(tmp_path, train(2)) == line(1) + line(2)


def test_a_torn_line_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ep', encoding="utf-8")
    assert write_all(tmp_path, train(1)) == line(1)


def test_a_torn_line_longer_than_a_block_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + '{"step": 2, "x": "' + "x" * 200_000, encoding="utf-8")
    assert write_all(tmp_path, train(2)) == line(1) + line(2)


def test_a_last_line_that_lacks_only_its_line_feed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2).rstrip("\n"), encoding="utf-8")
    assert write_all(tmp_path, train(3)) == line(1) + line(2) + line(3)


def test_an_empty_file_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert write_all(tmp_path) == ""


def test_a_kill_while_lines_were_dropped_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = line(10) + line(20)
    (tmp_path / "metrics.jsonl").write_text(old, encoding="utf-8")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    sink = JSONLines()
    sink.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sink.write(Report("start", 10, 0))
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == old
    assert write_all(tmp_path, Report("start", 10, 0)) == line(10)  # the next start does it
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
