"""A handle on the SLURM that ``cluster.sh`` starts: jobs, signals, nodes that die."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.cluster.batch import render

HERE = Path(__file__).parent
TRAIN = HERE / "slurm_train.py"
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK", "NNODES")
_FOREIGN += ("RDZV_", "TORCH", "SLURM_", "SBATCH_", "SRUN_", "PYTHONWARNINGS", "DTRAIN_")
ENV = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
ENV |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def wait_for(what, found, timeout_s=150.0, every_s=1.0):
    """Returns what ``found()`` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if result := found():
            return result
        threading.Event().wait(every_s)  # polls
    raise AssertionError(f"no {what} within {timeout_s:g} seconds")


class Cluster:
    """Five nodes, n1 to n5."""

    def __init__(self, folder):
        self.folder = folder
        self.env = ENV | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command, **env):
        done = subprocess.run(
            command,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def submit(self, folder, script, *arguments, options=(), **env):
        """Submits a batch script in ``folder``; returns the job."""
        folder.mkdir(parents=True, exist_ok=True)
        command = ["sbatch", "--parsable", f"--chdir={folder}", *options, str(script), *arguments]
        return Job(self, self.run(*command, **env).strip(), folder)

    def train(self, folder, kind, *, nodes, slow=0, options=None, more=(), before=None, **env):
        """Submits a job that trains on nodes such as ``["n3"]``, beside other jobs there.

        ``before`` is called with its run_dir.
        """
        folder.mkdir(parents=True)
        if before is not None:
            before(folder / "run")
        chosen = {"exclusive": None, "nodelist": ",".join(nodes), "nodes": str(len(nodes))}
        script = folder / "job.sbatch"
        script.write_text(render(kind, options=chosen | (options or {})))
        return self.submit(folder, script, str(TRAIN), str(folder), str(slow), *more, **env)

    @contextmanager
    def without(self, node, job=None):
        """Kills a node's slurmd; with ``job`` all of that there, too, as if power was lost.

        After the block slurmd is started anew.
        """
        tasks = [] if job is None else job.processes(node)
        keepers = {_parent(pid) for pid in tasks} - set(tasks) - {1}
        own = f"slurmd -f {self.env['SLURM_CONF']} -N {node} "
        (slurmd,) = (pid for pid in _pids() if _read(pid, "cmdline") == own)
        for pid in (slurmd, *keepers, *tasks):
            with suppress(ProcessLookupError):  # its parent's death has ended it
                os.kill(pid, signal.SIGKILL)
        try:
            yield
        finally:
            self.run("slurmd", "-f", self.env["SLURM_CONF"], "-N", node)


class Job:
    """One job, or one of an array."""

    def __init__(self, cluster, number, folder):
        self.cluster = cluster
        self.number = number
        self.folder = folder

    def shown(self):
        words = self.cluster.run("scontrol", "show", "job", "-o", self.number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, timeout_s=150.0):
        """Waits for its end; returns its state, such as COMPLETED, and how often it restarted."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        try:
            wait_for(f"end of job {self.number}", lambda: self.state() in ended, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.shown()}\n{self.log()}") from None
        shown = self.shown()
        return shown["JobState"], int(shown["Restarts"])

    def state(self):
        return self.shown()["JobState"]

    def wait_until_at(self, start, step, rank=0, timeout_s=150.0):
        """Waits until a rank is beyond a step, in its start number ``start``."""

        def is_there():
            file = self.folder / f"at-{start}-{rank}"
            return file.exists() and int(file.read_text()) >= step

        try:
            what = f"step {step} in start {start} of job {self.number}"
            wait_for(what, is_there, timeout_s, every_s=0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.shown()}\n{self.log()}") from None

    def signal(self, name="USR1"):
        """What SLURM does by itself for ``--signal=B:USR1``."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def last_node(self):
        return "n" + re.findall(r"\d", self.shown()["NodeList"])[-1]  # n[3-4], n[3,5]

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def notes(self, what):
        """Returns from start and rank to what was noted: {(0, 1): "25"}."""
        found = {}
        for path in self.folder.glob(f"{what}-*"):
            _, start, rank = path.name.split("-")
            found[int(start), int(rank)] = path.read_text()
        return found

    def models(self):
        files = sorted(self.folder.glob("model-*.safetensors"))
        return [path.read_bytes() for path in files]

    def processes(self, node=""):
        """Returns what lives of the job, on all nodes or on one."""
        job, there = f" SLURM_JOB_ID={self.number} ", f" SLURMD_NODENAME={node}"
        return [
            pid
            for pid in _pids()
            if job in (words := f" {_read(pid, 'environ')}") and there in words
        ]

    def wait_for_no_process(self):
        self._wait_for_none("process", "")

    def wait_for_no_rank(self):
        """Waits until no process is left that runs the training script."""
        self._wait_for_none("rank", TRAIN.name)

    def _wait_for_none(self, what, name):
        def left():
            return [pid for pid in self.processes() if name in _read(pid, "cmdline")]

        try:
            wait_for(f"end of each {what} of job {self.number}", lambda: not left(), 60, 0.3)
        except AssertionError as error:
            found = [(pid, _read(pid, "cmdline")) for pid in left()]
            raise AssertionError(f"{error}: {found}\n{self.shown()}\n{self.log()}") from None


def _pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid, name):
    """Returns a file of a process, its words parted by spaces; nothing, if it has ended."""
    try:
        data = Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return ""
    return data.replace(b"\0", b" ").decode(errors="replace")


def _parent(pid):
    found = re.search(r"^PPid:\s*(\d+)", _read(pid, "status"), re.MULTILINE)
    return int(found[1]) if found else 1
