"""Law 4: killed, out of disk or damaged at any place, a run goes on from what was whole.

The trainings are real ranks; kills are SIGKILL, and disks are full or read-only in truth.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from saved import save
from torch import nn
from torch.utils.data import TensorDataset
from updating import JOBS, loss_fn

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import disk, tree
from dtrain.checkpoint import format as files
from dtrain.errors import CheckpointError, RemoteError
from dtrain.sinks import JSONLines
from dtrain.sinks.sink import Sink
from dtrain.testing import run_outcomes, run_processes

ROOT = Path(__file__).parents[2]

# ----------------------------------------------------------------------------- file operations

OPERATIONS = ("fsync", "mkdir", "rename", "unlink", "rmdir", "replace")


def before_operations(act):
    """Has ``act(name)`` called before each file operation, and halfway through each write."""

    def wrap(name):
        real = getattr(os, name)

        def wrapped(*args, **kwargs):
            act(name)
            return real(*args, **kwargs)

        setattr(os, name, wrapped)

    def wrap_write(place, name, file_at):
        real = getattr(place, name)

        def wrapped(*args):
            act("write")
            written = real(*args)
            whole = Path(args[file_at]).read_bytes()
            os.truncate(args[file_at], len(whole) // 2)
            act("rest of a write")
            with open(args[file_at], "r+b") as file:
                file.write(whole)
            return written

        setattr(place, name, wrapped)

    for name in OPERATIONS:
        wrap(name)
    wrap_write(disk, "_write_piece", 0)


def kill_before(operation):
    """Has this process killed before its n-th file operation from here on, from 0."""
    left = [operation]

    def act(name):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    before_operations(act)


# ----------------------------------------------------------------------------- a training

EPOCHS, SAMPLES, BATCH = 4, 48, 12
STEPS = EPOCHS * SAMPLES // BATCH
EVERY = 2
HOOKS = (
    "on_fit_start",
    "on_epoch_start",
    "on_step_start",
    "on_batch",
    "on_loss",
    "on_grads_ready",
    "on_step_end",
    "on_eval_end",
    "on_save",
    "on_epoch_end",
)


def harm_once(hook):
    """A hook's method: does the harm in its n-th call in this process."""

    def method(self, ctx, *_):
        if self.hook == hook:
            self.left -= 1
            if self.left < 0:
                self.hook = None
                self.harm(ctx)

    return method


class Harm(dtrain.Callback):
    """Does ``harm(ctx)`` in the n-th call of a hook, on this rank."""

    def __init__(self, name, hook=None, nth=0, harm=None):
        self.name, self.hook, self.left, self.harm = name, hook, nth, harm

    for _name in HOOKS:
        locals()[_name] = harm_once(_name)
    del _name


class Told(Sink):
    """Keeps what a person at the terminal would be told."""

    def __init__(self):
        self.words = []

    def write(self, report):
        if report.kind == "message":
            self.words.append(report.text)


def digest(state):
    plain, tensors = tree.split(state)
    sha = hashlib.sha256(json.dumps(plain).encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def train(run_dir, harms=None, *, cures=None, updates=1, **options):
    """Trains to the end, or to where a rank is harmed; returns what must be equal, bit for bit.

    Args:
        run_dir: where it is, and may go on.
        harms: from rank to (hook, nth call, what, argument).
        cures: the same, of what mends it.
        updates: of a step.
        options: of Checkpoint.
    """
    world = dtrain.init(seed=0)

    def harm(name, planned):
        hook, nth, what, argument = (planned or {}).get(world.rank, (None, 0, None, None))

        def do(ctx):
            if name == "cure":
                trainer._files.saver.finish()  # not before the harm is done
            WAYS[what](ctx, argument)

        return Harm(name, hook, nth, do)

    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 2))
    trainer = dtrain.Trainer(
        net,
        *JOBS[updates],
        eval_fn=loss_fn,
        callbacks=[
            Checkpoint(**{"every_steps": EVERY, "keep": 2} | options),
            harm("harm", harms),
            harm("cure", cures),
        ],
        sinks=[JSONLines(), (told := Told())],
        run_dir=run_dir,
    )
    samples = data()
    result = trainer.fit(samples, batch_size=BATCH, epochs=EPOCHS, eval_set=samples, log_every=2)
    if cures is not None:
        return result.steps, told.words
    return {
        "steps": result.steps,
        "parameters": digest(net.state_dict()),
        "optimizer": digest(trainer.optimizer.state_dict()),
        "metrics": result.metrics,
    }


