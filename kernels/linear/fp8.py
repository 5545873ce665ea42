"""FP8 products: x rounded to e4m3, one scale a row of x or a stored one for all of it, times an e4m3 W, through torch._scaled_mm (cuBLASLt).

s[m] = max_k |x[m, k]| / 448      q[m, k] = e4m3(x[m, k] / s[m])      y[m, n] = s[m] * scale[n] * sum_k q[m, k] W[n, k] + bias[n]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch
from qplugins.kernels.decode.e4m3 import MAX
from qplugins.kernels.linear.layout import named
from qplugins.kernels.linear.spec import Spec

TINY = 1e-12  # of a row of zeros
BLOCK = 8192  # columns of a row that a program holds at once


@triton.jit
def quantize_kernel(x, stored, q, scale, K, stride_x, STATIC: tl.constexpr, ONCE: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """One program: one row of x. ONCE: the row fits into one block, and is read once."""
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x += row * stride_x
    q += row * K
    if STATIC:
        s = tl.load(stored)
    elif ONCE:
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        s = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    else:
        largest = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, K, BLOCK_K):
            largest = tl.maximum(largest, tl.abs(tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)))
        s = tl.maximum(tl.max(largest), 1e-12) / 448.0
    if ONCE:
        if STATIC:
            values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(q + k, tl.clamp(values / s, -448.0, 448.0).to(q.dtype.element_ty), mask=k < K)
    else:
        for start in range(0, K, BLOCK_K):
            values = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            tl.store(q + start + k, tl.clamp(values / s, -448.0, 448.0).to(q.dtype.element_ty), mask=start + k < K)
    tl.store(scale + row, s)


def quantize(x: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (e4m3 [M, K], scale float32 [M, 1]). stored: float32 [1], the scale to use for every row."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(k))
    warps = min(16, max(1, block // 512))
    static = stored is not None
    quantize_kernel[(m,)](
        x,
        stored if static else x,
        q,
        scale,
        k,
        x.stride(0),
        STATIC=static,
        ONCE=k <= block,
        BLOCK_K=block,
        num_warps=warps,
        **dependent_launch(),
    )
    return q, scale


def quantize_ref(x: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in torch: what the kernel is compared with."""
    x = x.to(torch.float32)
    s = x.abs().amax(1, keepdim=True).clamp_min(TINY) / MAX if stored is None else stored.expand(x.shape[0], 1)
    return (x / s).clamp(-MAX, MAX).to(torch.float8_e4m3fn), s


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias, x and out bfloat16, M > 0."""
    t = named("scaled_mm", spec, tensors)
    q, scale = quantize(x, t.get("input_scale"))
    if t["scale"].numel() == 1:
        scale, weight_scale = t["input_scale"], t["scale"]
    else:
        weight_scale = t["scale"][None, :]
    if out.is_contiguous():
        torch._scaled_mm(q, t["weight"].T, scale, weight_scale, bias=bias, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch._scaled_mm(q, t["weight"].T, scale, weight_scale, bias=bias, out_dtype=out.dtype))
