"""Makes dtrain take, on the CPU, the ways that it takes on CUDA; and notices a host sync."""

from collections import Counter
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dtrain.trainer
from dtrain import accelerator
from dtrain.callbacks import clip_gradients
from dtrain.metrics.means import Means
from dtrain.step.lane import Lane
from dtrain.step.taking import takes_a_veto

#: What copies a number from the device to the host, or a size that hangs on numbers.
_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class StandIn(accelerator.Accelerator):
    """The CPU as an accelerator: all is done at once, in the host's memory, and counted."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.counts = Counter()
        self.card = []  # tensors that are taken to lie on the device
        self.all_pinned = False

    def install(self, monkeypatch):
        def of(device):
            return self if device.type == "cpu" else None

        monkeypatch.setattr(accelerator, "of", of)
        return self

    def pinned(self, count, dtype):
        self.counts["pinned"] += 1
        return torch.zeros(count, dtype=dtype)

    def is_pinned(self, tensor):
        return self.all_pinned

    def holds(self, tensor):
        return any(tensor.data_ptr() == one.data_ptr() for one in self.card)

    def copied(self, tensor):
        self.counts["copies"] += 1
        return tensor.clone()

    def event(self, **options):
        self.counts["events"] += 1
        return _Event(self.counts)

    def on_another_stream(self):
        return nullcontext()

    def wait_for(self, event):
        assert event.recorded
        self.counts["waits"] += 1

    def lend(self, tensor):
        self.counts["lent"] += 1

    def captured(self, compute):
        def launch():
            self.counts["launches"] += 1
            compute()

        return launch


class _Event:
    """What was recorded has happened."""

    def __init__(self, counts):
        self._counts, self.recorded = counts, 0

    def record(self):
        self._counts["records"] += 1
        self.recorded = self._counts["records"]

    def query(self):
        return True

    def synchronize(self):
        self._counts["synchronized"] += 1

    def elapsed_time(self, end):
        return float(end.recorded - self.recorded)  # so many records later, in milliseconds


def pretend(monkeypatch):
    """Steps are not waited for, and neither the lane nor metrics are read where they are made."""
    made, message, means = Lane.__init__, Lane.message, Means.__init__

    def make_lane(lane, *args, **options):
        made(lane, *args, **options)
        lane._on_device = lane.param.new_zeros(4)

    def copy_message(lane):
        kept, lane._message = lane._message, lane._message.clone()  # as the way to a GPU would
        try:
            return message(lane)
        finally:
            lane._message = kept

    def make_means(self, *args, **options):
        means(self, *args, **options)
        self._on_cpu = False

    def may_delay(device, optimizer, data):
        return takes_a_veto(optimizer) and not data.is_stream

    really_clip = clip_gradients._clip

    def clip(*args):
        # It reads the norm, but on the CPU only (tests/unit/test_device_path.py).
        NoReads.paused = True
        try:
            really_clip(*args)
        finally:
            NoReads.paused = False

    monkeypatch.setattr(clip_gradients, "_clip", clip)
    monkeypatch.setattr(Lane, "__init__", make_lane)
    monkeypatch.setattr(Lane, "message", copy_message)
    monkeypatch.setattr(Means, "__init__", make_means)
    monkeypatch.setattr(dtrain.trainer, "may_delay", may_delay)


class NoReads(TorchDispatchMode):
    """Raises, or counts, where a tensor's value is asked for."""

    paused = False

    def __init__(self, counted=None):
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and func._schema.name.removeprefix("aten::") in _READS:
            if self._counted is None:
                raise RuntimeError(f"would wait for a GPU: {func}")
            self._counted.append(str(func))
        return func(*args, **(kwargs or {}))
