"""Whether a process on another host lives: its kernel takes a call for it even if it is held."""

import errno
import os
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from dtrain.distributed import Process

ANSWER_S = 2.0  # a call that is lost is repeated after one second
_CALLS = 1024  # so many are kept for a process that does not take them itself
_MEANS: dict[int, Process] = {0: "runs", errno.ECONNREFUSED: "gone"}  # of any other: "away"


class Door:
    """Where this process can be called: nobody says anything there, it only opens.

    Attributes:
        address: of this host, as the others reach it; nothing where that is not known.
        port: which the kernel has chosen.
    """

    def __init__(self) -> None:
        self.address, self.port = _own_address(), 0
        self._socket: socket.socket | None = None
        with suppress(OSError):
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._socket = socket.create_server(
                ("", 0), family=family, backlog=_CALLS, dualstack_ipv6=both
            )
            self._socket.setblocking(False)
            self.port = self._socket.getsockname()[1]

    def clear(self) -> None:
        """Takes and ends the calls that have come."""
        with suppress(OSError):
            while self._socket is not None:
                self._socket.accept()[0].close()

    def close(self) -> None:
        """Nobody can call any more."""
        if self._socket is not None:
            self._socket.close()


def _own_address() -> str:
    """Returns the address that this host has on its way to the rendezvous store."""
    host = os.environ.get("MASTER_ADDR", "")
    with suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # sends nothing
                return str(probe.getsockname()[0])
    return ""


def call(places: Mapping[int, tuple[str, int]]) -> dict[int, Process]:
    """Returns what became of each rank's process, called at an address and port; in two seconds.

    A host of the store's may know itself by a name that leads nowhere else: there it is called.
    """
    calls: dict[int, socket.socket] = {}
    found: dict[int, Process] = {}
    for rank, (address, port) in places.items():
        with suppress(OSError):
            if address.startswith("127.") or address == "::1":
                address = os.environ.get("MASTER_ADDR", address)
            found_at = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            family, kind, _, _, place = found_at[0]
            calls[rank] = one = socket.socket(family, kind)
            one.setblocking(False)
            one.connect_ex(place)
    until = time.monotonic() + ANSWER_S
    waiting = dict(calls)
    while waiting and (left_s := until - time.monotonic()) > 0:
        poll = select.poll()
        by_handle = {one.fileno(): rank for rank, one in waiting.items()}
        for handle in by_handle:
            poll.register(handle, select.POLLOUT)
        for handle, _ in poll.poll(left_s * 1000):
            rank = by_handle[handle]
            error = waiting.pop(rank).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            found[rank] = _MEANS.get(error, "away")
    found |= dict.fromkeys(waiting, "away")
    for one in calls.values():
        one.close()
    return found
