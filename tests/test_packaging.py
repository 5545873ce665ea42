"""What a user installs: one package, `qplugins`, with kernels and checkpoints inside it, whatever way it was built."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "qplugins",
    "kernels",
    "checkpoints",
    "tests",
    "integration_tests",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)


def python(*args: str, cwd: Path, path: Path | None = None, safe_path: bool = True) -> str:
    """What a fresh interpreter prints; without safe_path, one that looks for modules in the current folder first, as Python does."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if safe_path:
        env["PYTHONSAFEPATH"] = "1"
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing behind in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(checkout) -> dict[str, Path]:
    """A wheel built from the checkout, and one from the sdist that was built from it."""
    build = ["-m", "build", "--no-isolation", "--skip-dependency-check"]
    python(*build, "--wheel", "--outdir", "direct", str(checkout), cwd=checkout)
    shutil.rmtree(checkout / "build")  # setuptools would pack what is left there once more
    python(*build, "--outdir", "by-sdist", str(checkout), cwd=checkout)
    return {way: next((checkout / way).glob("*.whl")) for way in ("direct", "by-sdist")}


@pytest.fixture(params=["direct", "by-sdist"])
def wheel(request, wheels) -> Path:
    return wheels[request.param]


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_one_top_level(wheel):
    assert {name.split("/")[0] for name in names(wheel) if ".dist-info/" not in name} == {"qplugins"}


def test_wheel_has_every_source_and_no_test(wheel):
    want = {f"qplugins/{f.relative_to(ROOT / 'qplugins')}" for f in (ROOT / "qplugins").rglob("*.py")}
    for folder in ("kernels", "checkpoints"):
        want |= {f"qplugins/{f.relative_to(ROOT)}" for f in (ROOT / folder).rglob("*.py")}
    assert {name for name in names(wheel) if name.endswith(".py")} == want


def test_wheel_needs_no_engine(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not [r for r in needed if r.startswith(("vllm", "sglang", "kernels"))]


def test_wheel_declares_what_engines_look_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        declared = archive.read(next(n for n in archive.namelist() if n.endswith("/entry_points.txt"))).decode()
    assert "[vllm.general_plugins]\nqplugins = qplugins.vllm.register:register" in declared
    assert "[console_scripts]\nqplugins = qplugins.cli:app" in declared


def test_wheel_works_where_nothing_else_of_it_is(wheel, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = """if True:
        import json, qplugins.kernels.quantized, qplugins.checkpoints.reader, qplugins.formats, qplugins.layer_map
        print(json.dumps([m.__file__ for m in (qplugins.kernels, qplugins.checkpoints, qplugins.formats)]))"""
    files = json.loads(python("-c", code, cwd=tmp_path, path=installed))
    assert all(Path(f).is_relative_to(installed) for f in files), files


def test_editable_install_has_both_folders_and_the_entry_points(tmp_path):
    code = "import qplugins.kernels, qplugins.checkpoints; print(qplugins.kernels.__file__, qplugins.checkpoints.__file__, sep='\\n')"
    found = [Path(line).parent for line in python("-c", code, cwd=tmp_path).split()]
    assert found == [ROOT / "kernels", ROOT / "checkpoints"]
    assert [e.value for e in entry_points(group="vllm.general_plugins", name="qplugins")] == ["qplugins.vllm.register:register"]


def test_the_checkout_hides_no_package_called_kernels(tmp_path):
    # transformers and SGLang import a package of this name; here is a stand-in for it
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("from kernels.layer import WHO\n")
    (other / "layer.py").write_text("WHO = 'the other one'\n")
    code = "import kernels; from kernels.layer import WHO; print(kernels.WHO, WHO, sep='|')"
    assert python("-c", code, cwd=ROOT, path=other.parent, safe_path=False).strip() == "the other one|the other one"


def test_the_checkout_as_current_folder_breaks_no_import():
    # without such a package the name stays empty, and whoever asks for something in it gets an ImportError, as where it is not installed
    code = """if True:
        import kernels, transformers
        from transformers import LlamaForCausalLM
        try:
            from kernels import get_kernel
        except ImportError:
            print("empty")"""
    assert python("-c", code, cwd=ROOT, safe_path=False).strip() == "empty"
