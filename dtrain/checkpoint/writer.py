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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.checkpoint.run_lock import RunLock
from dtrain.checkpoint.tree import Split
from dtrain.distributed import Activity, Comm
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


@dataclass(slots=True)
class Staged:
    """One rank's share of a checkpoint. What it was copied from may change."""

    step: int
    metrics: dict[str, float]
    # By name of the file that is to hold them; so are the JSON values.
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None  # when copies off the device are there, if they are not


class Stage:
    """Copies a rank's share of a checkpoint off the device.

    It keeps the memory of the copies for the next time: to get new memory from the system takes
    longer than to copy. With CUDA it is pinned, and the copy runs beside the host.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._memory: dict[tuple[str, str], Tensor] = {}

    def take(self, content: Content, sharers: Sequence[int]) -> Staged:
        """Returns this rank's share of ``content``; what was returned before is overwritten.

        What is equal on all ranks is divided among ``sharers``.
        """
        staged = Staged(content.step, dict(content.metrics))
        shared = {files.MODEL: content.model, files.STATE: content.state.tensors}
        me, own = files.rank_name(self._rank), content.rank_state.tensors
        for stem, held in {**shared, me: own}.items():
            _check(stem, held)
        staged.plain[f"{me}.json"] = content.rank_state.plain
        staged.tensors[f"{me}.safetensors"] = {n: self._copy(me, n, t) for n, t in own.items()}
        mine = list(own.values())  # what is copied here
        divided = {stem: divide(held, len(sharers)) for stem, held in shared.items()}
        weight_map: dict[str, str] = {}
        parts = [(stem, *part) for stem, names in divided.items() for part in enumerate(names)]
        for turn, (stem, number, names) in enumerate(parts):
            file = files.part_name(stem, number, len(divided[stem]))
            if stem == files.MODEL:
                weight_map |= dict.fromkeys(names, file)
            if sharers[turn % len(sharers)] == self._rank:
                staged.tensors[file] = {n: self._copy(stem, n, shared[stem][n]) for n in names}
                mine += [shared[stem][name] for name in names]
        if self._rank == sharers[0]:
            staged.plain[f"{files.STATE}.json"] = content.state.plain
            if len(divided[files.MODEL]) > 1:  # as Hugging Face's libraries expect it
                size = sum(tensor.nbytes for tensor in content.model.values())
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                staged.plain[f"{files.MODEL}.safetensors.index.json"] = index
        # Not for what others copy: they do where this rank's device is broken.
        if any(tensor.is_cuda for tensor in mine):
            staged.copied = torch.cuda.Event()
            staged.copied.record()
        return staged

    def _copy(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        memory = self._memory.get((stem, name))
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            # Contiguous, whatever the tensor is, because files hold nothing else.
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[stem, name] = memory
        return memory.copy_(tensor, non_blocking=True)


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

    @disk.plain_words(final)
    def commit() -> None:
        before()
        facts = {name: fact for one in written for name, fact in sorted(one.items())}
        files.commit(aside, final, staged.step, staged.metrics, facts, check)

    def conclude() -> None:
        check()
        then()

    try:
        with comm.lockstep("saving a checkpoint"):
            with disk.plain_words(final):
                aside = comm.on_main("checkpoint: begin", begin)
                share = _write_share(aside, staged, comm.activity)
                written = comm.gather_objects("checkpoint: written", share)
                comm.on_main("checkpoint: commit", commit)
            comm.on_main("checkpoint: then", conclude)
    except Exception:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)  # it may be the disk that is full
        raise


def _write_share(aside: Path, staged: Staged, activity: Activity) -> dict[str, Any]:
    """Returns, for the manifest, what is in each file that was written."""
    if staged.copied is not None:
        staged.copied.synchronize()
    facts: dict[str, Any] = {}
    for name, tensors in staged.tensors.items():
        disk.write_tensors(aside / name, tensors)
        facts[name] = files.facts_of(aside / name)
        activity.enter(activity.phase)  # still at work
    for name, value in staged.plain.items():
        disk.write_bytes(aside / name, json.dumps(value).encode())
        facts[name] = files.facts_of(aside / name)
    return facts


def _check(stem: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not disk.can_hold(tensor.dtype):
            trouble = f"no safetensors file can hold {tensor.dtype}"
            if tensor.is_complex():
                trouble += "; keep torch.view_as_real(it), and view it as complex in the forward"
        elif tensor.layout != torch.strided:
            trouble = f"it is {tensor.layout}; keep it dense"
        else:
            continue
        raise CheckpointError(f"{name} ({stem}) cannot be saved: {trouble}")
