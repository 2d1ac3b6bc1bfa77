"""What a comparison says of each variant, in a table, in sentences and in files."""

import csv
import io
import json
import math

import pytest

from dtrain.errors import ConfigError
from dtrain.studies import Pick, Run, make_table
from dtrain.studies.words import number, signed

LOSS = Pick("eval/loss", "min")
ACCURACY = Pick("eval/accuracy", "max")
# Neither of them on a grid.
BASE = [0.51231, 0.49817, 0.53159, 0.50443, 0.52071]
WIGGLE = [0.00113, -0.00127, 0.00041, 0.00089, -0.00071]


def run(variant, seed, value, metric="eval/loss", *, state="finished", steps=100, **more):
    rows = [
        {"step": float(step), "seconds": step / 10, metric: value + (steps - step) / steps}
        for step in (steps // 2, steps)
        if value is not None
    ]
    return Run(variant, seed, state, rows, **more)


def runs_of(variant, values, metric="eval/loss", **more):
    return [run(variant, seed, value, metric, **more) for seed, value in enumerate(values)]


def failed(variant, seed, error="ValueError: no"):
    return Run(variant, seed, "failed", error=error)


def table_of(*variants, pick=LOSS, base=BASE, **more):
    runs = base if isinstance(base[0], Run) else runs_of("base", base, pick.metric)
    runs = [*runs, *(one for variant in variants for one in variant)]
    return make_table(runs, pick, title="train.py", **more)


def shifted(by, wiggle=1.0, base=BASE):
    return [value + by + wiggle * w for value, w in zip(base, WIGGLE, strict=False)]


def said(*variants, **more):
    """Returns the verdict and the sentence of the last variant."""
    row = table_of(*variants, **more).rows[-1]
    return row["verdict"], row["sentence"]


NAN = math.nan


# ---- the sentences ---------------------------------------------------------------------------


def test_less_is_worse_where_more_is_better_and_better_where_less_is():
    lower = runs_of("without EMA", shifted(-0.02))
    assert said(lower) == (
        "better",
        "without EMA: 0.0199 better (0.0186 to 0.0212), in 5 of 5 seeds: it matters",
    )
    lower = runs_of("without EMA", shifted(-0.02), "psnr")
    assert said(lower, pick=Pick("psnr", "max")) == (
        "worse",
        "without EMA: 0.0199 worse (0.0186 to 0.0212), in 5 of 5 seeds: it matters",
    )


def test_shares_are_told_in_points():
    higher = runs_of("with EMA", shifted(0.02), "eval/accuracy")
    assert said(higher, pick=ACCURACY) == (
        "better",
        "with EMA: 2.01 points better (1.88 to 2.14), in 5 of 5 seeds: it matters",
    )


def test_accuracy_in_percent_is_told_as_it_is():
    base = [100 * value for value in BASE]
    higher = runs_of("with EMA", [100 * value for value in shifted(0.02)], "eval/accuracy")
    assert said(higher, pick=ACCURACY, base=base) == (
        "better",
        "with EMA: 2.01 better (1.88 to 2.14), in 5 of 5 seeds: it matters",
    )


def test_a_real_but_small_difference_is_told_to_be_small():
    base = [value + 3 * seed for seed, value in enumerate(BASE)]
    other = runs_of("without EMA", shifted(0.02, base=base))
    assert said(other, base=base) == (
        "negligible",
        "without EMA: 0.0201 worse (0.0188 to 0.0214), in 5 of 5 seeds: real, but small beside "
        "the spread between seeds",
    )


def test_no_difference_seen_tells_what_could_have_been():
    assert said(runs_of("lr=0.01", shifted(0.0001))) == (
        "no difference seen",
        "lr=0.01: no difference seen; 5 seeds could have seen one of 0.0017; about 14 would see "
        "0.00087",
    )
    words = said(runs_of("lr=0.01", shifted(0.0001), "eval/accuracy"), pick=ACCURACY)[1]
    assert words.endswith("5 seeds could have seen one of 0.17 points; about 14 would see 0.087")


def test_figures_that_are_equal_to_the_last_bit():
    assert said(runs_of("without EMA", BASE)) == (
        "identical",
        "without EMA: the same eval/loss in 5 of 5 seeds, to the last bit: what was changed has no "
        "effect on it here",
    )


def test_one_seed_shows_nothing():
    assert said(runs_of("without EMA", [0.6]), base=[0.5]) == (
        "one seed",
        "without EMA: 0.10 worse; one seed shows nothing: ask for 3 or more",
    )


def test_all_failed():
    runs = [failed("without Schedule", seed, "ValueError: no lr") for seed in range(5)]
    assert said(runs) == (
        "breaks",
        "without Schedule: failed in 5 of 5 seeds, the base in none (ValueError: no lr); it breaks "
        "the training",
    )


def test_failed_once_of_once_is_no_proof():
    assert said([failed("x", 0)]) == (
        "breaks",
        "x: failed in 1 of 1 seeds, the base in none (ValueError: no); nothing is left to compare",
    )


def test_all_diverged():
    assert said(runs_of("without Clip", [NAN, math.inf, -math.inf])) == (
        "breaks",
        "without Clip: diverged in 3 of 3 seeds, the base in none; it breaks the training",
    )


def test_runs_that_diverged_in_some_seeds_are_told_first():
    values = [NAN, *shifted(-0.02)[1:4], math.inf]
    verdict, words = said(runs_of("without Clip", values))
    assert verdict == "better"
    assert words.startswith(
        "without Clip: diverged in 2 of 5 seeds, the base in none; where both ended, 0.0200 better"
    )
    row = table_of(runs_of("without Clip", values)).rows[-1]
    assert (row["runs"], row["finished"], row["diverged"], row["pairs"]) == (5, 3, 2, 3)


def test_failed_and_diverged_at_once():
    runs = [failed("x", 0), *runs_of("x", [0, NAN, *shifted(0.02)[2:]])[1:]]
    assert said(runs)[1].startswith(
        "x: diverged in 1 of 5 seeds and failed in 1 of 5 seeds, the base in none (ValueError: no);"
        " where both ended, 0.0"
    )


def test_a_base_that_breaks_in_all_seeds():
    base = runs_of("base", [NAN, NAN, NAN])
    assert said(runs_of("with Clip", BASE[:3]), base=base) == (
        "no pairs",
        "with Clip: the base diverged or failed in all seeds, so nothing can be compared",
    )


def test_a_base_that_breaks_where_the_variant_does_not_and_the_other_way_round():
    base = [*runs_of("base", [0.5]), failed("base", 1)]
    assert said([failed("x", 0), run("x", 1, 0.5)], base=base) == (
        "no pairs",
        "x: failed in 1 of 2 seeds, the base in 1 (ValueError: no); nothing is left to compare",
    )


def test_a_base_that_failed_is_an_error_which_says_why():
    with pytest.raises(ConfigError) as caught:
        table_of(runs_of("x", BASE), base=[failed("base", 0, "KeyError: 'x'")])
    assert str(caught.value) == (
        "no run of 'base', with which all is compared, has come to its end: it failed (KeyError: "
        "'x')"
    )


def test_no_base_at_all_is_an_error():
    with pytest.raises(ConfigError, match="no run of 'none', with which all is compared"):
        make_table(runs_of("x", BASE), LOSS, base="none")


def test_a_base_that_lacks_some_seeds():
    table = table_of(runs_of("x", shifted(0.02)), base=runs_of("base", BASE[:3]))
    assert table.rows[-1]["pairs"] == 3
    assert table.notes == [
        "x and base do not have all seeds in common: compared without seeds 3, 4"
    ]


def test_no_seed_in_common():
    table = table_of([run("x", seed, 0.5) for seed in (7, 8)])
    assert table.rows[-1]["verdict"] == "no pairs"
    assert table.sentences == ["x: there is no seed in which both it and the base have a value"]


def test_runs_that_are_not_at_their_end():
    waiting = [Run("x", seed, "unfinished") for seed in range(5)]
    table = table_of(waiting)
    assert table.sentences == ["x: no run has come to its end yet"]
    assert table.rows[-1]["verdict"] == "no runs"
    assert table.notes == ["5 of 10 runs have not come to their end yet"]
    table = table_of([*runs_of("x", shifted(0.02)[:4]), waiting[4]])
    assert (table.rows[-1]["runs"], table.rows[-1]["pairs"]) == (4, 4)


def test_a_metric_that_some_runs_lack():
    table = table_of([*runs_of("x", shifted(0.02)[:3]), run("x", 3, 0.5, "eval/f1")])
    assert table.notes[0] == "x: no value of eval/loss, final, in seed 3"
    assert (table.rows[-1]["pairs"], table.rows[-1]["diverged"]) == (3, 0)
    table = table_of(runs_of("x", BASE, "eval/f1"))
    assert table.sentences == ["x: no value of eval/loss to compare"]
    table = table_of(runs_of("x", BASE), base=runs_of("base", BASE, "eval/f1"))
    assert table.sentences == ["x: the base has no value to compare with"]


def test_seeds_that_begin_with_the_same_weights():
    base = runs_of("base", BASE, start="a1")
    notes = table_of(runs_of("x", shifted(0.02), start="a1"), base=base).notes
    assert len(notes) == 1
    assert notes[0].startswith("seeds begin with the same weights: the seed does not reach the mod")


def test_a_variant_that_begins_with_other_weights():
    base = [run("base", seed, value, start=f"a{seed}") for seed, value in enumerate(BASE)]
    notes = table_of(
        [run("x", seed, value, start=f"b{seed}") for seed, value in enumerate(shifted(0.02))],
        [run("y", seed, value, start=f"a{seed}") for seed, value in enumerate(shifted(0.02))],
        base=base,
    ).notes
    assert notes == [
        "x begins with other weights than base does with the same seed: what is seen may be due to "
        "these, too"
    ]


def test_runs_of_unequal_length():
    short = runs_of("without EarlyStopping", shifted(0.02), steps=300)
    assert table_of(short).notes == [
        "figures are not all of the same step (base 100, without EarlyStopping 300); --at steps "
        "compares where all have come to"
    ]
    assert table_of(short, pick=Pick("eval/loss", "min", "best")).notes == []


def test_a_seed_that_diverged_to_a_number():
    values = [*shifted(0.02)[:4], 7e5]
    assert table_of(runs_of("x", values)).notes == [
        "x is far off the other seeds (7e+05 in seed 4; their median is 0.533): mean, spread and "
        "test tell of little else"
    ]


# ---- the table -------------------------------------------------------------------------------


def a_table():
    return table_of(
        runs_of("without EMA", shifted(0.02), step_s=0.002, memory=3_000_000),
        [failed("a|b <c> `d`", seed, "TypeError: <class 'X'> | _y_") for seed in range(5)],
        runs_of("lr=0.01", [NAN, *shifted(0.0001)[1:]]),
        base=runs_of("base", BASE, step_s=0.001, memory=2_000_000),
    )


def test_as_text():
    lines = str(a_table()).splitlines()
    assert lines[0] == "train.py: eval/loss, final (less is better)"
    assert " ".join(lines[2].split()) == "variant mean difference p (Holm) seeds ms a step memory"
    assert " ".join(lines[3].split()) == "base 0.513 ± 0.013 5 of 5 1 2 MB"
    assert lines[4].split("  ")[0] == "without EMA"
    assert "(1 diverged)" in lines[6]
    assert "0 of 5 (5 failed)" in lines[5]
    widths = {line.index("of 5") for line in lines[3:7]}
    assert len(widths) == 1


def test_as_markdown_that_github_renders():
    text = a_table().markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    bars = [len(line.replace("\\|", "").split("|")) for line in rows]
    assert bars == [9] * 6
    assert set(rows[1]) <= set("| -")
    assert r"a\|b \<c\> \`d\`" in rows[4]
    assert r"TypeError: \<class 'X'\> \| \_y\_" in text
    assert text.splitlines()[1] == ""  # or the table would not be one
    assert text.endswith("\n")


def test_as_csv():
    table = a_table()
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [row["variant"] for row in rows] == [row["variant"] for row in table.rows]
    for row, wanted in zip(rows, table.rows, strict=True):
        for name, value in wanted.items():
            assert row[name] == ("" if value is None else str(value))
    assert float(rows[1]["difference"]) == table.rows[1]["difference"]


def test_as_strict_json():
    def never(word):
        raise AssertionError(word)

    table = a_table()
    facts = json.loads(table.json(), parse_constant=never)
    assert facts["rows"] == table.rows
    assert (facts["metric"], facts["mode"], facts["at"], facts["base"]) == (
        "eval/loss",
        "min",
        "final",
        "base",
    )
    assert facts["method"] == table.method


def test_rows_are_flat_and_have_the_same_names():
    table = a_table()
    assert len({tuple(row) for row in table.rows}) == 1
    for row in table.rows:
        assert all(isinstance(value, str | int | float | None) for value in row.values())
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert table.rows[1]["step_ratio"] == pytest.approx(2)
    assert [row["verdict"] for row in table.rows] == [
        "base",
        "worse",
        "breaks",
        "no difference seen",
    ]


def test_a_long_error_is_cut_in_the_sentence_and_whole_in_its_row():
    error = "RuntimeError: " + 50 * "what happened, "
    row = table_of([failed("x", 0, error)]).rows[-1]
    assert row["error"] == error
    assert len(row["sentence"]) < 250
    assert "...)" in row["sentence"]


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (0.9312345, 0.012, "0.931"),
        (1.234e-7, 2e-9, "1.234e-07"),
        (1.234e-7, 2e-8, "1.23e-07"),
        (6698.4, 31.0, "6698"),
        (6698.4, 0.5, "6698.40"),
        (1e9, 1e3, "1e+09"),
        (1234567890.0, 1e3, "1.2345679e+09"),
        (2.345678912, 1e-9, "2.34567891"),
        (12345678.0, 3e7, "1.2e+07"),
        (0.0, 0.5, "0"),
        (0.93, 0.0, "0.93"),
        (0.93, math.inf, "0.93"),
    ],
)
def test_numbers_have_the_digits_that_their_spread_allows(value, scale, text):
    assert number(value, scale) == text
    assert number(-value, scale) == (f"-{text}" if value else "0")


