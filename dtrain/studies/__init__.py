"""Runs side by side: their figures, what differs between them, and pictures of both."""

from dtrain.studies.existing import compare_runs
from dtrain.studies.pick import Pick, check_metric, guess_mode
from dtrain.studies.picture import draw, make_ready
from dtrain.studies.run import Run, read_rows
from dtrain.studies.table import Table, make_table
from dtrain.studies.terminal import draw_in_terminal

__all__ = [
    "Pick",
    "Run",
    "Table",
    "check_metric",
    "compare_runs",
    "draw",
    "draw_in_terminal",
    "guess_mode",
    "make_ready",
    "make_table",
    "read_rows",
]
