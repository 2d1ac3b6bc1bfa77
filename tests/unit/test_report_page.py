"""`dtrain report`: what is read, how much is drawn, and the page in a real browser."""

import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dtrain
from dtrain.cli import app
from dtrain.errors import ConfigError
from dtrain.report import make_page, read_runs
from dtrain.report.thinning import thinned
from dtrain.sinks import CSV, Journal, JSONLines, Report


def write_all(folder, *reports, sink=Journal):
    one = sink()
    folder.mkdir(exist_ok=True)
    one.open(folder)
    for report in reports:
        one.write(report)
    one.close()
    return folder


def train(step, loss=0.5, **more):
    return Report("train", step, 0, {"train/loss": loss}, seconds=step / 10, **more)


def lines(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


# -- the journal --------------------------------------------------------------------------------


def test_a_journal_has_a_line_for_each_report(tmp_path):
    facts = {"hooks": {"on_save": ["Checkpoint"]}}
    picture = dtrain.sinks.sink.Shown("digits", image=np.full((2, 3), 200, np.uint8))
    write_all(
        tmp_path,
        Report("start", 0, 0, text="hello", config={"lr": 0.1}, facts=facts, total_steps=9),
        train(1, math.nan),
        Report("message", 1, 0, text="skipped"),
        Report("sample", 1, 0, sample=picture),
        Report("end", 2, 1, text="bye"),
    )
    start, figures, message, sample, end = lines(tmp_path)
    assert (start["text"], start["config"], start["facts"]) == ("hello", {"lr": 0.1}, facts)
    assert figures["values"] == {"train/loss": "nan"}
    assert (message["kind"], message["text"], message["step"]) == ("message", "skipped", 1)
    assert sample["sample"]["name"] == "digits"
    assert sample["sample"]["png"].startswith("iVBORw0KGgo")  # a PNG's first bytes
    assert (end["kind"], end["text"]) == ("end", "bye")


def test_a_continued_run_drops_figures_of_steps_taken_again_and_keeps_what_was_told(tmp_path):
    reports = [train(5), train(10), Report("message", 10, 0, text="a skip")]
    write_all(tmp_path, Report("start", 0, 0, text="one"), *reports)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "train", "step"')  # a kill cut it short
    write_all(tmp_path, Report("start", 5, 0, text="two"), train(10, 0.25))
    told = [(one["kind"], one["step"]) for one in lines(tmp_path)]
    assert told == [("start", 0), ("train", 5), ("message", 10), ("start", 5), ("train", 10)]
    assert lines(tmp_path)[-1]["values"] == {"train/loss": 0.25}


# -- thinning -----------------------------------------------------------------------------------


def test_a_short_curve_is_drawn_as_it_is():
    assert thinned([1, 2, 3], [0.5, math.inf, 0.25]) == {
        "of": 3,
        "not_finite": 1,
        "where": [2],
        "step": [1, 2, 3],
        "value": [0.5, None, 0.25],
    }


def test_of_many_points_the_mean_least_and_most_of_each_group_are_kept():
    steps, values = [*range(10)], [0.0, 2.0, 10.0, math.nan, 1.0, 1.0, 3.0, 5.0, 7.0, 7.0]
    curve = thinned(steps, values, most=4)
    assert curve["together"] == 3
    assert curve["step"] == [2, 5, 8, 9]
    assert curve["value"] == [4.0, 1.0, 5.0, 7.0]
    assert curve["least"] == [0.0, 1.0, 3.0, 7.0]
    assert curve["most"] == [10.0, 1.0, 7.0, 7.0]
    assert (curve["of"], curve["not_finite"], curve["where"]) == (10, 1, [3])


def test_one_spike_among_a_hundred_thousand_is_seen():
    values = [1.0] * 100_000
    values[54_321] = 99.0
    curve = thinned([*range(100_000)], values)
    assert len(curve["value"]) <= 800
    assert max(curve["most"]) == 99.0


# -- what is read -------------------------------------------------------------------------------


def test_figures_of_other_sinks_will_do_and_what_is_missing_is_said(tmp_path):
    reports = [Report("start", 0, 0), train(1), train(2, 0.25)]
    found = read_runs(
        [
            write_all(tmp_path / "a", *reports, sink=JSONLines),
            write_all(tmp_path / "b", *reports, sink=CSV),
        ]
    )
    for run, name in zip(found, "ab", strict=True):
        assert run.name == name
        assert run.curves["train/loss"]["value"] == [0.5, 0.25]
        assert "kept no journal" in run.notes[0]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / variant / "seed-0" for variant in ("base", "ema")]
    for folder in folders:
        folder.parent.mkdir()
        write_all(folder, train(1))
    assert [run.name for run in read_runs(folders)] == ["base/seed-0", "ema/seed-0"]


