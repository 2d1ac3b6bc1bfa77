"""Two or more "hosts" on one machine: network namespaces on a bridge, whose cables can be pulled.

All of it lies in namespaces of its own, named after this process: nothing is added to the machine's
own network, two runs do not meet, and deleting the namespaces leaves nothing behind. Each command
has its own space of process numbers, so that ranks cannot ask the kernel about those of another
host, and none of a host's processes outlives it. Hosts share the file system, as clusters do.

Needs root, Linux and iproute2; libfaketime where clocks are to differ.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_numbers = itertools.count()
_SWITCH = "switch"
_CALL_S = 10.0
_INSTALL_S = 90.0
_PACKAGES = {"ip": "iproute2", "unshare": "util-linux", "faketime": "faketime"}

# The first process in a host. It ends once no other process of the host is left.
_INIT = """
import os, socket, subprocess, sys
name, etc, *command = sys.argv[1:]
socket.sethostname(name)
for file in os.listdir(etc):
    subprocess.run(["mount", "--bind", f"{etc}/{file}", f"/etc/{file}"], check=True)
code = subprocess.run(command).returncode
while True:
    try:
        os.wait()
    except ChildProcessError:
        sys.exit(code)
"""


def missing():
    """Says why there can be no hosts here; nothing if there can. Installs what it takes."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    packages = [package for tool, package in _PACKAGES.items() if shutil.which(tool) is None]
    if packages and shutil.which("apt-get"):
        install = f"apt-get update -qq && apt-get install -qq {' '.join(packages)}"
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["sh", "-c", install], env=env, capture_output=True, text=True, timeout=_INSTALL_S
        )
        return f"{install}: {done.stderr}" if done.returncode else ""
    return f"not installed: {', '.join(packages)}" if packages else ""


class Hosts:
    """Hosts that see each other; as a context manager it ends them and takes them down.

    Args:
        names: of the hosts, which they find in their /etc/hosts.
    """

    def __init__(self, *names):
        self.names = names
        self._prefix = f"dtrain-{os.getpid()}-{next(_numbers)}"
        self._made = []
        self._running = []
        self._etc = tempfile.TemporaryDirectory(prefix=self._prefix)

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc):
        self._remove()

    def address(self, name):
        """The address of a host."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def add_name(self, address, name):
        """Has all hosts find ``name`` at an address before any other that it has."""
        file = Path(self._etc.name, "hosts")
        file.write_text(f"{address} {name}\n{file.read_text()}")

    def start(self, name, command, *, log, cwd, env):
        """Starts a command on a host; returns its process, whose end is that of all it started."""
        inside = ["setpriv", "--pdeathsig", "KILL", "unshare", "--uts", "--mount"]
        inside += ["--pid", "--mount-proc", "--fork", "--kill-child"]
        init = [sys.executable, "-I", "-S", "-c", _INIT, name, self._etc.name, *command]
        with Path(log).open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._space(name), *inside, *init],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        return process

    def cut(self, name):
        """Pulls a host's cable."""
        self._in(_SWITCH, "link", "set", f"to-{name}", "down")

    def join(self, name):
        """Plugs it in again."""
        self._in(_SWITCH, "link", "set", f"to-{name}", "up")

    def _space(self, name):
        return f"{self._prefix}-{name}"

    def _build(self):
        lines = [f"{self.address(name)} {name}\n" for name in self.names]
        Path(self._etc.name, "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        # There is no name server to wait for.
        Path(self._etc.name, "nsswitch.conf").write_text("passwd: files\nhosts: files\n")
        for name in (_SWITCH, *self.names):
            self._ip("netns", "add", self._space(name))
            self._made.append(name)
        self._in(_SWITCH, "link", "add", "bridge", "type", "bridge")
        self._in(_SWITCH, "link", "set", "bridge", "up")
        for name in self.names:
            cable = ("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0")
            self._in(_SWITCH, *cable, "netns", self._space(name))
            self._in(_SWITCH, "link", "set", f"to-{name}", "master", "bridge", "up")
            self._in(name, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            self._in(name, "link", "set", "lo", "up")
            self._in(name, "link", "set", "eth0", "up")

    def _remove(self):
        # With unshare ends the first process of its space of processes, and with that one the rest.
        for process in self._running:
            process.kill()
            process.wait(_CALL_S)
        for name in self._made:
            self._ip("netns", "delete", self._space(name))
        self._etc.cleanup()

    def _in(self, name, *words):
        self._ip("-n", self._space(name), *words)

    def _ip(self, *words):
        done = subprocess.run(
            ["ip", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CALL_S,
        )
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
