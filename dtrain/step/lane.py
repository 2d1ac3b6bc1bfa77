"""The lane: what ranks tell one another inside the gradient reduction that happens anyway.

:class:`Lane` owns one extra parameter of a few zeros, which is no part of the user's model. In each
step's last backward, its gradient is what this rank has to say: its samples' weight, its weighted
loss, its votes. DDP sums that in the bucket it sends anyway; so all know the global weight (which
normalises the gradients), the global loss and everyone's votes, without a collective.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dtrain.errors import DtrainError
from dtrain.step.precision import Factor


class Slot(IntEnum):
    """Places in the lane. All but ``WEIGHT`` and ``LOSS`` are counts."""

    CANARY = 0  # rank 0 says W, the others 1: the sum is 2W - 1, or no reduction happened
    WEIGHT = 1  # units / reference weight
    LOSS = 2  # units / reference weight * mean loss
    SAMPLES = 3  # modulo 256 in each micro-batch: float32 holds whole numbers to 2^24 only
    SAMPLES_256 = 4  # the same in units of 256 samples
    STOP = 5
    SAVE = 6
    PREEMPT = 7
    SKIPPED = 8  # micro-batches left out on request
    ERROR = 9
    NONFINITE = 10  # micro-batches whose loss is NaN or infinite
    FED = 11  # ranks that had a batch
    # Ranks whose stream has no batch for the next step, or not even for this one, where that
    # ends the epoch for all:
    ENDING = 12
    STARVED = 13
    LEAVING = 14  # ranks that cannot finish the step because the job is being ended
    CHANGED = 15  # ranks that found other parameters to train than are reduced


# Where these are among the counts.
_ERROR, _FED = Slot.ERROR - Slot.STOP, Slot.FED - Slot.STOP
_STARVED, _LEAVING = Slot.STARVED - Slot.STOP, Slot.LEAVING - Slot.STOP

_SEEDS = 32  # kept

#: As :func:`torch.autograd.backward`: of terms, from such gradients of them.
Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]


class Verdict(NamedTuple):
    """What all ranks said in a step. Equal on all of them."""

    weight: float  # units in the global batch
    loss_mean: float  # over those units; NaN where there are none
    factor: float  # what the reduced gradients must be multiplied by to be those of `loss_mean`
    samples: int  # in the global batch
    undone: bool  # nothing of the step counts: some rank failed, has to leave, or none had data
    # From here on in the order of the slots; how many ranks said so, where nothing else is said.
    stop: int
    save: int
    preempt: int
    skipped: int  # micro-batches
    errors: int
    nonfinite: int  # micro-batches
    fed: int
    ending: int
    starved: int
    leaving: int
    changed: int


class LaneSilent(DtrainError):
    """The lane came back without a reduction: some parameter's gradient never arrived."""


