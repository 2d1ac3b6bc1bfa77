"""Where the main thread is, read from another thread: its stack, and what follows from it."""

import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from traceback import FrameSummary
from types import FrameType

from dtrain.errors import is_users

# Frames of these are on the stack only while something is being compiled or tuned; others of
# torch's compiler are there whenever compiled code runs.
_COMPILERS = re.compile(
    r"torch/(_dynamo/convert_frame|_inductor/(compile_fx|codecache|cudagraph_trees))\.py$"
)
_TUNERS = ("benchmark_all_configs", "autotune_to_one_config", "coordinate_descent_tuning")
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd", "/debugpy/", "/ipdb/", "/pudb/")
# Of these, one rank may be done before another has come; not of all others.
_ONE_SIDED = ("broadcast", "gather", "recv", "reduce", "scatter", "send")
_PROMPTS = ("input(", "breakpoint(", "stdin.")  # in C: they have no frame of their own


@dataclass(frozen=True, slots=True)
class Stack:
    """The main thread's stack at one moment."""

    lines: tuple[FrameSummary, ...]  # the innermost first
    compiles: bool = False  # torch's compiler is at work, in whichever thread

    @property
    def at(self) -> str:
        """``file:line`` of the innermost code of the user's; where there is none, of all."""
        lines = [line for line in self.lines if is_users(line.filename)] or self.lines
        return f"{lines[0].filename}:{lines[0].lineno}" if lines else "unknown place"

    @property
    def in_collective(self) -> bool:
        """The thread is in a function of ``torch.distributed`` that waits for other ranks."""
        return bool(self.lines) and self.lines[0].filename.endswith("/distributed_c10d.py")

    @property
    def call(self) -> str:
        """Which function of that kind it is that nobody leaves before all have come, and where."""
        name = self.lines[0].name if self.in_collective else ""
        return f"{name} at {self.at}" if name and name not in _ONE_SIDED else ""

    @property
    def debugged(self) -> bool:
        """Somebody has the thread in a debugger, or it reads from the terminal."""
        source = (self.lines[0].line or "") if self.lines else ""
        return any(prompt in source for prompt in _PROMPTS) or any(
            mark in line.filename for line in self.lines for mark in _DEBUGGERS
        )

    def text(self) -> str:
        """The stack in lines, the innermost last, without what is above 20."""
        shown = reversed(self.lines[:20])
        return "\n".join(f"    {line.filename}:{line.lineno} in {line.name}" for line in shown)


def main_stack(*, moves: bool = False) -> Stack:
    """Returns the main thread's stack; where it ``moves``, not whether anything is compiled."""
    frames = sys._current_frames()
    lines = tuple(_walk(frames.get(threading.main_thread().ident or 0)))
    compiles = not moves and any(_compiles(line) for f in frames.values() for line in _walk(f))
    # This frame is among them: a cycle, which would keep the locals of all, process groups too.
    frames.clear()
    return Stack(lines, compiles)


def _walk(frame: FrameType | None) -> Iterator[FrameSummary]:
    while frame is not None:
        code = frame.f_code  # its source is not read: a disk may stall
        yield FrameSummary(code.co_filename, frame.f_lineno, code.co_name, lookup_line=False)
        frame = frame.f_back


def _compiles(line: FrameSummary) -> bool:
    tunes = line.name in _TUNERS and "_inductor" in PurePath(line.filename).parts
    return tunes or _COMPILERS.search(line.filename) is not None
