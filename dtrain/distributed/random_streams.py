"""The random streams of this process: their seeds, and their state, for a checkpoint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from dtrain import accelerator


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


def has_seeded() -> bool:
    """Says whether the script has seeded torch, whose own choice of a seed is of 53 bits."""
    return torch.initial_seed() < 2**32


def random_state() -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's global generators."""
    state = random_state_of_host()
    if torch.cuda.is_initialized():  # else nobody has drawn there, and asking would take its memory
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
    except BaseException as error:
        with suppress(RuntimeError):  # of a device that has failed: the first error counts
            restore_random_state(_but_of_lost(before, error))
        raise
    restore_random_state(before)


def _but_of_lost(state: dict[str, Any], error: BaseException | None) -> dict[str, Any]:
    """Returns what of a state can be restored after ``error``."""
    return {k: v for k, v in state.items() if k != "cuda" or not accelerator.is_lost(error)}


@contextmanager
def streams_apart(*generators: torch.Generator, number: int, rank: int) -> Iterator[None]:
    """Gives the block streams of its own, made of the present ones, which stay as they are.

    So whether and how often one draws there changes nothing elsewhere. The ``generators`` are
    treated alike, but for the ``rank``: one that is equal on all ranks stays so.
    """
    states = [generator.get_state() for generator in generators]
    with random_state_kept():
        for generator in generators:
            generator.manual_seed(derive_seed(_draw(generator), number))
        seed_everything(_draw(None), number, rank)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _draw(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**62, (), generator=generator, device="cpu"))


class StreamsOfFits:
    """The global streams as all fits of one Trainer draw from them; the script's stay as they are.

    While it is entered, and after :meth:`begin`, what is drawn is the fits'.
    """

    def __init__(self) -> None:
        self._ours: dict[str, Any] | None = None  # where the fit before has left them
        self._begun = False

    def __enter__(self) -> "StreamsOfFits":
        self._scripts, self._begun = random_state(), False
        return self

    def begin(self) -> None:
        """From here on the streams are the fits'; a first one seeds or restores them next."""
        self._begun = True
        if self._ours is not None:
            restore_random_state(self._ours)

    def rest(self) -> None:
        """From here on they are the script's again, until :meth:`begin`."""
        self._ours, self._begun = random_state(), False
        restore_random_state(self._scripts)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A device that has failed may fail here as well; then the first error counts.
        with suppress(RuntimeError) if kind else nullcontext():
            if self._begun and not accelerator.is_lost(error):
                self._ours = random_state()
        with suppress(RuntimeError) if kind else nullcontext():
            restore_random_state(_but_of_lost(self._scripts, error))
