"""Who gets which part of a global batch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.shares import share_of, split_evenly, split_share

exact = settings(derandomize=True, deadline=None)
counts = st.integers(0, 10_000)
parts = st.integers(1, 300)


@exact
@given(counts, parts)
def test_sizes_sum_to_the_whole_and_differ_by_one_at_most(total: int, parts: int) -> None:
    sizes = split_evenly(total, parts)
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@exact
@given(counts, counts, parts)
def test_slices_of_ranks_join_to_the_batch_in_their_order(start: int, n: int, size: int) -> None:
    slices = [share_of(start, start + n, rank=rank, size=size) for rank in range(size)]
    assert [p for first, stop in slices for p in range(first, stop)] == [*range(start, start + n)]
    assert [stop - first for first, stop in slices] == split_evenly(n, size)
    # Contiguous, also where slices are empty.
    edges = [start, *(stop for _, stop in slices)]
    assert [first for first, _ in slices] == edges[:-1]


@exact
@given(counts, parts)
def test_micro_batches_are_never_empty(share: int, steps: int) -> None:
    sizes = split_share(share, steps=steps)
    assert sum(sizes) == share
    assert len(sizes) == min(share, steps)
    assert all(size >= 1 for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_by_example() -> None:
    assert split_evenly(10, 4) == [3, 3, 2, 2]
    assert [share_of(100, 110, rank=r, size=4) for r in range(4)] == [
        (100, 103),
        (103, 106),
        (106, 108),
        (108, 110),
    ]
    assert [share_of(5, 7, rank=r, size=3) for r in range(3)] == [(5, 6), (6, 7), (7, 7)]
    assert split_share(2, steps=5) == [1, 1]
    assert split_share(0, steps=5) == []
