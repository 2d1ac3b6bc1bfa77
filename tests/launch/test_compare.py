"""``dtrain compare``: runs that exist, grouped by what they are made of, paired by seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import dtrain
from dtrain.callbacks import ClipGradients
from dtrain.checkpoint import status
from dtrain.cli import app
from dtrain.errors import ConfigError
from dtrain.sinks import CSV, JSONLines
from dtrain.studies import compare_runs

MADE = {"model": "m", "optimizer": "SGD", "callbacks": ["ClipGradients", "EMA"], "samples": 64}


def write(folder, seed, loss, *, state="finished", reason="", config=None, **made):
    """Writes what a run of dtrain leaves in its folder."""
    folder.mkdir(parents=True)
    fingerprint = {**MADE, **made, "seed": seed}
    status.write(folder, status.Status(state, reason, 10, 1, fingerprint))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": step, "seconds": 0.1 * step, "eval/loss": loss} for step in (5, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


LOSSES = [0.51231, 0.49817, 0.53159]


def write_all(folder, name, shift=0.0, **about):
    wiggle = [0.0011, -0.0013, 0.0004] if shift else [0.0, 0.0, 0.0]
    for seed, (loss, more) in enumerate(zip(LOSSES, wiggle, strict=True)):
        write(folder / f"{name}-{seed}", seed, loss + shift + more, **about)
    return [folder / f"{name}-{seed}" for seed in range(3)]


def call(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def names(table):
    return [(row["variant"], row["runs"]) for row in table.rows]


# ---- groups ----------------------------------------------------------------------------------


def test_runs_that_are_made_alike_but_for_the_seed_are_a_group(tmp_path):
    table = compare_runs(
        [
            *write_all(tmp_path, "a", config={"lr": 0.1, "opt": {"wd": 0, "nesterov": True}}),
            *write_all(tmp_path, "b", 0.1, config={"lr": 0.01, "opt": {"wd": 0, "nesterov": True}}),
            *write_all(tmp_path, "c", 0.2, config={"lr": 0.1, "opt": {"wd": 1, "nesterov": True}}),
            *write_all(tmp_path, "d", 0.1, config={"lr": 0.1, "opt": {"wd": 0}}),
        ]
    )
    assert names(table) == [("base", 3), ("lr=0.01", 3), ("opt.wd=1", 3), ("no opt.nesterov", 3)]
    assert table.rows[2]["verdict"] == "worse"
    assert f"lr=0.01 is {tmp_path}/b-0, {tmp_path}/b-1, {tmp_path}/b-2" in table.notes
    assert table.notes[-1].endswith(
        "Arguments of callbacks and of the optimizer are not seen unless they are in the config: "
        "if they differ within a group, name groups"
    )


@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        (["ClipGradients"], "without EMA"),
        (["ClipGradients", "EMA", "EMA"], "with EMA"),
        (["EMA", "ClipGradients"], "callbacks in another order"),
        (["ClipGradients", "SWA"], "without EMA, with SWA"),
    ],
)
def test_groups_are_named_by_their_callbacks(callbacks, name, tmp_path):
    runs = [*write_all(tmp_path, "a"), *write_all(tmp_path, "b", 0.1, callbacks=callbacks)]
    assert names(compare_runs(runs)) == [("base", 3), (name, 3)]


def test_what_differs_from_run_to_run_is_told_and_nothing_is_merged(tmp_path):
    """A date or a path in the config makes each run one of its own."""
    runs = []
    for seed in range(3):
        config = {"started": f"12:0{seed}", "name": f"r{seed}"}
        runs.append(write(tmp_path / f"r{seed}", seed, 0.5 + seed / 7, config=config))
    table = compare_runs(runs)
    assert names(table) == [
        ("base", 1),
        ("started=12:01, name=r1", 1),
        ("started=12:02, name=r2", 1),
    ]
    assert table.notes[-1].startswith("each run is made otherwise, so each is a group of its own")


def test_where_the_files_are_makes_no_group(tmp_path):
    runs = [
        write(
            tmp_path / f"{lr}-{seed}", seed, lr + seed / 7, config={"run_dir": f"{seed}", "lr": lr}
        )
        for lr in (0.1, 0.2)
        for seed in range(2)
    ]
    assert names(compare_runs(runs)) == [("base", 2), ("lr=0.2", 2)]


def test_other_groups_of_one_folder_name_are_not_merged(tmp_path):
    """What differs is within lists: both would be named alike."""
    runs = [
        write(tmp_path / name / "run", 0, number / 3, config={"betas": [0.9, number]})
        for number, name in enumerate("abcd")
    ]
    found = names(compare_runs(runs))
    assert found == [
        ("base", 1),
        ("another betas", 1),
        ("run", 1),
        (f"{tmp_path}/d/run", 1),
    ]


def test_variants_of_studies_are_told_apart_though_their_callbacks_are_named_alike(tmp_path):
    """EMA.decay=0.9 shows in what the study noted alone, and seeds need not be the same."""
    runs = []
    for variant, seeds in {"base": (0, 1), "EMA.decay=0.9": (2, 3)}.items():
        for seed in seeds:
            about = {"variant": variant, "changes": [variant], "seed": seed}
            folder = tmp_path / f"{variant}-{seed}"
            runs.append(write(folder, seed, 0.5 + seed / 7, config={"ablation": about}))
    assert names(compare_runs(runs)) == [("base", 2), ("EMA.decay=0.9", 2)]


def test_one_seed_twice_is_an_error_that_names_both(tmp_path):
    """Where callbacks are named alike and their arguments differ, say."""
    runs = [*write_all(tmp_path, "a"), *write_all(tmp_path, "b", 0.1)]
    with pytest.raises(ConfigError) as caught:
        compare_runs(runs)
    assert str(caught.value) == (
        f"{tmp_path}/a-0 and {tmp_path}/b-0 both have the seed 0, and are made alike as far as can "
        f"be seen ('base'): name groups, such as a={tmp_path}/a-0 b={tmp_path}/b-0"
    )


def test_named_groups_are_what_they_are_said_to_be(tmp_path):
    write_all(tmp_path, "a")
    write_all(tmp_path, "b", 0.1)
    table = compare_runs([f"old={tmp_path}/a-*", f"new={tmp_path}/b-*"])
    assert names(table) == [("old", 3), ("new", 3)]
    assert table.sentences[0].startswith("new: 0.1001 worse (0.0970 to 0.1031), in 3 of 3 seeds")
    assert table.notes == []
    table = compare_runs([f"old={tmp_path}/a-*", f"new={tmp_path}/b-*"], base="new")
    assert table.sentences[0].startswith("old: 0.1001 better")


def test_a_folder_with_an_equals_sign_is_no_name(tmp_path):
    runs = [write(tmp_path / f"lr={lr}", 0, lr, config={"lr": lr}) for lr in (0.1, 0.2)]
    assert names(compare_runs(runs)) == [("base", 1), ("lr=0.2", 1)]


def test_runs_that_failed_or_are_under_way_are_rows(tmp_path):
    runs = write_all(tmp_path, "a")
    for seed, state in enumerate(["failed", "running", "preempted"]):
        folder = tmp_path / f"b{seed}"
        why = "RuntimeError: no\nmore" if state == "failed" else ""
        runs.append(write(folder, seed, 0.5, state=state, reason=why, optimizer="AdamW"))
    table = compare_runs(runs)
    assert table.sentences == [
        "optimizer=AdamW: failed in 1 of 1 seeds, the base in none (RuntimeError: no); nothing is "
        "left to compare"
    ]
    assert table.notes[0] == "2 of 6 runs have not come to their end yet"


# ---- what is refused -------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused(tmp_path):
    runs = write_all(tmp_path, "a")
    other = write(tmp_path / "b", 0, 0.5, optimizer="AdamW")
    empty = tmp_path / "empty"
    empty.mkdir()
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    damaged = write(tmp_path / "damaged", 1, 0.5)
    (damaged / "status.json").write_text('{"status": "fini')
    unset = write(tmp_path / "unset", 1, 0.5)
    (unset / "status.json").write_text('{"status": "failed", "fingerprint": {}}')
    refused = {
        (): "name two runs or more",
        (runs[0],): "name two runs or more",
        (*runs,): "all 3 runs are one group, 'base', made alike but for the seed as far as",
        (f"x={tmp_path}/a-*",): "all 3 runs are one group, 'x': name groups",
        (*runs, empty): f"{empty} holds no run: there is no status.json",
        (*runs, tmp_path / "nowhere"): "nowhere holds no run",
        (*runs, study): f"{study} is a study: compare it by itself, or its runs",
        (*runs, damaged): f"{damaged}/status.json cannot be read",
        (*runs, unset): f"{unset}/status.json tells no seed",
        (*runs, f"x={tmp_path}/zzz-*"): f"no folder is named like {tmp_path}/zzz-*",
        (*runs, f"base={other}"): "base names a group, and would be the name of runs without one",
    }
    for given, words in refused.items():
        with pytest.raises(ConfigError) as caught:
            compare_runs(given)
        assert words in str(caught.value)
    for how, words in {
        "base": "--base nothing: the groups are base, optimizer=AdamW",
        "metric": "is more of 'nothing' better, or less?",
        "at": "at 'nothing': choose final",
        "mode": "mode 'nothing': min",
    }.items():
        with pytest.raises(ConfigError) as caught:
            compare_runs([*runs, other], **{how: "nothing"})
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"no metric 'eval/los'\. Did you mean eval/loss\?"):
        compare_runs([*runs, other], metric="eval/los", mode="min")


# ---- the command -----------------------------------------------------------------------------


def test_the_command(tmp_path):
    groups = [f"a={tmp_path}/a-*", f"b={tmp_path}/b-*"]
    write_all(tmp_path, "a")
    write_all(tmp_path, "b", 0.1)
    table = compare_runs(groups)
    plain = call(*groups)
    assert plain.exit_code == 0
    assert plain.stdout.startswith(str(table).split("±")[0])
    assert table.sentences[0] in plain.stdout
    assert call(*groups, "--markdown").stdout == table.markdown()
    assert json.loads(call(*groups, "--json").stdout) == json.loads(table.json())
    assert call(*groups, "--picture", tmp_path / "x.png").exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_wrong_with_status_2(tmp_path):
    groups = [f"a={tmp_path}/a-*", f"b={tmp_path}/b-*"]
    write_all(tmp_path, "a")
    write_all(tmp_path, "b", 0.1)
    for args, words in {
        (tmp_path / "a-0",): "name two runs or more, or groups of them",
        (tmp_path,): f"{tmp_path} holds no run",
        (*groups, "--picture", f"{tmp_path}/x.what"): "--picture",
        (*groups, "--picture", f"{tmp_path}/no/x.png"): "No such file or directory",
        (*groups, "--mode", "up"): "mode 'up'",
    }.items():
        refused = call(*args)
        assert refused.exit_code == 2
        assert words in refused.stderr
        assert refused.stdout == ""


def test_ascii_terminals_get_ascii(tmp_path):
    write_all(tmp_path, "a")
    write_all(tmp_path, "b", 0.1)
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "compare", f"a={tmp_path}/a-*", f"é={tmp_path}/b-*"],
        env={
            **os.environ,
            "PYTHONIOENCODING": "ascii",
            "PYTHONPATH": str(Path(dtrain.__file__).parents[1]),
        },
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"0.514 +- 0.017" in done.stdout
    assert b"?: 0.1001 worse" in done.stdout


# ---- real runs -------------------------------------------------------------------------------


def train(folder, seed, sink, callbacks):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dtrain.Trainer(
        model, optimizer, loss_fn, callbacks=callbacks, sinks=[sink], run_dir=folder, seed=seed
    ).fit(data, batch_size=16, epochs=2, eval_set=data, log_every=2)
    return folder


@pytest.mark.slow
def test_real_runs(tmp_path):
    runs = [
        train(tmp_path / f"{len(callbacks)}-{seed}", seed, sink(), callbacks)
        for callbacks in ([ClipGradients(max_norm=1e-3)], [])
        for seed, sink in enumerate((JSONLines, CSV, JSONLines))
    ]
    table = compare_runs(runs)
    assert names(table) == [("base", 3), ("without ClipGradients", 3)]
    assert table.pick.metric == "eval/loss"
    assert table.rows[1]["verdict"] == "better"
    assert table.rows[1]["pairs"] == 3
    assert [len(line) for one in table.curves for line in one.lines] == [2] * 6
