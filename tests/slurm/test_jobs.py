"""Jobs on a real SLURM, told to leave, preempted or killed, end with the bits of an unbroken one.

Scenarios run side by side, as far as nodes and cores suffice: most of their time is spent waiting
for SLURM.
"""

import json
import re
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster import TRAIN, wait_for

ROOT = Path(__file__).parents[2]
STEPS, EVERY_STEPS = 600, 25  # as in slurm_train.py
DONE = f"{STEPS} max_steps reached"
FINISHED = f"dtrain: finished after {STEPS} steps (max_steps reached)"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def status_of(folder):
    return json.loads((folder / "run" / "status.json").read_text())


#: How a start closes whose node is lost.
LOST = (
    r"^dtrain: (node n\d is lost: .*: SLURM requeues it|(failed|killed) .*: requeued as job \d+)$"
)


def newest_saved(folder):
    """The step of the newest checkpoint; a run that fails may say a later one in its status."""
    return max(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


def found_of(job, state_and_restarts, **more):
    """What all scenarios tell of a job that has ended."""
    job.wait_for_no_process()
    return {
        "ended": state_and_restarts,
        "starts": {key: int(words) for key, words in job.notes("start").items()},
        "ends": job.notes("end"),
        "models": job.models(),
        "requeues": job.log().count(": requeued as job "),
        "log": job.log(),
        "last": job.log().splitlines()[-1],
        "left": sorted(path.name for path in job.folder.glob(".dtrain-status-*")),
        **more,
    }


# ------------------------------------------------------------------------------ scenarios


def three_signals(cluster, folder):
    """The repository's script as it is, on two nodes; something else has the port of its number."""
    script = ROOT / "slurm" / "many_nodes.sbatch"
    options = ["--nodelist=n1,n2", "--hold"]
    job = cluster.submit(folder, script, str(TRAIN), str(folder), "3", options=options, RANKS="1")
    port = 10000 + int(job.number) % 10000
    with socket.create_server(("127.0.0.1", port)):
        cluster.run("scontrol", "release", job.number)
        job.wait_until_at(0, 2)
    for start in range(3):
        job.wait_until_at(start, 2 + EVERY_STEPS * start)
        job.signal()
    return found_of(job, job.wait(), port=port)


def preempted(cluster, folder):
    """A job of a higher partition takes a node away."""
    job = cluster.train(folder, "one_node", nodes=["n1"], slow=1, RANKS="1")
    job.wait_until_at(0, 2)
    script = folder / "high.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    options = ["--partition=high", "--exclusive", "--nodelist=n1", "--output=high.out"]
    high = cluster.submit(folder, script, options=options)
    return found_of(job, job.wait(), high=high.wait()[0])


#: Two nodes, of which the second may be either of two: when one dies, there is another. (SLURM
#: may end a job's old start on a node late; were the new one there by then, it would be hit.)
ONE_MAY_DIE = {"nodes": "2", "exclude": "n1,n2"}


def node_dies(cluster, folder):
    """The second node loses power: slurmd, and all of the job that ran there."""
    job = cluster.train(folder, "many_nodes", nodes=["n3"], slow=1, options=ONE_MAY_DIE)
    job.wait_until_at(0, 2 + EVERY_STEPS)
    with cluster.without(job.last_node(), job):
        job.wait_for_no_rank()
        saved = newest_saved(folder)
        return found_of(job, job.wait(), saved=saved)


def without_torchrun(cluster, folder):
    """A signal; then the second node's slurmd is killed, of which the ranks know nothing."""
    job = cluster.train(folder, "srun_per_gpu", nodes=["n3"], slow=2, options=ONE_MAY_DIE)
    job.wait_until_at(0, 2)
    job.signal()
    job.wait_until_at(1, 2 + EVERY_STEPS)
    with cluster.without(job.last_node()):
        wait_for("requeue", lambda: job.shown()["Restarts"] == "2", every_s=0.3)
        job.wait_for_no_rank()
        saved = newest_saved(folder)
        return found_of(job, job.wait(), saved=saved)


def four_nodes(cluster, folder):
    script = ROOT / "slurm" / "many_nodes.sbatch"
    job = cluster.submit(
        folder, script, str(TRAIN), str(folder), "0", options=["--nodes=4"], RANKS="1"
    )
    return found_of(job, job.wait())


def gpus_of_a_node(cluster, folder):
    """A rank for each GPU that SLURM gives; they are devices on paper only."""
    job = cluster.train(folder, "one_node", nodes=["n3"], options={"gpus-per-node": "2"})
    return found_of(job, job.wait())


def time_limit(cluster, folder):
    """SLURM's own signal: sent at once here, because the limit is less than that time."""
    job = cluster.train(folder, "one_node", nodes=["n3"], slow=1, options={"time": "1"}, RANKS="1")
    return found_of(job, job.wait(240))


def job_end(cluster, folder):
    """No signal is sent: the run asks when its job ends."""
    options = {"time": "1", "signal": None}
    job = cluster.train(
        folder,
        "one_node",
        nodes=["n3"],
        slow=1,
        options=options,
        RANKS="1",
        DTRAIN_LEAVE_BEFORE_END_S="30",
    )
    return found_of(job, job.wait(240))


def cancelled(cluster, folder):
    job = cluster.train(folder, "one_node", nodes=["n3"], slow=1, RANKS="1")
    job.wait_until_at(0, 2)
    cluster.run("scancel", job.number)
    found = found_of(job, job.wait())
    # Somebody has thought better of it: a new job goes on where that one was.
    script = folder / "job.sbatch"
    again = cluster.submit(folder, script, str(TRAIN), str(folder), "0", RANKS="1")
    return found | {"again": found_of(again, again.wait())}


def array(cluster, folder):
    """Three of a sweep; the one whose number stands for all of them is told to leave."""
    folder.mkdir()
    script = (ROOT / "slurm" / "array.sbatch").read_text()
    begin, end = script.index("sweep=("), script.index("read -r")
    lines = [f'"{folder}/{task} {slow}"' for task, slow in enumerate([0, 0, 1])]
    own = folder / "job.sbatch"
    own.write_text(f"{script[:begin]}sweep=({' '.join(lines)})\n{script[end:]}")
    for task in range(3):
        (folder / str(task)).mkdir()
    whole = cluster.submit(folder, own, str(TRAIN), options=["--nodelist=n3"], RANKS="1")
    jobs = []
    for task in range(3):
        job = type(whole)(cluster, f"{whole.number}_{task}", folder / str(task))
        jobs.append(job)
    jobs[2].wait_until_at(0, 2)
    jobs[2].signal()
    ended = [job.wait() for job in jobs]
    return {
        "ended": ended,
        "starts": [job.notes("start") for job in jobs],
        "ends": [job.notes("end") for job in jobs],
        "models": [job.models() for job in jobs],
        "log": whole.log(),
        "number": whole.number,
    }


def always_fails(cluster, folder):
    job = cluster.train(folder, "one_node", nodes=["n3"], more=["raise"], RANKS="1")
    return found_of(job, job.wait(120), status=status_of(folder))


def disk_full(cluster, folder):
    """No checkpoint can be written; and SLURM may not start it again."""
    options = {"requeue": None, "no-requeue": ""}
    with ExitStack() as stack:

        def fill(run):
            run.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "full", run], check=True)
            stack.callback(subprocess.run, ["umount", run], check=True)
            (run / "filler").write_bytes(bytes(100 * 1024))

        job = cluster.train(
            folder, "one_node", nodes=["n3"], options=options, before=fill, RANKS="1"
        )
        return found_of(job, job.wait(120), status=status_of(folder))


