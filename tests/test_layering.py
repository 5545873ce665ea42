"""Imports point one way: adapters -> dispatch, formats, kv, layer_map, checkpoints -> kernels. Read from the sources, nothing is imported."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"qplugins": ROOT / "qplugins", "qplugins.kernels": ROOT / "kernels", "qplugins.checkpoints": ROOT / "checkpoints"}
ENGINES = {"vllm", "sglang", "sgl_kernel"}


def modules() -> Iterator[tuple[str, Path]]:
    """(the name that it is imported by, its file) of every source of the package."""
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), file


def imports(name: str, file: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            # `from qplugins import kernels` imports a module too
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def check(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported`; None where it may."""
    top = imported.partition(".")[0]
    if top in ENGINES and not within(importer, f"qplugins.{'vllm' if top == 'vllm' else 'sglang'}"):
        return "engines are imported by their own adapter only"
    if top in ("kernels", "checkpoints"):
        return f"it is qplugins.{top}: a bare {top!r} is another package once installed"
    if top != "qplugins":
        return None
    if within(importer, "qplugins.kernels") and imported != "qplugins" and not within(imported, "qplugins.kernels"):
        return "kernels know tensors, and nothing above them"
    for adapter in ("qplugins.vllm", "qplugins.sglang"):
        if within(imported, adapter) and not within(importer, adapter):
            return "an adapter is loaded by its engine; nothing else imports one, least of all the other adapter"
    if within(importer, "qplugins.formats") and any(
        within(imported, f"qplugins.{p}") for p in ("checkpoints", "cli", "dispatch", "layer_map")
    ):
        return "formats are what those are built on"
    if within(imported, "qplugins.cli") and not within(importer, "qplugins.cli"):
        return "the command line is the outermost layer"
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    found = [(name, file) for name, file in modules() if file.is_relative_to(PACKAGES[package])]
    assert found, f"{PACKAGES[package]} has no sources"
    wrong = [
        f"{file.relative_to(ROOT)} imports {imported}: {reason}"
        for name, file in found
        for imported in sorted(imports(name, file))
        if (reason := check(name, imported))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("qplugins.kernels.linear.op", "vllm"),
        ("qplugins.kernels.linear.op", "qplugins.formats"),
        ("qplugins.checkpoints.reader", "kernels.decode"),
        ("qplugins.vllm.linear", "qplugins.sglang.compat"),
        ("qplugins.vllm.linear", "sglang.srt.utils"),
        ("qplugins.dispatch", "vllm.platforms"),
        ("qplugins.cli.quantize", "qplugins.vllm.config"),
        ("qplugins.formats.base", "qplugins.layer_map"),
    ],
)
def test_forbidden_imports_are_noticed(importer, imported):
    assert check(importer, imported)


def test_relative_imports_are_resolved(tmp_path):
    file = tmp_path / "op.py"
    file.write_text("from . import ref\nfrom ..decode.e2m1 import MAX\n")
    found = imports("qplugins.kernels.linear.op", file)
    assert {"qplugins.kernels.linear.ref", "qplugins.kernels.decode.e2m1"} <= found


def test_every_package_folder_has_an_init():
    # a folder without one is left out of the wheel
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent.relative_to(ROOT)} has no __init__.py"


def test_nothing_generated_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = [f for f in listed.stdout.splitlines() if f.endswith((".pyc", ".safetensors", ".whl", ".gguf")) or ".egg-info" in f]
    assert not wrong
