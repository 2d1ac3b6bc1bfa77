"""How often studies say of a useless tweak that it matters: 50 studies of 3 seeds each.

    python benchmarks/useless_tweak.py

The tweak draws a random number in each step, so that dropout draws others: noise and nothing else.
All studies are one, of 150 seeds, whose table is made 50 times, of three seeds each. At 5 % one
expects 2.5 of 50; at most 4 are taken for right.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import dtrain
from dtrain.studies import make_table
from dtrain.trials.study_files import StudyFolder

SCRIPT = Path(__file__).absolute().parents[1] / "tests" / "launch" / "study_script.py"
STUDIES, SEEDS, MOST = 50, 3, 4


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        whole = dtrain.ablate(
            SCRIPT,
            without=["Useless"],
            seeds=STUDIES * SEEDS,
            folder=Path(folder) / "study",
        )
        note = StudyFolder(whole.folder).read()
        assert note is not None
        runs = StudyFolder(whole.folder).runs(note.runs)
    verdicts: dict[str, int] = {}
    for number in range(STUDIES):
        mine = [run for run in runs if run.seed // SEEDS == number]
        table = make_table(mine, whole.report.pick)
        verdict = table.rows[1]["verdict"]
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    wrong = sum(verdicts.get(one, 0) for one in ("better", "worse"))
    print(f"{STUDIES} studies of {SEEDS} seeds, in {time.monotonic() - began:.0f} s: {verdicts}")
    print(f"say that the useless tweak matters: {wrong} (at most {MOST})")
    print(f"of all {STUDIES * SEEDS} seeds: {whole.report.rows[1]['sentence']}")
    if wrong > MOST:
        sys.exit(1)


if __name__ == "__main__":
    main()
