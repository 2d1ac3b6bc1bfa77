"""What befalls the runs of a drill, drawn from a seed; and what a rank is told about one start."""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill all", "kill one", "kill writing", "kill renaming", "preempt"]

#: In which hooks a step can be broken off: before the update of the parameters, and after it.
_HOOKS = ("on_grads_ready", "on_step_end")
#: How many files of a checkpoint rank 0 writes at least, and any other rank.
_MAIN_WRITES, _OTHER_WRITES = 5, 2
_MOMENTS = 2  # around its renaming


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What goes wrong, once.

    ``kill all`` and ``kill one`` send SIGKILL in a step, ``kill writing`` sends it to a rank that
    has written half a file of a checkpoint, ``kill renaming`` to rank 0 just before or after the
    checkpoint gets its name, ``preempt`` sends SIGTERM to one rank.
    """

    kind: Kind
    step: int  # how many steps are done by then: with on_grads_ready, without that step's own
    rank: int = 0  # the one that suffers it
    hook: str = "on_step_end"  # or on_grads_ready, where it is in a step
    place: int = 0  # at which of the rank's files, or at which moment, from 0

    @property
    def in_save(self) -> bool:
        """It falls on the making of a checkpoint."""
        return self.kind in ("kill writing", "kill renaming")

    def words(self, ranks: int) -> str:
        """Returns what is to be done, before it is known where it came to."""
        if self.kind == "kill all":
            return "kill -9 of all ranks" if ranks > 1 else "kill -9"
        if self.kind == "kill one":
            return f"kill -9 of rank {self.rank}"
        return "kill -9 within a save" if self.in_save else f"SIGTERM to rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a script."""

    run_dir: str  # in place of the script's own
    steps: int  # global steps of the run, at most
    save_every: int  # a checkpoint every so many steps, beside the script's own
    disturbance: Disturbance | None = None  # what befalls this start; None leaves it alone


def draw(*, kills: int, ranks: int, steps: int, save_every: int, seed: int) -> list[Disturbance]:
    """Returns the disturbances of a drill, one a trial; the seed says which.

    So many kills fall in a step of the run's ``steps``, on all ranks and on one in turn; half as
    many more on the making of a checkpoint, every ``save_every`` steps; and one rank is preempted.
    """
    drawing = random.Random(seed)
    drawn = [
        Disturbance(
            "kill one" if number % 2 and ranks > 1 else "kill all",
            # After the first checkpoint where there is one: before it, a run begins anew.
            step=drawing.randint(min(save_every + 1, steps - 1), steps - 1),
            rank=drawing.randrange(ranks) if number % 2 else 0,
            hook=drawing.choice(_HOOKS),
        )
        for number in range(kills)
    ]
    saved = [*range(save_every, steps, save_every)] or [steps]
    # A torn file, and a checkpoint that is whole but hardly in its place, in turn.
    for number in range((kills + 1) // 2):
        step = drawing.choice(saved)
        if number % 2:
            drawn.append(Disturbance("kill renaming", step, place=drawing.randrange(_MOMENTS)))
        else:
            rank = drawing.randrange(ranks)
            place = drawing.randrange(_OTHER_WRITES if rank else _MAIN_WRITES)
            drawn.append(Disturbance("kill writing", step, rank, place=place))
    step = drawing.randint(1, steps - 2)  # the next one carries it to all ranks
    return [*drawn, Disturbance("preempt", step, rank=drawing.randrange(ranks))]
