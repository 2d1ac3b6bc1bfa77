"""Which faults a drill lets loose, drawn from a seed."""

from __future__ import annotations

import random

from dtrain.trials.drill.orders import HOOKS, MAIN_WRITES, MOMENTS, OTHER_WRITES, Fault


def draw(*, kills: int, ranks: int, steps: int, save_every: int, seed: int) -> list[Fault]:
    """Returns the faults of a drill, one a trial.

    Args:
        kills: how many kills in a step: of all ranks and of one, in turn. Half as many more fall
            on the making of a checkpoint, and one rank is preempted.
        ranks: how many there are.
        steps: of the undisturbed run.
        save_every: checkpoints are made after every so many steps at least.
        seed: which steps, ranks and places.
    """
    drawing = random.Random(seed)
    faults = [
        Fault(
            "kill one" if number % 2 and ranks > 1 else "kill all",
            # After the first checkpoint where there is one: before it, a run begins anew.
            step=drawing.randint(min(save_every + 1, steps - 1), steps - 1),
            rank=drawing.randrange(ranks) if number % 2 else 0,
            hook=drawing.choice(HOOKS),
        )
        for number in range(kills)
    ]
    saved = [*range(save_every, steps, save_every)] or [steps]
    # A torn file, and a checkpoint that is whole but hardly in its place, in turn.
    for number in range((kills + 1) // 2):
        step = drawing.choice(saved)
        if number % 2:
            faults.append(Fault("kill renaming", step, place=drawing.randrange(MOMENTS)))
        else:
            rank = drawing.randrange(ranks)
            place = drawing.randrange(OTHER_WRITES if rank else MAIN_WRITES)
            faults.append(Fault("kill writing", step, rank, place=place))
    step = drawing.randint(1, steps - 2)  # the next one carries it to all ranks
    faults.append(Fault("preempt", step=step, rank=drawing.randrange(ranks)))
    return faults
