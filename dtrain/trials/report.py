"""What a trial tells: a verdict, a table, and paragraphs."""

import textwrap
from dataclasses import dataclass

_WIDTH = 92


@dataclass(frozen=True, slots=True)
class TrialReport:
    """A report; ``str()`` of it is all of it, as plain text."""

    headline: str  # the verdict, in a sentence
    passed: bool
    columns: tuple[str, ...]
    rows: list[tuple[tuple[str, ...], bool]]  # and whether each is good
    paragraphs: list[str]  # what follows the table

    def __str__(self) -> str:
        lines = [self.columns, *(row for row, _ in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in lines
        )
        return "\n\n".join([self.headline, table, *self.paragraphs])


def fill(text: str, indent: str = "") -> str:
    """Returns a text broken into lines."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def and_more(lines: list[str], most: int) -> list[str]:
    """Returns the first lines, and how many there are beside them."""
    more = len(lines) - most
    return lines[:most] + [f"  and {more} more"] * (more > 0)


def plural(count: int, what: str) -> str:
    """Returns such as ``2 ranks``."""
    return f"{count} {what}{'s' * (count != 1)}"
