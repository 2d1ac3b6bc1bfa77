"""How long each rank's own work takes, so that one that holds up the others is named."""

from time import perf_counter

import torch

from dtrain.distributed import Comm

#: A rank is named if its own work takes so many times that of the median rank,
SLOWER = 1.5
WORTH_IT = 0.1  # and if what it takes longer is at least this share of a step: else nobody gains
#: Compared are means over at least so many steps; the first of all is left out, as it warms up.
STEPS = 20
SECONDS = 1.0  # and over at least so many seconds, so that the comparison costs next to nothing
#: What tells how many seconds it is, among the training metrics, until they are agreed.
SECONDS_METRIC = "dtrain: seconds of steps"


class StragglerClock:
    """Adds up a rank's own seconds: what it does before and after it waits for the others.

    In data-parallel training all ranks' steps take equally long, because each waits in backward
    for the slowest; so the time in backward is left out. On CUDA, kernels run on while the host
    has gone ahead: there it is the host's work and its wait for data that is compared.

    Ranks: all.
    """

    def __init__(self, comm: Comm, *, host: str, size: int) -> None:
        self._comm, self._host, self._size = comm, host, size
        self._named: set[int] = set()
        self._began = self._forwarded = 0.0
        self._steps = -1  # the first does not count
        self._own_s = self._data_s = 0.0
        #: What the longest step took of both, which is left out: the job may have been suspended.
        self._longest = (0.0, 0.0)
        self._before = (0.0, 0.0)  # what both were as this step began
        self.seconds = 0.0  # how long the steps took that were not compared yet

    def begin_step(self) -> None:
        """A global step begins."""
        self._began = perf_counter()
        self._before = self._own_s, self._data_s

    def waited_for_data(self, since: float) -> None:
        """A micro-batch has come, which was waited for ``since`` that time of the clock."""
        self._data_s += perf_counter() - since

    def forwarded(self) -> None:
        """The last micro-batch's loss is computed; from here on others are waited for."""
        self._forwarded = perf_counter()

    def reduced(self) -> None:
        """All gradients are there."""
        self._own_s -= perf_counter() - self._forwarded

    def end_step(self) -> None:
        """The step is over."""
        took = perf_counter() - self._began
        self._own_s += took
        self.seconds += took
        self._steps += 1
        if (own_s := self._own_s - self._before[0]) > self._longest[0]:
            self._longest = own_s, self._data_s - self._before[1]
        if not self._steps:
            self._restart()

    def _restart(self) -> None:
        self._own_s = self._data_s = self.seconds = 0.0
        self._longest = 0.0, 0.0
        self._steps = 0

    def compare(self, seconds: float) -> str:
        """Returns who holds up the others, in words, if somebody does; and begins anew.

        All know from ``seconds``, the mean of all ranks' :attr:`seconds`, whether to compare.
        Ranks: all, communicates once there is enough to compare; equal on all ranks.
        """
        if self._size == 1 or self._steps < STEPS or seconds < SECONDS:
            return ""
        own_s, data_s = self._own_s - self._longest[0], self._data_s - self._longest[1]
        count = self._steps - 1
        means = [own_s / count, data_s / count, self.seconds / self._steps]
        mine = torch.tensor(means, dtype=torch.float64)
        self._restart()
        own, data, step = self._comm.all_gather("stragglers", mine).unbind(1)
        rank = int(own.argmax())
        slowest, median = float(own[rank]), float(own.median())
        slow = slowest > SLOWER * median and slowest - median >= WORTH_IT * float(step.mean())
        if not slow or rank in self._named:
            return ""
        self._named.add(rank)
        host = self._comm.gather_objects("hosts", self._host)[rank]
        return (
            f"rank {rank} on {host} holds up the others: its own work takes {slowest:.3g} s a "
            f"step, {float(data[rank]):.3g} s of it waiting for data, where the median rank's "
            f"takes {median:.3g} s"
        )
