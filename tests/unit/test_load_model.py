"""Weights alone come back bit for bit, or it is said what does not fit."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from saved import save
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import writer as writing
from dtrain.cli import app
from dtrain.errors import CheckpointError


def net(seed: int = 1, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {
        name: (t.dtype, t.flatten().view(torch.uint8).tolist())
        for name, t in model.state_dict().items()
    }


def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).square().mean()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    """A finished run with checkpoints of steps 2 and 4, and its weights."""
    model = net()
    with dtrain.init():
        trainer = dtrain.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn,
            callbacks=[Checkpoint(every_steps=2)],
            sinks=[],
            run_dir=tmp_path / "run",
        )
        trainer.fit(TensorDataset(torch.randn(16, 3)), batch_size=4, epochs=1)
    return tmp_path / "run", bits(model)


@pytest.mark.parametrize(
    "within",
    ["", "checkpoints", "checkpoints/step-00000004", "checkpoints/step-00000004/model.safetensors"],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_weights_of_a_run(run, within, kind):
    run_dir, trained = run
    model = net(seed=2)
    assert bits(model) != trained
    file = dtrain.load_model(kind(run_dir / within), model)
    assert file == run_dir / "checkpoints" / "step-00000004" / "model.safetensors"
    assert bits(model) == trained


def test_an_older_checkpoint(run):
    run_dir, trained = run
    model = net(seed=2)
    dtrain.load_model(run_dir / "checkpoints" / "step-00000002", model)
    assert model[1].num_batches_tracked.item() == 2
    assert bits(model) != trained


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damage_is_told_and_left_out(run):
    run_dir, _ = run
    newest = run_dir / "checkpoints" / "step-00000004"
    damage(newest / "model.safetensors")
    model = net(seed=2)
    with pytest.warns(UserWarning, match=r"newer is damaged:\n.*4/model\.safetensors was changed"):
        dtrain.load_model(run_dir, model)
    assert model[1].num_batches_tracked.item() == 2
    before = bits(model)
    for path in (newest, newest / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"4/model\.safetensors was changed since"):
            dtrain.load_model(path, model)
    damage(run_dir / "checkpoints" / "step-00000002" / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        dtrain.load_model(run_dir, model)
    assert f"no intact checkpoint is in {run_dir}/checkpoints\n" in str(raised.value)
    assert str(raised.value).count("was changed since it was written") == 2
    assert bits(model) == before


def test_a_plain_file(tmp_path):
    save_file(net().state_dict(), tmp_path / "a.safetensors")
    model = net(seed=2)
    assert dtrain.load_model(tmp_path / "a.safetensors", model) == tmp_path / "a.safetensors"
    assert bits(model) == bits(net())


def test_values_take_the_models_dtype_and_memory_format(tmp_path):
    conv = nn.Conv2d(3, 4, 2)
    save_file(conv.state_dict(), tmp_path / "a.safetensors")
    model = nn.Conv2d(3, 4, 2).bfloat16().to(memory_format=torch.channels_last)
    dtrain.load_model(tmp_path / "a.safetensors", model)
    assert torch.equal(model.weight, conv.weight.bfloat16())
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


def test_tied_weights_that_were_saved_once(tmp_path):
    saved, model = Tied(), Tied()
    save_model(saved, str(tmp_path / "a.safetensors"))
    dtrain.load_model(tmp_path / "a.safetensors", model)
    assert bits(model) == bits(saved)
    assert model.one.weight is model.two.weight


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    there = dict(net().state_dict())
    there["extra.weight"] = torch.zeros(2)
    del there["0.bias"]
    there["2.weight"] = torch.zeros(1, 5)
    there["1.num_batches_tracked"] = torch.tensor(1.5)
    file = tmp_path / "a.safetensors"
    save_file(there, file)
    model = net(seed=2)
    before = bits(model)
    with pytest.raises(CheckpointError) as raised:
        dtrain.load_model(file, model)
    assert str(raised.value) == (
        f"{file} does not fit the model (6 of the model's 9 tensors do; nothing was loaded):\n"
        "  missing in the file: 0.bias\n"
        "  unexpected, for the model has none of that name: extra.weight\n"
        "  of another shape or kind: 1.num_batches_tracked is [] of float32 there, [] of int64 in "
        "the model, 2.weight is [1, 5] of float32 there, [1, 4] of float32 in the model\n"
        "What to do: make the model as it was when it was saved, or pass strict=False to load only "
        "what fits."
    )
    assert bits(model) == before
    dtrain.load_model(file, model, strict=False)
    misfits = {"0.bias", "2.weight", "1.num_batches_tracked"}
    wanted = {k: before[k] if k in misfits else v for k, v in bits(net()).items()}
    assert bits(model) == wanted


def test_where_nothing_fits_strict_or_not(tmp_path):
    file = tmp_path / "a.safetensors"
    for strict, count in ((True, 12), (False, 12), (True, 10)):
        save_file({f"module.{i}": torch.zeros(1) for i in range(count)}, file)
        with pytest.raises(CheckpointError) as raised:
            dtrain.load_model(file, net(), strict=strict)
        assert "(0 of the model's 9 tensors do; nothing was loaded)" in str(raised.value)
        assert (", and 2 more\n" in str(raised.value)) == (count == 12)
        assert "and 0 more" not in str(raised.value)
        assert str(raised.value).endswith("make the model as it was when it was saved.")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.pt", "a.pt is no .safetensors file. Other files of weights hold pickles"),
        ("a.safetensors", "a.safetensors cannot be read: "),
    ],
)
def test_a_pickle_is_refused_and_never_executed(tmp_path, name, words):
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "marker")}))
    with pytest.raises(CheckpointError) as raised:
        dtrain.load_model(tmp_path / name, net())
    assert words in str(raised.value)
    assert not (tmp_path / "marker").exists()


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist: pass a run's folder"):
        dtrain.load_model(tmp_path / "none", net())
    with pytest.raises(CheckpointError, match=r"^no intact checkpoint is in "):
        dtrain.load_model(tmp_path, net())


# ----------------------------------------------------------------------------- one plain file


def test_a_run_is_exported_as_one_plain_file(
    run: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, trained = run
    # In parts, as a large model's is.
    model = net(seed=5)
    dtrain.load_model(run_dir, model)
    monkeypatch.setattr(writing, "LARGEST_BYTES", 60)
    folder = save(run_dir / "checkpoints", 6, model=model.state_dict())
    assert len(list(folder.glob("model-*"))) == 3
    file = run_dir.parent / "plain.safetensors"
    assert dtrain.export_model(run_dir, file) == len(trained)
    plain = net(seed=6)
    plain.load_state_dict(load_file(file))
    assert bits(plain) == trained


def test_the_export_command(run: tuple[Path, dict[str, object]]) -> None:
    run_dir, trained = run
    file = run_dir.parent / "plain.safetensors"
    done = CliRunner().invoke(app, ["export", str(run_dir), str(file)])
    assert (done.exit_code, done.output) == (0, f"{file}: {len(trained)} tensors\n")
    assert set(load_file(file)) == set(trained)
    done = CliRunner().invoke(app, ["export", str(run_dir / "none"), str(file)])
    assert done.exit_code == 2
    assert f"dtrain export: {run_dir}/none does not exist" in done.output
    done = CliRunner().invoke(app, ["export", str(run_dir), str(run_dir / "none" / "a")])
    assert done.exit_code == 2
    assert f"{run_dir}/none/a could not be written: " in done.output
