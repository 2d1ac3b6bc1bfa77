"""Parts of sharded parameters that several ranks hold: one in each replica of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from dtrain.distributed.exchange import digest_of
from dtrain.distributed.names import named_parameters
from dtrain.distributed.sharded import copies_of, is_sharded, own_part

_SHOWN = 3


def copied_parts(model: nn.Module) -> dict[str, Tensor]:
    """Returns what this rank holds of such parameters. Equal names are equal parts."""
    sharded = {name: p for name, p in named_parameters(model) if is_sharded(p)}
    return {
        f"{name} (part {_place(p)})": own_part(p.detach())
        for name, p in sharded.items()
        if copies_of(p) > 1
    }


def _place(tensor: Tensor) -> str:
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)  # type: ignore[attr-defined]
    return ", ".join(str(place) for place, kind in places if not kind.is_replicate())


def say(model: nn.Module, digests: Callable[[Iterable[Tensor]], list[int]]) -> list[int]:
    """Returns numbers for :func:`differ`; none where no other rank holds what this one does."""
    parts = copied_parts(model)
    if not parts:
        return []
    return [int(digest_of([*parts]), 16) >> 1, hash(tuple(digests(parts.values())))]


def differ(everyones: Tensor) -> bool:
    """Says whether ranks hold equal parts with other numbers, by what each said (a row of two)."""
    said = {(names, numbers) for names, numbers in everyones.tolist()}
    return len(said) > len({names for names, _ in said})


def apart(everyones: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Returns the parts that not all who hold them have alike, and the ranks that hold them."""
    held: dict[str, dict[int, int]] = {}
    for rank, parts in enumerate(everyones):
        for name, digest in parts.items():
            held.setdefault(name, {})[rank] = digest
    return {name: [*ranks] for name, ranks in held.items() if len({*ranks.values()}) > 1}


def describe(parted: Mapping[str, list[int]], when: str) -> str:
    """Returns in words which parts differ; at most three of them."""
    lines = [
        f"  {name}: ranks {' and '.join(map(str, ranks))}"
        for name, ranks in [*parted.items()][:_SHOWN]
    ]
    if len(parted) > _SHOWN:
        lines.append(f"  and {len(parted) - _SHOWN} more")
    return (
        f"the replicas of the sharded model were no longer equal {when}; these do not hold the "
        "same numbers:\n" + "\n".join(lines) + "\nNo checkpoint is made of them. "
    )
