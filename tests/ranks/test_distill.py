"""examples/distill.py gives what the loop that it spares gives, which is written out here."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import dtrain
from dtrain.callbacks import EMA, Checkpoint, GradientAccumulation
from dtrain.data import Shuffled
from dtrain.testing import run_processes, run_ranks

DISTILL = Path(__file__).parents[2] / "examples" / "distill.py"
STEPS, BATCH_SIZE, SAMPLES = 12, 22, 50  # neither divides the other


@cache
def loaded():
    spec = importlib.util.spec_from_file_location("distill", DISTILL)
    distill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(distill)
    return distill, Subset(distill.make_data(torch.float64)[0], range(SAMPLES))


def example():
    """Its dropout would be seen at once, if the teacher were in train mode."""
    distill, data = loaded()
    torch.manual_seed(5)
    teacher, student = distill.make_teacher().double(), distill.make_student().double()
    for layer in teacher:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.2)
    return distill, teacher.eval(), student, data


@cache
def by_hand():
    """Plain torch: one process, the whole batch at once."""
    _, teacher, student, data = example()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    order, losses = Shuffled(SAMPLES, seed=7), []
    epoch = place = 0
    for _ in range(STEPS):
        rows = order.indices(epoch, place, min(place + BATCH_SIZE, SAMPLES))
        x, y = map(torch.stack, zip(*(data[int(row)] for row in rows), strict=True))
        logits = student(x)
        with torch.no_grad():
            wanted = F.softmax(teacher(x) / 4, -1)
        apart = wanted * (wanted.log() - F.log_softmax(logits / 4, -1))
        loss = 0.2 * F.cross_entropy(logits, y) + 0.8 * 16 * apart.sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        place += BATCH_SIZE
        if place >= SAMPLES:
            epoch, place = epoch + 1, 0
    return {n: p.detach() for n, p in student.named_parameters()}, losses


class Losses(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_grads_ready(self, ctx, step):
        self.values.append(step.loss_mean)


def habit(name):
    """Returns the model, its loss function, and what is told of it: both ways to hold a teacher."""
    distill, teacher, student, data = example()
    if name == "captured":
        return student, distill.by_teacher(teacher), teacher, student, data
    both = nn.ModuleDict({"student": student, "teacher": teacher.requires_grad_(False)})
    if name == "pretrained":
        both.eval()  # as a whole: what is trained is in train mode, what is frozen is not
    loss_fn = lambda nets, batch: distill.by_teacher(nets["teacher"])(nets["student"], batch)  # noqa: E731
    return both, loss_fn, teacher, student, data


def train(name, strategy, micros):
    dtrain.init(seed=0)
    model, loss_fn, teacher, student, data = habit(name)
    before = [p.clone() for p in teacher.parameters()]
    losses = Losses()
    trainer = dtrain.Trainer(
        model,
        torch.optim.Adam(student.parameters(), lr=1e-2),
        loss_fn,
        callbacks=[GradientAccumulation(micros), losses],
        sinks=[],
        strategy=strategy,
    )
    order = Shuffled(SAMPLES, seed=7)
    trainer.fit(dtrain.Data(data, BATCH_SIZE, order=order), max_steps=STEPS)
    trainer.evaluate(data, batch_size=BATCH_SIZE)
    assert not any(part.training for part in teacher.modules())
    assert all(map(torch.equal, before, teacher.parameters()))
    assert all(p.grad is None for p in teacher.parameters())
    return {n: p.detach().clone() for n, p in student.named_parameters()}, losses.values


CASES = [("captured", "flat", 1), ("part", "ddp", 2), ("pretrained", "flat", 3)]


def train_some():
    return [train(*case) for case in CASES]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_example_is_the_loop_by_hand(world_size):
    expected, expected_losses = by_hand()
    run = run_processes if world_size == 3 else run_ranks
    for found in run(train_some, world_size):
        for case, (params, losses) in zip(CASES, found, strict=True):
            assert losses == pytest.approx(expected_losses, rel=1e-12)
            for name, value in params.items():
                distance = (value - expected[name]).norm() / expected[name].norm()
                assert distance <= 1e-12, f"{case}: {name} is {distance:.1e} away"


def saved(name, folder):
    """Trains with averages; returns what is told of the start."""
    dtrain.init(seed=0)
    model, loss_fn, _, student, data = habit(name)
    words = tiny.Words("start")
    trainer = dtrain.Trainer(
        model,
        torch.optim.Adam(student.parameters(), lr=1e-2),
        loss_fn,
        callbacks=[EMA(0.9), Checkpoint(every_steps=2)],
        sinks=[words],
        run_dir=folder / name,
    )
    trainer.fit(data, batch_size=BATCH_SIZE, max_steps=2)
    return words.words


def test_a_frozen_teacher_is_not_reduced_and_is_saved_at_most_once(tmp_path):
    """It is in the model's own weights where it is a part of the model, and nowhere else."""
    _, teacher, student, _ = example()
    students = {n: len(p.flatten()) for n, p in student.named_parameters()}
    size = sum(students.values())
    for name in ("captured", "part"):
        told = run_ranks(saved, 2, name, tmp_path)[0][0]
        assert f"{size} trainable parameters" in told
        assert f"({(size * 8) / 1e6:.3g} MB;" in told
        (folder,) = (tmp_path / name / "checkpoints").iterdir()
        files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        teachers = [n for n, _ in teacher.named_parameters() if name == "part"]
        prefixes = ("student.", "teacher.") if name == "part" else ("", "")
        wanted = {prefixes[0] + n for n in students} | {prefixes[1] + n for n in teachers}
        assert set(files.pop("model.safetensors")) == wanted
        # Averages, and two moments and a count for each of the student's parameters.
        rest = [tensor for held in files.values() for tensor in held.values()]
        largest = max(len(p.flatten()) for p in teacher.parameters())
        assert all(t.numel() < largest for t in rest if t.is_floating_point())
        assert sum(t.numel() for t in rest if t.dtype == torch.float64) == 3 * size