#: What ``scancel --signal`` sends to the ranks, and not to the batch script.
SIGNALS = ["TERM", "USR2", "HUP", "INT"]


def each_signal(cluster, folder):
    """Ranks that srun has started are sent one after the other; KILL, in the end, cancels."""
    job = cluster.train(folder, "srun_per_gpu", nodes=["n3"], slow=len(SIGNALS) + 1)
    for start, name in enumerate(SIGNALS):
        job.wait_until_at(start, 2 + EVERY_STEPS * start)
        cluster.run("scancel", f"--signal={name}", job.number)
    job.wait_until_at(len(SIGNALS), 2)
    cluster.run("scancel", "--signal=KILL", job.number)
    return found_of(job, job.wait())


SUSPENDED_S = 45


def suspended(cluster, folder):
    """Two ranks are stopped in a step, as for gang scheduling, and go on."""
    job = cluster.train(folder, "one_node", nodes=["n5"], slow=1, RANKS="2")
    job.wait_until_at(0, 2)
    cluster.run("scontrol", "suspend", job.number)
    threading.Event().wait(SUSPENDED_S)
    cluster.run("scontrol", "resume", job.number)
    return found_of(job, job.wait(), status=status_of(folder))


#: What waits for the same nodes is in one line, one after the other.
LINES = [
    [three_signals, preempted, four_nodes],
    [node_dies, without_torchrun],
    [time_limit, cancelled, gpus_of_a_node],
    [job_end, array, always_fails],
    [each_signal],
    [disk_full, suspended],
]


