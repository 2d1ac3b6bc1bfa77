"""The lane where gradients are sparse, compressed, scaled, or some ranks run out of data."""

import socket
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation, MixedPrecision
from dtrain.errors import ConfigError, DataError, UnusedParameters
from dtrain.strategies import DDP
from dtrain.testing import run_outcomes, run_processes

# ------------------------------------------------------------------------------ sparse embeddings


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.words = nn.Embedding(20, 4, sparse=sparse)
        self.bag = nn.EmbeddingBag(20, 4, sparse=sparse)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.words(x).mean(1) + self.bag(x))


class SkipThrees(dtrain.Callback):
    """Idle on whichever rank has a three; and on the ranks of which a batch has no sample."""

    def on_batch(self, ctx, step):
        if (step.batch[0][:, 0] == 3).any():
            ctx.request.skip("a three")


def sparse_or_dense(sparse):
    dtrain.init(seed=0)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randint(20, (31, 3), generator=generator),
        torch.randint(2, (31,), generator=generator),
    )
    found = []
    for clip in ([], [ClipGradients(0.1)]):
        torch.manual_seed(0)
        net = Bag(sparse).double()
        run = tiny.trainer(
            [SkipThrees(), *clip],
            net=net,
            optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
            loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        )
        run.fit(data, batch_size=7, epochs=3)
        assert net.words.weight.grad.is_sparse is sparse
        found.append([p.detach().clone() for p in net.parameters()])
    return found


@pytest.mark.parametrize("world_size", [1, 2])  # at 4, see "Not yet" in docs/design.md
def test_idle_ranks_and_sparse_gradients(world_size):
    dense = run_processes(sparse_or_dense, world_size, False)
    sparse = run_processes(sparse_or_dense, world_size, True)
    for found in sparse:
        for one, other in zip(found, dense[0], strict=True):
            for a, b in zip(one, other, strict=True):
                assert (a - b).norm() <= 1e-13 * b.norm()


# ------------------------------------------------------------------------------ comm hooks


def counted_average(state, bucket):
    """A hook of the user's own."""
    state.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(None, bucket)


def hooked(kind):
    dtrain.init(seed=0)
    calls = []
    hooks = {
        "none": None,
        "own": (calls, counted_average),
        "fp16": (None, default_hooks.fp16_compress_hook),
    }
    record = tiny.Record()
    run = tiny.trainer(
        [record, GradientAccumulation(2), StopOnRank1()],
        net=tiny.model(dtype=torch.float32),
        strategy=DDP(comm_hook=hooks[kind]),
    )
    result = run.fit(tiny.dataset(90), batch_size=24, epochs=5)
    parameters = torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])
    return parameters, record.losses, result.stop_reason, result.steps, len(calls)


class StopOnRank1(dtrain.Callback):
    """That too has to travel."""

    def on_step_end(self, ctx, step):
        if dtrain.init(seed=0).rank == 1 and step.number == 9:
            ctx.request.stop("enough")


def test_a_communication_hook_alters_gradients_but_not_what_ranks_say():
    plain = run_processes(hooked, 2, "none")
    own = run_processes(hooked, 2, "own")
    half = run_processes(hooked, 2, "fp16")
    for found in (plain, own, half):
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1:4] == found[1][1:4]
        assert found[0][2:4] == (f"enough (asked by rank 1 on {socket.gethostname()})", 11)
    assert torch.equal(plain[0][0], own[0][0])
    assert plain[0][1] == own[0][1]
    assert own[0][4] >= 11
    # Compression is seen in the gradients; the first loss was told uncompressed all the same.
    assert not torch.equal(half[0][0], plain[0][0])
    assert (half[0][0] - plain[0][0]).norm() < 1e-2 * plain[0][0].norm()
    assert half[0][1][0] == plain[0][1][0]


