"""Each of these fails where one small line of the source is changed that nothing else missed."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny

import dtrain
from dtrain.callbacks import Checkpoint, NonFiniteGuard
from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.data import streams
from dtrain.errors import RunTaken
from dtrain.testing import run_processes, run_ranks


def steps_in(run_dir):
    return [one.step for one in files.listed(run_dir / "checkpoints")]


class AsksToSave(dtrain.Callback):
    """Asks on one rank, in a hook whose requests are carried by the step's reduction."""

    def __init__(self, rank):
        self.rank = rank

    def on_step_start(self, ctx, step):
        if dtrain.init().rank == self.rank and step.number == 2:
            ctx.request.save("planted")


def ask_to_save(run_dir):
    callbacks = [Checkpoint(every_epochs=10), AsksToSave(dtrain.init(seed=0).size - 1)]
    trainer = tiny.trainer(callbacks, run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, epochs=2, log_every=100)
    return trainer._files.saver.failures


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_asked_for_in_a_step_is_made_after_that_step(tmp_path, world_size):
    assert run_ranks(ask_to_save, world_size, tmp_path) == [0] * world_size
    assert steps_in(tmp_path) == [3, 12]


@pytest.mark.parametrize(
    ("mode", "kept"), [("min", 2), ("max", 3)], ids=["less is better", "more is better"]
)
def test_the_best_is_kept_by_its_mode(mode, kept):
    values = {1: 0.5, 2: 0.25, 3: 0.75, 4: 0.5}
    saved = [(step, {"eval/loss": value}) for step, value in values.items()]
    dropped = Checkpoint(keep=1, best="eval/loss", mode=mode).prune(saved)
    assert sorted(set(values) - set(dropped)) == [kept, 4]


class Evaluations(dtrain.Callback):
    """Notes when the run evaluates; may be interrupted after the last checkpoint of its plan."""

    def __init__(self, interrupted):
        self.at, self.interrupted = [], interrupted

    def on_eval_start(self, ctx):
        self.at.append(ctx.progress.step)

    def on_epoch_end(self, ctx):
        if self.interrupted and ctx.progress.epoch == 1:
            raise KeyboardInterrupt


def evaluated_again(run_dir):
    data = {"batch_size": 16, "epochs": 2, "eval_set": tiny.dataset(samples=32)}
    found = []
    for interrupted in (True, False):
        evaluations = Evaluations(interrupted)
        saves = Checkpoint(background=False)
        trainer = tiny.trainer([saves, evaluations], run_dir=run_dir)
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            trainer.fit(tiny.dataset(), **data)
        found.append(evaluations.at)
    return found


def test_the_last_evaluation_is_not_made_again_after_a_resume(tmp_path):
    assert run_ranks(evaluated_again, 1, tmp_path) == [[[6, 12], []]]


def full_disk(run_dir):
    attempts, real = [], disk.write

    def write(file, parts):
        if file.suffix != ".safetensors":
            return real(file, parts)
        attempts.append(file)
        raise OSError(28, "No space left on device")

    disk.write = write
    said = []

    class Keeps(dtrain.Sink):
        def open(self, run_dir):
            pass

        def write(self, report):
            said.append(report.text)

        def close(self):
            pass

    dtrain.init(seed=0)
    saves = Checkpoint(every_steps=6, background=False)
    trainer = dtrain.Trainer(
        tiny.model(), tiny.adam, tiny.loss_fn, callbacks=[saves], sinks=[Keeps()], run_dir=run_dir
    )
    with pytest.raises(dtrain.CheckpointError):
        trainer.fit(tiny.dataset(), batch_size=16, max_steps=10, log_every=1)
    return len(attempts), [text for text in said if "Training goes on" in text]


def test_a_disk_that_stays_full_is_tried_once_more_and_then_when_due(tmp_path):
    [(attempts, said)] = run_processes(full_disk, 1, tmp_path)
    # At step 6, soon after, and twice at the end: not at each of the reports between.
    assert attempts == 4
    assert [text.rpartition(" tried again ")[2] for text in said] == [
        "soon.",
        "when the next one is due.",
        "now.",  # the run's last, which ends it
    ]


def test_who_was_overtaken_leaves_the_status_alone(tmp_path):
    class Overtakes(dtrain.Callback):
        def on_epoch_end(self, ctx):
            token = tmp_path / ".writer"
            token.write_text(token.read_text().replace('"token": "', '"token": "other'))

    trainer = tiny.trainer([Overtakes()], run_dir=tmp_path)
    with pytest.raises(RunTaken):
        trainer.fit(tiny.dataset(), batch_size=16, epochs=1)
    assert '"running"' in (tmp_path / "status.json").read_text()


def nan_at(step):
    def loss_fn(net, batch, ctx):
        loss = tiny.loss_fn(net, batch)
        bad = ctx.progress.step == step
        return dtrain.Loss(loss.mean * (float("nan") if bad else 1.0), metrics=loss.metrics)

    return loss_fn


def report_of(step):
    reports = []

    class Keeps(dtrain.Sink):
        def open(self, run_dir):
            pass

        def write(self, report):
            reports.append(report)

        def close(self):
            pass

    dtrain.init(seed=0)
    record = tiny.Record()
    trainer = dtrain.Trainer(
        tiny.model(),
        tiny.adam,
        nan_at(step),
        callbacks=[NonFiniteGuard("skip"), record],
        sinks=[Keeps()],
    )
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=6, log_every=6)
    means = [report.values["train/loss"] for report in reports if report.kind == "train"]
    return record.losses, means


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_left_out_for_its_loss_is_not_in_the_reports(world_size):
    results = run_ranks(report_of, world_size, 2)
    [reported] = results[0][1]  # sinks write on rank 0 only
    for losses, _ in results:
        assert [loss == loss for loss in losses] == [True, True, False, True, True, True]
        left = [loss for loss in losses if loss == loss]
        assert reported == pytest.approx(sum(left) / 5)


def test_a_checkpoints_name_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    events = []
    real_sync, real_rename = disk.sync, Path.rename

    def sync(path):
        if path.is_dir():
            events.append(("sync", path.name))
        real_sync(path)

    def rename(path, target):
        events.append(("rename", Path(target).name))
        return real_rename(path, target)

    monkeypatch.setattr(disk, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    saves = Checkpoint(every_steps=6, keep=1, background=False)
    trainer = tiny.trainer([saves], run_dir=tmp_path)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=12)
    of_checkpoints = [event for event in events if event != ("sync", tmp_path.name)]
    place = of_checkpoints.index(("rename", "step-00000012"))
    after = of_checkpoints[place + 1 :]
    assert after[0] == ("sync", "checkpoints")
    assert after[1] == ("rename", ".removing-step-00000006")


def test_a_batch_that_is_held_was_not_given():
    current = streams._Pass(iter(["a", "b", "c"]), None, None, None)
    current.begin(0)
    assert current.next() == "a"
    assert not current.ends_before(0)  # "b" is held, for whoever comes next
    assert current.place(None)["batches"] == 1
    assert current.next() == "b"
    assert current.place(None)["batches"] == 2


def test_fsync_reaches_the_folder(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    disk.sync(tmp_path)
    disk.write_bytes(tmp_path / "file", b"content")
    assert synced == [str(tmp_path), str(tmp_path / "file")]
