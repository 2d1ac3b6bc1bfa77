"""Numbers of a comparison as people say them."""

import math
import re
from collections.abc import Iterable

from dtrain.studies.pick import Pick

#: What is a share of all, and told in points of a hundred.
_SHARES = " acc accuracy auc auroc f1 precision recall iou miou dice top1 top5 map ap "


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Says whether a metric is a share of all, which people tell in points of a hundred."""
    words = metric.lower().replace("/", "_").replace("-", "_").split("_")
    return any(word and f" {word} " in _SHARES for word in words) and all(
        0 <= value <= 1 for value in values
    )


def size(difference: float, scale: float, pick: Pick, share: bool) -> str:
    """Returns such as ``0.4 points better``."""
    better = (difference > 0) == (pick.mode == "max")
    unit = " points" if share else ""
    return f"{plain(abs(difference), scale, share)}{unit} {'better' if better else 'worse'}"


def plain(value: float, scale: float, share: bool) -> str:
    """Returns a number, or the points of a share."""
    return number(100 * value, 100 * scale) if share else number(value, scale)


def number(value: float, scale: float) -> str:
    """Returns a number with two digits of its scale, such as its spread."""
    if not (value and scale and math.isfinite(scale)):
        return f"{value:z.4g}"
    digits = 1 - math.floor(math.log10(abs(scale)))
    if digits > 6 or abs(value) >= 1e6:
        whole = math.floor(math.log10(abs(value))) + digits + 1
        return f"{value:.{min(9, max(2, whole))}g}"
    return f"{value:z.{max(0, digits)}f}"


def signed(value: float, scale: float) -> str:
    """Returns such a number with its sign."""
    text = number(value, scale)
    return text if text.startswith("-") else f"+{text}"


def escaped(text: str) -> str:
    """Returns a text in which Markdown finds no marks."""
    return re.sub(r"([\\|*_<>`\[\]~$])", r"\\\1", " ".join(text.split()))


def cut(text: str, most: int = 120) -> str:
    """Returns a text that is no longer than that."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."
