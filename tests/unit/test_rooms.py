"""The house: short modules, few of them outside of rooms, and a short path through a step."""

import ast
import subprocess
import sys
from pathlib import Path

import dtrain
from dtrain import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dtrain"
MODULES = sorted(PACKAGE.rglob("*.py"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_few_modules_stand_outside_of_rooms():
    assert len([path for path in MODULES if path.parent == PACKAGE]) <= 9


def test_modules_are_short():
    assert {str(path): lines(path) for path in MODULES if lines(path) > 400} == {
        str(PACKAGE / "trainer.py"): lines(PACKAGE / "trainer.py")
    }
    assert lines(PACKAGE / "trainer.py") <= 450
    assert lines(PACKAGE / "loop.py") <= 350


def test_a_step_is_short():
    tree = ast.parse((PACKAGE / "loop.py").read_text(encoding="utf-8"))
    (step,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_step"
    )
    assert step.end_lineno - step.lineno + 1 <= 40


def test_each_room_says_what_it_is_for():
    for door in PACKAGE.glob("*/__init__.py"):
        purpose = ast.get_docstring(ast.parse(door.read_text(encoding="utf-8")))
        assert purpose, door


def test_the_picture_of_the_rooms_is_current():
    command = [sys.executable, "tools/draw_rooms.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_picture_notices_a_new_arrow(tmp_path):
    for name in ("dtrain", "tools", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dtrain").unlink()
    (tmp_path / "tools").unlink()
    subprocess.run(["cp", "-r", str(PACKAGE), str(ROOT / "tools"), str(tmp_path)], check=True)
    with (tmp_path / "dtrain" / "metrics" / "means.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom dtrain.cluster import Signals\n")
    command = [sys.executable, str(tmp_path / "tools" / "draw_rooms.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "draw_rooms.py" in done.stdout


def test_all_errors_are_at_the_top():
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.DtrainError)
    }
    assert kinds <= set(dtrain.__all__)


def test_any_room_may_be_the_first_that_is_imported():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    rooms = sorted(part for part in parts if not part.startswith("_"))
    words = f"""
import sys
from importlib import import_module
for room in {rooms}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "dtrain"]:
        del sys.modules[name]
    import_module("dtrain." + room)
"""
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
