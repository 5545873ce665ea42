"""FP8 products of few rows on Hopper: those for which torch._scaled_mm has a kernel that does not fill the GPU.

It cuts y into 128 x 128 blocks whatever x has. Here W is the first operand, y.T = W q.T, so that the tensor core's 64 rows are W's and few rows of x
waste nothing. Both come as they lie in memory, a step of K at a time, through shared memory. Where W's blocks do not fill the GPU, programs share K
as in product.py; their locks come from the quantizer, which runs in front of this kernel and zeroes them, so that no state stays behind.

Times of the quantizer and torch._scaled_mm, of the quantizer and this kernel, and of the quantizer and fp8_wide.py's smallest tile, for 16 rows on an H100
in us (bench/results/fp8_tiles.json): 4096 x 4096 16.4, 10.8 and 11.7; 6144 x 4096 20.2, 12.7 and 14.8; 28672 x 4096 54.2, 46.3 and 45.5; 8192 x 8192
41.2, 30.1 and 30.9; 4096 x 14336 47.0, 27.4 and 27.4. Asking for the weight while the quantizer runs, to have it in the L2
cache, made torch._scaled_mm a few percent quicker for some layers and slower for others, and this kernel slower.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET, dependent_launch, on_hopper
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.linear.product import leave_share, sum_shares
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import cdiv, multiprocessors

# found on an H200 with Triton 3.6, over the layers of Llama 8B and a square one of 70B
BLOCK_N = 64  # rows of W
BLOCK_K = 128  # bytes of a row at a time
STAGES = {16: 8, 32: 7}  # rows of x in a block -> buffers: so many that two programs fit on a multiprocessor
MOST = max(STAGES)  # rows; fp8_wide.py is for more


@triton.jit(do_not_specialize=["M", "split_k", "steps"])
def few_kernel(
    q, scale, weight, row, bias, y, work, locks,
    M, N, K, stride_y, stride_row, split_k, steps,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SHARED_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = scale[m] row[n] sum_k q[m, k] weight[n, k] + bias[n]. One program: all rows of y, BLOCK_N columns of them and a share of K.

    q      e4m3 [M, K]                       weight  e4m3 [N, K]          y  [M, N], rows stride_y apart
    scale  float32 [M]                       row     float32 [N], or one for all with stride_row 0
    steps  of a share, each BLOCK_K columns                               locks   int32 [blocks], zeros
    """
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the quantizer, which let this kernel come up early
    block = tl.program_id(0)
    share = tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    first = share * steps * BLOCK_K  # this share's first column
    k = first + tl.arange(0, BLOCK_K)
    # rows past the last are the last again; they are not stored
    w = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    x = q + m[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(first, tl.minimum(first + steps * BLOCK_K, K), BLOCK_K):
        # the tensor core adds e4m3 products up in fewer bits than float32 has, so no more than one step of them
        acc = tl.dot(tl.load(w), tl.load(x, mask=(m < M)[None, :], other=0.0), acc, max_num_imprecise_acc=BLOCK_K)
        w += BLOCK_K
        x += BLOCK_K
    if SHARED_K:
        mine = work + block.to(tl.int64) * split_k * (BLOCK_N * BLOCK_M)
        if not leave_share(acc, mine, share, locks + block, split_k, BLOCK_N, BLOCK_M):
            return
        acc = sum_shares(mine, locks + block, split_k, BLOCK_N, BLOCK_M)
    acc = acc * tl.load(row + n * stride_row, mask=n < N, other=0.0)[:, None] * tl.load(scale + m, mask=m < M, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * stride_y + n[:, None], acc.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def suits(m: int, spec: Spec) -> bool:
    """Whether this kernel is the one for so many rows of x."""
    return m <= MOST and spec.k % BLOCK_K == 0 and (on_hopper() or INTERPRET.value)


def block_m(m: int) -> int:
    """Rows of x in a block."""
    return next(rows for rows in STAGES if m <= rows)


def blocks(spec: Spec) -> int:
    return cdiv(spec.n, BLOCK_N)


def shares(spec: Spec, device: torch.device) -> tuple[int, int]:
    """(programs that share K, steps of each): a program for each multiprocessor, with four steps at least to fill its buffers."""
    steps = spec.k // BLOCK_K
    split = max(1, min(multiprocessors(device) // blocks(spec), steps // 4))
    each = cdiv(steps, split)
    return cdiv(steps, each), each


def variants(spec: Spec, device: torch.device) -> dict[tuple[int, bool], int]:
    """(rows of x in a block, whether programs share K) -> rows of x that it runs for."""
    return {(m, shares(spec, device)[0] > 1): m for m in STAGES if suits(m, spec)}


@cache
def _launcher(rows: int, bias: bool, shared: bool) -> Launcher:
    return Launcher(
        few_kernel, BIAS=bias, BLOCK_N=BLOCK_N, BLOCK_M=rows, BLOCK_K=BLOCK_K, SHARED_K=shared, num_warps=4, num_stages=STAGES[rows],
        **dependent_launch(),
    )  # fmt: skip


def linear(
    q: Tensor, scale: Tensor, weight: Tensor, row: Tensor, spec: Spec, locks: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    """out[M, N] = q * scale @ (weight * row).T + bias, see `few_kernel`; 0 < M <= MOST. locks: at least `blocks` where programs share K, zeros, and
    they stay so."""
    (m, k), n = q.shape, spec.n
    rows = block_m(m)
    count, (split, steps) = blocks(spec), shares(spec, q.device)
    work = torch.empty(count * split * BLOCK_N * rows, dtype=torch.float32, device=q.device) if split > 1 else scale
    _launcher(rows, bias is not None, split > 1)(
        (count, split),
        q, scale, weight, row, row if bias is None else bias, out, work, locks, m, n, k, out.stride(0), int(row.numel() > 1), split, steps,
    )  # fmt: skip
