"""The lane on an accelerator: nothing is read, and what the host knows is not computed there.

What is said goes to the device in one copy. There, one launch makes the message of it and of the
losses, and one makes of the reduction what the update needs: so many small operations are captured
once, and replayed. What all ranks said comes home in one copy, which a step later has arrived.
One rank alone knows all but the losses: nothing else travels.

Buffers, events and captured operations are made once, for two steps that take turns: one is in
flight while the next is prepared.
"""

import math
from abc import ABC, abstractmethod
from operator import mul
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from dtrain import accelerator
from dtrain.accelerator import Accelerator
from dtrain.context import on_device
from dtrain.distributed import World
from dtrain.step.lane import Heard, Lane, LaneSilent, Slot
from dtrain.step.precision import Factor

_SLOTS = len(Slot)
_MICROS = 8  # micro-batches that there is room for, at first


class DeviceLane(Lane):
    """One rank's end of the lane, on an accelerator."""

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        size: int,
        shares: int | None = None,
        *,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(model, rank, size, shares)
        self._accelerator = accelerator
        self._losses: list[Tensor] = []  # of the step's micro-batches,
        self._parts: list[float | Tensor] = []  # and their shares of the reference weight
        self._make_turns(_MICROS)

    def _make_turns(self, micros: int) -> None:
        self._turns = [
            _Turn(self._accelerator, self.param, micros, self._size, self._rounding)
            for _ in range(2)
        ]
        self._turn = self._turns[0]

    def open(self) -> None:
        self._turn = self._turns[self._turn is self._turns[0]]
        self._turn.free()
        self._said = self._turn.said
        super().open()
        self._losses, self._parts = [], []

    def add(
        self, loss: Tensor, weight: float | Tensor, samples: int, term: Tensor | None = None
    ) -> Tensor:
        self._said[Slot.SAMPLES_256] += samples // 256
        self._said[Slot.SAMPLES] += samples % 256
        loss, term = loss.detach(), loss if term is None else term
        part: float | Tensor = weight / self.reference
        if isinstance(part, Tensor):
            part = on_device(part, self.param.dtype, self.param.device)
            # Nothing is differentiated where the weight is 0, and it is not read to find out.
            self._seed = (part if self.start == 1.0 else part * self.start).to(term.dtype)
        else:
            self._weight += part
            key = part, self.start, term.dtype, term.device
            self._seed = self._seeds.get(key)
            if self._seed is None or self._seed._version:  # or an op has written to it
                self._seed = self._make_seed(key)
        self._losses.append(loss)
        self._parts.append(part)
        return term

    def is_alone(self) -> bool:
        return self._size == 1 and not any(isinstance(part, Tensor) for part in self._parts)

    def message(self) -> Tensor:
        """Returns what this rank says, on the device; it is overwritten in the step after next."""
        self._make_room()
        self._said[Slot.WEIGHT] = self._weight
        return self._turn.speak(self._losses, self._parts)

    def _make_room(self) -> None:
        if len(self._losses) > self._turn.micros:
            said = self._said
            self._make_turns(2 * len(self._losses))
            self._said = self._turn.said
            self._said[:_SLOTS] = said[:_SLOTS]

    def listen(self, reduced: Tensor | None = None, *, parts: int = 1) -> Heard:
        about = self.reference, self._size, self._rounding
        heard: OnDevice
        if self.is_alone():
            self._make_room()
            self._said[Slot.WEIGHT] = self._weight
            heard = _Alone(self._turn, self._losses, self._parts, *about)
        else:
            mean = self.param.grad if reduced is None else reduced
            if mean is None:
                raise LaneSilent("no gradient reached the lane")
            self._turn.heed(mean, parts)
            heard = _FromAll(self._turn, *about)
        self._turn.lend(heard)
        return heard


def make_lane(model: nn.Module, world: World, shares: int) -> Lane:
    """Returns the lane for where the world computes."""
    device = accelerator.of(world.device)
    if device is None:
        return Lane(model, world.rank, world.size, shares)
    return DeviceLane(model, world.rank, world.size, shares, accelerator=device)


