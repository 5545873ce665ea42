"""README's tables are made from the code and from bench/results: these are the ones that it shows."""

import ast
import importlib.util
from pathlib import Path

import pytest

from integration_tests.support import KV, WEIGHTS

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_current():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = readme.README.read_text()
    assert "<!-- table: formats -->" in text
    assert readme.render(text) == text, "run python tools/readme.py"


@pytest.mark.parametrize(
    "cell", [cell for table in (WEIGHTS, KV) for cells in table.values() for cell in cells if cell], ids=lambda c: c.test
)
def test_what_works_is_shown_by_a_test(cell):
    file, _, name = cell.test.partition("::")
    functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)]
    assert name in functions
