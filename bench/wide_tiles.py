"""What stands in kernels/linear/wide.py, and with --fp8 in fp8_wide.py: every tile of the product for many rows timed, and its model of time fitted to
that.

    source bench/checkout.sh && python bench/wide_tiles.py [--formats nvfp4 int4_g128 | --fp8] [--rows 32 64 ...] [--out FILE]
    python bench/wide_tiles.py [--fp8] --fit FILE

Prints TILES and the model's other constants, how much longer than the best tile the one chosen with them takes, and for how many rows that is quicker
than what else there is, from which LEAST and MOST follow. FP8 times are the quantizer's and the product's. The second form needs no GPU, and SciPy.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import inf, log
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import Row, command, save, table  # noqa: E402
from bench.linear import E4M3_TOLERANCE, shapes, time_shape, weight_only  # noqa: E402
from bench.rivals import Calls, scaled_mm  # noqa: E402
from qplugins.kernels.common.timing import bandwidth  # noqa: E402
from qplugins.kernels.linear import fp8, fp8_few, fp8_wide, kernel, pack, wide, workload  # noqa: E402
from qplugins.kernels.quantized import QuantizedTensor  # noqa: E402

ROWS = (32, 64, 96, 128, 192, 256, 512, 1024)
FP8_ROWS = (*range(16, 65, 16), *range(80, 129, 16), *range(160, 257, 32), *range(320, 1153, 64), 1536, 2048)
CLOCK_GHZ = 1.755  # cycles are microseconds at that: the model only compares


def fp8_layer(multiply: Callable, q: QuantizedTensor, count: int) -> Calls:
    """The quantizer and multiply(q, scale, weight, row, spec, locks, y), as bench/linear.py has implementations; torch._scaled_mm as fp8.py has it."""
    w = pack(q, "scaled_mm", activation="token")
    sets = [[t.view(torch.uint8).roll(i, 0).view(t.dtype) for t in w.tensors] for i in range(count)]

    def calls(x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        rows = fp8.padded(x.shape[0]) if multiply is _by_scaled_mm else x.shape[0]
        y = torch.empty(rows, w.spec.n, dtype=x.dtype, device=x.device)

        def call(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            locks = torch.empty(fp8.LOCKS, dtype=torch.int32, device=x.device)
            multiply(*fp8.quantize(x, None, locks, rows), weight, row, w.spec, locks, y)
            return y[: x.shape[0]]

        return [lambda s=s: call(*s) for s in sets]

    return calls


def _by_scaled_mm(q, scale, weight, row, spec, locks, y) -> None:
    torch._scaled_mm(q, weight.T, scale, row[None, :], out_dtype=y.dtype, out=y)


def _of_weights(name: str) -> dict:
    by_tile = {t: partial(weight_only, name, partial(wide.linear, tile=tile)) for t, tile in tiles(wide).items()}
    return {"kernel.py": partial(weight_only, name, kernel.linear)} | by_tile


def _of_fp8(name: str) -> dict:
    by_tile = {t: partial(fp8_layer, partial(fp8_wide.linear, tile=tile)) for t, tile in tiles(fp8_wide).items()}
    others = {"quantizer + scaled_mm": _by_scaled_mm, "fp8_few.py": fp8_few.linear}
    return {"scaled_mm alone": scaled_mm} | {other: partial(fp8_layer, call) for other, call in others.items()} | by_tile


@dataclass(frozen=True)
class Product:
    """implementations  of a format's product: what else there is, and every tile
    rival      the one of them that runs where this does not
    constants  of the model, after the sizes in the arguments of `module.cycles`
    others     and of the rival's, as arguments of `module.cycles_of_scaled_mm` after the sizes
    rows       (least, most) that the model is fitted to
    timed      rows that are timed
    quantizer  (us, values in a us) that x takes before; as it was alone on an H100 for up to 512 rows, to 0.3 us
    """

    module: ModuleType
    implementations: Callable[[str], dict]
    rival: str
    constants: tuple[str, ...]
    others: tuple[str, ...] = ()
    rows: tuple[float, float] = (0, inf)
    timed: tuple[int, ...] = ROWS
    quantizer: tuple[float, float] = (0, inf)


WIDE = Product(wide, _of_weights, "kernel.py", ("BLOCK", "SUM"))
FP8 = Product(
    fp8_wide,
    _of_fp8,
    "quantizer + scaled_mm",
    ("BLOCK", "SUM", "START", "MEMORY"),
    ("SCALED_STEP", "SCALED_START"),
    (fp8_wide.LEAST, fp8_wide.MOST),
    FP8_ROWS,
    (1.3, 1.9e6),
)


def tiles(module: ModuleType) -> dict[str, wide.WideTile]:
    """All by their names."""
    return {str(t): t for tile, _ in module.TILES for t in (tile, replace(tile, shared=True))}


def compile_once(task: tuple[bool, str, str]) -> None:
    """A small product of a format by a tile: what it is compiled for does not depend on the sizes."""
    is_fp8, fmt, name = task
    with suppress(Exception):  # whatever does not run says so when it is timed
        x = torch.randn(300, 4096, dtype=torch.bfloat16, device="cuda")
        (FP8 if is_fp8 else WIDE).implementations(fmt)[name](workload.random_matrix(fmt, 1024, 4096), 1)(x)[0]()
        torch.cuda.synchronize()


def measure(of: Product, formats: list[str], models: list[str], rows: list[int], rep_ms: float, processes: int) -> list[Row]:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(compile_once, product([of is FP8], formats, tiles(of.module))))
    rate, tolerance, found = bandwidth(), E4M3_TOLERANCE if of is FP8 else None, []
    for fmt, (n, k) in product(formats, shapes(models)):
        found += time_shape("wide_tiles", fmt, n, k, rows, of.implementations(fmt), rep_ms, rate, tolerance)
        print(fmt, f"{n}x{k}", flush=True)
    return found


def fit(of: Product, rows: list[dict]) -> str:
    """What the kernel's file should have, by least squares of the logarithms."""
    from scipy.optimize import least_squares

    known, names = tiles(of.module), of.constants + of.others
    blocks = [(t.block_n, t.block_m) for t, _ in of.module.TILES]
    start = [*(step for _, step in of.module.TILES), *(getattr(of.module, name) for name in names)]
    end = len(blocks) + len(of.constants)

    def us(case: dict, tile: wide.WideTile | None, x: list[float]) -> float:
        """None: of the rival."""
        sizes = case["m"], case["n"], case["k"], 132
        if tile is None:
            cycles = of.module.cycles_of_scaled_mm(*sizes, *x[end:])
        else:
            cycles = of.module.cycles(tile, x[blocks.index((tile.block_n, tile.block_m))], *sizes, *x[len(blocks) : end])
        return cycles / CLOCK_GHZ / 1000 + of.quantizer[0] + case["m"] * case["k"] / of.quantizer[1]

    modelled = known | ({of.rival: None} if of.others else {})
    seen = [(r["case"], modelled[r["impl"]], r["us"]) for r in rows if r["us"] and r["impl"] in modelled]
    seen = [(case, tile, t) for case, tile, t in seen if of.rows[0] <= case["m"] <= of.rows[1] and us(case, tile, start) < inf]

    def off(x: list[float]) -> list[float]:
        return [log(us(case, tile, x) / t) for case, tile, t in seen]

    x = list(least_squares(off, start, x_scale=[abs(v) for v in start], loss="soft_l1", f_scale=0.05).x)
    lines = [[f"{n}x{m}", f"{step:.0f}"] for (n, m), step in zip(blocks, x, strict=False)]
    constants = (f"{name} {value:.4g}" for name, value in zip(names, x[len(blocks) :], strict=True))
    found = [table(["tile", "cycles of a step"], lines), ", ".join(constants)]

    by_case = defaultdict(dict)
    for row in rows:
        if row["us"]:
            by_case[tuple(row["case"].items())][row["impl"]] = row["us"]
    regrets, gains = defaultdict(list), []
    for key, times in by_case.items():
        case, ours = dict(key), {name: t for name, t in times.items() if name in known}
        usable = [name for name in ours if of.module.usable(known[name], case["m"])]
        chosen = min(usable, key=lambda name: us(case, known[name], x))
        regrets[case["m"]].append(ours[chosen] / min(ours.values()))
        if of.rival in times:
            gains.append([case["m"], case["n"], case["k"], case["format"], f"{times[of.rival] / ours[chosen]:.2f}"])
    found.append(
        table(["M", "chosen / best tile", "worst"], ([m, f"{geometric_mean(v):.3f}", f"{max(v):.2f}"] for m, v in regrets.items()))
    )
    found.append(table(["M", "N", "K", "format", f"{of.rival} / chosen"], sorted(gains, key=lambda g: (g[0], g[1] * g[2]))))
    return "\n\n".join(found)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fp8", action="store_true", help="the product of rounded x, not of weights only")
    p.add_argument("--formats", nargs="+", default=["nvfp4", "int4_g128"], choices=list(workload.FORMATS))
    p.add_argument("--models", nargs="+", default=["8b", "70b"], choices=list(workload.MODELS))
    p.add_argument("--rows", nargs="+", type=int)
    p.add_argument("--rep", type=float, default=1.5, help="milliseconds that a timing takes, ten times over")
    p.add_argument("--compile", type=int, default=8, metavar="N", help="processes that compile")
    p.add_argument("--fit", type=Path, metavar="FILE", help="of times that were saved")
    p.add_argument("--out", type=Path, help="default: wide_tiles.json or fp8_tiles.json in bench/results")
    a = p.parse_args()
    of, formats = (FP8, ["fp8"]) if a.fp8 else (WIDE, a.formats)
    out = a.out or Path(__file__).parent / "results" / ("fp8_tiles.json" if a.fp8 else "wide_tiles.json")
    if a.fit is None:
        if not torch.cuda.is_available():
            sys.exit("no GPU here: the benchmark times kernels on one")
        save(out, measure(of, formats, a.models, a.rows or of.timed, a.rep, a.compile), command=command())
    print(fit(of, json.loads((a.fit or out).read_text())["rows"]))


if __name__ == "__main__":
    main()
