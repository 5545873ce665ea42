"""FP8 products of few rows on Hopper: those for which torch._scaled_mm has a kernel that does not fill the GPU.

It cuts y into 128 x 128 blocks whatever x has. Here W is the first operand, y.T = W q.T, so that the tensor core's 64 rows are W's and few rows of x
waste nothing. Both come as they lie in memory, a step of K at a time, through shared memory. Where W's blocks do not fill the GPU, programs share K
as in product.py; their locks come from the quantizer, which runs in front of this kernel and zeroes them, so that no state stays behind.

Times of torch._scaled_mm alone, and of the quantizer and this kernel, for a layer of 4096 x 4096 and one of 4096 x 14336 on an H100, in us: 16 rows 14.8
and 11.3, 43.7 and 27.6; 64 rows 13.9 and 12.6, 37.6 and 31.4; 128 rows 13.6 and 13.2, 37.3 and 35.4. The quantizer takes 2.5 to 3 of it. A kernel with
wide.py's ring was slower except for few layers at 128 rows. Asking for the weight while the quantizer runs, to have it in the L2 cache, made
torch._scaled_mm a few percent quicker for some layers and slower for others, and this kernel slower.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET, dependent_launch, on_hopper
from qplugins.kernels.linear.product import leave_share, sum_shares
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import multiprocessors

# found on an H200 with Triton 3.6, over the layers of Llama 8B and a square one of 70B
BLOCK_N = 64  # rows of W
BLOCK_K = 128  # bytes of a row at a time
STAGES = {16: 8, 32: 7, 64: 6}  # rows of x in a block -> buffers: so many that two programs fit on a multiprocessor
MOST = 160  # rows
LOCKS = 128  # blocks that share K are fewer


@triton.jit(do_not_specialize=["M", "split_k", "steps"])
def few_kernel(
    q, scale, weight, row, bias, y, work, locks,
    M, N, K, stride_y, stride_row, split_k, steps,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SHARED_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = scale[m] row[n] sum_k q[m, k] weight[n, k] + bias[n]. One program: a block of y and a share of K; blocks of the same rows of W
    are neighbours, so that all but one find them in the L2 cache.

    q      e4m3 [M, K]                       weight  e4m3 [N, K]          y  [M, N], rows stride_y apart
    scale  float32 [M]                       row     float32 [N], or one for all with stride_row 0
    steps  of a share, each BLOCK_K columns                               locks   int32 [blocks], zeros
    """
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the quantizer, which let this kernel come up early
    block = tl.program_id(0)
    share = tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    n = block // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
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


def suits(m: int, spec: Spec, device: torch.device) -> bool:
    """Whether this kernel is the quicker one for so many rows of x: on an H100 it was so up to 64 for every layer that was timed, up to 128 where all
    blocks of y are on the GPU at once, and above that, where torch._scaled_mm takes larger blocks, up to 160."""
    if not (on_hopper() or INTERPRET.value) or spec.k % BLOCK_K:
        return False
    return m <= 64 or 128 < m <= MOST or (m <= 128 and blocks(m, spec) <= 2 * multiprocessors(device))


def block_m(m: int) -> int:
    """Rows of x in a block."""
    return next((rows for rows in STAGES if m <= rows), max(STAGES))


def blocks(m: int, spec: Spec) -> int:
    return triton.cdiv(spec.n, BLOCK_N) * triton.cdiv(m, block_m(m))


def shares(m: int, spec: Spec, device: torch.device) -> tuple[int, int]:
    """(programs that share K, steps of each): a program for each multiprocessor, two where they are of the same rows of W, with four steps at
    least to fill its buffers."""
    steps = spec.k // BLOCK_K
    split = max(1, min(multiprocessors(device) * min(2, triton.cdiv(m, block_m(m))) // blocks(m, spec), steps // 4))
    each = triton.cdiv(steps, split)
    return triton.cdiv(steps, each), each


def linear(
    q: Tensor, scale: Tensor, weight: Tensor, row: Tensor, spec: Spec, locks: Tensor | None, out: Tensor, bias: Tensor | None = None
) -> None:
    """out[M, N] = q * scale @ (weight * row).T + bias, see `few_kernel`. locks: at least `blocks`, zeros, and they stay so; None
    where nobody shares K."""
    (m, k), n = q.shape, spec.n
    rows = block_m(m)
    count, (split, steps) = blocks(m, spec), shares(m, spec, q.device)
    work = torch.empty(count * split * BLOCK_N * rows, dtype=torch.float32, device=q.device) if split > 1 else scale
    few_kernel[(count, split)](
        q, scale, weight, row, row if bias is None else bias, out, work, work if locks is None else locks, m, n, k, out.stride(0), int(row.numel() > 1), split, steps,
        BIAS=bias is not None, BLOCK_N=BLOCK_N, BLOCK_M=rows, BLOCK_K=BLOCK_K, SHARED_K=split > 1, num_warps=4, num_stages=STAGES[rows],
        **dependent_launch(),
    )  # fmt: skip
