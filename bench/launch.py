"""What a layer costs the CPU outside of CUDA graphs, where the GPU waits for it if there are few rows: through kernels/common/launch.py, by Triton's own
way, and torch's product of 16-bit weights beside it.

    source bench/checkout.sh && python bench/launch.py [--out FILE]

Matrices are small, so that the GPU is done before the next call comes. Of 40 times that so many calls take the third quickest counts: others run on
the CPU too. floor_us is none.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import Row, command, save, table  # noqa: E402
from qplugins.kernels.attention import op as attention  # noqa: E402
from qplugins.kernels.common.launch import Launcher  # noqa: E402
from qplugins.kernels.kv import op as kv  # noqa: E402
from qplugins.kernels.linear import linear, pack, plan, workload  # noqa: E402
from qplugins.kv import get_layout  # noqa: E402

N, K, ROWS = 512, 1024, (1, 16, 64, 512)
TIMES, CALLS, COUNTED = 40, 40, 2
BF16 = torch.bfloat16


def cpu_us(call: Callable[[], object]) -> float:
    """Microseconds that a call keeps the CPU."""
    for _ in range(20):
        call()
    found = []
    for _ in range(TIMES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return sorted(found)[COUNTED]


def calls() -> dict[str, Callable[[], object]]:
    """Ours, by name."""
    found: dict[str, Callable[[], object]] = {}
    for name, implementation, options in (
        ("nvfp4", "triton", {}),
        ("int4_g128", "triton", {}),
        ("fp8", "scaled_mm", {"activation": "token"}),
    ):
        w = pack(workload.random_matrix(name, N, K), implementation, **options)
        for m in ROWS:
            x = torch.randn(m, K, dtype=BF16, device="cuda")
            found[f"{name}, {m} rows"] = partial(linear, x, w.tensors, plan([(implementation, w.spec)]))
    page, heads, batch, length = get_layout("int4_sink").page(128, 128), 8, 4, 256
    pages = torch.randint(256, (2 * batch, heads, page.nbytes), dtype=torch.uint8, device="cuda")
    blocks = torch.arange(2 * batch, dtype=torch.int32, device="cuda").view(batch, 2)
    lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    for new in (1, 64):
        k, v = (torch.randn(batch * new, heads, 128, dtype=BF16, device="cuda") for _ in range(2))
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * new
        slots = (torch.arange(batch, device="cuda")[:, None] * length + torch.arange(length - new, length, device="cuda")).view(-1)
        found[f"int4_sink, {batch} x {new} tokens written"] = partial(
            kv.write, pages, k, v, slots, starts, lens, blocks, page, max_query_len=new
        )
        found[f"int4_sink, {batch} x {new} tokens written"]()
    q, starts = torch.randn(batch, 4 * heads, 128, dtype=BF16, device="cuda"), torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    workspace = attention.decode_workspace(batch, 4 * heads, heads, page, 1, "cuda")
    found[f"int4_sink, {batch} sequences decoded"] = partial(
        attention.decode, q, pages, blocks, lens, starts, workspace, page, max_query_len=1, max_seq_len=length, scale=128**-0.5
    )
    return found


def by_triton(self: Launcher, grid: tuple[int, ...], *args: object) -> None:
    self.kernel[grid](*args, **self.constants)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "launch.json")
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: the benchmark launches kernels on one")
    w, rows = torch.randn(N, K, dtype=BF16, device="cuda"), []
    for m in ROWS:
        x = torch.randn(m, K, dtype=BF16, device="cuda")
        rows.append(Row("launch", {"call": f"bf16, {m} rows"}, "torch", cpu_us(partial(torch.nn.functional.linear, x, w)), 0))
    ours, launch = calls(), Launcher.__call__
    for name, call in ours.items():
        for impl, way in (("qplugins", launch), ("by Triton", by_triton)):
            Launcher.__call__ = way
            rows.append(Row("launch", {"call": name}, impl, cpu_us(call), 0))
    save(a.out, rows, command=command())
    print(table(["call", "implementation", "us of the CPU"], ([r.case["call"], r.impl, f"{r.us:.1f}"] for r in rows)))


if __name__ == "__main__":
    main()
