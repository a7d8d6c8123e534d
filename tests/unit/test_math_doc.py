"""docs/math.md names a function and a test for every equation: each name is one that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
OBJECTIVES = ROOT / "fuserl_megatron" / "objectives"


def functions(file):
    return {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


DEFINED = set().union(*(functions(file) for file in OBJECTIVES.glob("*.py")))
TESTS = {file.name: functions(file) for file in (ROOT / "tests").rglob("test_*.py")}


def equations():
    """Rows of the tables whose head has a column `function`: the row and that column's cell."""
    column = None
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "").split("|")[1:-1]] if line.startswith("|") else []
        if "function" in cells:
            column = cells.index("function")
        elif not cells:
            column = None
        elif column is not None and not set(cells[0]) <= set("-:"):
            yield line, cells[column]


def test_every_equation_has_a_function_that_exists():
    rows = list(equations())
    assert len(rows) > 25
    for line, cell in rows:
        names = re.findall(r"`(\w+)`", cell)
        assert names and set(names) <= DEFINED, line


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(?:[\w/]*/)?(test_\w+\.py(?:::\w+)?(?:\.\.\.)?)", TEXT))))
def test_every_test_it_names_exists(name):
    file, _, test = name.partition("::")
    assert file in TESTS
    start = test.removesuffix("...")
    assert not test or any(known == test or (start != test and known.startswith(start)) for known in TESTS[file])


def test_a_name_that_is_wrong_is_seen():
    assert "dpo" in DEFINED and "dpoo" not in DEFINED
    assert "test_nothing_of_the_kind" not in TESTS["test_weights.py"]


def test_lines_of_documents_are_short():
    """Tables, examples and what cannot be broken are left out."""
    root = Path(__file__).resolve().parents[2]
    pages = [
        *root.glob("*.md"),
        *root.glob("docs/*.md"),
        *root.glob("examples/*/README.md"),
        root / "slurm" / "README.md",
    ]
    long = [
        f"{page.relative_to(root)}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith(("|", "    ", "#")) and len(line.split()) > 3
    ]
    assert not long
