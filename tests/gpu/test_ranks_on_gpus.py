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


def test_two_ranks_are_one(device, tmp_path):
    """Over NCCL where there are two GPUs, else over gloo on one: it says which."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    backend = "nccl" if gpus > 1 else "gloo"
    what = "NCCL, a GPU each" if gpus > 1 else f"gloo, both on one {device.type}"
    print(f"\ntwo ranks over {what}" + ("" if gpus > 1 else "; NCCL between ranks is NOT covered"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [*command, str(HERE / "two_ranks.py"), str(tmp_path), backend, device.type],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=240,
        check=True,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
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
