"""Draws dtrain's rooms and which of them imports which, into docs/design.md.

python tools/draw_rooms.py            writes the picture anew
python tools/draw_rooms.py --check    only says whether it is current: status 1 if not

An arrow points from a room to one that it imports. Arrows that follow from others are left out of
the picture (A to C, where A points to B and B to C), and are in the table.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dtrain"
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- rooms: made by tools/draw_rooms.py -->", "<!-- end of rooms -->"

Arrows = dict[str, set[str]]


def room_of(path: Path) -> str:
    """The room, or the module directly in dtrain/, that a file is of."""
    first, *rest = path.relative_to(PACKAGE).parts
    return first if rest else first.removesuffix(".py")


def arrows() -> Arrows:
    """Which rooms each room imports."""
    found: Arrows = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room in ("__init__", "__main__", "api"):
            continue  # the public face: it names what users import
        imported = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dtrain."):
                imported.add(str(node.module).split(".")[1])
        imported.discard(room)
    return found


def reachable(room: str, found: Arrows) -> set[str]:
    """The rooms that are reached from one, over any number of arrows."""
    seen: set[str] = set()
    todo = [room]
    while todo:
        new = found[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def needed(found: Arrows) -> Arrows:
    """The arrows that do not follow from others."""
    return {
        room: {
            to
            for to in direct
            if not any(to in reachable(other, found) for other in direct if other != to)
        }
        for room, direct in found.items()
    }


def purpose(room: str) -> str:
    """The first sentence of the room's docstring."""
    path = PACKAGE / room / "__init__.py"
    if not path.exists():
        path = PACKAGE / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def picture() -> str:
    """The passage, between its marks."""
    found = arrows()
    height: dict[str, int] = {}
    for room in sorted(found, key=lambda room: (len(reachable(room, found)), room)):
        height[room] = 1 + max((height[to] for to in found[room]), default=0)
    from_the_top = sorted(found, key=lambda room: (-height[room], room))
    lines = [BEGIN, "```mermaid", "graph TD"]
    arrows_kept = needed(found)
    for room in from_the_top:
        lines += [f"    {room} --> {to}" for to in sorted(arrows_kept[room])]
    lines += ["```", "", "| room | what it is for | imports |", "|---|---|---|"]
    for room in from_the_top:
        name = f"`{room}/`" if (PACKAGE / room).is_dir() else f"`{room}.py`"
        imports = ", ".join(sorted(found[room])) or "nothing of dtrain"
        lines.append(f"| {name} | {purpose(room)} | {imports} |")
    return "\n".join([*lines, END])


def main(arguments: list[str]) -> int:
    """Writes or checks the passage; returns an exit code."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    current = before + picture() + after
    if "--check" not in arguments:
        PAGE.write_text(current, encoding="utf-8")
        return 0
    if current != text:
        print("docs/design.md shows other rooms than there are: run python tools/draw_rooms.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
