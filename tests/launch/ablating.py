"""`dtrain ablate` as it is called."""

import subprocess
import sys


def run(folder, *arguments, status=0):
    """Calls it in a folder, and returns what it printed; it must end with that status."""
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "ablate", *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done
