"""Which blocks a product is cut into: a table by shape class and architecture.

`qplugins bench linear` times the candidates (tune.py) and prints the table that they make; with `--save` this machine's GPU uses it from then on.

Two things decide. How many rows of x there are: they are a block's width as long as one block can hold them. And whether the blocks of W
alone fill the GPU ("many"): where they do not ("few"), several programs share a block's K, as many as give each multiprocessor about four.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton

from qplugins.kernels.linear.layout import LOCKS
from qplugins.kernels.linear.spec import Spec


@dataclass(frozen=True)
class Tile:
    """block_n   rows of W, a multiple of 64
    block_m   rows of x
    step      tiles of K at a time: 64 columns each for 4-bit codes, 32 for 8-bit ones
    warps, stages   Triton's num_warps and num_stages
    split_k   programs that share a block's K
    stripe_m  blocks of x that are done before the next ones
    room      programs that a multiprocessor has room for, with 4-bit codes, which follows from the others; 0 where nobody looked. See `balanced`
    """

    block_n: int
    block_m: int
    step: int
    warps: int = 4
    stages: int = 4
    split_k: int = 1
    stripe_m: int = 8
    room: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Entry:
    """What holds for up to `rows` rows of x, and more than the entry before has.

    few    where the blocks of W alone do not fill the GPU
    most   programs that may share a block's K there
    many   where they do
    """

    rows: int
    few: Tile
    most: int
    many: Tile


ANY = 1 << 62  # rows of the last entry

# Triton 3.9 gives a program with 8 rows of x twice the registers that 3.6 does
ROOM_8 = 8 if triton.__version__.startswith("3.6.") else 4

# found on an H100 with NVFP4 and Triton 3.6, over the layers of Llama 8B and 70B
SM_90 = (
    Entry(8, Tile(64, 8, 4, 4, 3, room=ROOM_8), 8, Tile(64, 8, 4, 4, 3, room=ROOM_8)),
    Entry(16, Tile(64, 16, 4, 4, 3, room=4), 8, Tile(64, 16, 4, 4, 3, room=4)),
    Entry(32, Tile(64, 32, 4, 4, 3, room=3), 4, Tile(128, 32, 2, 4, 4, room=3)),
    Entry(64, Tile(64, 64, 2, 4, 3), 4, Tile(128, 64, 2, 4, 3)),
    Entry(128, Tile(64, 128, 1, 4, 4), 4, Tile(128, 128, 1, 8, 3)),
    Entry(ANY, Tile(64, 128, 1, 4, 4), 2, Tile(128, 128, 1, 8, 3)),
)
# elsewhere nothing was measured: small blocks, which fit any GPU's registers and shared memory
DEFAULT = (
    Entry(16, Tile(64, 16, 2, 4, 3), 8, Tile(64, 16, 2, 4, 3)),
    Entry(32, Tile(64, 32, 2, 4, 3), 4, Tile(64, 32, 2, 4, 3)),
    Entry(64, Tile(64, 64, 1, 4, 3), 4, Tile(64, 64, 1, 4, 3)),
    Entry(ANY, Tile(64, 128, 1, 4, 3), 2, Tile(128, 128, 1, 8, 3)),
)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Not triton.cdiv, which takes microseconds, and launches ask for several."""
    return -(-a // b)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132 where there is none, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def balanced(programs: int, room: int, multiprocessors: int) -> bool:
    """Whether two kernels that run at once, one after the other on the stream, have their programs spread evenly: there is room for both, or programs
    of one take the place of the other's as these end. Between the two, what there is no room for at first goes to the multiprocessors that are done first.

    room  programs that a multiprocessor has room for
    """
    each = cdiv(programs, multiprocessors)
    return each >= room or 2 * each <= room


def table_file(gpu: str) -> Path:
    """Where the table of a GPU of that name is saved: under $QPLUGINS_CACHE, or else ~/.cache/qplugins."""
    folder = Path(os.environ.get("QPLUGINS_CACHE") or Path.home() / ".cache" / "qplugins")
    return folder / "tiles" / (re.sub(r"\W+", "-", gpu) + ".json")


def save_table(file: Path, table: Sequence[Entry], **about: object) -> None:
    """about: what the table was found with, for whoever reads the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(about | {"entries": [asdict(entry) for entry in table]}, indent=1) + "\n")
    partial.replace(file)


def load_table(file: Path) -> tuple[Entry, ...]:
    """Raises ValueError for a file that is no table."""
    try:
        entries = json.loads(file.read_text())["entries"]
        table = tuple(Entry(e["rows"], Tile(**e["few"]), e["most"], Tile(**e["many"])) for e in entries)
        if not table or table[-1].rows != ANY or any(t.block_n % 64 for e in table for t in (e.few, e.many)):
            raise ValueError("it does not cover every number of rows in blocks of 64")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is no table of tiles ({e}): remove it, or write it again with `qplugins bench linear --save`") from None
    return table


@cache
def table_of(device: torch.device) -> tuple[Entry, ...]:
    """Saved for this GPU, or ours for its architecture, or the default. Raises ValueError where what was saved is no table."""
    if device.type != "cuda":
        return SM_90
    if (file := table_file(torch.cuda.get_device_name(device))).exists():
        return load_table(file)
    if torch.version.hip is not None:
        # one buffer fewer: 64 KiB of shared memory is all there is
        return tuple(replace(e, few=replace(e.few, stages=2), many=replace(e.many, stages=2)) for e in DEFAULT)
    return SM_90 if torch.cuda.get_device_capability(device) == (9, 0) else DEFAULT


def choose(m: int, spec: Spec, device: torch.device) -> Tile:
    """The tile for a product of m rows."""
    tile = _choose(m, spec.n, cdiv(spec.k * spec.bits, 256), device)
    if spec.bits == 8:
        # a tile is half as wide, and a step of one would leave the tensor core too little
        return replace(tile, step=2 * tile.step if m > 16 else tile.step, room=0)
    return tile


@lru_cache(maxsize=8192)
def _choose(m: int, n: int, tiles_k: int, device: torch.device) -> Tile:
    entry = next(e for e in table_of(device) if m <= e.rows)
    return pick(entry, m, n, tiles_k, multiprocessors(device))


def pick(entry: Entry, m: int, n: int, tiles_k: int, multiprocessors: int) -> Tile:
    """The entry's tile for m rows of x and a matrix of n rows and tiles_k tiles of columns."""
    many, few = entry.many, entry.few
    programs = 4 * multiprocessors
    if cdiv(m, many.block_m) * cdiv(n, many.block_n) * many.warps >= programs * (1.6 if m <= 128 else 3):
        return many
    blocks_m = cdiv(m, few.block_m)
    # what fills the GPU; every share has at least four steps to fill its pipeline with
    share = round(programs / (blocks_m * cdiv(n, few.block_n)))
    return replace(few, split_k=1 if blocks_m > LOCKS else max(1, min(share, entry.most, tiles_k // few.step // 4)))
