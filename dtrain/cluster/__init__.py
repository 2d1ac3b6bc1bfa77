"""What schedulers want of a run, and a run of them: batch scripts, signals, deadlines."""

from dtrain.cluster.batch import Kind, render
from dtrain.cluster.signals import Deadline, Launcher, Signals
from dtrain.cluster.slurm import describe_job, lacking, log_path, tasks_in_queue

__all__ = [
    "Deadline",
    "Kind",
    "Launcher",
    "Signals",
    "describe_job",
    "lacking",
    "log_path",
    "render",
    "tasks_in_queue",
]
