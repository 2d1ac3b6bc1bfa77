"""Metrics that callbacks add to those of an evaluation."""

from collections.abc import Mapping
from typing import Any

from dtrain.context import check_name
from dtrain.distributed import Comm, digest_of
from dtrain.errors import ConfigError, RankMismatch
from dtrain.metrics.means import number_of

_SHOWN = 8  # ranks in a message


def with_added(
    agreed: Mapping[str, float], left: Mapping[str, Any], comm: Comm
) -> dict[str, float]:
    """Returns what callbacks ``left`` of an evaluation's ``agreed`` metrics, with those they added.

    Raises where one is no number, has a name of dtrain's own, or differs between ranks, which would
    judge by it. Ranks: all, communicates.
    """
    metrics: dict[str, float] = {}
    for name, value in left.items():
        metrics[name] = float(number_of(name, value))
        is_own = name in agreed and name.endswith("/loss")
        if is_own and repr(metrics[name]) != repr(agreed[name]):
            raise ConfigError(
                f"on_eval_end made {name!r} {metrics[name]:.6g}, and the evaluation found "
                f"{agreed[name]:.6g}: give your figure a name of its own"
            )
        if name.startswith("train/"):
            raise ConfigError(f"on_eval_end added {name!r}: an evaluation's figures are 'eval/...'")
        check_name(name)
    found = {name: repr(metrics[name]) for name in sorted(metrics)}
    if len(set(comm.gather_objects("metrics of callbacks", digest_of([*found.items()])))) == 1:
        return metrics
    everyones = comm.gather_objects("metrics of callbacks that differ", found)
    lines = []
    for name in sorted({name for one in everyones for name in one}):
        values = [one.get(name, "not there") for one in everyones]
        if len(set(values)) > 1:
            told = ", ".join(f"{v} on rank {rank}" for rank, v in enumerate(values[:_SHOWN]))
            lines.append(f"  {name}: {told}{', ...' if len(values) > _SHOWN else ''}")
    raise RankMismatch(
        "on_eval_end left other metrics on some ranks, which would judge by them:\n"
        + "\n".join(lines)
        + "\nWhat is added must be equal on all ranks: bring it together by ctx.comm.all_reduce or "
        "gather_objects, or compute it on one rank by ctx.comm.on_main, which returns it on all"
    )
