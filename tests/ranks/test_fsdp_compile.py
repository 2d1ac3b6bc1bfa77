"""Sharded models that are compiled, or offloaded: the same numbers, names and errors."""

import pytest
import sharding
import torch
from sharding import WIDTH, distance, loss_fn, whole
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import dtrain
from dtrain.callbacks import CheckpointActivations
from dtrain.errors import ConfigError, RemoteError
from dtrain.strategies import FSDP
from dtrain.testing import run_processes

EXACT = 1e-12
graphs = [0]
# Warnings of torch.compile itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),
]


def counted(module, inputs):
    graphs[0] += 1
    return aot_eager(module, inputs)


class Table(sharding.Block):
    """Looks something up, by a place that may be none, in the middle of its forward."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)

    def forward(self, x, place):
        return super().forward(x + self.table(place))


class Net(sharding.Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Table() for _ in range(3))

    def forward(self, x):
        place = (x[:, 0] > 0).long() + 9 * (x[:, 0] == 77).long()
        x = self.first(x)
        for block in self.blocks:
            x = block(x, place)
        return self.head(x)


class Spoils(dtrain.Callback):
    """On one rank, a place in a step is none; in backward, an error of autograd's."""

    def __init__(self, armed, how):
        self.armed, self.how, self.handle = armed, how, None

    def on_batch(self, ctx, step):
        if not self.armed or (step.number, step.micro) != (2, 1):
            return
        self.armed = False
        if self.how == "forward":
            step.batch[0][0, 0] = 77.0
            return

        def fails(grad):
            raise ValueError("planted in backward")

        def hook(module, args, output):
            self.handle.remove()
            output.register_hook(fails)

        self.handle = ctx.model.blocks[1].register_forward_hook(hook)


def train(options, fails=None, callbacks=()):
    rank = dtrain.init(seed=0).rank
    torch.manual_seed(1)
    model = Net().double()
    spoils = Spoils(fails is not None and rank == fails[0], fails and fails[1])
    trainer = sharding.trainer(
        FSDP(**options),
        net=(model, torch.optim.AdamW(model.parameters(), lr=1e-2)),
        callbacks=[spoils, *callbacks],
        micros=2,
    )
    described = trainer._engine.strategy.describe()
    fit = {"batch_size": 5, "epochs": 2, "eval_set": sharding.dataset(9)}
    told = ""
    for _ in range(2):
        try:
            trainer.fit(sharding.dataset(21), **fit)  # a rank is without in some
            break
        except (IndexError, RuntimeError, ValueError, RemoteError) as error:
            told = f"{type(error).__name__}: {error}"
    return whole(model), [*model.state_dict()], told, described


def train_all(backend):
    dtrain.init(seed=0)
    compiled = {"compile": True if backend == "inductor" else {"backend": counted}}
    fails = [(0, "forward"), (1, "backward")]
    plain = train({})
    found = [train(compiled), train(compiled, callbacks=[CheckpointActivations()])]
    offloaded = train({"offload": True})
    assert all(torch.equal(t, plain[0][n]) for n, t in offloaded[0].items())
    assert offloaded[3].endswith("; offloaded to the host, where they are anyway (fsdp)")
    found += [train(compiled, one) for one in (fails if backend == "aot_eager" else ())]
    return plain, found, fails, graphs[0], dtrain.init().rank


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_change_no_number_and_no_name(backend):
    for plain, found, fails, compiled, rank in run_processes(train_all, 2, backend, timeout_s=110):
        for number, (weights, names, told, described) in enumerate(found):
            assert distance(weights, plain[0]) <= EXACT, (number, told)
            assert names == plain[1]
            assert "3 x Table (blocks.0 ... blocks.2), and the rest; blocks compiled" in described
        assert compiled > 0 or backend == "inductor"
        for (who, how), (_, _, told, _) in zip(fails, found[2:], strict=backend == "aot_eager"):
            assert told.startswith("RemoteError") is (who != rank), told
            assert ("index out of range" if how == "forward" else "planted in backward") in told


def no_blocks():
    dtrain.init(seed=0)
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        dtrain.Trainer(model, optimizer, loss_fn, strategy=FSDP(compile=True), sinks=[])
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_what_cannot_be_compiled_or_offloaded_is_refused():
    with pytest.raises(ConfigError, match=r"FSDP\(offload='cpu'\): True or False"):
        FSDP(offload="cpu")
    assert "no repeated ones were found" in run_processes(no_blocks, 1)[0]
    with pytest.raises(ConfigError, match=r"FSDP\(compile='max-autotune'\): True, or a dict"):
        FSDP(compile="max-autotune")
