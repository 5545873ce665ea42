"""The commands: exit codes, what goes where, and that `--json` is JSON and nothing else."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qplugins.checkpoints.reader import Checkpoint
from qplugins.cli import app, doctor
from qplugins.cli.inspect import ENGINE, spec
from qplugins.cli.quantize import parse_size
from qplugins.formats import FORMATS
from qplugins.layer_map import ranges

runner = CliRunner()


def run(*args, code: int = 0):
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def quantized(src, tmp_path) -> Path:
    (tmp_path / "map.yaml").write_text(
        'rules:\n  - {targets: ["re:.*layers\\\\.0\\\\."], format: fp8}\n  - {targets: ["re:.*down_proj$"], format: int4}\n'
        "  - {targets: [Linear], format: nvfp4}\nignore: [lm_head]\n"
    )
    run("quantize", src, tmp_path / "out", "--map", tmp_path / "map.yaml", "--json")
    return tmp_path / "out"


def test_help_does_not_wait_for_torch():
    code = "import sys, qplugins.cli; print([m for m in ('torch', 'safetensors', 'transformers', 'rich.table') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_installed_command(src, tmp_path):
    """The error of a real process is one line on stderr."""
    command = [Path(sys.executable).with_name("qplugins"), "inspect", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"qplugins: {tmp_path}/nothing is not a folder; a checkpoint is a folder with config.json and safetensors files\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(src, tmp_path, number):
    """The process sends it to itself while it writes."""
    code = f"""
import os, signal, qplugins.checkpoints.files as files
signal.signal({number}, signal.SIG_DFL)  # whoever runs the tests may ignore it
files.TensorFiles._write = lambda self: os.kill(os.getpid(), {number})
from qplugins.cli import app
app(["quantize", {str(src)!r}, {str(tmp_path / "out")!r}, "--map", "nvfp4"])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 128 + number
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_quantize(src, tmp_path):
    result = run("quantize", src, tmp_path / "out", "--map", "nvfp4", "--max-shard-size", "60kB")
    assert "bits per weight" in result.stdout and "largest relative errors" in result.stdout and "mean relative error 0.0" in result.stdout
    assert "nvfp4" in result.stdout and result.stderr == ""
    Checkpoint.open(tmp_path / "out").check()


def test_quantize_json(src, tmp_path):
    result = run("quantize", src, tmp_path / "out", "--map", "balanced", "--json")
    data = json.loads(result.stdout)
    assert data["bytes_after"] == Checkpoint.open(tmp_path / "out").nbytes < data["bytes_before"]
    assert data["formats"] == {"bf16": 2, "fp8": 21} and len(data["layers"]) == 23 and data["files"] == 1
    assert {"name", "format", "n", "k", "error", "nbytes_before", "nbytes_after"} <= data["layers"][0].keys()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_dry_run_writes_nothing(src, tmp_path, flags):
    result = run("quantize", src, tmp_path / "out", "--map", "int4", "--dry-run", *flags)
    assert not (tmp_path / "out").exists()
    if flags:
        data = json.loads(result.stdout)
        assert data["dry_run"] and 4 < data["bits_per_weight"] < 16 and data["layers"][0]["error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "best"], "--map 'best' is neither a file nor one of the presets balanced, nvfp4"),
        (["--map", "nvfp4", "--max-shard-size", "big"], "--max-shard-size 'big' is not a size; write it as 1GiB or 500MB"),
        (["--map", "nvfp4", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
    ],
)
def test_errors_are_a_sentence(src, tmp_path, options, message):
    result = run("quantize", src, tmp_path / "out", *options, "--json", code=2)
    assert result.stdout == "" and result.stderr.startswith(f"qplugins: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_existing_folder(src, tmp_path):
    assert (
        run("quantize", src, src, "--map", "fp8", code=2).stderr == f"qplugins: {src} already exists: choose another folder or remove it\n"
    )


def test_debug_raises(tmp_path):
    result = runner.invoke(app, ["inspect", str(tmp_path / "nothing"), "--debug"])
    assert result.exit_code == 1 and type(result.exception).__name__ == "CheckpointError"


def test_sizes():
    assert [parse_size(t) for t in ("1GiB", "500MB", "1.5 kB", "4096", "2mib")] == [1 << 30, 500_000_000, 1500, 4096, 2 << 20]


def test_inspect(quantized):
    result = run("inspect", quantized)
    lines = result.stdout.splitlines()
    row = next(x for x in lines if "self_attn.q_proj" in x and "nvfp4" in x).split()
    assert row[:6] == ["model.layers.1..2.self_attn.q_proj", "2", "nvfp4", "128", "x", "128"]
    assert any(x.startswith("model.layers.0.self_attn.q_proj ") and "fp8" in x for x in lines)
    assert any(x.startswith("model.embed_tokens ") and ENGINE in x for x in lines)
    assert sum("q_proj" in x for x in lines) == 2
    assert sum("q_proj" in x for x in run("inspect", quantized, "--all").stdout.splitlines()) == 3


def test_inspect_json(quantized, src):
    data = json.loads(run("inspect", quantized, "--json").stdout)
    checkpoint = Checkpoint.open(quantized)
    assert data["bytes"] == checkpoint.nbytes == data["bytes_other"] + sum(m["bytes"] for m in data["modules"])
    assert data["bits_per_weight"] == pytest.approx(8 * sum(m["bytes"] for m in data["modules"]) / data["weights"])
    assert [m["name"] for m in data["modules"]][:2] == ["lm_head", "model.embed_tokens"] and len(data["modules"]) == 23
    for m in data["modules"]:
        # every format runs somewhere here, if only on the reference, and says what was not taken before
        assert (
            m["kernel"] and (m["kernel"] == ENGINE) == (m["format"] == "bf16") and all(isinstance(w, str) for w in m["refusals"].values())
        )
    tensors = next(m for m in data["modules"] if m["format"] == "nvfp4")["tensors"]
    assert tensors["weight_scale"]["dtype"] == "float8_e4m3fn" and tensors["weight_packed"]["file"] == "model.safetensors"


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.quantized])
def test_every_format_has_a_kernel_spec(name):
    import torch

    from qplugins.kernels.linear import spec_of

    fmt = FORMATS[name]
    s = spec(fmt, 64, 256, torch.bfloat16)
    assert (s.n, s.k, s.code) == (64, 256, fmt.code) and s.activation == fmt.activation
    if fmt.quantize:
        assert s == spec_of(fmt.quantize(torch.randn(64, 256).bfloat16(), None), fmt.activation)


