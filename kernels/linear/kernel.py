"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] for a W in the `tiles` layout: product.py over all blocks of y.

A program owns BLOCK_N rows of W (whole tiles of 64) and BLOCK_M rows of x, and walks K, or its share of it, in steps of STEP tiles.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, on_hopper
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.linear.layout import named, tile_k
from qplugins.kernels.linear.product import (
    block_at,
    constants,
    leave_share,
    of_groups,
    prefetch_tiles,
    product,
    shares,
    sum_shares,
    sums_of,
)
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import Tile, balanced, cdiv, choose, multiprocessors


# sizes that change from call to call must not each have a compilation of their own
@triton.jit(do_not_specialize=["M", "tiles_k", "pairs", "steps", "split_k", "stripe_m"])
def linear_kernel(
    x, codes, row, scale, zero, bias, y, work, locks,
    M, N, K, stride_x, stride_y, tiles_k, pairs, steps, split_k, stripe_m,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, OUT: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, SHARED_K: tl.constexpr,
    PTX: tl.constexpr, HOPPER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n]. One program: BLOCK_N columns and BLOCK_M rows of y, and one of split_k shares of K.

    x      [M, K], rows stride_x apart          y      [M, N], rows stride_y apart
    codes, scale, zero, steps, GROUP            of `product`
    row    float32 [N]                          bias   [N]
    work   float32 [blocks, split_k, BLOCK_N, BLOCK_M]                    locks  int32 [blocks], zeros
    """
    dtype: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0)
    share = tl.program_id(1)
    block_m, block_n = block_at(block, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), stripe_m)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in = m[None, :] < M
    if PDL and BLOCK_M > 8:
        # with so many registers a program comes up as one of the kernel in front ends. With fewer it is there long before, and gains nothing
        prefetch_tiles(codes, block_n, share * steps * STEP, N, tiles_k, BLOCK_N, STEP, PTX)
    after_previous(PDL)
    acc = product(
        x + m[None, :].to(tl.int64) * stride_x, m_in, codes, scale, zero, block_n, share, steps, N, K, tiles_k, pairs,
        CODE, SCALE, GROUP, ZERO, UP, EVEN_K, BLOCK_N, BLOCK_M, STEP, dtype, PTX, HOPPER,
    )  # fmt: skip
    if SHARED_K:
        mine = work + block.to(tl.int64) * split_k * (BLOCK_N * BLOCK_M)
        if not leave_share(acc, mine, share, locks + block, split_k, BLOCK_N, BLOCK_M):
            return
        acc = sum_shares(mine, locks + block, split_k, BLOCK_N, BLOCK_M)

    n_in = n < N
    acc = acc * OUT * tl.load(row + n, mask=n_in, other=0.0)[:, None]  # in this order: a row's factor may be near float32's end
    if BIAS:
        acc += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * stride_y + n[:, None], acc.to(dtype), mask=m_in & n_in[:, None])


class Schedule(NamedTuple):
    """blocks   of y
    split    programs that share a block's K
    steps    of each of them
    early    whether they are launched beside the kernel in front of them
    """

    blocks: int
    split: int
    steps: int
    early: bool


def schedule(m: int, spec: Spec, tile: Tile, device: torch.device) -> Schedule:
    """How a product of m rows is launched."""
    blocks = cdiv(m, tile.block_m) * cdiv(spec.n, tile.block_n)
    split, steps = shares(cdiv(spec.k, tile_k(spec)), tile)
    early = on_hopper() and tile.room > 0 and balanced(blocks * split, tile.room, multiprocessors(device))
    return Schedule(blocks, split, steps, early)


@cache
def _launcher(spec: Spec, dtype: torch.dtype, tile: Tile, bias: bool, shared: bool, early: bool) -> Launcher:
    return Launcher(
        linear_kernel, **constants(spec, dtype, tile), BIAS=bias, SHARED_K=shared, num_warps=tile.warps, num_stages=tile.stages,
        **dependent_launch(early),
    )  # fmt: skip


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None, tile: Tile | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias. x and out are bfloat16 or float16 and contiguous along their rows; M > 0.

    tile  None: from the table in tiles.py
    """
    t = named("triton", spec, tensors)
    m = x.shape[0]
    tile = tile or choose(m, spec, x.device)
    blocks, split, steps, early = schedule(m, spec, tile, x.device)
    work = sums_of(blocks, split, tile, t["locks"])
    scale, zero, grouped = of_groups(t, t["row"])
    _launcher(spec, x.dtype, tile, bias is not None, split > 1, early)(
        (blocks, split),
        x, t["codes"], t["row"], scale, zero, t["row"] if bias is None else bias, out, t["row"] if work is None else work, t["locks"], m, spec.n, spec.k, x.stride(0),
        out.stride(0), t["codes"].shape[1], 0 if grouped is None else grouped.shape[1], steps, split, tile.stripe_m,
    )  # fmt: skip
