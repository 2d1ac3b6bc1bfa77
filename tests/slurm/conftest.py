"""A SLURM for these tests, if this machine can have one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import ENV, Cluster

SCRIPT = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Five idle nodes; all of it is stopped at the end."""
    if not os.environ.get("CI"):
        if os.geteuid() != 0:
            pytest.skip("SLURM's daemons have to be started by root")
        if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
            pytest.skip("SLURM is not installed, and there is no apt-get to install it")
    folder = tmp_path_factory.mktemp("cluster")
    control(folder, "start")
    try:
        yield Cluster(folder)
    finally:
        control(folder, "stop")


def control(folder, what):
    done = subprocess.run(
        ["bash", str(SCRIPT), what, str(folder)],
        env=ENV,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
