"""The server process: it has imported what ranks need and opened nothing, so they are its forks.

It reads a line of JSON from stdin for each launch, and once all its ranks have ended, or were
killed for lack of time, answers with one on stdout. When stdin closes, it kills what still runs,
and leaves: so nothing outlives whoever started it, however that ends.

What a script imports before it does anything else is imported once, too, in a fork that takes over
(an *heir*), and only if no rank could tell.
"""

import ast
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

#: Exit codes of a rank.
RECORDED, FAILED, NEVER_FIT = 0, 1, 3
_UNFIT = 4  # of an heir that no rank may be forked from
_ALL = "all variables"
_GRACE_S = 2.0  # how long ranks go on after one has failed: time to say which one, and why
# What scripts need, and takes long to import. The first optimizer imports _dynamo.
_IMPORTS = (
    *("torch._dynamo", "numpy.random"),
    *("dtrain.trials.check_trial", "dtrain.trials.drill_trial", "dtrain.trials.study_trial"),
    "dtrain.callbacks",
)


@dataclass(frozen=True, slots=True)
class Order:
    """A launch that is asked of the server."""

    trial: str  # the module whose make_trial(setup, folder) each rank calls
    setup: dict[str, Any]  # for the trial
    double: bool  # torch's default dtype is float64, before the script imports anything
    folder: str  # for records; each rank's output goes to rank-0.txt and so on
    script: str
    args: list[str]  # of the script
    environments: list[dict[str, str]]  # of each rank, to be added to the server's own
    timeout_s: float  # how long it may take, in seconds


def serve(most_ranks: int) -> None:
    """Serves launches; all of this and what follows runs in the server process."""
    gc.disable()  # imports leave no garbage, and looking for it takes a third of their time
    # The answers' pipe is kept for itself: what anything prints here goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opened = _opened()
    with _asked_of_environment() as asked:
        torch: Any = importlib.import_module("torch")
        # A rank needs a GPU of its own; so the CPU, for all. Asked in a fork, which may open them.
        if _in_fork(lambda: min(torch.cuda.device_count(), 255)) < most_ranks:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in _IMPORTS:
            importlib.import_module(name)
    # Torch goes through all variables; which ranks do not have in common, it reads by their names.
    fresh = _by_rank(asked - {_ALL}) or _unfit(opened)
    if fresh:
        print(f"each rank is started afresh: {fresh}", file=sys.stderr)  # noqa: T201
    refused: list[Any] = []  # what no heir could be made for
    line = sys.stdin.readline()
    while line:
        order = Order(**json.loads(line))
        if fresh or _kind(order) in refused:
            line = _launch(order, answers, fresh=bool(fresh))
        elif (rest := _heir(line, answers)) is None:
            refused.append(_kind(order))
        else:
            line = rest
    os._exit(0)  # nothing is left to tidy up, and torch takes its time over it


def start(line: str) -> None:
    """Runs one rank, in a process that is no fork."""
    _end(lambda: _run(Order(**json.loads(line))))


def _kind(order: Order, *, by_arguments: bool = True) -> tuple[Any, ...]:
    """Returns what launches have in common that may be served by one heir."""
    return order.script, order.args if by_arguments else None, order.double


def _heir(line: str, answers: TextIO) -> str | None:
    """Has a fork serve launches, which has made the script's first imports.

    Returns the first line that is not for it, or None if no rank may be forked from it.
    """
    left = os.memfd_create("order")
    told, imported = os.pipe()
    _flush()
    if not (pid := os.fork()):
        _end(lambda: _inherit(line, answers, left, imported))
    os.close(imported)
    # Until it has imported all, it is watched as ranks are; then it looks to itself.
    ready = wait([sys.stdin.fileno(), told], Order(**json.loads(line)).timeout_s)
    os.close(told)
    if told not in ready:
        _kill(pid, ended=False)
        os.close(left)
        return "" if ready else None
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    rest = os.pread(left, os.fstat(left).st_size, 0).decode()
    os.close(left)
    if code not in (0, _UNFIT):
        os._exit(FAILED)
    return None if code == _UNFIT else rest


