"""Checkpoints on disk: what goes in comes out, or is found to be damaged."""

import json
import math
import resource
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from saved import save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import format as files
from dtrain.checkpoint import tree
from dtrain.checkpoint.writer import Content, Stage
from dtrain.errors import CheckpointError, RemoteError
from dtrain.testing import run_processes

# ----------------------------------------------------------------------------- the tree

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
SHAPES = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)]
ONE, TWO = torch.tensor([1.0]), torch.tensor([2.0, 3.0])


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    return (torch.arange(math.prod(shape)) + start).reshape(shape).to(dtype)


tensors = st.builds(
    make_tensor, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 100)
)
words = st.text(alphabet="ab/_0.é\n", max_size=4)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | words
    | tensors
    | tensors
)
keys = words | st.integers(0, 2) | st.none() | st.tuples(st.integers(0, 1), words)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def assert_same(one: Any, other: Any) -> None:
    """Equal in value, type and, for numbers and tensors, in bits."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert repr(one) == repr(other)  # tells -0.0 from 0.0, and is equal for NaN


@settings(derandomize=True, deadline=None, max_examples=400)
@given(states)
@example({"a/b": ONE, "a": {"b": TWO}})
@example({1: ONE, "1": TWO})
@example({"": ONE, "value": TWO})
@example({"__tensor__": "a", "a": ONE})
@example({"__tuple__": [1, 2]})
@example({"__items__": [[1, 2]], "b": (TWO,)})
def test_what_is_split_is_joined_again(state: Any) -> None:
    plain, found = tree.split(state)
    assert_same(tree.join(json.loads(json.dumps(plain)), found), state)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.dictionaries(words, states, max_size=3))
@example({"__metadata__": ONE})
def test_what_is_saved_is_loaded(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), 1, state=state, rank_state={"mine": [state]})
        assert_same(files.load_state(path), state)
        assert_same(files.load_rank_state(path, 0), {"mine": [state]})
        assert files.load_rank_state(path, 1) is None


def test_what_json_has_no_word_for_is_brought_to_the_nearest() -> None:
    state = OrderedDict(
        number=np.float64(0.1),
        count=np.int64(3),
        flag=np.bool_(True),
        size=torch.Size([2, 3]),
        parameter=nn.Parameter(ONE),
        turned=torch.arange(6).reshape(2, 3).t(),
        wide=torch.ones(1).expand(4),
    )
    plain, found = tree.split(state)
    joined = tree.join(json.loads(json.dumps(plain)), found)
    assert type(joined) is dict
    assert (joined["number"], joined["count"], joined["flag"]) == (0.1, 3, True)
    assert joined["size"] == (2, 3)
    assert not joined["parameter"].requires_grad
    assert joined["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert joined["wide"].tolist() == [1, 1, 1, 1]


def test_a_tensor_that_is_there_twice_is_kept_once() -> None:
    tensor = torch.zeros(2)
    plain, found = tree.split({"a": [tensor], "b": {"c": tensor, "d": tensor.clone()}})
    assert list(found) == ["a/0", "b/d"]
    assert tree.names_in(plain["b"]) == {"a/0", "b/d"}
    joined = tree.join(plain, found)
    assert torch.equal(joined["b"]["c"], joined["a"][0])


def values(parts: list[memoryview]) -> list[float]:
    """Returns the float32 numbers that are to go into a file, after its header."""
    return [number for part in parts[1:] for number in part.cast("f")]


def test_what_is_staged_is_a_copy() -> None:
    tensor = torch.zeros(2)
    stage = Stage(rank=0)
    split = tree.split({"a": tensor, "b": tensor[:]})
    staged = stage.take(Content(1, {"w": tensor}, split, split, {}), [0])
    tensor += 1
    assert [values(parts) for parts in staged.tensors.values()] == [[0] * 4, [0] * 2, [0] * 4]
    # And the next one takes the same memory.
    again = stage.take(Content(2, {"w": tensor}, split, split, {}), [0])
    assert [values(parts) for parts in again.tensors.values()] == [[1] * 4, [1] * 2, [1] * 4]
    assert [values(parts) for parts in staged.tensors.values()] == [[1] * 4, [1] * 2, [1] * 4]


def test_a_rank_that_copies_nothing_off_its_device_leaves_it_alone() -> None:
    """It may be broken: the emergency checkpoint is then the others' to write."""
    with FakeTensorMode():
        model = {"w": torch.empty(2, device="cuda")}
    none = tree.split({})
    staged = Stage(rank=1).take(Content(1, model, none, none, {}), [0])
    assert list(staged.tensors) == ["rank-00001.safetensors"]
    assert staged.copied is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (object(), "the state is object;"),
        ({"a": [1, {"b": {2}}]}, "a/1/b is set;"),
        ({"a": (1, b"x")}, "a/1 is bytes;"),
        ({3: {"f": len}}, "3/f is builtin_function_or_method;"),
        ([1j], "0 is complex;"),
    ],
)
def test_what_cannot_be_saved_is_named(state: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        tree.split(state)
    assert words in str(raised.value)
    assert "dicts, lists, tuples, tensors" in str(raised.value)


def test_a_missing_tensor_is_named() -> None:
    plain, found = tree.split({"a": {"b": ONE}})
    found.clear()
    with pytest.raises(CheckpointError, match=r"'a/b' is missing"):
        tree.join(plain, found)


# ----------------------------------------------------------------------------- files


def flip(file: Path, at: int, bits: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= bits
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of two steps."""
    folder = tmp_path / "checkpoints"
    save(folder, 10)
    save(folder, 20)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> int | None:
    saved, _ = files.find(folder)
    return None if saved is None else saved.step


def test_a_checkpoint_is_found_and_read(folder: Path) -> None:
    assert names(folder) == ["step-00000010", "step-00000020"]
    saved, damage = files.find(folder)
    assert saved == files.Saved(folder / "step-00000020", 20, {"eval/loss": 20.25})
    assert damage == []
    assert [one.step for one in files.listed(folder)] == [10, 20]
    model = files.load_model(saved.path)
    assert model["weight"].tolist() == [20.0] * 40
    assert files.load_state(saved.path)["progress"] == [20]
    files_there = ["manifest.json", "model.safetensors", "rank-00000.json"]
    files_there += ["rank-00000.safetensors", "state.json", "state.safetensors"]
    assert names(saved.path) == files_there


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert files.find(tmp_path / "none") == (None, [])
    assert files.listed(tmp_path / "none") == []


def test_the_same_step_is_replaced(folder: Path) -> None:
    save(folder, 20, state={"again": True})
    assert names(folder) == ["step-00000010", "step-00000020"]
    assert files.load_state(folder / "step-00000020") == {"again": True}
    assert newest(folder) == 20


def test_tied_and_strided_weights_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    path = save(tmp_path, 1, model={"a": weight, "tied": weight, "turned": weight.t()})
    model = files.load_model(path)
    assert model["a"].tolist() == model["tied"].tolist() == weight.tolist()
    assert model["turned"].tolist() == weight.t().tolist()


def test_steps_of_nine_digits_are_newer(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert newest(tmp_path) == 100_000_000
    assert [one.step for one in files.listed(tmp_path)] == [99_999_999, 100_000_000]


def test_removing(folder: Path) -> None:
    files.remove(folder, 20)
    assert names(folder) == ["step-00000010"]
    # Killed while it removed, and the same step was saved and is removed again.
    (folder / ".removing-step-00000010" / "sub").mkdir(parents=True)
    files.remove(folder, 10)
    assert files.find(folder) == (None, [])


def test_what_a_killed_save_left_behind_is_no_checkpoint(folder: Path) -> None:
    shutil.copytree(folder / "step-00000020", folder / ".writing-step-00000030")
    (folder / ".writing-step-00000020").mkdir()
    assert newest(folder) == 20
    assert [one.step for one in files.listed(folder)] == [10, 20]
    save(folder, 40)
    assert names(folder) == ["step-00000010", "step-00000020", "step-00000040"]  # tidied up


# ----------------------------------------------------------------------------- damage

NEWEST = "step-00000020"
FILES = [
    "manifest.json",
    "model.safetensors",
    "rank-00000.json",
    "rank-00000.safetensors",
    "state.json",
    "state.safetensors",
]


def assert_told(folder: Path, name: str) -> None:
    """The newest is found damaged, its file is named, and the one before it is used."""
    saved, damage = files.find(folder)
    assert saved is not None
    assert saved.step == 10
    assert len(damage) == 1
    assert str(folder / NEWEST / name) in damage[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_bit_is_found(folder: Path, name: str, where: float) -> None:
    file = folder / NEWEST / name
    flip(file, int(where * (file.stat().st_size - 1)))
    assert_told(folder, name)


@pytest.mark.parametrize("bits", [1, 4, 128])
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(folder: Path, bits: int) -> None:
    truth, _ = files.find(folder)
    file = folder / NEWEST / "manifest.json"
    content = file.read_bytes()
    for at in range(len(content)):
        flip(file, at, bits)
        saved, damage = files.find(folder)
        listed = {one.path.name: one for one in files.listed(folder)}
        assert saved == truth or damage, f"byte {at} of {content[at - 20 : at + 20]!r}"
        assert listed.get(NEWEST, truth) == truth, f"byte {at} of {content[at - 20 : at + 20]!r}"
        file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["deleted", "emptied", "cut", "longer", "a folder"],
)
def test_a_harmed_file_is_found(folder: Path, name: str, harm: Callable[[Path], Any]) -> None:
    harm(folder / NEWEST / name)
    assert_told(folder, name)


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1, "step": 20, "metrics": {}, "files": {}}',
        b'{"format": 1, "step": "x", "metrics": {}, "files": {"a": {"bytes": 0, "sha256": ""}}}',
        b'{"format": 1, "step": 20, "files": {"a": {"bytes": 0, "sha256": ""}}}',
        b'{"format": 1, "step": 20, "metrics": {}, "files": {"../a": {"bytes": 0, "sha256": ""}}}',
        b'{"format": 1, "step": 20, "metrics": {}, "files": ["a"]}',
    ],
)
def test_garbage_in_place_of_a_manifest_is_found(folder: Path, content: bytes) -> None:
    (folder / NEWEST / "manifest.json").write_bytes(content)
    assert_told(folder, "manifest.json")
    assert [one.step for one in files.listed(folder)] == [10]


def test_a_newer_format_is_told_apart_from_damage(folder: Path) -> None:
    file = folder / NEWEST / "manifest.json"
    manifest = json.loads(file.read_bytes()) | {"format": files.FORMAT + 1}
    file.write_text(json.dumps(manifest))
    _, damage = files.find(folder)
    assert f"format {files.FORMAT + 1}; this dtrain reads up to {files.FORMAT}" in damage[0]


def test_a_file_of_another_size_is_told_with_both_sizes(folder: Path) -> None:
    file = folder / NEWEST / "state.json"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    _, damage = files.find(folder)
    assert damage == [f"{file} has {size - 3} bytes, not the {size} written"]


def test_each_damaged_checkpoint_is_told(folder: Path) -> None:
    flip(folder / NEWEST / "state.json", 3)
    (folder / "step-00000010" / "model.safetensors").unlink()
    saved, damage = files.find(folder)
    assert saved is None
    assert [NEWEST in damage[0], "state.json" in damage[0]] == [True, True]
    assert "model.safetensors is missing" in damage[1]


def test_a_damaged_file_is_named_where_it_is_read(folder: Path) -> None:
    path = folder / NEWEST
    for name, read in (("model.safetensors", files.load_model), ("state.json", files.load_state)):
        (path / name).write_bytes(b"no")
        with pytest.raises(CheckpointError, match=name):
            read(path)
    (path / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be read"):
        files.load_rank_state(path, 0)


# ----------------------------------------------------------------------------- failing to write


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 100 kB, as on a full disk; also root's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = torch.zeros(50_000)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"model": {"big": BIG}}, ["step-00000030 could not be written", "File too large"]),
        ({"state": {"big": BIG}}, ["step-00000030 could not be written", "File too large"]),
        ({"state": {"text": "x" * 200_000}}, ["step-00000030 could not be written", "File too la"]),
        ({"rank_state": {"big": BIG}}, ["step-00000030 could not be written", "File too large"]),
        ({"rank_state": {"a": {"b": set()}}}, ["a/b is set"]),
        ({"state": {"z": torch.zeros(1, dtype=torch.complex128)}}, ["complex128"]),
        ({"model": {"z": torch.zeros(1, dtype=torch.complex128)}}, ["complex128"]),
    ],
)
def test_a_failed_save_leaves_nothing_behind(
    folder: Path, what: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as raised:
        save(folder, 30, **what)
    for word in words:
        assert word in str(raised.value)
    assert names(folder) == ["step-00000010", "step-00000020"]
    assert newest(folder) == 20
    save(folder, 30)
    assert newest(folder) == 30


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/step-00000001 could not be written"):
        save(tmp_path / "file", 1)
    (tmp_path / ".writing-step-00000002").touch()
    save(tmp_path, 2)
    (tmp_path / "step-00000003").touch()
    with pytest.raises(CheckpointError, match=r"step-00000003 could not be written"):
        save(tmp_path, 3)
    assert newest(tmp_path) == 2


# ----------------------------------------------------------------------------- ranks


def save_on_two_ranks(folder: Path) -> list[str]:
    told = []
    with dtrain.init() as world:
        rank, comm = world.rank, world.comm

        def attempt(step: int, place: Path = folder, **what: Any) -> None:
            try:
                path = save(place, step, rank=rank, size=2, comm=comm, **what)
                told.append(f"{path.name} {names(path)}")
            except (CheckpointError, RemoteError) as error:
                told.append(f"{type(error).__name__}: {error}")
            comm.barrier("afterwards")  # both go on together

        attempt(1, rank_state={"rank": rank, "rng": torch.tensor(rank)})
        told.append(str(files.load_rank_state(folder / "step-00000001", rank)))
        attempt(2, folder / "file")  # rank 0 cannot make the folder
        attempt(3, rank_state={"rank": set() if rank == 1 else rank})
        attempt(4, state={"on all ranks": set()})
        attempt(5)
        told.append(str(names(folder)))
    return told


def test_a_failed_save_is_told_to_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one, two = run_processes(save_on_two_ranks, 2, tmp_path, timeout_s=30)
    assert one[0] == two[0]
    assert "'rank-00000.json'" in one[0]
    assert "'rank-00001.safetensors'" in one[0]
    assert one[1] == "{'rank': 0, 'rng': tensor(0)}"
    assert two[1] == "{'rank': 1, 'rng': tensor(1)}"
    assert one[2].startswith("CheckpointError: ")
    assert "file/step-00000002 could not be written" in one[2]
    assert two[2].startswith("RemoteError: rank 0 on ")
    assert one[3].startswith("RemoteError: rank 1 on ")
    assert "failed in saving a checkpoint" in one[3]
    assert "rank is set" in one[3]
    assert two[3].startswith("CheckpointError: rank is set")
    assert one[4] == two[4]
    assert one[4].startswith("CheckpointError: on all ranks is set")
    assert one[5] == two[5]
    assert one[5].startswith("step-00000005 ")
    assert one[6] == str(["file", "step-00000001", "step-00000005"])


# ----------------------------------------------------------------------------- in a run


class RaiseAfter(dtrain.Callback):
    """Raises once a step is over."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if ctx.progress.step == self.step:
            raise ValueError("planted")


def train_until(step: int, run_dir: Path, every: int, keep: int) -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(20.0).reshape(20, 1))
    model = nn.Linear(1, 1)
    with dtrain.init():
        trainer = dtrain.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            lambda model, batch: model(batch[0]).mean(),
            callbacks=[Checkpoint(every_steps=every, keep=keep), RaiseAfter(step)],
            sinks=[],
            run_dir=run_dir,
        )
        with pytest.raises(ValueError, match="planted"):
            trainer.fit(dataset, batch_size=2, epochs=1)


def test_a_damaged_checkpoint_does_not_push_out_intact_ones(tmp_path: Path) -> None:
    """Older than the damaged one, the new ones must not be what is deleted."""
    folder = tmp_path / "checkpoints"
    train_until(7, tmp_path, every=2, keep=2)
    assert names(folder) == ["step-00000004", "step-00000006"]
    flip(folder / "step-00000006" / "model.safetensors", -1)
    train_until(6, tmp_path, every=1, keep=1)
    assert newest(folder) == 5
