"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] for up to 8 rows of x, a W in the `tiles` layout, and a GPU of which W's blocks of 64 rows fill a part.

kernel.py has several programs share a block's K there, which leave sums in memory, and the last of them adds these up: 1.8 us of the 9.4 that one row and a
6144 x 4096 matrix of int4 take on an H100. Here a program has 16 rows of W, a quarter of a tile, and its warps share K: their sums meet in shared memory. That
brings x to four times as many programs, so it is for few rows.

The warps' tiles are to `product.decoded` what the quarters of a tile are: its rows are (warp, row of the 16), its columns those of a warp's STEP tiles.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, dot, on_hopper, prefetch
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.linear.layout import named
from qplugins.kernels.linear.product import constants, decoded, load_groups, of_groups
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import Tile, cdiv, multiprocessors

MOST = 8  # rows of x
ROWS = 16  # of W, that a program has
WARPS = 4
STEP = 4  # tiles of K that a warp multiplies at a time
# programs that multiprocessors get of a matrix -> stages of a program's pipeline, as timed on an H100. There is room for four programs of 3 stages, or three
# of 4: for both of two kernels, one after the other on the stream, that have two or one each, or for one that has four or three
STAGES = {1: 4, 2: 3, 3: 4, 4: 3}


@triton.jit(do_not_specialize=["M", "tiles_k", "pairs"])
def few_kernel(
    x, codes, row, scale, zero, bias, y, M, N, K, stride_x, stride_y, tiles_k, pairs,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, OUT: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n]. One program: all rows of y, 16 columns of them. Arguments as `kernel.linear_kernel` has them."""
    dtype: tl.constexpr = x.dtype.element_ty
    TILE_K: tl.constexpr = 64 if CODE == "int4" or CODE == "e2m1" else 32
    ALL: tl.constexpr = WARPS * STEP  # tiles at a time
    part = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    n = part * 16 + tl.arange(0, 16)
    m_in, n_in = m < M, n < N

    # a tile has four parts of 256 words, one after the other
    own = codes + (part // 4 * tiles_k).to(tl.int64) * 1024 + part % 4 * 256
    if PDL:
        line = tl.arange(0, 4 * ALL)
        prefetch(own + tl.minimum(line // 4, tiles_k - 1) * 1024 + line % 4 * 64, PTX)
    after_previous(PDL)
    warp = tl.arange(0, WARPS)
    tile = warp.reshape(WARPS // 4, 1, 4, 1) * STEP + tl.arange(0, STEP)[None, :, None, None]  # [WARPS / 4, STEP, 4, 1]
    words = own + tile * 1024 + tl.arange(0, 256)
    pair = tl.arange(0, 8 * WARPS)  # of each warp's
    tile_of_pair = (pair // 8)[:, None] * STEP + tl.arange(0, STEP)[None, :]
    pair = part * 8 + pair[:, None] % 8
    k = warp[:, None] * (STEP * TILE_K) + tl.arange(0, STEP * TILE_K)[None, :]
    xs = x + m.to(tl.int64) * stride_x + k[:, :, None]

    acc = tl.zeros((WARPS, 16, BLOCK_M), tl.float32)
    for first in range(0, tiles_k, ALL):
        at = first + tile_of_pair
        if EVEN_K:
            xt = tl.load(xs, mask=m_in, other=0.0)
            w = tl.load(words)
        else:
            xt = tl.load(xs, mask=m_in & (first * TILE_K + k < K)[:, :, None], other=0.0)
            w = tl.load(words, mask=first + tile < tiles_k, other=0)
            at = tl.minimum(at, tiles_k - 1)
        sw, zw = load_groups(scale, zero, at, pairs, pair, CODE, SCALE, GROUP, ZERO)
        w = w.reshape(WARPS // 4, STEP, 1024)
        d = decoded(w, sw, zw, CODE, SCALE, GROUP, ZERO, UP, 16 * WARPS, STEP, dtype, PTX)
        acc = dot(d.reshape(WARPS, 16, STEP * TILE_K), xt, acc)
        words += ALL * 1024
        xs += ALL * TILE_K

    total = tl.sum(acc, 0) * OUT * tl.load(row + n, mask=n_in, other=0.0)[:, None]  # in this order, as kernel.py
    if BIAS:
        total += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * stride_y + n[:, None], total.to(dtype), mask=m_in[None, :] & n_in[:, None])


@cache
def stages_of(spec: Spec, device: torch.device) -> int | None:
    """Of STAGES; None where there are too many programs."""
    return STAGES.get(cdiv(cdiv(spec.n, ROWS), multiprocessors(device)))


def suits(m: int, spec: Spec, device: torch.device) -> bool:
    """Whether this is the kernel for m rows of x: nothing was timed with 8 bits, or on other GPUs than an H100."""
    return m <= MOST and spec.bits == 4 and on_hopper() and stages_of(spec, device) is not None


def constants_of(spec: Spec, dtype: torch.dtype) -> dict:
    """What the kernel is compiled for. dtype: of x."""
    of_product = constants(spec, dtype, Tile(64, MOST, WARPS * STEP, WARPS))
    return {name: value for name, value in of_product.items() if name in few_kernel.arg_names} | {"STEP": STEP, "WARPS": WARPS}


@cache
def _launcher(spec: Spec, dtype: torch.dtype, device: torch.device, bias: bool) -> Launcher:
    stages = stages_of(spec, device) or min(STAGES.values())
    return Launcher(few_kernel, **constants_of(spec, dtype), BIAS=bias, num_warps=WARPS, num_stages=stages, **dependent_launch())


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias. x and out are bfloat16 or float16 and contiguous along their rows; 0 < M <= MOST."""
    t = named("triton", spec, tensors)
    scale, zero, grouped = of_groups(t, t["row"])
    _launcher(spec, x.dtype, x.device, bias is not None)(
        (cdiv(spec.n, ROWS),),
        x, t["codes"], t["row"], scale, zero, t["row"] if bias is None else bias, out, x.shape[0], spec.n, spec.k, x.stride(0), out.stride(0),
        t["codes"].shape[1], 0 if grouped is None else grouped.shape[1],
    )  # fmt: skip
