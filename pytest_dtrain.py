"""Fixtures for tests on many ranks; pytest finds them where dtrain is installed.

This module lies beside the package, not in it: pytest imports its plugins in every run, and the
package imports torch. Here dtrain is imported by the first test that asks for a fixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., list[Any]]

_MARKER = (
    "ranks(*world_sizes, timeout_s=...): runs the test once for each of these, as the argument "
    "`world_size`; and bounds all that the test does on ranks, in seconds."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the bound of every test to pytest's configuration."""
    parser.addini(
        "dtrain_timeout",
        "how long all that a test does on ranks may take, in seconds",
        default="30",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", _MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test its world sizes."""
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is not None and marker.args and "world_size" in metafunc.fixturenames:
        metafunc.parametrize("world_size", marker.args)


@pytest.fixture
def ranks_seconds_left(request: pytest.FixtureRequest) -> Callable[[], float]:
    """Tells how long what this test does on ranks may still take, in seconds."""
    marker = request.node.get_closest_marker("ranks")
    asked = None if marker is None else marker.kwargs.get("timeout_s")
    seconds = float(request.config.getini("dtrain_timeout") if asked is None else asked)
    deadline = time.monotonic() + seconds
    # Even where nothing is left, there is an error to be made that says who is where.
    return lambda: max(0.1, deadline - time.monotonic())


@pytest.fixture
def run_ranks(ranks_seconds_left: Callable[[], float]) -> Run:
    """``dtrain.testing.run_ranks``, bounded by what time the test has left."""
    from dtrain import testing

    return _bounded(testing.run_ranks, ranks_seconds_left)


@pytest.fixture
def try_ranks(ranks_seconds_left: Callable[[], float]) -> Run:
    """``dtrain.testing.try_ranks``, bounded by what time the test has left."""
    from dtrain import testing

    return _bounded(testing.try_ranks, ranks_seconds_left)


@pytest.fixture
def run_processes(ranks_seconds_left: Callable[[], float]) -> Run:
    """``dtrain.testing.run_processes``, bounded by what time the test has left."""
    from dtrain import testing

    return _bounded(testing.run_processes, ranks_seconds_left)


@pytest.fixture
def run_outcomes(ranks_seconds_left: Callable[[], float]) -> Run:
    """``dtrain.testing.run_outcomes``, bounded by what time the test has left."""
    from dtrain import testing

    return _bounded(testing.run_outcomes, ranks_seconds_left)


def _bounded(run: Run, seconds_left: Callable[[], float]) -> Run:
    def bounded(
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[Any]:
        left = seconds_left()
        bound = left if timeout_s is None else min(timeout_s, left)
        return run(fn, world_size, *args, timeout_s=bound, **options)

    return bounded
