"""Real ranks for tests: processes that meet over gloo, each result or exception by rank."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from dtrain.distributed import serve_store
from dtrain.errors import DtrainError
from dtrain.testing.outcomes import Outcome, values_of

#: Has a rank write where its threads are; a number that hardly anybody uses.
_SAY_WHERE = signal.SIGRTMAX - 1
_TIME_TO_SAY_S = 0.3


def run_processes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Runs ``fn(*args)`` on ``world_size`` real ranks; returns each rank's result, by rank.

    Each rank is a process with the environment that torchrun would give it, so that
    ``dtrain.init()`` works in ``fn``. The caller's warning filters apply on the ranks.

    Example::

        def double_rank():
            with dtrain.init() as world:
                return world.comm.all_reduce("sum", torch.tensor(world.rank)).item()

        assert run_processes(double_rank, 3) == [3, 3, 3]

    Args:
        fn: a function of a module (it is pickled by name).
        world_size: how many ranks.
        *args: the same for each rank; pickled.
        timeout_s: ranks that take longer are killed, in seconds.
        env: more environment variables.

    Raises:
        RanksFailed: a rank raised, died or ran out of time; it has every rank's outcome.

    Ranks: none; called in the test's process.
    """
    return values_of(run_outcomes(fn, world_size, *args, timeout_s=timeout_s, env=env))


def run_outcomes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Outcome]:
    """Like :func:`run_processes`, but raises nothing: returns every rank's outcome, by rank."""
    # The rendezvous store lives here, as it lives in torchrun's agent: no rank's death takes
    # it away, and no free port has to be guessed.
    store = serve_store(timeout_s)
    # Processes are forked from a server that has imported torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        # The first optimizer imports the first of these, for more than two seconds.
        [
            *("torch._dynamo", "torch.nn.parallel", "torch.distributed.nn.functional"),
            *("accelerate.state", "dtrain.api", "encodings.idna"),
            *(["pytest"] if "pytest" in sys.modules else []),  # for the module that has the test
            "dtrain.testing.forked",
        ]
    )
    payload = pickle.dumps((fn, args, list(warnings.filters)))
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="dtrain-ranks-") as folder:
        ranks: list[tuple[ForkServerProcess, Connection, Path]] = []
        for rank in range(world_size):
            variables = rank_environment(rank, world_size, store.port)
            variables |= {"OMP_NUM_THREADS": "1"} | (env or {})
            ours, theirs = context.Pipe(duplex=False)
            log = Path(folder) / f"rank-{rank}.txt"
            of_rank = (payload, variables, theirs, str(log))
            process = context.Process(target=_run_rank, args=of_rank, name=f"rank {rank}")
            process.start()
            theirs.close()
            ranks.append((process, ours, log))
        messages = _collect([connection for _, connection, _ in ranks], deadline)
        stuck = [process for rank, (process, *_) in enumerate(ranks) if rank not in messages]
        for process in stuck:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, _SAY_WHERE)
        if stuck:
            threading.Event().wait(_TIME_TO_SAY_S)  # to write where they are
        outcomes = []
        for rank, (process, connection, log) in enumerate(ranks):
            message = messages.get(rank)
            process.join(0.0 if message is None else max(1.0, deadline - time.monotonic()))
            late = message is None or process.is_alive()
            if late:
                process.kill()
                process.join()
            connection.close()
            # Not there, where a rank did not even begin in time.
            output = log.read_text(errors="replace") if log.exists() else ""
            ended = f"ended with code {process.exitcode}"
            why = "did not come back in time and was killed" if late else ended
            told = None, DtrainError(f"rank {rank} {why}"), ""
            if message:
                told = pickle.loads(message)  # noqa: S301 -- from our own child
            outcomes.append(Outcome(rank, *told, output, process.exitcode))
            process.close()
    return outcomes


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns what torchrun would give a rank; ``port`` is that of the store where ranks meet."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _collect(connections: list[Connection], deadline: float) -> dict[int, bytes]:
    """Returns what ranks sent (nothing where one died), until all have or time is over."""
    messages: dict[int, bytes] = {}
    open_ = list(connections)
    while open_ and (left := deadline - time.monotonic()) > 0:
        for ready in wait(open_, timeout=left):
            assert isinstance(ready, Connection)
            open_.remove(ready)
            message = b""  # where it is gone; its exit code tells more
            with suppress(EOFError):
                message = ready.recv_bytes()
            messages[connections.index(ready)] = message
    return messages


def _run_rank(payload: bytes, variables: dict[str, str], parent: Connection, log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # Not a timer of faulthandler's: there is only one, and it is the watchdog's.
    faulthandler.register(_SAY_WHERE, file=2)
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    told: tuple[Any, BaseException | None, str]
    try:
        fn, args, filters = pickle.loads(payload)  # noqa: S301 -- from our own parent
        warnings.filters[:] = filters  # type: ignore[index]
        told = fn(*args), None, ""
    except BaseException as error:  # noqa: BLE001 -- told to the parent
        told = None, error, traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    parent.send_bytes(_pickled(*told))
    parent.close()
    if told[1] is not None:
        # A loader's workers, children of a server of their own, would not notice.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)  # closing down normally may wait for ranks that are stuck


def _pickled(value: Any, error: BaseException | None, trace: str) -> bytes:
    try:
        message = pickle.dumps((value, error, trace))
        pickle.loads(message)  # noqa: S301 -- our own: some exceptions pickle, and do not unpickle
        return message
    except Exception as unpicklable:  # noqa: BLE001 -- anything may be raised by __reduce__
        told = error or unpicklable
        stand_in = DtrainError(f"{type(told).__name__}: {told}")
        return pickle.dumps((None, stand_in, trace or traceback.format_exc()))
