"""Reads stored tokens back in the model's own space, 16 bits each.

A rotated token is (code - half) * scale + zero + mean, and rotation is linear, so with R's signs r = sqrt(b) R, b the size of its blocks,

    x[t, d] = (scale[t] * sum_i c[t, i] r[i, d]  +  zero[t] * sum_i r[i, d]  +  sum_i mean[i] r[i, d]) / sqrt(b)

The first sum is a product of small integers with signs, exact; the second is b where d starts a block of R and 0 elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import dot, round_to
from qplugins.kernels.kv import tile
from qplugins.kernels.kv.page import Page, _pow2
from qplugins.kernels.kv.write import touched_pages

WARPS = 8


@triton.jit
def _signs(to, d, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [d, to]: r[to, d], or the identity; `to` is -1 where there is nothing."""
    if ROTATE:
        sign = tile.rotation_sign(tl.maximum(to, 0)[None, :], d[:, None], BLOCK)
    else:
        sign = tl.where(to[None, :] == d[:, None], 1.0, 0.0)
    return tl.where(to[None, :] >= 0, sign, 0.0)


@triton.jit
def _rotate_codes(y, codes, sign, dtype: tl.constexpr):
    """y [DP, T] + sign [DP, C] codes [C, T]. The codes are whole numbers that `dtype` holds exactly."""
    return dot(round_to(sign, dtype), codes, y)


@triton.jit
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

    if tl.program_id(2) == 0:
        d = tl.arange(0, DP)
        xk, xh = tile.load_keys(
            (page + CODES_K).to(tl.pointer_type(tl.int16)), (page + HIGH_K).to(tl.pointer_type(tl.int16)), KB, K_PIECES, K_JP, K_A, K_N, K_WIDE,
            HIGH_A, HIGH_N, HIGH_WIDE, 1,
        )  # fmt: skip
        scale, zero = tile.scale_and_zero(tl.load((page + SCALES_K).to(tl.pointer_type(tl.int32)) + t, mask=inside, other=0))
        y = tl.zeros((DP, P), tl.float32)
        mean = tl.zeros((DP,), tl.float32)
        rows = tl.zeros((DP, SP), tl.float32)
        for j in tl.static_range(2 if KB == 8 else 4):
            column = tile.key_column(tl.arange(0, 4 * KU), KU, K_WIDE)
            to = tl.where((column < KC) & (j * KC + column < D), j * KC + column, -1)
            sign = _signs(to, d, ROTATE, BLOCK_K)
            codes = tile.keys(xk, xh, j, mask, KB, 1, P, KU, PTX)
            codes = round_to(codes.reshape(P, 4 * KU).to(tl.float32) - tile.key_offset(j, KB), tl.float16)
            y = _rotate_codes(y, tl.trans(codes), sign, tl.float16)
            if MEAN:
                mean += tl.sum(
                    sign * tl.load((page + MEAN_K).to(tl.pointer_type(tl.float16)) + to, mask=to >= 0, other=0.0).to(tl.float32)[None, :], 1
                )
            if S > 0:
                if entry == 0:
                    rows = _rotate_codes(
                        rows, tl.trans(tile.row_keys(page + ROWS_K, r, row_inside, j, KC, KU, K_WIDE, D)), sign, tl.float16
                    )
        _put(
            k, y, rows, scale, zero, mean, page + ROW_SCALES, t, inside, row_inside, row + at, row + row_at, h, entry, stride_k, stride_kh,
            D, DP, S, SP, ROTATE, BLOCK_K,
        )  # fmt: skip
    else:
        d = tl.arange(0, DVP)
        xv = tile.load_values((page + CODES_V).to(tl.pointer_type(tl.int16)), V_PIECES, V_JP, V_A, V_N, V_WIDE, 1)
        scale, zero = tile.scale_and_zero(tl.load((page + SCALES_V).to(tl.pointer_type(tl.int32)) + t, mask=inside, other=0))
        y = tl.zeros((DVP, P), tl.float32)
        rows = tl.zeros((DVP, SP), tl.float32)
        for j in tl.static_range(2 if VB == 8 else 4):
            column = tile.value_column(tl.arange(0, 4 * VU), V_WIDE)
            to = tl.where((column < VC) & (j * VC + column < DV), j * VC + column, -1)
            sign = _signs(to, d, ROTATE, BLOCK_V)
            vcodes = tile.values(xv, j, mask, VB, PTX)
            vcodes = vcodes.reshape(4 * VU, P)
            if VB != 8:
                vcodes = round_to(vcodes.to(tl.float32) - tile.value_offset(VB), tl.bfloat16)
            y = _rotate_codes(y, vcodes, sign, tl.bfloat16)
            if S > 0:
                if entry == 0:
                    rows = _rotate_codes(rows, tile.row_values(page + ROWS_V, r, row_inside, j, VC, VU, V_WIDE, DV), sign, tl.bfloat16)
        _put(
            v, y, rows, scale, zero, tl.zeros((DVP,), tl.float32), page + ROW_SCALES + 4 * S, t, inside, row_inside, row + at, row + row_at, h, entry,
            stride_v, stride_vh, DV, DVP, S, SP, ROTATE, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _put(
    out, y, rows, scale, zero, mean, row_scales, t, inside, row_inside, at, row_at, h, entry, stride, stride_h,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotated codes y [DP, P] and those of sink rows [DP, SP] -> out at tokens `at` and `row_at`."""
    d = tl.arange(0, DP)
    zeros = tl.full((DP,), 1.0, tl.float32)
    norm = 1.0
    if ROTATE:
        zeros = tl.where(d % BLOCK == 0, BLOCK + 0.0, 0.0)
        norm = BLOCK**-0.5
    x = (y * scale[None, :] + zeros[:, None] * zero[None, :] + mean[:, None]) * norm
    tl.store(out + at[None, :] * stride + h * stride_h + d[:, None], x.to(out.dtype.element_ty), mask=inside[None, :] & (d < D)[:, None])
    if S > 0:
        if entry == 0:
            row_scale, row_zero = tile.scale_and_zero(
                tl.load(row_scales.to(tl.pointer_type(tl.int32)) + tl.arange(0, SP), mask=row_inside, other=0)
            )
            row_x = (rows * row_scale[None, :] + zeros[:, None] * row_zero[None, :]) * norm
            tl.store(
                out + row_at[None, :] * stride + h * stride_h + d[:, None],
                row_x.to(out.dtype.element_ty),
                mask=row_inside[None, :] & (d < D)[:, None],
            )


def gather(
    pages: Tensor, block_table: Tensor, starts: Tensor, cu_lens: Tensor, total: int, page: Page, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    batch, heads = starts.shape[0], pages.shape[1]
    k = torch.empty(total, heads, page.head_dim, dtype=dtype, device=pages.device)
    v = torch.empty(total, heads, page.v_head_dim, dtype=dtype, device=pages.device)
    if total and batch:
        gather_kernel[(touched_pages(total, batch, page.page_size), heads, 2)](
            pages, block_table, starts, cu_lens, k, v,
            batch, pages.stride(0), pages.stride(1), block_table.stride(0), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            SP=max(16, _pow2(page.sinks) if page.sinks else 0), BB=_pow2(batch), PTX=tile.PTX, num_warps=WARPS, num_stages=1, **tile.page_constants(page, 1),
        )  # fmt: skip
    return k, v