def kill(ctx, _):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(ctx, operation):
    kill_before(operation)


def fill_disk(ctx, pages_left):
    with open(ctx.run_dir.parent / "ballast", "wb", buffering=0) as ballast:
        stat = os.statvfs(ctx.run_dir)
        ballast.write(bytes(stat.f_bavail * stat.f_frsize))
        with pytest.raises(OSError, match="No space left on device"):
            ballast.write(bytes(4096))
        ballast.truncate(ballast.tell() - 4096 * pages_left)


def make_read_only(ctx, _):
    folder = str(ctx.run_dir / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def limit_files(ctx, limit_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def break_disk(ctx, operation):
    def act(name):
        if name == operation:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_operations(act)


def empty_disk(ctx, _):
    (ctx.run_dir.parent / "ballast").unlink()


WAYS = {
    "kill": kill,
    "kill in save": kill_in_save,
    "fill": fill_disk,
    "read-only": make_read_only,
    "limit": limit_files,
    "EIO": break_disk,
    "empty": empty_disk,
}


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples")} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What an unbroken run on 2 ranks ends with, and its lines of metrics."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ends = run_processes(train, 2, run_dir)
    assert ends[0]["steps"] == STEPS
    return ends, lines(run_dir)


# ----------------------------------------------------------------------------- kills


def draw_harms(rng):
    """Draws who is killed, where."""
    victims = rng.choice([[0], [1], [0, 1]])
    if rng.random() < 0.25:  # among the file operations of the n-th save
        where = ("on_save", rng.randrange(3), "kill in save", rng.randrange(26))
        return {victims[0]: where}
    hook = rng.choice(HOOKS)
    often = hook not in ("on_fit_start", "on_epoch_start", "on_eval_end", "on_epoch_end")
    return dict.fromkeys(victims, (hook, rng.randrange(6) if often else 0, "kill", None))


KILLS = 200 if os.environ.get("DTRAIN_MANY_KILLS") else 20


@pytest.mark.timeout(60 + 8 * KILLS)
def test_random_kills_cost_no_bit(tmp_path, unbroken):
    kill_at_random(tmp_path, train, unbroken, KILLS, hooks_at_least=6)


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_random_kills_of_a_run_with_two_updates_a_step_cost_no_bit(tmp_path):
    training = partial(train, updates=2)
    ends = run_processes(training, 2, tmp_path / "unbroken")
    assert ends[0]["steps"] == STEPS
    kill_at_random(tmp_path, training, (ends, lines(tmp_path / "unbroken")), 5, hooks_at_least=3)


def kill_at_random(tmp_path, train, unbroken, number, hooks_at_least):
    rng = random.Random(20)
    kills, hooks, ends, run = 0, set(), 0, 0
    run_dir = tmp_path / "run-0"
    while kills < number or run_dir.exists():
        harms = draw_harms(rng) if kills < number else {}
        outcomes = run_outcomes(train, 2, run_dir, harms, timeout_s=40)
        codes = [outcome.exitcode for outcome in outcomes]
        if codes == [0, 0]:  # to the end, before or without a kill
            assert [outcome.value for outcome in outcomes] == unbroken[0]
            assert lines(run_dir) == unbroken[1]
            ends, run = ends + 1, run + 1
            run_dir = tmp_path / f"run-{run}"
            continue
        assert -signal.SIGKILL in codes, [o.error for o in outcomes]
        assert {rank for rank, code in enumerate(codes) if code == -signal.SIGKILL} <= set(harms)
        kills += 1
        hooks |= {where[0] for where in harms.values()}
    assert kills == number
    assert ends >= 1
    assert len(hooks) >= hooks_at_least


#: Arguments of an example, and within how many calls of a hook a rank is killed.
EXAMPLES = {"gan": (["--epochs", "1"], 10), "lbfgs": ([], 5)}


def run_example(name, arguments, run_dir, harms):
    """Runs an example as a user would, but for its checkpoints: one in two steps."""
    made = []

    class Trainer(dtrain.Trainer):
        def __init__(self, *given, callbacks=(), sinks=(), **options):
            hook, nth = harms.get(dtrain.init().rank, (None, 0))
            callbacks = [one for one in callbacks if not isinstance(one, Checkpoint)]
            harm = Harm("harm", hook, nth, lambda ctx: kill(ctx, None))
            callbacks += [Checkpoint(every_steps=2, keep=2), harm]
            options["run_dir"] = run_dir
            super().__init__(*given, callbacks=callbacks, sinks=[], **options)
            made.append(self)

    dtrain.Trainer = Trainer  # in a process of its own
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    context = made[-1].context
    return (
        context.progress.step,
        digest(context.model.state_dict()),
        digest(context.optimizer.state_dict()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_that_are_killed_end_with_the_same_bits(tmp_path, name):
    arguments, calls = EXAMPLES[name]
    rng = random.Random(name)
    whole = run_processes(run_example, 2, name, arguments, tmp_path / "whole", {})
    for victim in (0, 1):
        hook = rng.choice(["on_step_start", "on_loss", "on_grads_ready", "on_step_end", "on_save"])
        harms = {victim: (hook, rng.randrange(calls) if hook != "on_save" else rng.randrange(3))}
        outcomes = run_outcomes(run_example, 2, name, arguments, tmp_path / "parts", harms)
        assert outcomes[victim].exitcode == -signal.SIGKILL, (harms, outcomes[victim].error)
    assert run_processes(run_example, 2, name, arguments, tmp_path / "parts", {}) == whole


def two_checkpoints(folder):
    save(folder, 10)
    save(folder, 20)
    return folder


def loads(saved):
    """The step of a checkpoint, once all of it was read; 0 for none."""
    if saved is None:
        return 0
    weight = files.load_model(saved.path)["weight"]
    assert weight.tolist() == [float(saved.step)] * 40
    assert files.load_state(saved.path)["progress"] == [saved.step]
    assert files.load_rank_state(saved.path, 0)["rng"].tolist() == [0, 1, 2, 3]
    return saved.step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leave_things(folder):
    shutil.copytree(folder / "step-00000020", folder / ".writing-step-00000030")
    shutil.copytree(folder / "step-00000020", folder / ".writing-step-00000015")
    (folder / ".writing-step-00000030" / "manifest.json").unlink()
    shutil.copytree(folder / "step-00000010", folder / ".removing-step-00000005")


def stop_between_renames(folder):
    (folder / "step-00000020").rename(folder / ".replaced-step-00000020")
    shutil.copytree(folder / ".replaced-step-00000020", folder / ".writing-step-00000020")


def stop_after_renames(folder):
    shutil.copytree(folder / "step-00000020", folder / ".replaced-step-00000020")
    (folder / ".replaced-step-00000020" / "manifest.json").unlink()


def save_and_remove(folder):
    save(folder, 30)
    files.remove(folder, 10)


#: What is there, what is done, and the newest before and after it.
SAVES = {
    "the first": (lambda f: f.mkdir(), lambda f: save(f, 10), 0, 10),
    "another": (two_checkpoints, lambda f: save(f, 30), 20, 30),
    "the same again": (two_checkpoints, lambda f: save(f, 20), 20, 20),
    "the only one again": (lambda f: save(f, 20), lambda f: save(f, 20), 20, 20),
    "and one removed": (two_checkpoints, save_and_remove, 20, 30),
    "after a kill": (lambda f: leave_things(two_checkpoints(f)), lambda f: save(f, 30), 20, 30),
    "after a kill between renames": (
        lambda f: stop_between_renames(two_checkpoints(f)),
        lambda f: save(f, 30),
        20,
        30,
    ),
    "after a kill after renames": (
        lambda f: stop_after_renames(two_checkpoints(f)),
        lambda f: save(f, 20),
        20,
        20,
    ),
}


def killed(act, operation):
    """Whether a process that does ``act()`` was killed before that operation."""
    child = os.fork()
    if child == 0:
        try:
            kill_before(operation)
            act()
            os._exit(0)
        except BaseException:  # noqa: BLE001 -- a child of a fork must end here
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def kill_at_each_operation(folder):
    """Returns, by kind of save, what was found after each kill, and what a next save left."""
    warnings.simplefilter("ignore", DeprecationWarning)  # fork; of later Pythons
    rows = {}
    for number, (name, (prepare, act, _, _)) in enumerate(SAVES.items()):
        template = folder / f"{number}"
        prepare(template)
        rows[name] = []
        goes_on = True
        while goes_on:
            copy = folder / f"{number}-{len(rows[name])}"
            shutil.copytree(template, copy)
            goes_on = killed(lambda act=act, copy=copy: act(copy), len(rows[name]))
            saved, damage = files.find(copy)
            found = loads(saved)
            save(copy, 40)
            rows[name].append((found, damage, loads(files.find(copy)[0]), names(copy)))
    return rows


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path):
    [rows] = run_processes(kill_at_each_operation, 1, tmp_path)
    assert list(rows) == list(SAVES)
    for name, (_, _, before, after) in SAVES.items():
        found = [row[0] for row in rows[name]]
        assert len(found) > 20, (name, found)  # operations
        assert found == sorted(found), (name, found)
        assert set(found) == {before, after}, (name, found)
        for operation, (_, damage, then, left) in enumerate(rows[name]):
            assert damage == [], (name, operation)
            assert then == 40, (name, operation)
            assert all(one.startswith("step-") for one in left), (name, operation, left)
            assert set(left) >= {f"step-{found[operation]:08d}", "step-00000040"} - {
                "step-00000000"
            }


def save_with_a_kill(folder, victim, operation):
    with dtrain.init() as world:
        if world.rank == victim:
            kill_before(operation)
        save(folder, 30, rank=world.rank, size=2, comm=world.comm)


@pytest.mark.parametrize(("victim", "operations"), [(0, (0, 9, 12, 17)), (1, range(6))])
def test_a_kill_of_one_of_two_ranks_that_save_loses_nothing(tmp_path, victim, operations):
    for operation in operations:
        folder = two_checkpoints(tmp_path / str(operation))
        outcomes = run_outcomes(save_with_a_kill, 2, folder, victim, operation)
        assert outcomes[victim].exitcode == -signal.SIGKILL
        assert outcomes[1 - victim].exitcode == 1
        saved, damage = files.find(folder)
        assert (loads(saved), damage) == (20, []), operation
        save(folder, 40)
        assert names(folder) == ["step-00000010", "step-00000020", "step-00000040"], operation


# ----------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(request, tmp_path):
    """A disk of 1 MiB; a folder where only root may mount one, and the case can do with it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dtrain-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    mounted = done.returncode == 0
    if not mounted:
        assert not os.environ.get("CI"), f"no disk could be mounted: {done.stderr}"
        if request.node.callspec.params["how"] in ("full", "nearly full", "read-only"):
            pytest.skip(f"only root may mount a disk: {done.stderr}")
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


AT_STEP_6 = ("on_save", 2)
DISKS = {
    "full": ({0: (*AT_STEP_6, "fill", 0)}, "No space left on device"),
    "nearly full": ({0: (*AT_STEP_6, "fill", 3)}, "No space left on device"),
    "read-only": ({0: (*AT_STEP_6, "read-only", None)}, "Read-only file system"),
    "full for rank 1": ({1: (*AT_STEP_6, "limit", 3000)}, "File too large"),
    "failing for rank 1": ({1: (*AT_STEP_6, "EIO", "fsync")}, "Input/output error"),
    "failing for rank 0": ({0: (*AT_STEP_6, "EIO", "fsync")}, "Input/output error"),
    "failing at the end": ({0: (*AT_STEP_6, "EIO", "rename")}, "Input/output error"),
}


@pytest.mark.parametrize("how", DISKS)
def test_a_disk_that_fails_for_good_is_an_error_at_the_end_and_costs_no_bit(
    small_disk, unbroken, how
):
    harms, cause = DISKS[how]
    run_dir = small_disk / "run"
    outcomes = run_outcomes(train, 2, run_dir, harms)
    words = f"{run_dir}/checkpoints/step-00000016 could not be written: "
    assert {type(outcome.error) for outcome in outcomes} <= {CheckpointError, RemoteError}
    for outcome in outcomes:
        assert words in str(outcome.error), outcome.trace
        assert cause in str(outcome.error)
        assert outcome.exitcode == 1
    assert CheckpointError in {type(outcome.error) for outcome in outcomes}
    saved, damage = files.find(run_dir / "checkpoints")
    assert (saved.step, damage) == (4, [])

    if how == "read-only":
        subprocess.run(["umount", str(run_dir / "checkpoints")], check=True)
    (small_disk / "ballast").unlink(missing_ok=True)
    assert run_processes(train, 2, run_dir) == unbroken[0]
    assert lines(run_dir) == unbroken[1]
    assert names(run_dir / "checkpoints") == ["step-00000014", "step-00000016"]


RECOVERS = {
    "full": (
        {0: ("on_save", 0, "fill", 0)},
        {0: ("on_step_end", 6, "empty", None)},
        "No space left on device",
    ),
    "full for rank 1": (
        {1: ("on_save", 0, "limit", 3000)},
        {1: ("on_step_end", 6, "limit", resource.RLIM_INFINITY)},
        "File too large",
    ),
}


@pytest.mark.parametrize("how", RECOVERS)
@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_failed_is_told_and_tried_again(small_disk, how, background):
    harms, cures, cause = RECOVERS[how]
    run_dir = small_disk / "run"
    training = partial(train, cures=cures, every_steps=6, keep=3, background=background)
    ends = run_processes(training, 2, run_dir, harms)
    assert [steps for steps, _ in ends] == [STEPS, STEPS]
    told = [words for words in ends[0][1] if "could not be written" in words]
    assert len(told) == 1, ends[0][1]
    assert "step-00000006 could not be written: " in told[0]
    assert cause in told[0]
    assert re.search(r"Training goes on; it is tried again (soon|now)\.$", told[0])
    # Asked for with the report of step 8, which is the end of an epoch: agreed there, too.
    kept = ["step-00000008", "step-00000012", "step-00000016"]
    assert names(run_dir / "checkpoints") == kept


# ----------------------------------------------------------------------------- damage

BLOCK = 4096


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 10 and 20, with files of several blocks."""
    for step in (10, 20):
        generator = torch.Generator().manual_seed(step)
        big = torch.randn(3000, generator=generator)
        save(
            tmp_path,
            step,
            model={"big": big, "0": torch.tensor(step)},
            state={"text": [step / 7 + i for i in range(400)], "m": big[:2000] + 1},
        )
    return tmp_path


def newest_files(folder):
    return sorted((folder / "step-00000020").iterdir())


def assert_told(folder, *named):
    """The newest is found damaged, the damaged file is named, the one before it is used."""
    saved, damage = files.find(folder)
    assert saved is not None, damage
    assert saved.step == 10
    assert len(damage) == 1
    assert any(str(file) in damage[0] for file in named), damage


def test_each_truncation_is_found(folder):
    cuts = 0
    for file in newest_files(folder):
        content = file.read_bytes()
        for size in [*range(0, len(content), BLOCK), len(content) - 1]:
            file.write_bytes(content[:size])
            assert_told(folder, file)
            cuts += 1
        file.write_bytes(content)
    assert cuts >= 16
    assert files.find(folder)[0].step == 20


def test_each_of_10000_flipped_bits_is_found(folder):
    rng = random.Random(10)
    there = newest_files(folder)
    contents = [file.read_bytes() for file in there]
    flipped = set()
    for which in rng.choices(range(len(there)), k=10_000):
        file, content = there[which], contents[which]
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        with file.open("r+b", buffering=0) as handle:
            handle.seek(at)
            handle.write(bytes([content[at] ^ 1 << bit]))
            with pytest.raises(CheckpointError) as found:
                files.check(file.parent)
            assert str(file) in str(found.value), (at, bit)
            handle.seek(at)
            handle.write(content[at : at + 1])
        flipped.add((which, at, bit))
    assert len(flipped) > 7_000
    assert files.find(folder)[0].step == 20


def test_each_zeroed_block_is_found(folder):
    blocks = 0
    for file in newest_files(folder):
        content = file.read_bytes()
        for start in range(0, len(content), 512):
            block = content[start : start + 512]
            if any(block):
                file.write_bytes(content[:start] + bytes(len(block)) + content[start + 512 :])
                assert_told(folder, file)
                blocks += 1
        file.write_bytes(content)
    assert blocks >= 60
    assert files.find(folder)[0].step == 20


def test_files_of_another_checkpoint_are_found(folder):
    there = newest_files(folder)
    different = 0
    for file in there:
        other = folder / "step-00000010" / file.name
        one, two = file.read_bytes(), other.read_bytes()
        if one == two:
            continue  # of a rank's random streams, here
        file.write_bytes(two)
        assert_told(folder, file, file.parent)
        file.write_bytes(one)
        different += 1
    assert different == 4
    assert files.find(folder)[0].step == 20


def test_a_checkpoint_in_the_place_of_another_is_found(folder):
    shutil.rmtree(folder / "step-00000020")
    shutil.copytree(folder / "step-00000010", folder / "step-00000020")
    assert_told(folder, folder / "step-00000020" / "manifest.json")
    assert [saved.step for saved in files.listed(folder)] == [10]


def test_each_missing_file_is_found(folder):
    for file in newest_files(folder):
        content = file.read_bytes()
        file.unlink()
        assert_told(folder, file)
        file.write_bytes(content)
    assert files.find(folder)[0].step == 20


def test_a_file_that_the_disk_cannot_read_is_found(folder, monkeypatch):
    real = hashlib.file_digest
    for bad in newest_files(folder):

        def digest(handle, kind, bad=bad):
            if handle.name == str(bad):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(handle, kind)

        def read_bytes(file, bad=bad):
            if file == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            with file.open("rb") as handle:
                return handle.read()

        monkeypatch.setattr(hashlib, "file_digest", digest)
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        assert_told(folder, bad)
        assert "Input/output error" in files.find(folder)[1][0]


# ----------------------------------------------------------------------------- hostile files


class Bomb:
    """What it is unpickled to calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bombs(marker):
    """Twenty files that would write ``marker`` if anything unpickled them."""
    calls = [
        Bomb(os.system, f"touch {marker}"),
        Bomb(open, str(marker), "w"),
        Bomb(exec, f"open({str(marker)!r}, 'w')"),
        Bomb(eval, f"__import__('os').mkdir({str(marker)!r})"),
    ]
    for bomb in calls:
        for protocol in (0, 2, 4, 5):
            yield pickle.dumps({"state": [bomb], "model": bomb}, protocol)
        torch_file = io.BytesIO()
        torch.save({"weight": bomb}, torch_file)
        yield torch_file.getvalue()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the files that bombs open
def test_a_bomb_would_go_off(tmp_path):
    """The markers of the test below are written by whoever unpickles."""
    for number, bomb in enumerate(bombs(tmp_path / "marker")):
        if number % 5 != 4:
            pickle.loads(bomb)  # noqa: S301 -- to see what it would do
            marker = tmp_path / "marker"
            assert marker.exists()
            marker.rmdir() if marker.is_dir() else marker.unlink()


def forge(path):
    """Makes a manifest that fits whatever the files are now."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    for name in manifest["files"]:
        manifest["files"][name] = {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
    manifest["sha256"] = files._digest_of(manifest)
    file.write_text(json.dumps(manifest))


def read_all(path):
    files.load_model(path)
    files.load_state(path)
    files.load_rank_state(path, 0)


def test_no_pickle_is_ever_executed(folder, tmp_path_factory):
    marker = tmp_path_factory.mktemp("marker") / "executed"
    newest = folder / "step-00000020"
    tried = 0
    for file in newest_files(folder):
        content = file.read_bytes()
        manifest = (newest / "manifest.json").read_bytes()
        for bomb in bombs(marker):
            file.write_bytes(bomb)
            assert_told(folder, file)
            if file.name != "manifest.json":
                forge(newest)
                saved, damage = files.find(folder)
                assert (saved.step, damage) == (20, [])  # nothing is wrong with its sums
                with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
                    read_all(newest)
                (newest / "manifest.json").write_bytes(manifest)
            file.write_bytes(content)
            assert not marker.exists()
            tried += 1
    assert tried == 120
    read_all(newest)


def test_a_run_goes_on_from_the_checkpoint_before_and_executes_nothing(tmp_path, unbroken):
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    harms = dict.fromkeys((0, 1), ("on_step_end", 8, "kill", None))
    killed = run_outcomes(partial(train, background=False), 2, run_dir, harms)
    assert {outcome.exitcode for outcome in killed} == {-signal.SIGKILL}
    newest = run_dir / "checkpoints" / "step-00000008"
    for number, bomb in enumerate(bombs(marker)):
        if number % 7 == 0:
            (newest / "state.json").write_bytes(bomb)
            forge(newest)  # its checksums are right
            outcomes = run_outcomes(train, 2, run_dir)
            for outcome in outcomes:
                assert isinstance(outcome.error, CheckpointError | RemoteError), outcome.trace
                assert f"{newest}/state.json cannot be read" in str(outcome.error)
            assert not marker.exists()
    (newest / "state.json").write_bytes(b"")  # and now they are not
    assert run_processes(train, 2, run_dir) == unbroken[0]
    assert lines(run_dir) == unbroken[1]


@pytest.mark.parametrize(
    "content",
    [
        '{"__tensor__": ["m"]}',
        '{"a": {"__items__": 3}}',
        '{"a": {"__items__": [[1]]}}',
        '{"a": {"__items__": [[{"__items__": []}, 1]]}}',
        '{"a": {"__tuple__": null}}',
        '{"a": {"__tensor__": "none of these"}}',
        "[1, 2]",
        "7",
    ],
)
def test_forged_json_is_refused(folder, content):
    newest = folder / "step-00000020"
    (newest / "state.json").write_text(content)
    forge(newest)
    assert files.find(folder)[0].step == 20
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        files.load_state(newest)


# ----------------------------------------------------------------------------- odd tensors


class Odd(nn.Module):
    """Of every kind: channels_last, tied, 0-dim, empty, bf16, bool and int."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.low = nn.Linear(4, 4).to(torch.bfloat16)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))

    def forward(self, x):
        self.count += 1
        out = self.two(torch.relu(self.one(self.conv(x).mean((2, 3)))))
        return self.scale * out.sum(1) + self.low(out[:, :4].bfloat16()).float().sum(1)


class OddState(torch.optim.AdamW):
    """Has state of dtypes that are not those of the parameters."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", torch.tensor(0)) + 1
                state["mask"] = p.detach() > 0
                exact = p.detach().double() / 3
                state["exact"] = exact
                state["empty"] = torch.zeros(0, dtype=torch.int8)
                state["half"] = p.detach().to(torch.bfloat16)


def odd_loss(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def described(value):
    """Nested state with dtypes, strides and bits."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().flatten().view(torch.uint8).tolist()
        return str(value.dtype), tuple(value.shape), value.stride(), bits
    if isinstance(value, dict):
        return {key: described(one) for key, one in value.items()}
    return [described(one) for one in value] if isinstance(value, list | tuple) else value


class Seen(dtrain.Callback):
    """What model and optimizer are like before the first step taken here."""

    def __init__(self):
        self.model = self.optimizer = None

    def on_step_start(self, ctx, step):
        if self.model is None:
            self.model = described(ctx.model.state_dict())
            self.optimizer = described(ctx.optimizer.state_dict())


def odd_training(run_dir, epochs):
    with dtrain.init(seed=0):
        net = Odd()
        seen = Seen()
        trainer = dtrain.Trainer(
            net,
            OddState(net.parameters(), lr=1e-2),
            odd_loss,
            callbacks=[Checkpoint(every_epochs=1), seen],
            sinks=[],
            run_dir=run_dir,
        )
        generator = torch.Generator().manual_seed(2)
        samples = torch.randn(24, 3, 6, 6, generator=generator)
        trainer.fit(TensorDataset(samples, samples.sum((1, 2, 3))), batch_size=8, epochs=epochs)
        tied = net.one.weight.data_ptr() == net.two.weight.data_ptr()
        end = described(net.state_dict()), described(trainer.optimizer.state_dict())
        return end, (seen.model, seen.optimizer), tied


def test_odd_tensors_come_back_bit_for_bit(tmp_path):
    half, _, _ = odd_training(tmp_path / "run", 2)
    whole, _, _ = odd_training(tmp_path / "whole", 4)
    end, begin, tied = odd_training(tmp_path / "run", 4)
    assert begin == half
    assert end == whole
    assert tied
    assert begin[0]["conv.weight"][2] == (27, 1, 9, 3)  # channels_last
    dtypes = {key: value[0] for key, value in begin[1]["state"][0].items()}
    assert dtypes["mask"] == "torch.bool"
    assert dtypes["exact"] == "torch.float64"
    assert dtypes["seen"] == "torch.int64"


# ----------------------------------------------------------------------------- numbers of ranks


class Ids(dtrain.Callback):
    """Writes down the ids of the samples of every global batch; kills all at a step."""

    def __init__(self, file, kill_at, is_main):
        self.file, self.kill_at, self.is_main = file, kill_at, is_main
        self.mine = []

    def on_batch(self, ctx, step):
        self.mine += step.batch[2].tolist()

    def on_step_end(self, ctx, step):
        gathered = ctx.comm.gather_objects("ids", self.mine)
        self.mine = []
        if self.is_main:
            row = [ctx.progress.step, [number for ids in gathered for number in ids]]
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if ctx.progress.step == self.kill_at:
            ctx.comm.barrier("written")
            os.kill(os.getpid(), signal.SIGKILL)


def train_double(run_dir, kill_at=0):
    world = dtrain.init(seed=0)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, y = data().tensors
    trainer = dtrain.Trainer(
        net,
        lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
        loss_fn,
        callbacks=[Checkpoint(every_steps=2), Ids(run_dir.parent / "ids", kill_at, world.is_main)],
        sinks=[],
        run_dir=run_dir,
    )
    samples = TensorDataset(x.double(), y, torch.arange(SAMPLES))
    trainer.fit(samples, batch_size=10, epochs=3)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def batches(folder):
    """From step to ids; a step that was taken again must have had the same."""
    taken = {}
    for line in (folder / "ids").read_text().splitlines():
        step, ids = json.loads(line)
        assert taken.setdefault(step, ids) == ids
    return taken


def test_ranks_come_and_go_and_no_sample_is_lost(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = run_processes(train_double, 1, tmp_path / "whole" / "run")[0]
    run_dir = tmp_path / "parts" / "run"
    for world_size, kill_at in ((4, 3), (2, 5), (3, 9), (1, 12)):
        outcomes = run_outcomes(train_double, world_size, run_dir, kill_at)
        assert {outcome.exitcode for outcome in outcomes} == {-signal.SIGKILL}
    ends = run_processes(train_double, 4, run_dir)
    taken = batches(tmp_path / "parts")
    assert taken == batches(tmp_path / "whole")
    assert list(taken) == list(range(1, 16))
    for epoch in range(3):
        ids = [number for step in range(5) for number in taken[5 * epoch + step + 1]]
        assert sorted(ids) == list(range(SAMPLES))
    for end in ends:
        assert torch.equal(end, ends[0])
    assert torch.allclose(ends[0], whole, rtol=1e-12, atol=0.0)
