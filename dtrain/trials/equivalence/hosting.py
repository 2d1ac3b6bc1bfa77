"""Runs a user's script in this process, with another Trainer in the place of dtrain's."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence

import dtrain
import dtrain.trainer
from dtrain.distributed import current
from dtrain.trainer import Trainer
from dtrain.trials.equivalence.orders import FAILED, NEVER_FIT, RECORDED


class Enough(BaseException):
    """Ends the script: what was to be recorded is. No ``except Exception`` takes it."""


def host(trainer: type[Trainer], script: str, args: Sequence[str], done: Callable[[], bool]) -> int:
    """Runs the script as ``python script args`` would; returns an exit code.

    Args:
        trainer: what the script gets as ``dtrain.Trainer``; it raises :class:`Enough` to end it.
        script: the file.
        args: of the script.
        done: says whether all that was wanted is recorded, so that it no longer matters how the
            script ends.

    Ranks: all; communicates where the script does.
    """
    sys.argv = [script, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    # Before the script imports either of them.
    vars(dtrain)["Trainer"] = vars(dtrain.trainer)["Trainer"] = trainer
    try:
        runpy.run_path(script, run_name="__main__")
    except Enough:
        pass
    except SystemExit as left:
        if not done() and left.code not in (None, 0):
            print(f"the script left with {left.code!r}", file=sys.stderr)  # noqa: T201
            return FAILED
    except BaseException:  # noqa: BLE001 -- shown to the user, and the exit code tells
        if not done():
            traceback.print_exc()
            return FAILED
    if not done():
        return NEVER_FIT
    world = current()
    if world is not None:
        world.close()
    return RECORDED
