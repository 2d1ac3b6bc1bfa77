"""A job with a spare node, on a real SLURM: a slow one is left out, and one that does not answer.

The slow one is the job's first, where the batch script runs. What makes it slow stands only here.
"""

import sys
from pathlib import Path

import pytest
from cluster import TRAIN

from dtrain.cluster.batch import render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: In place of Python. In the first start n1 computes next to nothing; in the second, n2's ends.
PYTHON = """#!/bin/bash
case " $* " in *" dtrain health "*)
    if [[ $SLURMD_NODENAME == n1 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        exec PYTHON -c "import sys
from dtrain.cli import main
from dtrain.distributed import health
health.multiply = lambda device: 0.5
sys.argv[1:] = sys.argv[3:]
main()" "$@"
    fi
    [[ $SLURMD_NODENAME != n2 || ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 3
esac
exec PYTHON "$@"
"""


def test_the_slow_node_is_left_out_and_so_is_one_that_does_not_answer(cluster, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    options = {"exclusive": None, "nodelist": "n1,n2,n3", "nodes": "3"}
    script = folder / "job.sbatch"
    text = render("many_nodes", options=options, spares=1)
    script.write_text(text.replace(" dtrain health ", " dtrain health --within=15 "))
    arguments = [str(TRAIN), str(folder), "1"]
    job = cluster.submit(folder, script, *arguments, RANKS="1", PYTHON=str(python))
    job.wait_until_at(0, 2)
    job.signal()
    assert job.wait(200) == ("COMPLETED", 1), job.log()
    first, second = job.log().split("requeue", 1)
    assert "node n1 computes 0.5 GFLOP/s (rank 0), where the median is " in first
    assert "chosen: n2 n3; left out: n1\n" in first
    assert "node n2 says nothing (rank 1)\n" in second
    assert "chosen: n1 n3; left out: n2\n" in second
    saved = job.notes("start")[1, 0]
    assert 0 < int(saved) < 600
    assert job.notes("start") == {(0, 0): "0", (0, 1): "0", (1, 0): saved, (1, 1): saved}
    one, other = job.models()
    assert one == other
    assert not list(Path(folder).glob(".dtrain-nodes-*"))
