"""Loops that live in the same processes and take turns, a block of steps at a time."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from handwritten import LOOPS
from workloads import Workload

WARM_UP = 3  # turns of each that are not counted


class Turns:
    """Times the loop that calls it after each step, and between its blocks the handwritten ones.

    However a loop is built, it has somewhere a place where a step is over. From there this runs
    the other loops' blocks, so that all loops find the machine equally busy.

    Args:
        name: of the loop that calls.
        workload: what is trained.
        rounds: turns that count.
        folder: where the loops log to.
    """

    def __init__(self, name: str, workload: Workload, rounds: int, folder: Path) -> None:
        self.block, self.rounds = workload.block, rounds
        self.steps_in_all = (WARM_UP + rounds) * workload.block
        self.seconds: dict[str, list[float]] = {one: [] for one in (name, *LOOPS)}
        self._name, self._workload, self._folder = name, workload, folder
        self._others: dict[str, Iterator[None]] = {}
        self._order = random.Random(0)  # alike on all ranks
        self._steps = self._turns = 0
        self._began = 0.0

    def dataset(self) -> object:
        """What every loop trains on: as much as the loop that calls takes in one epoch."""
        return self._workload.dataset(self.steps_in_all, self.ranks)

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def step_is_over(self) -> None:
        """Call this after each step."""
        self._steps += 1
        if self._steps % self.block:
            return
        took = {self._name: time.perf_counter() - self._began}
        if not self._others:  # now that the process group is open
            dataset = self._workload.dataset(min(self.steps_in_all, 50 * self.block), self.ranks)
            for name, make in LOOPS.items():
                log = (self._folder / f"{name}.{self._rank}.jsonl").open("w")
                self._others[name] = make(self._workload, dataset, log)
        for name in self._order.sample(list(self._others), len(self._others)):
            self._meet()
            began = time.perf_counter()
            next(self._others[name])
            took[name] = time.perf_counter() - began
        self._turns += 1
        if self._turns > WARM_UP:
            for name, seconds in took.items():
                self.seconds[name].append(seconds / self.block)
        self._meet()
        self._began = time.perf_counter()

    def close(self) -> None:
        """Lets go of the other loops, and of the process group: the process may abort otherwise."""
        self._others.clear()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()
