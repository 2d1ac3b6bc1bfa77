"""Draws what benchmarks/overhead.py found: a bar a loop, as SVG."""

from __future__ import annotations

from html import escape
from typing import Any

LEFT, WIDTH, BAR, GAP, TOP, RIGHT = 170, 420, 18, 10, 56, 60
STYLE = """
text { font: 13px sans-serif; fill: #24292f }
.title { font-weight: bold }
.note { font-size: 11px; fill: #57606a }
.bar { fill: #9aa4b2 }
.dtrain { fill: #2f6fde }
.whisker { stroke: #24292f; stroke-width: 1.5 }
.plain { stroke: #57606a; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .whisker { stroke: #e6edf3 }
}
"""


def draw(every: list[dict[str, Any]]) -> str:
    """Horizontal bars, quickest first: the median ratio to plain, and its interval as a whisker."""
    rows = [(found["loop"], found["to_plain"]) for found in every]
    # Each run has its own tuned loop; here is the one that the first loop met.
    rows.append(("handwritten, tuned", every[0]["tuned_to_plain"]))
    rows.sort(key=lambda row: row[1]["ratio"])
    longest = max(1.0, *(one["interval"][1] for _, one in rows))
    scale = WIDTH / longest
    bottom = TOP + len(rows) * (BAR + GAP)
    lines = []
    for place, (name, one) in enumerate(rows):
        y, middle = TOP + place * (BAR + GAP), TOP + place * (BAR + GAP) + BAR / 2
        low, high = (LEFT + scale * end for end in one["interval"])
        kind = "dtrain" if name.startswith("dtrain") else "bar"
        lines += [
            f'<text x="{LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{scale * one["ratio"]:.1f}"'
            f' height="{BAR}"/>',
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"/>',
            f'<text x="{high + 8:.1f}" y="{middle + 4:.1f}">{one["ratio"]:.2f}</text>',
        ]
    one = every[0]
    what = f"{one['workload']}, {one['ranks']} ranks, {one['rounds']} rounds"
    at = LEFT + scale
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}"'
            f' height="{bottom + 12}" role="img">',
            f"<title>A step's time relative to a plain handwritten loop's: {escape(what)}</title>",
            f"<style>{STYLE}</style>",
            f'<text class="title" x="10" y="20">A step, relative to a plain handwritten loop'
            f" ({escape(what)})</text>",
            '<text class="note" x="10" y="38">Less is better. Bar: the median; whisker: the'
            " interval that it lies in with 95 % confidence.</text>",
            *lines,
            f'<path class="plain" d="M{at:.1f} {TOP - 6}V{bottom}"/>',
            "</svg>\n",
        ]
    )
