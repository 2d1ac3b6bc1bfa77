"""Faults drawn at random, one after the other, on a run of two nodes of a real SLURM.

    python tests/slurm/faults.py --seed 1 [--faults 20] [--kind srun_per_gpu] [--only suspend ...]

The run suffers one fault in each of its starts. Each start must end with one sentence, and that
must be true: what happened, the step that is saved (there the next start begins), and what SLURM
does next. What does not end a start must leave no trace. In the end the run has the bits of one
that nobody disturbed. Starts a cluster of its own (cluster.sh): takes root, Debian, and about 20
seconds a fault.
"""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import ENV, TRAIN, Cluster, Job, wait_for

from dtrain.cluster import Kind, render

SCRIPT = Path(__file__).with_name("cluster.sh")
STEPS = 4000  # more than all faults take, at 0.1 s each
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Untrue(Exception):
    """A sentence that is missing, or does not say what was the case."""


@dataclass
class Run:
    """A run, over all its jobs."""

    cluster: Cluster
    folder: Path
    kind: Kind
    slow: bool = False
    job: Job = field(init=False)
    jobs: int = 0
    count: int = 0  # which start of the job
    read: int = 0  # so much of the job's log was looked at

    def __post_init__(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.submit()

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def submit(self) -> None:
        """Submits a job for what is left to do, with a folder of its own for what it notes."""
        notes = self.folder / f"job-{self.jobs}"
        notes.mkdir()
        (notes / "run").symlink_to(self.run_dir)
        if self.slow:
            (notes / "slow").touch()
        options = {"exclusive": None, "nodes": "2", "ntasks-per-node": "1", "output": "log"}
        script = notes / "job.sbatch"
        script.write_text(render(self.kind, options=options))
        numbers = {"STEPS": str(STEPS), "EVERY_STEPS": "5", "RANKS": "1"}
        self.job = self.cluster.submit(notes, script, str(TRAIN), str(notes), "0", **numbers)
        self.jobs, self.read, self.count = self.jobs + 1, 0, 0

    def log(self) -> str:
        path = self.job.folder / "log"
        return path.read_text() if path.exists() else ""

    def note(self, what: str, rank: int) -> str | None:
        path = self.job.folder / f"{what}-{self.count}-{rank}"
        return path.read_text() if path.exists() else None

    def step(self) -> int:
        """A step that all ranks have ended in this start; -1 if there is none."""
        return min(int(self.note("at", rank) or -1) for rank in range(2))

    def wait_for(self, what: str, found: Callable[[], Any], timeout_s: float = 240.0) -> Any:
        try:
            return wait_for(what, found, timeout_s, 0.3)
        except AssertionError as error:
            raise Untrue(f"{error}: {self.job.shown()}\n{self.log()[self.read :]}") from None

    def wait_until_training(self) -> int:
        """Returns at which step this start began."""
        self.wait_for("training", lambda: self.step() >= 0 or self.has_ended())
        if self.step() < 0:
            raise Untrue(f"it ended before training: {self.log()[self.read :]}")
        (begun,) = {int(self.note("start", rank) or -1) for rank in range(2)}
        return begun

    def has_ended(self) -> bool:
        return self.job.state() in ENDED

    def is_begun_again(self) -> bool:
        return int(self.job.shown()["Restarts"]) > self.count

    def pid(self, rank: int) -> int:
        return int(self.note("pid", rank) or 0)

    def second_node(self) -> str:
        return self.job.last_node()

    def endpoint(self) -> int:
        """The port at which the ranks, or their torchruns, meet."""
        for pid in self.job.processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                environ = Path(f"/proc/{pid}/environ").read_bytes().decode()
            except OSError:
                continue
            if found := re.search(r"--rdzv-endpoint=[^\0]*:(\d+)", command):
                return int(found[1])
            if self.kind == "srun_per_gpu" and (
                found := re.search(r"\0MASTER_PORT=(\d+)", environ)
            ):
                return int(found[1])
        raise Untrue("no process of the job has a port at which to meet")


# ------------------------------------------------------------------------------ faults


@dataclass(frozen=True)
class Expected:
    """What must follow from a fault."""

    cause: str = ""  # a pattern of the sentence; nothing where the start goes on
    ends_job: bool = False  # else it begins again by itself
    told_late: bool = False  # nothing of the start is left that could say it: the next one does


def scancel(name: str, *options: str) -> Callable[[Run, ExitStack], Expected]:
    def fault(run: Run, after: ExitStack) -> Expected:
        run.cluster.run("scancel", *options, f"--signal={name}", run.job.number)
        if name == "KILL":  # as without any: SLURM ends the job
            return Expected("cancelled", ends_job=True)
        return Expected(f"SIG{name}|launcher")  # USR1 and USR2 end torchrun itself

    return fault


def batch_term(run: Run, after: ExitStack) -> Expected:
    """To the batch script alone: it waits for its ranks, who know of nothing."""
    run.cluster.run("scancel", "--batch", "--signal=TERM", run.job.number)
    return Expected()


def cancel(run: Run, after: ExitStack) -> Expected:
    run.cluster.run("scancel", run.job.number)
    return Expected("cancelled", ends_job=True)


def requeue(run: Run, after: ExitStack) -> Expected:
    run.cluster.run("scontrol", "requeue", run.job.number)
    return Expected("SIGTERM.*SLURM requeues it")


def suspend(run: Run, after: ExitStack) -> Expected:
    run.cluster.run("scontrol", "suspend", run.job.number)
    threading.Event().wait(45)
    run.cluster.run("scontrol", "resume", run.job.number)
    return Expected()


def node_down(run: Run, after: ExitStack) -> Expected:
    node = run.second_node()
    update = ("scontrol", "update", f"nodename={node}")
    run.cluster.run(*update, "state=down", "reason=drawn")
    # Else it is back within seconds, and what SLURM ends there late is the job's next start.
    run.cluster.run(*update, "state=drain", "reason=drawn")
    after.callback(run.cluster.run, *update, "state=resume")
    return Expected("SLURM requeues it")


def slurmd_killed(run: Run, after: ExitStack) -> Expected:
    after.enter_context(run.cluster.without(run.second_node()))
    return Expected("SLURM requeues it")


def node_lost(run: Run, after: ExitStack) -> Expected:
    after.enter_context(run.cluster.without(run.second_node(), run.job))
    return Expected("gone|lost|requeue")


def first_node_lost(run: Run, after: ExitStack) -> Expected:
    """With the batch script."""
    after.enter_context(run.cluster.without(run.job.shown()["BatchHost"], run.job))
    return Expected("ended without a word", told_late=True)


def time_limit(run: Run, after: ExitStack) -> Expected:
    run.cluster.run("scontrol", "update", f"jobid={run.job.number}", "timelimit=+0", "timelimit=1")
    number = run.job.number
    after.callback(run.cluster.run, "scontrol", "update", f"jobid={number}", "timelimit=UNLIMITED")
    return Expected("SIGUSR1|the job ends in|time limit")


def port_taken(run: Run, after: ExitStack) -> Expected:
    """Something else listens where the ranks of the next start are to meet."""
    port = run.endpoint()
    run.job.signal()
    other = after.enter_context(socket.socket())

    def is_ours() -> bool:
        try:
            other.bind(("", port))
        except OSError:
            return False
        other.listen()
        return True

    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    run.wait_for("free port", is_ours)
    return Expected("SIGUSR1")


def disk_full(run: Run, after: ExitStack) -> Expected:
    ballast = run.run_dir / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            pass
    after.callback(ballast.unlink)
    run.job.signal()
    return Expected("No space left on device")


def rank_killed(run: Run, after: ExitStack) -> Expected:
    os.kill(run.pid(1), signal.SIGKILL)
    return Expected("its process is gone")


def rank_stopped(run: Run, after: ExitStack) -> Expected:
    os.kill(run.pid(1), signal.SIGSTOP)
    return Expected("its process is stopped")


FAULTS: dict[str, Callable[[Run, ExitStack], Expected]] = {
    "requeue": requeue,
    "suspend": suspend,
    "node down": node_down,
    "slurmd killed": slurmd_killed,
    "node lost": node_lost,
    "first node lost": first_node_lost,
    "scancel": cancel,
    "scancel --batch USR1": scancel("USR1", "--batch"),
    "scancel --batch TERM": batch_term,
    "scancel --full USR1": scancel("USR1", "--full"),
    "scancel USR1": scancel("USR1"),
    "scancel USR2": scancel("USR2"),
    "scancel TERM": scancel("TERM"),
    "scancel INT": scancel("INT"),
    "scancel HUP": scancel("HUP"),
    "scancel KILL": scancel("KILL"),
    "time limit": time_limit,
    "port taken": port_taken,
    "disk full": disk_full,
    "rank killed": rank_killed,
    "rank stopped": rank_stopped,
}


#: What is to be over when the next start begins; all else once it trains. (A node that is back
#: before ends what is left there of the job, also where that is its next start.)
OVER_SOON = ("disk full", "time limit")


def suffer(run: Run, name: str) -> str:
    """Has one fault happen to a run that trains; returns the sentence that followed."""
    job, before = run.job, run.read
    with ExitStack() as late, ExitStack() as soon:
        expected = FAULTS[name](run, soon if name in OVER_SOON else late)
        if not expected.cause:
            reached = run.step()
            run.wait_for("steps beyond it", lambda: run.step() > reached + 3 or run.has_ended())
            lines = run.log()[before:].splitlines()
            told = [line for line in lines if not line.startswith("slurmstepd")]  # SLURM's word
            if run.has_ended() or run.is_begun_again() or told:
                raise Untrue(f"it should have left no trace: {told}")
            return "(goes on)"
        run.wait_for("its end", lambda: run.is_begun_again() or run.has_ended())
        if run.has_ended() != expected.ends_job:
            raise Untrue(f"it should {'not ' * expected.ends_job}begin again: {run.log()[before:]}")
        soon.close()
        told = run.log()[before:]
        if expected.ends_job:
            run.submit()
        else:
            run.count += 1
        begun = run.wait_until_training()
    if not expected.ends_job:
        told = run.log()[before:]
        run.read = len(run.log())
    sentences = re.findall(
        r"^dtrain: .*(?:requeue|run_dir it goes on|without a word).*$", told, re.M
    )
    if len(sentences) != 1:
        raise Untrue(f"{len(sentences)} sentences in: {told}")
    check(sentences[0], expected, begun, job, told)
    return str(sentences[0])


def check(sentence: str, expected: Expected, begun: int, job: Job, told: str) -> None:
    """Raises Untrue where the sentence does not say what was the case."""
    if not re.search(expected.cause, sentence):
        raise Untrue(f"no {expected.cause!r} in {sentence!r}; the log:\n{told}")
    # The next start begins where the sentence says that it is saved.
    steps = re.search(r"saved at step (\d+)", sentence) or re.search(
        r"after (\d+) steps.*, saved", sentence
    )
    saved = int(steps[1]) if steps else 0 if "nothing is saved" in sentence else None
    if saved != begun:
        raise Untrue(f"the next start began at step {begun}; {sentence!r}")
    again = "requeued as job " in sentence or "SLURM requeues it" in sentence
    if again == expected.ends_job and not expected.told_late:
        raise Untrue(f"{'ended' if expected.ends_job else 'began again'}; {sentence!r}")
    lines = [line for line in told.splitlines() if line.strip()]
    if expected.ends_job and lines[-1] != sentence:
        raise Untrue(f"not the last line: {told}")


@contextmanager
def own_cluster(folder: Path) -> Any:
    """Five idle nodes; all of it is stopped at the end."""

    def control(what: str) -> None:
        command = ["bash", str(SCRIPT), what, str(folder)]
        subprocess.run(command, env=ENV, stdin=subprocess.DEVNULL, check=True, timeout=300)

    control("start")
    try:
        yield Cluster(folder)
    finally:
        control("stop")


def play(cluster: Cluster, folder: Path, kind: Kind, drawn: list[tuple[str, int]]) -> None:
    """Has all faults happen, and compares the end; raises Untrue."""
    plain = Run(cluster, folder / "plain", kind)
    plain.wait_for("end of the plain run", plain.has_ended)
    if not re.search(rf"^dtrain: finished after {STEPS} steps", plain.log(), re.M):
        raise Untrue(f"the plain run has no last sentence: {plain.log()}")
    with ExitStack() as mounted:
        run_dir = folder / "drawn" / "run"
        run_dir.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", run_dir], check=True)
        mounted.callback(subprocess.run, ["umount", "-l", run_dir], check=True)
        run = Run(cluster, folder / "drawn", kind, slow=True)
        run.wait_until_training()
        for number, (name, steps) in enumerate(drawn, 1):
            reached = run.step() + steps
            run.wait_for(f"step {reached}", lambda at=reached: run.step() >= at)  # type: ignore[misc]
            began = time.monotonic()
            try:
                sentence = suffer(run, name)
            except Untrue as wrong:
                raise Untrue(f"{number} {name}: {wrong}") from None
            print(f"{number:2} {name:22} {time.monotonic() - began:4.0f} s  {sentence}", flush=True)
        (run.job.folder / "slow").unlink()
        run.wait_for("end", run.has_ended)
        if run.job.state() != "COMPLETED":
            raise Untrue(f"it ended as {run.job.state()}: {run.log()[run.read :]}")
        last = run.log().strip().splitlines()[-1]
        if not last.startswith(f"dtrain: finished after {STEPS} steps"):
            raise Untrue(f"its last line is {last!r}")
    if plain.job.models() != run.job.models() or len(run.job.models()) != 2:
        raise Untrue("the end is not bit-equal to that of a run that nobody disturbed")


def draw(seed: int, faults: int, only: list[str]) -> list[tuple[str, int]]:
    """Returns so many faults, and how many steps each waits; none comes twice before all have."""
    choose, names, drawn = random.Random(seed), only or list(FAULTS), []
    while len(drawn) < faults:
        drawn += [(name, choose.randrange(12)) for name in choose.sample(names, len(names))]
    return drawn[:faults]


def main() -> int:
    """Plays what was asked for; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kind", choices=["many_nodes", "srun_per_gpu"], default="many_nodes")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=[])
    asked = parser.parse_args()
    drawn = draw(asked.seed, asked.faults, asked.only)
    folder = Path(tempfile.mkdtemp(prefix="dtrain-faults-"))
    try:
        with own_cluster(folder / "cluster") as cluster:
            play(cluster, folder / "runs", asked.kind, drawn)
    except Untrue as wrong:
        print(f"seed {asked.seed}: {wrong}\n(files are in {folder})", file=sys.stderr)
        return 1
    print(
        f"seed {asked.seed}: {len(drawn)} faults, each with one true sentence; bit-equal at the end"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
