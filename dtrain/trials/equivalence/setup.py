"""One configuration of a script: on how many ranks, in how many micro-batches, without what."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

#: What makes numbers depend on the number of ranks, and can be taken out of a script's training.
#: ``--allow`` takes these, and takes them out; experiments do the same.
SWITCHES = {
    "dropout": "dropout is switched off",
    "batchnorm": "BatchNorm runs in eval mode",
    "augmentation": "each sample's random augmentation is seeded by its index",
    "mixup": "Mixup is left out",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """How a script is to be run by the probe.

    Attributes:
        ranks: how many.
        micro_batches: into how many each rank's share is split.
        steps: global steps to take.
        double: compute everything in float64.
        without: names from :data:`SWITCHES`.
        twins: every rank gets rank 0's samples and random streams, so that whatever still
            differs between ranks depends on the rank.
        examine: look at the loss function and the data after the last step.
        batch_size: to be used in place of the script's own.
    """

    ranks: int
    micro_batches: int
    steps: int
    double: bool = True
    without: tuple[str, ...] = ()
    twins: bool = False
    examine: bool = False
    batch_size: int | None = None

    @property
    def title(self) -> str:
        """For people: ``2 ranks x 1 micro-batch``."""
        return (
            f"{self.ranks} rank{'s' * (self.ranks > 1)} x "
            f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}"
        )

    def to_json(self) -> str:
        """Returns it as text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """Returns what :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**(values | {"without": tuple(values["without"])}))
