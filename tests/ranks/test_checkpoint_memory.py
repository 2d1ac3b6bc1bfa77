"""How a checkpoint is copied and written: blocks, pieces, a few threads, pinned memory."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load, load_file
from safetensors.torch import save as as_safetensors
from saved import save
from torch import Tensor

import dtrain
from dtrain import accelerator
from dtrain.callbacks import EMA, Checkpoint
from dtrain.checkpoint import disk, memory
from dtrain.checkpoint import format as files
from dtrain.checkpoint.memory import HostMemory
from dtrain.errors import CheckpointError


def some_tensors() -> dict[str, Tensor]:
    """Of all sizes of dtypes, some larger than a block, some laid out otherwise."""
    torch.manual_seed(1)
    return {
        "wide": torch.randn(37, 29),
        "turned": torch.randn(9, 40).t(),
        "half": torch.randn(301).to(torch.bfloat16),
        "double": torch.randn(77, dtype=torch.float64),
        "flags": torch.randn(333) > 0,
        "complex": torch.randn(5, dtype=torch.complex64),
        "one": torch.tensor(3),
        "none": torch.empty(2, 0, 3),
        'é "\n': torch.arange(3, dtype=torch.int16),
    }


class Pins:
    """Stands in for an accelerator whose memory is of the CPU; counts what it is asked for."""

    def __init__(self) -> None:
        self.pinned_by: list[str] = []
        self.waited = 0

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        self.pinned_by.append(threading.current_thread().name)
        return torch.zeros(count, dtype=dtype)

    def event(self) -> Any:
        def synchronize() -> None:
            self.waited += 1

        return SimpleNamespace(record=lambda: None, synchronize=synchronize)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and pieces that a small state fills many of."""
    monkeypatch.setattr(memory, "BLOCK_BYTES", 256)
    monkeypatch.setattr(disk, "PIECE_BYTES", 100)
    monkeypatch.setattr(disk, "_WRITE_BYTES", 33)


# ----------------------------------------------------------------------------- files


@pytest.mark.usefixtures("small")
def test_what_is_copied_and_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors, held = some_tensors(), HostMemory()
    parts = held.copy({"a": tensors, "b": {"w": torch.ones(3)}, "c": {}}, None)
    for name, there in {"a": tensors, "b": {"w": torch.ones(3)}, "c": {}}.items():
        facts = disk.write(tmp_path / name, parts[name])
        found = load_file(tmp_path / name)
        assert set(found) == set(there)
        for one, tensor in there.items():
            assert found[one].dtype == tensor.dtype
            assert torch.equal(found[one], tensor), one
        assert facts["bytes"] == (tmp_path / name).stat().st_size
        assert facts["sha256"] == disk.digest(tmp_path / name, facts.get("piece", 0))
    assert len(parts["a"]) > 10  # blocks


def test_a_file_is_as_large_as_safetensors_own(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    facts = disk.write_tensors(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    own = as_safetensors(tensors)
    assert (len(load(content)), len(content) - len(own) < 64) == (len(tensors), True)


@pytest.mark.usefixtures("small")
def test_a_large_file_has_the_checksum_of_its_pieces(tmp_path: Path) -> None:
    content = bytes(range(250))
    facts = disk.write_bytes(tmp_path / "file", content)
    pieces = [hashlib.sha256(content[at : at + 100]).digest() for at in (0, 100, 200)]
    joint = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert facts == {"bytes": 250, "sha256": joint, "piece": 100}
    assert (tmp_path / "file").read_bytes() == content
    assert disk.digest(tmp_path / "file", 100) == joint
    # Another size of pieces, later, changes nothing of what was written.
    assert disk.digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("small")
def test_damage_in_any_piece_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1, model={"w": torch.arange(300.0)})
    file = path / "model.safetensors"
    files.check(path)
    content = file.read_bytes()
    for at in range(0, len(content), 50):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match="its sha256 differs"):
            files.check(path)
    swapped = content[100:200] + content[:100] + content[200:]  # two whole pieces
    file.write_bytes(swapped)
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        files.check(path)
    file.write_bytes(content)
    files.check(path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_piece_that_cannot_be_written_ends_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    begun = []
    real = disk._write_piece

    def write(file: Path, at: int, *rest: Any) -> bytes:
        begun.append(at)
        if at == 200:
            raise OSError(28, "No space left on device")
        return real(file, at, *rest)

    monkeypatch.setattr(disk, "_write_piece", write)
    monkeypatch.setattr(disk.at_once, "__defaults__", (threads,))
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="No space left"), disk.plain_words(tmp_path):
        disk.write_bytes(tmp_path / "file", bytes(10_000))
    assert len(begun) <= 3 + threads
    assert threading.active_count() == before


