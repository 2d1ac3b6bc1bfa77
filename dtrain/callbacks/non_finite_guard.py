"""A guard against NaN and infinity, which finds out where they come from."""

import math
from functools import partial
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice, check_counts, some_of
from dtrain.context import Context, Number, Step, has_updates
from dtrain.data import tensors_of
from dtrain.distributed import own_part, random_state, restore_random_state
from dtrain.errors import ConfigError

Action = Literal["stop", "skip", "ignore"]

_MOST = 4  # findings that a message tells
_SHAPE = attrgetter("shape")


class _Kept(NamedTuple):
    """A micro-batch, with what it takes to run it again."""

    micro: int
    batch: Any
    streams: list[Tensor]
    mean: Tensor
    weight: Number | None


class NonFiniteGuard(Callback):
    """Leaves a step out, or stops, where its loss or gradient is NaN or infinite; says why.

    The count of bad losses travels with the gradients, so all ranks decide alike. Then each replays
    its own micro-batches of the step, with the random streams and buffers of then, and names the
    first module whose output, or the parameters whose gradient, is not finite. A step that is left
    out changes nothing: parameters, optimizer state and buffers are as before. With a loss scale
    (``MixedPrecision("fp16")``), which adapts to an overflow of the gradient, only the loss counts.

    Put it last in the list, so that it keeps batches as the model gets them. A step costs a copy
    of the buffers, the state of the random streams, references to the micro-batches and the norm
    of the gradient. On CUDA the device decides, nothing waits for it, and what was found is told a
    step later. Models with SyncBatchNorm, and sharded ones, are not replayed, because a replay is
    one rank's alone.

    Args:
        action: ``"stop"``: the step is left out, and the run stops after the next; ``"skip"``:
            it is left out; ``"ignore"``: only tell, once in a row.
        patience: after how many skipped steps in a row the run stops; None bears any number.
        optimizer: of several losses, only that of this update; each if None.

    Ranks: all, communicates in a step that is not finite.
    """

    asks_for_gradients = True
    late_step_end = True

    def __init__(
        self,
        action: Action = "stop",
        *,
        patience: int | None = 10,
        optimizer: str | None = None,
    ) -> None:
        check_choice("NonFiniteGuard", "action", action, get_args(Action))
        check_counts("NonFiniteGuard", or_none=True, patience=patience)
        self._action = action
        self._patience = patience
        self.bad_in_a_row = 0
        self._bad_update = ""  # of several, which was bad
        self._optimizer = optimizer
        if optimizer is not None:
            self.name = f"NonFiniteGuard({optimizer!r})"
        self._kept: list[_Kept] = []  # of the step under way
        self._streams: dict[int, list[Tensor]] = {}  # as its micro-batches began
        self._before = _Copies([])  # of buffers, as they were before it
        self._turns: list[_Copies] = []  # two: a step may be in flight while the next begins
        # The same of the step whose update the device has just decided on, and the veto's number.
        self._decided: tuple[list[_Kept], _Copies, int | None] | None = None

    def on_fit_start(self, ctx: Context) -> None:
        ctx.optimizer_of(self._optimizer)  # there is one
        if self._optimizer is not None and not has_updates(ctx.optimizer):
            raise ConfigError(
                f"{self.name}: there is one loss for all optimizers, and it is looked at for all: "
                "leave `optimizer` out"
            )

    def on_epoch_start(self, ctx: Context) -> None:
        self._with_buffers = [module for module in ctx.model.modules() if module._buffers]
        # Torch's alone: NumPy's state takes 100 us to get, and loss functions rarely draw from it.
        self._generators = [torch.default_generator, ctx.rng, ctx.shared_rng]
        if ctx.device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[torch.cuda.current_device()])

    def on_step_start(self, ctx: Context, step: Step) -> None:
        self._kept = []
        self._before = self._copied() if self._with_buffers else _Copies([])

    def on_batch(self, ctx: Context, step: Step) -> None:
        self._streams[step.micro] = [generator.get_state() for generator in self._generators]

    def on_loss(self, ctx: Context, step: Step) -> None:
        loss = step.loss
        if loss is not None and not ctx.request.skipped:
            mean = loss.mean.detach()  # neither the graph nor the outputs
            self._kept.append(
                _Kept(step.micro, step.batch, self._streams[step.micro], mean, loss.weight)
            )

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        if ctx.reads_at_once:
            if self._optimizer in (None, step.update):
                is_bad = step.nonfinite > 0 or not (ctx.loss_scaled or _finite_gradients(ctx))
                if is_bad or self.bad_in_a_row:
                    self._judge(ctx, step, is_bad=is_bad)
            self._kept.clear()
            if step.update and self._with_buffers:
                self._before = self._copied()  # of what the next update changes
            return
        number = None
        if self._action != "ignore":
            # NaN or infinity times 0 is NaN.
            both = step.mean_loss() if ctx.loss_scaled else step.mean_loss() + ctx.gradient_check()
            flag = both.mul(0).ne_(0).float()
            number = step.veto_where(flag)
            self._before.put_back(self._buffers_of_model(), where=flag)
        self._decided = self._kept, self._before, number

    def on_step_end(self, ctx: Context, step: Step) -> None:
        if self._decided is None:
            return
        (kept, before, number), self._decided = self._decided, None
        # Where nothing is left out, a gradient that was not finite shows in the next loss.
        is_bad = step.nonfinite > 0 or (number is not None and step.left_out(number))
        now = self._kept, self._before  # of the step after it
        self._kept, self._before = kept, before
        try:
            self._judge(ctx, step, is_bad=is_bad)
        finally:
            self._kept, self._before = now

    def _judge(self, ctx: Context, step: Step, *, is_bad: bool) -> None:
        """Says why a step is bad, and leaves it out, if the device has not."""
        if not is_bad:
            if step.update == self._bad_update:
                self.bad_in_a_row = 0
            return
        self._bad_update = step.update
        self.bad_in_a_row += 1
        if self._action == "ignore" and self.bad_in_a_row > 1:
            return
        by_rank = ctx.comm.gather_objects("non-finite: where from", self._look(ctx, step))
        of_update = f", update {step.update!r}" if step.update else ""
        why = f"step {step.number}{of_update}: {_words(by_rank, step.nonfinite)}"
        if self._action == "ignore":
            ctx.say(f"warning: {why}")
            return
        if ctx.reads_at_once:
            step.veto(why)
            self._before.put_back(self._buffers_of_model())
        if self._action == "stop" or self.bad_in_a_row == self._patience:
            ctx.request.stop(why)
        else:
            ctx.say(f"{why}. Its update is left out.")

    def state_dict(self) -> dict[str, Any]:
        return {"bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_in_a_row = state["bad_in_a_row"]

    def _buffers_of_model(self) -> list[Tensor]:
        # By way of the modules: a model may put another tensor in the place of a buffer.
        return [b for m in self._with_buffers for b in m._buffers.values() if b is not None]

    def _copied(self) -> "_Copies":
        buffers = self._buffers_of_model()
        if len(self._turns) < 2 or not self._turns[0].are_of(buffers):
            self._turns = [*self._turns[-1:], _Copies(buffers)]
        else:
            self._turns.reverse()
        self._turns[-1].take()
        return self._turns[-1]

    def _restore(self, streams: list[Tensor]) -> None:
        for generator, state in zip(self._generators, streams, strict=True):
            generator.set_state(state)

    def _look(self, ctx: Context, step: Step) -> list[str]:
        """Returns what this rank finds, to follow its name."""
        named = dict(ctx.model.named_parameters())
        if bad := [repr(name) for name, p in named.items() if _kind(own_part(p))]:
            return [f": NaN or infinite before the step: parameter {some_of(bad, 3)}"]
        kept = [one for one in self._kept if one.weight is None or float(one.weight) != 0]
        if step.nonfinite:
            kept = [one for one in kept if _kind(one.mean)]
        waits = any(isinstance(module, nn.SyncBatchNorm) for module in ctx.model.modules())
        if waits or ctx.sharded:  # one rank alone cannot run it again
            if not step.nonfinite and waits:
                return [": the gradient is not finite; not replayed, for SyncBatchNorm"]
            if not step.nonfinite:
                grads = {name: p.grad for name, p in named.items() if p.grad is not None}
                bad = [repr(name) for name, grad in grads.items() if _kind(own_part(grad))]
                told = f": the gradient of {some_of(bad, 3)} is not finite, in this rank's rows"
                return [told] if bad else []
            return [f", micro-batch {one.micro}: the loss is {_kind(one.mean)}" for one in kept]
        streams, others = [g.get_state() for g in self._generators], random_state()
        now, found = _Copies(self._buffers_of_model()), []
        now.take()
        try:
            for one in kept:
                self._before.put_back(self._buffers_of_model())
                self._restore(one.streams)
                if what := _replay(ctx, one):
                    found.append(f", micro-batch {one.micro}: {what}")
            return found
        finally:
            restore_random_state(others)
            self._restore(streams)
            now.put_back(self._buffers_of_model())


def _replay(ctx: Context, one: _Kept) -> str:
    """Runs a micro-batch again, without a trace; returns what is not finite in it, or nothing."""
    first: dict[str, str] = {}  # NaN or infinite: in which module's output it is seen first

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for kind in filter(None, map(_kind, tensors_of(output))):
            first.setdefault(kind, f"{name or 'the model'!r} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(partial(look, name))
        for name, module in ctx.model.named_modules()
    ]
    told = _kind(one.mean)
    words = [f"the loss is {told}"] if told else []
    try:
        mean = ctx.loss_of(one.batch).mean
        if not told and not _kind(mean):
            # Does not touch .grad, and fires none of the reduction's hooks.
            named = {name: p for name, p in ctx.model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(mean, list(named.values()), allow_unused=True)
            pairs = zip(named, grads, strict=True)
            bad = [repr(name) for name, grad in pairs if grad is not None and _kind(grad)]
            if not bad:
                return ""
            words.append(f"the loss is finite, its gradient is not: {some_of(bad[::-1], 3)}")
    except Exception as error:  # noqa: BLE001 -- the replay is a help; the run must not end by it
        return "; ".join([*words, f"replaying it raised {error!r}"])
    finally:
        for handle in handles:
            handle.remove()
    if kinds := set(filter(None, map(_kind, tensors_of(one.batch)))):
        words.append(f"the batch holds {' and '.join(sorted(kinds))} values")
    words += [f"first {kind}: output of {where}" for kind, where in first.items()]
    if told and not _kind(mean):
        words.append("replayed, it is finite: on_loss of a callback, or chance, made it so")
    elif told and not first:
        words.append("the outputs of all modules are finite: it arose in the loss function")
    return "; ".join(words)


def _words(by_rank: list[list[str]], nonfinite: int) -> str:
    told = [f"rank {rank}{what}" for rank, found in enumerate(by_rank) for what in found]
    if len(by_rank) > 1 and all(found == by_rank[0] for found in by_rank):
        told = [f"every rank{what}" for what in by_rank[0]]
    if told:
        more = f" (and {len(told) - _MOST} more)" if len(told) > _MOST else ""
        return "; ".join(told[:_MOST]) + more
    if nonfinite:
        return (
            f"the loss of {nonfinite} micro-batches is not finite, but was when NonFiniteGuard saw "
            "it; put it last in the list of callbacks"
        )
    return (
        "the gradient is not finite, though each micro-batch's is when it is replayed: their sum "
        "overflowed, or a callback changed it"
    )


class _Copies:
    """Copies of tensors, made together; most models have many small buffers.

    They lie side by side, in memory that is made once: each view, or new tensor, costs the host as
    much as a layer of a small model costs a GPU.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._shapes = tensors, [*map(_SHAPE, tensors)]
        alike: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self._groups = [(some, _Flat(some), _Flat(some)) for some in alike.values()]

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Says whether they are of these, which may be replaced at any time."""
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and [*map(_SHAPE, tensors)] == self._shapes
        )

    @torch.no_grad()
    def take(self) -> None:
        """Copies the tensors as they are now."""
        for some, copied, _ in self._groups:
            torch._foreach_copy_(copied.parts, some)

    @torch.no_grad()
    def put_back(self, tensors: list[Tensor], where: Tensor | None = None) -> None:
        """Copies them to ``tensors``, those or what is in their place, if ``where`` is not 0."""
        if not self.are_of(tensors):
            groups = (zip(some, copied.parts, strict=True) for some, copied, _ in self._groups)
            parts = {id(tensor): part for pairs in groups for tensor, part in pairs}
            _copy([parts[id(tensor)] for tensor in self._tensors], tensors, where)
            return
        is_there = where > 0 if where is not None and self._groups else None
        for some, copied, now in self._groups:
            if is_there is None:
                torch._foreach_copy_(some, copied.parts)
            else:
                torch._foreach_copy_(now.parts, some)
                torch.where(is_there, copied.whole, now.whole, out=now.whole)
                torch._foreach_copy_(some, now.parts)


class _Flat:
    """Memory for tensors of one dtype, as one and in parts."""

    def __init__(self, tensors: list[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        self.whole = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        pairs = zip(self.whole.split(sizes), tensors, strict=True)
        self.parts = [part.view(tensor.shape) for part, tensor in pairs]


@torch.no_grad()
def _copy(from_: list[Tensor], to: list[Tensor], where: Tensor | None = None) -> None:
    """Copies each to its own, if ``where`` is not 0: in a few operations, whatever their number."""
    alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for source, target in zip(from_, to, strict=False):
        alike.setdefault(target.dtype, []).append((source, target))
    for pairs in alike.values():
        sources, targets = map(list, zip(*pairs, strict=True))
        if where is not None:
            new, old = (torch.cat([t.reshape(-1) for t in some]) for some in (sources, targets))
            chosen = torch.where(where > 0, new, old).split([t.numel() for t in targets])
            sources = [one.view(t.shape) for one, t in zip(chosen, targets, strict=True)]
        torch._foreach_copy_(targets, sources)


def _finite_gradients(ctx: Context) -> bool:
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in ctx.gradients()]
    # One that is not finite makes a sum of all so: then, or where the sum overflowed by itself,
    # each is looked at. On CUDA, reading it waits for the device.
    if ctx.sharded:  # a NaN may be in another rank's rows
        if math.isfinite(float(ctx.gradient_check())):
            return True
        mine = all(bool(grad.isfinite().all()) for grad in grads)
        return not ctx.comm.vote("gradients that are not finite", not mine)
    total = grads[0].sum() if len(grads) == 1 else torch.nn.utils.get_total_norm(grads)
    return math.isfinite(float(total)) or all(bool(grad.isfinite().all()) for grad in grads)


def _kind(tensor: Tensor) -> str:
    if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all()):
        return ""
    return "NaN" if bool(tensor.isnan().any()) else "infinite"
