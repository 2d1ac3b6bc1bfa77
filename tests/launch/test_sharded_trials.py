"""`dtrain check` and `dtrain drill` of a script whose model is sharded."""

from pathlib import Path

import pytest

from dtrain.trials.check import Check
from dtrain.trials.drill import Drill
from dtrain.trials.launcher import Launcher

GPT = Path(__file__).parents[2] / "examples" / "gpt.py"
SHARDED = ["--size", "tiny", "--batch-size", "6", "--strategy", "fsdp"]


@pytest.mark.slow
def test_a_sharded_gpt_has_the_numbers_of_one_process():
    with Launcher(most_ranks=2) as launcher:
        found = Check(launcher, GPT, SHARDED, 2, 2, 100).run([2])
    assert found.passed, str(found)
    assert [name for name in str(found).splitlines() if name.startswith("2 ranks")]
    assert found.dtype == "float64"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sharded_gpt_survives_kills_and_goes_on_with_other_ranks(tmp_path):
    args = [*SHARDED, "--precision", "fp32", "--steps", "6", "--run-dir", tmp_path / "run"]
    with Launcher(most_ranks=3, command="drill") as launcher:
        found = Drill(launcher, GPT, args, 2, 6, 0, timeout_s=100).run(kills=1, other_ranks=3)
    assert found.passed, str(found)
    assert [trial.done.partition(",")[0] for trial in found.trials] == [
        "kill -9 of all ranks",
        "kill -9 within a save",
        "SIGTERM to rank 1",
        "kill -9 of all ranks",
    ]
