"""Runs scripts once or many times, on so many ranks, each time in fresh processes.

These start quickly: a server process (``fork_server.py``) imports torch once, and each rank is a
fork of it. This process imports it meanwhile: nothing here does so before the server is started.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import CheckError, ConfigError
from dtrain.trials import fork_server
from dtrain.trials.fork_server import NEVER_FIT, RECORDED, Order

Progress = Callable[[str], None]

# What launchers leave in the environment: ranks made here must not take it for theirs.
_TRACES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "RDZV_", "TORCHELASTIC_"),
    *("SLURM_", "OMPI_", "PMI", "MPI_LOCAL", "MV2_", "JSM_", "PALS_", "PET_", "JOB_COMPLETION_"),
    *("PBS_", "LSB_", "RAY_", "KUBERNETES_", "ACCELERATE_", "DTRAIN_STATUS_FILE"),
)
_TAIL = 25  # lines of a failed script's output that are shown
_LEAVE_S = 10.0


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

    def said(self) -> str:
        """Returns the last lines of the rank that failed, else of the first."""
        return self._said(self.failed[0] if self.failed else 0)

    def _said(self, rank: int) -> str:
        return _tail(self.folder / f"rank-{rank}.txt")


class Launcher:
    """Starts up to ``most_ranks`` ranks of scripts, on behalf of a command of dtrain's.

    When it is left, all that it started is stopped, and its temporary ``folder`` is deleted.
    Ranks: none; it starts them.
    """

    def __init__(
        self,
        *,
        most_ranks: int,
        command: str = "check",
        progress: Progress | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self.say = progress or (lambda words: None)  # what runs next
        self._temporary = tempfile.TemporaryDirectory(prefix=f"dtrain-{command}-")
        self.folder = Path(self._temporary.name)
        self._log = self.folder / "fork-server.txt"
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                fork_server.command("serve", most_ranks),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(most_ranks, command) | dict(variables or {}),
                start_new_session=True,  # Ctrl-C is for us; the server sees its stdin close
            )

    def launch(
        self,
        setup: Any,
        ranks: int,
        script: str | Path,
        args: Sequence[str],
        timeout_s: float,
        folder: Path | None = None,
    ) -> Launch:
        """Runs a script once, on so many ranks, and waits until all of them have ended.

        ``setup`` is a dataclass, of a module whose ``make_trial`` takes it on each rank. If it
        has ``double``, and that is true, torch's default dtype is float64 there. What ranks print
        and record is in ``folder``, else in a temporary one.
        """
        place = str(folder) if folder else tempfile.mkdtemp(prefix="run-", dir=self.folder)
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            from dtrain.distributed import serve_store
            from dtrain.testing import rank_environment

            # Here, not in the server: it has threads, which no fork may have.
            store = serve_store(timeout_s)
            environments = [rank_environment(rank, ranks, store.port) for rank in range(ranks)]
        words = [str(arg) for arg in args]
        trial, given = type(setup).__module__, asdict(setup)
        double = given.get("double", False)
        order = Order(trial, given, double, place, str(script), words, environments, timeout_s)
        answer, orders = "", self._server.stdin
        assert self._server.stdout is not None
        with suppress(BrokenPipeError, ValueError):  # it has died, or was abandoned
            if orders is not None:
                orders.write(json.dumps(asdict(order)) + "\n")
                orders.flush()
                answer = self._server.stdout.readline()
        if not answer:
            raise CheckError(f"the process that starts the ranks has died:\n{_tail(self._log)}")
        codes, late = json.loads(answer)
        return Launch(self._command, str(script), Path(place), tuple(codes), late, timeout_s)

    def abandon(self) -> None:
        """Has all that runs killed; a launch under way, in another thread, raises CheckError."""
        orders, self._server.stdin = self._server.stdin, None
        if orders is not None:
            orders.close()

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


def _environment(most_ranks: int, command: str) -> dict[str, str]:
    """What all ranks have in common; OpenMP reads its threads when torch is imported."""
    threads = max(1, len(os.sched_getaffinity(0)) // most_ranks)
    variables = {
        "OMP_NUM_THREADS": str(threads),  # equal in all runs: so are sums, then
        # A check is no experiment to keep.
        **({} if command == "ablate" else {"WANDB_MODE": "disabled"}),
        # Asking whether there is a GPU must not make CUDA unusable in forks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    return variables | {n: v for n, v in os.environ.items() if not n.startswith(_TRACES)}


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = text.rstrip().splitlines()[-_TAIL:]
    return "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"
