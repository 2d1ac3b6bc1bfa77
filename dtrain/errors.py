"""The exceptions dtrain raises.

::

    DtrainError
    ├── ConfigError, LaunchError, DataError, LossError, UnusedParameters, SinkError
    ├── RankMismatch, RemoteError, CommError, HangError
    ├── CheckError, CrashLoop
    └── CheckpointError
        └── ResumeError, RunTaken
"""

import traceback
from dataclasses import dataclass
from pathlib import Path

_OWN = str(Path(__file__).parent)


class DtrainError(Exception):
    """Base class of everything dtrain raises on purpose."""


class ConfigError(DtrainError, ValueError):
    """What was asked for cannot work; raised before a step is taken."""


class LaunchError(DtrainError):
    """The environment does not say who this rank is, or ranks cannot run where it puts them."""


class DataError(DtrainError, ValueError):
    """A dataset or stream cannot be trained on."""


class LossError(DtrainError, ValueError):
    """The loss function returned something that cannot be trained on."""


class RankMismatch(DtrainError):
    """Ranks met in different calls; the message has a table of who was where."""


class RemoteError(DtrainError):
    """Another rank failed; this rank stopped with it. The message names rank and cause."""


class CommError(DtrainError):
    """Ranks can no longer reach one another, and none of them said why."""


class HangError(DtrainError):
    """A rank no longer moves. The watchdog reports it so, and ends the process: docs/hangs.md."""


class UnusedParameters(DtrainError):
    """Parameters that no gradient reached; the message names them."""


class SinkError(DtrainError):
    """A sink failed that was to stop the run if it does: its ``on_error`` is ``"raise"``."""


class CheckError(DtrainError):
    """A script could not be checked or drilled: it failed, took too long, or never called ``fit``.

    Attributes:
        fails_itself: it raised or left; not out of time, nor without a call of ``fit``.
    """

    def __init__(self, message: str, *, fails_itself: bool = False) -> None:
        super().__init__(message)
        self.fails_itself = fails_itself


class CrashLoop(DtrainError, SystemExit):
    """A run failed at the same step, start after start; another start would do the same.

    Uncaught, it ends the process with :attr:`EXIT_CODE`, which says: do not start this again.
    """

    code = EXIT_CODE = 78  # EX_CONFIG of sysexits.h: something must be mended first


class CheckpointError(DtrainError):
    """A checkpoint cannot be written or read."""


class ResumeError(CheckpointError):
    """The run in ``run_dir`` cannot be continued as asked."""


class RunTaken(CheckpointError):
    """Another start of the run writes to ``run_dir``, so this one must not."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What one rank tells the others about an exception of its own."""

    rank: int
    host: str
    where: str
    step: int
    kind: str
    message: str
    location: str
    ends: bool = False  # a watchdog's: all ranks end, whoever might catch it

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} failed in {self.where} at step {self.step}: "
            f"{self.kind}: {self.message} ({self.location})"
        )


def locate(error: BaseException) -> str:
    """Returns ``file:line`` of the innermost frame of the user's, else of all, that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown place"
    users = [frame for frame in frames if is_users(frame.filename)]
    innermost = (users or frames)[-1]
    return f"{innermost.filename}:{innermost.lineno}"


def is_users(filename: str) -> bool:
    """Says whether a file is neither dtrain's nor an installed library's."""
    inside = filename.startswith((_OWN, "<")) or "site-packages" in filename
    return not inside and "/lib/python3" not in filename
