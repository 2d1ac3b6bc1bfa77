"""Blocks that are computed again in backward: the same numbers, whatever one rank does."""

import copy

import pytest
import sharding
import torch
from sharding import WIDTH, strategy_of, whole
from torch import nn

import dtrain
from dtrain.callbacks import Checkpoint, CheckpointActivations
from dtrain.errors import RemoteError
from dtrain.testing import RanksFailed, run_processes, run_ranks

STRATEGIES = ("flat", "ddp", "fsdp")


class Block(sharding.Block):
    """Drops out at random, takes keywords of checkpoint's own names, counts its calls, may fail."""

    calls, fails, drops = 0, False, 0.3

    def forward(self, x, *, debug=1.0, context_fn=None):
        Block.calls += 1
        if self.fails and torch._C._current_graph_task_id() != -1:
            raise ValueError("planted, computed again")
        return nn.functional.dropout(super().forward(x), self.drops, self.training) * debug


class Net(sharding.Net):
    """Its middle block runs a second time, and once without a gradient, as a reference would."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            beside = self.blocks[1](x, debug=0.5)
        for place in (0, 1, 2, 1):
            x = self.blocks[place](x, debug=1.1)
        return self.head(x) + 0.01 * beside.sum(-1, keepdim=True)


class Kinds(dtrain.Callback):
    """Notes what a copy of the model, made in a fit, computes."""

    same = None

    def on_epoch_start(self, ctx):
        if not ctx.sharded:
            copied, x = copy.deepcopy(ctx.model), torch.ones(2, WIDTH).double()
            with torch.no_grad():
                for p in copied.parameters():
                    p.mul_(0.5)
            copied.eval(), ctx.model.eval()
            self.same = torch.equal(copied(x), ctx.model(x))
            ctx.model.train()


def made():
    torch.manual_seed(1)
    model = Net().double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(strategy, callbacks, run_dir=None, epochs=2, fails_on=None, **options):
    """Trains; if it is to fail on a rank, in the third step, it is called again."""
    rank = dtrain.init(seed=0).rank
    # A step that failed has drawn its random numbers, and is not what it would have been.
    Block.calls, Block.drops = 0, 0.3 if fails_on is None else 0.0
    model, optimizer = made()

    class Fails(dtrain.Callback):
        armed = rank == fails_on

        def on_step_start(self, ctx, step):
            model.blocks[1].fails = self.armed and step.number == 2

        def on_error(self, ctx, error):
            self.armed = model.blocks[1].fails = False

    trainer = sharding.trainer(
        strategy_of(strategy, **options),
        net=(model, optimizer),
        callbacks=[Fails(), *callbacks],
        micros=2,
        run_dir=run_dir,
    )
    # A batch of one leaves a rank without.
    fit = {"batch_size": 6, "epochs": epochs, "eval_set": sharding.dataset(5)}
    told = ""
    try:
        trainer.fit(sharding.dataset(19), **fit)
    except (ValueError, RemoteError) as error:
        told = str(error)
        trainer.fit(sharding.dataset(19), **fit)
    classes = {type(block).__name__ for block in model.blocks}
    assert classes == {"FSDPBlock" if trainer.context.sharded else "Block"}
    if options:
        assert "blocks computed again" in trainer._engine.strategy.describe()
    return whole(model), trainer.context.metrics["eval/loss"], Block.calls, told


def with_and_without(folder):
    rank = dtrain.init(seed=0).rank
    found = {}
    for strategy in STRATEGIES:
        kinds = Kinds()
        plain = train(strategy, [])
        again = train(strategy, [CheckpointActivations(), kinds])
        # With DDP an error in a backward ends the job, whatever it comes from.
        fails = () if strategy == "ddp" else (0, 1, 2)  # the last is no rank
        failed = [train(strategy, [CheckpointActivations()], fails_on=who) for who in fails]
        resumed = plain
        if strategy == "fsdp":  # half of a run with it, half by the strategy's option
            checkpoint = Checkpoint(every_epochs=1, keep=9)
            train(strategy, [CheckpointActivations(["Block"]), checkpoint], folder, epochs=1)
            checkpoint = Checkpoint(every_epochs=1, keep=9)
            resumed = train(strategy, [checkpoint], folder, checkpoint_activations=True)
        found[strategy] = plain, again, failed, resumed, kinds.same, rank
    return found


def test_numbers_are_the_same_and_an_error_when_computing_again_is_agreed(tmp_path):
    for ranks in run_processes(with_and_without, 2, tmp_path, timeout_s=100):
        for strategy, (plain, again, failed, resumed, same, rank) in ranks.items():
            fine = failed.pop() if failed else plain
            pairs = [(again, plain), (resumed, plain), *((one, fine) for one in failed)]
            for place, (other, expected) in enumerate(pairs):
                equal = [torch.equal(t, expected[0][n]) for n, t in other[0].items()]
                assert all(equal), (strategy, place)
                assert other[1] == expected[1], (strategy, place)
            # Four of five calls of blocks had a gradient, and came twice. Not in evaluations, nor
            # where a copy and the model ran.
            rest, copied = 20, 0 if strategy == "fsdp" else 20
            assert again[2] - copied - rest == (plain[2] - rest) * 9 / 5, strategy
            assert same is (None if strategy == "fsdp" else False), strategy
            for who, (*_, told) in enumerate(failed):
                assert "planted, computed again" in told, (strategy, told)
                assert (f"rank {who}" in told) is (who != rank), (strategy, told)


# ------------------------------------------------------------------- what is refused


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)


def refused(change, blocks):
    model, _ = made()
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [CheckpointActivations(blocks)]
    trainer = sharding.trainer("flat", net=(model, optimizer), callbacks=callbacks)
    trainer.fit(sharding.dataset(), batch_size=6, epochs=1)


def norms(model):
    model.blocks = nn.ModuleList(Normed() for _ in range(3)).double()


def no_blocks(model):
    model.blocks, model.forward = None, lambda x: model.head(model.first(x))


def own_forward(model):
    model.blocks[1].forward = model.blocks[1].forward


class Config:
    use_cache = True


@pytest.mark.parametrize(
    ("change", "blocks", "words"),
    [
        (norms, None, "Normed writes its buffers in its forward, as BatchNorm does"),
        (no_blocks, None, "found no repeated blocks in the model"),
        (own_forward, None, r"blocks\.1 has a forward that is not its class's"),
        (lambda m: None, [nn.Conv2d], r"CheckpointActivations\(blocks=.*chose no part of the"),
        (lambda m: setattr(m, "config", Config()), None, r"config\.use_cache = False"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(change, blocks, words):
    with pytest.raises(RanksFailed, match="ConfigError: .*" + words):
        run_ranks(refused, 1, change, blocks)