class _Turn:
    """One of two sets of buffers, and what is computed with them."""

    def __init__(
        self, accelerator: Accelerator, param: Tensor, micros: int, size: int, rounding: float
    ) -> None:
        self.micros = micros
        self._size, self._rounding = size, rounding
        #: Whose it is: the newest that uses it. That one holds this, and not the other way round,
        #: or both, with what they have on the device, would stay until the garbage collector runs.
        self._heard: ref[OnDevice] | None = None
        self.is_busy = False  # something may be on its way, or is to be sent
        self._told = accelerator.pinned(_SLOTS + micros, param.dtype)
        self.said: Any = self._told.numpy()  # in the order of the slots, then micro-batches' shares
        #: What all ranks said, whether the update was held back, and by which flags.
        self.heeded = param.new_zeros(_SLOTS + 2)
        #: Where that comes home, and losses behind it.
        self.home = accelerator.pinned(len(self.heeded) + micros, param.dtype)
        self.only_home = self.home[_SLOTS + 2]  # of a step's only loss: a view, made once
        self.event = accelerator.event()
        self._losses = param.new_zeros(micros)
        self._places = [*self._losses.unbind()]
        self._message = param.new_zeros(_SLOTS)
        self._reduced = param.new_zeros(_SLOTS)
        self.factor, self.divisor, self.loss = (param.new_zeros(()) for _ in range(3))
        self.veto = torch.zeros((), device=param.device)  # float32, as optimizers want it
        self._speak = accelerator.captured(_Turn._say_it)
        self._heed = accelerator.captured(_Turn._heed_it)

    def free(self) -> None:
        """Waits for what is on its way, which nobody has waited for where a step has failed."""
        heard = None if self._heard is None else self._heard()
        if self.is_busy and heard is not None:
            heard.release()
        elif self.is_busy:  # a step that failed, and of which nobody will ask
            self.event.record()
            self.event.synchronize()
        self._heard, self.is_busy = None, False

    def lend(self, heard: "OnDevice") -> None:
        self._heard, self.is_busy = ref(heard), True

    def speak(self, losses: list[Tensor], parts: list[float | Tensor]) -> Tensor:
        count = len(losses)
        if losses:
            torch._foreach_copy_(self._places[:count], losses)
        if any(isinstance(part, Tensor) for part in parts):  # shares that the host does not know
            like = self._losses
            shares = torch.stack([on_device(part, like.dtype, like.device) for part in parts])
            self._add_up(shares, self._losses[:count])
            self._message[Slot.WEIGHT] = shares.sum()
            return self._message
        self.said[_SLOTS : _SLOTS + count] = parts
        self.said[_SLOTS + count :] = 0
        self._speak(self)
        return self._message

    def _say_it(self) -> None:
        # Of micro-batches that this step does not have, the share is 0.
        self._add_up(None, self._losses)

    def _add_up(self, shares: Tensor | None, losses: Tensor) -> None:
        """Makes the message of what the host says, and of losses and shares."""
        told = self._told.to(losses.device, non_blocking=True)
        if shares is None:
            shares = told[_SLOTS:]
        # Weight 0 counts for nothing, even if the mean is NaN.
        losses = torch.where(shares > 0, losses, 0.0)
        self._message.copy_(told[:_SLOTS])
        self._message[Slot.LOSS] += (shares * losses).sum()
        self._message[Slot.NONFINITE] += (~torch.isfinite(losses)).sum()

    def heed(self, reduced: Tensor, parts: int) -> None:
        if parts == 1:
            self._reduced.copy_(reduced)
        else:
            torch.mul(reduced, 1 / parts, out=self._reduced)
        self._heed(self)

    def _heed_it(self) -> None:
        """Computes what the update needs of what all ranks said."""
        mean, size = self._reduced, self._size
        share = mean[Slot.WEIGHT]
        # As on the host; see `Heard.verdict`.
        is_one = (share - 1).abs() <= self._rounding
        self.divisor.copy_(torch.where(is_one | ~(share > 0), 1.0, share))
        self.factor.copy_(torch.where(share > 0, 1 / self.divisor, 0.0))
        self.loss.copy_(mean[Slot.LOSS] * self.factor)
        unreduced = (mean[Slot.CANARY] * size - (2 * size - 1)).abs() > size / 4
        stays = (mean[Slot.ERROR] + mean[Slot.LEAVING] > 0) | ~(share > 0)
        apart = (mean[Slot.CHANGED] > 0) & (mean[Slot.CHANGED] * size < size - 0.5)
        self.veto.copy_(stays | unreduced | apart)
        self.heeded[:_SLOTS].copy_(mean)
        self.heeded[_SLOTS].copy_(self.veto)