def unused_under_a_hook():
    dtrain.init(seed=0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.used(x)

    run = tiny.trainer(net=Half(), strategy=DDP(comm_hook=(None, default_hooks.allreduce_hook)))
    before = tiny.digest(run.model)
    with pytest.raises(UnusedParameters, match=r"reached unused.weight, unused.bias"):
        run.fit(tiny.dataset(), batch_size=24, epochs=1)
    assert tiny.digest(run.model) == before


def test_unused_parameters_are_named_under_a_hook_too():
    run_processes(unused_under_a_hook, 2)


# ------------------------------------------------------------------------------ scale and factor


def tokens(per_sample):
    """Each sample is a mean over as many tokens as it says."""

    def loss_fn(net, batch):
        x, y = batch
        each = F.cross_entropy(net(x), y, reduction="none")
        return dtrain.Loss(each.mean(), weight=per_sample * len(x))

    return loss_fn


def in_half_precision(per_sample, micros):
    dtrain.init(seed=0)
    record = tiny.Record()
    run = tiny.trainer(
        [MixedPrecision("fp16"), GradientAccumulation(micros), record], loss=tokens(per_sample)
    )
    run.fit(tiny.dataset(), batch_size=24, max_steps=8)
    return record.applied, record.losses, run.precision.values()["loss_scale"]


def weights_in_half_precision():
    return {
        (per_sample, micros): in_half_precision(per_sample, micros)
        for per_sample in (1, 4000, 1_000_000)
        for micros in (1, 3)
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_million_tokens_eat_no_loss_scale(world_size):
    for found in run_processes(weights_in_half_precision, world_size):
        for case, (applied, losses, scale) in found.items():
            assert applied == [True] * 8, case  # from the very first step on
            assert scale == 2.0**16, case
            assert losses == pytest.approx(found[1, 1][1], rel=2e-3), case


def resumed_in_half_precision(folder):
    """A weight that grows: the reference weight of the unbroken run is taken up."""
    found = []
    for name, stops in (("whole", [8]), ("broken", [3, 8])):
        for stop in stops:

            def loss_fn(net, batch, ctx):
                x, y = batch
                return dtrain.Loss(F.cross_entropy(net(x), y), 3.0 ** (2 * ctx.progress.step))

            run = tiny.trainer(
                [MixedPrecision("fp16"), Checkpoint()], loss=loss_fn, run_dir=folder / name
            )
            run.fit(tiny.dataset(), batch_size=24, max_steps=stop)
        found.append((tiny.digest(run.model), run._engine.lane.expected))
    return found


def test_a_resumed_run_takes_up_the_reference_weight(tmp_path):
    for whole, broken in run_processes(resumed_in_half_precision, 2, tmp_path):
        assert whole == broken


def growing(net, batch, ctx):
    """In each step a batch has more tokens than before."""
    return dtrain.Loss(F.cross_entropy(net(batch[0]), batch[1]), 11 * (2 + ctx.progress.step))


def passes():
    """How often a step multiplies gradients, beyond the fp16 unscaling that it needs anyway."""
    dtrain.init(seed=0)
    found = {}
    for name, callbacks in (
        ("plain", []),
        ("fp16", [MixedPrecision("fp16")]),
        ("clip", [ClipGradients(1e-3)]),
        ("fp16 and clip", [MixedPrecision("fp16"), ClipGradients(1e-3)]),
        ("even", []),
    ):
        # 22 = 11 samples on each rank: by samples, each weighs just what is expected.
        loss = tiny.loss_fn if name == "even" else growing
        run = tiny.trainer(callbacks, loss=loss, optimizer=sgd, strategy="ddp")
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run.fit(tiny.dataset(), batch_size=22, max_steps=4)
        counts = {event.key: event.count for event in profiled.key_averages()}
        found[name] = counts.get("aten::_foreach_mul_", 0) / 4
    return found


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)


def test_what_the_factor_of_the_weights_costs():
    for found in run_processes(passes, 2):
        assert found == {
            "plain": 1,
            "fp16": 0,
            "clip": 2,
            "fp16 and clip": 1,
            "even": 0,
        }


# ------------------------------------------------------------------------------ when_uneven


def batches(count, start):
    x, y = tiny.dataset(64).tensors
    return [(x[i : i + 2], y[i : i + 2]) for i in range(start, start + 2 * count, 2)]


class Seen(dtrain.Callback):
    def __init__(self):
        self.samples = []

    def on_step_end(self, ctx, step):
        self.samples.append(step.weight)


def uneven(lengths, micros, options, folder, max_steps):
    world = dtrain.init(seed=0)
    data = dtrain.Data(batches(lengths[world.rank], 16 * world.rank), **options)
    seen = Seen()
    callbacks = [seen, GradientAccumulation(micros)]
    options = {}
    if folder is not None:
        callbacks.append(Checkpoint(every_steps=1))
        options["run_dir"] = folder
    run = tiny.trainer(callbacks, **options)
    try:
        result = run.fit(data, epochs=2, max_steps=max_steps)
    except DataError as error:
        return str(error)
    return seen.samples, result.steps, result.epochs, tiny.digest(run.model)


def all_uneven(folder):
    stop, idle = {"when_uneven": "stop"}, {"when_uneven": "idle"}
    found = {
        "stop": uneven([3, 5], 1, stop, None, None),
        "idle": uneven([3, 5], 1, idle, None, None),
        "default": uneven([3, 5], 1, {}, None, None),
        "stop in a window": uneven([3, 5], 2, stop, None, None),
        "idle in a window": uneven([3, 5], 2, idle, None, None),
        "even": uneven([4, 4], 2, stop, None, None),
        "empty": uneven([0, 4], 1, stop, None, None),
        "whole": uneven([3, 5], 1, stop, folder / "whole", None),
    }
    for steps in (1, 2, 3, 4, None):  # each goes on where the last stopped
        found["broken"] = uneven([3, 5], 1, stop, folder / "broken", steps)
    return found


def test_what_happens_when_a_stream_ends_early(tmp_path):
    by_rank = run_processes(all_uneven, 2, tmp_path)
    assert by_rank[0] == by_rank[1]
    found = by_rank[0]
    both, one = 4.0, 2.0
    assert found["stop"][:3] == ([both] * 6, 6, 2)
    assert found["idle"][:3] == ([both, both, both, one, one] * 2, 10, 2)
    assert found["default"] == found["idle"]
    # Windows of two batches: the second has one batch of rank 0 and two of rank 1.
    assert found["stop in a window"][:3] == ([8.0, 6.0] * 2, 4, 2)
    assert found["idle in a window"][:3] == ([8.0, 6.0, 2.0] * 2, 6, 2)
    assert found["even"][:3] == ([8.0, 8.0] * 2, 4, 2)
    assert "no rank's stream gave a batch in epoch 0" in found["empty"]
    assert found["broken"][3] == found["whole"][3] == found["stop"][3]
    assert found["broken"][1:3] == (6, 2)


def test_when_uneven_is_checked():
    with pytest.raises(ConfigError, match=r"when_uneven='wait': one of \('idle', 'stop'\)"):
        dtrain.Data([torch.zeros(2)], when_uneven="wait")
    with pytest.raises(ConfigError, match="is for iterables; ranks share a dataset evenly"):
        dtrain.Data(tiny.dataset(), 8, when_uneven="stop")


class EndsBadly:
    """Raises when it is asked for the batch after the second, which is before its turn."""

    def __iter__(self):
        yield from batches(2, 0)
        raise ValueError("planted at the look ahead")


def looks_ahead():
    dtrain.init(seed=0)
    run = tiny.trainer()
    run.fit(dtrain.Data(EndsBadly(), when_uneven="stop"), epochs=1)


def test_a_stream_that_raises_when_looked_ahead_is_an_error_like_any():
    with pytest.raises(dtrain.testing.RanksFailed, match="planted at the look ahead"):
        run_processes(looks_ahead, 2, timeout_s=20)


# ------------------------------------------------------------------------------ where none may idle


class Sync(DDP):
    """As with SyncBatchNorm, which works on GPUs only: ranks wait for one another in the model."""

    def prepare_model(self, model, world):
        model = super().prepare_model(model, world)
        self.may_idle = False
        return model


def waits_in_the_model(net, batch):
    torch.distributed.all_reduce(torch.zeros(3))
    return tiny.loss_fn(net, batch)


class SkipOnRank1(dtrain.Callback):
    def on_batch(self, ctx, step):
        if dtrain.init(seed=0).rank == 1 and step.number == 2:
            ctx.request.skip("planted")


def must_not_idle(why):
    dtrain.init(seed=0)

    def raises(net, batch, ctx):
        if dtrain.init(seed=0).rank == 1 and ctx.progress.step == 2:
            raise ValueError("planted")
        return waits_in_the_model(net, batch)

    run = tiny.trainer(
        [SkipOnRank1()] if why == "skip" else [],
        loss=raises if why == "raise" else waits_in_the_model,
        strategy=Sync(),
    )
    run.fit(tiny.dataset(25 if why == "data" else 24), batch_size=6, epochs=1)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("skip", "the other ranks wait for it in SyncBatchNorm"),
        ("data", "the other ranks wait for it in SyncBatchNorm"),
        ("raise", "planted"),
    ],
)
def test_where_ranks_wait_in_the_model_none_may_idle(why, words):
    zero, one = run_outcomes(must_not_idle, 2, why, timeout_s=20)
    assert words in str(one.error)
    assert "rank 1" in str(zero.error)
    assert words in str(zero.error)


