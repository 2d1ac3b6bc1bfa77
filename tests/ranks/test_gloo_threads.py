"""Gloo's threads do not push one another off a core; all other threads stay as they were."""

import os
import threading
from pathlib import Path

import dtrain
from dtrain.distributed.transport import yielding_threads
from dtrain.testing import run_processes

GLOO = {"pt_gloo_runloop", "gloo_tcp_loop"}


def ordinary():
    """Whatever this process was started under."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def policies():
    ordinary()
    world = dtrain.init(seed=0)
    world.open_comm().barrier("a group that is opened later, too")
    found = []
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        found.append((name, os.sched_getscheduler(int(task.name))))
    return found, os.sched_getscheduler(0)


def test_threads_of_gloo_yield_and_others_do_not():
    for found, of_main in run_processes(policies, 2):
        of_gloo = [policy for name, policy in found if name in GLOO]
        # Three groups: for gradients, control, and the thread beside; each has its own.
        assert len(of_gloo) >= 6
        assert set(of_gloo) == {os.SCHED_BATCH}
        assert of_main == os.SCHED_OTHER


def policy_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return found[0]


def test_where_it_is_forbidden_all_goes_on(monkeypatch):
    ordinary()
    with yielding_threads():
        assert policy_of_a_new_thread() == os.SCHED_BATCH
    assert policy_of_a_new_thread() == os.SCHED_OTHER
    for error in (PermissionError(1, "not permitted"), OSError(38, "not implemented")):
        for name in ("sched_setscheduler", "sched_getscheduler"):
            with monkeypatch.context() as patched:

                def refuse(*args, error=error):
                    raise error

                patched.setattr(os, name, refuse)
                with yielding_threads():
                    patched.undo()
                    assert policy_of_a_new_thread() == os.SCHED_OTHER


def test_a_policy_that_was_chosen_stays():
    def chosen():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with yielding_threads():
            inside.append(os.sched_getscheduler(0))
        inside.append(os.sched_getscheduler(0))

    inside = []
    thread = threading.Thread(target=chosen)
    thread.start()
    thread.join()
    assert inside == [os.SCHED_IDLE, os.SCHED_IDLE]
