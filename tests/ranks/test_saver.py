"""Checkpoints are written beside the training; each rank copies and writes its share."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import accelerate
import pytest
import tiny
import torch

import dtrain
from dtrain.callbacks import EMA, Checkpoint
from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.checkpoint import writer as writing
from dtrain.checkpoint.saver import Saver
from dtrain.errors import RemoteError
from dtrain.testing import run_outcomes, run_processes, run_ranks
from dtrain.watchdog import thread as watchdog

STEPS = 12


def folder_of(run_dir, step):
    return files.place(run_dir / "checkpoints", step)[0]


class Watches(dtrain.Callback):
    """Notes after each step which checkpoints are there, and does something at one step."""

    def __init__(self, run_dir, at=0, do=None):
        self.run_dir, self.at, self.do = run_dir, at, do
        self.there = {}

    def on_step_end(self, ctx, step):
        now = ctx.progress.step
        self.there[now] = [one.step for one in files.listed(self.run_dir / "checkpoints")]
        if now == self.at:
            self.do()


def held_up(run_dir):
    """The disk gives way only once step 7 is over."""
    gate, begun_by = threading.Event(), threading.current_thread()
    main = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    real = disk.write

    def write(file, parts):
        if file.suffix == ".safetensors":
            assert gate.wait(20)
            # Steps go first; but nothing yields to them that they wait for.
            own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            assert own == main + (10 if threading.current_thread() is not begun_by else 0)
        return real(file, parts)

    disk.write = write
    watches = Watches(run_dir, 7, gate.set)
    trainer = tiny.trainer([Checkpoint(every_steps=4), watches], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=STEPS)
    return watches.there, trainer._files.saver.failures


def in_turn(run_dir):
    saves = Checkpoint(every_steps=4, background=False)
    trainer = tiny.trainer([saves, Watches(run_dir)], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=STEPS)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, world_size):
    for there, failures in run_processes(held_up, world_size, tmp_path / "beside"):
        assert [there[step] for step in (4, 5, 6, 7)] == [[]] * 4
        assert there[9][:1] == [4]  # the next one has waited for it
        assert failures == 0
    run_processes(in_turn, world_size, tmp_path / "in turn")
    for step in (4, 8, 12):  # and holds what there was when it was begun
        beside, in_turns = (folder_of(tmp_path / name, step) for name in ("beside", "in turn"))
        for file in sorted(in_turns.iterdir()):
            if file.name != "manifest.json":
                assert (beside / file.name).read_bytes() == file.read_bytes(), file


def overtaken(run_dir):
    """The disk gives way only where the next checkpoint waits for it."""
    gate, order = threading.Event(), []
    real_write, real_finish = writing.write, Saver.finish

    def write(folder, staged, *args, **kwargs):
        if staged.step == 4:
            assert gate.wait(20)
        real_write(folder, staged, *args, **kwargs)
        order.append(f"written {staged.step}")

    def finish(self, *args):
        if order:
            gate.set()
        return real_finish(self, *args)

    class Saves(dtrain.Callback):
        def on_save(self, ctx):
            order.append(f"begun {ctx.progress.step}")

    writing.write, Saver.finish = write, finish
    trainer = tiny.trainer([Checkpoint(every_steps=4), Saves()], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=8)
    return order


def test_a_newer_one_waits_for_an_older_one(tmp_path):
    for order in run_processes(overtaken, 2, tmp_path):
        assert order == ["begun 4", "written 4", "begun 8", "written 8"]


def slow_on_rank_0(run_dir):
    """Rank 0 writes for far longer than a rank may be quiet, but no file takes that long."""
    watchdog.LONG_S, writing.LARGEST_BYTES = 2.0, 512
    real = disk.write

    def write(file, parts):
        if file.suffix == ".safetensors":
            threading.Event().wait(0.7 if dtrain.init(seed=0).rank == 0 else 0)
        return real(file, parts)

    disk.write = write
    saves = [Checkpoint(every_steps=4)]
    trainer = tiny.trainer(saves, run_dir=run_dir, hang_after_s=1.0)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=4)
    return trainer._files.saver.failures


def test_ranks_wait_for_one_that_writes_for_long(tmp_path):
    assert run_processes(slow_on_rank_0, 2, tmp_path) == [0, 0]
    files.check(folder_of(tmp_path, 4))


class PrunesBadly(Checkpoint):
    def prune(self, saved):
        raise TypeError("planted")


def prune_badly(run_dir, background):
    saves = PrunesBadly(every_steps=4, background=background)
    tiny.trainer([saves], run_dir=run_dir).fit(tiny.dataset(), batch_size=16, max_steps=6)


@pytest.mark.parametrize("background", [False, True])
def test_what_fails_on_rank_0_alone_is_told_on_all(tmp_path, background):
    zero, one = run_outcomes(prune_badly, 2, tmp_path, background)
    assert repr(zero.error) == "TypeError('planted')"
    assert isinstance(one.error, RemoteError)
    assert "rank 0" in str(one.error)
    assert "TypeError: planted" in str(one.error)


# ----------------------------------------------------------------------------- shares


def wide(run_dir, part_bytes):
    """Returns the tensors' files that this rank wrote, with their bytes."""
    writing.PART_BYTES = part_bytes
    written = {}
    real = disk.write

    def write(file, parts):
        if file.suffix == ".safetensors":
            written[file.name] = sum(len(part) for part in parts[1:])  # after the header
        return real(file, parts)

    disk.write = write
    torch.manual_seed(3)
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)], torch.nn.Linear(64, 2))
    trainer = tiny.trainer(
        [Checkpoint(every_steps=4), EMA(0.9, use_at_end=False)], net=net, run_dir=run_dir
    )
    trainer.fit(tiny.dataset(features=64), batch_size=16, max_steps=4)
    return written, tiny.digest(net)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_rank_writes_its_share(tmp_path, world_size):
    shares = run_processes(wide, world_size, tmp_path, 4096)
    folder = folder_of(tmp_path, 4)
    every = [name for written, _ in shares for name in written]
    assert sorted(every) == sorted(file.name for file in folder.glob("*.safetensors"))
    sizes = [
        sum(size for name, size in written.items() if not name.startswith("rank-"))
        for written, _ in shares
    ]
    largest = 64 * 64 * 4
    assert max(sizes) - min(sizes) <= 2 * largest, sizes
    assert sum(sizes) > 4 * (8 * (64 * 64 + 64) * 4)  # parameters, two moments, EMA

    # A run of another size takes it up, and so does Hugging Face's library.
    model = torch.nn.Sequential(
        *[torch.nn.Linear(64, 64) for _ in range(8)], torch.nn.Linear(64, 2)
    )
    dtrain.load_model(tmp_path, model)
    assert {tiny.digest(model)} == {digest for _, digest in shares}
    other = torch.nn.Sequential(
        *[torch.nn.Linear(64, 64) for _ in range(8)], torch.nn.Linear(64, 2)
    )
    place = folder if world_size > 1 else folder / "model.safetensors"
    accelerate.load_checkpoint_in_model(other, str(place))
    assert tiny.digest(other) == tiny.digest(model)
    if world_size > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())


