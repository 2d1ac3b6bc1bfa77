"""How far a run is."""

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """How far the run is. Equal on all ranks.

    Attributes:
        step: global steps taken since the run began, over all epochs and restarts.
        updates: steps whose optimizer update was applied; fewer than ``step`` where a
            loss scale overflowed or every rank skipped. With a fused optimizer on CUDA, the
            step just taken is counted once its outcome has arrived: in the next step, or as soon
            as somebody asks for ``step.applied``.
        epoch: the epoch under way, from 0; after ``fit``, how many were finished.
        step_in_epoch: steps taken in this epoch.
        samples: samples all ranks trained on since the run began.
        total_steps: steps planned, or None where nobody can know.
        steps_per_epoch: steps planned in an epoch, or None.
        total_epochs: epochs planned, or None.
    """

    step: int = 0
    updates: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    total_epochs: int | None = None
