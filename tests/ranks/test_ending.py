"""A process ends as it should: no thread of dtrain's or torch's aborts it on the way out."""

import os
import subprocess
import sys

import pytest
from torch.distributed import PrefixStore

from dtrain.distributed.rendezvous import serve_store

# The interpreter takes its time to end, so that a thread that is left would ask for its lock
# meanwhile, and abort the process.
SCRIPT = """
import torch
from torch.utils.data import TensorDataset

import dtrain
from dtrain.watchdog import store, thread

store.CALL_S = thread.CALL_S = 0.2
thread._AT_EXIT_S = 2.0
world = dtrain.init()
connect = world.connect


def connect_late():
    store = connect()
    store.get("answer")
    return store


world.connect = connect_late
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = dtrain.Trainer(model, optimizer, lambda model, x: model(x[0]).mean(), sinks=[])
trainer.fit(TensorDataset(torch.ones(8, 3)), batch_size=4, epochs=1)
world.close()
print("trained", flush=True)
import slow_end
"""

SLOW_END = """
import time


class SlowEnd:
    def __del__(self, sleep=time.sleep):
        sleep(1)


slow_end = SlowEnd()
"""

COUNTING = """
import gc, sys
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint


def threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


gc.disable()  # whatever is in a cycle stays
world = dtrain.init()
model = torch.nn.Linear(3, 1)
trainer = dtrain.Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, x: model(x[0]).mean(),
    callbacks=[Checkpoint(every_steps=2)],
    sinks=[],
    strategy=sys.argv[1],
    run_dir="run",
)
trainer.fit(TensorDataset(torch.ones(24, 3)), batch_size=4, epochs=1)
before = threads()
world.close()
print(f"{before} threads of process groups, then {threads()}")
"""


@pytest.mark.parametrize(
    ("answers", "code", "words"),
    [
        (True, 0, ""),
        (False, 1, "dtrain: a call of the rendezvous store is stuck, and is left; the process"),
    ],
)
def test_a_thread_in_the_store_does_not_abort_the_process(tmp_path, answers, code, words):
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    store = serve_store(60.0)
    ranks = start(tmp_path, SCRIPT, store)
    told = [rank.stdout.readline() for rank in ranks]
    if answers:
        PrefixStore("dtrain/0/0", store).set("answer", "yes")
    for rank, line in zip(ranks, told, strict=True):
        _, stderr = rank.communicate(timeout=60)
        assert (line, rank.returncode) == ("trained\n", code), stderr
        assert "terminate called" not in stderr
        assert words in stderr


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_no_process_group_outlives_the_world(tmp_path, strategy):
    # One that does ends with the interpreter, and now and then the process aborts over it.
    store = serve_store(60.0)
    for rank in start(tmp_path, COUNTING, store, strategy):
        stdout, stderr = rank.communicate(timeout=60)
        # Two threads each: for gradients, for comm, for checkpoints.
        assert (stdout, rank.returncode) == ("6 threads of process groups, then 0\n", 0), stderr


def start(folder, script, store, *arguments):
    """Starts two ranks that run the script."""
    (folder / "train.py").write_text(script)
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "train.py", *arguments],
            cwd=folder,
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
