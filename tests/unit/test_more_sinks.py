"""CSV, TensorBoard and Weights & Biases: what was written is read back."""

import csv
import functools
import importlib.machinery
import importlib.util
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.context.outbox import Shown
from dtrain.errors import ConfigError
from dtrain.sinks.console import Console
from dtrain.sinks.csv_file import CSV
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.json_lines import JSONLines
from dtrain.sinks.sink import Report, Sink
from dtrain.sinks.tensorboard import TensorBoard
from dtrain.sinks.wandb import WandB
from dtrain.testing import run_processes

HEADER = "step,epoch,kind,seconds,samples"
INF = float("inf")


def write_all(sink: Sink, run_dir: Path, *reports: Report) -> None:
    sink.open(run_dir)
    for report in reports:
        sink.write(report)
    sink.close()


def train(step: int, /, **values: float) -> Report:
    return Report("train", step, 0, values or {"loss": 0.5}, seconds=1.5, samples=8 * step)


def start(step: int = 0, **config: Any) -> Report:
    return Report("start", step, 0, config=config)


def test_importing_the_sinks_imports_no_other_package() -> None:
    code = (
        "import sys, dtrain.sinks, dtrain.sinks.csv_file, dtrain.sinks.tensorboard, "
        "dtrain.sinks.wandb\n"
        "found = {'tensorboard', 'torch.utils.tensorboard', 'wandb'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_sink_takes_on_error() -> None:
    for sink in (Console, JSONLines, CSV, TensorBoard):
        assert sink().on_error == "warn"
        assert sink(on_error="raise").on_error == "raise"


# --------------------------------------------------------------------------------------------- CSV


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_a_row_for_each_report_and_a_column_for_each_value(tmp_path: Path) -> None:
    write_all(
        CSV(),
        tmp_path,
        start(),
        Report("train", 50, 1, {"train/loss": 0.1, "lr": 1e-3}, seconds=7.25, samples=3200),
        Report("message", 50, 1, text="saved"),
        Report("eval", 50, 1, {"eval/loss": 1.0}, seconds=8.0, samples=3200),
        Report("train", 100, 2, {"train/loss": 1 / 3}, seconds=9.0, samples=6400),
        Report("end", 100, 2),
    )
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == (
        f"{HEADER},train/loss,lr,eval/loss\n"
        "50,1,train,7.25,3200,0.1,0.001,\n"
        "50,1,eval,8.0,3200,,,1.0\n"
        "100,2,train,9.0,6400,0.3333333333333333,,\n"
    )
    assert float(rows(tmp_path / "metrics.csv")[2]["train/loss"]) == 1 / 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    sink = CSV("tables/figures.csv")
    sink.open(tmp_path)
    sink.write(train(1))
    assert [row["step"] for row in rows(tmp_path / "tables" / "figures.csv")] == ["1"]
    sink.close()
    sink.close()


def test_csv_values_that_are_not_finite_and_names_that_need_quotes(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": INF, "c": -INF, 'say "x", y': 1.0, "größe": 2.0}
    write_all(CSV(), tmp_path, start(), train(1, **values))
    (row,) = rows(tmp_path / "metrics.csv")
    assert [row[name] for name in "abc"] == ["nan", "inf", "-inf"]
    assert (row['say "x", y'], row["größe"]) == ("1.0", "2.0")


def test_csv_a_value_cannot_take_the_place_of_the_step(tmp_path: Path) -> None:
    write_all(CSV(), tmp_path, start(), train(7, step=1.0, kind=2.0, loss=3.0))
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "7", "epoch": "0", "kind": "train", "seconds": "1.5", "samples": "56"}
        | {"loss": "3.0"}
    ]


def test_csv_steps_taken_again_are_dropped_and_columns_kept(tmp_path: Path) -> None:
    write_all(CSV(), tmp_path, start(), train(10), train(20, loss=1.0, new=2.0), train(30))
    write_all(CSV(), tmp_path, start(20), train(30, other=4.0))
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == (
        f"{HEADER},loss,new,other\n"
        "10,0,train,1.5,80,0.5,,\n"
        "20,0,train,1.5,160,1.0,2.0,\n"
        "30,0,train,1.5,240,,,4.0\n"
    )


@pytest.mark.parametrize("cut", [1, 4, 20])
def test_csv_a_torn_last_row_is_dropped(tmp_path: Path, cut: int) -> None:
    write_all(CSV(), tmp_path, start(), train(1), train(2), train(3))
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    write_all(CSV(), tmp_path, start(2), train(3, loss=0.25))
    assert [(row["step"], row["loss"]) for row in rows(path)] == [
        ("1", "0.5"),
        ("2", "0.5"),
        ("3", "0.25"),
    ]


@pytest.mark.parametrize("text", ["", "step,epo", f"{HEADER},loss"])
def test_csv_a_file_without_a_whole_header_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    write_all(CSV(), tmp_path, start(), train(1))
    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["0.5"]