def test_a_small_model_is_one_plain_file(tmp_path):
    (zero, _), (one, _) = run_processes(wide, 2, tmp_path, 64 * 2**20)
    assert set(zero) == {"model.safetensors", "rank-00000.safetensors"}
    assert set(one) == {"state.safetensors", "rank-00001.safetensors"}


class OnOneRank(dtrain.Callback):
    """Keeps a tensor on some ranks, of which rank 0's counts."""

    def state_dict(self):
        rank = dtrain.init(seed=0).rank
        return {f"of rank {rank}": torch.full((3,), float(rank))}

    def load_state_dict(self, state):
        self.loaded = state


def unlike(run_dir):
    writing.PART_BYTES = 64
    own = OnOneRank()
    trainer = tiny.trainer([Checkpoint(every_steps=4), own], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=4)
    own = OnOneRank()
    trainer = tiny.trainer([Checkpoint(every_steps=4), own], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=8)
    return {name: tensor.tolist() for name, tensor in own.loaded.items()}


def test_where_ranks_hold_different_things_rank_0_writes_all(tmp_path):
    for world_size, run in ((3, run_processes), (2, run_ranks)):
        run_dir = tmp_path / str(world_size)
        assert run(unlike, world_size, run_dir) == [{"of rank 0": [0.0, 0.0, 0.0]}] * world_size
        names = sorted(file.name for file in folder_of(run_dir, 8).iterdir())
        assert "model.safetensors" in names
        assert sum(name.startswith("rank-") for name in names) == 2 * world_size


# ----------------------------------------------------------------------------- whose step failed


def fail_on(run_dir, failing):
    world = dtrain.init(seed=0)

    def loss(net, batch):
        if world.rank in failing and trainer.context.progress.step == 5:
            raise ValueError("planted")
        return tiny.loss_fn(net, batch)

    real = disk.write

    def write(file, parts):
        if "emergency" in str(file) and file.suffix == ".safetensors":
            (run_dir / f"wrote {file.name} {world.rank}").touch()
        return real(file, parts)

    disk.write = write
    trainer = tiny.trainer([Checkpoint(every_steps=4)], loss=loss, run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=8)


@pytest.mark.parametrize(
    ("failing", "writers"), [([1], [0, 2]), ([0], [1, 2]), ([0, 1, 2], [0, 1, 2])]
)
def test_a_rank_whose_step_failed_writes_no_more_than_its_random_streams(
    tmp_path, failing, writers
):
    outcomes = run_outcomes(fail_on, 3, tmp_path, failing)
    assert all("planted" in str(outcome.error) for outcome in outcomes)
    saved, damage = files.find(tmp_path / "emergency")
    assert (saved.step, damage) == (5, [])
    by = {file.name.split()[1]: int(file.name.split()[2]) for file in tmp_path.glob("wrote *")}
    assert by == {
        "model.safetensors": writers[0],
        "state.safetensors": writers[1],
        "rank-00000.safetensors": 0,
        "rank-00001.safetensors": 1,
        "rank-00002.safetensors": 2,
    }
    assert files.load_state(saved.path)["progress"]["step"] == 5
    assert set(files.load_model(saved.path)) == set(tiny.model().state_dict())


# ----------------------------------------------------------------------------- stuck


def stuck(run_dir):
    """Rank 0's disk hangs; then the run fails, the script looks at that, and ends."""
    world = dtrain.init(seed=0)
    if world.is_main:
        real = disk.write

        def write(file, parts):
            if file.suffix == ".safetensors":
                threading.Event().wait()
            return real(file, parts)

        disk.write = write

    class Fails(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if ctx.progress.step == 6:
                raise ValueError("planted")

    trainer = tiny.trainer([Checkpoint(every_steps=4), Fails()], run_dir=run_dir)
    with pytest.raises(ValueError, match="planted"):
        trainer.fit(tiny.dataset(), batch_size=16, max_steps=8)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_saver
test_saver.stuck(Path("run"))
print("looked at it")
"""


def test_a_process_whose_checkpoint_is_stuck_ends_all_the_same(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "script.py", here, here.parent],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "looked at it\n"), done.stderr
    assert "dtrain: a checkpoint is stuck, and is left; the process ends with 1" in done.stderr
    assert files.find(tmp_path / "run" / "checkpoints") == (None, [])
