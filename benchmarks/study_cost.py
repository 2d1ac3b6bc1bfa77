"""What a study costs beyond its runs: 8 variants x 3 seeds of examples/digits.py.

    python benchmarks/study_cost.py [--jobs 2]

Runs tell how long they took, from the script's first line to its last. What is left of the wall
time is dtrain's: two starts of Python and torch, looking at the script, folders, forks, the table
and the picture. The start is told apart: it is over when the first run begins.
"""

import argparse
import tempfile
import time
from pathlib import Path

import dtrain
from dtrain.trials.study_files import StudyFolder

DIGITS = Path(__file__).parents[1] / "examples" / "digits.py"
WITHOUT = ["ClipGradients", "GradientAccumulation", "LRSchedule", "EarlyStopping"]
SET = ["ClipGradients.max_norm=0.1", "GradientAccumulation.micro_batch_size=64"]
ARG = ["--lr 0.002", "--batch-size 128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep the study in this folder")
    args = parser.parse_args()
    began, first = time.monotonic(), 0.0

    def progress(words: str) -> None:
        nonlocal first
        if words.startswith("1 of"):
            first = time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        study = dtrain.ablate(
            DIGITS,
            ["--epochs", "12"],
            without=WITHOUT,
            set=SET,
            arg=ARG,
            seeds=3,
            jobs=args.jobs,
            folder=args.keep or Path(folder) / "study",
            progress=progress,
        )
        whole = time.monotonic() - began
        note = StudyFolder(study.folder).read()
        assert note is not None
        runs = [StudyFolder(study.folder).read_run(*one) for one in note.runs]
    print(study)
    inside = sum(run.seconds for run in runs) / args.jobs
    start = first - began
    beyond = whole - start - inside
    print(
        f"\n{len(runs)} runs, {args.jobs} at a time: {whole:.0f} s, of which {start:.1f} s until "
        f"the first began, {inside:.0f} s in the runs, and {beyond:.1f} s beside them: "
        f"{beyond / inside:.1%} of the runs"
    )


if __name__ == "__main__":
    main()
