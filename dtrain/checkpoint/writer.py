"""How a checkpoint is written: each rank copies its share off the device, then writes it.

What is equal on all ranks (parameters, optimizer, callbacks) is divided among them by size, which
each rank works out for itself. Nobody copies or writes more than its share, and no plan has to
be sent around.
"""

import heapq
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain import accelerator
from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.checkpoint.memory import HostMemory, Tensors, bytes_of
from dtrain.checkpoint.run_lock import RunLock
from dtrain.checkpoint.tree import Split
from dtrain.distributed import Activity, Comm, digest_of, gathered, is_sharded
from dtrain.errors import CheckpointError

#: What is smaller is not divided: a small model is one plain ``model.safetensors``.
PART_BYTES = 64 * 2**20
#: What is larger is, also where one rank writes all of it: a disk may be slow, and with each file
#: the rank shows that it is still at work.
LARGEST_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint is to hold."""

    step: int  # the global step
    model: Mapping[str, Tensor]  # parameters and buffers, equal on all ranks
    state: Split  # everything else that is equal on all ranks
    rank_state: Split  # what is this rank's own
    metrics: dict[str, float]  # of these very weights

    def layout(self) -> int:
        """Returns a number of what is to be divided among ranks, without the numbers in it."""
        every = (*self.model.items(), *self.state.tensors.items())
        layout = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in every]
        return int(digest_of(layout), 16) >> 1


@dataclass(slots=True)
class Staged:
    """One rank's share of a checkpoint. What it was copied from may change."""

    step: int
    metrics: dict[str, float]
    tensors: dict[str, list[memoryview]]  # what is in each file of tensors, by its name
    plain: dict[str, Any] = field(default_factory=dict)  # JSON values, likewise
    copied: Any = None  # the event after which copies off the device are there, if they are not


class Stage:
    """Copies a rank's share of a checkpoint off the device, into memory that it keeps."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.memory = HostMemory()

    def take(self, content: Content, sharers: Sequence[int]) -> Staged:
        """Returns this rank's share of ``content``; what was returned before is overwritten.

        What is equal on all ranks is divided among ``sharers``.
        """
        me, own = files.rank_name(self._rank), content.rank_state
        held = {files.MODEL: content.model, files.STATE: content.state.tensors, me: own.tensors}
        for stem, tensors in held.items():
            _check(stem, tensors)
        parts = _parts(content, len(sharers))
        share = self._share(own.tensors, parts, sharers)
        # Not of what others copy: they do where this rank's device is broken.
        devices = {tensor.device for tensors in share.values() for tensor in tensors.values()}
        beside = next(filter(None, map(accelerator.of, devices)), None)
        staged = Staged(content.step, dict(content.metrics), self.memory.copy(share, beside))
        self._gather(parts, sharers)
        if beside is not None:
            staged.copied = beside.event()
            staged.copied.record()
        staged.plain[f"{me}.json"] = own.plain
        if self._rank == sharers[0]:
            staged.plain[f"{files.STATE}.json"] = content.state.plain
            of_model = [file for file in parts if file.startswith(f"{files.MODEL}-")]
            if of_model:  # in parts: told as Hugging Face's libraries expect it
                size = sum(tensor.nbytes for tensor in content.model.values())
                weight_map = {name: file for file in of_model for name in parts[file]}
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                staged.plain[f"{files.MODEL}.safetensors.index.json"] = index
        return staged

    def reserve(
        self, bulk: Callable[[], Content | None], ranks: int, beside: accelerator.Accelerator
    ) -> None:
        """Gets memory for this rank's share of ``bulk`` in a thread, once that is there."""

        def wanted() -> int | None:
            if (content := bulk()) is None:
                return None
            return bytes_of(self._share({}, _parts(content, ranks), range(ranks)))

        self.memory.reserve(wanted, beside)

    def _share(
        self, own: Tensors, parts: Mapping[str, Tensors], sharers: Sequence[int]
    ) -> dict[str, Tensors]:
        """Returns what this rank copies, by the file that is to hold it."""
        turns = {file: sharers[turn % len(sharers)] for turn, file in enumerate(parts)}
        mine = {file: held for file, held in parts.items() if turns[file] == self._rank}
        return {f"{files.rank_name(self._rank)}.safetensors": own} | mine

    def _gather(self, parts: Mapping[str, Tensors], sharers: Sequence[int]) -> None:
        """Gathers sharded tensors, one after the other, to the rank that writes it.

        Ranks: all, communicates.
        """
        for turn, (file, tensors) in enumerate(parts.items()):
            for name, tensor in tensors.items():
                if not is_sharded(tensor):
                    continue
                if (whole := gathered(tensor, sharers[turn % len(sharers)])) is not None:
                    self.memory.put(file, name, whole)