def test_signs():
    assert signed(0.5, 0.1) == "+0.50"
    assert signed(-0.5, 0.1) == "-0.50"
    assert signed(-0.0004, 0.1) == "+0.00"


# ---- what one figure alone does not tell -------------------------------------------------------


def with_losses(runs, losses):
    """Returns the runs with a last loss beside their metric."""
    return [
        Run(one.variant, one.seed, one.state, [*one.rows, {**one.rows[-1], "train/loss": loss}])
        for one, loss in zip(runs, losses, strict=True)
    ]


def test_an_accuracy_that_is_too_coarse_is_no_proof_of_no_effect():
    base = with_losses(runs_of("base", [0.9, 0.95, 0.9], "eval/accuracy"), [0.3, 0.2, 0.4])
    same = with_losses(runs_of("without EMA", [0.9, 0.95, 0.9], "eval/accuracy"), [0.3, 0.2, 0.4])
    assert said(same, base=base, pick=ACCURACY)[0] == "identical"
    near = with_losses(runs_of("without EMA", [0.9, 0.95, 0.9], "eval/accuracy"), [0.3, 0.2, 0.41])
    assert said(near, base=base, pick=ACCURACY) == (
        "no difference seen",
        "without EMA: the same eval/accuracy in 3 of 3 seeds, but not the same losses: that metric "
        "is too coarse to tell them apart here",
    )


def test_a_model_of_nan_has_diverged_whatever_its_accuracy():
    base = with_losses(runs_of("base", [0.9, 0.95, 0.9], "eval/accuracy"), [0.3, 0.2, 0.4])
    lost = with_losses(runs_of("without Clip", [0.1, 0.1, 0.1], "eval/accuracy"), [NAN, NAN, NAN])
    verdict, sentence = said(lost, base=base, pick=ACCURACY)
    assert verdict == "breaks"
    assert sentence.startswith("without Clip: diverged in 3 of 3 seeds, the base in none")


def test_seeds_that_do_not_agree_on_a_steps_time_tell_of_the_machine():
    base = [
        Run("base", s, "finished", run("base", s, v).rows, step_s=0.1) for s, v in enumerate(BASE)
    ]
    for times, ratio in (((0.2, 0.21, 0.2, 0.2, 0.19), 2), ((0.1, 0.4, 0.1, 0.1, 0.1), None)):
        slow = [
            Run("slow", s, "finished", run("slow", s, v).rows, step_s=times[s])
            for s, v in enumerate(BASE)
        ]
        found = table_of(slow, base=base).rows[-1]["step_ratio"]
        assert found == (ratio and pytest.approx(ratio))
