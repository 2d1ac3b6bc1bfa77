"""Makes dtrain take, on the CPU, the ways that it takes on CUDA; and notices a host sync."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtrain import accelerator

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

    def graphs(self):
        return Graphs(self.counts)


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
    """Has dtrain take the device's ways; returns what counts how it does."""
    return StandIn().install(monkeypatch)


class NoReads(TorchDispatchMode):
    """Raises, or counts, where a tensor's value is asked for."""

    def __init__(self, counted=None):
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in _READS:
            if self._counted is None:
                raise RuntimeError(f"would wait for a GPU: {func}")
            self._counted.append(str(func))
        return func(*args, **(kwargs or {}))


class Graphs:
    """Captures as CUDA does: nothing is computed then, and each replay writes where it was told.

    What the graphs after it had written is lost in a replay, as in memory that they share.
    """

    def __init__(self, counts):
        self._counts = counts

    def beside(self):
        return nullcontext()

    @contextmanager
    def noticing_waits(self):
        found = []
        with NoReads(found):
            yield found

    def capture(self, *computations):
        self._counts["captures"] += 1
        drawn, undone = torch.get_rng_state(), _Undone()
        with undone:
            graphs = [_Graph(compute, compute()) for compute in computations]
        torch.set_rng_state(drawn)
        undone.undo()
        for place, graph in enumerate(graphs):
            graph.counts, graph.after = self._counts, graphs[place + 1 :]
        return graphs


class _Graph:
    def __init__(self, compute, outputs):
        self._compute, self.outputs = compute, outputs

    def replay(self):
        self.counts["replays"] += 1
        for graph in self.after:
            graph.forget()
        with torch.enable_grad():
            outputs = self._compute()
        for kept, new in zip(self.outputs, outputs, strict=True):
            if kept is not None:
                kept.data.copy_(new)

    def forget(self):
        for kept in self.outputs:
            if kept is not None:
                kept.data.fill_(float("nan"))


class _Undone(TorchDispatchMode):
    """Keeps what operations were given, and gives it back the numbers that it had."""

    def __init__(self):
        super().__init__()
        self._before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor) and id(one) not in self._before:
                self._before[id(one)] = one, one.detach().clone()
        return func(*args, **(kwargs or {}))

    def undo(self):
        for tensor, before in self._before.values():
            if not torch.equal(tensor, before):
                tensor.data.copy_(before)
