"""A stream goes on where it was: at the next batch, with the same bits as without the break."""

import os
import signal

import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dtrain
from dtrain.callbacks import Checkpoint, GradientAccumulation
from dtrain.data.streams import StreamFeed
from dtrain.errors import ResumeError
from dtrain.testing import run_outcomes, run_processes, run_ranks

EPOCHS = 2
#: Batches of rank 0 and 1 in an epoch.
LENGTHS = (7, 5)
#: Seldom enough that some are skipped, in epochs as short as these.
MARK_EVERY = 3


class Stream:
    """Ready batches, numbered; tells its state, in one of the ways in which streams do that.

    Args:
        kind: ``"from there"``: each pass begins where the state is, which is the beginning once it
            has ended. ``"counts"``: each call of ``iter`` begins a new pass, but for the first
            one after a load. ``"late"``: the same, but found out with the first batch only.
        length: batches in an epoch.
        rank: whose stream it is.
    """

    def __init__(self, kind, length, rank):
        self.kind, self.length, self.rank = kind, length, rank
        self.at = self.asked = self.given = 0
        self.epoch = -1 if kind != "from there" else 0
        # One object each for good, as a careless state_dict hands them out.
        self.buffer, self.count = [], torch.tensor(0)
        self.loaded = False
        self.own = torch.Generator().manual_seed(rank)

    def __iter__(self):
        if self.kind == "counts":
            self.begin()
        return self.batches()

    def begin(self):
        if not self.loaded:
            self.at, self.epoch = 0, self.epoch + 1
        self.loaded = False

    def batches(self):
        if self.kind == "late":
            self.begin()
        while self.at < self.length:
            self.at += 1
            self.given += 1
            self.buffer.append(self.at)
            self.count += 1
            generator = torch.Generator().manual_seed(1000 * self.epoch + 100 * self.rank + self.at)
            x = torch.randn(4, 8, generator=generator)
            x[:, 7] = torch.randn(4, generator=self.own)
            number = torch.full((4,), 100 * self.epoch + self.at)
            yield x, (x[:, 0] > 0).long(), number
        if self.kind == "from there":
            self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self):
        self.asked += 1
        own = self.own.get_state()
        return {
            "at": self.at,
            "epoch": self.epoch,
            "own": own,
            "buffer": self.buffer,
            "filled": len(self.buffer),
            "count": self.count,
        }

    def load_state_dict(self, state):
        assert len(state["buffer"]) == state["filled"] == state["count"].item()
        self.at, self.epoch, self.buffer = state["at"], state["epoch"], state["buffer"]
        self.count = state["count"]
        self.own.set_state(state["own"])
        self.loaded = True


class Plain(IterableDataset):
    """Batches in an order that each pass draws from the global generator; no state."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return self.batches(torch.randperm(self.length).tolist())

    def batches(self, order):
        for number in order:
            # With workers this is drawn in them, seeded when the pass begins.
            yield torch.randn(4, 8), torch.tensor([0, 1, 0, 1]), torch.full((4,), number)


class Said(dtrain.Sink):
    def __init__(self):
        self.said = []

    def write(self, report):
        if report.kind == "message":
            self.said.append(report.text)


class Numbers(dtrain.Callback):
    """Writes down the batches; ends or fails at a step."""

    name = "Numbers"

    def __init__(self, kill_at=0, fail_at=None):
        self.seen = []
        self.kill_at, self.fail_at = kill_at, fail_at

    def on_batch(self, ctx, step):
        self.seen.append(step.batch[2][0].item())

    def on_loss(self, ctx, step):
        if step.number == self.fail_at:
            raise ValueError("planted")

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(run_dir, stream, uneven, *, every=None, micros=1, kill_at=0, fail_at=None, **options):
    """Returns a digest, the steps taken, the batches' numbers, what was said, and the error."""
    import dtrain.data.streams

    dtrain.data.streams.MARK_EVERY = MARK_EVERY
    dtrain.init(seed=0)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 2))
    numbers, said = Numbers(kill_at, fail_at), Said()
    trainer = dtrain.Trainer(
        net,
        tiny.adam,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        callbacks=[
            numbers,
            GradientAccumulation(micros),
            Checkpoint(every_steps=every, background=False),
        ],
        sinks=[said],
        run_dir=run_dir,
    )
    error = None
    try:
        trainer.fit(dtrain.Data(stream, when_uneven=uneven), **({"epochs": EPOCHS} | options))
    except Exception as caught:  # noqa: BLE001 -- looked at by the test
        error = caught
    steps = trainer.context.progress.step
    return tiny.digest(net), steps, numbers.seen, "\n".join(said.said), error


