"""Learning-rate schedules for ``LRSchedule``: formulas in closed form, on torch's own schedulers.

Each function returns a function ``(optimizer, total) -> scheduler``, which ``LRSchedule`` calls
once these are known, or raises ConfigError where an argument is off. In the formulas, ``lr0`` is
the learning rate that a parameter group was made with, ``t`` counts how often the scheduler was
stepped (optimizer steps, or epochs with ``every="epoch"``), and ``T`` is how often it will be.

The rate is computed from ``t`` alone and not from the rate before, so rounding does not add up,
and a resumed run goes on with the same bits.

Example::

    LRSchedule(warmup_cosine(0.05))
    LRSchedule(step_decay(0.5, every=10), every="epoch")
"""

import math
import zlib
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from dtrain.errors import ConfigError

Schedule = Callable[[Optimizer, int], LRScheduler]


#: What a scheduler takes from the optimizer, and what it gives it beside the rate.
_RATES = ("base_lrs", "_last_lr")
_LIMITS = ("max_lr", "min_lr", "max_momentum", "base_momentum")


def time_based(decay: float) -> Schedule:
    """``lr0 / (1 + decay * t)`` (Robbins and Monro, 1951), halved after ``1 / decay`` steps."""
    _check("time_based", "decay", decay, decay >= 0, "0 or more")
    return _times(lambda t, total: 1.0 / (1.0 + decay * t))


