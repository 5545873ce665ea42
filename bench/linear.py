"""The weight-only GEMM against other people's: the layers of Llama 8B and 70B, few rows and many. See README.md in this folder."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from math import exp, log
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import rivals  # noqa: E402
from bench.common import Row, command, rel_rms, save, table  # noqa: E402
from qplugins.kernels.common.timing import bandwidth, copies, time_us  # noqa: E402
from qplugins.kernels.linear import few, kernel, variants, wide, workload  # noqa: E402
from qplugins.kernels.linear.ref import matmul  # noqa: E402
from qplugins.kernels.quantized import QuantizedTensor  # noqa: E402

TOLERANCE = 0.012  # of |y|: two roundings to bf16 are 0.003, x rounded to e4m3 is not held to it
E4M3_TOLERANCE = 0.05


def weight_only(name: str, linear: Callable, q: QuantizedTensor, count: int) -> rivals.Calls:
    """linear(x, spec, tensors, y) of a format's matrix."""
    sets = workload.layer(name, *q.shape, count, q)

    def calls(x):
        y = torch.empty(x.shape[0], q.shape[0], dtype=x.dtype, device=x.device)

        def call(spec, tensors):
            linear(x, spec, tensors, y)
            return y

        return [lambda s=s: call(*s) for s in sets]

    return calls


def _kernel(x, spec, tensors, y) -> None:
    if not (wide.suits(x.shape[0], spec) or few.suits(x.shape[0], spec, x.device)):
        raise NotImplementedError("is what qplugins runs")
    kernel.linear(x, spec, tensors, y)


def own(name: str) -> dict:
    """qplugins' weight-only product, beside it the one kernel that all rows could have, and for fp8 the W8A8 product."""
    found = {"qplugins": partial(weight_only, name, variants.linear), "qplugins kernel": partial(weight_only, name, _kernel)}
    if name == "fp8":
        found["qplugins w8a8"] = partial(rivals.scaled_mm, quantizer=True)
    return found


def implementations(name: str, only: list[str] | None) -> dict:
    """What multiplies with that format, those whose names begin with one of `only`: see rivals.py for what each takes and returns."""
    found = own(name) | {k: v for k, v in rivals.RIVALS.items() if k != "scaled_mm alone" or name == "fp8"}
    return {k: v for k, v in found.items() if not only or k.startswith(tuple(only))}


def shapes(models: list[str]) -> list[tuple[int, int]]:
    return list(dict.fromkeys(shape for model in models for shape in workload.MODELS[model]))


def compile_ahead(formats: list[str], models: list[str], rows: list[int], only: list[str] | None, processes: int) -> None:
    """Calls everything once, in several processes. What it compiles stays in the caches on disk, and timing need not wait for compilers."""
    tasks = [(f, shape, impl, rows) for f, shape in product(formats, shapes(models)) for impl in implementations(f, only)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_call_once, tasks))


def _call_once(task: tuple) -> None:
    name, (n, k), impl, rows = task
    with suppress(Exception):  # whatever does not run says so when it is timed
        calls_of = implementations(name, None)[impl](workload.random_matrix(name, n, k), 1)
        for m in rows:
            with suppress(Exception):
                calls_of(torch.randn(m, k, dtype=torch.bfloat16, device="cuda"))[0]()
                torch.cuda.synchronize()


def run(formats: list[str], models: list[str], rows: list[int], only: list[str] | None, rep_ms: float, out: Path) -> list[Row]:
    """Every implementation on every case. What was measured is saved after each shape, a file for each format."""
    rate = bandwidth()
    print(f"copy bandwidth {rate / 1e12:.2f} TB/s; floor = (packed weights + x + y) / that")
    found: list[Row] = []
    for name in formats:
        for n, k in shapes(models):
            found += time_shape("linear", name, n, k, rows, implementations(name, only), rep_ms, rate)
            _print_shape(found, name, n, k, rows)
            save(out / f"linear_{name}.json", [r for r in found if r.case["format"] == name], command=command())
    return found


