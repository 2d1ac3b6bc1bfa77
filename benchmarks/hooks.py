"""What a hook costs that does nothing: the loop's own work for one more callback.

    python benchmarks/hooks.py

A hundred callbacks that override one hook, against none; the median over rounds.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from dtrain.callback import Callback, Hooks
from dtrain.distributed.activity import Activity

CALLS = 1000


class Nothing(Callback):
    """Does nothing after each step."""

    def on_step_end(self, ctx: Any, step: Any) -> None:
        """Does nothing."""


def seconds_of(hooks: Hooks) -> float:
    began = perf_counter()
    for _ in range(CALLS):
        hooks.fire(Callback.on_step_end, None, None)  # type: ignore[arg-type]
    return (perf_counter() - began) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--callbacks", type=int, default=100)
    arguments = parser.parse_args()
    none = Hooks([Callback()], Activity())
    many = Hooks([Nothing() for _ in range(arguments.callbacks)], Activity())
    rows = [(seconds_of(none), seconds_of(many)) for _ in range(arguments.rounds)]
    empty = median(one for one, _ in rows)
    each = median((all_of_them - one) / arguments.callbacks for one, all_of_them in rows)
    print(f"a hook that nobody overrides: {1e9 * empty:.0f} ns")
    print(f"each callback that does:      {1e9 * each:.0f} ns")


if __name__ == "__main__":
    main()