def _parts(content: Content, most: int) -> dict[str, Tensors]:
    """Returns what is equal on all ranks, by the file that is to hold it."""
    parts: dict[str, Tensors] = {}
    for stem, held in {files.MODEL: content.model, files.STATE: content.state.tensors}.items():
        divided = divide(held, most)
        for number, names in enumerate(divided):
            file = files.part_name(stem, number, len(divided))
            parts[file] = {name: held[name] for name in names}
    return parts


def divide(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Returns the names in each of ``most`` parts of about as many bytes; of fewer, if small."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts = max(1, min(most, -(-total // PART_BYTES)), -(-total // LARGEST_BYTES))
    # The largest first, each to the part that has least so far.
    filled = [(0, number) for number in range(parts)]
    where: dict[str, int] = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        size, number = heapq.heappop(filled)
        where[name] = number
        heapq.heappush(filled, (size + tensors[name].nbytes, number))
    return [[name for name in tensors if where[name] == number] for number in range(parts)]


def write(
    folder: Path,
    staged: Staged,
    comm: Comm,
    *,
    is_main: bool,
    then: Callable[[], None],
    before: Callable[[], None] = lambda: None,
    run_lock: RunLock | None = None,
) -> None:
    """Writes a checkpoint, of which ``staged`` is this rank's share: whole, or not at all.

    ``before`` is called on rank 0 before it is put in its place, ``then`` after. ``run_lock`` is
    rank 0's right to write to ``folder``, which all ranks share. Ranks: all, communicates.
    """
    final, aside = files.place(folder, staged.step, run_lock.token if run_lock else "")
    check = run_lock.check if run_lock else lambda: None

    # Here, too, so that the others are told which checkpoint it was.
    @disk.plain_words(final)
    def begin() -> Path:
        check()
        files.tidy(folder)
        aside.mkdir(parents=True, exist_ok=True)  # of a save that failed, and could not be deleted
        return aside

    def commit() -> None:
        with disk.plain_words(final):
            before()
            facts = {name: fact for one in written for name, fact in sorted(one.items())}
            files.commit(aside, final, staged.step, staged.metrics, facts, check)
        check()
        then()

    try:
        with comm.lockstep("saving a checkpoint"):
            with disk.plain_words(final):
                aside = comm.on_main("checkpoint: begin", begin)
                share = _write_share(aside, staged, comm.activity)
                written = comm.gather_objects("checkpoint: written", share)
            comm.on_main("checkpoint: commit", commit)
    except Exception:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)  # it may be the disk that is full
        raise


def _write_share(aside: Path, staged: Staged, activity: Activity) -> dict[str, Any]:
    """Returns, for the manifest, what is in each file that was written."""
    if staged.copied is not None:
        staged.copied.synchronize()

    def write_one(name: str, parts: Sequence[memoryview]) -> dict[str, Any]:
        facts = disk.write(aside / name, parts)
        activity.enter(activity.phase)  # still at work
        return facts

    # Two at once: one goes down to the disk while the other is hashed. Small ones are soon done.
    size = sum(len(part) for parts in staged.tensors.values() for part in parts)
    jobs = [partial(write_one, name, parts) for name, parts in staged.tensors.items()]
    written = disk.at_once(jobs, 2 if size > disk.PIECE_BYTES else 1)
    facts = dict(zip(staged.tensors, written, strict=True))
    for name, value in staged.plain.items():
        facts[name] = disk.write_bytes(aside / name, json.dumps(value).encode())
    return facts


def _check(stem: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not disk.dtype_name(tensor.dtype):
            trouble = f"no safetensors file can hold {tensor.dtype}"
            if tensor.is_complex():
                trouble += "; keep torch.view_as_real(it), and view it as complex in the forward"
        elif tensor.layout != torch.strided:
            trouble = f"it is {tensor.layout}; keep it dense"
        else:
            continue
        raise CheckpointError(f"{name} ({stem}) cannot be saved: {trouble}")
