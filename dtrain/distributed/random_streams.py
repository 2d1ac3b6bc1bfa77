"""The random streams of this process: their seeds, and their state, for a checkpoint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *stream: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from ``seed`` and a stream's numbers."""
    derived = derive_seed(seed, *stream) if stream else seed
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)


def derive_seed(seed: int, *stream: int) -> int:
    """Returns a 63-bit seed for the stream that ``stream`` numbers; streams are independent."""
    # The length goes in as well: SeedSequence takes [1] and [1, 0] for the same.
    words = np.random.SeedSequence([seed, len(stream), *stream]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def seeded_generator(seed: int, *stream: int) -> torch.Generator:
    """Returns a generator of torch's for the stream that ``stream`` numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


def random_state() -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's global generators."""
    state = random_state_of_host()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def random_state_of_host() -> dict[str, Any]:
    """Returns the state of the generators that draw on the CPU, and touches no GPU."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    words = np.asarray(keys).tolist()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), words, int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores what :func:`random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Keeps the global generators as they were, whatever is drawn inside."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)