@pytest.fixture(scope="module")
def scenarios(cluster, tmp_path_factory):
    """Runs all scenarios; returns, by name, the promise of what each finds."""
    base = tmp_path_factory.mktemp("jobs")
    with ExitStack() as stack:
        promised = {}
        for line in LINES:
            one_by_one = stack.enter_context(ThreadPoolExecutor(1))
            for scenario in line:
                folder = base / scenario.__name__
                promised[scenario.__name__] = one_by_one.submit(scenario, cluster, folder)
        yield promised


def take(scenarios, name):
    return scenarios[name].result()


def models(scenarios, world_size):
    """Returns the ranks' models of a run that nobody disturbed."""
    if world_size == 1:
        return take(scenarios, "array")["models"][0]
    return take(scenarios, "four_nodes" if world_size == 4 else "gpus_of_a_node")["models"]


def assert_steps_go_on(found, starts, world_size):
    """No step was lost or taken twice: each start begins where the one before ended."""
    keys = {(start, rank) for start in range(starts) for rank in range(world_size)}
    assert found["starts"].keys() == found["ends"].keys() == keys, found["log"]
    begun = 0
    for start in range(starts):
        begins = {found["starts"][start, rank] for rank in range(world_size)}
        assert begins == {begun}
        (end,) = {found["ends"][start, rank] for rank in range(world_size)}
        if start < starts - 1:
            assert end != DONE
            assert int(end.split()[0]) > begun
        else:
            assert end == DONE
        begun = int(end.split()[0])


# ------------------------------------------------------------------------------ what they showed


def test_three_signals_in_a_row(scenarios):
    found = take(scenarios, "three_signals")
    assert found["ended"] == ("COMPLETED", 3)
    assert found["requeues"] == 3
    assert re.search(f"dtrain: port {found['port']} of .* is taken by something else", found["log"])
    assert found["last"] == FINISHED
    for start in range(3):
        step = found["ends"][start, 0].split()[0]
        said = rf"dtrain: left after {step} steps \(SIGUSR1.*\), saved at step {step}: requeued as "
        assert re.search(said, found["log"])
    assert_steps_go_on(found, 4, 2)
    assert all("SIGUSR1" in found["ends"][start, 0] for start in range(3))
    assert found["models"] == models(scenarios, 2)
    assert found["left"] == []


@pytest.mark.parametrize("name", ["four_nodes", "gpus_of_a_node"])
def test_a_job_that_nobody_disturbs(scenarios, name):
    found = take(scenarios, name)
    world_size = 4 if name == "four_nodes" else 2
    assert found["ended"] == ("COMPLETED", 0), found["log"]
    assert found["requeues"] == 0
    assert found["last"] == FINISHED
    assert_steps_go_on(found, 1, world_size)
    assert found["models"] == models(scenarios, world_size)
    assert found["left"] == []


def test_without_torchrun(scenarios):
    found = take(scenarios, "without_torchrun")
    assert found["ended"] == ("COMPLETED", 2), found["log"]
    assert found["requeues"] == 1  # after the other, SLURM itself requeued it
    for rank in (0, 1):
        assert f"{found['starts'][1, rank]} SIGUSR1" in found["ends"][0, rank]
        # SLURM tells who is left on the other node, with TERM; or they find one another gone.
        assert found["starts"][2, rank] == found["saved"] >= found["starts"][1, rank]
        assert found["ends"][2, rank] == DONE
    assert found["models"] == models(scenarios, 2)


def test_preempted_by_a_higher_partition(scenarios):
    found = take(scenarios, "preempted")
    assert found["high"] == "COMPLETED"
    assert found["ended"] == ("COMPLETED", 1), found["log"]
    assert_steps_go_on(found, 2, 1)
    assert found["models"] == models(scenarios, 1)


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(scenarios):
    found = take(scenarios, "node_dies")
    assert found["ended"] == ("COMPLETED", 1), found["log"]
    assert found["saved"] >= EVERY_STEPS
    assert found["saved"] % EVERY_STEPS == 0
    # Whether SLURM or the ranks notice first decides who requeues it.
    assert re.search(LOST, found["log"], re.MULTILINE), found["log"]
    assert {found["starts"][1, rank] for rank in (0, 1)} == {found["saved"]}
    assert found["ends"][1, 0] == found["ends"][1, 1] == DONE
    assert found["models"] == models(scenarios, 2)


