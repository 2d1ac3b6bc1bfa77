"""What holds for all unit tests."""

from collections.abc import Iterator

import pytest

from dtrain.distributed import current


@pytest.fixture(autouse=True, scope="module")
def no_world_is_left() -> Iterator[None]:
    """Closes what a module's tests have opened: others find none."""
    yield
    world = current()
    if world is not None:
        world.close()