class Lane:
    """One rank's end of the lane, where the host has each number at once: on the CPU.

    It is in the model's precision (float32 at least) and on its device; see
    :class:`~dtrain.step.device_lane.DeviceLane` for one on an accelerator.

    A step is: :meth:`open`, then :meth:`add` and :meth:`backward` for each micro-batch and
    :meth:`say` for votes, :meth:`attach` at the start of the last forward, whose backward takes
    the voice along, and then :meth:`listen`. The reference weight is one of ``shares`` parts of a
    step's weight: the world size, so that gradients are those of DDP; or 1, so that what is
    multiplied by a loss scale is as large as in one process, and overflows with the same scale.
    """

    def __init__(self, model: nn.Module, rank: int, size: int, shares: int | None = None) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = parameters[0].device if parameters else torch.device("cpu")
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        dtype = torch.float64 if double else torch.float32
        self.param = nn.Parameter(torch.zeros(len(Slot), dtype=dtype, device=device))
        #: What backward starts from, times a share: 1, or what makes a sum over ranks a mean.
        self.start = 1.0
        #: Of what backward computes gradients, beside the lane's; if None, of all there is.
        self.inputs: Callable[[], list[Tensor]] | None = None
        self._reached: list[GradientEdge] = []  # and beside these, in the next one
        self._size = size
        self._shares = size if shares is None else shares
        self.expect(self._shares)
        self._message = torch.zeros(len(Slot), dtype=dtype)
        self._said: np.ndarray[Any, Any] = self._message.numpy()  # a view: no torch op to write
        self._largest = torch.finfo(dtype).max
        self._weight = self._loss = 0.0
        self._canary = size if rank == 0 else 1
        self._voice: Tensor | None = None
        # A mean over 10 ranks that say 1 may be 1.0000001, which is 1 all the same.
        self._rounding = size * torch.finfo(dtype).eps
        self._seed: Tensor | None = None  # what the next backward starts from
        self._seeds: dict[Any, Tensor] = {}  # those that come again, by what they are made of

    def restart(self, weight: float) -> None:
        """Begins a fit, maybe in another thread than the last; see :meth:`expect`."""
        self._voice = None
        self.expect(weight)

    def expect(self, weight: float) -> None:
        """Sets the reference weight from what a step is expected to weigh, over all ranks.

        Weights are divided by it before they touch the loss: in float16, a sum over 65,536 tokens
        would leave no room for the loss scale. Where each rank then weighs 1, nothing is rounded.
        """
        if weight > 0 and math.isfinite(weight):
            self.expected = float(weight)
            self.reference = self.expected / self._shares

    def observe(self, verdict: Verdict) -> None:
        """Moves the reference weight where steps weigh 4 times as much as expected, or as little.

        (Tokens, say, for samples.) Not for a ragged last batch: the next step would need a factor.
        """
        if verdict.weight > 0 and not 0.25 <= verdict.weight / self.expected <= 4:
            self.expect(verdict.weight)

    def open(self) -> None:
        self._said.fill(0)
        self._said[0] = self._canary
        self._weight = self._loss = 0.0
        self.param.grad = self._seed = None

    def add(
        self, loss: Tensor, weight: float | Tensor, samples: int, term: Tensor | None = None
    ) -> Tensor:
        """Adds a micro-batch; returns ``term``, the loss as it is to be differentiated (scaled)."""
        said = self._said
        if samples >= 256:
            said[Slot.SAMPLES_256] += samples // 256
            samples %= 256
        said[Slot.SAMPLES] += samples
        number, share = loss.item(), float(weight / self.reference)
        if not math.isfinite(number):
            said[Slot.NONFINITE] += 1
        said[Slot.WEIGHT] = self._weight = self._weight + share
        self._loss = loss_sum = self._loss + share * number
        if abs(loss_sum) > self._largest:  # infinite in float32; NumPy would warn of it
            loss_sum = math.copysign(math.inf, loss_sum)
        said[Slot.LOSS] = loss_sum
        term = loss if term is None else term
        key = share, self.start, term.dtype, term.device
        self._seed = self._seeds.get(key)
        if self._seed is None or self._seed._version:  # or an op has written to it
            self._seed = self._make_seed(key)
        return term

    def _make_seed(self, key: tuple[float, float, torch.dtype, torch.device]) -> Tensor:
        """Returns a term's gradient: so its share needs no multiplication in each step."""
        share, start, dtype, device = key
        seed = torch.full((), start, dtype=dtype, device=device)
        if share != 1.0:
            seed = seed * share
        if len(self._seeds) >= _SEEDS:  # shares of tokens are new in each step
            self._seeds.clear()
        self._seeds[key] = seed
        return seed

    def say(self, slot: Slot, count: int = 1) -> None:
        self._said[slot] += count

    def attach(self) -> Tensor:
        """Returns what carries the lane; it goes into backward together with the loss.

        Recorded before the first forward of a fit: autograd runs what was recorded first last, so
        the lane's gradient arrives last, and proves that every bucket before it was reduced. A
        view keeps nothing for its backward, and serves all steps.
        """
        if self._voice is None:
            self._voice = self.param.view_as(self.param)
        return self._voice

    def reach(self, tie: Tensor) -> None:
        """Has the next backward come to all that a term is made of, also to what is frozen now."""
        if self.inputs is not None and tie.grad_fn is not None:
            functions = tie.grad_fn.next_functions
            self._reached = [GradientEdge(node, 0) for node, _ in functions if node is not None]

    def backward(
        self, voice: Tensor | None, *terms: Tensor, run: Backward = torch.autograd.backward
    ) -> None:
        """Runs backward from a micro-batch's terms, of which the one that was added comes first.

        In the last of a step, in which DDP reduces, the voice's gradient is what was said. ``run``
        is what does it where there is no voice.
        """
        first, self._seed = self._seed, None
        starts = [None] * len(terms) if first is None else [first, *[None] * (len(terms) - 1)]
        inputs: list[Any] | None = None
        if self.inputs is not None:
            inputs = [*self.inputs(), self.param, *self._reached]
            self._reached = []
        if voice is not None and not self.is_alone():
            torch.autograd.backward((voice, *terms), (self.message(), *starts), inputs=inputs)
        elif terms and inputs is not None:
            torch.autograd.backward(terms, starts, inputs=inputs)
        elif terms:
            run(terms, starts)

    def is_alone(self) -> bool:
        """Says whether nobody else need hear what this rank has said."""
        return self._size == 1

    def message(self) -> Tensor:
        """Returns what this rank says, in the order of :class:`Slot`."""
        return self._message.clone()

    def listen(self, reduced: Tensor | None = None, *, parts: int = 1) -> "Heard":
        """Returns what all ranks said, after the last backward.

        Where :meth:`message` did not come with the gradients, ``reduced`` is its sum over ranks in
        so many ``parts``.
        """
        if self._size == 1:
            values = self._said.tolist()
        else:
            mean = self.param.grad if reduced is None else reduced  # DDP leaves the mean, too
            if mean is None:
                raise LaneSilent("no gradient reached the lane")
            values = (mean if parts == 1 else mean.mul_(1 / parts)).tolist()
        return Heard(values, self.reference, self._size, self._rounding)