#: By number of ranks: kind, when_uneven, micro-batches.
CASES = {
    1: [("late", "stop", 2), ("from there", "idle", 1)],
    2: [("counts", "stop", 1), ("late", "idle", 2), ("from there", "stop", 1)],
}


def at_every_step(folder):
    """Ends runs at each step, and has a new stream go on; returns what is to be looked at."""
    world = dtrain.init(seed=0)
    length = LENGTHS[world.rank]
    found = []
    for kind, uneven, micros in CASES[world.size]:

        def run(name, kind=kind, uneven=uneven, micros=micros, **options):
            stream = Stream(kind, length, world.rank)
            run_dir = folder / f"{kind} {uneven} {micros} {name}"
            return stream, fit(run_dir, stream, uneven, micros=micros, **options)

        stream, (end, steps, seen, _, error) = run("whole")
        assert error is None, error
        for way in [{"max_steps": step} for step in range(1, steps)] + [{"epochs": 1}]:
            first, (_, _, before, _, error) = run(f"{way}", **way)
            assert error is None, error
            second, (again, _, after, said, error) = run(f"{way}")
            assert error is None, error
            found.append(
                {
                    "case": (kind, uneven, micros, way),
                    "end": again == end,
                    "batches": before + after == seen,
                    "twice": first.given + second.given - stream.given,
                    "said": said,
                }
            )
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_ended_at_any_step_it_goes_on_at_the_next_batch(tmp_path, world_size):
    for found in run_processes(at_every_step, world_size, tmp_path, timeout_s=60):
        assert len(found) > 18
        for one in found:
            _, uneven, micros, way = one["case"]
            assert one["end"], one
            assert one["batches"], one
            assert "skipped" not in one["said"], one
            # What was given since a mark, and the batch that was held; nothing between two steps.
            exact = uneven == "idle" and way.get("max_steps", 9) * micros < min(LENGTHS)
            assert 0 <= one["twice"] <= (0 if exact else MARK_EVERY + micros), one
        assert any(one["twice"] for one in found)


# ----------------------------------------------------------------------------- kills


def kill_one(folder, uneven, kill_at):
    world = dtrain.init(seed=0)
    stream = Stream("counts", LENGTHS[world.rank], world.rank)
    kill_at = kill_at if world.rank == 1 else 0
    return fit(folder / uneven, stream, uneven, every=2, kill_at=kill_at)


def go_on(folder, uneven):
    world = dtrain.init(seed=0)
    length = LENGTHS[world.rank]
    first = fit(folder / uneven, Stream("counts", length, world.rank), uneven, resume="must")
    whole = fit(folder / f"{uneven} whole", Stream("counts", length, world.rank), uneven, every=2)
    assert first[4] is None
    return first[:2] == whole[:2], first[2], whole[2]


@pytest.mark.parametrize(("uneven", "kill_at", "saved"), [("idle", 6, 4), ("stop", 8, 6)])
def test_killed_it_goes_on_with_the_same_bits(tmp_path, uneven, kill_at, saved):
    outcomes = run_outcomes(kill_one, 2, tmp_path, uneven, kill_at, timeout_s=40)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for equal, after, whole in run_processes(go_on, 2, tmp_path, uneven, timeout_s=40):
        assert equal
        assert after == whole[-len(after) :]
        assert len(after) == len(whole) - saved


# ----------------------------------------------------------------------------- emergencies