def test_csv_another_programs_table_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("name,age\nada,36\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"metrics\.csv is there, with other columns \(name, age"):
        CSV().open(tmp_path)
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == "name,age\nada,36\n"


def test_csv_a_row_that_says_no_step_stays(tmp_path: Path) -> None:
    text = f"{HEADER}\n# by hand,,,,\n9,0,train,1.0,8\n"
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    write_all(CSV(), tmp_path, start(5))
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["# by hand"]


def test_csv_a_kill_while_a_column_is_added_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    sink = CSV()
    sink.open(tmp_path)
    sink.write(train(1))
    before = (tmp_path / "metrics.csv").read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sink.write(train(2, new=1.0))
    sink.close()
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == before
    write_all(CSV(), tmp_path, start(1), train(2, new=1.0))  # the next start does it
    assert [row["new"] for row in rows(tmp_path / "metrics.csv")] == ["", "1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_needs_a_folder_and_to_be_opened() -> None:
    with pytest.raises(ConfigError, match=r"^CSV writes metrics\.csv into the run's folder, and"):
        CSV().open(None)
    with pytest.raises(RuntimeError, match=r"^CSV\.write\(\) was called before open\(\)$"):
        CSV().write(train(1))


# ------------------------------------------------------------------------------------- TensorBoard


def load(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in load(folder).Scalars(name)]


def test_tensorboard_scalars(tmp_path: Path) -> None:
    sink = TensorBoard()
    sink.open(tmp_path)
    sink.write(start())
    sink.write(train(10, **{"train/loss": 0.5, "lr": 0.25}))
    sink.write(Report("eval", 10, 0, {"eval/loss": 2.0}))
    sink.write(train(20, **{"train/loss": INF}))
    folder = tmp_path / "tensorboard"
    assert scalars(folder, "train/loss") == [(10, 0.5), (20, INF)]  # before it is closed
    sink.write(train(30, **{"train/loss": 0.25}))
    assert scalars(folder, "train/loss") == [(10, 0.5), (20, INF), (30, 0.25)]
    sink.write(Report("end", 20, 1))
    sink.close()
    sink.close()
    assert scalars(folder, "lr") == [(10, 0.25)]
    assert scalars(folder, "eval/loss") == [(10, 2.0)]
    assert len(list(folder.iterdir())) == 1


def test_tensorboard_hides_steps_taken_again(tmp_path: Path) -> None:
    write_all(TensorBoard("tb"), tmp_path, start(), train(10), train(20), train(30))
    write_all(TensorBoard("tb"), tmp_path, start(20), train(30, loss=0.25), train(40, loss=0.125))
    assert scalars(tmp_path / "tb", "loss") == [(10, 0.5), (20, 0.5), (30, 0.25), (40, 0.125)]


def test_tensorboard_hides_all_of_a_run_that_begins_again(tmp_path: Path) -> None:
    write_all(TensorBoard(), tmp_path, start(), Report("eval", 0, 0, {"loss": 9.0}), train(10))
    write_all(TensorBoard(), tmp_path, start(), Report("eval", 0, 0, {"loss": 8.0}))
    assert scalars(tmp_path / "tensorboard", "loss") == [(0, 8.0)]


def test_tensorboard_settings_are_hyper_parameters(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = {"lr": 0.5, "model": {"depth": 3, "sizes": [1, 2]}, "fast": True, "note": "x"}
    write_all(TensorBoard(), tmp_path, start(**config), train(1), Report("end", 1, 1))
    found = load(tmp_path / "tensorboard")
    texts = found.Tensors("config/text_summary")
    assert json.loads(texts[0].tensor_proto.string_val[0].decode().strip("`json\n")) == config
    told = {}
    for tag in ("session_start_info", "session_end_info"):
        metadata = found.summary_metadata[f"_hparams_/{tag}"]
        data = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        told[tag] = getattr(data, tag)
    given = told["session_start_info"].hparams
    assert given["lr"].number_value == 0.5
    assert given["model.depth"].number_value == 3
    assert given["model.sizes"].string_value == "[1, 2]"
    assert given["fast"].number_value == 1
    assert given["note"].string_value == "x"
    assert told["session_end_info"].status == 1  # STATUS_SUCCESS


def test_tensorboard_texts_and_pictures(tmp_path: Path) -> None:
    colour = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    gray = colour[..., 0]
    shown = [Shown("cat", image=colour), Shown("gray", image=gray), Shown("says", text="hello <b>")]
    samples = [Report("sample", 7, 0, text=one.text, sample=one) for one in shown]
    write_all(TensorBoard(), tmp_path, start(), *samples)
    found = load(tmp_path / "tensorboard")
    (cat,) = found.Images("cat")
    assert cat.step == 7
    np.testing.assert_array_equal(Image.open(io.BytesIO(cat.encoded_image_string)), colour)
    pixels = np.asarray(Image.open(io.BytesIO(found.Images("gray")[0].encoded_image_string)))
    np.testing.assert_array_equal(pixels[..., 0] if pixels.ndim == 3 else pixels, gray)
    (says,) = found.Tensors("says/text_summary")
    assert (says.step, says.tensor_proto.string_val[0]) == (7, b"hello <b>")


def test_tensorboard_needs_a_folder_and_to_be_opened() -> None:
    with pytest.raises(ConfigError, match=r"^TensorBoard writes tensorboard/ into the run's fol"):
        TensorBoard().open(None)
    with pytest.raises(RuntimeError, match=r"^TensorBoard\.write\(\) was called before open\(\)$"):
        TensorBoard().write(train(1))


@pytest.mark.parametrize("as_folder", [False, True], ids=["nothing", "a folder of that name"])
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, as_folder: bool) -> None:
    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, None) if as_folder else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigError, match=r"pip install dtrain\[tensorboard\]$"):
        TensorBoard()
    with pytest.raises(ConfigError, match=r"pip install dtrain\[wandb\]$"):
        WandB("digits")


# ------------------------------------------------------------------------------------------- wandb


def wandb_records(run_dir: Path) -> list[list[Any]]:
    """The records of each offline run in ``run_dir``, in the order of their making.

    A ``.wandb`` file is a LevelDB log: after a header, blocks of 32 KiB with parts of records,
    each with checksum, length and whether it is the whole record (1), its begin or its end (4).
    """
    from wandb.proto import wandb_internal_pb2

    every = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=_made):
        data = path.read_bytes()
        assert data[:4] == b":W&B"
        records, record, at = [], b"", 7
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                records.append(wandb_internal_pb2.Record.FromString(record))
                record = b""
        every.append(records)
    return every