class OnDevice(Heard, ABC):
    """What is on its way home: sent by :meth:`send`, or by who asks before."""

    __slots__ = (
        "__weakref__", "_awaits_blocked", "_held", "_held_is_blocked", "_is_blocked", "_is_sent",
        "_turn",
    )  # fmt: skip

    def __init__(self, turn: _Turn, reference: float, size: int, rounding: float) -> None:
        super().__init__([], reference, size, rounding)
        self._turn = turn
        self._is_sent = self._awaits_blocked = False
        self._is_blocked: bool | None = None
        self._held: float | None = None
        self._held_is_blocked = False

    def send(self, blocked: bool | Tensor, held: Tensor | None = None) -> None:
        """Is told whether the update was held back, and the flags by which callbacks did so."""
        if isinstance(blocked, bool):
            self._is_blocked = blocked
            if not self._values and not self._is_sent:
                self._send()
            return
        self._copy_flags(blocked, held)
        self._held = None if held is None else 0.0
        self._awaits_blocked = True
        self._send()

    def _send(self) -> None:
        """Begins to copy home whatever is not there yet."""
        self._copy_home()
        self._turn.event.record()
        self._is_sent = self._turn.is_busy = True

    def _arrived(self) -> list[float]:
        if not self._values:
            if not self._is_sent:
                self._send()
            self._take_home()
        return self._values

    def blocked(self) -> bool:
        """Returns what :meth:`send` was told, once it is on the host."""
        if self._is_blocked is None:
            self._take_home()
        return bool(self._is_blocked)

    def held(self) -> float | None:
        """Returns the flags by which callbacks held it back; None where they were not sent."""
        return self._held if self.blocked() else 0.0

    def _take_home(self) -> None:
        self._turn.event.synchronize()
        self._is_sent = self._turn.is_busy = False
        home = self._turn.home.tolist()
        if not self._values:
            self._values = self._values_of(home)
        if self._awaits_blocked:
            self._is_blocked, self._awaits_blocked = home[_SLOTS] > 0, False
            if self._held is not None:
                self._held = home[_SLOTS + (not self._held_is_blocked)]

    def release(self) -> None:
        """Gives the buffers away: takes home what is on its way, and waits for what uses them."""
        if self._is_sent:
            self._take_home()
        elif not self._values:  # a step that failed, and of which nobody will ask
            self._turn.event.record()
            self._turn.event.synchronize()

    @abstractmethod
    def _copy_home(self) -> None: ...

    @abstractmethod
    def _copy_flags(self, blocked: Tensor, held: Tensor | None) -> None: ...

    @abstractmethod
    def _values_of(self, home: list[float]) -> list[float]: ...


class _FromAll(OnDevice):
    """What all ranks said, or one whose shares the host does not know."""

    __slots__ = ()

    def factor(self) -> Factor:
        return self._turn.factor

    def divisor(self) -> Factor:
        return self._turn.divisor

    def veto(self) -> bool | Tensor:
        return self._turn.veto

    def loss(self) -> Tensor:
        return self._turn.loss

    def _copy_home(self) -> None:
        turn = self._turn
        turn.home[: len(turn.heeded)].copy_(turn.heeded, non_blocking=True)

    def _copy_flags(self, blocked: Tensor, held: Tensor | None) -> None:
        heeded = self._turn.heeded
        if held is not None:
            torch.stack([blocked, held], out=heeded[_SLOTS:])
        elif blocked is not self._turn.veto:  # which is there
            heeded[_SLOTS].copy_(blocked)

    def _values_of(self, home: list[float]) -> list[float]:
        return home[:_SLOTS]


class _Alone(OnDevice):
    """What one rank said, who knows all of it but the losses."""

    __slots__ = ("_losses", "_parts", "_said")

    def __init__(
        self, turn: _Turn, losses: list[Tensor], parts: list[float | Tensor], *about: Any
    ) -> None:
        super().__init__(turn, *about)
        self._losses, self._parts = losses, [float(part) for part in parts]
        self._said: list[float] = turn.said[:_SLOTS].tolist()

    def factor(self) -> Factor:
        share = self._said[Slot.WEIGHT]
        if abs(share - 1) <= self._rounding:
            return 1.0
        return 1 / share if share > 0 else 0.0

    def divisor(self) -> Factor:
        factor = self.factor()
        return 1 / factor if factor else 1.0

    def veto(self) -> bool | Tensor:
        said = self._said
        return not said[Slot.WEIGHT] > 0 or said[Slot.ERROR] + said[Slot.LEAVING] > 0

    def loss(self) -> Tensor:
        if len(self._losses) == 1:
            return self._losses[0]
        if not self._losses:
            return torch.zeros_like(self._turn.loss)  # as from many ranks: no guard is to act
        parts = torch.tensor(self._parts).to(self._turn.loss.device, non_blocking=True)
        return (torch.stack(self._losses) * parts).sum() * self.factor()

    def _copy_home(self) -> None:
        count = len(self._losses)
        if self._values:
            return
        if count == 1:
            self._turn.only_home.copy_(self._losses[0], non_blocking=True)
        elif count:
            home = self._turn.home[_SLOTS + 2 :][:count]
            home.copy_(torch.stack(self._losses), non_blocking=True)

    def _copy_flags(self, blocked: Tensor, held: Tensor | None) -> None:
        home = self._turn.home
        home[_SLOTS].copy_(blocked, non_blocking=True)
        self._held_is_blocked = held is blocked
        if held is not None and held is not blocked:
            home[_SLOTS + 1].copy_(held, non_blocking=True)

    def _values_of(self, home: list[float]) -> list[float]:
        losses = home[_SLOTS + 2 :][: len(self._parts)]
        self._said[Slot.LOSS] = sum(map(mul, self._parts, losses))
        self._said[Slot.NONFINITE] = sum(not math.isfinite(loss) for loss in losses)
        return self._said
