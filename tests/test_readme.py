"""README's tables are made from the code and from bench/results: these are the ones that it shows."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_current():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = readme.README.read_text()
    assert "<!-- table: formats -->" in text
    assert readme.render(text) == text, "run python tools/readme.py"
