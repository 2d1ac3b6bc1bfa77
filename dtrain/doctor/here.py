"""What one process can see by itself: versions, devices, the host, the folder."""

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dtrain.doctor.findings import Finding

_PACKAGES = ("dtrain", "torch", "accelerate", "numpy", "safetensors")
_MB, _GB = 2**20, 2**30
_FEW_FILES = 4096
_PROBE_MB = 64
_SLOW_MB_S = 20.0
_USUAL_PORT = 29500  # torchrun's, where it is given none


def versions() -> dict[str, str]:
    """Returns the versions that must be alike on all ranks, by package. Ranks: all, local."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    # What is imported is what counts.
    return found | {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}


def look_here(run_dir: Path, *, local_ranks: int, alone: bool) -> list[Finding]:
    """Looks at this process's host. Ranks: all, local."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _devices,
        lambda: _cores(local_ranks),
        _host_name,
        lambda: _master(alone),
        _interfaces,
        _shared_memory,
        _limits,
        lambda: _folder(run_dir),
    )
    return [finding for check in checks for finding in check()]


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        told = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield Finding("fine", "devices", f"{told}, CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi") or [*Path("/dev").glob("nvidia[0-9]*")]:
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        if asked is not None:
            yield Finding(
                "note",
                "devices",
                f"GPUs are there, and CUDA_VISIBLE_DEVICES={asked!r} leaves none",
                "ranks compute on CPUs; unset it if that is not meant",
            )
        else:
            yield Finding(
                "wrong",
                "devices",
                f"GPUs are there, and torch {torch.__version__} (CUDA {torch.version.cuda}) "
                "cannot use them",
                "install the build of torch that fits the driver (nvidia-smi says up to which "
                "CUDA it goes), or set CUDA_VISIBLE_DEVICES= to compute on CPUs",
            )
    else:
        yield Finding("fine", "devices", "no GPU: ranks compute on CPUs")


def _cores(local_ranks: int) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    words = f"{cores} of {os.cpu_count()} for {local_ranks} rank{'s' * (local_ranks > 1)}"
    threads = torch.get_num_threads()
    if local_ranks > cores:
        yield Finding("note", "cores", words, "ranks share cores: a step takes that much longer")
    elif threads * local_ranks > cores > 1:
        yield Finding(
            "note",
            "cores",
            f"{words}, with {threads} threads each",
            f"set OMP_NUM_THREADS={max(1, cores // local_ranks)}: threads that share cores wait "
            "for one another",
        )
    else:
        yield Finding("fine", "cores", words)


def _host_name() -> Iterator[Finding]:
    name = socket.gethostname()
    began = time.perf_counter()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        yield Finding(
            "note",
            "host name",
            f"{name} does not resolve: {error}",
            f"add it to /etc/hosts (10.0.0.1 {name}) or the name server: other hosts cannot find "
            "rank 0 by it, and starts may take seconds",
        )
        return
    took_s = time.perf_counter() - began
    if took_s > 1:
        yield Finding(
            "note",
            "host name",
            f"looking up {name} took {took_s:.1f} s",
            "mend the name server, or add it to /etc/hosts",
        )
    else:
        yield Finding("fine", "host name", f"{name} resolves")


def _master(alone: bool) -> Iterator[Finding]:
    address, given = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            yield Finding(
                "wrong",
                "MASTER_ADDR",
                f"{address} does not resolve: {error}",
                "give rank 0's address, or a name that each host knows",
            )
    if not alone:
        return  # ranks have met, or have said why not
    port = int(given) if given and given.isdecimal() else _USUAL_PORT
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError as error:
            whose = f"MASTER_PORT={port}" if given else f"{port}, torchrun's usual one,"
            yield Finding(
                "wrong" if given else "note",
                "port",
                f"{whose} is taken: {error.strerror}",
                "set MASTER_PORT to a free one, alike for all ranks, or start with "
                "`torchrun --standalone`, which finds one",
            )
            return
    yield Finding("fine", "port", f"{port} is free")