def step_decay(drop: float, every: int) -> Schedule:
    """``lr0 * drop ** floor(t / every)``: a staircase, as in He et al., CVPR 2016.

    Args:
        drop: what the rate is multiplied by at each stair, in (0, 1].
        every: the length of a stair, in whole steps.
    """
    _check("step_decay", "drop", drop, 0 < drop <= 1, "more than 0 and at most 1")
    _check("step_decay", "every", every, _is_count(every) and every >= 1, "a whole number from 1")
    return _times(lambda t, total: drop ** (t // every))


def exponential(k: float) -> Schedule:
    """``lr0 * exp(-k * t)``, halved after each ``log(2) / k`` steps."""
    _check("exponential", "k", k, k >= 0, "0 or more")
    return _times(lambda t, total: math.exp(-k * t))


def warmup_cosine(warmup_steps: int | float, final_fraction: float = 0.0) -> Schedule:
    """A linear rise to ``lr0`` in ``w`` steps, then half a cosine down to a fraction of it.

    ``lr0 * (t + 1) / w`` for ``t < w``; from then on, with ``f = final_fraction``,
    ``lr0 * (f + (1 - f) * (1 + cos(pi * (t - w) / (T - w))) / 2)``, and ``f * lr0`` after ``T``.
    The rise is that of Goyal et al., arXiv:1706.02677, the cosine that of Loshchilov and
    Hutter, ICLR 2017, without restarts.

    Args:
        warmup_steps: ``w``: a whole number of steps, or (a float) a fraction of ``T``. The run
            must have more steps than that.
        final_fraction: ``f``: what part of ``lr0`` is left in the end.
    """
    whole = _is_count(warmup_steps)
    good = warmup_steps >= 0 if whole else isinstance(warmup_steps, float) and 0 <= warmup_steps < 1
    what = "a whole number from 0, or a float from 0 and below 1: a fraction of all steps"
    _check("warmup_cosine", "warmup_steps", warmup_steps, good, what)
    _check("warmup_cosine", "final_fraction", final_fraction, 0 <= final_fraction <= 1, "0 to 1")

    def factor(t: int, total: int) -> float:
        warm = int(warmup_steps) if whole else round(warmup_steps * total)
        if whole and warm >= total:
            raise ConfigError(
                f"warmup_cosine({warmup_steps}): the run has only {total} steps, so the rate would "
                "never fall; warm up for fewer, or pass a fraction such as 0.05"
            )
        if t < warm:
            return (t + 1) / warm
        done = min(1.0, (t - warm) / max(1, total - warm))
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2

    return _times(factor)


def one_cycle(
    peak_factor: float = 1.0,
    *,
    warmup_fraction: float = 0.3,
    start_fraction: float = 0.04,
    final_fraction: float = 4e-6,
    momentum: tuple[float, float] | None = None,
) -> Schedule:
    """Up to a peak and down again, on torch's ``OneCycleLR`` (Smith and Topin, arXiv:1708.07120).

    A group's peak is ``peak_factor * lr0``. The rate goes in half a cosine from ``start_fraction``
    of the peak at ``t = 0`` to the peak at ``t = p``, and in another to ``final_fraction`` of it
    at ``t = T - 1``, where ``p = max(warmup_fraction * T, 1.5) - 1``. A run that is continued
    with more steps than the cycle was made for ends in an error: its cycle is over.

    Args:
        peak_factor: the peak, as a multiple of each group's own rate.
        warmup_fraction: which part of the steps goes up.
        start_fraction: the first rate, as a fraction of the peak.
        final_fraction: the last rate, as a fraction of the peak.
        momentum: lowest (at the peak) and highest momentum (or first beta, or else ConfigError),
            which goes against the rate; None leaves it alone. The paper: ``(0.85, 0.95)``.
    """
    name = "one_cycle"
    _check(name, "peak_factor", peak_factor, 0 < peak_factor < math.inf, "more than 0")
    for argument, value, good in (
        ("warmup_fraction", warmup_fraction, 0 <= warmup_fraction < 1),
        ("start_fraction", start_fraction, 0 < start_fraction <= 1),
        ("final_fraction", final_fraction, 0 < final_fraction <= 1),
    ):
        _check(name, argument, value, good, "a fraction, from 0 to 1")
    low, high = momentum or (0.0, 0.0)
    _check(name, "momentum", momentum, 0 <= low <= high < 1, "(lowest, highest), from 0, below 1")

    def make(optimizer: Optimizer, total: int) -> LRScheduler:
        if momentum is not None and not {"momentum", "betas"} & set(optimizer.defaults):
            raise ConfigError(
                f"one_cycle(momentum={momentum}): {type(optimizer).__name__} has neither momentum "
                "nor betas; leave the argument out"
            )
        return OneCycleLR(
            optimizer,
            [peak_factor * float(group["lr"]) for group in optimizer.param_groups],
            total_steps=total,
            # At 1 / T, torch's formula divides by 0 in the first step.
            pct_start=max(float(warmup_fraction), 1.5 / total) if total > 1 else 0.5,
            div_factor=1 / start_fraction,
            final_div_factor=start_fraction / final_fraction,
            cycle_momentum=momentum is not None,
            base_momentum=low,
            max_momentum=high,
        )

    return make


def made_of(scheduler: LRScheduler, length: int) -> dict[str, str]:
    """Returns of what a scheduler was made that has not stepped, but for the rates that it takes.

    Functions are asked for some of their values on a curve of ``length``; 0 leaves them out.
    """
    groups = scheduler.optimizer.param_groups
    held = dict(scheduler.state_dict())
    held |= {name: [group.get(name) for group in groups] for name in _LIMITS if name in groups[0]}
    times = [0, *(2**n for n in range(length.bit_length()) if 2**n < length)] if length else []
    for number, factor in enumerate(getattr(scheduler, "lr_lambdas", ())):
        held[f"factor {number}"] = ", ".join(f"{factor(t):.6g}" for t in times)
    words = {"kind": type(scheduler).__name__}
    return words | {name: text for name, value in held.items() if (text := _word(name, value))}


def _word(name: str, value: object) -> str:
    """Returns a value in words; "" for a rate, and an object, which may be another each time."""
    if name in _RATES:
        return ""
    if isinstance(value, dict):
        text = ", ".join(f"{k}: {word}" for k, v in value.items() if (word := _word(str(k), v)))
    elif isinstance(value, list | tuple):
        text = ", ".join(_word("", one) for one in value)
    else:
        text = str(value) if isinstance(value, bool | int | float | str) else ""
    return text if len(text) < 200 else f"{text[:100]}... ({zlib.crc32(text.encode()):x})"


def _times(factor: Callable[[int, int], float]) -> Schedule:
    """Returns the schedule ``lr0 * factor(t, T)``."""
    # Plain functions: LambdaLR leaves them out of its state, which is then numbers only.
    return lambda optimizer, total: LambdaLR(optimizer, lambda t: factor(t, total))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(function: str, argument: str, value: object, good: bool, what: str) -> None:
    if not good or value == math.inf:
        raise ConfigError(f"{function}({argument}={value!r}): must be {what}")
