"""Fails where torch.distributed is used above `dtrain.callback`, strategies excepted.

import-linter sees external packages only as a whole, and all of dtrain may import torch. So this
reads the layers that pyproject.toml gives import-linter and checks the rest.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = "torch.distributed"


def allowed_modules() -> set[str]:
    """The children of dtrain that may: what the layers list below `callback`, and strategies."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    rows = [[name.strip(" ()") for name in row.split(":")] for row in layers]
    below = next(i for i, row in enumerate(rows) if "callback" in row) + 1
    return {"strategies"}.union(*rows[below:])


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
    allowed = allowed_modules()
    package = ROOT / "dtrain"
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0].removesuffix(".py") in allowed:
            continue
        lines = sorted(set(uses(ast.parse(path.read_text(encoding="utf-8"), str(path)))))
        problems += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    for place in problems:
        print(f"{place}: {FORBIDDEN} is for strategies and the modules below dtrain.callback only")
    if not problems:
        print(f"{FORBIDDEN} is used where it may be, and nowhere else.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
