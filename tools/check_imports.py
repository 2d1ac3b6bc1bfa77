"""Fails where torch.distributed is used by another room than those that may.

import-linter sees external packages only as a whole, and all of dtrain may import torch.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = "torch.distributed"
#: Verbs and groups; the store, which the watchdog reads; and strategies, which may bring their own.
ALLOWED = ("distributed", "watchdog", "strategies")


def uses(tree: ast.Module) -> Iterator[int]:
    """The lines that import torch.distributed or reach it as an attribute of torch."""
    torch_names = {"torch"}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                torch_names |= {a.asname for a in names if a.name == "torch" and a.asname}
                found = [a.name for a in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [f"{module}.{a.name}" for a in names]
            case _:
                continue
        if any(f"{name}.".startswith(f"{FORBIDDEN}.") for name in found):
            yield node.lineno
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr="distributed") if name in torch_names:
                yield node.lineno


def main() -> int:
    package = ROOT / "dtrain"
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0].removesuffix(".py") in ALLOWED:
            continue
        lines = sorted(set(uses(ast.parse(path.read_text(encoding="utf-8"), str(path)))))
        problems += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    for place in problems:
        print(f"{place}: {FORBIDDEN} is for the rooms {', '.join(ALLOWED)} only")
    if not problems:
        print(f"{FORBIDDEN} is used where it may be, and nowhere else.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
