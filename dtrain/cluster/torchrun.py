"""torchrun, with one sentence after its summary: what became of the run, and what to do.

    python -m dtrain.cluster.torchrun ARGUMENTS OF TORCHRUN

Rank 0 says in ``DTRAIN_STATUS_FILE`` where the run stands. On other hosts nothing is said, nor
where that variable is set already: whoever reads that file has the last word.
"""

import atexit
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

_STATUS_FILE = "DTRAIN_STATUS_FILE"


def last_words(file: Path, *, failed: bool) -> str:
    """Returns what to say at the end; nothing where the run has said it itself."""
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return ""  # rank 0 was elsewhere, has no run_dir, or had not begun
    if facts["status"] == "finished" and not failed:
        return ""
    words: str = facts["sentence"]
    if facts["status"] == "finished":
        return f"{words}; what failed came after that"
    if not facts["requeue"]:
        return f"{words}: another start by itself would fail there, too. Mend it, then start again"
    return f"{words}: the same command goes on from there"


def main() -> None:
    """Runs torchrun, as its own command would. Ranks: none; it starts them."""
    if not os.environ.get(_STATUS_FILE):
        folder = tempfile.TemporaryDirectory(prefix="dtrain-")
        file = Path(folder.name, "status.json")
        os.environ[_STATUS_FILE] = str(file)

        def say() -> None:
            failed = getattr(sys, "last_value", None) is not None
            if words := last_words(file, failed=failed):
                sys.stderr.write(f"dtrain: {words}.\n")
            folder.cleanup()

        atexit.register(say)  # an uncaught error is printed before
    sys.tracebacklimit = 0  # its own stack says nothing: a rank's does
    runpy.run_module("torch.distributed.run", run_name="__main__")


if __name__ == "__main__":
    main()