def test_sync_batchnorm_lets_nobody_idle():
    strategy = DDP(sync_batchnorm=True)
    norm = nn.BatchNorm1d(3)
    gpus = SimpleNamespace(size=2, device=torch.device("cuda"))
    assert isinstance(strategy.prepare_model(norm, gpus), nn.SyncBatchNorm)
    assert not strategy.may_idle
    assert DDP().prepare_model(norm, gpus) is norm
    assert DDP().may_idle


# ------------------------------------------------------------------------------ static graphs


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 2), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.first, x.requires_grad_(), use_reentrant=self.reentrant))


class SkipAt(dtrain.Callback):
    def __init__(self, step):
        self.step = step

    def on_batch(self, ctx, step):
        if dtrain.init(seed=0).rank == 1 and step.number == self.step:
            ctx.request.skip("planted")


def recomputed():
    found = {}
    for static in (False, True):
        for reentrant in (False, True):
            for skipped in (-1, 0, 3):
                dtrain.init(seed=0)
                torch.manual_seed(0)
                run = tiny.trainer(
                    [SkipAt(skipped)],
                    net=Recomputed(reentrant),
                    strategy=DDP(static_graph=static),
                )
                run.fit(tiny.dataset(), batch_size=24, epochs=2)
                found[static, reentrant, skipped] = tiny.digest(run.model)
    return found


