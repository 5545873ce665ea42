"""The search behind tiles.py: every tile that makes sense for a shape class is timed, and the table is made of those that win together.

A table's entry is three choices, a tile for few blocks, the most programs that may share K there, and a tile for many blocks; which of the two a
shape gets, and by how many programs, `tiles.pick` computes. So an entry is judged by what it would have every shape of the class do: the one with
the least geometric mean of the times is taken.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import exp, log
from multiprocessing import get_context

import torch

from qplugins.kernels.common.timing import copies, time_us
from qplugins.kernels.linear import kernel
from qplugins.kernels.linear.tiles import ANY, SM_90, Entry, Tile, multiprocessors, pick
from qplugins.kernels.linear.workload import MODELS, layer

# rows of x: each stands for all from the class before up to itself, the last for more too
CLASSES = (8, 16, 32, 64, 128, 1024)
SHARES = (1, 2, 4, 8, 16)  # programs that may share a block's K, at most

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Timing:
    """Microseconds of y[m, n] = x[m, k] W[n, k].T in a tile; tiles_k of W's tiles cover k."""

    m: int
    n: int
    k: int
    tiles_k: int
    tile: Tile
    us: float


def candidates(m: int) -> list[Tile]:
    """Tiles for m rows, without split_k: (block_n, block_m, warps), steps, stages."""
    if m <= 16:
        bm = 8 if m <= 8 else 16
        found = [((64, bm, 4), (2, 4), (3, 4, 6)), ((64, bm, 4), (1,), (4, 6)), ((128, bm, 4), (2, 4), (3,))]
    elif m <= 64:
        bm = 32 if m <= 32 else 64
        found = [
            ((64, bm, 4), (1, 2), (3, 4, 5)),
            ((64, bm, 4), (4,), (3,)),
            ((128, bm, 4), (1, 2), (3, 4)),
            ((128, bm, 8), (1, 2), (3, 4)),
        ]
    elif m <= 128:
        found = [
            ((64, 128, 4), (1, 2), (3, 4)),
            ((128, 128, 8), (1,), (3, 4, 5)),
            ((64, 64, 4), (1, 2), (3, 4)),
            ((128, 64, 8), (1, 2), (3, 4)),
        ]
    elif m <= 256:
        found = [
            ((64, 256, 4), (1,), (3, 4)),
            ((64, 128, 4), (1, 2), (3, 4)),
            ((128, 128, 8), (1, 2), (3, 4)),
            ((128, 256, 8), (1,), (3, 4)),
        ]
    else:
        found = [
            ((128, 256, 8), (1, 2), (3, 4)),
            ((128, 128, 8), (1, 2), (3, 4)),
            ((64, 128, 4), (1,), (3, 4)),
            ((64, 256, 4), (1,), (3, 4)),
        ]
    tiles = [Tile(n, b, step, w, stages) for (n, b, w), steps, stages_ in found for step, stages in itertools.product(steps, stages_)]
    known = {t: t for e in SM_90 for t in (e.few, e.many)}  # how many there is room for
    return [known.get(t, t) for t in tiles if t.block_m * t.step * t.stages * 128 <= 200_000]


def shares(tile: Tile, m: int, n: int, tiles_k: int, sms: int) -> list[Tile]:
    """The tile with every share of K that an entry could give it for such a product."""
    entries = (Entry(m, tile, most, replace(tile, block_n=1 << 30)) for most in SHARES)
    return list(dict.fromkeys([tile, *(pick(entry, m, n, tiles_k, sms) for entry in entries)]))


def best(timings: Iterable[Timing], sms: int) -> tuple[Entry, ...]:
    """The table: for each m that was timed the entry that takes the least time over its shapes. Raises ValueError where there is none."""
    classes: dict[int, dict[tuple[int, int], dict[Tile, float]]] = defaultdict(lambda: defaultdict(dict))
    for t in timings:
        classes[t.m][t.n, t.tiles_k][t.tile] = t.us
    table = []
    for m, shapes in sorted(classes.items()):
        tiles = list(dict.fromkeys(replace(t, split_k=1) for times in shapes.values() for t in times))
        found = []
        for few, most, many in itertools.product(tiles, SHARES, tiles):
            entry = Entry(m, few, most, many)
            us = [times.get(pick(entry, m, n, tiles_k, sms)) for (n, tiles_k), times in shapes.items()]
            if None not in us:
                found.append((sum(map(log, us)), entry))
        if not found:
            raise ValueError(f"no tile ran on every shape with {m} rows")
        table.append(min(found, key=lambda f: f[0])[1])
    if not table:
        raise ValueError("nothing was timed")
    return (*table[:-1], replace(table[-1], rows=ANY))


def mean_us(timings: Iterable[Timing], table: Sequence[Entry], sms: int) -> dict[int, float | None]:
    """m -> the geometric mean over the shapes of what a table takes; None where it names a tile that was not timed."""
    us = defaultdict(list)
    times = {(t.m, t.n, t.tiles_k, t.tile): t.us for t in timings}
    for m, n, tiles_k in dict.fromkeys(key[:3] for key in times):
        entry = next(e for e in table if m <= e.rows)
        us[m].append(times.get((m, n, tiles_k, pick(entry, m, n, tiles_k, sms))))
    return {m: None if None in found else exp(sum(map(log, found)) / len(found)) for m, found in us.items()}


def _compile(job: tuple[str, dict]) -> str:
    """Runs a tile once on a small matrix, in a process of its own: compiled kernels are kept on disk. Returns what went wrong."""
    name, fields = job
    try:
        spec, tensors = layer(name, 256, 1024, 1)[0]
        x = torch.zeros(32, 1024, dtype=torch.bfloat16, device="cuda")
        for split in (1, 2):
            kernel.linear(x, spec, tensors, torch.empty(32, 256, dtype=x.dtype, device="cuda"), None, Tile(**{**fields, "split_k": split}))
        torch.cuda.synchronize()
    except Exception as e:  # a tile that this GPU cannot have is no candidate
        return f"{type(e).__name__}: {str(e)[:200]}"
    return ""


def measure(
    name: str = "nvfp4",
    models: Sequence[str] = ("8b", "70b"),
    classes: Sequence[int] = CLASSES,
    rep_ms: float = 4,
    progress: Progress | None = None,
) -> list[Timing]:
    """Times every candidate on the layers of the models, in a format of 4 bits. Some minutes on one GPU.

    name  key of workload.FORMATS          progress  called with (done, total, what)
    """
    sms = multiprocessors(torch.device("cuda"))
    tiles = list(dict.fromkeys(t for m in classes for t in candidates(m)))
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        problems = pool.map(_compile, [(name, asdict(t)) for t in tiles], chunksize=2)
        failed = {t for t, problem in zip(tiles, problems, strict=True) if problem}
    found = []
    cases = list(itertools.product(dict.fromkeys(shape for model in models for shape in MODELS[model]), classes))
    for done, ((n, k), m) in enumerate(cases):
        if progress:
            progress(done, len(cases), f"{n} x {k}, {m} rows")
        if not done or cases[done - 1][0] != (n, k):
            nbytes = sum(t.nbytes for t in layer(name, n, k, 1)[0][1])
            sets = layer(name, n, k, copies(nbytes))
            tiles_k = sets[0][1][0].shape[1]
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        for tile in (s for t in candidates(m) if t not in failed for s in shares(t, m, n, tiles_k, sms)):
            calls = [lambda s=s, tile=tile, x=x, y=y: kernel.linear(x, s[0], s[1], y, None, tile) for s in sets]
            found.append(Timing(m, n, k, tiles_k, tile, time_us(calls, rep_ms)))
    return found
