"""Puts what runs tell into one HTML file, which needs no server and no network."""

import base64
import gzip
import html
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError
from dtrain.report.runs import RunStory
from dtrain.studies import Table


def make_page(runs: Sequence[RunStory], table: Table | None = None, *, title: str = "") -> str:
    """Returns the page, some 2 MB of which are the library that draws.

    Raises ConfigError where that is not installed.
    """
    told: dict[str, Any] = {"made": time.time(), "runs": [asdict(run) for run in runs]}
    if table is not None:
        told["table"] = {
            "heading": table.heading,
            "columns": list(table.columns),
            "rows": [list(table.cells(row)) for row in table.rows],
            "sentences": table.sentences,
            "method": table.method,
        }
    parts = {
        "TITLE": html.escape(title or ", ".join(run.name for run in runs)),
        "STYLE": _own("page.css"),
        "DATA": _in_script(json.dumps(told, allow_nan=False, default=str)),
        "LIBRARY": _library(),
        "SCRIPT": _own("page.js"),
    }
    # In one go: what is put in is not looked through.
    pieces = re.split(r"<!-- ([A-Z]+) -->", _own("page.html"))
    return "".join(parts[p] if n % 2 else p for n, p in enumerate(pieces))


def _in_script(text: str) -> str:
    """Returns JSON that ends no script element, whatever it holds."""
    return text.replace("<", "\\u003c")


def _own(name: str) -> str:
    return (files("dtrain.report") / name).read_text(encoding="utf-8")


def _library() -> str:
    """Returns plotly.js, packed: by itself it has nearly 5 MB."""
    found = find_spec("plotly")  # not imported: that takes a while, and is not needed
    if found is None or found.origin is None:
        raise ConfigError(
            "a page with pictures needs the package plotly: pip install 'dtrain[report]'"
        )
    source = Path(found.origin).parent / "package_data" / "plotly.min.js"
    try:
        return base64.b64encode(gzip.compress(source.read_bytes(), 9, mtime=0)).decode()
    except OSError as error:
        raise ConfigError(f"plotly's own script cannot be read: {error}") from error