@pytest.mark.parametrize(
    ("name", "why"), [("time_limit", "SIGUSR1"), ("job_end", "the job ends in ")]
)
def test_before_its_time_is_up(scenarios, name, why):
    found = take(scenarios, name)
    state, restarts = found["ended"]
    # The limit is short, and SLURM looks every 30 seconds: a later start may have to leave as well.
    assert state == "COMPLETED", found["log"]
    assert 1 <= restarts == found["requeues"]
    assert_steps_go_on(found, restarts + 1, 1)
    assert all(f" {why}" in found["ends"][start, 0] for start in range(restarts))
    assert found["models"] == models(scenarios, 1)


def test_cancelled(scenarios):
    found = take(scenarios, "cancelled")
    assert found["ended"] == ("CANCELLED", 0), found["log"]
    assert found["requeues"] == 0
    step, why = found["ends"][0, 0].split(" ", 1)
    assert "SIGTERM" in why
    assert found["last"] == (
        f"dtrain: cancelled by SLURM: left after {step} steps (SIGTERM), saved at step {step}; "
        "submitted again with the same run_dir it goes on"
    )
    again = found["again"]
    assert again["ended"] == ("COMPLETED", 0)
    assert again["starts"] == {(0, 0): int(step)}
    assert again["models"] == models(scenarios, 1)


def test_an_array_of_three(scenarios):
    found = take(scenarios, "array")
    assert found["ended"] == [("COMPLETED", 0), ("COMPLETED", 0), ("COMPLETED", 1)]
    # SLURM may end scontrol, too, before that can say what it has done.
    requeued = rf": (requeued as job {found['number']}_2|SLURM requeues it)$"
    assert len(re.findall(requeued, found["log"], re.MULTILINE)) == 1, found["log"]
    assert found["models"] == [models(scenarios, 1)] * 3
    assert [starts.keys() for starts in found["starts"]] == [
        {(0, 0)},
        {(0, 0)},
        {(0, 0), (1, 0)},
    ]
    assert found["starts"][2][1, 0] == found["ends"][2][0, 0].split()[0]


def test_a_run_that_always_fails_is_started_three_times(scenarios):
    found = take(scenarios, "always_fails")
    assert found["ended"] == ("FAILED", 2), found["log"]
    assert found["requeues"] == 2
    assert found["starts"] == {(start, 0): 0 for start in range(3)}
    assert (found["status"]["failures"], found["status"]["requeue"]) == (3, False)
    assert re.fullmatch(
        r"dtrain: failed 3 .*\(ValueError: planted\).*: not requeued", found["last"]
    )
    assert found["left"] == []


def test_a_disk_that_is_full(scenarios):
    found = take(scenarios, "disk_full")
    assert found["ended"] == ("FAILED", 0), found["log"]
    assert found["status"]["status"] == "failed"
    assert "No space left on device" in found["status"]["reason"]
    words = r"dtrain: failed .*No space left on device.*: not requeued \(.*disabled.*\); submitted "
    assert re.fullmatch(words + "again with the same run_dir it goes on", found["last"])


def test_each_signal_to_ranks_without_torchrun(scenarios):
    found = take(scenarios, "each_signal")
    assert found["ended"] == ("CANCELLED", len(SIGNALS)), found["log"]
    said = [line for line in found["log"].splitlines() if ": requeued as job " in line]
    for start, (name, line) in enumerate(zip(SIGNALS, said, strict=True)):
        begun = found["starts"][start + 1, 0]
        what = f"left after {begun} steps (SIG{name}), saved at step {begun}: "
        assert line.startswith(f"dtrain: {what}"), found["log"]
    assert found["last"].startswith("dtrain: cancelled by SLURM: left after ")


def test_a_job_that_is_suspended_goes_on(scenarios):
    found = take(scenarios, "suspended")
    assert found["ended"] == ("COMPLETED", 0), found["log"]
    assert (found["status"]["status"], found["status"]["failures"]) == ("finished", 0)
    assert found["last"] == FINISHED
    assert_steps_go_on(found, 1, 2)
    assert found["models"] == models(scenarios, 2)
