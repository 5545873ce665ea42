"""The tile search behind kernels/linear/tiles.py: every tile that makes sense for a shape class, timed. `python -m bench.linear --tune`."""

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context

import torch

from bench.common import Row, bandwidth, copies, time_us
from bench.shapes import MODELS, layer
from qplugins.kernels.linear import kernel
from qplugins.kernels.linear.tiles import Tile, multiprocessors

CLASSES = (1, 16, 32, 64, 128, 256, 1024, 4096)


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
    return [t for t in tiles if t.block_m * t.step * t.stages * 128 <= 200_000]


def splits(m: int, n: int, k: int, tile: Tile) -> list[int]:
    """Shares of K that leave each multiprocessor between one and about eight programs."""
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    steps = -(-k // 64) // tile.step
    sm = multiprocessors(torch.device("cuda"))
    found = [s for s in (1, 2, 4, 8, 16) if s == 1 or (blocks * s <= 8 * sm and steps // s >= 4 and m <= 256)]
    return [s for s in found if blocks * s >= sm / 2] or found[-1:]


def _compile(job: tuple[str, dict]) -> str:
    """Runs a tile once on a small matrix, in a process of its own: compiled kernels are kept on disk."""
    name, fields = job
    tile = Tile(**fields)
    try:
        spec, tensors = layer(name, 256, 1024, 1)[0]
        x = torch.zeros(32, 1024, dtype=torch.bfloat16, device="cuda")
        for split in (1, 2):
            kernel.linear(x, spec, tensors, torch.empty(32, 256, dtype=x.dtype, device="cuda"), None, Tile(**{**fields, "split_k": split}))
        torch.cuda.synchronize()
    except Exception as e:
        return f"{tile}: {type(e).__name__}: {str(e)[:200]}"
    return ""


def _time(sets: list, x: torch.Tensor, y: torch.Tensor, tile: Tile, rep_ms: float) -> float | None:
    try:
        return time_us([lambda s=s: kernel.linear(x, s[0], s[1], y, None, tile) for s in sets], rep_ms)
    except Exception as e:
        print(tile, type(e).__name__, str(e)[:100])
        return None


def tune(formats: list[str], classes: list[int], models: list[str], rep_ms: float = 4) -> list[Row]:
    rate = bandwidth()
    jobs = [(f, asdict(t)) for f in formats for t in dict.fromkeys(t for m in classes for t in candidates(m))]
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        failed = {json.dumps(job[1]): problem for job, problem in zip(jobs, pool.map(_compile, jobs, chunksize=2), strict=True) if problem}
    for problem in failed.values():
        print(problem)
    rows = []
    for name in formats:
        for n, k in dict.fromkeys(shape for model in models for shape in MODELS[model]):
            nbytes = layer(name, n, k, 1)[0][1][0].nbytes
            sets = layer(name, n, k, copies(nbytes))
            weight_bytes = sum(t.nbytes for t in sets[0][1])
            for m in classes:
                x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
                y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
                floor = (weight_bytes + x.nbytes + y.nbytes) / rate * 1e6
                case = {"n": n, "k": k, "m": m, "format": name}
                tiles = [replace(t, split_k=s) for t in candidates(m) if json.dumps(asdict(t)) not in failed for s in splits(m, n, k, t)]
                mine = [Row("tune", case, "qplugins", _time(sets, x, y, t, rep_ms), floor, json.dumps(asdict(t))) for t in tiles]
                rows += [r for r in mine if r.us is not None]
                best = min((r for r in mine if r.us is not None), key=lambda r: r.us)
                print(f"{name} {n}x{k} m={m}: {best.us:.1f} us, {floor / best.us:.2f} of the floor, {best.note}", flush=True)
            del sets
            torch.cuda.empty_cache()
    return rows
