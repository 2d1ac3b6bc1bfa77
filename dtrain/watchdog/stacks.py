"""Where the main thread is, read from another thread: its stack, and what follows from it."""

import linecache
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

from dtrain.errors import is_users

# Frames of these are on the stack only while something is being compiled or tuned; others of
# torch's compiler are there whenever compiled code runs.
_COMPILERS = re.compile(
    r"torch/(_dynamo/convert_frame|_inductor/(compile_fx|codecache|cudagraph_trees))\.py$"
)
_TUNERS = ("benchmark_all_configs", "autotune_to_one_config", "coordinate_descent_tuning")
_DEBUGGERS = ("/pdb.py", "/bdb.py", "/pydevd", "/debugpy/", "/ipdb/", "/pudb/")
_PROMPTS = ("input(", "breakpoint(", "stdin.")  # in C: they have no frame of their own


class Line(NamedTuple):
    """A frame of a stack."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


@dataclass(frozen=True, slots=True)
class Stack:
    """The main thread's stack at one moment."""

    lines: tuple[Line, ...]  # the innermost first
    compiles: bool = False  # torch's compiler is at work, in whichever thread

    @property
    def at(self) -> str:
        """``file:line`` of the innermost code of the user's; where there is none, of all."""
        lines = [line for line in self.lines if is_users(line.file)] or self.lines
        return f"{lines[0].file}:{lines[0].number}" if lines else "unknown place"

    @property
    def in_collective(self) -> bool:
        """The thread is in a function of ``torch.distributed`` that waits for other ranks."""
        return bool(self.lines) and self.lines[0].file.endswith("/distributed_c10d.py")

    @property
    def debugged(self) -> bool:
        """Somebody has the thread in a debugger, or it reads from the terminal."""
        if any(mark in line.file for line in self.lines for mark in _DEBUGGERS):
            return True
        source = "".join(linecache.getline(line.file, line.number) for line in self.lines[:1])
        return any(prompt in source for prompt in _PROMPTS)

    def text(self) -> str:
        """The stack in lines, the innermost last, without what is above 20."""
        return "\n".join(f"    {line}" for line in reversed(self.lines[:20]))


def main_stack(*, moves: bool = False) -> Stack:
    """Returns the main thread's stack; where it ``moves``, not whether anything is compiled."""
    frames = sys._current_frames()
    lines = tuple(_walk(frames.get(threading.main_thread().ident or 0)))
    compiles = not moves and any(_compiles(line) for f in frames.values() for line in _walk(f))
    # This frame is among them: a cycle, which would keep the locals of all, process groups too.
    frames.clear()
    return Stack(lines, compiles)


def _walk(frame: FrameType | None) -> Iterator[Line]:
    while frame is not None:
        yield Line(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name)
        frame = frame.f_back


def _compiles(line: Line) -> bool:
    tunes = line.function in _TUNERS and "_inductor" in PurePath(line.file).parts
    return tunes or _COMPILERS.search(line.file) is not None
