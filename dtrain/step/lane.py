"""The lane: what ranks tell one another inside the gradient reduction that happens anyway.

:class:`Lane` owns one extra parameter of a few zeros, which is no part of the user's model. In each
step's last backward, its gradient is what this rank has to say: its samples' weight, its weighted
loss, its votes. DDP sums that in the bucket it sends anyway; so all know the global weight (which
normalises the gradients), the global loss and everyone's votes, without a collective.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.context import on_device
from dtrain.errors import DtrainError


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


class Arriving:
    """A vector on its way to the host; whoever asks for it waits only for what came before.

    Reading it with ``.item()`` would wait for all that the device was given since.
    """

    __slots__ = ("_event", "_host", "_values")

    def __init__(self, tensor: Tensor) -> None:
        self._values: list[float] | None = None
        if tensor.device.type == "cpu":
            self._values = tensor.tolist()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def get(self) -> list[float]:
        if self._values is None:
            self._event.synchronize()
            self._values = self._host.tolist()
        return self._values


class Lane:
    """One rank's end of the lane, in the model's precision (float32 at least) and on its device.

    A step is: :meth:`open`, then :meth:`add` for each micro-batch and :meth:`say` for votes,
    :meth:`attach` at the start of the last forward, :meth:`backward` after it, and then
    :meth:`listen`. The reference weight is one of ``shares`` parts of a step's weight: the world
    size, so that gradients are those of DDP; or 1, so that what is multiplied by a loss scale is as
    large as in one process, and overflows with the same scale.
    """

    def __init__(self, model: nn.Module, rank: int, size: int, shares: int | None = None) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = parameters[0].device if parameters else torch.device("cpu")
        double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
        dtype = torch.float64 if double else torch.float32
        self.param = nn.Parameter(torch.zeros(len(Slot), dtype=dtype, device=device))
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
        # On an accelerator the loss is not read; it is added up where it is.
        self._on_device: Tensor | None = None if device.type == "cpu" else self.param.new_zeros(4)

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
        if self._on_device is not None:
            self._on_device.zero_()
        self.param.grad = None

    def add(self, loss: Tensor, weight: float | Tensor, samples: int) -> Tensor:
        """Adds a micro-batch; returns the term of the loss that backward starts from."""
        scaled = weight / self.reference
        if samples >= 256:
            self._said[Slot.SAMPLES_256] += samples // 256
            samples %= 256
        self._said[Slot.SAMPLES] += samples
        if self._on_device is None:
            number, share = loss.item(), float(scaled)
            self._weight += share
            self._loss += share * number
            if not math.isfinite(number):
                self._said[Slot.NONFINITE] += 1
            return loss if share == 1.0 else loss * share
        whole = on_device(scaled, self.param.dtype, self.param.device)
        # Weight 0 counts for nothing, even if the mean is NaN; it is not read to find out.
        value = torch.where(whole > 0, loss.detach().to(self.param.dtype), 0.0)
        bad = (~torch.isfinite(value)).to(self.param.dtype)
        self._on_device += torch.stack((whole, whole * value, bad, whole.new_zeros(())))
        return torch.where(whole > 0, loss, 0.0) * scaled

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

    def backward(self, voice: Tensor, *terms: Tensor) -> None:
        """Runs the last backward, in which DDP reduces; the lane's gradient is what was said."""
        torch.autograd.backward((voice, *terms), (self.message(), *(None for _ in terms)))

    def message(self) -> Tensor:
        """Returns what this rank says, in the order of :class:`Slot`."""
        if self._on_device is None:
            loss = self._loss
            if abs(loss) > self._largest:  # infinite in float32; NumPy would warn of it
                loss = math.copysign(math.inf, loss)
            self._said[Slot.WEIGHT] = self._weight
            self._said[Slot.LOSS] = loss
            return self._message.clone()
        message = self._message.to(self.param.device, non_blocking=True)
        message[Slot.WEIGHT] += self._on_device[0]
        message[Slot.LOSS] += self._on_device[1]
        message[Slot.NONFINITE] += self._on_device[2]
        return message

    def listen(self, reduced: Tensor | None = None) -> "Heard":
        """Returns what all ranks said, after the last backward; on CUDA it is still on its way.

        Where :meth:`message` did not come with the gradients, ``reduced`` is its mean over ranks.
        """
        mean = self.param.grad if reduced is None else reduced  # DDP leaves the mean, too
        if mean is None:
            raise LaneSilent("no gradient reached the lane")
        values = mean.tolist() if self._on_device is None else Arriving(mean)
        return Heard(mean, values, self.reference, self._size, self._rounding)


@dataclass(eq=False, slots=True)
class Heard:
    """What all ranks said in a step: parts of it at once on the device, all a little later."""

    mean: Tensor  # over ranks, of what each said
    values: list[float] | Arriving  # the same on the host, or on its way there
    reference: float  # the reference weight in that step
    size: int  # of the world
    rounding: float  # how far the mean of equal shares may be from 1
    _verdict: Verdict | None = None

    def factor(self) -> Tensor:
        """What gradients must be multiplied by, 0-dim on the device; see :class:`Verdict`."""
        share = self.mean[Slot.WEIGHT]
        is_one = (share - 1).abs() <= self.rounding
        return torch.where(is_one, 1.0, torch.where(share > 0, 1 / share, 0.0))

    def veto(self) -> Tensor:
        """1 where the step must change nothing (an error, no weight, no reduction, ...), else 0.

        0-dim float32 on the device, as fused optimizers take it for ``found_inf``.
        """
        said, size = self.mean, self.size
        unreduced = (said[Slot.CANARY] * size - (2 * size - 1)).abs() > size / 4
        stays = (said[Slot.ERROR] + said[Slot.LEAVING] > 0) | ~(said[Slot.WEIGHT] > 0)
        apart = (said[Slot.CHANGED] > 0) & (said[Slot.CHANGED] * size < size - 0.5)
        return (stays | unreduced | apart).float()

    def verdict(self) -> Verdict:
        """Returns it all, once it is on the host; raises LaneSilent if no reduction happened."""
        if self._verdict is None:
            values, size = self.values, self.size
            canary, share, loss, *said = values.get() if isinstance(values, Arriving) else values
            # An unreduced lane says 1, W or W * W. Not compared as a whole number: a sum over
            # thousands of ranks is inexact.
            if not abs(canary * size - (2 * size - 1)) <= size / 4:
                raise LaneSilent("the lane's gradient was not reduced")
            # Rounded: DDP multiplies by 1 / world size, which is inexact at 3.
            samples, samples_256, *counts = [round(mean * size) if mean else 0 for mean in said]
            if abs(share - 1) <= self.rounding:
                share = 1.0
            self._verdict = Verdict(
                share * self.reference * size,
                loss / share if share > 0 else math.nan,
                1.0 / share if share > 0 else 0.0,
                samples + 256 * samples_256,
                not counts[_FED] or counts[_ERROR] + counts[_STARVED] + counts[_LEAVING] > 0,
                *counts,
            )
        return self._verdict


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