def test_axes_grow_over_restarts_and_epochs_end_with_their_rows(tmp_path):
    epoch = Report("epoch", 4, 0, {"epoch/loss": 0.1}, seconds=0.4, samples=40)
    more = Report("train", 6, 1, {"train/loss": 0.1}, seconds=0.1, samples=60)
    write_all(tmp_path, train(2, samples=20), train(4, samples=40), epoch)
    write_all(tmp_path, Report("start", 4, 1), more)
    (run,) = read_runs([tmp_path])
    assert run.axes["step"] == [2, 4, 6, 6]
    assert run.axes["epoch"] == [0, 1, 1, 1]
    assert run.axes["seconds"] == pytest.approx([0.2, 0.4, 0.5, 0.5])
    assert run.axes["samples"] == [20, 40, 60, 60]


def test_a_folder_without_figures_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"has none of .* sinks=\[Console\(\), Journal\(\)\]"):
        read_runs([tmp_path])
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "nowhere is no folder" in result.output


# -- the page -----------------------------------------------------------------------------------


def look_at(page, folder):
    """Returns the page as a browser has it once all is drawn; no word may be on its console."""
    browser = shutil.which("chromium")
    if browser is None:
        assert "CI" not in os.environ, "no chromium: .ci/run is to install it"
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={folder}/browser", "--window-size=1280,1000"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    seen = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    words = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    assert words == []
    return seen.stdout


class Shows(dtrain.Callback):
    def on_eval_end(self, ctx, metrics):
        ctx.show("text", text="</script><script>alert(1)</script>")
        ctx.show("digit", image=np.eye(8, dtype=np.uint8) * 255)


def fit(folder, lr):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr),
        loss_fn,
        callbacks=[
            dtrain.callbacks.Throughput(),
            dtrain.callbacks.Checkpoint(),
            dtrain.callbacks.GradientStats(),
            Shows(),
        ],
        sinks=[Journal()],
        run_dir=folder,
        config={"lr": lr, "data": {"size": 64}},
        seed=0,
    ).fit(data, batch_size=8, epochs=3, eval_set=data, log_every=2)


def test_two_runs_in_a_browser(tmp_path):
    for name, lr in (("one", 0.1), ("two", 0.01)):
        fit(tmp_path / name, lr)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = tmp_path / "report.html"
    assert re.search(r"report.html: [12]\.\d MB", result.output)
    assert "https://" not in page.read_text().partition('id="library"')[0]
    seen = look_at(page, tmp_path)
    charts = int(re.search(r'data-charts="(\d+)"', seen)[1])
    names = {*re.findall(r"<h3>([^<]+)</h3>", seen)}
    assert {"loss", "lr", "throughput/samples_per_s", "one", "two"} <= names
    cards = seen.split('class="card"')[1:]
    assert len(cards) == charts
    assert all(re.search(r'class="js-line"[^>]* d="M', card) for card in cards)
    assert seen.count('<img src="data:image/png;base64,') == 6
    assert "&lt;/script&gt;" in seen
    settings, _, rest = seen.partition("<h2>Settings</h2>")[2].partition("<h2>")
    assert settings.count('<td class="differs">') == 2  # of the rate, and not of the size
    assert settings.index("lr") < settings.index("data.size")
    assert "<td>on_save</td><td>Checkpoint</td><td>Checkpoint</td>" in rest.replace(' class=""', "")
    assert torch.__version__ in rest
    assert "saved: checkpoints/step-00000024" in rest


def test_a_hundred_thousand_reports_fit_into_five_megabytes(tmp_path):
    row = '{"step": %d, "epoch": 0, "kind": "train", "seconds": %.1f, "samples": %d, %s}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            noisy = 1 / step + (step * 7919 % 1000) / 1e5
            named = ", ".join(f'"train/{n}": {noisy:.9f}' for n in ("loss", "b", "c", "d", "e"))
            file.write(row % (step, step / 50, step * 64, named))
    page = tmp_path / "page.html"
    page.write_text(make_page(read_runs([tmp_path])), encoding="utf-8")
    assert page.stat().st_size < 5_000_000
    seen = look_at(page, tmp_path)
    assert 'data-charts="5"' in seen
    assert "100,000 points, the means of 125 each" in seen


def test_without_plotly_there_is_a_sentence(tmp_path, monkeypatch):
    write_all(tmp_path, train(1))
    monkeypatch.setattr("dtrain.report.page.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install 'dtrain[report]'" in result.output
