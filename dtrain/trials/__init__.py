"""A user's script, run as others would run it: `dtrain check`, `dtrain drill`, `dtrain ablate`."""

from dtrain.trials.ablation import (
    RUN_OF_STUDY,
    Study,
    ablate,
    listed_seeds,
    run_and_show,
    study_runner,
    table_of_study,
)
from dtrain.trials.changes import Change, Variant
from dtrain.trials.commands import check_equivalence, drill_script
from dtrain.trials.report import Drilled, Equivalence, TrialReport

__all__ = [
    "RUN_OF_STUDY",
    "Change",
    "Drilled",
    "Equivalence",
    "Study",
    "TrialReport",
    "Variant",
    "ablate",
    "check_equivalence",
    "drill_script",
    "listed_seeds",
    "run_and_show",
    "study_runner",
    "table_of_study",
]
