"""What a machine without a network lacks: packed on one that has a network, unpacked there.

    python tools/wheels.py pack FOLDER 3.12        # for that Python, on Linux, x86-64
    python tools/wheels.py unpack FOLDER TARGET    # what is not installed here; no pip is needed

Packed is all that training with dtrain and the tests of tests/gpu import, except for torch and
what that brings, in the versions that are installed where it is packed.
"""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

WANTED = ["accelerate", "numpy", "rich", "safetensors", "pytest"]
GIVEN = "torch"
#: pip matches exactly these.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
]


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def closure(names: list[str], python: str) -> set[str]:
    """Returns the packages that these need, themselves included."""
    from packaging.requirements import Requirement

    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "extra": "",
    }
    found: set[str] = set()
    waiting = [normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate(environment):
                waiting.append(normal(needed.name))
    return found


def pack(folder: Path, python: str) -> None:
    names = sorted(closure(WANTED, python) - closure([GIVEN], python))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, *(f"{name}=={metadata.version(name)}" for name in names)], check=True)
    wheels = list(folder.glob("*.whl"))
    mib = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{len(wheels)} wheels for Python {python}, {mib:.0f} MiB, are in {folder}")


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def unpack(folder: Path, target: Path) -> None:
    brought = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if not is_installed(normal(name)):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(target)
            brought.append(f"{normal(name)} {version}")
    print(f"taken from {folder}: {', '.join(brought) or 'nothing, all of it is installed'}")


if __name__ == "__main__":
    verb, first, second = sys.argv[1:]
    if verb == "pack":
        pack(Path(first), second)
    elif verb == "unpack":
        unpack(Path(first), Path(second))
    else:
        sys.exit(f"wheels.py: {verb!r} is neither pack nor unpack")
