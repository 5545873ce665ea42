"""Attention over KV pages, and writing and reading them, against FlashAttention 3 over bf16 and FP8 caches. See README.md in this folder.

Pages are random bytes with sensible scales: what they hold does not change how long anything takes. Every result is compared with the float32
reference before it is timed. Caches take turns so that none is in the L2 cache when its turn comes.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.common import Row, command, rel_rms, save, table  # noqa: E402
from qplugins.kernels.attention import decode as decode_kernel  # noqa: E402
from qplugins.kernels.attention import ref as attention  # noqa: E402
from qplugins.kernels.attention.op import merge, prefill  # noqa: E402
from qplugins.kernels.common.timing import bandwidth, copies, time_us  # noqa: E402
from qplugins.kernels.kv import ref  # noqa: E402
from qplugins.kernels.kv.op import gather, write  # noqa: E402
from qplugins.kernels.kv.page import Page  # noqa: E402
from qplugins.kv import KV_LAYOUTS, get_layout  # noqa: E402

DECODE = [(1, 32768), (8, 8192), (8, 32768), (32, 8192), (1, 131072), (64, 2048), (8, 32800), (16, 8200)]  # the last two as while serving
SHAPES = [(32, 8, 128), (64, 8, 128), (32, 8, 64)]  # query heads, KV heads, head_dim
TOLERANCE = 0.01  # |error| / |output|: rounding to bf16 is 0.002, weights rounded to bf16 a little more; FP8 is not held to it
PAGE_SIZE = 128
BF16 = torch.bfloat16


@dataclass
class Batch:
    """Sequences of `lens` tokens, their last `queries` tokens asking. block_tables: one for each copy of the cache, all in one tensor of pages."""

    lens: list[int]
    queries: int
    block_tables: list[Tensor]
    q: Tensor
    seq_lens: Tensor
    cu_queries: Tensor

    @property
    def page_count(self) -> int:
        return sum(-(-n // PAGE_SIZE) for n in self.lens)

    @classmethod
    def make(cls, lens: list[int], queries: int, heads: int, head_dim: int, page_bytes: int) -> "Batch":
        counts = [-(-n // PAGE_SIZE) for n in lens]
        order = torch.randperm(sum(counts) * copies(sum(counts) * page_bytes), dtype=torch.int32, device="cuda")
        tables = []
        for part in order.split(sum(counts)):
            table_ = torch.zeros(len(lens), max(counts), dtype=torch.int32, device="cuda")
            for b, pages in enumerate(part.split(counts)):
                table_[b, : len(pages)] = pages
            tables.append(table_)
        q = torch.randn(len(lens) * queries, heads, head_dim, dtype=BF16, device="cuda")
        cu = torch.arange(len(lens) + 1, dtype=torch.int32, device="cuda") * queries
        return cls(lens, queries, tables, q, torch.tensor(lens, dtype=torch.int32, device="cuda"), cu)


def random_pages(page: Page, count: int, kv_heads: int) -> Tensor:
    """[count, kv_heads, nbytes] of codes that are anything; scales, zeros and means up to 0.1."""
    pages = torch.randint(0, 256, (count, kv_heads, page.nbytes), dtype=torch.uint8, device="cuda")
    for name in ("scales_k", "scales_v", "mean_k", "row_scales"):
        part = ref._part(pages, page, name, torch.float16)
        part.copy_(0.1 * torch.rand(part.shape, device="cuda"))
    return pages


def read_bytes(page: Page) -> int:
    """Bytes of a page that decode has to read: all but rows and padding."""
    return page.offsets["row_scales"]


def own_decode(layout: str, kv_heads: int, launch: decode_kernel.Launch | None = None):
    def make(batch: Batch) -> tuple[list[Callable], Callable | None]:
        heads, head_dim = batch.q.shape[1:]
        page = get_layout(layout).page(head_dim, PAGE_SIZE)
        pages = random_pages(page, batch.page_count * len(batch.block_tables), kv_heads)
        workspace = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        out = torch.empty_like(batch.q)
        scale = head_dim**-0.5

        def call(block_table: Tensor) -> Tensor:
            decode_kernel.decode(
                batch.q,
                pages,
                block_table,
                batch.seq_lens,
                batch.cu_queries,
                workspace,
                out,
                None,
                page,
                batch.queries,
                max(batch.lens),
                scale,
                launch=launch,
            )
            return out

        def reference(block_table: Tensor) -> Tensor:
            return attention.decode(batch.q.float(), pages, block_table, batch.seq_lens, batch.cu_queries, page, scale)[0]

        return [lambda t=t: call(t) for t in batch.block_tables], lambda: reference(batch.block_tables[0])

    return make


def flash(kv_heads: int, dtype: torch.dtype):
    """FlashAttention 3 as vLLM calls it."""

    def make(batch: Batch) -> tuple[list[Callable], Callable | None]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        heads, head_dim = batch.q.shape[1:]
        shape = (batch.page_count * len(batch.block_tables), PAGE_SIZE, kv_heads, head_dim)
        k, v = (torch.randn(shape, dtype=BF16, device="cuda").to(dtype) for _ in range(2))
        q = batch.q.to(dtype)
        one = torch.ones(len(batch.lens), kv_heads, device="cuda")
        descale = {} if dtype == BF16 else {"q_descale": one, "k_descale": one, "v_descale": one}

        def call(block_table: Tensor) -> Tensor:
            return flash_attn_varlen_func(
                q=q, k=k, v=v, max_seqlen_q=batch.queries, cu_seqlens_q=batch.cu_queries, max_seqlen_k=max(batch.lens), seqused_k=batch.seq_lens,
                block_table=block_table, softmax_scale=head_dim**-0.5, causal=True, fa_version=3, **descale,
            )  # fmt: skip

        return [lambda t=t: call(t) for t in batch.block_tables], None

    return make


def run_decode(layouts: list[str], shapes: list, cases: list, rate: float, rep_ms: float) -> list[Row]:
    found = []
    for (heads, kv_heads, head_dim), (name, lens) in product(shapes, cases):
        implementations = {
            "fa3 bf16": (flash(kv_heads, BF16), 4 * head_dim),
            "fa3 fp8": (flash(kv_heads, torch.float8_e4m3fn), 2 * head_dim),
        }
        for layout in layouts:
            page = get_layout(layout).page(head_dim, PAGE_SIZE)
            implementations[layout] = own_decode(layout, kv_heads), read_bytes(page) / PAGE_SIZE
        for impl, (make, token_bytes) in implementations.items():
            batch = Batch.make(lens, 1, heads, head_dim, int(kv_heads * token_bytes * PAGE_SIZE))
            case = {"op": "decode", "case": name, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
            floor = batch.page_count * PAGE_SIZE * kv_heads * token_bytes / rate * 1e6
            found.append(measured(case, impl, floor, lambda make=make, batch=batch: make(batch), rep_ms))
    return found


def measured(case: dict, impl: str, floor: float, make: Callable, rep_ms: float) -> Row:
    """One row: checked where there is a reference, then timed; or why not."""
    try:
        calls, reference = make()
        error = None
        if reference is not None:
            error = rel_rms(calls[0](), reference())
            if not error < TOLERANCE:
                return Row("attention", case, impl, None, floor, "wrong", error)
        row = Row("attention", case, impl, time_us(calls, rep_ms), floor, error=error)
    except Exception as e:
        row = Row("attention", case, impl, None, floor, f"{type(e).__name__}: {e}"[:200])
    torch.cuda.empty_cache()
    print(f"{case} {impl}: {row.us and round(row.us, 1)} us, floor {floor:.1f} {row.note}", flush=True)
    return row


def run_write(layouts: list[str], rate: float, rep_ms: float) -> list[Row]:
    """A decode step of 32 sequences, and a prompt of 8,192 tokens."""
    found = []
    for layout, (batch, new, length) in product(layouts, [(32, 1, 1000), (1, 8192, 8192)]):
        page, heads = get_layout(layout).page(128, PAGE_SIZE), 8

        def make(page=page, heads=heads, batch=batch, new=new, length=length):
            per = -(-length // PAGE_SIZE)
            pages = random_pages(page, batch * per, heads)
            block_table = torch.randperm(batch * per, dtype=torch.int32, device="cuda").view(batch, per)
            k, v = torch.randn(2, batch * new, heads, 128, dtype=BF16, device="cuda")
            position = torch.arange(length - new, length, device="cuda")
            slots = (block_table[:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE).flatten()
            cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * new
            lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
            call = lambda: write(pages, k, v, slots, cu, lens, block_table, page, new)  # noqa: E731

            def stored() -> Tensor:
                call()
                start = torch.full((batch,), length - new, dtype=torch.int32, device="cuda")
                return torch.cat(gather(pages, block_table, start, cu, batch * new, page, torch.float32), -1)

            want = pages.clone()
            ref.write(want, k, v, slots, cu, lens, block_table, page)
            start = torch.full((batch,), length - new, dtype=torch.int32, device="cuda")
            want = torch.cat(ref.gather(want, block_table, start, cu, batch * new, page, torch.float32), -1)
            if not (error := rel_rms(stored(), want)) < TOLERANCE:
                raise AssertionError(f"wrong: {error}")
            return [call], None

        floor = batch * new * heads * (4 * 128 + page.nbytes / PAGE_SIZE) / rate * 1e6
        found.append(measured({"op": "write", "case": f"{batch}x{new}"}, layout, floor, make, rep_ms))
    return found


def run_first(layouts: list[str], rate: float, rep_ms: float) -> list[Row]:
    """A prompt of 8,192 tokens as one chunk: FlashAttention over its own keys and values, which then are stored, by vLLM's kernel in 16 bits or as pages."""
    found, n, heads, kv_heads, dim = [], 8192, 32, 8, 128
    floor = 2.0 * n * n * dim * heads / 990e12 * 1e6  # operations, at the tensor cores' rate
    q = torch.randn(n, heads, dim, dtype=BF16, device="cuda")
    k, v = torch.randn(2, n, kv_heads, dim, dtype=BF16, device="cuda")
    cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
    lens = torch.tensor([n], dtype=torch.int32, device="cuda")
    block_table = torch.randperm(n // PAGE_SIZE, dtype=torch.int32, device="cuda")[None]
    slots = (block_table[0].long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device="cuda")).flatten()

    def stored(store: Callable[[], None]):
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        def call() -> Tensor:
            store()
            return flash_attn_varlen_func(
                q=q, k=k, v=v, max_seqlen_q=n, cu_seqlens_q=cu, max_seqlen_k=n, cu_seqlens_k=cu, softmax_scale=dim**-0.5, causal=True,
                fa_version=3, return_softmax_lse=True,
            )[0]  # fmt: skip

        return [call], None

    def bf16():
        from vllm._custom_ops import reshape_and_cache_flash

        keys, values = torch.empty(2, n // PAGE_SIZE, PAGE_SIZE, kv_heads, dim, dtype=BF16, device="cuda")
        one = torch.ones((), device="cuda")
        return stored(lambda: reshape_and_cache_flash(k, v, keys, values, slots, "auto", one, one))

    case = {"op": "prefill", "case": f"first {n}"}
    found.append(measured(case, "fa3, nothing stored", floor, lambda: stored(lambda: None), rep_ms))
    found.append(measured(case, "fa3 bf16", floor, bf16, rep_ms))
    for layout in layouts:
        page = get_layout(layout).page(dim, PAGE_SIZE)
        pages = random_pages(page, n // PAGE_SIZE, kv_heads)
        own = lambda page=page, pages=pages: stored(lambda: write(pages, k, v, slots, cu, lens, block_table, page, n))  # noqa: E731
        found.append(measured(case, layout, floor, own, rep_ms))
    return found


def run_prefill(layouts: list[str], rate: float, rep_ms: float) -> list[Row]:
    """A chunk of 4,096 tokens over 28,672 cached ones: qplugins' kernel, reading the pages for FlashAttention, and FlashAttention over bf16."""
    found, chunk, context, heads, kv_heads, dim = [], 4096, 28672, 32, 8, 128
    floor = 4.0 * chunk * context * dim * heads / 990e12 * 1e6  # operations, at the tensor cores' rate
    q = torch.randn(chunk, heads, dim, dtype=BF16, device="cuda")
    cu_q = torch.tensor([0, chunk], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, context], dtype=torch.int32, device="cuda")
    lens = torch.tensor([context], dtype=torch.int32, device="cuda")
    start = torch.zeros(1, dtype=torch.int32, device="cuda")
    case = {"op": "prefill", "case": f"{chunk} over {context}"}

    def flash_over(k: Tensor, v: Tensor) -> Tensor:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q=q, k=k, v=v, max_seqlen_q=chunk, cu_seqlens_q=cu_q, max_seqlen_k=context, cu_seqlens_k=cu_k, softmax_scale=dim**-0.5, causal=False,
            fa_version=3, return_softmax_lse=True,
        )  # fmt: skip

    def bf16():
        k, v = torch.randn(2, context, kv_heads, dim, dtype=BF16, device="cuda")
        return [lambda: flash_over(k, v)], None

    found.append(measured(case, "fa3 bf16", floor, bf16, rep_ms))
    for layout in layouts:
        page = get_layout(layout).page(dim, PAGE_SIZE)
        pages = random_pages(page, context // PAGE_SIZE, kv_heads)
        block_table = torch.randperm(context // PAGE_SIZE, dtype=torch.int32, device="cuda")[None]

        def own(page=page, pages=pages, block_table=block_table):
            few = q[:64].float()
            want, _ = attention.prefill(few, pages, block_table, lens, torch.tensor([0, 64]), page, dim**-0.5)
            out, _ = prefill(q, pages, block_table, lens, cu_q, page, max_query_len=chunk, scale=dim**-0.5)
            if not (error := rel_rms(out[:64], want)) < TOLERANCE:
                raise AssertionError(f"wrong: {error}")
            return [lambda: prefill(q, pages, block_table, lens, cu_q, page, max_query_len=chunk, scale=dim**-0.5)], None

        def through_flash(page=page, pages=pages, block_table=block_table):
            def call():
                out, lse = flash_over(*gather(pages, block_table, start, cu_k, context, page, BF16))[:2]
                return merge(out, lse.T, out, lse.T)

            return [call], None

        found.append(measured(case, layout, floor, own, rep_ms))
        found.append(measured(case, f"{layout}, gathered for fa3", floor, through_flash, rep_ms))
    return found


def tune(layout: str, head_dim: int, heads: int, rate: float, rep_ms: float) -> None:
    """Every launch of decode at 8 x 32768; kernels/attention/decode.py holds what won."""
    page = get_layout(layout).page(head_dim, PAGE_SIZE)
    batch = Batch.make([32768] * 8, 1, heads, head_dim, 8 * page.nbytes)
    floor = batch.page_count * 8 * read_bytes(page) / rate * 1e6
    best = decode_kernel.launch_of(page, decode_kernel.rows_of(heads // 8, 1)[0])
    for programs, stages, registers, tokens in product((2, 3, 4), (2, 5, 6), (None, 168), (32, 64)):
        at_once = best.round * best.tokens // tokens  # by a program of fewer warps, in as many registers
        launch = replace(best, programs=programs, stages=stages, registers=registers, tokens=tokens, round=at_once)
        measured({"launch": str(launch)}, layout, floor, lambda launch=launch: own_decode(layout, 8, launch)(batch), rep_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(KV_LAYOUTS), choices=list(KV_LAYOUTS))
    parser.add_argument("--ops", nargs="+", default=["decode", "write", "prefill"], choices=["decode", "write", "prefill"])
    parser.add_argument("--all-shapes", action="store_true", help="64 query heads and head_dim 64 too")
    parser.add_argument("--tune", action="store_true", help="try every launch of decode")
    parser.add_argument("--rep-ms", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "attention.json")
    args = parser.parse_args()
    rate = bandwidth()
    print(f"copy bandwidth {rate / 1e12:.2f} TB/s; floor = what must be read or written of the cache / that")
    if args.tune:
        for layout in args.layouts:
            tune(layout, 128, 32, rate, args.rep_ms)
        return
    cases = [(f"{b}x{n}", [n] * b) for b, n in DECODE] + [("1x65536 + 31x2048", [65536] + [2048] * 31)]
    runs = {
        "decode": lambda: run_decode(args.layouts, SHAPES if args.all_shapes else SHAPES[:1], cases, rate, args.rep_ms),
        "write": lambda: run_write(args.layouts, rate, args.rep_ms),
        "prefill": lambda: run_first(args.layouts, rate, args.rep_ms) + run_prefill(args.layouts, rate, args.rep_ms),
    }
    rows: list[Row] = []
    for op in args.ops:
        rows += runs[op]()
        save(args.out, rows, suite="attention", bandwidth=rate, command=command())
    lines = [
        (
            r.case["op"],
            r.case.get("case"),
            r.case.get("heads", ""),
            r.case.get("head_dim", ""),
            r.impl,
            r.us and f"{r.us:.1f}",
            f"{r.floor_us:.1f}",
            r.us and f"{r.us / r.floor_us:.2f}",
            r.note,
        )
        for r in rows
    ]
    print(table(["op", "case", "heads", "dim", "impl", "us", "floor", "ratio", "note"], lines))


if __name__ == "__main__":
    main()
