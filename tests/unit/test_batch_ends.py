"""How a batch script closes: one sentence and an exit code; with stand-ins of SLURM's commands."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dtrain.cluster.batch import Kind, render

SAID = "left after 62 steps (a, b), saved at step 62"
STATUS = {"status": "preempted", "step": 62, "requeue": True, "sentence": SAID}
RUNS, GOES, LIMIT = "RUNNING 0 None", "COMPLETING 0 None", "COMPLETING 0 TimeLimit"
COMES_BACK = "COMPLETING 1 None"
LATER = "submitted again with the same run_dir it goes on"

#: What stands for SLURM's commands. A job's step leaves $STATUS, and is what $STEP holds, in bash.
COMMANDS = {
    "srun": 'echo $PPID >pid\n[[ ! $STATUS ]] || echo "$STATUS" >"$DTRAIN_STATUS_FILE"\n'
    'eval "$STEP"',
    "squeue": 'echo "$SQUEUE"',
    "sinfo": 'echo "$DOWN"',
    "scontrol": '[[ $1 == requeue ]] || exit 1\n[[ ! $REFUSED ]] || { echo "$REFUSED"; exit 1; }\n'
    "kill -TERM $(<pid)",  # what SLURM does with a script that it requeues
    "sleep": '[[ $1 == 10 ]] || exec /bin/sleep "$@"',
    "hostname": "echo localhost",
}
TOOLS = ["bash", "cat", "cut", "getent", "grep", "head", "paste", "rm", "sed", "xargs"]


class Play:
    """Plays batch scripts in a folder, where there is no other SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name, text in COMMANDS.items():
            self.command(name, text)
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def command(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)  # a link to the system's own is not written to
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def start(
        self,
        status: dict[str, object] | None,
        squeue: str = RUNS,
        *,
        kind: Kind = "one_node",
        step: str = "exit 0",
        **env: str,
    ) -> subprocess.Popen[str]:
        told = {"PATH": str(self.bin), "LC_ALL": "C.UTF-8", "SLURM_JOB_ID": "12", "DOWN": ""}
        told |= {"SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "1"}
        told |= {"SLURMD_NODENAME": "n1", "PYTHON": sys.executable, "REFUSED": ""}
        told |= {"SQUEUE": squeue, "STEP": step, "STATUS": ""}
        if status:
            told["STATUS"] = json.dumps(status, indent=1)
        return subprocess.Popen(
            ["/bin/bash", "-c", render(kind), "job", "train.py"],
            cwd=self.folder,
            env=told | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, script: subprocess.Popen[str]) -> tuple[list[str], int]:
        """Returns log and exit code."""
        said, _ = script.communicate(timeout=60)
        assert not list(self.folder.glob(".dtrain-status-*")), (said, script.returncode)
        return said.splitlines(), script.returncode

    def __call__(self, *arguments, **more) -> tuple[list[str], int]:  # type: ignore[no-untyped-def]
        return self.end(self.start(*arguments, **more))


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


@pytest.mark.parametrize(
    ("status", "squeue", "step", "said"),
    [
        (STATUS, RUNS, "exit 0", f"{SAID}: requeued as job 12"),
        (STATUS, GOES, "exit 1", f"cancelled by SLURM: {SAID}; {LATER}"),
        (STATUS, LIMIT, "exit 1", f"ended by its time limit: {SAID}; {LATER}"),
        (STATUS, COMES_BACK, "exit 1", f"{SAID}: SLURM requeues it"),
        (STATUS | {"status": "failed", "requeue": False}, RUNS, "exit 1", f"{SAID}: not requeued"),
        (
            STATUS | {"sentence": 'no "x" \u00e9'},
            RUNS,
            "exit 0",
            'no "x" \u00e9: requeued as job 12',
        ),
        (STATUS | {"status": "finished"}, RUNS, "exit 0", SAID),
        (STATUS | {"status": "finished"}, RUNS, "exit 138", f"{SAID}: requeued as job 12"),
        (
            STATUS | {"status": "finished", "requeue": False},
            RUNS,
            "exit 3",
            f"{SAID}; then the script ended with status 3",
        ),
        (
            None,
            RUNS,
            "exit 2",
            "ended with status 2 before training began, or without a run_dir: not requeued",
        ),
    ],
)
def test_the_last_line_says_why_and_what_is_next(
    play: Play, status: dict[str, object] | None, squeue: str, step: str, said: str
) -> None:
    log, code = play(status, squeue, step=step)
    assert log == [f"dtrain: {said}"]
    assert code == int(step.split()[1])


def test_a_node_that_is_lost_is_named(play: Play) -> None:
    log, _ = play(STATUS | {"status": "running"}, COMES_BACK, step="exit 143", DOWN="n2")
    assert log == [f"dtrain: node n2 is lost: {SAID}: SLURM requeues it"]


def test_a_start_that_could_not_say_it_is_told_of_by_the_next(play: Play) -> None:
    (play.folder / ".dtrain-status-12.json").write_text(json.dumps(STATUS, indent=1))
    log, _ = play(STATUS)
    assert log == [
        f"dtrain: the start before ended without a word: {SAID}",
        f"dtrain: {SAID}: requeued as job 12",
    ]


def test_a_term_that_is_not_slurms_ends_nothing(play: Play) -> None:
    log, code = play(STATUS | {"status": "finished"}, step="kill $PPID; sleep 1; exit 0")
    assert log == [f"dtrain: {SAID}"]
    assert code == 0


def test_a_task_of_an_array_has_a_number_of_its_own(play: Play) -> None:
    log, _ = play(STATUS, SLURM_ARRAY_JOB_ID="11", SLURM_ARRAY_TASK_ID="3")
    assert log == [f"dtrain: {SAID}: requeued as job 11_3"]


def test_slurm_may_refuse_or_be_missing(play: Play) -> None:
    log, code = play(STATUS, REFUSED="Requested operation is presently disabled for job 12")
    words = f"{SAID}: not requeued"
    refused = "Requested operation is presently disabled for job 12"
    assert log == [f"dtrain: {words} ({refused}); {LATER}"]
    assert code == 1
    log, code = play(STATUS, "slurm_load_jobs error: Unable to contact slurm controller")
    why = "for squeue does not say how the job is (slurm_load_jobs error: Unable to contact"
    assert log == [f"dtrain: {words}, {why} slurm controller); {LATER}"]
    assert code == 1
    (play.bin / "scontrol").unlink()
    log, code = play(STATUS)
    assert log == [f"dtrain: {words} (scontrol: command not found); {LATER}"]
    assert code == 1
    (play.bin / "squeue").unlink()
    log, code = play(STATUS)
    assert log[-1].startswith(f"dtrain: {words}, for squeue does not say how the job is (")
    assert log[-1].endswith(f"squeue: command not found); {LATER}")
    assert code == 1


#: A step as torchrun makes it: a rank, and a worker of its loader, below a container's own process.
TREE = """\
echo "$STATUS" >"$DTRAIN_STATUS_FILE"
export WORKER='trap "echo worker >>got" USR1; echo >up; while sleep 0.2; do :; done'
export ASKED='echo rank >>got; kill $worker; exit 0'
export RANK='trap "$ASKED" USR1; bash -c "$WORKER" & worker=$!; wait'
SLURM_STEP_ID=0 TORCHELASTIC_RUN_ID=x bash -c "$RANK" &
wait
"""


@pytest.mark.parametrize("kind", ["one_node", "srun_per_gpu"])
def test_the_signal_reaches_ranks_alone_also_without_scontrol(play: Play, kind: Kind) -> None:
    (play.bin / "scontrol").unlink()
    script = play.start(STATUS | {"status": "running"}, kind=kind, step=TREE)
    for _ in range(600):  # polls, for a minute at most
        if (play.folder / "up").exists():
            break
        threading.Event().wait(0.1)
    script.send_signal(signal.SIGUSR1)
    log, code = play.end(script)
    assert (play.folder / "got").read_text() == "rank\n"
    assert "scontrol: command not found" in log[-1]
    assert code == 1


def test_a_name_that_does_not_resolve_is_said_at_once(play: Play) -> None:
    play.command("hostname", "echo n1")
    play.command("getent", "exit 2")
    log, code = play(STATUS, kind="many_nodes", step="echo started")
    assert log == [
        "dtrain: this node's own name, n1, does not resolve, so the others cannot find it: not "
        "started. Have it put into /etc/hosts or the DNS of all nodes."
    ]
    assert code == 1
