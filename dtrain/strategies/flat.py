"""All gradients in one flat tensor, the lane at its end, and one reduction after backward.

Nothing overlaps with backward, so it is for models of about one bucket of DistributedDataParallel's
(25 MB). As nothing is reduced while backward runs, an exception in it is a vote like any other.
"""

from itertools import accumulate, chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain import accelerator
from dtrain.context import Step
from dtrain.data import MicroBatches
from dtrain.distributed import BACKWARD, OWN_BACKWARD, World
from dtrain.errors import ConfigError
from dtrain.step import Heard, MicroStep, Strategy, of_backward
from dtrain.strategies.ddp import DDP
from dtrain.strategies.fsdp import FSDP

#: The size of one of DDP's buckets: below, it has nothing to overlap with backward. Where gradients
#: are larger, it may; on one rank, flat is quicker (docs/numbers.md).
FLAT_UP_TO_BYTES = 25 * 2**20

_GRAD, _PARAMS, _OF_FLAT = attrgetter("grad"), itemgetter("params"), attrgetter("params")


class Flat(Strategy):
    """Reduces all gradients at once, after backward.

    Args:
        find_unused_parameters: set it where a step may leave parameters without gradient.

    Ranks: all, communicates.
    """

    # An idle rank's gradients are the zeros of its flat tensor.
    find_unused = True

    def __init__(self, *, find_unused_parameters: bool = False) -> None:
        self._may_be_unused = find_unused_parameters
        self._flats: list[_Flat] = []
        self._held: tuple[Optimizer, int] | None = None
        self._spoke = False  # this rank has had a loss in this step

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        if why := unsuited(model):
            raise ConfigError(f"strategy='flat' cannot train this model: {why}. Use 'ddp'.")
        return model

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        super().wrap(micro_step, world)
        if world.size > 1:
            world.gradients.check_own(micro_step)
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        lane = micro_step.lane.param
        for p in micro_step.trainable:
            by_dtype.setdefault(p.dtype, []).append(p)
        by_dtype.setdefault(lane.dtype, [])
        self._bytes = sum(p.nbytes for p in micro_step.trainable)
        self._flats = []
        # One rank's gradients stay where an accelerator's backward has put them: a copy costs it
        # more than a norm over many. On the CPU it is the other way round.
        self._is_alone = world.size == 1 and accelerator.of(world.device) is not None
        if not self._is_alone:
            self._flats = [
                _Flat(params, dtype, lane, has_flags=self._may_be_unused)
                for dtype, params in by_dtype.items()
            ]
            self._tail = next(flat.tail for flat in self._flats if flat.tail.numel())  # the lane's
        # Backward starts with a share: the sum over ranks is then their mean, at no cost. Not with
        # a loss scale, which must overflow in the same steps as in one process.
        self._divides_after = micro_step.precision.scales_loss
        micro_step.lane.start = 1.0 if self._divides_after else 1 / world.size
        self._held = None

    def describe(self) -> str:
        megabytes = self._bytes / 1e6
        return f"gradients: one reduction after backward ({megabytes:.3g} MB; strategy='flat')"

    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        micro_step = self._micro_step
        if step.micro == 0:
            self._spoke = False
        terms = micro_step.forward(step, feed, last)  # not called as a module: nobody hooks into it
        self._activity.enter(OWN_BACKWARD)
        losses = terms[1:] if last else terms  # the lane does not come by way of backward
        # A rank without a loss may have its share in others', who gather from it.
        self._spoke |= micro_step.has_loss
        if losses:
            try:
                micro_step.lane.backward(None, *losses, run=micro_step.backward)
            except Exception as error:
                if micro_step.meets_in_backward:
                    raise  # others may be waiting for this rank in their own backward
                micro_step.fail(of_backward(error), "backward")
        if last:
            self._activity.enter(BACKWARD)
            self._reduce(micro_step)

    def _share(self) -> float:
        return super()._share() if self._divides_after else 1.0  # backward began with that

    def _reduce(self, micro_step: MicroStep) -> None:
        world = self._world
        params = [micro_step.trainable] if self._is_alone else [*map(_OF_FLAT, self._flats)]
        grads = [[*map(_GRAD, some)] for some in params]
        if self._spoke and micro_step.agreement.trouble is None and (error := self._look(grads)):
            micro_step.fail(error, "backward")
        if self._is_alone:
            if micro_step.agreement.trouble is not None or not (self._spoke or self._may_be_unused):
                for p in micro_step.trainable:
                    p.grad = torch.zeros_like(p)  # as where it is summed with others
            return
        for flat, given in zip(self._flats, grads, strict=True):
            flat.fill(given, silent=micro_step.agreement.trouble is not None)
        if world.size > 1:
            self._tail.copy_(micro_step.lane.message())
        for flat in self._flats:
            if world.size > 1:
                world.gradients.all_reduce(flat.whole)
                if self._divides_after:
                    flat.gradients.mul_(1 / world.size)
            flat.hand_out()

    def _look(self, grads: list[list[Tensor | None]]) -> Exception | None:
        """Returns what is wrong with this rank's gradients, if something is."""
        for grad in chain.from_iterable(grads):
            if grad is None:
                # None is missing where one was frozen since it was wrapped.
                if not self._may_be_unused and self.missing():
                    return self.unused()
            elif grad.layout is not torch.strided:
                return ConfigError(
                    "a parameter's gradient is sparse, which a flat tensor cannot hold: pass "
                    "Trainer(strategy='ddp')"
                )
        return None

    def heard(self) -> Heard:
        lane = self._micro_step.lane
        if self._world.size > 1:
            return lane.listen(self._tail, parts=self._world.size)
        return lane.listen(None if lane.is_alone() else lane.message())

    def check_arrived(self) -> None:
        pass  # gradients were looked through before they were reduced

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns the flat tensors, as long as the gradients are views into them."""
        if (
            self._flats
            and self._holds_all(optimizer)
            and all(map(_Flat.is_handed_out, self._flats))
        ):
            return [flat.gradients for flat in self._flats if flat.params]
        return super().gradients(optimizer)

    def _holds_all(self, optimizer: Optimizer) -> bool:
        """Says whether the optimizer has all parameters that are trained; others' do not count."""
        count = sum(map(len, map(_PARAMS, optimizer.param_groups)))
        if self._held != (optimizer, count):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not all(id(p) in held for flat in self._flats for p in flat.params):
                return False
            self._held = optimizer, count
        return True


