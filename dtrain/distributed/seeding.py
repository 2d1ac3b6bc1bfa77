"""Seeds of all random streams.

Ranks: all, local.
"""

from __future__ import annotations

import random

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
    """Returns a generator of torch's for the stream that ``stream`` numbers.

    Ranks: all, local.
    """
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, *stream))
    return generator
