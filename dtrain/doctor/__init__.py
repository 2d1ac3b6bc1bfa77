"""`dtrain doctor`: whether a run would work here, and what to do if not."""

from dtrain.doctor.examination import Examination, examine
from dtrain.doctor.findings import Finding

__all__ = ["Examination", "Finding", "examine"]
