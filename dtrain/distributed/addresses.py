"""Whether names of hosts lead to where ranks can meet, looked up once and within a bound."""

import fcntl
import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

_LOOK_UP_S = 10.0  # a name server that is asked in vain answers no sooner than after 5 s
_SIOCGIFADDR = 0x8915


def addresses_of(name: str, port: int = 0) -> tuple[list[str], str]:
    """Returns what a host's name resolves to, or nothing and why it does not."""
    found: list[str] = []
    why = [f"no answer in {_LOOK_UP_S:g} s"]

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            found.extend(str(where[0]) for *_, where in answers)
            why[0] = ""
        except (OSError, UnicodeError) as error:
            why[0] = str(getattr(error, "strerror", None) or error)

    # In a thread: nothing bounds the time that the C library takes.
    asking = threading.Thread(target=look_up, name="dtrain look-up", daemon=True)
    asking.start()
    asking.join(_LOOK_UP_S)
    return list(dict.fromkeys(found)), why[0]


def is_loopback(address: str) -> bool:
    """Says whether an address leads to this host itself, on whichever host it is used."""
    return address.startswith("127.") or address == "::1"


def this_network() -> str:
    """Names the network stack that this process has, apart from those of other hosts."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def unreachable_by_gloo(meeting_at: str) -> str:
    """Says why other hosts cannot reach the address at which gloo will listen; nothing if they can.

    It listens at the first address of this host's own name that is this host's, else on loopback.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    name = socket.gethostname()
    found, why = addresses_of(name)
    first = next(filter(_is_own, found), "")
    if first and not is_loopback(first):
        return ""
    if first:
        what = f"its own name resolves to {first}, which is loopback"
    elif found:
        what = f"its own name resolves to {found[0]}, which is no address of its own"
    else:
        what = f"its own name does not resolve ({why})"
    interface = _interface_towards(meeting_at)
    return f"{name}: {what} (GLOO_SOCKET_IFNAME={interface or '...'})"


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family) as probe:
        probe.bind((address, 0))
        return True
    return False


def _interface_towards(host: str) -> str:
    """Returns the interface by which this host reaches another, where that is no loopback."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, interface in socket.if_nameindex():
            if interface == "lo":
                continue
            with suppress(OSError):  # one without an address
                asked = struct.pack("256s", interface.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
                # On the host that is reached itself, any other than loopback is as good a guess.
                if is_loopback(own) or socket.inet_ntoa(answer[20:24]) == own:
                    return interface
    return ""
