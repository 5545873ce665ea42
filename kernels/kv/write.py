"""Stores new tokens in their pages: rotate, subtract the page's mean, find scale and zero, pack.

**A tile is a matrix y [rows, columns]**: a token of one head a row, a column for each place of a code in the token's words. Words have `per` = 4
codes (2 of 8 bits) and lie in C columns, padded to 4U; column j * 4U + c of y is code j of column c, which is d = j * C + c. So packing
is shifting and adding, and where nothing is padded the columns are head_dim itself.

**Rotation** is a matrix product from registers. H_b is a Hadamard matrix of Hadamard matrices: of groups of 4w columns (page.py: those of a block)
each is multiplied by H_4w, one small matrix of signs, then groups are added and subtracted crosswise. With 16-bit inputs all products
and, but for the last bits, all sums are exact. Where head_dim is not a power of two, it is a product with all of R.

**Who holds what.** Each of W warps has the rows of T tokens and needs nothing from another, but for the mean. A tensor core's lane holds, in a
row, neighbouring columns of words: for keys just the 16 bytes that lie together in a page, so they go from register to page; values are moved
about within the warp first. `_operand` and `_plain` do nothing but say so; rows come in the order that makes it true (`_token`).

Two kernels. `write_few_kernel` serves decode steps: fewer than MEAN_TOKENS tokens of each sequence, whose pages take the mean of the page
before; its rows are tokens by heads. There time is what one row takes, so W warps share a row instead (SHARES = W): all of them read all rows, each
rotates to 1 / W of every group's columns, and what they have to tell each other are two numbers a row, its least and its largest value.
`write_kernel` serves all else: a program owns what this write puts into one page of one head, so it knows the page's mean before it encodes, with
nothing to wait for.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import after_previous, dependent_launch, dot, from_bits, round_to
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.kv.page import Page, _pow2, batch_block
from qplugins.kernels.kv.ref import MEAN_TOKENS
from qplugins.kernels.kv.rotation import block
from qplugins.kernels.kv.tile import PTX, key_column, page_constants, rotation_sign

ROWS = 16  # of a tile at least: those of a tensor core's product
METADATA = ["slot_mapping", "query_start_loc", "seq_lens", "block_table"]


@triton.jit
def _token(W: tl.constexpr, T: tl.constexpr):
    """[W * T]: the token of each row. Warp w has tokens w*T .. w*T + T - 1; eight rows lie together, those that it loads and stores at once, and
    then come the other warps'."""
    r = tl.arange(0, W * T)
    return r // 8 % W * T + r // (8 * W) * 8 + r % 8


