"""What stands in kernels/linear/wide.py: every tile of the product for many rows timed, and its model of time fitted to that.

    source bench/checkout.sh && python bench/wide_tiles.py [--formats nvfp4 int4_g128] [--rows 32 64 ...] [--out FILE]
    python bench/wide_tiles.py --fit FILE

Prints TILES, BLOCK and SUM, how much longer than the best tile the one chosen with them takes, and from how many rows on the best tile is quicker
than kernel.py, from which LEAST follows. The second form needs no GPU, and SciPy.
"""

import argparse
import json
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf, log
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import Row, command, save, table  # noqa: E402
from bench.linear import shapes, time_shape, weight_only  # noqa: E402
from qplugins.kernels.common.timing import bandwidth  # noqa: E402
from qplugins.kernels.linear import kernel, wide, workload  # noqa: E402

ROWS = (32, 64, 96, 128, 192, 256, 512, 1024)
KERNEL = "kernel.py"
CLOCK_GHZ = 1.755  # cycles are microseconds at that: the model only compares
ALL = {str(t): t for tile, _ in wide.TILES for t in (tile, replace(tile, shared=True))}


def implementations(fmt: str) -> dict:
    """kernel.py and every tile, as bench/linear.py has implementations."""
    return {KERNEL: partial(weight_only, fmt, kernel.linear)} | {
        name: partial(weight_only, fmt, partial(wide.linear, tile=tile)) for name, tile in ALL.items()
    }


def compile_once(task: tuple[str, str]) -> None:
    """A small product of a format by a tile: what it is compiled for does not depend on the sizes."""
    fmt, name = task
    with suppress(Exception):  # whatever does not run says so when it is timed
        x = torch.randn(300, 4096, dtype=torch.bfloat16, device="cuda")
        implementations(fmt)[name](workload.random_matrix(fmt, 1024, 4096), 1)(x)[0]()
        torch.cuda.synchronize()


def measure(formats: list[str], models: list[str], rows: list[int], rep_ms: float, processes: int) -> list[Row]:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(compile_once, product(formats, ALL)))
    rate, found = bandwidth(), []
    for fmt, (n, k) in product(formats, shapes(models)):
        found += time_shape("wide_tiles", fmt, n, k, rows, implementations(fmt), rep_ms, rate)
        print(fmt, f"{n}x{k}", flush=True)
    return found


def fit(rows: list[dict]) -> str:
    """What wide.py should have, by least squares of the logarithms."""
    from scipy.optimize import least_squares

    blocks = list(dict.fromkeys((t.block_n, t.block_m) for t in ALL.values()))
    seen = [(r["case"], ALL[r["impl"]], r["us"]) for r in rows if r["us"] and r["impl"] in ALL]

    def us(case: dict, tile: wide.WideTile, x: list[float]) -> float:
        step = x[blocks.index((tile.block_n, tile.block_m))]
        return wide.cycles(tile, step, case["m"], case["n"], case["k"], 132, *x[-2:]) / CLOCK_GHZ / 1000

    start = [*(dict(((t.block_n, t.block_m), step) for t, step in wide.TILES)[b] for b in blocks), wide.BLOCK, wide.SUM]
    seen = [s for s in seen if us(*s[:2], start) < inf]
    x = list(least_squares(lambda x: [log(us(case, tile, x) / t) for case, tile, t in seen], start, loss="soft_l1", f_scale=0.05).x)
    lines = [[f"{n}x{m}", f"{step:.0f}"] for (n, m), step in zip(blocks, x, strict=False)]
    found = [table(["tile", "cycles of 64 columns"], lines), f"BLOCK {x[-2]:.0f}, SUM {x[-1]:.0f}"]

    by_case = defaultdict(dict)
    for row in rows:
        if row["us"]:
            by_case[tuple(row["case"].items())][row["impl"]] = row["us"]
    regrets, gains = defaultdict(list), []
    for key, times in by_case.items():
        case, ours = dict(key), {name: t for name, t in times.items() if name in ALL}
        chosen = min((name for name in ours if wide.usable(ALL[name], case["m"])), key=lambda name: us(case, ALL[name], x))
        regrets[case["m"]].append(ours[chosen] / min(ours.values()))
        if KERNEL in times:
            gains.append([case["m"], f"{case['n'] * case['k'] / 1e6:.0f}", case["format"], f"{times[KERNEL] / ours[chosen]:.2f}"])
    found.append(
        table(["M", "chosen / best tile", "worst"], ([m, f"{geometric_mean(v):.3f}", f"{max(v):.2f}"] for m, v in regrets.items()))
    )
    found.append(table(["M", "million weights", "format", "kernel.py / chosen"], sorted(gains, key=lambda g: (g[0], float(g[1])))))
    return "\n\n".join(found)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--formats", nargs="+", default=["nvfp4", "int4_g128"], choices=list(workload.FORMATS))
    p.add_argument("--models", nargs="+", default=["8b", "70b"], choices=list(workload.MODELS))
    p.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    p.add_argument("--rep", type=float, default=1.5, help="milliseconds that a timing takes, ten times over")
    p.add_argument("--compile", type=int, default=8, metavar="N", help="processes that compile")
    p.add_argument("--fit", type=Path, metavar="FILE", help="of times that were saved")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wide_tiles.json")
    a = p.parse_args()
    if a.fit is None:
        if not torch.cuda.is_available():
            sys.exit("no GPU here: the benchmark times kernels on one")
        save(a.out, measure(a.formats, a.models, a.rows, a.rep, a.compile), command=command())
    print(fit(json.loads((a.fit or a.out).read_text())["rows"]))


if __name__ == "__main__":
    main()
