"""FP8 products: x rounded to e4m3, one scale a row of x or a stored one for all of it, times an e4m3 W, through torch._scaled_mm (cuBLASLt), or
on Hopper through fp8_few.py for few rows, and fp8_wide.py for more.

s[m] = max_k |x[m, k]| / 448      q[m, k] = e4m3(x[m, k] / s[m])      y[m, n] = s[m] * scale[n] * sum_k q[m, k] W[n, k] + bias[n]
"""

from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, on_hopper
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.decode.e4m3 import MAX
from qplugins.kernels.linear import fp8_few, fp8_wide
from qplugins.kernels.linear.layout import named
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import cdiv

TINY = 1e-12  # of a row of zeros
BLOCK = 32768  # columns of a row that a program holds at once
VALUES = 32  # of them a thread's, at least
# zeroed for a product whose programs share K: fp8_few.py has one a block of y, of which there are fewer than multiprocessors then, fp8_wide.py three
# a multiprocessor at most
LOCKS = 512


@triton.jit
def quantize_kernel(
    x, stored, q, scale, locks, K, stride_x,
    STATIC: tl.constexpr, ONCE: tl.constexpr, BLOCK_K: tl.constexpr, LOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row of x. ONCE: the row fits into one block, and is read once. LOCKS: how many the first one zeroes."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x += row * stride_x
    q += row * K
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if STATIC:
        s = tl.load(stored)
    else:
        largest = tl.abs(values)
        if not ONCE:
            for start in range(BLOCK_K, K, BLOCK_K):
                largest = tl.maximum(largest, tl.abs(tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)))
        s = tl.maximum(tl.max(largest), 1e-12) / 448.0
    steps = 1.0 / s  # a unit
    tl.store(q + k, tl.clamp(values * steps, -448.0, 448.0).to(q.dtype.element_ty), mask=k < K)
    if not ONCE:
        for start in range(BLOCK_K, K, BLOCK_K):
            values = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            tl.store(q + start + k, tl.clamp(values * steps, -448.0, 448.0).to(q.dtype.element_ty), mask=start + k < K)
    tl.store(scale + row, s)
    if LOCKS > 0:
        if row == 0:
            tl.store(locks + tl.arange(0, LOCKS), 0)


@cache
def _quantizer(block: int, once: bool, static: bool, locks: int) -> Launcher:
    warps = min(32, max(1, block // (32 * VALUES)))
    return Launcher(quantize_kernel, STATIC=static, ONCE=once, BLOCK_K=block, LOCKS=locks, num_warps=warps, **dependent_launch())


def quantize(x: Tensor, stored: Tensor | None = None, locks: Tensor | None = None, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (e4m3 [M, K], scale float32 [M, 1]).

    stored  float32 [1], the scale to use for every row        locks  int32, to be zeroed beside
    rows    of both results, where these should have more than x: anything may be in those
    """
    m, k = x.shape
    q = torch.empty(rows or m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows or m, 1, dtype=torch.float32, device=x.device)
    block = min(BLOCK, 1 << (k - 1).bit_length())
    launch = _quantizer(block, k <= block, stored is not None, 0 if locks is None else locks.numel())
    launch((m,), x, x if stored is None else stored, q, scale, q if locks is None else locks, k, x.stride(0))
    return q, scale


def quantize_ref(x: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in torch: what the kernel is compared with."""
    x = x.to(torch.float32)
    s = x.abs().amax(1, keepdim=True).clamp_min(TINY) / MAX if stored is None else stored.expand(x.shape[0], 1)
    return (x / s).clamp(-MAX, MAX).to(torch.float8_e4m3fn), s


def _ours(m: int, spec: Spec, out: Tensor) -> ModuleType | None:
    """Which of our kernels multiplies m rows; None where torch._scaled_mm does."""
    if fp8_few.suits(m, spec):
        return fp8_few
    return fp8_wide if fp8_wide.suits(m, spec, out.device) and fp8_wide.refuses(spec, out) is None else None


def padded(m: int) -> int:
    """Rows that torch._scaled_mm should have for m of them. For numbers that are no multiples of 128, cuBLASLt (13.0, Hopper) has kernels which take up to
    half as long again as for the next one that is: 6144 x 4096 with 704 rows 44.5 us, with 768 rows 40.1."""
    block = fp8_wide.SCALED_BLOCK
    return cdiv(m, block) * block if m > block and on_hopper() else m


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias, x and out bfloat16, M > 0.

    out  may have more rows, those that `padded` asks for; anything may be in them afterwards
    """
    t, m = named("scaled_mm", spec, tensors), x.shape[0]
    if ours := _ours(m, spec, out):
        locks = torch.empty(LOCKS, dtype=torch.int32, device=x.device)
        q, scale = quantize(x, t.get("input_scale"), locks)
        ours.linear(q, scale, t["weight"], t["scale"], spec, locks, out[:m], bias)
        return
    q, scale = quantize(x, t.get("input_scale"), rows=out.shape[0])
    if t["scale"].numel() == 1:
        scale, weight_scale = t["input_scale"], t["scale"]
    else:
        weight_scale = t["scale"][None, :]
    if out.is_contiguous():
        torch._scaled_mm(q, t["weight"].T, scale, weight_scale, bias=bias, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch._scaled_mm(q, t["weight"].T, scale, weight_scale, bias=bias, out_dtype=out.dtype))


_done: set[tuple] = set()


def warm(spec: Spec, tensors: list[Tensor], dtype: torch.dtype, bias: bool) -> None:
    """Runs on zeros whatever `linear` of such a layer compiles, if no layer before had it."""
    t = named("scaled_mm", spec, tensors)
    device = t["weight"].device
    few = fp8_few.variants(spec, device)
    refused = fp8_wide.refuses(spec, torch.empty(1, spec.n, dtype=dtype, device=device))
    wide = {} if refused else fp8_wide.variants(spec, device)
    # what kernels are compiled for: the format, a row's length, and which sizes are 1 or multiples of 16
    key = (device, dtype, bias, *few, *wide, replace(spec, n=0), spec.n % 16 == 0, t["scale"].numel() == 1)
    if key in _done:
        return
    _done.add(key)
    rows = [*few.values(), *wide.values()]
    x, y = (torch.zeros(max([1, *rows]), n, dtype=dtype, device=device) for n in (spec.k, spec.n))
    quantize(x[:1], t.get("input_scale"))  # for torch._scaled_mm, which has no locks
    for m in rows:
        linear(x[:m], spec, tensors, y[:m], torch.zeros(spec.n, dtype=dtype, device=device) if bias else None)