@triton.jit
def _operand(x, W: tl.constexpr, WIDE: tl.constexpr):
    """[W * T, Q * 4 WIDE] -> [W, Q * T, 4 WIDE]: rows by warps, groups of columns below one another, and a group's columns as a tensor core's
    operand has them, so that a lane's are neighbours: place k holds column key_column(k) of the group."""
    T: tl.constexpr = x.shape[0] // W
    Q: tl.constexpr = x.shape[1] // (4 * WIDE)
    x = x.reshape(T // 8, W, 8, Q, 4, WIDE // 2, 2).permute(1, 3, 0, 2, 5, 4, 6)
    return x.reshape(W, Q * T, 4 * WIDE)


@triton.jit
def _plain(y, Q: tl.constexpr, WIDE: tl.constexpr, SHARES: tl.constexpr):
    """The inverse of `_operand`; where warps share columns [W, Q * T, 4 WIDE] -> [T, Q * W * 4 WIDE]."""
    W: tl.constexpr = y.shape[0]
    T: tl.constexpr = y.shape[1] // Q
    y = y.reshape(W, Q, T // 8, 8, WIDE // 2, 4, 2)
    if SHARES == 1:
        return y.permute(2, 0, 3, 1, 5, 4, 6).reshape(W * T, Q * 4 * WIDE)
    else:
        return y.permute(2, 3, 1, 0, 5, 4, 6).reshape(T, Q * W * 4 * WIDE)


@triton.jit
def _columns(WIDE: tl.constexpr, SHARES: tl.constexpr):
    """[SHARES, 4 WIDE // SHARES]: the columns of a group that come out of the product, by warps where they share them."""
    N: tl.constexpr = 4 * WIDE // SHARES
    return tl.arange(0, SHARES)[:, None] * N + key_column(tl.arange(0, N), N // 4, N // 4)[None, :]


@triton.jit
def _signs(dtype: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr, SHARES: tl.constexpr):
    """[W, 4 WIDE, 4 WIDE // SHARES]: H_4w, what a group of columns of `dtype` is multiplied by. 1 and -1 by their bits, which is quicker than
    `rotation_sign`."""
    k = key_column(tl.arange(0, 4 * WIDE), WIDE, WIDE).to(tl.int16)
    x = k[None, :, None] & _columns(WIDE, SHARES).to(tl.int16)[:, None, :]
    x ^= x >> 4
    odd = tl.full((1, 1, 1), 0x6996, tl.int16) >> (x & 15) & 1
    if dtype == tl.float16:
        sign = from_bits(odd << 15 | 0x3C00, tl.float16)
    else:
        sign = from_bits(odd << 15 | 0x3F80, tl.bfloat16)
    return tl.broadcast_to(sign, (W, sign.shape[1], sign.shape[2]))


@triton.jit
def _times(x, sign, acc):
    """acc + x [W, M, K] @ sign [W, K, N]. A float32 is the sum of three bfloat16."""
    if x.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = round_to(x, tl.bfloat16)
            acc = dot(part, sign, acc)
            x -= part.to(tl.float32)
        return acc
    else:
        return dot(x, sign, acc)


@triton.jit
def _crossed(y, OUTER: tl.constexpr, INNER: tl.constexpr):
    """a + b, a - b in place of the neighbours a, b among y's OUTER * 2 runs of INNER values."""
    a, b = tl.split(y.reshape(OUTER, 2, INNER).permute(0, 2, 1))
    return tl.join(a + b, a - b).permute(0, 2, 1).reshape(y.shape)


@triton.jit
def _places(C: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, SHARES: tl.constexpr):
    """[1, SHARES, groups, columns of a share]: the column of words c and the place d in head_dim of a row's values, in the order in which
    Triton deals them out to lanes, then warps, then registers as `_plain` has them."""
    N: tl.constexpr = 4 * WIDE // SHARES
    q = tl.arange(0, PER * JP)[None, None, :, None]
    c = q % JP * (4 * WIDE) + tl.arange(0, SHARES)[None, :, None, None] * N + tl.arange(0, N)[None, None, None, :]
    return c, q // JP * C + c


@triton.jit
def _load(
    at, real, D: tl.constexpr, C: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """[rows, columns]: head_dim's values from `at` [rows]; zero in rows that are not real and columns that pad."""
    c, d = _places(C, JP, WIDE, PER, SHARES)
    at = tl.max_contiguous(at[:, None, None, None] + d, (1, 1, 1, WIDE // SHARES))
    x = tl.load(at, mask=real[:, None, None, None] & (c < C) & (d < D), other=0.0)
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])


@triton.jit
def _store(at, x, real, D: tl.constexpr, C: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, SHARES: tl.constexpr):
    """The inverse of `_load`, in the type of what `at` points to."""
    c, d = _places(C, JP, WIDE, PER, SHARES)
    x = x.reshape(at.shape[0], PER * JP, SHARES, 4 * WIDE // SHARES).permute(0, 2, 1, 3).to(at.dtype.element_ty)
    at = tl.max_contiguous(at[:, None, None, None] + d, (1, 1, 1, WIDE // SHARES))
    tl.store(at, x, mask=real[:, None, None, None] & (c < C) & (d < D))


@triton.jit
def _dim(D: tl.constexpr, C: tl.constexpr, U: tl.constexpr, PER: tl.constexpr):
    """[columns]: which of head_dim's values each holds; -1 where it pads."""
    c = tl.arange(0, PER * 4 * U)
    if PER * 4 * U == D:
        return c
    else:
        d = c // (4 * U) * C + c % (4 * U)
        return tl.where((c % (4 * U) < C) & (d < D), d, -1)


@triton.jit
def _rotated(
    x, at, real, signs, D: tl.constexpr, C: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr, W: tl.constexpr, SHARES: tl.constexpr,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 [rows, columns]: x R of the tokens that lie at `at` [W * T], but for a factor of BLOCK**-0.5, which whoever multiplies next
    includes. x is their `_load`, for which the caller need not wait; signs: `_signs`."""
    Q: tl.constexpr = PER * JP  # groups of columns
    G: tl.constexpr = 4 * WIDE
    N: tl.constexpr = G // SHARES  # of those a warp's
    T: tl.constexpr = at.shape[0] // W
    if not ROTATE:
        y = x.to(tl.float32)
    elif D == BLOCK:
        y = _times(_operand(x, W, WIDE), signs, tl.zeros((W, Q * T, N), tl.float32))
        y = _crossed(y, W * Q // 2, T * N)
        if Q >= 4:
            y = _crossed(y, W * Q // 4, 2 * T * N)
        if Q >= 8:
            y = _crossed(y, W * Q // 8, 4 * T * N)
    else:
        q = tl.arange(0, Q)[None, :, None]
        to = (q // JP * C + q % JP * G + _columns(WIDE, SHARES)[:, None, :]).reshape(SHARES, 1, Q * N)
        y = tl.zeros((W, T, Q * N), tl.float32)
        for i in range(0, D, 16):  # a few values at a time: the matrix of signs is large
            some = tl.load(tl.max_contiguous(at[:, None] + i + tl.arange(0, 16)[None, :], (1, 4)), mask=real[:, None], other=0.0)
            d = i + key_column(tl.arange(0, 16), 4, 4)
            sign = round_to(rotation_sign(d[None, :, None], to, BLOCK), tl.bfloat16 if x.dtype == tl.float32 else x.dtype)
            y = _times(_operand(some, W, 4), tl.broadcast_to(sign, (W, 16, Q * N)), y)
        y = y.reshape(W, T, Q, N).permute(0, 2, 1, 3).reshape(W, Q * T, N)
    if ROTATE:
        y = _plain(y, Q, N // 4, SHARES)
    return y


@triton.jit
def _encoded(y, d, UNIT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr):
    """Codes of UNIT * y, the low bits of int32 [rows, columns], 0 in columns that pad, and [rows] words of scale and zero. d: `_dim`."""
    TOP: tl.constexpr = 2**BITS - 1
    low, high = y, y
    if y.shape[1] != D:
        low, high = tl.where((d >= 0)[None, :], y, float("inf")), tl.where((d >= 0)[None, :], y, float("-inf"))
    if SHARES == 1:
        low, high = tl.min(low, 1), tl.max(high, 1)
    else:
        # one reduction for both, so that the warps that share a row meet once
        high, low = tl.split(tl.max(tl.join(high, -low), 1))
        low = -low
    low, high = low * UNIT, high * UNIT
    scale = tl.minimum((high - low) / TOP, 65504.0).to(tl.float16)
    zero = tl.minimum(tl.maximum(low + 2 ** (BITS - 1) * scale.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    pair = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (zero.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    scale = scale.to(tl.float32)
    steps = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0) * (1.0 / TOP)  # a unit, of all that there are
    start = 2 ** (BITS - 1) / TOP + 2**-22 - zero.to(tl.float32) * steps  # a little more, so that what lies halfway is rounded up
    # two instructions a code: a multiplication clamps to 0 .. 1 for nothing, and a sum above 2 ** 23 is rounded to a whole number in its low bits
    share = tl.minimum(tl.maximum(y * (steps * UNIT)[:, None] + start[:, None], 0.0), 1.0)
    codes = (share * TOP + 8388608.0).to(tl.int32, bitcast=True)
    if y.shape[1] != D:
        codes = tl.where((d >= 0)[None, :], codes, 0)
    return codes, pair


@triton.jit
def _packed(codes, PER: tl.constexpr):
    """int16 [rows, 4U]: the words of codes [rows, columns]."""
    C: tl.constexpr = codes.shape[1] // PER
    j = tl.arange(0, PER)[None, :, None]
    return tl.sum(codes.reshape(codes.shape[0], PER, C) << j * (16 // PER), 1).to(tl.int16)


@triton.jit
def _fifth(codes, JP: tl.constexpr, WIDE: tl.constexpr):
    """int16 [rows, U]: the words of the fifth bits of codes [rows, columns]."""
    R: tl.constexpr = codes.shape[0]
    lanes = (codes >> 4).reshape(R, 4, JP, 4, WIDE).permute(0, 1, 3, 2, 4).reshape(R, 4, 4, 4, JP * WIDE // 4)
    q, j = tl.arange(0, 4)[None, :, None, None, None], tl.arange(0, 4)[None, None, None, :, None]
    return tl.sum(tl.sum(lanes << 4 * j + q, 3), 1).reshape(R, JP * WIDE).to(tl.int16)


@triton.jit
def _put_key_words(
    part, t, words, stored, C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """page.py's formula for keys. part [rows]: where each row's matrix of words starts; words [rows, 4U]."""
    JP: tl.constexpr = words.shape[1] // (4 * WIDE)
    M: tl.constexpr = 4 * WIDE // SHARES
    p = tl.arange(0, JP)[None, None, :, None]
    c = tl.arange(0, SHARES)[None, :, None, None] * M + tl.arange(0, M)[None, None, None, :]
    row = (t // (8 * N) * 256 + t % 8 * 32 + t // 8 % N * WIDE)[:, None, None, None]
    at = part.to(tl.pointer_type(tl.int16))[:, None, None, None] + (row + p * (G * 256) + c // WIDE * 8 + c % WIDE)
    words = words.reshape(words.shape[0], JP, SHARES, M).permute(0, 2, 1, 3)
    tl.store(at, words, mask=stored[:, None, None, None] & (p < C // (4 * WIDE)))


@triton.jit
def _put_value_words(
    part, t, words, stored, C: tl.constexpr, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """page.py's formula for values: two tokens are neighbours, so a single one's words lie apart."""
    JP: tl.constexpr = words.shape[1] // (4 * WIDE)
    M: tl.constexpr = WIDE // SHARES
    # lanes first, then tokens and warps: nothing lies together, so this is the order in which Triton deals out
    p = tl.arange(0, JP)[None, None, None, :, None]
    c = tl.arange(0, SHARES)[None, None, :, None, None] * 4 * M + tl.arange(0, 4)[:, None, None, None, None] * M + tl.arange(0, M)
    row = (t // (8 * N) * 256 + t % 8 // 2 * 8 + t // 8 % N * WIDE + t % 2)[None, :, None, None, None]
    at = part.to(tl.pointer_type(tl.int16))[None, :, None, None, None] + (row + p * (G * 256) + c // (WIDE // 2) * 32 + c % (WIDE // 2) * 2)
    words = words.reshape(words.shape[0], JP, SHARES, 4, M).permute(3, 0, 2, 1, 4)
    tl.store(at, words, mask=stored[None, :, None, None, None] & (p < C // (4 * WIDE)))


@triton.jit
def _put_value_blocks(part, words, C: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr):
    """A whole page of values, 16 bytes a lane: the inverse of tile.value_words and tile.blocks."""
    JP: tl.constexpr = words.shape[1] // (4 * WIDE)
    A: tl.constexpr = words.shape[0] // (W * 8 * N)
    x = words.reshape(A, N, W, 4, 2, JP, 8, WIDE // 2).permute(5, 0, 2, 6, 3, 1, 7, 4).reshape(JP * A * W, 256)
    i = tl.arange(0, JP * A * W)
    p = i // (A * W)
    at = part.to(tl.pointer_type(tl.int16)) + ((p * W + i % W) * A + i // W % A)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(at, x, mask=(p < C // (4 * WIDE))[:, None])


@triton.jit
def _put_sinks(
    page, position, y, d, sink, D: tl.constexpr, C: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, PER: tl.constexpr,
    SHARES: tl.constexpr, ROW_SCALES: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sink rows of UNIT * y in 8 bits."""
    codes, pair = _encoded(y, d, UNIT, 8, D, SHARES)
    tl.store((page + ROW_SCALES).to(tl.pointer_type(tl.int32)) + position, pair, mask=sink)
    _store(page + ROWS + position.to(tl.int64) * D, codes, sink, D, C, JP, WIDE, PER, SHARES)


@triton.jit
def _put_keys(
    page, t, y, d, stored, D: tl.constexpr, KB: tl.constexpr, C: tl.constexpr, JP: tl.constexpr, G: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    HIGH_G: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr, SHARES: tl.constexpr, CODES_K: tl.constexpr, HIGH_K: tl.constexpr, SCALES_K: tl.constexpr,
):  # fmt: skip
    """Rotated keys y, less the mean. page, t [rows]: each row's page and its place there."""
    codes, pair = _encoded(y, d, 1.0, KB, D, SHARES)
    tl.store((page + SCALES_K).to(tl.pointer_type(tl.int32)) + t, pair, mask=stored)
    _put_key_words(page + CODES_K, t, _packed(codes & 15 if KB == 5 else codes, 2 if KB == 8 else 4), stored, C, G, N, WIDE, SHARES)
    if KB == 5:
        _put_key_words(page + HIGH_K, t, _fifth(codes, JP, WIDE), stored, JP * 4 * HIGH_WIDE, HIGH_G, HIGH_N, HIGH_WIDE, 1)


@triton.jit
def _sequence(query_start_loc, seq_lens, b):
    """Sequence b's first new token, how many it has, and the position of the first."""
    first_token, end, length = tl.load(query_start_loc + b), tl.load(query_start_loc + b + 1), tl.load(seq_lens + b)
    return first_token, end - first_token, length - (end - first_token)


@triton.jit
def _stored(pages, slots, here, stride_p, P: tl.constexpr):
    """Which tokens have a slot, and their pages."""
    slot = tl.load(slots, mask=here, other=-1).to(tl.int64)
    stored = here & (slot >= 0)
    return stored, pages + tl.where(stored, slot // P, 0) * stride_p


@triton.jit(do_not_specialize=["stride_bt"], do_not_specialize_on_alignment=METADATA)
def write_few_kernel(
    k, v, pages, slot_mapping, query_start_loc, seq_lens, block_table,
    heads, stride_k, stride_kh, stride_v, stride_vh, stride_p, stride_ph, stride_bt,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, K_PIECES: tl.constexpr, K_JP: tl.constexpr, K_A: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, V_PIECES: tl.constexpr, V_JP: tl.constexpr, V_A: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ref.write for a few tokens of each sequence. Program (b, z, i): TOKENS x HEADS rows of sequence b, keys (z = 0) or values, block i of heads.

    This is a chain of latencies: where the tokens are, the tokens and their slots, the page's mean. So each is asked for as soon as it can be, in
    masked loads rather than branches, and W warps share the columns, each with all rows.
    """
    KPER: tl.constexpr = 2 if KB == 8 else 4
    VPER: tl.constexpr = 2 if VB == 8 else 4
    UNIT_K: tl.constexpr = BLOCK_K**-0.5 if ROTATE else 1.0
    UNIT_V: tl.constexpr = BLOCK_V**-0.5 if ROTATE else 1.0
    b = tl.program_id(0)
    row = tl.arange(0, TOKENS * HEADS)
    token, head = row // HEADS, (tl.program_id(2) * HEADS + row % HEADS).to(tl.int64)
    # the rows that are loaded, W times each, as `_token` has them
    row = tl.arange(0, W * TOKENS * HEADS)
    row = row // (8 * W) * 8 + row % 8
    each_token, each_head = row // HEADS, (tl.program_id(2) * HEADS + row % HEADS).to(tl.int64)
    pages += head * stride_ph
    if tl.program_id(1) == 0:
        keys = k + each_head * stride_kh
        signs = _signs(k.dtype.element_ty, K_WIDE, W, W)
        after_previous(PDL)
        first_token, queries, first = _sequence(query_start_loc, seq_lens, b)
        keys += (first_token + each_token).to(tl.int64) * stride_k
        real = (each_token < queries) & (each_head < heads)
        x = _load(keys, real, D, KC, K_JP, K_WIDE, KPER, 1)
        here = (token < queries) & (head < heads)
        stored, page = _stored(pages, slot_mapping + first_token + token, here, stride_p, P)
        position = first + token
        t = position % P
        # a page that these tokens open takes the mean of the page before it
        opens = position - t >= first
        entry = tl.maximum(position // P - 1, 0)
        before = tl.load(block_table + b.to(tl.int64) * stride_bt + entry, mask=here & opens & (position >= P), other=0).to(tl.int64)
        if MEAN:
            source = tl.where(opens, pages + before * stride_p, page)
            known = stored & ((position >= P) | (opens == 0))
            mean = _load((source + MEAN_K).to(tl.pointer_type(tl.float16)), known, D, KC, K_JP, K_WIDE, KPER, W)
        y = _rotated(x, keys, real, signs, D, KC, K_JP, K_WIDE, KPER, W, W, ROTATE, BLOCK_K) * UNIT_K
        kd = _dim(D, KC, K_JP * K_WIDE, KPER)
        if S > 0:
            if first < S:
                _put_sinks(page, position, y, kd, stored & (position < S), D, KC, K_JP, K_WIDE, KPER, W, ROW_SCALES, ROWS_K, 1.0)
        if MEAN:
            if (first + P - 1) // P * P < first + queries:
                _store((page + MEAN_K).to(tl.pointer_type(tl.float16)), mean, stored & (t == 0), D, KC, K_JP, K_WIDE, KPER, W)
            y -= mean.to(tl.float32)
        _put_keys(page, t, y, kd, stored, D, KB, KC, K_JP, K_A, K_N, K_WIDE, HIGH_A, HIGH_N, HIGH_WIDE, W, CODES_K, HIGH_K, SCALES_K)
    else:
        values = v + each_head * stride_vh
        signs_v = _signs(v.dtype.element_ty, V_WIDE, W, W)
        after_previous(PDL)
        first_token, queries, first = _sequence(query_start_loc, seq_lens, b)
        values += (first_token + each_token).to(tl.int64) * stride_v
        real = (each_token < queries) & (each_head < heads)
        xv = _load(values, real, DV, VC, V_JP, V_WIDE, VPER, 1)
        stored, page = _stored(pages, slot_mapping + first_token + token, (token < queries) & (head < heads), stride_p, P)
        position = first + token
        t = position % P
        yv = _rotated(xv, values, real, signs_v, DV, VC, V_JP, V_WIDE, VPER, W, W, ROTATE, BLOCK_V)
        vd = _dim(DV, VC, V_JP * V_WIDE, VPER)
        if S > 0:
            if first < S:
                _put_sinks(
                    page, position, yv, vd, stored & (position < S), DV, VC, V_JP, V_WIDE, VPER, W, ROW_SCALES + 4 * S, ROWS_V, UNIT_V
                )
        codes, pair = _encoded(yv, vd, UNIT_V, VB, DV, W)
        tl.store((page + SCALES_V).to(tl.pointer_type(tl.int32)) + t, pair, mask=stored)
        _put_value_words(page + CODES_V, t, _packed(codes, VPER), stored, VC, V_A, V_N, V_WIDE, W)


@triton.jit
def _mean_of(y, counted, count, UNIT: tl.constexpr, W: tl.constexpr):
    """float32 [columns], of float16's values: the mean of the rows of UNIT * y that are counted.

    A lane adds up its own rows. To add up lanes column by column takes three exchanges a column; here the sums are dealt out anew by one trip through
    shared memory: `split` wants two rows in one lane. `gather` takes the mean to every lane while it is one row: Triton would do it for all of y."""
    R: tl.constexpr = 8 * W
    C: tl.constexpr = y.shape[1]
    some = tl.sum(tl.where(counted[:, None], y, 0.0).reshape(y.shape[0] // R, R, C), 0)
    a, b = tl.split(some.reshape(R // 2, 2, C).permute(0, 2, 1))
    mean = tl.sum(a + b, 0) * (UNIT / count.to(tl.float32))
    mean = tl.minimum(tl.maximum(mean, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return tl.gather(mean, tl.arange(0, C), 0)


@triton.jit
def _put_mean(to, mean, d):
    tl.store(to.to(tl.pointer_type(tl.float16)) + d, mean.to(tl.float16), mask=d >= 0)


@triton.jit
def _look(slots, position, first, length, P: tl.constexpr, S: tl.constexpr):
    """The page that stores the tokens at positions position .. position + P - 1 (0 if none of them is stored), how many it stores, and
    how many of these are no sinks. slots: the slot of position 0.

    A few at a time, so that every warp sees all of them for itself."""
    number, seen = tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32)
    for i in tl.static_range(0, P, 32):
        at = position + i + tl.arange(0, 32)
        slot = tl.load(slots + at, mask=(at >= first) & (at < length), other=-1).to(tl.int64)
        number = tl.maximum(number, (slot.to(tl.uint64) // P).to(tl.int32))  # a shift; of -1 it is -1 again
        seen += tl.where(slot >= 0, tl.where(at >= S, 0x10001, 1), 0)
    both = tl.sum(seen, 0)
    return tl.max(number, 0), both & 0xFFFF, both >> 16


@triton.jit
def _opened(slots, position, first):
    """Whether this write opens the page that begins at `position`."""
    return (position >= first) & (tl.load(slots + position, mask=position >= first, other=-1) >= 0)


@triton.jit(do_not_specialize=["B", "stride_bt"], do_not_specialize_on_alignment=METADATA)
def write_kernel(
    k, v, pages, slot_mapping, query_start_loc, seq_lens, block_table,
    B, stride_k, stride_kh, stride_v, stride_vh, stride_p, stride_ph, stride_bt,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, K_PIECES: tl.constexpr, K_JP: tl.constexpr, K_A: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, V_PIECES: tl.constexpr, V_JP: tl.constexpr, V_A: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    ENOUGH: tl.constexpr, W: tl.constexpr, BB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ref.write. Program (s, h, z): the tokens of the s-th touched page, head h, keys (z = 0) or values; pages are counted sequence by sequence."""
    after_previous(PDL)
    KPER: tl.constexpr = 2 if KB == 8 else 4
    VPER: tl.constexpr = 2 if VB == 8 else 4
    UNIT_K: tl.constexpr = BLOCK_K**-0.5 if ROTATE else 1.0
    UNIT_V: tl.constexpr = BLOCK_V**-0.5 if ROTATE else 1.0
    share = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, nth = share * 0, share
    if B > 1:
        each = tl.arange(0, BB)
        here = each < B
        lens = tl.load(seq_lens + each, mask=here, other=0)
        new = tl.load(query_start_loc + each + 1, mask=here, other=0) - tl.load(query_start_loc + each, mask=here, other=0)
        touched = tl.where(new > 0, (lens - 1) // P - (lens - new) // P + 1, 0)
        stops = tl.cumsum(touched, 0)
        b = tl.minimum(tl.sum((stops <= share).to(tl.int32), 0), B - 1)
        nth -= tl.sum(tl.where(each == b, stops - touched, 0), 0)
    first_token, queries, first = _sequence(query_start_loc, seq_lens, b)
    length = first + queries
    entry = first // P + nth
    begin = entry * P  # position of the page's first token
    if (begin >= length) | (queries <= 0):
        return
    t = _token(W, P // W)
    position = begin + t
    inside = (position >= first) & (position < length)
    index = (first_token - first + position).to(tl.int64)
    slots = slot_mapping + (first_token - first)

    # keys and values each with names of their own: Triton wants one shape for a name in both branches
    if tl.program_id(2) == 0:
        keys = k + index * stride_k + head * stride_kh
        x = _load(keys, inside, D, KC, K_JP, K_WIDE, KPER, 1)
        stored = tl.load(slots + position, mask=inside, other=-1) >= 0
        number, n, count = _look(slots, begin, first, length, P, S)
        page = pages + number.to(tl.int64) * stride_p + head * stride_ph
        each_page = page + tl.zeros((P,), tl.int32)
        kd = _dim(D, KC, K_JP * K_WIDE, KPER)
        # the page whose mean this one gets: the last one with tokens enough, if this write opens it, and otherwise the first that was there before
        source, opens, enough = begin, _opened(slots, begin, first), count
        opened = opens
        means = page + MEAN_K
        if MEAN:
            while opened & (enough < ENOUGH):
                source -= P
                opened = _opened(slots, source, first)
                _, _, enough = _look(slots, source, first, length, P, S)
            if source < begin:
                if opened:
                    # that page's program may not have come to it yet, so from the same tokens; the mean goes by memory to leave registers free
                    back = begin - source
                    counted = (tl.load(slots + position - back) >= 0) & (position - back >= S)
                    others = keys - back * stride_k.to(tl.int64)
                    x = _load(others, counted, D, KC, K_JP, K_WIDE, KPER, 1)
                    z = _rotated(
                        x, others, counted, _signs(k.dtype.element_ty, K_WIDE, W, 1), D, KC, K_JP, K_WIDE, KPER, W, 1, ROTATE, BLOCK_K
                    )
                    _put_mean(means, _mean_of(z, counted, enough, UNIT_K, W), kd)
                    tl.debug_barrier()
                    x = _load(keys, inside, D, KC, K_JP, K_WIDE, KPER, 1)  # again: registers hold one tile
                elif source >= 0:
                    number = tl.load(block_table + b.to(tl.int64) * stride_bt + source // P)
                    means = pages + number.to(tl.int64) * stride_p + head * stride_ph + MEAN_K
        y = _rotated(x, keys, inside, _signs(k.dtype.element_ty, K_WIDE, W, 1), D, KC, K_JP, K_WIDE, KPER, W, 1, ROTATE, BLOCK_K)
        if S > 0:
            if (entry == 0) & (first < S):
                _put_sinks(each_page, position, y, kd, stored & (position < S), D, KC, K_JP, K_WIDE, KPER, 1, ROW_SCALES, ROWS_K, UNIT_K)
        if MEAN:
            if opened & (source == begin):
                mean = _mean_of(y, stored & (position >= S), count, UNIT_K, W)
            else:
                mean = tl.load(means.to(tl.pointer_type(tl.float16)) + kd, mask=tl.minimum(kd, source) >= 0, other=0.0).to(tl.float32)
            if opens:
                _put_mean(page + MEAN_K, mean, kd)
            y = y * UNIT_K - mean[None, :]
        else:
            y *= UNIT_K
        _put_keys(each_page, t, y, kd, stored, D, KB, KC, K_JP, K_A, K_N, K_WIDE, HIGH_A, HIGH_N, HIGH_WIDE, 1, CODES_K, HIGH_K, SCALES_K)
    else:
        values = v + index * stride_v + head * stride_vh
        xv = _load(values, inside, DV, VC, V_JP, V_WIDE, VPER, 1)
        stored = tl.load(slots + position, mask=inside, other=-1) >= 0
        number, n, _ = _look(slots, begin, first, length, P, S)
        page = pages + number.to(tl.int64) * stride_p + head * stride_ph
        each_page = page + tl.zeros((P,), tl.int32)
        yv = _rotated(xv, values, inside, _signs(v.dtype.element_ty, V_WIDE, W, 1), DV, VC, V_JP, V_WIDE, VPER, W, 1, ROTATE, BLOCK_V)
        vd = _dim(DV, VC, V_JP * V_WIDE, VPER)
        if S > 0:
            if (entry == 0) & (first < S):
                _put_sinks(
                    each_page, position, yv, vd, stored & (position < S), DV, VC, V_JP, V_WIDE, VPER, 1, ROW_SCALES + 4 * S, ROWS_V, UNIT_V
                )
        codes, pair = _encoded(yv, vd, UNIT_V, VB, DV, 1)
        tl.store((each_page + SCALES_V).to(tl.pointer_type(tl.int32)) + t, pair, mask=stored)
        words = _packed(codes, VPER)
        if n == P:
            _put_value_blocks(page + CODES_V, words, VC, V_N, V_WIDE, W)
        else:
            _put_value_words(each_page + CODES_V, t, words, stored, VC, V_A, V_N, V_WIDE, 1)


def warps_of(page: Page) -> int:
    """Warps that share a page: each has the rows of a product, or as many tokens as its blocks of words hold. Of short rows twice as many:
    8,192 tokens of head_dim 64 took 11 us on an H100, and 16 with as many warps as the long ones have."""
    warps = page.page_size // max(ROWS, 8 * page.k.n, 8 * page.v.n)
    return max(4, warps // 2) if max(page.head_dim, page.v_head_dim) <= 64 else warps


def registers_of(page: Page) -> dict[str, int]:
    """A launch option that makes room for 16 warps on a multiprocessor, where rows are short enough to need no memory for it: Triton 3.6 would give
    a thread of k5v4 171 registers, and a multiprocessor half of the programs."""
    dims = (page.head_dim, page.v_head_dim)
    return {"maxnreg": 128} if PTX and all(block(d) == d <= 128 for d in dims) else {}


def few_launch(page: Page, max_query_len: int) -> tuple[int, int]:
    """Rows and warps of a program of write_few_kernel. A product has 16 rows at least; where the rotation goes by groups of columns (`_rotated`) those
    are two groups of eight tokens. Each warp has eight columns of words: 32 tokens of eight heads took 1.7 us on an H200, and 2.2 with one warp."""
    if not page.rotate:
        return ROWS, 1
    whole = block(page.head_dim) == page.head_dim and block(page.v_head_dim) == page.v_head_dim
    return max(ROWS // 2 if whole else ROWS, _pow2(max_query_len)), min(page.k.w, page.v.w) // 2


def touched_pages(tokens: int, batch: int, page_size: int) -> int:
    """The most pages that so many tokens of so many sequences can lie in, each sequence's in a row."""
    more = max(0, tokens - batch)
    return batch + more // page_size + min(batch, more)


@cache
def _few_launcher(page: Page, max_query_len: int, heads_each: int) -> Launcher:
    rows, warps = few_launch(page, max_query_len)
    return Launcher(
        write_few_kernel, TOKENS=rows // heads_each, HEADS=heads_each, W=warps, num_warps=warps, num_stages=1, **page_constants(page, 1),
        **dependent_launch(),
    )  # fmt: skip


@cache
def _launcher(page: Page, batch_block: int) -> Launcher:
    warps = warps_of(page)
    return Launcher(
        write_kernel, ENOUGH=MEAN_TOKENS, W=warps, BB=batch_block, num_warps=warps, num_stages=1, **page_constants(page, 1), **dependent_launch(),
        **registers_of(page),
    )  # fmt: skip


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
        rows = few_launch(page, max_query_len)[0]
        heads_each = max(1, min(_pow2(heads), rows // _pow2(max_query_len)))
        _few_launcher(page, max_query_len, heads_each)((batch, 2, triton.cdiv(heads, heads_each)), *tensors, heads, *strides)
    else:
        grid = (touched_pages(slot_mapping.shape[0], batch, page.page_size), heads, 2)
        _launcher(page, batch_block(batch))(grid, *tensors, batch, *strides)
