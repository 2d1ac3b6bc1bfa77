"""All ranks meet in the store before a group opens: who is missing, and who cannot work, is said.

A rank leaves there who it is; rank 0 reads it once all have come, and leaves what became of it,
which the others wait for. Each makes a few calls, however many there are.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.addresses import this_network, unreachable_by_gloo
from dtrain.distributed.rendezvous import KEYS_AT_ONCE, MET, Patience, read_all, refuse
from dtrain.errors import LaunchError

_NAMED = 8  # so many of those that are missing are named
_HEARD_S = 5.0  # how long rank 0 waits until all have heard of an error, and may end its store


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself.

    Attributes:
        network: names the network stack that it has.
        unreachable: why ranks of other hosts could not reach it, if so.
        card: the card that it is to use, if others might be given the same.
        sees: how many cards it sees, in words.
    """

    rank: int
    host: str
    pid: int
    network: str
    unreachable: str
    card: str = ""
    sees: str = ""

    @classmethod
    def of(
        cls, rank: int, address: str, *, several_hosts: bool, cards: tuple[str, str]
    ) -> "Arrival":
        """Describes this process, which meets the others at an address."""
        unreachable = unreachable_by_gloo(address) if several_hosts else ""
        host, network = socket.gethostname(), this_network()
        return cls(rank, host, os.getpid(), network, unreachable, *cards)


def meet(
    store: Store,
    mine: Arrival,
    size: int,
    said_by: str,
    timeout_s: float,
    check: Callable[[Sequence[Arrival]], None],
    *,
    afresh: bool,
) -> tuple[int, int]:
    """Returns this rank's number on its host, and how many are there; LaunchError if not all come.

    ``said_by`` says that there are ``size``; ``check``, which rank 0 calls, raises where they
    cannot work as they have come; ``afresh``: no earlier start has met here. Ranks: all.
    """
    patience, said = Patience(timeout_s, mine.rank), f"{size} ({said_by})"
    text = json.dumps(asdict(mine))
    try:
        came = store.compare_set(_key(mine.rank), "", text).decode()
        if came != text and not afresh:
            store.set(_key(mine.rank), text)  # of an attempt before
        elif came != text:
            other = Arrival(**json.loads(came))
            why = (
                f"rank {mine.rank} has come twice: it is process {other.pid} on {other.host}, and "
                f"process {mine.pid} on {mine.host}. Two jobs of {size} ranks use the same "
                "MASTER_PORT, or RANK was given twice: set MASTER_PORT to a free port, another for "
                "each job"
            )
            refuse(store, why)
            raise LaunchError(why)
        verdict = (
            _wait_as_0(store, size, said, patience, check)
            if mine.rank == 0
            else _wait(store, size, said, patience, mine.rank)
        )
        return _heed(store, mine.rank, size, verdict)
    except LaunchError:
        raise
    except RuntimeError as error:
        raise LaunchError(
            f"the rendezvous store went away while rank {mine.rank} waited for all {said} ranks: "
            f"who served it (rank 0's host, or torchrun) has ended. {str(error).splitlines()[0]}"
        ) from None
    except BaseException as error:  # Ctrl-C, a signal: the others need not wait
        with suppress(RuntimeError):
            refuse(store, f"rank {mine.rank} on {mine.host} left before all had come: {error!r}")
        raise


def _wait_as_0(
    store: Store,
    size: int,
    said: str,
    patience: Patience,
    check: Callable[[Sequence[Arrival]], None],
) -> str:
    """Waits for all, and says what came of it. Ranks: rank 0 only."""

    def tell() -> str:
        words = f"waiting for {_missing(store, size)} of {said}"
        store.set("waiting", words)
        return words

    for ranks in _batches(size):
        keys = [_key(rank) for rank in ranks]
        while not store.check(keys):
            if store.check([MET]):
                return store.get(MET).decode()
            if patience.is_over:
                return refuse(store, _late(f"{_missing(store, size)} of {said}", patience))
            patience.say(tell)
            patience.wait(1)
    arrivals = _read(store, size)
    try:
        check(arrivals)
        _check_reachable(arrivals)
    except LaunchError as error:
        return refuse(store, str(error))
    places = [(one.host, one.network) for one in arrivals]
    sizes, came = Counter(places), Counter[tuple[str, str]]()
    local = []
    for place in places:
        local.append((came[place], sizes[place]))
        came[place] += 1
    return store.compare_set(MET, "", json.dumps({"error": "", "local": local})).decode()