def test_recomputed_activations_and_static_graphs_take_part_idle():
    by_rank = run_processes(recomputed, 2)
    assert by_rank[0] == by_rank[1]
    digests = [[d for case, d in by_rank[0].items() if case[2] == step] for step in (-1, 0, 3)]
    assert [len(set(same)) for same in digests] == [1, 1, 1]
    assert len({same[0] for same in digests}) == 3


# ------------------------------------------------------------------------------ equal shares


def by_hand_and_by_dtrain():
    """Shares of 15 samples, which is no power of two."""
    world = dtrain.init(seed=0)
    data = dtrain.Data(tiny.dataset(90), 15 * world.size, shuffle=False)
    run = tiny.trainer([ClipGradients(0.1)], strategy="ddp")
    run.fit(data, epochs=3)
    net = tiny.model()
    replica = nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
    optimizer = tiny.adam(net)
    for _ in range(3):
        for x, y in zip(*(t.split(15 * world.size) for t in data.dataset.tensors), strict=True):
            mine = slice(15 * world.rank, 15 * (world.rank + 1))
            optimizer.zero_grad()
            F.cross_entropy(replica(x[mine]), y[mine]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    return tiny.digest(run.model), tiny.digest(net)


@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_shares_have_the_bits_of_plain_ddp(world_size):
    for ours, plain in run_processes(by_hand_and_by_dtrain, world_size):
        assert ours == plain