def fail_and_go_on(folder):
    """Fails in steps of the first epoch, on each rank; returns what went on from there."""
    world = dtrain.init(seed=0)
    found = []
    for kind, uneven, micros in [("counts", "idle", 2), ("late", "stop", 1)]:

        def run(name, kind=kind, uneven=uneven, micros=micros, **options):
            stream = Stream(kind, LENGTHS[world.rank], world.rank)
            return fit(folder / f"{uneven} {name}", stream, uneven, micros=micros, **options)

        seen = run("whole")[2]
        for failing in range(world.size):
            for step in range(2, (5 if uneven == "stop" else LENGTHS[failing]) // micros):
                mine = step if failing == world.rank else None
                name = f"{step} {failing}"
                _, _, before, _, error = run(name, fail_at=mine)
                _, _, after, said, error_again = run(name, resume="emergency")
                start = len(seen) - len(after)
                found.append(
                    {
                        "case": (uneven, step, failing),
                        "error": str(error),
                        "again": error_again,
                        "said": said,
                        # It begins with the batches of the step that failed.
                        "batches": after == seen[start:] and start <= len(before),
                        "start": start,
                        "expected": min(step * micros, LENGTHS[world.rank]),
                    }
                )
    return found


def test_an_emergency_goes_on_with_the_step_that_failed(tmp_path):
    for found in run_processes(fail_and_go_on, 2, tmp_path, timeout_s=60):
        assert len(found) == 1 + 0 + 2 * 3
        for one in found:
            assert "planted" in one["error"], one
            assert one["again"] is None, one
            assert one["batches"], one
            assert one["start"] == one["expected"], one
            assert "skipped" not in one["said"], one


# ----------------------------------------------------------------------------- what is not restored


def plain_loader(workers):
    return DataLoader(Plain(6), batch_size=None, num_workers=workers)


def skipping(folder):
    """Ends and goes on in streams without state; returns (equal, what was said)."""
    found = []
    for workers, ends, epochs in ((0, (4, 10), 2), (1, (4,), 1)):
        whole = fit(folder / f"{workers} whole", plain_loader(workers), "idle", epochs=epochs)
        for steps in ends:
            name = folder / f"{workers} {steps}"
            before = fit(name, plain_loader(workers), "idle", epochs=epochs, max_steps=steps)
            after = fit(name, plain_loader(workers), "idle", epochs=epochs)
            equal = after[0] == whole[0] and before[2] + after[2] == whole[2]
            found.append((equal, after[3], after[4]))
    return found


def test_without_state_dict_it_is_skipped_through_and_says_so(tmp_path):
    [found] = run_processes(skipping, 1, tmp_path, timeout_s=60)
    assert len(found) == 3
    for equal, said, error in found:
        assert error is None
        assert equal  # each pass draws its order, and its workers' seeds, as it begins
        assert "4 batches of the stream are skipped through from its beginning" in said
        assert "because it has no state_dict" in said


def test_a_place_that_was_not_saved_is_counted_in_steps():
    def told():
        feed = StreamFeed(dtrain.Data([torch.ones(2)]), dtrain.init(seed=0), batches_per_step=2)
        return feed.load_state_dict(None, ranks=1, epoch=0, step=3)

    assert run_ranks(told, 1)[0].startswith("6 batches of the stream are skipped through")


def save_some(folder):
    rank = dtrain.init(seed=0).rank
    fit(folder / "with", Stream("counts", 6, rank), "idle", epochs=1)
    fit(folder / "middle", Plain(6), "idle", max_steps=4)
    fit(folder / "end", Plain(6), "idle", epochs=1)


def go_on_alone(folder):
    return [
        fit(folder / "with", Stream("counts", 6, 0), "idle"),
        fit(folder / "middle", Plain(6), "idle"),
        fit(folder / "end", Plain(6), "idle"),
    ]


def test_another_number_of_ranks_is_refused_where_ranks_are_in_streams_of_their_own(tmp_path):
    run_processes(save_some, 2, tmp_path)
    [(stateful, middle, end)] = run_processes(go_on_alone, 1, tmp_path)
    for refused in (stateful, middle):
        assert isinstance(refused[4], ResumeError)
        assert "saved on 2 ranks and this is 1" in str(refused[4])
        assert "Go on with 2 ranks, or pass resume='never'" in str(refused[4])
        assert refused[2] == []
    assert "their states cannot be shared out" in str(stateful[4])
    assert end[4] is None
    assert end[1] == 12
    assert sorted(end[2]) == list(range(6))


class Unsavable(Stream):
    def state_dict(self):
        return {"pool": [1, {2, 3}]}


def save_the_unsavable(folder):
    stream = Unsavable("counts", 6, 0)
    return fit(folder / "run", stream, "idle")


def test_a_state_that_cannot_be_saved_is_named_in_the_second_step(tmp_path):
    [(_, steps, _, _, error)] = run_processes(save_the_unsavable, 1, tmp_path)
    assert steps == 1
    assert "the stream (Unsavable) cannot be saved: state_dict/pool/1 is set" in str(error)
    assert "leave state_dict out" in str(error)
