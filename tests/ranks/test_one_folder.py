"""A run_dir that is not one folder for all ranks is found at the start, and nothing is trained."""

import os
import re
from pathlib import Path

import pytest
import tiny

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import one_folder
from dtrain.errors import RankMismatch
from dtrain.testing import run_processes, run_ranks


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(one_folder, "PATIENCE_S", 0.3)


def fit(run_dir):
    run = tiny.trainer([Checkpoint(every_steps=2)], run_dir=run_dir)
    try:
        return run.fit(tiny.dataset(), batch_size=24, max_steps=2).steps
    except RankMismatch as error:
        return str(error), run.context.progress.step


def each_has(run_dirs):
    return fit(run_dirs[dtrain.init(seed=0).rank])


def test_other_paths(tmp_path):
    places = [tmp_path / str(rank) / "run" for rank in (0, 1, 0)]
    found = run_ranks(each_has, 3, places)
    assert found == [found[0]] * 3
    words, steps = found[0]
    assert steps == 0
    assert words.startswith("rank 1 does not see the run_dir in which rank 0 writes")
    assert 'dtrain.on_main("run_dir"' in words
    assert re.search(rf"\n  rank 0 on \S+: {places[0]}\n  rank 1 on \S+: {places[1]}  \(", words)
    assert sorted(os.listdir(places[0])) == [".writer", ".writer.lock"]
    assert not places[1].exists()


def test_another_path_to_the_same_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert run_ranks(each_has, 2, [tmp_path / "run", tmp_path / "link" / "run"]) == [2, 2]
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".seen")]


def some_have_one(run_dirs):
    run = tiny.trainer(run_dir=run_dirs[dtrain.init(seed=0).rank])
    with pytest.raises(RankMismatch) as caught:
        run.fit(tiny.dataset(), batch_size=24, max_steps=2)
    return str(caught.value), run.context.progress.step


def test_only_some_have_one(tmp_path):
    found = run_ranks(some_have_one, 3, [None, tmp_path / "run", None])
    assert found == [found[0]] * 3
    words, steps = found[0]
    assert words.startswith("the ranks called fit with different arguments")
    told = [f"  rank {rank}: run_dir: {rank == 1}" for rank in range(3)]
    assert (words.splitlines()[1:], steps) == (told, 0)


def test_what_shows_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(one_folder, "PATIENCE_S", 20.0)
    exists, asked = Path.exists, []

    def late(path, **how):
        if path.name.startswith(".seen-"):
            asked.append(path)
            return len(asked) > 2 and exists(path)
        return exists(path, **how)

    monkeypatch.setattr(Path, "exists", late)
    assert run_ranks(each_has, 2, [tmp_path / "run"] * 2) == [2, 2]
    assert len(asked) == 3


def in_another_folder(folders):
    world = dtrain.init(seed=0)
    one_folder.PATIENCE_S = 0.3
    os.chdir(folders[world.rank])
    return fit("run")


def test_a_relative_run_dir_and_other_working_directories(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    found = run_processes(in_another_folder, 2, folders, timeout_s=60)
    assert found[0] == found[1]
    assert "A relative run_dir is of the working directory, which is another" in found[0][0]
    assert f": {folders[1]}/run  (another)" in found[0][0]


def with_a_folder_of_its_own(run_dir):
    """As on a host that has a local disk at the same path: rank 1 looks elsewhere."""
    world = dtrain.init(seed=0)
    one_folder.PATIENCE_S = 0.3
    if world.rank == 1:
        one_folder._appears = lambda file: False
    return fit(run_dir)


def test_the_same_path_on_another_disk(tmp_path):
    found = run_processes(with_a_folder_of_its_own, 2, tmp_path / "run", timeout_s=60)
    assert found[0] == found[1]
    assert "The path is the same, so each of these hosts has a folder of its own" in found[0][0]
