"""What is called a difference, how sure it is, and how many seeds would see what."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dtrain.studies.paired import detectable, differences, grid, power, seeds_for


def pairs_of(base, variant):
    return list(zip(map(float, base), map(float, variant), strict=True))


def drawn(rng, seeds, variants, *, spread=1.0, noise=0.3, shift=0.0):
    """Returns a study: seeds that differ, and variants that differ from the base by chance."""
    base = 5 + spread * rng.standard_normal(seeds)
    return {
        f"v{number}": pairs_of(base, base + shift + noise * rng.standard_normal(seeds))
        for number in range(variants)
    }


def holm(ps):
    """Returns Holm's corrected p values, as in his paper."""
    found, worst = {}, 0.0
    for place, name in enumerate(sorted(ps, key=ps.get)):
        worst = max(worst, min(1.0, (len(ps) - place) * ps[name]))
        found[name] = worst
    return found


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_p_values_are_scipys_paired_t_corrected_by_holm(seeds, scale):
    rng = np.random.default_rng(seeds)
    study = drawn(rng, seeds, 6)
    study = {name: [(scale * a, scale * b) for a, b in ones] for name, ones in study.items()}
    found = differences(study)
    ps = {}
    for name, ones in study.items():
        base, variant = zip(*ones, strict=True)
        expected = stats.ttest_rel(variant, base)
        ps[name] = expected.pvalue
        assert found[name].p == pytest.approx(expected.pvalue, rel=1e-9)
        assert found[name].mean == pytest.approx(np.subtract(variant, base).mean(), rel=1e-9)
        assert found[name].sd == pytest.approx(np.subtract(variant, base).std(ddof=1), rel=1e-9)
    assert {name: one.p_holm for name, one in found.items()} == pytest.approx(holm(ps), rel=1e-9)


def test_alone_the_interval_is_scipys():
    ones = drawn(np.random.default_rng(1), 5, 1)["v0"]
    base, variant = zip(*ones, strict=True)
    expected = stats.ttest_rel(variant, base).confidence_interval(0.95)
    found = differences({"v": ones})["v"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_all_are_judged_after_the_first_that_is_not_significant():
    """By itself the second would be significant at its own level, beside the first it is not."""
    base = np.arange(5.0) * 1.2345
    wiggle = np.array([-1.0, 1.0, 0.3, -0.4, 0.1]) * 0.01
    study = {
        name: pairs_of(base, base + size + wiggle)
        for name, size in {"a": 0.0107, "b": 0.0105, "c": 0.0}.items()
    }
    found = differences(study)
    assert 0.05 / 3 < found["a"].p < 0.05
    assert not any(one.significant for one in found.values())
    assert found["b"].high - found["b"].low == pytest.approx(found["a"].high - found["a"].low)


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=2),
        st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.0, 0.1, 100.0]),
)
def test_an_interval_leaves_zero_out_exactly_where_the_difference_is_significant(study, shift):
    study = {name: [(a, a + shift + b / 1e6) for a, b in ones] for name, ones in study.items()}
    for one in differences(study).values():
        assert one.significant == (one.low > 0 or one.high < 0)
        assert one.significant == (one.p_holm < 0.05)
        assert one.low <= one.mean <= one.high
        assert one.p <= one.p_holm <= 1
        assert one.detectable > 0
        assert all(map(math.isfinite, (one.mean, one.sd, one.low, one.high, one.p)))


def test_what_cannot_be_tested_is_left_out():
    assert differences({"one": [(1.0, 2.0)], "none": [], "same": [(1.0, 1.0), (2.0, 2.0)]}) == {}


def test_values_beyond_what_can_be_squared():
    found = differences({"huge": [(1e200, 2e200), (1.1e200, 2.2e200), (0.9e200, 1.95e200)]})
    assert found["huge"].significant
    assert found["huge"].high < math.inf


# ---- the grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([k / 360 for k in (330, 331, 340)], 1 / 360),
        ([k / 360 for k in (330, 332, 335)], 1 / 360),  # its gaps are 2 and 3 steps
        ([float(np.float32(k / 360)) for k in (300, 310, 311, 359)], 1 / 360),
        ([float(np.float32(k / 50000)) for k in (38001, 38005, 38012)], 1 / 50000),
        ([93.1, 93.4, 94.0], 0.3),
        ([0.93, 0.94, 0.96], 0.01),
        ([3.0, 3.0], 3e-9),
    ],
)
def test_the_step_of_a_grid_is_found(values, step):
    assert grid(values) == pytest.approx(step, rel=0.05)


def test_values_on_no_grid_have_none():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert grid(list(5 + rng.standard_normal(6))) < 1e-3


def test_equal_differences_on_a_grid_are_no_proof():
    """Three seeds that are all one sample of 360 better would else have a p of zero."""
    study = {"v": [(k / 360, (k + 1) / 360) for k in (330, 335, 341)]}
    found = differences(study)["v"]
    assert not found.significant
    assert found.sd == pytest.approx(1 / 360 / math.sqrt(6))
    study = {"v": [(k / 360, (k + 40) / 360) for k in (290, 295, 301)]}
    assert differences(study)["v"].significant


