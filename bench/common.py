"""What the benchmarks share: results as rows of JSON. Timing is that of `kernels/common/timing.py`."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """suite    "linear"                   case  what was computed: {"n": 4096, "k": 4096, "m": 16, "format": "nvfp4"}
    impl     whose kernel               us    microseconds, None where it did not run
    floor_us  the time that the least possible traffic takes at the measured bandwidth
    note     why it did not run, or which tile was used
    """

    suite: str
    case: dict
    impl: str
    us: float | None
    floor_us: float
    note: str = ""
    error: float | None = field(default=None)


def rel_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def commit() -> str:
    """The commit that figures belong to."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def command() -> str:
    """The command that this is, but for where it writes and what it waits for."""
    args = sys.argv[1:]
    for option in ("--out", "--after"):
        if option in args:
            del args[args.index(option) : args.index(option) + 2]
    return shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *args])


def versions(engine: str) -> dict:
    """Of an engine and what it runs on, the commit and the command, without touching a GPU."""
    return {name: version(name) for name in ("torch", "triton", engine)} | {"commit": commit(), "command": command()}


def machine() -> dict:
    """Device, versions and commit that figures belong to."""
    found = {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }
    for name in ("vllm", "humming"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found


def save(path: Path, rows: Iterable[Row], **about: object) -> None:
    """One JSON file: what the machine is, then the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), **about, "rows": [asdict(r) for r in rows]}, indent=0) + "\n")


def table(header: list[str], lines: Iterable[Iterable[object]]) -> str:
    """Columns, right-aligned."""
    cells = [header, *([str(c) for c in line] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