def test_ranges():
    assert ranges([2, 0, 1, 5, 7, 6, 0]) == "0..2,5..7" and ranges([3]) == "3"


def test_verify(quantized, src):
    assert "no problems" in run("verify", quantized).stdout
    data = json.loads(run("verify", quantized, "--against", src, "--json").stdout)
    assert data["problems"] == [] and len(data["layers"]) == 23 and 0 < data["mean_error"] < 0.15
    assert "mean relative error" in run("verify", quantized, "--against", src).stdout


def test_verify_exits_with_1_on_problems(quantized):
    file = quantized / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "problem: " in run("verify", quantized, code=1).stdout
    (problem,) = json.loads(run("verify", quantized, "--json", code=1).stdout)["problems"]
    assert "truncated or no safetensors file" in problem


def test_convert_errors(tmp_path):
    assert (
        run("convert", tmp_path / "x.gguf", tmp_path / "out", code=2).stderr
        == f"qplugins: {tmp_path}/x.gguf is neither a folder nor a file\n"
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "is not a complete GGUF file" in run("convert", tmp_path / "x.gguf", tmp_path / "out", code=2).stderr
    assert "--dtype 'int4' is none of bfloat16" in run("convert", tmp_path / "x.gguf", tmp_path / "out", "--dtype", "int4", code=2).stderr


def test_doctor_without_engines(monkeypatch):
    monkeypatch.setattr(doctor_module(), "ENGINES", {"vllm": (("no-such-engine",), "no.group")})
    data = json.loads(run("doctor", "--json").stdout)
    assert data["packages"]["torch"] and data["engines"]["vllm"] == {"version": None, "entry_point": None, "warning": None, "problem": None}
    assert "vllm: not installed" in run("doctor").stdout


def test_doctor_with_an_engine_that_does_not_find_the_plugin(monkeypatch):
    monkeypatch.setattr(doctor_module(), "ENGINES", {"vllm": (("pytest",), "no.group")})
    result = run("doctor", code=1)
    assert f"vllm {pytest.__version__}: there is no entry point qplugins in no.group" in result.stdout


def test_doctor_with_a_plugin_that_raises(monkeypatch):
    monkeypatch.setattr(doctor_module(), "ENGINES", {"vllm": (("pytest",), "vllm.general_plugins")})
    monkeypatch.setattr(doctor_module(), "_REGISTER", "raise RuntimeError('no such hook')")
    assert "qplugins.vllm.register:register raised RuntimeError: no such hook" in run("doctor", code=1).stdout


def doctor_module():
    assert callable(doctor)  # the package's attribute is the command, which hides the module
    return sys.modules["qplugins.cli.doctor"]