def test_equal_differences_on_no_grid_are_seen():
    """Where pairs are alike but for what is planted, three seeds are enough."""
    base = [2.31371, 2.48812, 2.02933]
    study = {"v": pairs_of(base, [2.32371, 2.49822, 2.03923])}
    assert differences(study)["v"].p < 1e-3


# ---- how often it is wrong, and how often it sees ------------------------------------------


def share_that_says_it_matters(seeds, variants, studies, *, steps=None, noise=0.3, shift=0.0):
    rng = np.random.default_rng([seeds, variants, steps or 0])
    said = 0
    for _ in range(studies):
        study = drawn(rng, seeds, variants, noise=noise, shift=shift)
        if steps is not None:  # accuracies of so many samples, near 0.93
            study = {
                name: [(rounded(a, steps), rounded(b, steps)) for a, b in ones]
                for name, ones in study.items()
            }
        said += any(one.significant for one in differences(study).values())
    return said / studies


def rounded(value, steps):
    return round((0.93 + (value - 5) / 100) * steps) / steps


def noise_of(studies):
    return 3.5 * math.sqrt(0.05 * 0.95 / studies)


@pytest.fixture
def no_planning(monkeypatch):
    """Leaves out what no simulation looks at, and takes the most time."""
    monkeypatch.setattr("dtrain.studies.paired.detectable", lambda *_: 1.0)
    monkeypatch.setattr("dtrain.studies.paired.seeds_for", lambda *_: None)


@pytest.mark.usefixtures("no_planning")
@pytest.mark.parametrize("steps", [None, 360])
@pytest.mark.parametrize("variants", [1, 8])
@pytest.mark.parametrize("seeds", [3, 5])
def test_at_most_one_study_of_twenty_says_that_something_matters_where_nothing_does(
    seeds, variants, steps
):
    studies = 1000 if variants == 1 else 400
    for noise in (0.3, 0.05) if steps else (0.3,):  # so small that most differences are 0
        said = share_that_says_it_matters(seeds, variants, studies, steps=steps, noise=noise)
        assert said <= 0.05 + noise_of(studies)


@pytest.mark.usefixtures("no_planning")
def test_where_all_are_tested_fairly_it_is_about_one_in_twenty():
    """Or else the bound above would hold because nothing is ever seen."""
    assert share_that_says_it_matters(5, 1, 2000) >= 0.05 - noise_of(2000)


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_so_many_seeds_see_the_detectable_difference_in_80_percent_of_studies(seeds):
    rng = np.random.default_rng(seeds)
    shift = detectable(0.3, seeds, 0.05)
    deltas = shift + 0.3 * rng.standard_normal((20000, seeds))
    ps = stats.ttest_1samp(deltas, 0.0, axis=1).pvalue
    assert (ps < 0.05).mean() == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("seeds", [3, 5])
def test_so_many_seeds_see_it_beside_eight_variants_too(seeds):
    rng = np.random.default_rng(seeds)
    level = 0.05 / 8
    deltas = detectable(1.0, seeds, level) + rng.standard_normal((20000, seeds))
    ps = stats.ttest_1samp(deltas, 0.0, axis=1).pvalue
    assert (ps < level).mean() == pytest.approx(0.8, abs=0.012)


def test_power_is_the_noncentral_ts():
    for count, level, difference in [(5, 0.05, 1.0), (10, 0.05, 0.9), (30, 0.01, 0.5)]:
        critical, shift = stats.t.isf(level / 2, count - 1), difference * math.sqrt(count)
        expected = stats.nct.sf(critical, count - 1, shift)
        expected += stats.nct.cdf(-critical, count - 1, shift)
        assert power(difference, 1.0, count, level) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("level", [0.05, 0.05 / 8, 0.05 / 300])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_more_seeds_see_smaller_differences(scale, level):
    seen = [detectable(scale, seeds, level) for seeds in (2, 3, 4, 5, 8, 16, 100)]
    assert seen == sorted(seen, reverse=True)
    assert all(map(math.isfinite, seen))
    assert seen == pytest.approx(
        [scale * detectable(1.0, seeds, level) for seeds in (2, 3, 4, 5, 8, 16, 100)]
    )
    needed = [seeds_for(part * scale, scale, level) for part in (4, 2, 1, 0.5, 0.25)]
    assert needed == sorted(needed)
    assert needed == [seeds_for(part, 1.0, level) for part in (4, 2, 1, 0.5, 0.25)]
    assert seeds_for(0.01 * scale, scale, level) is None  # over a thousand


def test_seeds_for_is_the_least_that_see_it():
    for difference in (3.0, 1.0, 0.4):
        seeds = seeds_for(difference, 1.0, 0.05)
        assert power(difference, 1.0, seeds, 0.05) >= 0.8
        assert seeds == 2 or power(difference, 1.0, seeds - 1, 0.05) < 0.8
    assert seeds_for(1e9, 1.0, 0.05) == 2