def _made(path: Path) -> int:
    return path.stat().st_mtime_ns


def history(records: list[Any]) -> list[dict[str, Any]]:
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            found.append({k: json.loads(v) for k, v in row.items() if not k.startswith("_")})
    return found


class Shows(dtrain.Callback):
    def on_eval_start(self, ctx: dtrain.Context) -> None:
        picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
        ctx.show("cat", image=picture)
        ctx.show("says", text="hello <b>")


class Fail(dtrain.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if step.number + 1 == self.at:
            raise ValueError("planned")


def regress(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def train_with_sinks(run_dir: Path, fail_at: int, with_sinks: bool) -> Any:
    dtrain.init(seed=0)
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(2))
    sinks = [
        CSV(on_error="raise"),
        TensorBoard(on_error="raise"),
        WandB("digits", "first", "offline", on_error="raise", tags=["t"]),
    ]
    trainer = dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        regress,
        callbacks=[Checkpoint(every_steps=2), Shows(), Fail(fail_at)],
        sinks=sinks if with_sinks else [],
        run_dir=run_dir,
        config={"lr": 0.1, "model": {"depth": 3}},
    )
    data = TensorDataset(x, x.sum(1, keepdim=True))
    error = ""
    try:
        trainer.fit(data, batch_size=8, epochs=2, eval_set=data, log_every=1)
    except ValueError as caught:
        error = str(caught)
    numpy_stream = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    streams = random.getstate(), numpy_stream, torch.get_rng_state().tolist()
    return error, model.weight.tolist(), streams


def bare_failed_and_continued(folder: Path) -> list[Any]:
    # wandb may take its time to end; what is left behind after it is tested elsewhere.
    Dispatcher.close = functools.partialmethod(Dispatcher.close, timeout_s=50.0)  # type: ignore[method-assign,assignment]
    return [
        train_with_sinks(folder / "bare", 0, False),
        train_with_sinks(folder / "run", 6, True),
        train_with_sinks(folder / "run", 0, True),
    ]


def test_a_real_run_that_fails_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    env = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    ((bare, failed, continued),) = run_processes(bare_failed_and_continued, 1, tmp_path, env=env)
    assert failed[0] == "planned"
    assert continued == bare  # no sink draws from the streams that training draws from
    tmp_path = tmp_path / "run"
    # Six steps, of which the fifth and sixth were taken twice.
    table = rows(tmp_path / "metrics.csv")
    steps = [int(row["step"]) for row in table if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    losses = [float(row["train/loss"]) for row in table if row["kind"] == "train"]
    seen = scalars(tmp_path / "tensorboard", "train/loss")
    assert seen == [(s, np.float32(loss)) for s, loss in zip(steps, losses, strict=True)]
    assert len(load(tmp_path / "tensorboard").Images("cat")) == 2

    before, after = wandb_records(tmp_path)
    kept = (tmp_path / "wandb-id.txt").read_text()
    for records, code in ((before, 1), (after, 0)):
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name, list(run.tags)) == (
            kept,
            "digits",
            "first",
            ["t"],
        )
        settings = {}
        for record in records:
            if record.WhichOneof("record_type") == "config":
                settings |= {u.key: json.loads(u.value_json) for u in record.config.update}
        assert settings["lr"] == 0.1
        assert settings["model"] == {"depth": 3}
        (end,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
        assert end.exit_code == code
    logged = [row for row in history(before) + history(after) if "train/loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 5, 6]
    assert logged[-1]["train/loss"] == losses[-1]
    media = sorted(p.suffix for p in tmp_path.glob("wandb/offline-run-*/files/media/*/*"))
    assert media == [".html", ".html", ".png", ".png"]
    (page, _) = tmp_path.glob("wandb/offline-run-*/files/media/html/*")
    assert "<pre>hello &lt;b&gt;</pre>" in page.read_text()
