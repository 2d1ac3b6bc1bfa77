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

    def of(self, device):
        return self if device.type == "cpu" else None

    def install(self, monkeypatch):
        monkeypatch.setattr(accelerator, "of", self.of)
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
        def launch(*args):
            self.counts["launches"] += 1
            compute(*args)

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
    """Captures as CUDA does: operators are recorded, and of what they compute nothing is left.

    A replay runs the same operators on the same memory; what the host was is frozen. And what the
    graphs captured after it had written is lost, as in memory that they share.
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
        drawn, graphs, before = torch.get_rng_state(), [], {}
        for compute in computations:
            with _Recorded(before) as recorded:
                graphs.append(_Graph(self._counts, recorded.operators, compute()))
        torch.set_rng_state(drawn)
        for tensor, values in before.values():
            if not torch.equal(tensor, values):
                tensor.data.copy_(values)
        for place, graph in enumerate(graphs):
            graph.after = graphs[place + 1 :]
        return graphs


class _Graph:
    def __init__(self, counts, operators, outputs):
        self._counts, self._operators, self.outputs = counts, operators, outputs

    @torch.no_grad()
    def replay(self):
        self._counts["replays"] += 1
        for lost in [one for graph in self.after for one in graph.outputs if one is not None]:
            lost.data.fill_(float("nan"))
        for func, args, kwargs, written in self._operators:
            made = func(*args, **kwargs)
            for one, new in zip(written, _leaves(made), strict=True):
                if isinstance(one, torch.Tensor) and one is not new:
                    one.data.copy_(new)


class _Recorded(TorchDispatchMode):
    """Records operators, but for views, and what the tensors they were given had held before."""

    def __init__(self, before):
        super().__init__()
        self._before, self.operators = before, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, torch.Tensor) and id(one) not in self._before:
                self._before[id(one)] = one, one.detach().clone()
        made = func(*args, **kwargs)
        if not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):
            self.operators.append((func, args, kwargs, _leaves(made)))
        return made


def _leaves(made):
    return [made] if isinstance(made, torch.Tensor) else tree_leaves(made)
