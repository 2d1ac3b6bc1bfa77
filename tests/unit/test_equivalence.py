"""What counts as parted, which samples came, and what is overridden."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dtrain.distributed import init
from dtrain.testing import run_processes, run_ranks
from dtrain.trials import records as of
from dtrain.trials.call_overrides import CallOverrides
from dtrain.trials.check_compare import (
    DOUBLE,
    Record,
    Results,
    compare,
    gradient_gaps,
    gradients_name,
    parameter_gap,
)
from dtrain.trials.check_trial import Setup, make_trial
from dtrain.trials.records import write_tensors

START = {"weight": torch.zeros(3, dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}


def tensors(weight, bias):
    return {
        "weight": torch.tensor(weight, dtype=torch.float64),
        "bias": torch.tensor(bias, dtype=torch.float64),
    }


def results(folder, gradients, final, losses=(1.0, 0.5), parameters=("same",)):
    folder.mkdir()
    record = Record(steps=len(gradients), losses=list(losses))
    write_tensors(folder, "initial", START)
    for step, each in enumerate(gradients):
        write_tensors(folder, gradients_name(step), each)
    write_tensors(folder, "final", final)
    for rank, digest in enumerate(parameters):
        record.own_parameters = digest
        record.write(folder, rank)
    return Results.read(folder, len(parameters))


@pytest.fixture
def truth(tmp_path):
    gradients = [tensors([1.0, 0.5, 2.0], [1e-17, 0.1]), tensors([1.0, 0.4, 1.0], [-2e-17, 0.1])]
    return results(tmp_path / "truth", gradients, tensors([0.2, 0.1, 0.2], [0.2, 0.1]))


def test_rounding_is_equal_and_a_zero_gradient_is_named(tmp_path, truth):
    gradients = [
        tensors([1.0 + 1e-15, 0.5, 2.0], [-1e-17, 0.1]),
        tensors([1.0, 0.4, 1.0], [3e-17, 0.1]),
    ]
    # Adam has taken the first bias, whose gradient is rounding, elsewhere.
    final = tensors([0.2, 0.1 + 1e-14, 0.2], [-0.2, 0.1])
    run = results(tmp_path / "run", gradients, final, losses=(1.0 + 1e-15, 0.5))
    found = compare("run", truth, run, DOUBLE)
    assert found.equal
    assert found.zero_gradients == ("bias (1 of 2 numbers)",)
    assert found.worst_gap < 1e-12


def test_a_gradient_that_parts_is_named_with_its_first_step(tmp_path, truth):
    gradients = [tensors([1.0, 0.5, 2.0], [0.0, 0.1]), tensors([1.0, 0.4, 1.0], [0.0, 0.1001])]
    run = results(tmp_path / "run", gradients, tensors([0.2, 0.1, 0.2], [0.2, 0.1]))
    found = compare("run", truth, run, DOUBLE)
    assert not found.equal
    assert [(p.name, p.step) for p in found.parted] == [("bias", 1)]
    assert found.worst == "bias"
    assert found.worst_gap == pytest.approx(1e-3)
    assert found.first_step == 1


def test_a_parameter_may_part_alone(tmp_path, truth):
    gradients = [tensors([1.0, 0.5, 2.0], [0.0, 0.1]), tensors([1.0, 0.4, 1.0], [0.0, 0.1])]
    run = results(tmp_path / "run", gradients, tensors([0.2, 0.1, 0.3], [0.2, 0.1]))
    (parted,) = compare("run", truth, run, DOUBLE).parted
    assert (parted.name, parted.step) == ("weight", None)
    assert parted.gap == pytest.approx(0.5)


def test_losses_and_ranks_may_part_alone(tmp_path, truth):
    gradients = [tensors([1.0, 0.5, 2.0], [0.0, 0.1]), tensors([1.0, 0.4, 1.0], [0.0, 0.1])]
    final = tensors([0.2, 0.1, 0.2], [0.2, 0.1])
    loss = results(tmp_path / "loss", gradients, final, losses=(1.0, 0.51))
    found = compare("run", truth, loss, DOUBLE)
    assert found.loss_parts
    assert found.loss_gap == pytest.approx(0.01)
    stray = results(tmp_path / "stray", gradients, final, parameters=("same", "other"))
    found = compare("run", truth, stray, DOUBLE)
    assert (found.equal, found.strays) == (False, (1,))
    shorter = results(tmp_path / "shorter", gradients[:1], final, losses=(1.0,))
    assert compare("run", truth, shorter, DOUBLE).loss_gap == math.inf


def test_a_missing_or_infinite_gradient_parts():
    mine = tensors([1.0, 1.0, 1.0], [1.0, 1.0])
    assert gradient_gaps(mine, {"weight": mine["weight"]}, 1e-4) == {"weight": 0, "bias": math.inf}
    theirs = tensors([1.0, math.nan, 1.0], [math.inf, 1.0])
    assert gradient_gaps(mine, theirs, 1e-4) == {"weight": math.inf, "bias": math.inf}


def test_a_small_tensor_is_not_blamed_for_rounding_of_large_ones():
    mine = tensors([1e6, 0, 0], [1e-9, 0])
    theirs = tensors([1e6, 0, 0], [2e-9, 0])
    assert gradient_gaps(mine, theirs, DOUBLE.floor)["bias"] < DOUBLE.gradient


def test_a_weak_number_decides_nothing():
    start, mine = torch.zeros(2).double(), torch.tensor([0.1, 0.1]).double()
    weak = torch.tensor([False, True])
    gap, drifted = parameter_gap(start, mine, torch.tensor([0.1, 0.2]).double(), weak, DOUBLE)
    assert gap < DOUBLE.parameter
    assert drifted == 1


def test_a_number_without_gradient_decides(tmp_path):
    """Such as weight decay of a parameter that one run leaves alone."""
    gradients = [tensors([1.0, 0.5, 2.0], [0.0, 0.0])]
    truth = results(tmp_path / "truth", gradients, tensors([0.2, 0.1, 0.2], [0.0, 0.0]))
    run = results(tmp_path / "run", gradients, tensors([0.2, 0.1, 0.2], [0.0, 1e-3]))
    assert [p.name for p in compare("run", truth, run, DOUBLE).parted] == ["bias"]


def test_digests_do_not_depend_on_how_a_batch_is_split():
    batch = {"x": torch.randn(5, 2, 3), "pair": (torch.arange(5), "name"), "scale": torch.ones(())}
    whole = of.digests(batch, 5)
    assert len(set(whole)) == 5
    with pytest.raises(ValueError, match="as long as"):
        of.part(batch, 5, 0, 2)  # the scale cannot be divided
    del batch["scale"]
    parts = [of.digests(of.part(batch, 5, a, b), b - a) for a, b in ((0, 2), (2, 5))]
    assert parts[0] + parts[1] == whole
    batch["x"][3, 0, 0] += 1
    assert [a == b for a, b in zip(of.digests(batch, 5), whole, strict=True)].count(False) == 1


def test_widening_leaves_whole_numbers():
    x, y = of.widen((torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int32)))
    assert (x.dtype, y.dtype) == (torch.float64, torch.int32)


class Random:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.randn(2) + index


def test_samples_seeded_by_index_are_always_the_same():
    data = of.SeededByIndex(Random(), 1)
    before = torch.get_rng_state()
    assert torch.equal(data[1], data[1])
    assert not torch.equal(data[1] - 1, data[2] - 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_overrides_keep_float64():
    x = torch.ones(2, dtype=torch.float64)
    with CallOverrides(double=True, without=frozenset()):
        assert x.float().dtype == x.to(torch.bfloat16).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert F.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
    with CallOverrides(double=False, without=frozenset()):
        assert x.float().dtype == torch.float32


class Sends:
    """Numbers in float32, by each verb; small and large ones travel otherwise."""

    def __call__(self):
        comm, found = init().comm, []
        for size in (3, 5000):
            ones = torch.frombuffer(bytearray(b"\0\0\x80\x3f" * size), dtype=torch.float32)
            with CallOverrides(double=True, without=frozenset()):
                assert torch.ones(2, dtype=torch.float32).dtype == torch.float64
                assert torch.equal(ones.view(torch.int32).view(torch.float32), ones)
                found += [
                    comm.all_reduce("sum", ones) - 1,
                    *comm.all_gather("all", ones),
                    comm.broadcast("first", ones),
                    comm.on_main("rank 0's", lambda one=ones: one.clone()),
                    *comm.gather_objects("objects", ones),
                ]
        return [(one.dtype, one.unique().tolist()) for one in found]


@pytest.mark.parametrize("run", [run_ranks, run_processes])
def test_what_ranks_send_one_another_stays_what_it_is(run):
    """Read as float64, the bytes of float32 would be other numbers."""
    for found in run(Sends(), 2):
        assert found == [(torch.float32, [1.0])] * 14


def attention(x):
    return F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)


DROPS = {
    "module": nn.Dropout(0.5),
    "alpha": nn.AlphaDropout(0.5),
    "function": lambda x: F.dropout(x, 0.5),
    "torch": lambda x: torch.dropout(x, 0.5, True),
    "attention": attention,
    "attention, by place": lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5),
    "multihead": lambda x: HEADS(x, x, x)[0],
    "lstm": lambda x: LSTM(x)[0],
    "packed gru": lambda x: GRU(nn.utils.rnn.pack_sequence([x, x[:3]]))[0].data,
}
HEADS = nn.MultiheadAttention(4, 2, dropout=0.5)
LSTM = nn.LSTM(4, 4, 2, dropout=0.5)
GRU = nn.GRU(4, 4, 2, dropout=0.5)


@pytest.mark.parametrize("name", DROPS)
def test_the_overrides_see_dropout_and_take_it_out(name):
    x = torch.randn(6, 4)
    drop = DROPS[name]
    seeing = CallOverrides(double=False, without=frozenset())
    with seeing:
        torch.manual_seed(1)
        seen = drop(x)
    torch.manual_seed(1)
    assert torch.equal(seen, drop(x))  # only looked at
    assert seeing.seen == {"dropout"}
    with CallOverrides(double=False, without=frozenset({"dropout"})) as overrides:
        assert torch.equal(drop(x), drop(x))
    assert overrides.seen == {"dropout"}


def test_the_overrides_see_batchnorm_and_take_it_out():
    norm = nn.BatchNorm1d(3)
    plain = nn.BatchNorm1d(3, track_running_stats=False)
    x = 5 + torch.randn(8, 3)
    with CallOverrides(double=False, without=frozenset()) as overrides:
        norm(x)
    assert overrides.seen == {"batchnorm"}
    kept = norm.running_mean.clone()
    with CallOverrides(double=False, without=frozenset({"batchnorm"})):
        for one in (norm, plain):
            assert torch.equal(one(x)[:4], one(x[:4]))
    assert torch.equal(norm.running_mean, kept)
    norm.eval()
    with CallOverrides(double=False, without=frozenset()) as overrides:
        norm(x)
        F.dropout(x, 0.0)
        F.dropout(x, 0.5, training=False)
    assert overrides.seen == set()


def test_a_setup_travels_as_text(tmp_path):
    setup = Setup(2, 3, 4, double=False, without=("dropout",), batch_size=8)
    assert make_trial(json.loads(json.dumps(asdict(setup))), tmp_path).setup == setup
    assert setup.title == "2 ranks x 3 micro-batches"
