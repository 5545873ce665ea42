"""Joins attention over two disjoint sets of tokens by their log-sum-exp; ref.merge is the definition."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.kv.page import _pow2

EACH = 16  # rows of a program


@triton.jit(do_not_specialize=["rows", "stride_la", "stride_lah", "stride_lb", "stride_lbh"])
def merge_kernel(
    a, lse_a, b, lse_b, out, lse, rows, heads, stride_a, stride_ah, stride_la, stride_lah, stride_b, stride_bh, stride_lb, stride_lbh,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[i, h] = (a[i, h] exp(lse_a) + b[i, h] exp(lse_b)) / exp(lse). One program: ROWS of the rows (i, h); out and lse are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    i, h = row // heads, row % heads
    la = tl.load(lse_a + i * stride_la + h * stride_lah, mask=inside, other=0.0)
    lb = tl.load(lse_b + i * stride_lb + h * stride_lbh, mask=inside, other=0.0)
    top = tl.maximum(la, lb)
    top = tl.where(top == float("-inf"), 0.0, top)
    ea, eb = tl.exp(la - top), tl.exp(lb - top)
    total = ea + eb
    d = tl.arange(0, DP)
    here = inside[:, None] & (d < D)[None, :]
    # what was not seen may hold anything
    xa = tl.load(a + (i * stride_a + h * stride_ah)[:, None] + d[None, :], mask=here & (ea > 0)[:, None], other=0.0).to(tl.float32)
    xb = tl.load(b + (i * stride_b + h * stride_bh)[:, None] + d[None, :], mask=here & (eb > 0)[:, None], other=0.0).to(tl.float32)
    norm = tl.where(total > 0, 1.0 / total, 0.0)
    y = xa * (ea * norm)[:, None] + xb * (eb * norm)[:, None]
    tl.store(out + row[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=here)
    tl.store(lse + row, tl.where(total > 0, top + tl.log(total), float("-inf")), mask=inside)


@cache
def _launcher(dim: int) -> Launcher:
    return Launcher(merge_kernel, D=dim, DP=_pow2(dim), ROWS=EACH, num_warps=4)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See op.py."""
    n, heads, dim = out_a.shape
    out = torch.empty(n, heads, dim, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(n, heads, dtype=torch.float32, device=out_a.device)
    if rows := n * heads:
        _launcher(dim)(
            (triton.cdiv(rows, EACH),),
            out_a, lse_a, out_b, lse_b, out, lse, rows, heads, out_a.stride(0), out_a.stride(1), lse_a.stride(0), lse_a.stride(1),
            out_b.stride(0), out_b.stride(1), lse_b.stride(0), lse_b.stride(1),
        )  # fmt: skip
    return out, lse
