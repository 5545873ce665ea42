"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] for very many rows of x: W is decoded once into 16 bits, and the rest is PyTorch's own product.

Decoding reads W's codes and writes it in 16 bits, which takes as long whatever the rows are, while kernel.py decodes W anew for each block of
them. What a weight is rounded to is its value in x's type, as in a 16-bit checkpoint: e2m1 and e4m3 weights too, whose row factors kernel.py
applies to the sum.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.linear.layout import named
from qplugins.kernels.linear.product import constants, decoded, load, of_groups, rows_of_tiles
from qplugins.kernels.linear.spec import Spec
from qplugins.kernels.linear.tiles import Tile, cdiv

TILE = Tile(64, 1, 2)  # what one program decodes: rows, none of x, tiles of columns
SCRATCH = 1 << 28  # bytes of decoded weights at a time
LEAST_ROWS = 4096
"""Of x, from which on this is the faster one: there what decoding reads and writes, 2.6 bytes a weight, takes less time than kernel.py loses to a
16-bit product, 13 % or more (bench/results/linear_nvfp4.json)."""


@triton.jit(do_not_specialize=["first_row", "N", "tiles_k", "pairs"])
def decode_kernel(
    codes, row, scale, zero, out, first_row, N, K, tiles_k, pairs,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UP: tl.constexpr, OUT: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out[n - first_row, k] = W[n, k]. Program (n, k): BLOCK_N rows, STEP tiles of columns. Arguments as of linear_kernel; out [rows, K]"""
    dtype: tl.constexpr = out.dtype.element_ty
    TILE_K: tl.constexpr = 64 if CODE == "int4" or CODE == "e2m1" else 32
    block = first_row // BLOCK_N + tl.program_id(0)
    first = tl.program_id(1) * STEP
    words, pair = rows_of_tiles(codes, block, first, N, tiles_k, pairs, BLOCK_N, STEP)
    w, sw, zw = load(words, scale, zero, first + tl.arange(0, STEP), tiles_k, pairs, pair, CODE, SCALE, GROUP, ZERO, EVEN_K)
    d = decoded(w, sw, zw, CODE, SCALE, GROUP, ZERO, UP, BLOCK_N, STEP, dtype, PTX)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first * TILE_K + tl.arange(0, STEP * TILE_K)
    # in this order: a row's factor may be near float32's end
    d = d.to(tl.float32) * OUT * tl.load(row + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + (n - first_row)[:, None].to(tl.int64) * K + k[None, :], d.to(dtype), mask=(n < N)[:, None] & (k < K)[None, :])


@cache
def _launcher(spec: Spec, dtype: torch.dtype) -> Launcher:
    fixed = {name: value for name, value in constants(spec, dtype, TILE).items() if name in decode_kernel.arg_names}
    return Launcher(decode_kernel, **fixed, num_warps=TILE.warps, num_stages=1)


def decode(spec: Spec, tensors: list[Tensor], first_row: int, out: Tensor) -> None:
    """out [rows, K] = rows first_row, a multiple of 64, and following of W, in out's type, bfloat16 or float16."""
    t = named("triton", spec, tensors)
    scale, zero, grouped = of_groups(t, t["row"])
    tiles_k = t["codes"].shape[1]
    _launcher(spec, out.dtype)(
        (cdiv(out.shape[0], TILE.block_n), cdiv(tiles_k, TILE.step)),
        t["codes"], t["row"], scale, zero, out, first_row, first_row + out.shape[0], spec.k, tiles_k, 0 if grouped is None else grouped.shape[1],
    )  # fmt: skip


def linear(x: Tensor, spec: Spec, tensors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """out[M, N] = x[M, K] @ W.T + bias, as kernel.linear; out's rows may be any distance apart."""
    rows = min(spec.n, max(64, SCRATCH // (spec.k * x.element_size()) // 64 * 64))
    scratch = torch.empty(rows, spec.k, dtype=x.dtype, device=x.device)
    for first in range(0, spec.n, rows):
        w = scratch[: min(rows, spec.n - first)]
        decode(spec, tensors, first, w)
        y = out[:, first : first + len(w)]
        if bias is None:
            torch.mm(x, w.T, out=y)
        else:
            torch.addmm(bias[first : first + len(w)], x, w.T, out=y)
