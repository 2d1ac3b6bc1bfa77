"""`dtrain report`: a page about runs, in one file."""

from dtrain.report.page import make_page
from dtrain.report.runs import RunStory, read_runs

__all__ = ["RunStory", "make_page", "read_runs"]
