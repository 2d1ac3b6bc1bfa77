"""One run of a study, as a script of its own: ``run_of_study.py STUDY_FOLDER NUMBER``.

What a batch job runs on each of its ranks.
"""

import os
import sys


def main(folder: str, number: str) -> int:
    """Runs a study's script as the run of that number; returns an exit code."""
    from dataclasses import replace
    from pathlib import Path

    from dtrain.errors import ConfigError
    from dtrain.trials.fork_server import RECORDED
    from dtrain.trials.runner import run_script
    from dtrain.trials.study_files import StudyFolder, fail_run
    from dtrain.trials.study_trial import in_a_line, make_trial

    study = StudyFolder(Path(folder))
    note = study.read()
    if note is None:
        raise ConfigError(f"{folder} holds no study")
    name, seed = note.runs[int(number)]
    if study.read_run(name, seed).state == "finished":
        return RECORDED  # a job that was requeued after it
    variant = next(one for one in note.variants if one.name == name)
    # Others look for the folder once all ranks have met, which rank 0 comes to after this.
    main_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    place = study.prepare_run(name, seed) if main_rank else study.run_dir(name, seed)
    setup = {"variant": name, "seed": seed, "overrides": variant.overrides}
    words = [str(one) for one in variant.changes]
    trial = make_trial(setup | {"words": words}, place)
    if main_rank:
        told = f"run {number} of the study: {name}, seed {seed}, in {place}"
        print(f"dtrain ablate: {told}", flush=True)  # noqa: T201
    sys.argv = [note.script, *note.args, *variant.arguments]
    sys.path.insert(0, str(Path(note.script).parent))
    code = run_script(trial, note.script)
    if main_rank and code != RECORDED and (run := study.read_run(name, seed)).state == "unfinished":
        # Before there was a Trainer, which notes it by itself.
        fail_run(place, replace(run, changes=words), in_a_line(trial.error))
    return code


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, where the script must find nothing
    sys.exit(main(*sys.argv[1:]))
