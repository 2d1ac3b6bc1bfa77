"""Runs scripts once or many times, on so many ranks, each time in fresh processes.

These start quickly: a server process (:func:`serve`) imports torch once, and each rank is a fork
of it. It reads a line of JSON from stdin for each launch, and once all its ranks have ended, or
were killed for lack of time, answers with one on stdout. When stdin closes, it kills what still
runs, and leaves: so nothing outlives whoever started it, however that ends.
"""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from dtrain.distributed import serve_store
from dtrain.errors import CheckError, ConfigError
from dtrain.testing import rank_environment
from dtrain.trials.runner import FAILED, NEVER_FIT, RECORDED, run_script

Progress = Callable[[str], None]

# What launchers leave in the environment: ranks made here must not take it for theirs.
_TRACES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "RDZV_", "TORCHELASTIC_"),
    *("SLURM_", "OMPI_", "PMI_", "ACCELERATE_", "DTRAIN_STATUS_FILE"),
)
_TAIL = 25  # lines of a failed script's output that are shown
_LEAVE_S = 10.0
_GRACE_S = 2.0  # how long ranks go on after one has failed: time to say which one, and why


@dataclass(frozen=True, slots=True)
class Order:
    """A launch that is asked of the server."""

    trial: str  # the module whose make_trial(setup, folder) each rank calls
    setup: dict[str, Any]  # for the trial
    folder: str  # for records; each rank's output goes to rank-0.txt and so on
    script: str
    args: list[str]  # of the script
    environments: list[dict[str, str]]  # of each rank, to be added to the server's own
    timeout_s: float  # how long it may take, in seconds


@dataclass(frozen=True, slots=True)
class Launch:
    """What became of a script that was run once."""

    command: str  # on whose behalf: check
    script: str
    folder: Path  # where its ranks wrote their records and output
    codes: tuple[int, ...]  # exit codes by rank; negative for a signal
    late: bool  # time was over, and what still ran was killed
    timeout_s: float  # how long it could take, in seconds

    @property
    def failed(self) -> list[int]:
        """The ranks that raised, left with a status of their own, or were killed."""
        return [r for r, code in enumerate(self.codes) if code not in (RECORDED, NEVER_FIT)]

    def insist(self, where: str) -> None:
        """Raises CheckError if it failed, took too long, or never called ``fit``; says where."""
        if self.late:
            raise CheckError(
                f"{self.script} took longer than {self.timeout_s:g} seconds {where}: allow more "
                "(--timeout), fewer steps (--steps), or give the script a smaller model or less "
                f"data by its own arguments. Where it was:\n{self.stuck()}"
            )
        if self.failed:
            # The first to fail may be any; a rank that was killed waited for another.
            rank = min(self.failed, key=lambda r: (self.codes[r] < 0, r))
            code = self.codes[rank]
            killed = f", killed by signal {-code}" if code < 0 else ""  # 9 where memory was out
            words = f"{self.script} failed {where}{self._which(rank)}{killed}:\n{self._said(rank)}"
            raise CheckError(words, fails_itself=True)
        if NEVER_FIT in self.codes:
            rank = self.codes.index(NEVER_FIT)
            raise CheckError(
                f"{self.script} ended {where}{self._which(rank)} and never called Trainer.fit, so "
                "there is nothing to compare. Does it need arguments? They go after its name: "
                f"`dtrain {self.command} {self.script} --size tiny`\n{self._said(rank)}"
            )

    def stuck(self) -> str:
        """Returns the last lines of all ranks that had to be killed."""
        ranks = [rank for rank, code in enumerate(self.codes) if code < 0]
        return "\n".join(f"  rank {rank}:\n{self._said(rank)}" for rank in ranks)

    def _which(self, rank: int) -> str:
        return f" (rank {rank})" if len(self.codes) > 1 else ""

    def _said(self, rank: int) -> str:
        return _tail(self.folder / f"rank-{rank}.txt")