def time_shape(
    suite: str, name: str, n: int, k: int, rows: list[int], impls: dict, rep_ms: float, rate: float, tolerance: float | None = None
) -> list[Row]:
    """Every implementation of `impls` on a matrix: checked against float32 first, then timed.

    rate       bytes a second, for the floors
    tolerance  of |y|; None: by what x is rounded to, going by the name
    """
    found: list[Row] = []
    q = workload.random_matrix(name, n, k)
    nbytes = sum(t.nbytes for t in workload.layer(name, n, k, 1, q)[0][1])
    xs = {m: torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for m in rows}
    w = q.dequantize()
    want = {m: matmul(x[:256], w) for m, x in xs.items()}
    del w
    for impl, make in impls.items():
        try:
            # one matrix at a time that is not in the cache; bf16 weights are larger, so fewer do
            calls_of = make(q, min(64, copies(nbytes)))
        except Exception as e:
            found += [
                Row(suite, _case(name, n, k, m), impl, None, _floor(nbytes, m, n, k, rate), f"{type(e).__name__}: {e}"[:200]) for m in rows
            ]
            print(f"{name} {n}x{k} {impl}: does not run: {type(e).__name__}: {str(e)[:120]}")
            continue
        with suppress(Exception):
            time_us(calls_of(xs[rows[0]]), rep_ms)  # after a pause a GPU is up to a tenth slower at first
        for m, x in xs.items():
            row = Row(suite, _case(name, n, k, m), impl, None, _floor(nbytes, m, n, k, rate))
            try:
                calls = calls_of(x)
                row.error = rel_rms(calls[0]()[:256], want[m])
                if not row.error < (tolerance or (E4M3_TOLERANCE if "w8a8" in impl or "scaled_mm" in impl else TOLERANCE)):
                    raise ArithmeticError(f"is off by {row.error:.2g} of the result")
                row.us = time_us(calls, rep_ms)
            except Exception as e:
                row.note = f"{type(e).__name__}: {e}"[:200]
            found.append(row)
        del calls_of
        torch.cuda.empty_cache()
    return found


def _case(name: str, n: int, k: int, m: int) -> dict:
    return {"format": name, "n": n, "k": k, "m": m}


def _floor(nbytes: int, m: int, n: int, k: int, rate: float) -> float:
    return (nbytes + 2 * m * (n + k)) / rate * 1e6


def _print_shape(found: list[Row], name: str, n: int, k: int, rows: list[int]) -> None:
    mine = [r for r in found if (r.case["format"], r.case["n"], r.case["k"]) == (name, n, k)]
    impls = list(dict.fromkeys(r.impl for r in mine))
    cell = {(r.impl, r.case["m"]): r for r in mine}
    lines = []
    for m in rows:
        us = [cell[i, m].us for i in impls]
        lines.append([m, f"{cell[impls[0], m].floor_us:.1f}", *("-" if u is None else f"{u:.1f}" for u in us)])
    print(f"\n{name} {n} x {k}, microseconds\n" + table(["M", "floor", *impls], lines), flush=True)
    for r in mine:
        if r.note and r.case["m"] == rows[0]:
            print(f"  {r.impl}: {r.note}")


def summary(found: list[Row]) -> str:
    """Geometric means over the shapes: how many times as fast as the best rival, as cuBLAS, and the share of the floor."""
    cells = defaultdict(dict)
    for r in found:
        if r.us is not None:
            cells[r.case["format"], r.case["m"], r.case["n"], r.case["k"]][r.impl] = r
    ratios = defaultdict(lambda: defaultdict(list))
    for (name, m, _, _), by in cells.items():
        if "qplugins" not in by:
            continue
        us = by["qplugins"].us
        ratios[name, m]["floor"].append(by["qplugins"].floor_us / us)
        if "cublas bf16" in by:
            ratios[name, m]["cublas"].append(by["cublas bf16"].us / us)
        others = [r.us for impl, r in by.items() if impl in ("marlin", "humming", "machete")]
        if others:
            ratios[name, m]["rival"].append(min(others) / us)
        if "qplugins w8a8" in by and "scaled_mm alone" in by:
            ratios[name, m]["w8a8"].append(by["scaled_mm alone"].us / by["qplugins w8a8"].us)

    def mean(values: list[float]) -> str:
        return f"{exp(sum(map(log, values)) / len(values)):.2f} ({min(values):.2f})" if values else "-"

    columns = {
        "rival": "best rival / qplugins (worst)",
        "cublas": "cublas bf16 / qplugins (worst)",
        "floor": "floor / qplugins (worst)",
        "w8a8": "scaled_mm alone / w8a8 (worst)",
    }
    lines = [[name, m, *(mean(r[c]) for c in columns)] for (name, m), r in ratios.items()]
    return table(["format", "M", *columns.values()], lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--formats", nargs="+", default=["nvfp4", "int4_g128", "fp8", "mxfp4", "int8"], choices=list(workload.FORMATS))
    p.add_argument("--models", nargs="+", default=["8b", "70b"], choices=list(workload.MODELS))
    p.add_argument("--rows", nargs="+", type=int, help=f"rows of x; default {' '.join(map(str, workload.ROWS))}")
    p.add_argument("--only", nargs="+", help="implementations whose name begins so: qplugins cublas marlin humming machete scaled_mm")
    p.add_argument("--compile", type=int, default=0, metavar="N", help="first have N processes compile everything")
    p.add_argument("--rep", type=float, default=20, help="milliseconds that a timing takes, ten times over")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: the benchmark times kernels on one")
    torch.manual_seed(0)
    what = a.formats, a.models, a.rows or list(workload.ROWS), a.only
    if a.compile:
        compile_ahead(*what, a.compile)
    found = run(*what, a.rep, a.out)
    print("\n" + summary(found))


if __name__ == "__main__":
    main()
