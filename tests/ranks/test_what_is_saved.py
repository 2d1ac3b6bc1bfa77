"""What goes into a checkpoint: other modules, or only what was trained."""

import pytest
import tiny
import torch
from torch import nn

import dtrain
from dtrain.callbacks import Checkpoint, Freeze, MixedPrecision
from dtrain.checkpoint import format as files
from dtrain.errors import CheckpointError
from dtrain.testing import run_ranks, try_ranks

STEPS = 24  # of 6 an epoch


class Adapted(nn.Module):
    """A frozen base, a layer that is frozen for some epochs, a head, and running statistics."""

    def __init__(self, base=3):
        super().__init__()
        torch.manual_seed(base)
        self.base = nn.Linear(8, 16).requires_grad_(False)
        torch.manual_seed(4)
        self.norm = nn.BatchNorm1d(16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.norm(self.base(x)))))


class Thaws(dtrain.Callback):
    """Lets a layer train in one epoch only."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_start(self, ctx):
        ctx.model.middle.requires_grad_(ctx.progress.epoch == self.epoch)


class Dies(dtrain.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.step:
            raise RuntimeError("planted")


def adapt(run_dir, dies_at=0, *, base=3, trainable_only=True, frozen=True):
    model = Adapted(base)
    model.middle.requires_grad_(not frozen)
    saves = Checkpoint(every_steps=3, trainable_only=trainable_only, background=False)
    trainer = tiny.trainer(
        [saves, Thaws(1), Dies(dies_at)],
        net=model,
        optimizer=lambda net: torch.optim.AdamW(
            [*net.middle.parameters(), *net.norm.parameters(), *net.head.parameters()], lr=1e-2
        ),
        run_dir=run_dir,
    )
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=STEPS)
    return tiny.digest(model)


def saved_names(run_dir):
    saved, _ = files.find(run_dir / "checkpoints")
    return saved.step, {name.partition(".")[0] for name in files.load_model(saved.path)}


def test_only_what_was_trained_is_saved_and_nothing_of_it_is_lost(tmp_path):
    whole = run_ranks(adapt, 2, tmp_path / "whole")
    assert saved_names(tmp_path / "whole") == (STEPS, {"norm", "middle", "head"})
    run_dir, held = tmp_path / "run", []
    # Before the layer is thawed, while it trains, and after it is frozen again.
    for dies_at in (4, 10, 16, 22):
        outcomes = try_ranks(adapt, 2, run_dir, dies_at)
        assert all("planted" in str(outcome.error) for outcome in outcomes)
        held.append(saved_names(run_dir))
    every = {"norm", "middle", "head"}
    assert held == [(3, {"norm", "head"}), (9, every), (15, every), (21, every)]
    assert run_ranks(adapt, 2, run_dir) == whole


class Tied(nn.Module):
    """A base that does not train, with one weight under two names."""

    def __init__(self):
        super().__init__()
        self.base, self.again, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.again.weight = self.base.weight
        for p in (*self.base.parameters(), *self.again.parameters()):
            p.requires_grad_(False)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.base(x))))


def test_what_is_tied_is_left_out_under_each_of_its_names(tmp_path):
    trainer = tiny.trainer(
        [Checkpoint(trainable_only=True)],
        net=Tied(),
        optimizer=lambda net: torch.optim.SGD(net.head.parameters(), 0.1),
        run_dir=tmp_path,
    )
    trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
    assert saved_names(tmp_path)[1] == {"head"}


def refusals(run_dir):
    """What a start says that is not like the one before."""
    found = []
    for again in ({"base": 5}, {"frozen": False}, {"trainable_only": False}):
        try:
            adapt(run_dir, **again)
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_another_base_is_refused(tmp_path):
    outcomes = try_ranks(adapt, 1, tmp_path, 4)
    assert "planted" in str(outcomes[0].error)
    [(base, thawed, whole)] = run_ranks(refusals, 1, tmp_path)
    assert "weights that it left out are not what they were then: base.weight, base.bias. " in base
    assert "Load the same base model before fit, and freeze the same weights" in base
    assert "not what they were then: middle.weight, middle.bias. Load the same" in thawed
    assert "lacks 4 of the model's tensors, such as base.weight: it was made with " in whole
    assert "Checkpoint(trainable_only=True). Pass that again, and load the base model" in whole


def freeze(run_dir):
    saves = Checkpoint(every_epochs=1, trainable_only=True)
    trainer = tiny.trainer([saves, Freeze("0", until_epoch=2)], run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, epochs=1)


def test_what_is_frozen_for_some_epochs_only_is_saved_from_the_start(tmp_path):
    run_ranks(freeze, 2, tmp_path)
    assert saved_names(tmp_path) == (6, {"0", "2"})


# ----------------------------------------------------------------------------- other modules


class Follows(dtrain.Callback):
    """Moves a teacher towards the model after each step, as a target network does."""

    def __init__(self, teacher):
        self.teacher = teacher

    def on_step_end(self, ctx, step):
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), ctx.model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)


def distil(run_dir, dies_at=0, names=("teacher",)):
    teacher = tiny.model().requires_grad_(False)

    def loss(net, batch):
        gap = (net(batch[0]) - teacher(batch[0])).square().mean()
        return tiny.loss_fn(net, batch).mean + gap

    trainer = tiny.trainer(
        [
            Checkpoint(every_steps=3, modules=dict.fromkeys(names, teacher), background=False),
            Follows(teacher),
            Dies(dies_at),
        ],
        loss=loss,
        run_dir=run_dir,
    )
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=STEPS)
    return tiny.digest(trainer.model), tiny.digest(teacher)


def test_other_modules_are_saved_and_restored(tmp_path):
    whole = run_ranks(distil, 2, tmp_path / "whole")
    assert whole[0] == whole[1]
    run_dir = tmp_path / "run"
    for dies_at in (7, 13):
        outcomes = try_ranks(distil, 2, run_dir, dies_at)
        assert all("planted" in str(outcome.error) for outcome in outcomes)
    outcomes = try_ranks(distil, 2, run_dir, 0, ("teacher", "critic"))
    for outcome in outcomes:
        assert "Checkpoint(modules=...): the checkpoint has no critic; it has teacher" in str(
            outcome.error
        )
    assert run_ranks(distil, 2, run_dir) == whole


class Drifts(dtrain.Callback):
    """Changes a frozen weight by other means than a step."""

    def on_step_end(self, ctx, step):
        if ctx.progress.step == 8:
            ctx.model.base.bias.data.add_(1.0)


def drift(run_dir):
    saves = Checkpoint(every_steps=6, trainable_only=True, keep=None)
    trainer = tiny.trainer([saves, Drifts()], net=Adapted(), run_dir=run_dir)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=12)


def test_a_frozen_weight_that_was_changed_by_hand_is_saved(tmp_path):
    run_ranks(drift, 1, tmp_path)
    first, second = (
        set(files.load_model(one.path)) for one in files.listed(tmp_path / "checkpoints")
    )
    assert second - first == {"base.bias"}


# ------------------------------------------------------------------------------ the loss's weight


class Leaves(dtrain.Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            ctx.request.preempt("as planned")


def weighed(net, batch, ctx):
    return dtrain.Loss(tiny.loss_fn(net, batch).mean, weight=3.0 * ctx.progress.step + 1)


def in_fp16(run_dir, leaves_at):
    dtrain.init(seed=0)
    x, y = tiny.dataset(48).tensors
    trainer = tiny.trainer(
        [MixedPrecision("fp16", init_scale=256.0), Checkpoint(), Leaves(leaves_at)],
        net=tiny.model(dtype=torch.float32),
        loss=weighed,
        run_dir=run_dir,
    )
    trainer.fit(torch.utils.data.TensorDataset(x.float(), y), batch_size=8, epochs=1)
    return tiny.digest(trainer.model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_losses_weigh_is_known_again_after_a_resume(tmp_path, world_size):
    """In fp16 gradients are rounded by it, so another would cost bits."""
    whole = run_ranks(in_fp16, world_size, tmp_path / "whole", -1)
    run_ranks(in_fp16, world_size, tmp_path / "parts", 3)
    assert run_ranks(in_fp16, world_size, tmp_path / "parts", -1) == whole