class Launcher:
    """Starts up to ``most_ranks`` ranks of scripts, on behalf of a command of dtrain's.

    When it is left, all that it started is stopped, and its temporary ``folder`` is deleted.
    Ranks: none; it starts them.
    """

    def __init__(
        self, *, most_ranks: int, command: str = "check", progress: Progress | None = None
    ) -> None:
        self._command = command
        self.say = progress or (lambda words: None)  # what runs next
        self._temporary = tempfile.TemporaryDirectory(prefix=f"dtrain-{command}-")
        self.folder = Path(self._temporary.name)
        self._log = self.folder / "fork-server.txt"
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-c", "from dtrain.trials.launcher import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(most_ranks),
                start_new_session=True,  # Ctrl-C is for us; the server sees its stdin close
            )

    def launch(
        self, setup: Any, ranks: int, script: str | Path, args: Sequence[str], timeout_s: float
    ) -> Launch:
        """Runs a script once, on so many ranks, and waits until all of them have ended.

        ``setup`` is a dataclass, of a module whose ``make_trial`` takes it on each rank.
        """
        folder = tempfile.mkdtemp(prefix="run-", dir=self.folder)
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            # Here, not in the server: it has threads, which no fork may have.
            store = serve_store(timeout_s)
            environments = [rank_environment(rank, ranks, store.port) for rank in range(ranks)]
        words = [str(arg) for arg in args]
        trial, given = type(setup).__module__, asdict(setup)
        order = Order(trial, given, folder, str(script), words, environments, timeout_s)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps(asdict(order)) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
        if not answer:
            raise CheckError(f"the process that starts the ranks has died:\n{_tail(self._log)}")
        codes, late = json.loads(answer)
        return Launch(self._command, str(script), Path(folder), tuple(codes), late, timeout_s)

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._server.communicate(timeout=_LEAVE_S)  # closes its stdin
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.communicate()
        self._temporary.cleanup()


def check_script(script: Path, timeout_s: float) -> None:
    """Raises ConfigError if there is no such script, or no time for it."""
    if not script.is_file():
        raise ConfigError(f"there is no script {str(script)!r} (seen from {Path.cwd()})")
    if timeout_s <= 0:
        raise ConfigError(f"timeout_s={timeout_s}: must be more than 0 seconds")


def last_line(error: CheckError) -> str:
    """Returns the last line of a script's output, which names the error."""
    return str(error).splitlines()[-1].strip(" |.")


def _environment(most_ranks: int) -> dict[str, str]:
    """What all ranks have in common; OpenMP reads its threads when torch is imported."""
    threads = max(1, len(os.sched_getaffinity(0)) // most_ranks)
    variables = {
        "OMP_NUM_THREADS": str(threads),  # equal in all runs: so are sums, then
        "WANDB_MODE": "disabled",  # a check is no experiment to keep
        # Asking whether there is a GPU must not make CUDA unusable in forks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    variables |= {name: v for name, v in os.environ.items() if not name.startswith(_TRACES)}
    if torch.cuda.device_count() < most_ranks:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # a rank needs a GPU of its own; so the CPU, for all
    return variables


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = text.rstrip().splitlines()[-_TAIL:]
    return "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"


def serve() -> None:
    """Serves launches; all of this and what follows runs in the server process."""
    # What scripts need, and takes long to import. The first optimizer imports _dynamo.
    importlib.import_module("torch._dynamo")
    importlib.import_module("dtrain.callbacks")
    # The answers' pipe is kept for itself: what anything prints here goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        order = Order(**json.loads(line))
        pids = [_fork(order, rank) for rank in range(len(order.environments))]
        codes: dict[int, int] = {}
        try:
            wanted = _watch(pids, codes, order.timeout_s)
        finally:
            for pid in pids:
                _kill(pid, ended=pid in codes)
        if not wanted:
            break
        late = len(codes) < len(pids) and not any(codes.values())
        answer = [codes.get(pid, -signal.SIGKILL) for pid in pids], late
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # nothing is left to tidy up, and torch takes its time over it


def _fork(order: Order, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        os.setsid()  # a group of its own, so that its data workers can be killed with it
        nothing = os.open(os.devnull, os.O_RDONLY)
        out = os.open(f"{order.folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(fd, target)
        os.environ.update(order.environments[rank])
        # A rank that is stuck says where, before it is killed.
        faulthandler.dump_traceback_later(order.timeout_s * 0.9, file=2)
        trial = importlib.import_module(order.trial).make_trial(order.setup, Path(order.folder))
        code = run_script(trial, order.script, order.args)
    except BaseException:  # noqa: BLE001 -- a fork must end here, and never go on above
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(pids: Sequence[int], codes: dict[int, int], timeout_s: float) -> bool:
    """Waits for ranks to end, and takes their exit codes; False if nobody wants them any more."""
    deadline = time.monotonic() + timeout_s
    handles = {os.pidfd_open(pid): pid for pid in pids}
    while handles and (left := deadline - time.monotonic()) > 0:
        for handle in wait([sys.stdin.fileno(), *handles], left):
            if handle == sys.stdin.fileno():
                return False  # nothing is ordered while a launch runs: it was closed
            assert isinstance(handle, int)
            pid = handles.pop(handle)
            os.close(handle)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    for handle in handles:
        os.close(handle)
    return True


def _kill(pid: int, *, ended: bool) -> None:
    """Kills what a rank has started, and the rank itself unless it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have had a group yet
        os.waitpid(pid, 0)
