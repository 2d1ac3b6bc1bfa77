"""The lane, on the device: in DDP's buckets over NCCL, and between two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training
import two_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain import accelerator
from dtrain.step.device_lane import DeviceLane
from dtrain.step.lane import Slot

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class SaysIt(DeviceLane):
    """As one of several ranks."""

    def is_alone(self):
        return False


class Spoken(nn.Module):
    """As dtrain's: the lane is attached before the model's forward."""

    def __init__(self, model, lane):
        super().__init__()
        self.model, self.lane_param, self.lane = model, lane.param, lane

    def forward(self, x, y):
        voice = self.lane.attach()
        return voice, self.lane.add(F.cross_entropy(self.model(x), y), len(y), len(y))


def test_the_lane_comes_back_with_the_last_bucket(device):
    """One rank, but a real group: NCCL's, where there is a GPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, plain = training.model().to(device), training.model().to(device)
        lane = SaysIt(model, 0, 1, accelerator=accelerator.of(device))
        lane.expect(32)
        ddp = DistributedDataParallel(
            Spoken(model, lane), gradient_as_bucket_view=True, bucket_cap_mb=0.1
        )
        rows = [tensor.to(device) for tensor in training.dataset(96).tensors]
        for number, size in enumerate((32, 32, 8)):  # the last is ragged
            x, y = (tensor[number * 32 : number * 32 + size] for tensor in rows)
            model.zero_grad()
            plain.zero_grad()
            lane.open()
            lane.say(Slot.STOP, number)
            lane.backward(*ddp(x, y))
            heard = lane.listen()
            factor, veto = heard.factor(), heard.veto()
            verdict = heard.verdict()
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            assert verdict.loss_mean == pytest.approx(loss.item(), rel=1e-6)
            assert (verdict.weight, verdict.samples, verdict.stop) == (size, size, number)
            assert (veto.item(), verdict.errors, verdict.nonfinite) == (0, 0, 0)
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours.grad * factor, theirs.grad)
                torch.testing.assert_close(ours.grad / heard.divisor(), theirs.grad)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """What each rank found, by how many there were; all are started at once."""
    device = request.config.getoption("--device")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    paths = [str(ROOT), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = {}
    for size in (2, 3):
        backend = "nccl" if gpus >= size else "gloo"
        where = "NCCL, a GPU each" if gpus >= size else f"gloo, all on one {device}"
        told = "" if gpus >= size else "; NCCL between ranks is NOT covered"
        print(f"\n{size} ranks over {where}{told}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={size}", str(HERE / "two_ranks.py")]
        out = tmp_path_factory.mktemp(f"ranks-{size}")
        launch = subprocess.Popen([*command, str(out), backend, device], env=env)
        started[size] = launch, out
    try:
        for launch, _ in started.values():
            assert launch.wait(timeout=240) == 0
    finally:
        for launch, _ in started.values():
            launch.kill()  # none is left where another failed
    return {
        size: [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]
        for size, (_, out) in started.items()
    }


def test_one_is_many_to_the_last_bits(device, ranks):
    """Law 1 on a card: each tensor within 1e-12 of its norm, and each loss."""
    one = two_ranks.exact_cases(dtrain.init(seed=0))
    assert len(one) == 4
    for size, everyones in ranks.items():
        for name, alone in one.items():
            mine = everyones[0][name]
            assert all(theirs[name]["weights"] == mine["weights"] for theirs in everyones), name
            assert mine["losses"] == pytest.approx(alone["losses"], rel=1e-12), name
            off = 0.0
            for ours, plain in zip(mine["weights"], alone["weights"], strict=True):
                ours, plain = (torch.tensor(t, dtype=torch.float64) for t in (ours, plain))
                off = max(off, float((ours - plain).norm() / plain.norm()))
            print(f"{size} ranks, {name}: {off:.1e} of a tensor's norm")
            assert off < 1e-12, name


def test_two_ranks_are_one(device, ranks):
    """Over NCCL where there are two GPUs, else over gloo on one."""
    first, second = ranks[2]
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    backend = "nccl" if gpus > 1 else "gloo"
    one = two_ranks.all_cases(dtrain.init(seed=0))
    for name, alone in one.items():
        mine, theirs = first[name], second[name]
        assert mine["backend"] == theirs["backend"] == backend
        assert mine["weights"] == theirs["weights"], name  # ranks have the same bits
        if "votes" in name:
            assert mine["steps"] == theirs["steps"] == alone["steps"] == 10, name
            assert mine["stop"].startswith("enough")
            assert mine["counts"][2] == alone["counts"][2] - 16, name  # what rank 0 left out
            continue
        assert mine["counts"] == theirs["counts"] == alone["counts"], name
        if "error" in name:
            assert "planted" in mine["error"], name
            assert "planted" in theirs["error"], name
            assert mine["counts"][:2] == [3, 3], name
            continue
        rough = 2e-2 if "16" in name else 1e-4
        assert mine["losses"] == pytest.approx(alone["losses"], rel=rough), name
        ours, plain = torch.tensor(mine["weights"]), torch.tensor(alone["weights"])
        off = float((ours - plain).norm() / plain.norm())
        print(f"{name}: two ranks' weights differ from one's by {off:.1e} of their norm")
        assert off < rough, name
