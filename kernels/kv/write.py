"""Stores new tokens in their pages: rotate, subtract the page's mean, find scale and zero, pack.

A tile is [rows, columns of words] four times (twice for 8 bits), one for each code of a word, so packing is shifting and adding. Rotation is a
product with a matrix of signs, made in registers: with 16-bit inputs all products and, but for the last bits, all sums are exact.

Two kernels. `write_few_kernel` serves decode steps: fewer than MEAN_TOKENS tokens of each sequence, whose pages take the mean of the page
before; its rows are tokens by heads, so that a program has rows enough for a matrix product. `write_kernel` serves all else: a program owns what
this write puts into one page of one head, so it knows the page's mean before it encodes, with nothing to wait for.
"""

import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, dot, round_to
from qplugins.kernels.kv.page import Page, _pow2
from qplugins.kernels.kv.ref import MEAN_TOKENS
from qplugins.kernels.kv.rotation import block
from qplugins.kernels.kv.tile import rotation_sign


@triton.jit
def _key_column(x, U: tl.constexpr, WIDE: tl.constexpr):
    """The column of words in place x when they are ordered by lane: U words for each of 4 lanes."""
    u = x % U
    return u // WIDE * (4 * WIDE) + x // U * WIDE + u % WIDE


@triton.jit
def _word_of_key(t, c, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """page.py's formula for keys: the word of token t's column c."""
    p, b, i = c // (4 * WIDE), c // WIDE % 4, c % WIDE
    return (((p * G + t // (8 * N)) * 8 + t % 8) * 4 + b) * 8 + t // 8 % N * WIDE + i


@triton.jit
def _word_of_value(t, c, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    p, a, i = c // (4 * WIDE), c // (WIDE // 2) % 8, c % (WIDE // 2)
    return (((p * G + t // (8 * N)) * 8 + a) * 4 + t % 8 // 2) * 8 + t // 8 % N * WIDE + 2 * i + t % 2


@triton.jit
def _rotated(x, column, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [rows, columns]: the values that go into code `piece` of the words. x [rows, DP]."""
    to = piece * C + column
    d = tl.arange(0, DP)
    real = ((column < C) & (to < D))[None, :] & (d < D)[:, None]
    if ROTATE:
        sign = tl.where(real, rotation_sign(d[:, None], to[None, :], BLOCK), 0.0)
    else:
        sign = tl.where(real & (d[:, None] == to[None, :]), 1.0, 0.0)
    if x.dtype == tl.float32:
        y = tl.dot(x, sign, input_precision="ieee")
    else:
        y = dot(x, round_to(sign, x.dtype), tl.zeros((x.shape[0], column.shape[0]), tl.float32))
    if ROTATE:
        y *= BLOCK**-0.5
    return y


@triton.jit
def _range(y, low, high, column, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    real = ((column < C) & (piece * C + column < D))[None, :]
    return tl.minimum(low, tl.min(tl.where(real, y, float("inf")), 1)), tl.maximum(high, tl.max(tl.where(real, y, float("-inf")), 1))


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr):
    """float32 [rows] of the values float16 keeps, and both in one int32."""
    scale = tl.minimum((high - low) / (2**BITS - 1), 65504.0).to(tl.float16)
    zero = tl.minimum(tl.maximum(low + 2 ** (BITS - 1) * scale.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    pair = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (zero.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return scale.to(tl.float32), zero.to(tl.float32), pair


@triton.jit
def _codes(y, scale, zero, column, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """int32 [rows, columns]; 0 in columns that only pad."""
    steps = tl.where(scale[:, None] > 0, (y - zero[:, None]) / tl.where(scale > 0, scale, 1.0)[:, None], 0.0)
    codes = tl.minimum(tl.maximum(tl.floor(steps + (2 ** (BITS - 1) + 0.5)), 0.0), 2.0**BITS - 1).to(tl.int32)
    if D % C != 0 or column.shape[0] != C:
        codes = tl.where(((column < C) & (piece * C + column < D))[None, :], codes, 0)
    return codes


@triton.jit
def _fifth(codes, q: tl.constexpr, U: tl.constexpr):
    """int32 [rows, 4 lanes, U / 4]: the fifth bits of quarter q where they stand in the lane's words."""
    run = tl.arange(0, 4)[None, None, :, None]
    return tl.sum((codes >> 4).reshape(codes.shape[0], 4, 4, U // 4) << 4 * run + q, 2)


@triton.jit
def _put_rows(rows, position, y, scale, zero, column, stored, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """A piece of sink rows, in bytes. rows [rows]: where each row's bytes of its page start."""
    d = piece * C + column
    to = rows[:, None] + position.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, _codes(y, scale, zero, column, piece, C, D, 8).to(tl.uint8), mask=stored[:, None] & ((column < C) & (d < D))[None, :])


@triton.jit
def _put_keys(
    x, page, position, stored, sink, m0, m1, m2, m3, column,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KB: tl.constexpr, S: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, U: tl.constexpr, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, HIGH_G: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, SCALES_K: tl.constexpr, ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr,
):  # fmt: skip
    """Keys x [rows, DP], each into its page [rows] (pointers); m0..m3 the means' pieces."""
    y0 = _rotated(x, column, 0, C, D, DP, ROTATE, BLOCK)
    y1 = _rotated(x, column, 1, C, D, DP, ROTATE, BLOCK)
    y2, y3 = y0, y1
    if KB != 8:
        y2 = _rotated(x, column, 2, C, D, DP, ROTATE, BLOCK)
        y3 = _rotated(x, column, 3, C, D, DP, ROTATE, BLOCK)
    low = tl.full((x.shape[0],), float("inf"), tl.float32)
    if S > 0:
        if tl.max(sink.to(tl.int32), 0) > 0:
            row_low, row_high = _range(y0, low, -low, column, 0, C, D)
            row_low, row_high = _range(y1, row_low, row_high, column, 1, C, D)
            if KB != 8:
                row_low, row_high = _range(y2, row_low, row_high, column, 2, C, D)
                row_low, row_high = _range(y3, row_low, row_high, column, 3, C, D)
            row_scale, row_zero, row_pair = _scale_and_zero(row_low, row_high, 8)
            tl.store((page + ROW_SCALES).to(tl.pointer_type(tl.int32)) + position, row_pair, mask=sink)
            _put_rows(page + ROWS_K, position, y0, row_scale, row_zero, column, sink, 0, C, D)
            _put_rows(page + ROWS_K, position, y1, row_scale, row_zero, column, sink, 1, C, D)
            if KB != 8:
                _put_rows(page + ROWS_K, position, y2, row_scale, row_zero, column, sink, 2, C, D)
                _put_rows(page + ROWS_K, position, y3, row_scale, row_zero, column, sink, 3, C, D)
    y0 -= m0
    y1 -= m1
    y2 -= m2
    y3 -= m3
    low, high = _range(y0, low, -low, column, 0, C, D)
    low, high = _range(y1, low, high, column, 1, C, D)
    if KB != 8:
        low, high = _range(y2, low, high, column, 2, C, D)
        low, high = _range(y3, low, high, column, 3, C, D)
    scale, zero, pair = _scale_and_zero(low, high, KB)
    t = position % P
    tl.store((page + SCALES_K).to(tl.pointer_type(tl.int32)) + t, pair, mask=stored)
    c0, c1 = _codes(y0, scale, zero, column, 0, C, D, KB), _codes(y1, scale, zero, column, 1, C, D, KB)
    if KB == 8:
        words = c0 | c1 << 8
    else:
        c2, c3 = _codes(y2, scale, zero, column, 2, C, D, KB), _codes(y3, scale, zero, column, 3, C, D, KB)
        words = c0 & 15 | (c1 & 15) << 4 | (c2 & 15) << 8 | (c3 & 15) << 12
    at = (page + CODES_K).to(tl.pointer_type(tl.int16))[:, None] + _word_of_key(t[:, None], column[None, :], G, N, WIDE)
    tl.store(at, words.to(tl.int16), mask=stored[:, None] & (column < C)[None, :])
    if KB == 5:
        high_words = (_fifth(c0, 0, U) + _fifth(c1, 1, U) + _fifth(c2, 2, U) + _fifth(c3, 3, U)).reshape(x.shape[0], U)
        high_column = _key_column(tl.arange(0, U), U // 4, HIGH_WIDE)
        at = (page + HIGH_K).to(tl.pointer_type(tl.int16))[:, None] + _word_of_key(
            t[:, None], high_column[None, :], HIGH_G, HIGH_N, HIGH_WIDE
        )
        tl.store(at, high_words.to(tl.int16), mask=stored[:, None])


@triton.jit
def _put_values(
    x, page, position, stored, sink, column,
    P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    CODES_V: tl.constexpr, SCALES_V: tl.constexpr, ROW_SCALES: tl.constexpr, ROWS_V: tl.constexpr,
):  # fmt: skip
    y0 = _rotated(x, column, 0, C, D, DP, ROTATE, BLOCK)
    y1 = _rotated(x, column, 1, C, D, DP, ROTATE, BLOCK)
    y2, y3 = y0, y1
    if VB != 8:
        y2 = _rotated(x, column, 2, C, D, DP, ROTATE, BLOCK)
        y3 = _rotated(x, column, 3, C, D, DP, ROTATE, BLOCK)
    low = tl.full((x.shape[0],), float("inf"), tl.float32)
    low, high = _range(y0, low, -low, column, 0, C, D)
    low, high = _range(y1, low, high, column, 1, C, D)
    if VB != 8:
        low, high = _range(y2, low, high, column, 2, C, D)
        low, high = _range(y3, low, high, column, 3, C, D)
    if S > 0:
        if tl.max(sink.to(tl.int32), 0) > 0:
            row_scale, row_zero, row_pair = _scale_and_zero(low, high, 8)
            tl.store((page + ROW_SCALES).to(tl.pointer_type(tl.int32)) + S + position, row_pair, mask=sink)
            _put_rows(page + ROWS_V, position, y0, row_scale, row_zero, column, sink, 0, C, D)
            _put_rows(page + ROWS_V, position, y1, row_scale, row_zero, column, sink, 1, C, D)
            if VB != 8:
                _put_rows(page + ROWS_V, position, y2, row_scale, row_zero, column, sink, 2, C, D)
                _put_rows(page + ROWS_V, position, y3, row_scale, row_zero, column, sink, 3, C, D)
    scale, zero, pair = _scale_and_zero(low, high, VB)
    t = position % P
    tl.store((page + SCALES_V).to(tl.pointer_type(tl.int32)) + t, pair, mask=stored)
    c0, c1 = _codes(y0, scale, zero, column, 0, C, D, VB), _codes(y1, scale, zero, column, 1, C, D, VB)
    if VB == 8:
        words = c0 | c1 << 8
    else:
        c2, c3 = _codes(y2, scale, zero, column, 2, C, D, VB), _codes(y3, scale, zero, column, 3, C, D, VB)
        words = c0 | c1 << 4 | c2 << 8 | c3 << 12
    at = (page + CODES_V).to(tl.pointer_type(tl.int16))[:, None] + _word_of_value(t[:, None], column[None, :], G, N, WIDE)
    tl.store(at, words.to(tl.int16), mask=stored[:, None] & (column < C)[None, :])


@triton.jit
def _mean_of(page, column, stored, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr, MEAN_K: tl.constexpr):
    """float32 [rows, columns]: a piece of the mean in each row's page; zero where not stored."""
    d = piece * C + column
    real = stored[:, None] & ((column < C) & (d < D))[None, :]
    return tl.load((page + MEAN_K).to(tl.pointer_type(tl.float16))[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)


@triton.jit
def write_few_kernel(
    k, v, pages, slot_mapping, query_start_loc, seq_lens, block_table,
    heads, stride_k, stride_kh, stride_v, stride_vh, stride_p, stride_ph, stride_bt,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, KU: tl.constexpr, K_G: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, VCP: tl.constexpr, V_G: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_G: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ref.write for a few tokens of each sequence. Program (b, z, i): TOKENS x HEADS rows of sequence b, keys (z = 0) or values, block i of heads."""
    after_previous(PDL)
    b = tl.program_id(0)
    row = tl.arange(0, TOKENS * HEADS)
    token = row // HEADS
    head = (tl.program_id(2) * HEADS + row % HEADS).to(tl.int64)
    first_token = tl.load(query_start_loc + b)
    queries = tl.load(query_start_loc + b + 1) - first_token
    first = tl.load(seq_lens + b) - queries
    position = first + token
    here = (token < queries) & (head < heads)
    index = (first_token + token).to(tl.int64)
    slot = tl.load(slot_mapping + index, mask=here, other=-1).to(tl.int64)
    stored = here & (slot >= 0)
    page = pages + tl.where(stored, slot // P, 0) * stride_p + head * stride_ph
    sink = stored & (position < S)
    if tl.program_id(1) == 0:
        column = _key_column(tl.arange(0, 4 * KU), KU, K_WIDE)
        d = tl.arange(0, DP)
        x = tl.load(
            k + index[:, None] * stride_k + head[:, None] * stride_kh + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
        )
        m0 = tl.zeros((TOKENS * HEADS, 4 * KU), tl.float32)
        m1, m2, m3 = m0, m0, m0
        if MEAN:
            # a page that these tokens open takes the mean of the page before it
            opens = position // P * P >= first
            entry = tl.maximum(position // P - 1, 0)
            before = tl.load(block_table + b.to(tl.int64) * stride_bt + entry, mask=stored & opens & (position >= P), other=0).to(tl.int64)
            source = tl.where(opens, pages + before * stride_p + head * stride_ph, page)
            known = stored & ((position >= P) | (opens == 0))
            m0 = _mean_of(source, column, known, 0, KC, D, MEAN_K)
            m1 = _mean_of(source, column, known, 1, KC, D, MEAN_K)
            if KB != 8:
                m2 = _mean_of(source, column, known, 2, KC, D, MEAN_K)
                m3 = _mean_of(source, column, known, 3, KC, D, MEAN_K)
            at_first = stored & (position % P == 0)
            if tl.max(at_first.to(tl.int32), 0) > 0:
                own = (page + MEAN_K).to(tl.pointer_type(tl.float16))[:, None] + column[None, :]
                real = at_first[:, None] & (column < KC)[None, :]
                tl.store(own, m0.to(tl.float16), mask=real & (column < D)[None, :])
                tl.store(own + KC, m1.to(tl.float16), mask=real & (KC + column < D)[None, :])
                if KB != 8:
                    tl.store(own + 2 * KC, m2.to(tl.float16), mask=real & (2 * KC + column < D)[None, :])
                    tl.store(own + 3 * KC, m3.to(tl.float16), mask=real & (3 * KC + column < D)[None, :])
        _put_keys(
            x, page, position, stored, sink, m0, m1, m2, m3, column, P, D, DP, KB, S, ROTATE, BLOCK_K,
            KC, KU, K_G, K_N, K_WIDE, HIGH_G, HIGH_N, HIGH_WIDE, CODES_K, HIGH_K, SCALES_K, ROW_SCALES, ROWS_K,
        )  # fmt: skip
    else:
        dv = tl.arange(0, DVP)  # names of their own: Triton wants one shape for a name in both branches
        xv = tl.load(
            v + index[:, None] * stride_v + head[:, None] * stride_vh + dv[None, :], mask=here[:, None] & (dv < DV)[None, :], other=0.0
        )
        _put_values(
            xv, page, position, stored, sink, tl.arange(0, VCP),
            P, DV, DVP, VB, S, ROTATE, BLOCK_V, VC, V_G, V_N, V_WIDE, CODES_V, SCALES_V, ROW_SCALES, ROWS_V,
        )  # fmt: skip


@triton.jit
def _sum_of_page(k, slot_mapping, token, begin, end, stride_k, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum [DP] and number of the stored keys at positions begin .. end - 1, sinks left out; k: this head's keys, token: index of position begin's."""
    d = tl.arange(0, DP)
    total = tl.zeros((DP,), tl.float32)
    count = tl.zeros((), tl.int32)
    for i in range(0, end - begin, BLOCK_T):
        t = i + tl.arange(0, BLOCK_T)
        inside = (begin + t < end) & (begin + t >= S)
        inside &= tl.load(slot_mapping + token + t, mask=inside, other=-1) >= 0
        x = tl.load(k + (token + t).to(tl.int64)[:, None] * stride_k + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        count += tl.sum(inside.to(tl.int32), 0)
    return total, count


@triton.jit
def _mean_of_sum(
    total, count, column, piece: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr
):
    to = piece * C + column
    d = tl.arange(0, DP)
    if ROTATE:
        sign = rotation_sign(d[:, None], to[None, :], BLOCK) * BLOCK**-0.5
    else:
        sign = tl.where(d[:, None] == to[None, :], 1.0, 0.0)
    mean = tl.sum(total[:, None] * sign, 0) / tl.maximum(count, 1).to(tl.float32)
    mean = tl.where((column < C) & (to < D), tl.minimum(tl.maximum(mean, -65504.0), 65504.0), 0.0)
    return mean.to(tl.float16).to(tl.float32)


@triton.jit
def _later(i, x):
    """0, which the compiler does not know where x is float32: signs made from it stay in the loop over i. Made once, as for 16-bit x, all of them
    together would not fit into shared memory at a head_dim of 256."""
    if x.dtype == tl.float32:
        return tl.minimum(i, 0)
    else:
        return 0


@triton.jit
def write_kernel(
    k, v, pages, slot_mapping, query_start_loc, seq_lens, block_table,
    B, stride_k, stride_kh, stride_v, stride_vh, stride_p, stride_ph, stride_bt,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, KU: tl.constexpr, K_G: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, VCP: tl.constexpr, V_G: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_G: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    ENOUGH: tl.constexpr, BLOCK_T: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """ref.write. Program (s, h, z): the tokens of the s-th touched page, head h, keys (z = 0) or values; pages are counted sequence by sequence."""
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    each = tl.arange(0, BB)
    here = each < B
    lens = tl.load(seq_lens + each, mask=here, other=0)
    new = tl.load(query_start_loc + each + 1, mask=here, other=0) - tl.load(query_start_loc + each, mask=here, other=0)
    touched = tl.where(new > 0, (lens - 1) // P - (lens - new) // P + 1, 0)
    stops = tl.cumsum(touched, 0)
    if share >= tl.sum(touched, 0):
        return
    b = tl.sum((stops <= share).to(tl.int32), 0)
    nth = share - tl.sum(tl.where(each == b, stops - touched, 0), 0)
    length = tl.load(seq_lens + b)
    first_token = tl.load(query_start_loc + b)
    first = length - (tl.load(query_start_loc + b + 1) - first_token)  # position of the first new token
    entry = first // P + nth
    begin = tl.maximum(first, entry * P)
    end = tl.minimum(length, entry * P + P)
    token = first_token + begin - first

    if tl.program_id(2) == 0:
        column = _key_column(tl.arange(0, 4 * KU), KU, K_WIDE)
        d = tl.arange(0, DP)
        one = tl.arange(0, 1)
        keys = k + head * stride_kh
        m0 = tl.zeros((1, 4 * KU), tl.float32)
        m1, m2, m3 = m0, m0, m0
        if MEAN:
            first_slot = tl.load(slot_mapping + token).to(tl.int64)
            opens = (begin % P == 0) & (first_slot >= 0)
            table = block_table + b.to(tl.int64) * stride_bt
            total = tl.zeros((DP,), tl.float32)
            count = tl.zeros((), tl.int32)
            if opens:
                total, count = _sum_of_page(keys, slot_mapping, token, begin, end, stride_k, S, D, DP, BLOCK_T)
                if (count < ENOUGH) & (entry > 0):
                    if begin - P >= first:  # the page before is opened by this write too, maybe not yet: its mean from the same tokens
                        total, count = _sum_of_page(keys, slot_mapping, token - P, begin - P, begin, stride_k, S, D, DP, BLOCK_T)
            if opens & (count >= ENOUGH):
                m0 = _mean_of_sum(total, count, column, 0, KC, D, DP, ROTATE, BLOCK_K)[None, :]
                m1 = _mean_of_sum(total, count, column, 1, KC, D, DP, ROTATE, BLOCK_K)[None, :]
                if KB != 8:
                    m2 = _mean_of_sum(total, count, column, 2, KC, D, DP, ROTATE, BLOCK_K)[None, :]
                    m3 = _mean_of_sum(total, count, column, 3, KC, D, DP, ROTATE, BLOCK_K)[None, :]
            else:
                if opens:
                    number = tl.where(entry > 0, tl.load(table + tl.maximum(entry - 1, 0)).to(tl.int64), -1)
                else:
                    # any stored token of the page says which it is
                    t = tl.arange(0, P)
                    slots = tl.load(slot_mapping + token + t, mask=begin + t < end, other=-1).to(tl.int64)
                    number = tl.max(tl.where(slots >= 0, slots // P, -1), 0)
                source = pages + (tl.maximum(number, 0) * stride_p + head * stride_ph) + one
                known = (number + one) >= 0
                m0 = _mean_of(source, column, known, 0, KC, D, MEAN_K)
                m1 = _mean_of(source, column, known, 1, KC, D, MEAN_K)
                if KB != 8:
                    m2 = _mean_of(source, column, known, 2, KC, D, MEAN_K)
                    m3 = _mean_of(source, column, known, 3, KC, D, MEAN_K)
            if opens:
                own = (pages + first_slot // P * stride_p + head * stride_ph + MEAN_K).to(tl.pointer_type(tl.float16)) + column[None, :]
                real = (column < KC)[None, :]
                tl.store(own, m0.to(tl.float16), mask=real & (column < D)[None, :])
                tl.store(own + KC, m1.to(tl.float16), mask=real & (KC + column < D)[None, :])
                if KB != 8:
                    tl.store(own + 2 * KC, m2.to(tl.float16), mask=real & (2 * KC + column < D)[None, :])
                    tl.store(own + 3 * KC, m3.to(tl.float16), mask=real & (3 * KC + column < D)[None, :])
        for i in range(0, end - begin, BLOCK_T):
            t = i + tl.arange(0, BLOCK_T)
            position = begin + t
            slot = tl.load(slot_mapping + token + t, mask=position < end, other=-1).to(tl.int64)
            stored = slot >= 0
            page = pages + tl.where(stored, slot // P, 0) * stride_p + head * stride_ph
            x = tl.load(
                keys + (token + t).to(tl.int64)[:, None] * stride_k + d[None, :], mask=stored[:, None] & (d < D)[None, :], other=0.0
            )
            columns = column + _later(i, x)
            _put_keys(
                x, page, position, stored, stored & (position < S), m0, m1, m2, m3, columns, P, D, DP, KB, S, ROTATE, BLOCK_K,
                KC, KU, K_G, K_N, K_WIDE, HIGH_G, HIGH_N, HIGH_WIDE, CODES_K, HIGH_K, SCALES_K, ROW_SCALES, ROWS_K,
            )  # fmt: skip
    else:
        dv = tl.arange(0, DVP)  # names of their own: Triton wants one shape for a name in both branches
        for i in range(0, end - begin, BLOCK_T):
            t = i + tl.arange(0, BLOCK_T)
            position = begin + t
            slot = tl.load(slot_mapping + token + t, mask=position < end, other=-1).to(tl.int64)
            stored = slot >= 0
            page = pages + tl.where(stored, slot // P, 0) * stride_p + head * stride_ph
            at = v + head * stride_vh + (token + t).to(tl.int64)[:, None] * stride_v + dv[None, :]
            xv = tl.load(at, mask=stored[:, None] & (dv < DV)[None, :], other=0.0)
            _put_values(
                xv, page, position, stored, stored & (position < S), tl.arange(0, VCP) + _later(i, xv), P, DV, DVP, VB, S, ROTATE, BLOCK_V,
                VC, V_G, V_N, V_WIDE, CODES_V, SCALES_V, ROW_SCALES, ROWS_V,
            )  # fmt: skip


def page_constants(page: Page) -> dict[str, int]:
    """The page as compile-time constants of the kernels above."""
    k, v, high = page.k, page.v, page.high
    found = {
        "P": page.page_size, "D": page.head_dim, "DV": page.v_head_dim, "DP": _pow2(page.head_dim), "DVP": _pow2(page.v_head_dim),
        "KB": page.k_bits, "VB": page.v_bits, "S": page.sinks, "MEAN": page.mean, "ROTATE": page.rotate,
        "BLOCK_K": block(page.head_dim), "BLOCK_V": block(page.v_head_dim),
        "KC": k.columns, "KU": _pow2(k.pieces) * k.w, "K_G": k.groups, "K_N": k.n, "K_WIDE": k.w,
        "VC": v.columns, "VCP": _pow2(v.columns), "V_G": v.groups, "V_N": v.n, "V_WIDE": v.w,
        "HIGH_G": high.groups if high else 0, "HIGH_N": high.n if high else 0, "HIGH_WIDE": high.w if high else 0,
    }  # fmt: skip
    return found | {name.upper(): at for name, at in page.offsets.items()}


def touched_pages(tokens: int, batch: int, page_size: int) -> int:
    """The most pages that so many tokens of so many sequences can lie in, each sequence's in a row."""
    more = max(0, tokens - batch)
    return batch + more // page_size + min(batch, more)


def write(
    pages: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    page: Page,
    max_query_len: int,
) -> None:
    """See op.py."""
    batch, heads = seq_lens.shape[0], pages.shape[1]
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), pages.stride(1), block_table.stride(0))
    tensors = (k, v, pages, slot_mapping, query_start_loc, seq_lens, block_table)
    if max_query_len < MEAN_TOKENS:
        tokens = _pow2(max_query_len)
        heads_each = min(_pow2(heads), max(1, 16 // tokens))
        tokens = max(tokens, 16 // heads_each)
        write_few_kernel[(batch, 2, triton.cdiv(heads, heads_each))](
            *tensors, heads, *strides, TOKENS=tokens, HEADS=heads_each, num_warps=4, num_stages=1, **page_constants(page), **dependent_launch(),
        )  # fmt: skip
    else:
        grid = (touched_pages(slot_mapping.shape[0], batch, page.page_size), heads, 2)
        write_kernel[grid](
            *tensors, batch, *strides, ENOUGH=MEAN_TOKENS, BLOCK_T=64, BB=_pow2(batch), num_warps=8, num_stages=1, **page_constants(page)
        )