def _inherit(line: str, answers: TextIO, left: int, imported: int) -> int:
    os.setsid()
    opened, first = _opened(), Order(**json.loads(line))
    arguments = _watched([first.script, *first.args])
    if why := _make_imports(first, arguments) or _unfit(opened):
        print(f"{first.script} is not imported ahead: {why}", file=sys.stderr)  # noqa: T201
        return _UNFIT
    os.close(imported)
    kind = partial(_kind, by_arguments=vars(arguments).get("read", False))
    while line and kind(order := Order(**json.loads(line))) == kind(first):
        line = _launch(order, answers)
    os.write(left, line.encode())
    return 0


def _watched(arguments: list[str]) -> list[str]:
    """Returns arguments that have an attribute ``read`` once anybody has looked at them."""

    def noting(look: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any) -> Any:
            self.read = True
            return look(self, *args)

        return noted

    looks = ("getitem", "iter", "len", "contains", "eq", "add", "reversed", "repr")
    methods = {f"__{name}__": noting(getattr(list, f"__{name}__")) for name in looks}
    methods |= {name: noting(getattr(list, name)) for name in ("copy", "count", "index", "pop")}
    watching: type[list[str]] = type("Arguments", (list,), methods)
    return watching(arguments)


def _make_imports(order: Order, arguments: list[str]) -> str:
    """Imports what the script does; says why a rank could tell that from doing so itself."""
    _be(order)
    sys.argv = arguments
    drawn = _random_state()
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = order.script
    with _asked_of_environment() as asked:
        try:
            exec(compile(first_imports(order.script), order.script, "exec"), vars(main))
        except BaseException as error:  # noqa: BLE001 -- the rank that it is for will say so
            return f"that raises {error!r}"
    if _random_state() != drawn:
        return "that seeds a global random stream, or draws from one"
    return _by_rank(asked)


def _by_rank(asked: set[str]) -> str:
    """Says which of these variables of the environment ranks do not have in common."""
    testing = importlib.import_module("dtrain.testing")
    told = sorted(asked & {_ALL, *testing.rank_environment(0, 1, 0)})
    return f"that reads the environment's {', '.join(told)}" if told else ""


def _random_state() -> tuple[object, ...]:
    torch, numpy = (importlib.import_module(name) for name in ("torch", "numpy"))
    state = numpy.random.get_state(legacy=False)
    return random.getstate(), repr(state), torch.get_rng_state().numpy().tobytes()


