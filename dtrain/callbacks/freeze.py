"""Freezing a part of the model for the first epochs."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import some_of
from dtrain.context import Context
from dtrain.distributed import named_parameters, plain_name
from dtrain.errors import ConfigError


class Freeze(Callback):
    """Keeps parameters as they are until an epoch begins, then trains them too.

    A frozen parameter gets no gradient, so the optimizer leaves it alone, weight decay included,
    and no rank sends anything for it. What is frozen follows from the epoch, so a resumed run goes
    on exactly. A parameter that you froze yourself before ``fit`` stays frozen. After ``fit``,
    everything requires a gradient again that did before it.

    Example::

        Freeze("encoder", until_epoch=2)
        Freeze({"embed": 3, "blocks.[01]": 2, "blocks.2": 1}, eval_mode=True)  # thaws from above

    Args:
        what: names of parameters, or of modules with all that is in them; ``*``, ``?`` and ``[]``
            match as in file names, ``*`` also across dots. Or a dict from such a name to its
            ``until_epoch``; of several matches, the latest counts. No match is a ConfigError.
        until_epoch: the first epoch, counted from 0, in which they train.
        eval_mode: also keep frozen modules in eval mode: no new BatchNorm statistics, no dropout.
    """

    def __init__(
        self,
        what: str | Mapping[str, int],
        *,
        until_epoch: int | None = None,
        eval_mode: bool = False,
    ) -> None:
        if isinstance(what, str) == (until_epoch is None):
            raise ConfigError(
                f"Freeze({what!r}, until_epoch={until_epoch!r}): give a name and until_epoch, or a "
                "dict from names to epochs"
            )
        self._until = dict(what) if isinstance(what, Mapping) else {what: until_epoch or 0}
        for name, epoch in self._until.items():
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
                raise ConfigError(f"Freeze({name!r}, until_epoch={epoch!r}): must be 1 or more")
        self._eval_mode = eval_mode
        self._frozen: list[nn.Parameter] = []  # by this callback, just now
        self._resting: list[nn.Module] = []

    def on_fit_start(self, ctx: Context) -> None:
        names = [name for name, _ in named_parameters(ctx.model, remove_duplicate=False)]
        for pattern in self._until:
            if not any(_matches(name, [pattern]) for name in names):
                close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(
                    f"Freeze({pattern!r}) matches no parameter.{meant} There are "
                    f"{some_of(names, 20)}"
                )

    def on_epoch_start(self, ctx: Context) -> None:
        self._thaw()
        now = [pattern for pattern, until in self._until.items() if ctx.progress.epoch < until]
        held: dict[nn.Parameter, bool] = {}
        for name, p in named_parameters(ctx.model, remove_duplicate=False):
            held[p] = held.get(p, False) or _matches(name, now)
        # Only what requires a gradient now is kept in mind, and thawed again.
        self._frozen = [p for p, frozen in held.items() if frozen and p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
        for name, module in ctx.model.named_modules() if self._eval_mode else ():
            inside = [held[p] for p in module.parameters()]
            if module.training and (_matches(plain_name(name), now) or (inside and all(inside))):
                self._resting.append(module)
                module.training = False

    def on_fit_end(self, ctx: Context, error: BaseException | None = None) -> None:
        self._thaw()

    on_error = on_fit_end

    def _thaw(self) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        for module in self._resting:
            module.training = True
        self._frozen, self._resting = [], []


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)
