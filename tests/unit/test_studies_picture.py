"""Pictures of a comparison, in a file and in a terminal."""

import math
import subprocess
import sys

import pytest
from PIL import Image

from dtrain.studies import Pick, Run, draw, draw_in_terminal, make_table

SEEDS = range(3)
SHIFTS = [0.0011, -0.0013, 0.0004]


def run(variant, seed, final, *, nan_from=None, steps=20):
    rows = []
    for step in range(1, steps + 1):
        value = final * (1 - math.exp(-step / 4))
        if nan_from is not None and step >= nan_from:
            value = math.nan
        rows.append({"step": 10.0 * step, "seconds": 1.0 * step, "eval/accuracy": value})
    return Run(variant, seed, "finished", rows)


def variant(name, shift, **more):
    return [run(name, seed, 0.9 + seed / 77 + shift + SHIFTS[seed], **more) for seed in SEEDS]


def base():
    return [run("base", seed, 0.9 + seed / 77) for seed in SEEDS]


def table_of(*variants, mode="max"):
    runs = [*base(), *(one for ones in variants for one in ones)]
    return make_table(runs, Pick("eval/accuracy", mode), title="train.py")


def mixed():
    return table_of(
        variant("without EMA", -0.05),
        variant("without Clip", 0.0),
        variant("optimizer.lr=100", -0.8),
        variant("_$x^$ of a name that is much longer than a picture has room for", math.nan),
        variant("without Guard", 0.01, nan_from=12),
        [Run("without Schedule", seed, "failed", error="ValueError: $no_lr$") for seed in SEEDS],
    )


@pytest.mark.parametrize(
    "table",
    [
        mixed(),
        table_of(variant("x", 0.01)),
        table_of(*(variant(f"variant {number}", number / 1000) for number in range(20))),
        table_of(base()[:0], [Run("x", 0, "failed", error="no")]),
        make_table([run("base", 0, 0.9)], Pick("eval/accuracy", "max")),
        make_table(
            [Run(name, 0, "finished", evaluated={"f1": 0.5}) for name in ("base", "x")],
            Pick("f1", "max", "evaluate"),
        ),
        table_of([Run("x", seed, one.state, one.rows) for seed, one in enumerate(base())]),
        make_table([run(v, 0, 0.9, steps=1) for v in ("base", "x")], Pick("eval/accuracy", "max")),
    ],
    ids=["mixed", "one", "twenty", "failed", "base alone", "no curves", "identical", "one point"],
)
def test_all_can_be_drawn(table, tmp_path):
    """Warnings are errors: of a layout that has no room, of a legend that is empty."""
    figure = draw(table)
    figure.savefig(tmp_path / "picture.png", dpi=50)
    figure.savefig(tmp_path / "picture.svg")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 500
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert isinstance(draw_in_terminal(table), str)


def test_one_far_off_does_not_flatten_the_others():
    above, below = draw(mixed()).axes
    low, high = above.get_xlim()
    assert -0.1 < low < high < 0.1
    assert any("-0.79, far off" in text.get_text() for text in above.texts)
    low, high = below.get_ylim()
    assert low > 0.5
    assert high > 0.9
    assert below.get_title(loc="left") == (
        "beyond what is shown: optimizer.lr=100; x: no longer a number (without Guard)"
    )


def test_rows_of_equal_size_are_all_shown():
    above, _ = draw(table_of(variant("a", -0.2), variant("b", 0.2))).axes
    low, high = above.get_xlim()
    assert low < -0.2
    assert high > 0.2


def test_failed_rows_say_why_in_the_picture():
    above, _ = draw(mixed()).axes
    words = [text.get_text() for text in above.texts]
    assert "breaks: ValueError: $no_lr$" in words
    assert "breaks: diverged in 3 of 3 seeds" in words
    assert len(above.get_yticklabels()) == 6


def test_the_legend_names_all_that_have_a_curve_beside_the_axes():
    figure = draw(mixed())
    figure.canvas.draw()
    below = figure.axes[1]
    legend = below.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "base",
        "without EMA",
        "without Clip",
        "optimizer.lr=100",
        "without Guard",
    ]
    assert legend.get_window_extent().x0 >= below.get_window_extent().x1


def test_each_seed_has_a_mark_and_what_matters_is_filled():
    table = table_of(variant("worse", -0.05), variant("as good", 0.0))
    above, _ = draw(table).axes
    marks = [line for line in above.lines if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in marks] == [3, 3]
    fills = [line.get_markerfacecolor() for line in above.lines if line.get_marker() == "o"]
    assert fills == ["C3", "white"]


def test_no_display_and_no_pyplot_is_needed():
    code = (
        "import sys; from dtrain.studies import *; "
        "rows = [{'step': 1.0, 'seconds': 1.0, 'f1': 1.0}]; "
        "runs = [Run(name, 0, 'finished', rows) for name in 'ab']; "
        "draw(make_table(runs, Pick('f1', 'max'), base='a')); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"MPLBACKEND": "TkAgg"})


# ---- in a terminal ---------------------------------------------------------------------------


def test_in_a_terminal():
    lines = draw_in_terminal(mixed(), 100).splitlines()
    assert max(map(len, lines)) <= 100
    found = {line[:34].strip(): line[34:] for line in lines}
    assert lines[0].split()[:2] == ["without", "EMA"]
    assert "●" in lines[0]
    assert "○" in lines[1]
    assert "< -0.79, far off" in lines[2]
    assert "difference to base, better to the right; ● matters" in lines[3]
    assert found["base"].rstrip().endswith("0.907 (0.894 to 0.920)")
    assert "?" in found["without Guard"]
    assert found["without Guard"].rstrip().endswith("3 not a number")


def test_in_a_terminal_that_has_ascii_only():
    text = draw_in_terminal(mixed(), 80, ascii_only=True)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    assert "X" in lines[0]
    assert "o" in lines[1].removeprefix(lines[1][:34])


@pytest.mark.parametrize("width", [1, 40, 60, 200])
def test_any_width(width):
    assert draw_in_terminal(mixed(), width)