def test_jobs_are_done_by_several_threads_and_answered_in_order() -> None:
    meet = threading.Barrier(3)

    def job(number: int) -> int:
        if number < 3:
            meet.wait(20)  # with one thread, this would wait in vain
        return number

    assert disk.at_once([lambda n=n: job(n) for n in range(7)], 3) == [*range(7)]


def test_too_many_tensors_for_a_file_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LARGEST_HEADER", 100)
    with pytest.raises(CheckpointError, match="9 tensors are too many for one safetensors file"):
        disk.write_tensors(tmp_path / "file", dict.fromkeys("abcdefghi", torch.ones(1)))


# ----------------------------------------------------------------------------- memory


def test_a_block_is_got_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_BYTES", 256)
    held, pins = HostMemory(), Pins()
    for size, blocks in ((64, 2), (64, 2), (32, 2), (80, 2), (200, 4), (16, 4)):
        parts = held.copy({"a": {"w": torch.arange(float(size))}, "b": {"v": torch.ones(1)}}, pins)
        found = [x for part in parts["a"][1:] for x in part.cast("f")]
        assert found == [*range(size)]
        assert [*parts["b"][1].cast("f")] == [1.0]
        assert len(pins.pinned_by) == blocks


def test_a_save_needs_no_thread_before_it() -> None:
    """It gets what the thread has not got yet; and the thread then ends."""
    held, pins = HostMemory(), Pins()
    asked = threading.Event()

    def wanted() -> int | None:
        asked.wait(20)
        return 1

    held.reserve(wanted, pins)
    held.copy({"a": {"w": torch.ones(1)}}, pins)
    asked.set()
    held._thread.join(20)
    assert pins.pinned_by == ["MainThread"]
    held.leave()


def test_a_thread_that_cannot_get_memory_leaves_it_to_the_save() -> None:
    class Full(Pins):
        def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
            raise RuntimeError("CUDA error: out of memory")

    held = HostMemory()
    held.reserve(lambda: 1, Full())
    held._thread.join(20)
    with pytest.raises(RuntimeError, match="out of memory"):
        held.copy({"a": {"w": torch.ones(1)}}, Full())
    held.leave()


class Waits(dtrain.Callback):
    """Has the first checkpoint wait until the thread has ended."""

    def on_save(self, ctx: dtrain.Context) -> None:
        self.trainer._files.saver._stage.memory._thread.join(20)


class StartsMore(dtrain.Callback):
    """Has a state that appears late, and is larger than all else."""

    late: Tensor | None = None

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if ctx.progress.step == 5:
            self.late = torch.arange(5000.0)

    def state_dict(self) -> dict[str, Any]:
        return {"late": self.late}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.late = state["late"]


def pretended(monkeypatch: pytest.MonkeyPatch) -> Pins:
    pins = Pins()
    monkeypatch.setattr(memory, "BLOCK_BYTES", 512)
    for module in ("dtrain.checkpoint.saver", "dtrain.checkpoint.writer"):
        stands_in = SimpleNamespace(of=lambda device: pins, Accelerator=accelerator.Accelerator)
        monkeypatch.setattr(f"{module}.accelerator", stands_in)
    return pins


def test_memory_is_pinned_while_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins, waits, more = pretended(monkeypatch), Waits(), StartsMore()
    ema = EMA(0.9)
    callbacks = [Checkpoint(every_steps=4, background=False), ema, waits, more]
    trainer = waits.trainer = tiny.trainer(callbacks, run_dir=tmp_path)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=8)
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    tensors = [*trainer.model.state_dict().values(), *moments, *ema.averages.values()]
    known = sum(tensor.nbytes for tensor in tensors)
    by_thread = pins.pinned_by.count("dtrain: memory of checkpoints")
    assert known <= by_thread * 512 < known + 512 + 3 * 64  # no more than that
    assert pins.waited == 2  # for the copies of each checkpoint
    # What came later has its place, too.
    state = files.load_state(tmp_path / "checkpoints" / "step-00000008")
    assert state["callbacks"]["StartsMore"]["late"].tolist() == [*range(5000)]
    assert not [t for t in threading.enumerate() if t.name == "dtrain: memory of checkpoints"]


def test_nothing_is_pinned_that_no_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = pretended(monkeypatch)
    tiny.trainer([], run_dir=tmp_path).fit(tiny.dataset(), batch_size=16, max_steps=4)
    assert pins.pinned_by == []


def test_on_cpus_no_memory_is_got_beforehand(tmp_path: Path) -> None:
    trainer = tiny.trainer([Checkpoint(every_steps=4)], run_dir=tmp_path)
    trainer._files.saver._stage.memory.reserve = None  # whoever calls it fails
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=4)
    assert trainer._files.saver._stage.memory._thread is None
