"""What ranks compare before a checkpoint is made, as it holds once what is equal on all."""

from collections.abc import Sequence

import torch

from dtrain.checkpoint.run_state import RunState
from dtrain.checkpoint.writer import Content
from dtrain.distributed import Comm, Replicas, digest_of, not_finite, some_of


class Comparison:
    """Finds, with one exchange, who can share the work, and what a user must hear.

    Ranks: all, communicates where a method does not say that it is local.
    """

    def __init__(self, run_state: RunState, replicas: Replicas) -> None:
        self._run_state, self._replicas = run_state, replicas
        self._broken: set[str] = set()  # weights that were not finite when the fit began
        self._told: set[str] = set()  # whose state differs between ranks

    def begin(self) -> None:
        """Notes what a fit begins with. Local."""
        self._broken = {*not_finite(self._run_state.context.model)}

    def of(self, content: Content) -> tuple[range, list[str] | None]:
        """Returns which ranks may divide ``content``, and weights that have become NaN or infinite.

        These are this rank's own, and None where no rank has any.
        """
        state = self._run_state
        broken = [n for n in not_finite(state.context.model) if n not in self._broken]
        states = state.digests(content) if self._replicas.active else {}
        of_states = int(digest_of([*states.items()]), 16) >> 1
        mine = torch.tensor([of_states, content.layout(), bool(broken)])
        everyones = state.world.comm.all_gather(_LABEL, mine)
        states_differ, layouts_differ, _ = (everyones != everyones[0]).any(0).tolist()
        if states_differ:
            self._tell_differing(states)
        # What is divided among ranks must be the same on all. Callbacks see to theirs, and where
        # one keeps something of its own on some ranks, rank 0's is what counts.
        sharers = range(1 if states_differ or layouts_differ else state.world.size)
        return sharers, broken if bool(everyones[:, 2].any()) else None

    def _tell_differing(self, states: dict[str, str]) -> None:
        """Says whose state is not the same on all ranks, by the digests of this one's."""
        differing = self._run_state.differing(states)
        if new := [name for name in differing if name not in self._told]:
            self._told |= {*new}
            self._run_state.context.say(
                f"warning: the state of {some_of(new)} differs between ranks, and a checkpoint "
                "holds rank 0's. What is a rank's own belongs in a callback's rank_state_dict() "
                "and load_rank_state_dict(state); all else must change alike on all ranks."
            )


def sharers_of(content: Content, healthy: Sequence[bool], comm: Comm) -> list[int]:
    """Returns which of the ``healthy`` ranks may divide ``content``; of all, where none is.

    Ranks: all, communicates.
    """
    layouts = comm.all_gather(_LABEL, torch.tensor(content.layout()))
    sharers = [rank for rank, well in enumerate(healthy) if well or not any(healthy)]
    return sharers[:1] if bool((layouts != layouts[0]).any()) else sharers


_LABEL = "checkpoint: what it holds"