def _interfaces() -> Iterator[Finding]:
    names = [name for _, name in socket.if_nameindex()]
    yield Finding("fine", "interfaces", ", ".join(names))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes beginnings of names, "=" before a whole one, and "^" before those it is not.
        asked = [n for n in os.environ.get(variable, "").split(",") if n and n[0] != "^"]
        wrong = [name for name in asked if not any(n.startswith(name.lstrip("=")) for n in names)]
        if wrong:
            yield Finding(
                "wrong",
                "interfaces",
                f"{variable}={os.environ[variable]} names {', '.join(wrong)}, which is not here",
                f"one of {', '.join(names)}, or unset it",
            )


def _shared_memory() -> Iterator[Finding]:
    try:
        room = shutil.disk_usage("/dev/shm")
    except OSError as error:
        yield Finding(
            "note", "shared memory", f"no /dev/shm: {error.strerror}", "data workers need it"
        )
        return
    words = f"{_size(room.total)} in /dev/shm, {_size(room.free)} free"
    if room.free < 512 * _MB:
        yield Finding(
            "note",
            "shared memory",
            words,
            "data workers hand batches over there, and end with 'Bus error' once it is full: "
            "`docker run --shm-size=8g` or --ipc=host, in Kubernetes an emptyDir of medium Memory; "
            "or Data(..., workers=0)",
        )
    else:
        yield Finding("fine", "shared memory", words)


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        higher = "" if most == files else f" (`ulimit -n {most}` is allowed)"
        yield Finding(
            "note" if files >= 256 else "wrong",
            "open files",
            f"at most {files} in a process",
            f"data workers and connections to many ranks take more: raise `ulimit -n`{higher}",
        )
    else:
        yield Finding("fine", "open files", f"up to {files}")


def _folder(run_dir: Path) -> Iterator[Finding]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=run_dir) as folder:
            speed = _write_speed(Path(folder))
        room = shutil.disk_usage(run_dir)
    except OSError as error:
        yield Finding(
            "wrong",
            "run_dir",
            f"{run_dir} cannot be written: {error.strerror or error}",
            "choose another --run-dir, or mend its rights, its quota or its disk",
        )
        return
    words = f"{run_dir}: {_size(room.free)} free, {speed:.0f} MB/s down to the disk"
    if speed < _SLOW_MB_S:
        yield Finding(
            "note",
            "run_dir",
            words,
            "checkpoints take long: training goes on while they are written, but one waits for "
            "the one before",
        )
    elif room.free < 2 * _GB:
        yield Finding(
            "note", "run_dir", words, "room for few checkpoints: Checkpoint(keep=1), or tidy up"
        )
    else:
        yield Finding("fine", "run_dir", words)


def _write_speed(folder: Path) -> float:
    """Returns MB in a second; raises OSError where a file cannot be written, synced or renamed."""
    content = os.urandom(_MB) * _PROBE_MB
    began = time.perf_counter()
    with (folder / "aside").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    took_s = time.perf_counter() - began
    (folder / "there").touch()
    os.replace(folder / "aside", folder / "there")
    if (folder / "there").stat().st_size != len(content):
        raise OSError("a file that was renamed over another has not taken its place")
    return _PROBE_MB / took_s


def _size(count: float) -> str:
    return f"{count / _GB:.1f} GiB" if count >= _GB else f"{count / _MB:.0f} MiB"


def differing(of_ranks: Mapping[int, Mapping[str, str]]) -> Iterator[Finding]:
    """Compares versions over ranks."""
    for package in dict.fromkeys(name for held in of_ranks.values() for name in held):
        ranks: dict[str, list[int]] = {}
        for rank, held in of_ranks.items():
            ranks.setdefault(held.get(package, "none"), []).append(rank)
        if len(ranks) > 1:
            told = ", ".join(f"{one} on rank {_first(who)}" for one, who in ranks.items())
            yield Finding(
                "wrong",
                "versions",
                f"{package}: {told}",
                "install the same everywhere (the same environment or container on each host)",
            )


def _first(ranks: list[int]) -> str:
    told = ", ".join(map(str, ranks[:8]))
    return told if len(ranks) <= 8 else f"{told} and {len(ranks) - 8} more"
