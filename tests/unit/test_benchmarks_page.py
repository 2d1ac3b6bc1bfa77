"""Each file of benchmarks/ stands in its table, with who quotes it or uses it."""

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ROW = re.compile(r"^\| \[([\w./]+)\]\(\1\) \|.*\| (.+) \|$", re.MULTILINE)


def table():
    return dict(ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8")))


def test_the_table_has_each_file_and_no_other():
    files = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(table()) == files - {"README.md"}


def test_the_page_quotes_it_and_the_file_uses_it():
    for file, used in table().items():
        if page := re.search(r"\]\((.+)\)", used):
            assert f"benchmarks/{file}" in (FOLDER / page[1]).read_text(encoding="utf-8"), file
        else:  # directly, or by way of a part
            text = (FOLDER / used).read_text(encoding="utf-8")
            parts = [text, *(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))]
            name = Path(file).stem
            found = (rf"^\s*(from|import) {name}\b", rf"benchmarks/{file}", rf"{name}\.json")
            assert any(re.search(one, part, re.MULTILINE) for one in found for part in parts), file
