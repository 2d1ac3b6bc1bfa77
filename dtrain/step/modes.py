"""Train and eval mode of a model's parts: of those that are trained, of those that rest."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from dtrain.distributed import some_of

_KEEP = "Trainer(keep_modes=True) leaves modes as they are, and says nothing of them"


class Modes:
    """Sees to it that what is trained is in train mode, unless that is not meant.

    A model that comes in eval mode, as pretrained ones do, is put into train mode, but for parts
    in eval mode of which no parameter requires a gradient. Where the model as a whole is in train
    mode, parts in eval mode are meant to be so.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None], *, keep: bool) -> None:
        self._model, self._say, self._keep = model, say, keep
        self._meant: list[tuple[nn.Module, bool]] = []

    @contextmanager
    def in_fit(self) -> Iterator[None]:
        """In the end, each part is in the mode in which it was found."""
        before = self._modes()
        try:
            yield
        finally:
            _set(before)

    def wake(self) -> None:
        """Puts the model into train mode, at the start of a fit, and says so."""
        model, self._meant = self._model, []
        if self._keep:
            return
        if model.training:
            if trained := [name for name, part in _resting(model) if not _is_frozen(part)]:
                self._say(
                    f"note: in eval mode, and so it stays while it is trained: {some_of(trained)} "
                    "(no dropout, BatchNorm's statistics as they are). If that is not meant, call "
                    f"model.train() before fit; if it is, {_KEEP}"
                )
            return
        frozen = [part for part in model.modules() if not part.training and _is_frozen(part)]
        resting = [part for whole in frozen for part in whole.modules() if not part.training]
        model.train()  # which may be a method of the user's, and leave out more
        _set([(part, False) for part in resting])
        kept = [name for name, _ in _resting(model)]
        but = f", but for {some_of(kept)}" if kept else ""
        self._say(
            "note: the model came in eval mode, and is trained in train mode (dropout, BatchNorm's "
            f"statistics){but}. {_KEEP}"
        )

    def note(self) -> None:
        """Keeps in mind which modes are meant; see :meth:`mend`."""
        self._meant = self._modes()

    def mend(self) -> None:
        """Puts modes back, and says so, where the whole model was left in eval mode since."""
        if self._keep or self._model.training or not dict(self._meant).get(self._model):
            return
        _set(self._meant)
        self._say(
            "warning: a callback or the loss function left the model in eval mode; its parts are "
            f"in the modes again that they had at the epoch's start. {_KEEP}"
        )

    def _modes(self) -> list[tuple[nn.Module, bool]]:
        return [(part, part.training) for part in self._model.modules()]


def _set(modes: list[tuple[nn.Module, bool]]) -> None:
    # Not by `train()`, which would take along all that is in a part.
    for part, training in modes:
        part.training = training


def _is_frozen(module: nn.Module) -> bool:
    held = list(module.parameters())
    return bool(held) and not any(p.requires_grad for p in held)


def _resting(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost parts that have parameters and are in eval mode."""
    if not module.training and next(module.parameters(), None) is not None:
        yield name or "the model", module
        return
    for child, part in module.named_children():
        yield from _resting(part, f"{name}.{child}" if name else child)
