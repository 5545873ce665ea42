"""Reads stored tokens back in the model's own space, 16 bits each.

A rotated token is (code - half) * scale + zero + mean, and rotation is linear, so with R's signs r = sqrt(b) R, b the size of its blocks,

    x[t, d] = (scale[t] * sum_i c[t, i] r[i, d]  +  zero[t] * sum_i r[i, d]  +  sum_i mean[i] r[i, d]) / sqrt(b)

The first sum is a product of small integers with signs, exact; the second is b where d starts a block of R and 0 elsewhere.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import dot, round_to
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.kv import tile
from qplugins.kernels.kv.page import Page, _pow2, batch_block
from qplugins.kernels.kv.write import touched_pages


def warps_of(page: Page) -> int:
    """So many that their registers hold a page's tokens in float32."""
    return 16 if max(page.head_dim, page.v_head_dim) > 128 else 8


@triton.jit
def _signs(to, d, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [d, to]: r[to, d], or the identity; `to` is -1 where there is nothing."""
    if ROTATE:
        sign = tile.rotation_sign(tl.maximum(to, 0)[None, :], d[:, None], BLOCK)
    else:
        sign = tl.where(to[None, :] == d[:, None], 1.0, 0.0)
    return tl.where(to[None, :] >= 0, sign, 0.0)


@triton.jit(do_not_specialize=["B", "stride_bt"], do_not_specialize_on_alignment=["block_table", "starts", "cu_lens"])
def gather_kernel(
    pages, block_table, starts, cu_lens, k, v,
    B, stride_p, stride_ph, stride_bt, stride_k, stride_kh, stride_v, stride_vh,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, K_PIECES: tl.constexpr, K_JP: tl.constexpr, K_A: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, V_PIECES: tl.constexpr, V_JP: tl.constexpr, V_A: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    BB: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """ref.gather. Program (s, h, z): the s-th page that is read, counted sequence by sequence, of head h; keys (z = 0) or values."""
    KU: tl.constexpr = K_JP * K_WIDE
    VU: tl.constexpr = V_JP * V_WIDE
    share = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    each = tl.arange(0, BB)
    here = each < B
    begins = tl.load(starts + each, mask=here, other=0)
    lens = tl.load(cu_lens + each + 1, mask=here, other=0) - tl.load(cu_lens + each, mask=here, other=0)
    touched = tl.where(lens > 0, (begins + lens - 1) // P - begins // P + 1, 0)
    stops = tl.cumsum(touched, 0)
    if share >= tl.sum(touched, 0):
        return
    b = tl.sum((stops <= share).to(tl.int32), 0)
    nth = share - tl.sum(tl.where(each == b, stops - touched, 0), 0)
    begin = tl.load(starts + b)
    row = tl.load(cu_lens + b).to(tl.int64)
    length = tl.load(cu_lens + b + 1) - row
    entry = begin // P + nth
    page = pages + tl.load(block_table + b.to(tl.int64) * stride_bt + entry).to(tl.int64) * stride_p + h * stride_ph
    mask = tile.nibble(stride_p)
    t = tl.arange(0, P)
    at = entry * P + t - begin  # the token's place among those that are read
    inside = (at >= 0) & (at < length) & (entry * P + t >= S)
    r = tl.arange(0, SP)
    row_at = entry * P + r - begin
    row_inside = (row_at >= 0) & (row_at < length) & (r < S)

    # keys and values each with names of their own: Triton wants one shape for a name in both branches
    if tl.program_id(2) == 0:
        xk, xh = tile.load_keys(
            (page + CODES_K).to(tl.pointer_type(tl.int16)), (page + HIGH_K).to(tl.pointer_type(tl.int16)), KB, K_PIECES, K_JP, K_A, K_N, K_WIDE,
            HIGH_A, HIGH_N, HIGH_WIDE, 1,
        )  # fmt: skip
        kd = tl.arange(0, DP)
        key_column = tile.key_column(tl.arange(0, 4 * KU), KU, K_WIDE)
        keys = tl.zeros((DP, P), tl.float32)
        mean = tl.zeros((DP,), tl.float32)
        for j in tl.static_range(2 if KB == 8 else 4):
            key_to = _to(key_column, j, KC, D)
            key_sign = _signs(key_to, kd, ROTATE, BLOCK_K)
            key_codes = tile.keys(xk, xh, j, mask, KB, 1, P, KU, PTX).reshape(P, 4 * KU).to(tl.float32) - tile.key_offset(j, KB)
            keys = dot(round_to(key_sign, tl.float16), tl.trans(round_to(key_codes, tl.float16)), keys)
            if MEAN:
                m = tl.load((page + MEAN_K).to(tl.pointer_type(tl.float16)) + key_to, mask=key_to >= 0, other=0.0).to(tl.float32)
                mean += tl.sum(key_sign * m[None, :], 1)
        pair = (page + SCALES_K).to(tl.pointer_type(tl.int32)) + t
        _put(k, keys, pair, mean, inside, row + at, h, stride_k, stride_kh, D, DP, ROTATE, BLOCK_K)
        if S > 0:
            if entry == 0:
                key_pair = (page + ROW_SCALES).to(tl.pointer_type(tl.int32)) + r
                _put_sinks(k, page + ROWS_K, key_pair, row_inside, row + row_at, h, stride_k, stride_kh, D, DP, ROTATE, BLOCK_K)
    else:
        xv = tile.load_values((page + CODES_V).to(tl.pointer_type(tl.int16)), V_PIECES, V_JP, V_A, V_N, V_WIDE, 1)
        vd = tl.arange(0, DVP)
        value_column = tile.value_column(tl.arange(0, 4 * VU), V_WIDE)
        values = tl.zeros((DVP, P), tl.float32)
        for j in tl.static_range(2 if VB == 8 else 4):
            value_sign = _signs(_to(value_column, j, VC, DV), vd, ROTATE, BLOCK_V)
            value_codes = tile.values(xv, j, mask, VB, PTX).reshape(4 * VU, P).to(tl.float32) - tile.value_offset(VB)
            values = dot(round_to(value_sign, tl.bfloat16), round_to(value_codes, tl.bfloat16), values)
        pair = (page + SCALES_V).to(tl.pointer_type(tl.int32)) + t
        no_mean = tl.zeros((DVP,), tl.float32)
        _put(v, values, pair, no_mean, inside, row + at, h, stride_v, stride_vh, DV, DVP, ROTATE, BLOCK_V)
        if S > 0:
            if entry == 0:
                value_pair = (page + ROW_SCALES).to(tl.pointer_type(tl.int32)) + S + r
                _put_sinks(v, page + ROWS_V, value_pair, row_inside, row + row_at, h, stride_v, stride_vh, DV, DVP, ROTATE, BLOCK_V)


@triton.jit
def _to(column, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Which of head_dim's values a piece's columns hold, -1 where they only pad."""
    return tl.where((column < C) & (piece * C + column < D), piece * C + column, -1)


@triton.jit
def _put(out, y, pair, mean, inside, at, h, stride, stride_h, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """Rotated codes y [DP, T] -> out at tokens `at` [T]; pair: pointers to their scales and zero points."""
    scale, zero = tile.scale_and_zero(tl.load(pair, mask=inside, other=0))
    d = tl.arange(0, DP)
    zeros = tl.full((DP,), 1.0, tl.float32)
    norm = 1.0
    if ROTATE:
        zeros = tl.where(d % BLOCK == 0, BLOCK + 0.0, 0.0)
        norm = BLOCK**-0.5
    x = (y * scale[None, :] + zeros[:, None] * zero[None, :] + mean[:, None]) * norm
    tl.store(out + at[None, :] * stride + h * stride_h + d[:, None], x.to(out.dtype.element_ty), mask=inside[None, :] & (d < D)[:, None])


@triton.jit
def _put_sinks(
    out, rows, pair, inside, at, h, stride, stride_h, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sink rows, D codes of 8 bits each from `rows` on, -> out at tokens `at` [SP]; pair: pointers to their scales and zero points.

    In three dimensions Triton multiplies from registers. Hopper's own product would read 16 columns of transposed codes from the wrong place in
    shared memory (Triton 3.6)."""
    y = tl.zeros((1, DP, at.shape[0]), tl.float32)
    for i in range(0, D, 16):
        some = i + tl.arange(0, 16)
        codes = tl.load(rows + tl.arange(0, at.shape[0])[None, :] * D + some[:, None], mask=inside[None, :], other=128)
        codes = round_to(codes.to(tl.int32).to(tl.float32) - 128.0, tl.bfloat16)
        sign = round_to(_signs(some, tl.arange(0, DP), ROTATE, BLOCK), tl.bfloat16)
        y = dot(sign[None, :, :], codes[None, :, :], y)
    _put(out, y.reshape(DP, at.shape[0]), pair, tl.zeros((DP,), tl.float32), inside, at, h, stride, stride_h, D, DP, ROTATE, BLOCK)


@cache
def _launcher(page: Page, batch_block: int) -> Launcher:
    return Launcher(
        gather_kernel, SP=max(16, _pow2(page.sinks) if page.sinks else 0), BB=batch_block, PTX=tile.PTX, num_warps=warps_of(page), num_stages=1,
        **tile.page_constants(page, 1),
    )  # fmt: skip


def gather(
    pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: Page, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    batch, heads = starts.shape[0], pages.shape[1]
    k = torch.empty(total, heads, page.head_dim, dtype=dtype, device=pages.device)
    v = torch.empty(total, heads, page.v_head_dim, dtype=dtype, device=pages.device)
    if total and batch:
        _launcher(page, batch_block(batch))(
            (touched_pages(total, batch, page.page_size), heads, 2),
            pages, block_table, starts, cu_lens, k, v,
            batch, pages.stride(0), pages.stride(1), block_table.stride(0), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        )  # fmt: skip
    return k, v
