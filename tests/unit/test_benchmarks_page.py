"""Each file of benchmarks/ stands in its table and is quoted or used; each test on a GPU is run."""

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
        if not path.match("results/*.txt")  # what gpu_check.sh said; git ignores it
    }
    assert set(table()) == files - {"README.md"}


def test_a_page_quotes_it_or_a_file_imports_it():
    sources = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")]
    for file, used in table().items():
        if page := re.search(r"\]\((.+)\)", used):
            assert f"benchmarks/{file}" in (FOLDER / page[1]).read_text(encoding="utf-8"), file
        else:
            imported = re.compile(rf"^\s*(from|import) {Path(file).stem}\b", re.MULTILINE)
            assert (FOLDER / used).exists(), file
            assert any(imported.search(source) for source in sources), file


def test_each_test_on_a_gpu_is_run_and_told_of():
    root = FOLDER.parent
    script = (root / "launch" / "gpu_check.sh").read_text(encoding="utf-8")
    page = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    for path in (root / "tests" / "gpu").glob("test_*.py"):
        assert f" {path.name}\n" in script, path.name
        assert f"| `tests/gpu/{path.name}` |" in page, path.name
