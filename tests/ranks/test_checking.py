"""Whether a checkpoint is intact: all ranks look, each at its share, and all know the same."""

import json

import sharding
from sharding import strategy_of

import dtrain
from dtrain.checkpoint import checking, disk
from dtrain.testing import run_processes


def write(run_dir):
    dtrain.init(seed=0)
    disk.PIECE_BYTES = 700  # so that files have several
    callbacks = [dtrain.callbacks.Checkpoint(every_epochs=1, keep=9)]
    trainer = sharding.trainer(strategy_of("fsdp"), run_dir=run_dir, callbacks=callbacks)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=3)


def look(folder):
    world = dtrain.init(seed=0)
    read, real = [], disk.digest_piece

    def counted(file, at, size):
        read.append((str(file), at, size))
        return real(file, at, size)

    disk.digest_piece = counted
    saved, damage = checking.find_together(folder, world)
    disk.digest_piece = real
    return saved, damage, read


def files_of(path):
    return json.loads((path / "manifest.json").read_text())["files"]


def test_each_byte_is_checked_once_and_damage_is_known_to_all(tmp_path):
    run_processes(write, 2, tmp_path)
    folder = tmp_path / "checkpoints"
    first, second, third = sorted(folder.iterdir())
    ranks = run_processes(look, 3, folder)
    assert [saved.path for saved, _, _ in ranks] == [third] * 3
    pieces = [piece for _, _, read in ranks for piece in read]
    assert len(pieces) == len({*pieces})
    expected = sum(facts["bytes"] for facts in files_of(third).values())
    assert sum(size for _, _, size in pieces) == expected
    assert all(sum(size for _, _, size in read) > expected / 6 for _, _, read in ranks)

    state = third / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-3] ^= 1  # in its last piece
    state.write_bytes(content)
    shorter = second / "model.safetensors"
    shorter.write_bytes(shorter.read_bytes()[:-1])
    for saved, damage, _ in run_processes(look, 3, folder):
        assert saved.path == first
        assert damage[0] == f"{state} was changed since it was written (its sha256 differs)"
        size = files_of(second)["model.safetensors"]["bytes"]
        assert damage[1] == f"{shorter} has {size - 1} bytes, not the {size} written"
    for path in (first, third):
        (path / "manifest.json").unlink()
    for saved, damage, _ in run_processes(look, 2, folder):
        assert saved is None
        for path, told in zip((third, second, first), damage, strict=True):
            missing = f"{path / 'manifest.json'} is missing: the checkpoint is not complete"
            assert told == missing or path == second
