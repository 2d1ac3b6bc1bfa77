"""Runs scripts in one setup after another, each in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from dtrain.distributed import serve_store
from dtrain.errors import CheckError
from dtrain.trials.equivalence.orders import NEVER_FIT, Answer, Order
from dtrain.trials.equivalence.record import Results
from dtrain.trials.equivalence.setup import Setup

# What launchers leave in the environment: ranks made here must not take it for theirs.
_TRACES: tuple[str, ...] = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "RDZV_",
    "TORCHELASTIC_",
)
_TRACES += ("SLURM_", "OMPI_", "PMI_", "ACCELERATE_", "DTRAIN_STATUS_FILE")
_TAIL = 25  # lines of a failed script's output that are shown
_LEAVE_S = 10.0
_CHECK = "dtrain.trials.equivalence.probe"


@dataclass(frozen=True, slots=True)
class Launch:
    """What became of a script that was run once.

    Attributes:
        script: which.
        folder: where its ranks wrote their records and output.
        codes: exit codes by rank; negative for a signal.
        late: time was over, and what still ran was killed.
        timeout_s: how long it could take, in seconds.
    """

    script: str
    folder: Path
    codes: tuple[int, ...]
    late: bool
    timeout_s: float

    @property
    def failed(self) -> bool:
        """Some rank raised, left with a status of its own, or was killed."""
        return any(code not in (0, NEVER_FIT) for code in self.codes)

    def output(self, rank: int) -> str:
        """Returns the last lines that a rank wrote."""
        log = self.folder / f"rank-{rank}.txt"
        return _tail(log.read_text(errors="replace") if log.exists() else "")

    def stuck(self) -> str:
        """Returns the last lines of all ranks that had to be killed."""
        ranks = [rank for rank, code in enumerate(self.codes) if code < 0]
        return "\n".join(f"  rank {rank}:\n{self.output(rank)}" for rank in ranks)


class Launcher:
    """Starts ranks of scripts, and stops all that it started when it is left.

    Args:
        most_ranks: the largest number of ranks that will be asked for.
        command: on whose behalf, for messages and the name of the temporary folder.

    Attributes:
        command: as given.
        folder: a temporary folder, deleted when the launcher is left.

    Ranks: none; it starts them.
    """

    def __init__(self, *, most_ranks: int, command: str = "check") -> None:
        self.command = command
        self._runs = 0
        self._temporary = tempfile.TemporaryDirectory(prefix=f"dtrain-{command}-")
        self.folder = Path(self._temporary.name)
        with (self.folder / "nursery.txt").open("w") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "dtrain.trials.equivalence.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(most_ranks),
                start_new_session=True,  # Ctrl-C is for us; the nursery sees its stdin close
            )

    def run(
        self, setup: Setup, script: str | Path, args: Sequence[str], timeout_s: float
    ) -> Results:
        """Runs a script with its own arguments in a setup; returns what it recorded.

        Raises:
            CheckError: the script failed, took too long, or never called ``fit``.
        """
        launch = self.launch(_CHECK, setup.to_json(), setup.ranks, script, args, timeout_s)
        several = setup.ranks > 1 or setup.micro_batches > 1
        self.insist(launch, f"on {setup.title}" if several else "on one rank")
        return Results.read(launch.folder, setup.ranks)

    def launch(
        self,
        runner: str,
        setup: str,
        ranks: int,
        script: str | Path,
        args: Sequence[str],
        timeout_s: float,
    ) -> Launch:
        """Runs a script once, on so many ranks, and waits until all of them have ended.

        Args:
            runner: the module whose ``run_script`` each rank calls.
            setup: for the runner, as JSON.
            ranks: how many.
            script: the file.
            args: of the script.
            timeout_s: how long it may take, in seconds.

        Raises:
            CheckError: the process that starts the ranks has died.
        """
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        folder.mkdir()
        # Here, not in the nursery: it has threads, which no fork may have.
        store = serve_store(timeout_s) if ranks > 1 else None
        environments = [
            {} if store is None else _rank(rank, ranks, store.port) for rank in range(ranks)
        ]
        order = Order(
            runner=runner,
            setup=setup,
            folder=str(folder),
            script=str(script),
            args=[str(arg) for arg in args],
            environments=environments,
            timeout_s=timeout_s,
        )
        answer = self._ask(order)
        return Launch(str(script), folder, tuple(answer.codes), answer.late, timeout_s)

    def _ask(self, order: Order) -> Answer:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        try:
            self._nursery.stdin.write(order.to_json() + "\n")
            self._nursery.stdin.flush()
            line = self._nursery.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            log = (self.folder / "nursery.txt").read_text(errors="replace")
            raise CheckError(f"the process that starts the ranks has died:\n{_tail(log)}")
        return Answer(**json.loads(line))

    def insist(self, launch: Launch, where: str) -> None:
        """Raises where a launch did not end as it should.

        Args:
            launch: what became of it.
            where: on how many ranks, for messages.

        Raises:
            CheckError: the script failed, took too long, or never called ``fit``.
        """
        script, codes = launch.script, dict(enumerate(launch.codes))
        if launch.late:
            raise CheckError(
                f"{script} took longer than {launch.timeout_s:g} seconds {where}: allow more "
                "(--timeout), fewer steps (--steps), or give the script a smaller model or less "
                f"data by its own arguments. Where it was:\n{launch.stuck()}"
            )
        if launch.failed:
            # The first to fail may be any; a rank that was killed waited for another.
            failed = {r: code for r, code in codes.items() if code not in (0, NEVER_FIT)}
            rank = min(failed, key=lambda r: (failed[r] < 0, r))
            which = f" (rank {rank})" if len(codes) > 1 else ""
            # Such as 9, where memory was out.
            killed = f", killed by signal {-failed[rank]}" if failed[rank] < 0 else ""
            raise CheckError(
                f"{script} failed {where}{which}{killed}:\n{launch.output(rank)}",
                fails_itself=True,
            )
        silent = [rank for rank, code in codes.items() if code == NEVER_FIT]
        if silent:
            which = f" (rank {silent[0]})" if len(codes) > 1 else ""
            raise CheckError(
                f"{script} ended {where}{which} and never called Trainer.fit, so there is "
                "nothing to compare. Does it need arguments? They go after its name: "
                f"`dtrain {self.command} {script} --size tiny`\n{launch.output(silent[0])}"
            )

    def close(self) -> None:
        """Ends all processes, and deletes what they wrote."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        try:
            self._nursery.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        self._nursery.stdout.close()
        self._temporary.cleanup()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _environment(most_ranks: int) -> dict[str, str]:
    """What all ranks have in common; OpenMP reads its threads when torch is imported."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(_TRACES)}
    threads = max(1, len(os.sched_getaffinity(0)) // most_ranks)
    defaults = {
        "OMP_NUM_THREADS": str(threads),  # equal in all runs: so are sums, then
        "WANDB_MODE": "disabled",  # a check is no experiment to keep
        # Asking whether there is a GPU must not make CUDA unusable in forks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    kept = defaults | kept
    if torch.cuda.device_count() < most_ranks:
        kept["CUDA_VISIBLE_DEVICES"] = ""  # a rank needs a GPU of its own; so the CPU, for all
    return kept


def _rank(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _tail(text: str) -> str:
    lines = text.rstrip().splitlines()[-_TAIL:]
    return "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"
