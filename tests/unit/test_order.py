"""The order of samples: permutations, in slices, that differ by epoch and by seed."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data import Bucketed, Sequential, Shuffled, Weighted
from dtrain.errors import ConfigError

DRAWN = [0, 1, 1, 2, 2, 2, 2, 2]
BUCKETED = [5, 6, 4, 3, 0, 1, 2]
LENGTHS = [*range(1, 301), 1023, 1024, 1025, 4095, 4096, 4097, 65_537, 1_000_003]


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal chances."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_length_is_permuted() -> None:
    for length in LENGTHS:
        rows = Shuffled(length, seed=length).indices(length % 5, 0, length)
        assert rows.dtype == np.int64
        assert np.array_equal(np.sort(rows), np.arange(length)), length


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_a_slice_is_the_slice_of_the_whole(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 3000), "length")
    start = data.draw(st.integers(0, length), "start")
    stop = data.draw(st.integers(start, length), "stop")
    order = Shuffled(length, data.draw(st.integers(0, 2**63 - 1), "seed"))
    epoch = data.draw(st.integers(0, 10**6), "epoch")
    whole = order.indices(epoch, 0, length)
    assert np.array_equal(order.indices(epoch, start, stop), whole[start:stop])
    assert len(order) == length


@pytest.mark.parametrize("length", [10**12, 2**40, 2**40 + 1])
def test_a_slice_of_a_huge_epoch_costs_nothing_else(length: int) -> None:
    start = length - 1000
    rows = Shuffled(length, 0).indices(0, start, length)
    assert len(set(rows.tolist())) == 1000
    assert rows.min() >= 0
    assert rows.max() < length
    # Spread over all of it: the mean of 1000 even draws is within 5 sigma of the middle.
    assert abs(rows.mean() / length - 0.5) < 5 * (1 / 12 / 1000) ** 0.5


def test_orders_are_fixed_for_good() -> None:
    """A run is continued by a later version too: the permutations are part of the format."""
    assert Shuffled(10, 0).indices(0, 0, 10).tolist() == [2, 5, 9, 4, 8, 6, 1, 7, 0, 3]
    assert Shuffled(1000, 7).indices(3, 990, 995).tolist() == [834, 312, 261, 609, 829]


def test_epochs_and_seeds_differ() -> None:
    orders = [Shuffled(1000, seed).indices(epoch, 0, 1000) for seed in range(5) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random permutations agree in 1 place on average, in 10 or more once in 10^7.
            assert int((one == other).sum()) < 10
    again = Shuffled(1000, 0).indices(0, 0, 1000)
    assert np.array_equal(again, orders[0])


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_permutation_is_about_as_likely(length: int) -> None:
    index = {order: i for i, order in enumerate(permutations(range(length)))}
    order, counts = Shuffled(length, seed=1), np.zeros(len(index))
    for epoch in range(50 * len(index)):
        counts[index[tuple(order.indices(epoch, 0, length).tolist())]] += 1
    freedom = len(index) - 1
    assert chi_square(counts) < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("length", [12, 16, 17])
def test_every_sample_is_about_as_likely_at_every_position(length: int) -> None:
    order, counts = Shuffled(length, seed=2), np.zeros((length, length))
    for epoch in range(100 * length):
        counts[np.arange(length), order.indices(epoch, 0, length)] += 1
    freedom = (length - 1) ** 2
    assert chi_square(counts) < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    rows = Shuffled(10_000, 3).indices(0, 0, 10_000)
    steps = np.abs(np.diff(rows))
    # |x - y| of two even draws has the mean 1/3 and the deviation sqrt(1/18).
    assert abs(steps.mean() / 10_000 - 1 / 3) < 5 * (1 / 18 / 10_000) ** 0.5
    assert (steps == 1).sum() < 20


def test_sequential_is_the_data_sets_own_order() -> None:
    order = Sequential(7)
    assert len(order) == 7
    for epoch in (0, 5):
        assert order.indices(epoch, 0, 7).tolist() == list(range(7))
        assert order.indices(epoch, 3, 5).tolist() == [3, 4]
    assert order.indices(0, 4, 4).tolist() == []


def test_weights_say_how_often() -> None:
    weights = np.array([0.0, 1.0, 3.0, 0.0, 2.0, 10.0, 0.0])
    order = Weighted(weights, seed=4, length=160_000)
    assert len(order) == 160_000
    counts = np.bincount(order.indices(0, 0, 160_000), minlength=7)
    assert counts[weights == 0].tolist() == [0, 0, 0]
    drawn = counts[weights > 0]
    expected = weights[weights > 0] * 160_000 / weights.sum()
    assert float(((drawn - expected) ** 2 / expected).sum()) < 3 + 5 * 6**0.5


def test_what_is_drawn_at_a_position_depends_on_nothing_else() -> None:
    order = Weighted([1, 2, 3, 4] * 250, seed=5)
    assert len(order) == 1000
    whole = order.indices(2, 0, 1000)
    for start, stop in [(0, 1), (17, 400), (999, 1000), (5, 5)]:
        assert np.array_equal(order.indices(2, start, stop), whole[start:stop])
    for other in (order.indices(3, 0, 1000), Weighted([1, 2, 3, 4] * 250, 6).indices(2, 0, 1000)):
        assert (other == whole).mean() < 0.02  # by chance, 1 in 800 or so
    # Neighbours are drawn independently: pairs of quarters are all as likely as they should be.
    quarter = Weighted(np.ones(4), seed=7, length=80_000).indices(0, 0, 80_000)
    pairs = np.bincount(quarter[::2] * 4 + quarter[1::2], minlength=16)
    assert chi_square(pairs) < 15 + 5 * 30**0.5


def test_draws_are_fixed_for_good() -> None:
    assert Weighted([1, 2, 3], 0, 8).indices(1, 0, 8).tolist() == DRAWN
    assert Bucketed([5, 1, 4, 2, 3, 9, 8], 2, 0, 2).indices(1, 0, 7).tolist() == BUCKETED


@pytest.mark.parametrize("samples", [1, 7, 64, 1000, 1003])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_buckets_are_permutations_in_batches_of_similar_length(samples: int, window: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 500, samples)
    order = Bucketed(lengths, 8, seed=3, window=window)
    assert len(order) == samples
    for epoch in (0, 1):
        rows = order.indices(epoch, 0, samples)
        assert np.array_equal(np.sort(rows), np.arange(samples))
        for start in range(0, samples, 13):
            stop = min(start + 29, samples)
            assert np.array_equal(order.indices(epoch, start, stop), rows[start:stop])
    if samples >= 1000 and window == 100:
        spread = np.ptp(lengths[rows[:800]].reshape(-1, 8), axis=1)
        assert spread.max() < 40  # of 500; about 5 on average
        # Long batches come at any time, and a batch's longest sample at any place.
        means = lengths[rows[:800]].reshape(-1, 8).mean(axis=1)
        assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.5
        assert len(set(lengths[rows[:800]].reshape(-1, 8).argmax(axis=1))) == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Weighted([1, -1], 0), "from -1.0 to 1.0"),
        (lambda: Weighted([0, 0], 0), "not only zeros"),
        (lambda: Weighted([1, float("nan")], 0), "finite"),
        (lambda: Weighted([[1, 2]], 0), r"shape \[1, 2\]"),
        (lambda: Weighted([], 0), r"shape \[0\]"),
        (lambda: Weighted([1], 0, 0), "length=0"),
        (lambda: Bucketed([1, 2], 0, 0), "batch_size=0"),
        (lambda: Bucketed([1, 2], 1, 0, 0), "window=0"),
        (lambda: Bucketed([[1], [2]], 1, 0), r"shape \[2, 1\]"),
    ],
)
def test_what_is_no_order_is_refused(make, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