def first_imports(script: str) -> ast.Module:
    """Returns a script's imports up to the first line that does, or imports, something of its own.

    Up to there, nothing that it does can make a difference to what it imports.
    """
    body: list[ast.stmt] = []
    with suppress(SyntaxError, ValueError, OSError):  # it will fail by itself, and say so
        for node in ast.parse(Path(script).read_bytes()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # the docstring
            else:
                break
            if not all(_is_installed(name.partition(".")[0]) for name in names):
                break
            body.append(node)
    return ast.Module(body, [])


def _is_installed(name: str) -> bool:
    if name in sys.modules or name in sys.stdlib_module_names:
        return True
    spec = find_spec(name) if name else None
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
    return any("site-packages" in place or "dist-packages" in place for place in places)


@contextmanager
def _asked_of_environment() -> Iterator[set[str]]:
    """Yields the names of variables that are read meanwhile."""
    kind: Any = type(os.environ)
    get, names = kind.__getitem__, kind.__iter__
    asked: set[str] = set()

    def getitem(self: Any, name: str) -> Any:
        asked.add(name)
        return get(self, name)

    def iterate(self: Any) -> Any:
        asked.add(_ALL)
        return names(self)

    try:
        kind.__getitem__, kind.__iter__ = getitem, iterate
        yield asked
    finally:
        kind.__getitem__, kind.__iter__ = get, names


def _opened() -> set[tuple[str, str]]:
    """Returns what this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of this listing
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def _unfit(opened: set[tuple[str, str]]) -> str:
    """Says why ranks must not be forked from this process; nothing if they may."""
    torch: Any = sys.modules["torch"]
    # With this fork, pools end that know of forks (OpenBLAS's), and begin anew where needed.
    if _in_fork(torch.cuda._is_in_bad_fork):
        return "CUDA has been opened"
    new = {place for _, place in _opened() - opened}
    # What NVML has open, which counts devices, may be shared; what CUDA has, not.
    if new := {one for one in new if "uvm" in one or not one.startswith("/dev/nvidia")}:
        return f"it opens {', '.join(sorted(new))}"
    threads = len(os.listdir("/proc/self/task"))
    return f"it runs {threads} threads" if threads > 1 else ""


def _in_fork(function: Callable[[], int]) -> int:
    """Returns what a function returns (0 to 255) in a process of its own."""
    _flush()
    if not (pid := os.fork()):
        _end(function)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end(function: Callable[[], int]) -> NoReturn:
    """Ends this process, a fork, with what a function returns; nothing goes on above."""
    code = FAILED
    try:
        code = function()
    except BaseException:  # noqa: BLE001 -- shown to the user, and the exit code tells
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _flush() -> None:
    """Writes out what a fork would write once more."""
    sys.stdout.flush()
    sys.stderr.flush()


def _launch(order: Order, answers: TextIO, *, fresh: bool = False) -> str:
    """Runs all ranks of a launch, and answers. Returns the next line."""
    gc.freeze()  # no fork looks through what was imported here, nor gets a copy of its own
    pids = [_fork(order, rank, fresh=fresh) for rank in range(len(order.environments))]
    codes: dict[int, int] = {}
    try:
        wanted = _watch(pids, codes, order.timeout_s)
    finally:
        for pid in pids:
            _kill(pid, ended=pid in codes)
    if not wanted:
        return ""
    late = len(codes) < len(pids) and not any(codes.values())
    answer = [codes.get(pid, -signal.SIGKILL) for pid in pids], late
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return sys.stdin.readline()


def _fork(order: Order, rank: int, *, fresh: bool) -> int:
    _flush()
    if not (pid := os.fork()):
        _end(lambda: _be_rank(order, rank, fresh=fresh))
    return pid


def _be_rank(order: Order, rank: int, *, fresh: bool) -> int:
    os.setsid()  # a group of its own, so that its data workers can be killed with it
    nothing = os.open(os.devnull, os.O_RDONLY)
    # A study's run that goes on does so in the same file.
    out = os.open(f"{order.folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for handle, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(handle, target)
    os.close(nothing)
    os.environ.update(order.environments[rank])
    if fresh:
        os.execv(sys.executable, command("start", json.dumps(asdict(order))))
    for name, place in _opened():
        if int(name) > 2 and not place.startswith("/dev/"):
            os.close(int(name))  # the server's: who reads it would wait for this rank, too
    gc.enable()
    # Streams of its own; Python's is so by itself.
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    return _run(order)


def command(function: str, argument: object) -> list[str]:
    """Returns the command that calls a function of this module in a process of its own."""
    code = f"from {__name__} import {function}; {function}({argument!r})"
    return [sys.executable, "-c", code]


def _be(order: Order) -> None:
    """Makes this process what ``python script args`` would be."""
    sys.argv = [order.script, *order.args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(order.script))
    torch: Any = importlib.import_module("torch")
    torch.set_default_dtype(torch.float64 if order.double else torch.float32)


def _run(order: Order) -> int:
    # A rank that is stuck says where, before it is killed.
    faulthandler.dump_traceback_later(order.timeout_s * 0.9, file=2)
    _be(order)
    trial = importlib.import_module(order.trial).make_trial(order.setup, Path(order.folder))
    code: int = importlib.import_module("dtrain.trials.runner").run_script(trial, order.script)
    return code


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
