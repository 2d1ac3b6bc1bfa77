"""`dtrain ls`: the runs below a folder, whatever became of them."""

import json

import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import list_runs
from dtrain.cli import app


def fit(folder, epochs=2, **checkpoint):
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    data = TensorDataset(torch.ones(8, 1), torch.ones(8, 1))

    def loss_fn(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    callbacks = [Checkpoint(every_epochs=1, **checkpoint)] if checkpoint else []
    dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.25),
        loss_fn,
        callbacks=callbacks,
        sinks=[],
        run_dir=folder,
    ).fit(data, batch_size=8, epochs=epochs, eval_set=data)


def test_runs_are_listed_with_state_step_best_and_newest(tmp_path):
    fit(tmp_path / "b" / "deep", best="eval/loss", mode="min")
    fit(tmp_path / "a", epochs=1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "status.json").write_text("{")
    (tmp_path / "no run").mkdir()
    a, b, c = list_runs(tmp_path)
    assert (a.folder, a.state, a.step, a.best, a.saved) == (tmp_path / "a", "finished", 1, "", None)
    assert (b.folder, b.state, b.step, b.saved) == (tmp_path / "b" / "deep", "finished", 2, 2)
    # By hand: the gradients of weight and bias are 2 (w + b - 1): a step brings all to 1.
    assert b.best == "eval/loss 0 (step 1)"
    assert (c.state, c.saved) == ("damaged", None)
    assert 0 <= a.age_s < 3600


def test_the_command(tmp_path):
    fit(tmp_path / "one", best="eval/loss", mode="min")
    status = tmp_path / "one" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"status": "running"}))
    result = CliRunner().invoke(app, ["ls", str(tmp_path)])
    assert result.exit_code == 0
    heading, row = result.output.splitlines()
    assert heading.split() == ["run", "state", "step", "best", "saved", "at", "told"]
    assert row.split()[1:7] == ["running", "2", "eval/loss", "0", "(step", "1)"]
    assert CliRunner().invoke(app, ["ls", str(tmp_path / "nowhere")]).exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "no run in" in CliRunner().invoke(app, ["ls", str(tmp_path / "empty")]).output
