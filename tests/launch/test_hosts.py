"""Two hosts with a rank each: the training of one, and what a cut network makes of it.

What is cut is cut while the ranks are in a step; they have posted where they are by then.
"""

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from launch.hosts import Hosts, missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LEFT, RIGHT = "left", "right"
START_S = 60.0
#: For all processes of both hosts to end: the watchdog's 5 s, 3 s for a store that does not answer,
#: and what torchrun takes; not the 15 s for which a store that others may read outlives rank 0.
END_S = 30.0


@pytest.fixture(scope="module")
def possible():
    """Skips on a machine of somebody's own; where tests are to run, they must."""
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def hosts(possible):
    with Hosts(LEFT, RIGHT) as hosts:
        yield hosts


SCRIPT = """
import sys, threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.distributed import Heartbeat, heartbeat_key
from dtrain.callbacks import Checkpoint

world = dtrain.init(seed=3)
out, meets = Path(sys.argv[1]), int(sys.argv[2])


class Waits(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if step.number == meets:
            store = world.connect()
            while Heartbeat.from_json(store.get(heartbeat_key(world.rank))).phase != "on_step_end":
                self.wait(ctx)
            (out / f"at-{world.rank}").touch()
            while not (out / "go").exists():
                self.wait(ctx)

    def wait(self, ctx):
        ctx.heartbeat()
        threading.Event().wait(0.02)


x = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=[Waits(), Checkpoint(every_steps=4, background=False)],
    sinks=[],
    run_dir=out / "run",
)
result = trainer.fit(TensorDataset(x), batch_size=8, max_steps=12)
save_file(model.state_dict(), out / f"model-{world.rank}.safetensors")
"""


def environment(**variables):
    """This process's environment without launchers' traces and GPUs."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK", "GLOO_")
    launchers += ("NNODES", "RDZV_", "TORCHELASTIC_", "TORCH_DIST", "SLURM_", "PYTHONWARNINGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RESTARTS": "0"}
    return env | variables


COMMAND = ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py", "."]


class Job:
    """The script on two ranks: of one host, or of two that share a folder."""

    def __init__(self, hosts, folder, *, on=(LEFT, RIGHT), meets=-1, env=None):
        (folder / "train.py").write_text(SCRIPT)
        self.folder = folder
        self.processes = {}
        for number, name in enumerate(on):
            variables = {"RANKS": str(2 // len(on)), "NNODES": str(len(on))}
            if len(on) > 1:
                variables |= {"RDZV_ENDPOINT": f"{LEFT}:29400", "NODE_RANK": str(number)}
            self.processes[name] = hosts.start(
                name,
                [*COMMAND, str(meets)],
                log=folder / f"log-{name}",
                cwd=folder,
                env=environment(**variables, **(env or {}).get(name, {})),
            )

    def wait(self, within_s=END_S):
        """Returns the exit codes of both hosts, once nothing runs there any more."""
        deadline = time.monotonic() + within_s
        try:
            return [p.wait(deadline - time.monotonic()) for p in self.processes.values()]
        finally:
            for name in self.processes:
                print(f"-- {name}:\n{self.said(name)}")

    def reached(self):
        """Returns once both ranks are in the step in which they wait for :meth:`go`."""
        deadline = time.monotonic() + START_S
        while not all((self.folder / f"at-{rank}").exists() for rank in range(2)):
            ended = [name for name, p in self.processes.items() if p.poll() is not None]
            assert not ended, self.said(ended[0])
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)

    def go(self):
        (self.folder / "go").touch()

    def said(self, name):
        return (self.folder / f"log-{name}").read_text()

    def models(self):
        return [(self.folder / f"model-{rank}.safetensors").read_bytes() for rank in range(2)]


@pytest.fixture(scope="module")
def unbroken(possible, tmp_path_factory):
    """The models of two ranks on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    with Hosts(LEFT) as one:
        job = Job(one, folder, on=[LEFT])
        assert job.wait(START_S) == [0]
    models = job.models()
    assert models[0] == models[1]
    return models


def resume(hosts, folder, unbroken):
    """The same command again ends with the bits of a run that was never cut."""
    job = Job(hosts, folder, meets=6)
    assert job.wait(START_S) == [0, 0]
    assert job.models() == unbroken


def cut_for(hosts, folder, seconds):
    """Returns a job whose hosts were apart for so long, and how it ended."""
    job = Job(hosts, folder, meets=6)
    job.reached()
    hosts.cut(RIGHT)
    job.go()
    threading.Event().wait(seconds)
    hosts.join(RIGHT)
    return job, job.wait()


def test_a_short_cut_costs_nothing(hosts, tmp_path, unbroken):
    job, codes = cut_for(hosts, tmp_path, 1.0)
    assert codes == [0, 0]
    assert job.models() == unbroken