@dataclass(eq=False, slots=True)
class Heard:
    """What all ranks said in a step."""

    _values: list[float]  # means over ranks, of what each said; none while they are on their way
    _reference: float  # the reference weight in that step
    _size: int  # of the world
    _rounding: float  # how far the mean of equal shares may be from 1
    _verdict: Verdict | None = None

    def verdict(self) -> Verdict:
        """Returns it all, once it is on the host; raises LaneSilent if no reduction happened."""
        if self._verdict is None:
            canary, share, loss, *said = self._values or self._arrived()
            size = self._size
            # An unreduced lane says 1, W or W * W. Not compared as a whole number: a sum over
            # thousands of ranks is inexact.
            if not abs(canary * size - (2 * size - 1)) <= size / 4:
                raise LaneSilent("the lane's gradient was not reduced")
            # Rounded: DDP multiplies by 1 / world size, which is inexact at 3.
            samples, samples_256, *counts = [round(mean * size) if mean else 0 for mean in said]
            if abs(share - 1) <= self._rounding:
                share = 1.0
            self._verdict = Verdict(
                share * self._reference * size,
                loss / share if share > 0 else math.nan,
                1.0 / share if share > 0 else 0.0,
                samples + 256 * samples_256,
                not counts[_FED] or counts[_ERROR] + counts[_STARVED] + counts[_LEAVING] > 0,
                *counts,
            )
        return self._verdict

    def _arrived(self) -> list[float]:
        return self._values

    # What is on the device already, for whoever does not wait for the verdict.

    def factor(self) -> Factor:
        """Returns what gradients must be multiplied by; see :class:`Verdict`."""
        return self.verdict().factor

    def divisor(self) -> Factor:
        """Returns what gradients may be divided by instead; 1 where nothing was weighed."""
        return 1 / self.factor() if self.factor() else 1.0

    def veto(self) -> bool | Tensor:
        """Says whether the step must change nothing (an error, no weight, no reduction, ...).

        On the device as 0 or 1, 0-dim float32, as fused optimizers take it for ``found_inf``.
        """
        return not self.verdict().weight > 0

    def loss(self) -> Tensor:
        """Returns the mean loss over the global batch, 0-dim; 0 where nothing was weighed."""
        verdict = self.verdict()
        return torch.tensor(verdict.loss_mean if verdict.weight else 0.0)


class _Idle(torch.autograd.Function):
    """Zero forward; backward gives each parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, sparse: frozenset[int], *params: Tensor) -> Tensor:
        ctx.sparse = sparse
        ctx.params = params
        return params[0].new_zeros((), dtype=params[0].dtype.to_real())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            _no_rows(p) if place in ctx.sparse else torch.zeros_like(p)
            for place, p in enumerate(ctx.params)
        )


def _no_rows(table: Tensor) -> Tensor:
    """A sparse zero of the form that an embedding's gradient has: sparse in its rows only."""
    rows = torch.zeros((1, 0), dtype=torch.long, device=table.device)
    values = table.new_zeros((0, *table.shape[1:]))
    return torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)


def idle(params: Sequence[nn.Parameter], sparse: Collection[Tensor] = ()) -> Tensor:
    """The term of a rank that has nothing to say: takes part in a reduction, changes nothing.

    Zeros are given outright: ``0 * p.sum()`` would turn an infinite parameter into NaN. Those of
    ``sparse`` parameters are sparse, as an embedding's gradient may be.
    """
    known = set(map(id, sparse))
    places = frozenset(place for place, p in enumerate(params) if id(p) in known)
    zero: Tensor = _Idle.apply(places, *params)  # type: ignore[no-untyped-call]
    return zero