class _Flat:
    """The gradients of all parameters of one dtype; see :class:`Flat`.

    After them come flags, if wanted, that tell which parameters had one, and a place for the lane
    if it is of that dtype.
    """

    def __init__(
        self, params: list[nn.Parameter], dtype: torch.dtype, lane: Tensor, *, has_flags: bool
    ) -> None:
        # Without gaps, whose numbers a callback could change, and a norm would count.
        *places, end = accumulate((p.numel() for p in params), initial=0)
        self.params = params
        self.has_flags = has_flags
        flags = len(params) if has_flags else 0
        tail = lane.numel() if dtype == lane.dtype else 0
        self.whole = torch.zeros(end + flags + tail, dtype=dtype, device=lane.device)
        self.gradients, self.used, self.tail = self.whole.split([end, flags, tail])
        # As dense as the parameter, and in its order: fused optimizers go through both alike.
        strides = [torch.empty_like(p, device="meta").stride() for p in params]
        self._forms = [*zip([p.shape for p in params], strides, places, strict=True)]
        self._make_views()
        self._homes = [*map(Tensor.data_ptr, self.views)]
        self._given: list[Tensor | None] = [*self.views]  # to each parameter

    def _make_views(self) -> None:
        self.views = [self.whole.as_strided(*form) for form in self._forms]

    def _are_home(self) -> bool:
        """Says whether views are what they were: a hook may do ``p.grad.data = ...``."""
        return [*map(Tensor.data_ptr, self.views)] == self._homes

    def fill(self, grads: list[Tensor | None], *, silent: bool) -> None:
        """Takes in this rank's gradients; zeros where it has none, or is to say nothing."""
        if not self._are_home():
            self._make_views()
        given = [] if silent else [grad for grad in grads if grad is not None]
        if len(given) == len(self.views):
            if given:
                torch._foreach_copy_(self.views, given)
            if self.has_flags:
                self.used.fill_(1)
            return
        self.gradients.zero_()
        self.used.zero_()
        for place, grad in enumerate(grads if given else []):
            if grad is not None:
                self.views[place].copy_(grad)
                if self.has_flags:
                    self.used[place] = 1

    def hand_out(self) -> None:
        """Gives each parameter its view; none where no rank had a gradient, and that may be."""
        self._given = [*self.views]
        if self.has_flags:
            pairs = zip(self.views, self.used.tolist(), strict=True)
            self._given = [view if is_used else None for view, is_used in pairs]
        for p, view in zip(self.params, self._given, strict=True):
            p.grad = view

    def is_handed_out(self) -> bool:
        """Says whether gradients are those given: a callback may have replaced or removed one."""
        return all(map(is_, map(_GRAD, self.params), self._given)) and self._are_home()


def unsuited(model: nn.Module) -> str:
    """Returns why a model cannot be trained with :class:`Flat`, or nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            return f"ranks wait for one another in {name or 'it'} (SyncBatchNorm)"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return f"gradients of {name or 'it'} are sparse"
    devices = {p.device for p in model.parameters() if p.requires_grad}
    return "it is spread over several devices" if len(devices) > 1 else ""


def choose(strategy: str | Strategy, model: nn.Module, *, graphed: bool = False) -> Strategy:
    """Returns the strategy of that name; for ``"auto"``, the one that is quicker for the model.

    Where several ranks are ``graphed``, nothing can be reduced in the middle of backward.
    """
    if graphed and (strategy == "ddp" or isinstance(strategy, DDP)):
        raise ConfigError(
            "Trainer(graph=True) captures backward as a whole, and with several ranks 'ddp' "
            "reduces in the middle of it: pass strategy='flat'"
        )
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        why = unsuited(model)
        if graphed and why:
            raise ConfigError(f"graph=True cannot train this model on several ranks: {why}")
        size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return Flat() if graphed or (size <= FLAT_UP_TO_BYTES and not why) else DDP()
    if strategy == "flat":
        return Flat()
    if strategy == "ddp":
        return DDP()
    if strategy == "fsdp":
        return FSDP()
    raise ConfigError(
        f"strategy={strategy!r}: choose 'auto', 'flat', 'ddp' or 'fsdp', or pass a "
        "dtrain.strategies.Strategy"
    )