def test_a_cut_as_long_as_the_limit_ends_in_order_or_with_names(hosts, tmp_path, unbroken):
    job, codes = cut_for(hosts, tmp_path, 5.0)
    if codes == [0, 0]:
        assert job.models() == unbroken
        return
    assert 0 not in codes
    for name in (LEFT, RIGHT):
        assert "does not answer" in job.said(name) or "on right" in job.said(name)
    resume(hosts, tmp_path, unbroken)


@pytest.mark.parametrize("cut", [LEFT, RIGHT])
def test_a_cut_for_good_ends_both_sides(hosts, tmp_path, unbroken, cut):
    job = Job(hosts, tmp_path, meets=6)
    job.reached()
    hosts.cut(cut)  # the left one has rank 0 and the store
    job.go()
    assert 0 not in job.wait()
    assert (
        "rank 1 on right failed in on_step_end at step 6: HangError: nothing was heard of it"
        in (job.said(LEFT))
    )
    assert "rank 1 on right (pid " in job.said(RIGHT)
    assert f"the rendezvous store at {LEFT}:29400, where ranks post" in job.said(RIGHT)
    assert "does not answer" in job.said(RIGHT)
    if cut == LEFT:
        hosts.join(cut)
        resume(hosts, tmp_path, unbroken)


def test_a_host_that_was_given_up_harms_nothing(hosts, tmp_path, unbroken):
    """Its ranks live on when the job is begun again on another one, which cannot ask it."""
    old = Job(hosts, tmp_path, on=[LEFT], meets=6)
    old.reached()
    hosts.cut(LEFT)
    new = Job(hosts, tmp_path, on=[RIGHT])
    assert new.wait(START_S) == [0]
    assert new.models() == unbroken
    run = tmp_path / "run"
    assert f"{run.name} is taken over from another start of this run (pid " in new.said(RIGHT)
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    old.go()
    assert old.wait() == [1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == left
    taken = r"RunTaken: another start of this run \(pid \d+ on right, since .*\) writes to "
    taken += f"{re.escape(str(run))} now"
    assert re.search(taken, old.said(LEFT))


def test_clocks_a_minute_apart_change_nothing(hosts, tmp_path, unbroken):
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    offset = {"LD_PRELOAD": str(library), "FAKETIME": "+60s"}
    job = Job(hosts, tmp_path, env={LEFT: offset})
    assert job.wait(START_S) == [0, 0]
    assert job.models() == unbroken


# ----------------------------------------------------------------------------- how hosts meet

MEET = """
import dtrain
try:
    world = dtrain.init(timeout_s=40)
    print("in:", world.comm.gather_objects("host", world.host), flush=True)
except dtrain.LaunchError as error:
    print("LaunchError:", error, flush=True)
    raise SystemExit(3)
"""


def meet(hosts, folder, **env):
    """Starts a rank on each host by its variables alone; returns exit codes and what was said."""
    (folder / "meet.py").write_text(MEET)
    processes = {}
    for rank, name in enumerate((LEFT, RIGHT)):
        given = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        given |= {"MASTER_ADDR": LEFT, "MASTER_PORT": "29400"} | env
        log, command = folder / f"log-{name}", [sys.executable, "meet.py"]
        processes[name] = hosts.start(name, command, log=log, cwd=folder, env=environment(**given))
    codes = [process.wait(START_S) for process in processes.values()]
    return codes, [(folder / f"log-{name}").read_text() for name in processes]


def test_hosts_meet_by_variables_alone(hosts, tmp_path):
    codes, said = meet(hosts, tmp_path)
    assert codes == [0, 0], said
    assert all("in: ['left', 'right']" in one for one in said)


def test_a_host_whose_own_name_is_loopback_is_named_on_all(hosts, tmp_path):
    """As in Debian's /etc/hosts: gloo would listen where no other host can reach it."""
    hosts.add_name("127.0.1.1", RIGHT)
    codes, said = meet(hosts, tmp_path)
    assert codes == [3, 3], said
    words = "right: its own name resolves to 127.0.1.1, which is loopback (GLOO_SOCKET_IFNAME=eth0)"
    assert all(words in one for one in said)
    codes, said = meet(hosts, tmp_path, GLOO_SOCKET_IFNAME="eth0")
    assert codes == [0, 0], said


def test_a_name_that_no_host_knows_is_said_on_all(hosts, tmp_path):
    codes, said = meet(hosts, tmp_path, MASTER_ADDR="nowhere")
    assert codes == [3, 3], said
    for rank, one in enumerate(said):
        assert f"LaunchError: rank {rank} on " in one
        assert "MASTER_ADDR=nowhere does not resolve (" in one
        assert len(one.splitlines()) == 1  # not torch's flood