def _wait(store: Store, size: int, said: str, patience: Patience, rank: int) -> str:
    """Waits for what rank 0 says."""
    tells = rank <= _NAMED

    def tell() -> str:
        return "" if not tells or store.check([_key(0)]) else f"waiting for rank 0 of {said}"

    while not store.check([MET]):
        if patience.is_over:
            who = f"rank 0 of {said}"
            if store.check([_key(0)]):
                words = store.get("waiting").decode() if store.check(["waiting"]) else "others"
                who = words.removeprefix("waiting for ")
            return refuse(store, _late(who, patience))
        patience.say(tell)
        patience.wait(size)
    return store.get(MET).decode()


def _heed(store: Store, rank: int, size: int, verdict: str) -> tuple[int, int]:
    told = json.loads(verdict)
    if not told["error"]:
        number, here = told["local"][rank]
        return number, here
    # Rank 0 may take the store with it, so it is the last to leave.
    heard, patience = store.add("heard", 1), Patience(_HEARD_S, rank)
    while rank == 0 and heard < size - len(_absent(store, size)) and not patience.is_over:
        patience.wait(1)
        heard = store.add("heard", 0)
    raise LaunchError(told["error"])


def _late(who: str, patience: Patience) -> str:
    return (
        f"still missing after {patience.so_far_s:.0f} s (dtrain.init(timeout_s=...)): {who}. Was "
        "each rank started (`srun`, torchrun), with the same MASTER_ADDR and MASTER_PORT, and did "
        "it come as far as dtrain.init? Its own log may say why not. For a single process, unset "
        "the variable that says there are more."
    )


def _check_reachable(arrivals: Sequence[Arrival]) -> None:
    """Raises where ranks of one host could not be reached by those of another."""
    if len({one.network for one in arrivals}) == 1:
        return
    whys = list(dict.fromkeys(one.unreachable for one in arrivals if one.unreachable))
    if whys:
        more = f"; and {len(whys) - _NAMED} more" * (len(whys) > _NAMED)
        raise LaunchError(
            "gloo listens at the address that a host's own name resolves to, and other hosts could "
            f"not reach it there: {'; '.join(whys[:_NAMED])}{more}. On those hosts, set "
            "GLOO_SOCKET_IFNAME to the interface by which the others reach it (`ip -brief address` "
            "lists them), or give the name its address in /etc/hosts."
        )


def _missing(store: Store, size: int) -> str:
    absent = _absent(store, size)
    names = ", ".join(map(str, absent[:_NAMED]))
    more = f" and {len(absent) - _NAMED} more" * (len(absent) > _NAMED)
    return f"rank{'s' * (len(absent) > 1)} {names}{more}"


def _absent(store: Store, size: int) -> list[int]:
    return [
        rank
        for ranks in _batches(size)
        if not store.check([_key(rank) for rank in ranks])
        for rank in ranks
        if not store.check([_key(rank)])
    ]


def _read(store: Store, size: int) -> list[Arrival]:
    texts = read_all(store, [_key(rank) for rank in range(size)])
    return [Arrival(**json.loads(text)) for text in texts]


def _batches(size: int) -> list[range]:
    firsts = range(0, size, KEYS_AT_ONCE)
    return [range(first, min(first + KEYS_AT_ONCE, size)) for first in firsts]


def _key(rank: int) -> str:
    return f"came/{rank}"
