"""Decode: a few query tokens of each sequence against all of its pages.

Everything happens in rotated space, and no value of a page is scaled or moved on its own. With a token's code c = code - 2 ** (bits - 1),

    s[t, n] = ks[t] * (q[n] . c[t])  +  kz[t] * sum(q[n])  +  q[n] . mean(page)
    o[n]    = sum_t p[t, n] * vs[t] * c_v[t]  +  sum_t p[t, n] * vz[t]

and the decoded codes are c plus a constant (kv/tile.py), whose share comes off the sums: of q in the first line, of p * vs in the second. A sum that
has to be of what the tensor core multiplies, rounded, is a product with ones, which costs less than converting and adding.

**Who does what.** The tensor core's first operand are the codes, 16 tokens (first product) or 16 of head_dim (second) a time, its second one
q or p for N = 8 or more *rows*: a row is a query token of one of the query heads that share a KV head. A program is W warps; each warp
takes W-th runs of every page on its own, with its own running maximum, and they meet at the end.

**Who gets which pages.** The pages that all sequences have to read are numbered through, sequence after sequence, and shared out evenly to a
fixed number of programs for each KV head, so a batch of one long and many short sequences is balanced, and a CUDA graph's launch fits every
batch. Where that takes few more pages a program, none has pages of two sequences. A program that has all of a sequence writes its output.
Otherwise it leaves its sums in the workspace, and the last of some neighbours to arrive adds up theirs, in order, so that the result does not
depend on who was last; where there are many, such sums are parts again.

**What short batches cost.** Beside reading pages a call takes the time of a chain: which pages, the queries, their rotation, the first page, the
meeting of a program's warps, leaving and adding up parts, the rotation of the output. So the first pages are asked for before the
queries are turned, and what warps or programs have to exchange goes at once rather than piece by piece.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.common.device import INTERPRET, after_previous, dependent_launch, dot, on_hopper, round_to
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.kv import tile
from qplugins.kernels.kv.page import Page, _pow2, batch_block

LOG2E = 1.4426950408889634
NOTHING = tl.constexpr(-1.0e30)  # a logit that is not seen; finite, so that differences of two of them are 0


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * 2.885390081777927) + 1.0)


@triton.jit
def _rotate_some(
    y,
    x,
    d,
    piece: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [4U, N] + sqrt(BLOCK) * the share that x [d, N] has in a piece of x R, columns as the operand of keys has them, zero where there is none."""
    column = tile.key_column(tl.arange(0, 4 * U), U, WIDE)
    to = piece * C + column
    if ROTATE:
        sign = tile.rotation_sign(to[:, None], d[None, :], BLOCK)
    else:
        sign = tl.where(to[:, None] == d[None, :], 1.0, 0.0)
    sign = tl.where(((column < C) & (to < D))[:, None], sign, 0.0)
    if x.dtype == tl.float32:
        return tl.dot(sign, x, y, input_precision="ieee")
    else:
        return dot(round_to(sign, x.dtype), x, y)  # products and, but for the last bits, sums are exact


@triton.jit
def _crossed(z0, z1, z2, z3, TWO: tl.constexpr):
    """sum_i H_4[i, j] z_i for j = 0..3, or with H_2, twice the same two: what is left of R once each quarter (half) has been rotated by itself."""
    if TWO:
        return z0 + z1, z0 - z1, z0 + z1, z0 - z1
    else:
        a, b, c, d = z0 + z1, z0 - z1, z2 + z3, z2 - z3
        return a + c, b + d, a - c, b - d


@triton.jit
def _together(x0, x1, x2, x3, TWO: tl.constexpr):
    """Pieces [..., n] -> [..., n, 4] (two of them: [..., n, 2]), so that what crosses warps does so once for all of them."""
    if TWO:
        return tl.join(x0, x1)
    else:
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        return x.reshape(x.shape[:-2] + [4])


@triton.jit
def _apart(x, TWO: tl.constexpr):
    """The inverse of `_together`; of two pieces, both twice."""
    if TWO:
        x0, x1 = x.split()
        return x0, x1, x0, x1
    else:
        even, odd = x.reshape(x.shape[:-1] + [2, 2]).split()
        x0, x2 = even.split()
        x1, x3 = odd.split()
        return x0, x1, x2, x3


@triton.jit
def _query(q, tokens, heads, live, stride_q, stride_qh, d, D: tl.constexpr):
    return tl.load(
        q + tokens[None, :] * stride_q + heads[None, :] * stride_qh + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0
    )


@triton.jit
def load_queries(
    q, tokens, heads, live, stride_q, stride_qh, C: tl.constexpr, D: tl.constexpr, KB: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """q's pieces [C, N] (twice the same two for 8 bits), or just its rows' first values where `rotate_queries` is going to load it by itself."""
    d = tl.arange(0, C if ROTATE and D == BLOCK else 1)
    x0 = _query(q, tokens, heads, live, stride_q, stride_qh, d, D)
    x1, x2, x3 = x0, x0, x0
    if ROTATE and D == BLOCK:
        x1 = _query(q, tokens, heads, live, stride_q, stride_qh, C + d, D)
        x2, x3 = x0, x1
        if KB != 8:
            x2 = _query(q, tokens, heads, live, stride_q, stride_qh, 2 * C + d, D)
            x3 = _query(q, tokens, heads, live, stride_q, stride_qh, 3 * C + d, D)
    return x0, x1, x2, x3


@triton.jit
def rotated_queries(
    q, tokens, heads, live, stride_q, stride_qh, scale, C: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    KB: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale * q R as four pieces float16 [4U, N] (twice the same two for 8 bits), their sum and the sum of what the codes' offsets add: float32 [N]."""
    x0, x1, x2, x3 = load_queries(q, tokens, heads, live, stride_q, stride_qh, C, D, KB, ROTATE, BLOCK)
    return rotate_queries(
        x0, x1, x2, x3, q, tokens, heads, live, stride_q, stride_qh, scale, C, U, WIDE, D, DP, KB, ROTATE, BLOCK
    )  # fmt: skip


@triton.jit
def rotate_queries(
    x0, x1, x2, x3, q, tokens, heads, live, stride_q, stride_qh, scale, C: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, KB: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rotated_queries` of what `load_queries` returned."""
    N: tl.constexpr = tokens.shape[0]
    PIECES: tl.constexpr = 2 if KB == 8 else 4
    y0 = tl.zeros((4 * U, N), tl.float32)
    y1 = tl.zeros((4 * U, N), tl.float32)
    y2 = tl.zeros((4 * U, N), tl.float32)
    y3 = tl.zeros((4 * U, N), tl.float32)
    if ROTATE and D == BLOCK:
        # H_b is a small Hadamard matrix of Hadamard matrices, so the pieces share one matrix of signs
        d = tl.arange(0, C)
        y0 = _rotate_some(y0, x0, d, 0, C, U, WIDE, C, ROTATE, C)
        y1 = _rotate_some(y1, x1, d, 0, C, U, WIDE, C, ROTATE, C)
        if KB != 8:
            y2 = _rotate_some(y2, x2, d, 0, C, U, WIDE, C, ROTATE, C)
            y3 = _rotate_some(y3, x3, d, 0, C, U, WIDE, C, ROTATE, C)
        y0, y1, y2, y3 = _crossed(y0, y1, y2, y3, KB == 8)
    else:
        # a few of q's values at a time, since the matrix of signs is large
        for i in range(0, DP, 32):
            d = i + tl.arange(0, 32)
            x = _query(q, tokens, heads, live, stride_q, stride_qh, d, D)
            y0 = _rotate_some(y0, x, d, 0, C, U, WIDE, D, ROTATE, BLOCK)
            y1 = _rotate_some(y1, x, d, 1, C, U, WIDE, D, ROTATE, BLOCK)
            if KB != 8:
                y2 = _rotate_some(y2, x, d, 2, C, U, WIDE, D, ROTATE, BLOCK)
                y3 = _rotate_some(y3, x, d, 3, C, U, WIDE, D, ROTATE, BLOCK)
    if ROTATE:
        scale *= BLOCK**-0.5
    q0, q1 = (y0 * scale).to(tl.float16), (y1 * scale).to(tl.float16)
    q2, q3 = q0, q1
    if KB != 8:
        q2, q3 = (y2 * scale).to(tl.float16), (y3 * scale).to(tl.float16)
    totals = tl.sum(_together(q0, q1, q2, q3, KB == 8).to(tl.float32), 0)  # [N, PIECES]
    odd = tl.arange(0, PIECES)[None, :] % 2 == 1
    q_sum = tl.sum(totals, 1)
    offset = tl.sum(totals * tl.where(odd, tile.key_offset(1, KB), tile.key_offset(0, KB)), 1)
    return q0, q1, q2, q3, q_sum, offset


@triton.jit
def _mean_piece(
    mean, piece: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, JP: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):
    """float16 [W, 16, 4U]: a piece of the page's mean in each of 16 rows. Each lane reads just what it has of such a row, two values at a time."""
    p = tl.arange(0, JP)[None, None, :, None, None]
    b = tl.arange(0, 4)[None, None, None, None, :]
    i = tl.arange(0, WIDE // 2)[None, None, None, :, None]
    d = piece * C + p * (4 * WIDE) + b * WIDE + 2 * i
    pairs = mean.to(tl.pointer_type(tl.int32)) + d // 2
    if JP == PIECES and D % C == 0:
        x = tl.load(pairs)
    else:
        x = tl.load(pairs, mask=(p < PIECES) & (d < D), other=0)
    x = tl.join(x.to(tl.int16).to(tl.float16, bitcast=True), (x >> 16).to(tl.int16).to(tl.float16, bitcast=True))
    x = x.reshape(1, 1, 4 * JP * WIDE)
    return round_to(tl.broadcast_to(x, (W, 16, 4 * JP * WIDE)).to(tl.float32), tl.float16)


@triton.jit
def _rotate_back(
    y, x, to, piece: tl.constexpr, C: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """y[to, n] + sqrt(BLOCK) * sum_r R[to, d(r)] x[r, n]: a piece of the output in the model's space."""
    column = tile.value_column(tl.arange(0, 4 * U), WIDE)
    d = piece * C + column
    sign = tl.where(((column < C) & (d < D))[None, :], tile.rotation_sign(to[:, None], d[None, :], BLOCK), 0.0)
    return tl.dot(sign, x, y, input_precision="tf32" if PTX else "ieee")


@triton.jit
def _store(out, x, tokens, hq, live, stride_o, stride_oh, d, real):
    to = out + tokens[None, :] * stride_o + hq[None, :] * stride_oh + d[:, None]
    tl.store(to, x.to(out.dtype.element_ty), mask=live[None, :] & real[:, None])


@triton.jit
def store_output(
    out, a0, a1, a2, a3, norm, tokens, hq, live, stride_o, stride_oh, C: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    VB: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out[token, hq] = norm * (a0, a1, a2, a3) R: the pieces [4U, N] of the sum over values, rows as their operand has them."""
    N: tl.constexpr = tokens.shape[0]
    PIECES: tl.constexpr = 2 if VB == 8 else 4
    if ROTATE:
        norm *= BLOCK**-0.5
    a0 *= norm[None, :]
    a1 *= norm[None, :]
    a2 *= norm[None, :]
    a3 *= norm[None, :]
    if ROTATE and D == BLOCK:
        a0, a1, a2, a3 = _crossed(a0, a1, a2, a3, VB == 8)
        x = _together(a0, a1, a2, a3, VB == 8).permute(0, 2, 1).reshape(4 * U, PIECES * N)
        to = tl.arange(0, C)
        y = _rotate_back(tl.zeros((C, PIECES * N), tl.float32), x, to, 0, C, U, WIDE, C, C, PTX).reshape(C, PIECES, N)
        d = C * tl.arange(0, PIECES)[None, :, None] + to[:, None, None]
        at = tokens[None, None, :] * stride_o + hq[None, None, :] * stride_oh + d
        tl.store(out + at, y.to(out.dtype.element_ty), mask=live[None, None, :])
    elif ROTATE:
        for i in range(0, DP, 32):
            to = i + tl.arange(0, 32)
            y = _rotate_back(tl.zeros((32, N), tl.float32), a0, to, 0, C, U, WIDE, D, BLOCK, PTX)
            y = _rotate_back(y, a1, to, 1, C, U, WIDE, D, BLOCK, PTX)
            if VB != 8:
                y = _rotate_back(y, a2, to, 2, C, U, WIDE, D, BLOCK, PTX)
                y = _rotate_back(y, a3, to, 3, C, U, WIDE, D, BLOCK, PTX)
            _store(out, y, tokens, hq, live, stride_o, stride_oh, to, to < D)
    else:
        column = tile.value_column(tl.arange(0, 4 * U), WIDE)
        real = column < C
        _store(out, a0, tokens, hq, live, stride_o, stride_oh, column, real & (column < D))
        _store(out, a1, tokens, hq, live, stride_o, stride_oh, C + column, real & (C + column < D))
        if VB != 8:
            _store(out, a2, tokens, hq, live, stride_o, stride_oh, 2 * C + column, real & (2 * C + column < D))
            _store(out, a3, tokens, hq, live, stride_o, stride_oh, 3 * C + column, real & (3 * C + column < D))


@triton.jit
def _row_pieces(rows, row, stored, column, C: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, TWO: tl.constexpr):
    """[SP, 4U]: code - 128 of the pieces of a sequence's first tokens. One load for all, since products, for which warps wait for one another,
    would hold back the loads behind them."""
    d = column[:, None] + C * tl.arange(0, 2 if TWO else 4)[None, :]
    real = (column < C)[:, None] & (d < D)
    x = tl.load(rows + row[:, None, None] * D + d[None], mask=stored[:, None, None] & real[None], other=128)
    return _apart(round_to(x.to(tl.int32).to(tl.float32) - 128.0, DTYPE), TWO)


@triton.jit
def _product(x, y):
    """x [a, b] @ y, float32; of each where y is [W, b, N]."""
    if len(y.shape) == 3:
        W: tl.constexpr = y.shape[0]
        zero = tl.zeros((W, x.shape[0], y.shape[2]), tl.float32)
        return dot(tl.broadcast_to(x[None], (W, x.shape[0], x.shape[1])), y, zero)
    else:
        return dot(x, y, tl.zeros((x.shape[0], y.shape[1]), tl.float32))


@triton.jit
def sink_scores(
    first, row, stored, q0, q1, q2, q3, q_sum, soft_cap, SOFT_CAP: tl.constexpr, S: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, KB: tl.constexpr, ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr,
):  # fmt: skip
    """The sequence's first tokens, from their rows in its first page: scores float32 [SP, N], and their values' scales and zero points [SP].

    first  that page        row, stored  [SP], and which of these there are        q0..q_sum  of `rotated_queries`

    Where q's pieces are [W, 4U, N], W times the same, so are the scores.
    """
    pair = (first + ROW_SCALES).to(tl.pointer_type(tl.int32)) + row
    ks, kz = tile.scale_and_zero(tl.load(pair, mask=stored, other=0))
    vs, vz = tile.scale_and_zero(tl.load(pair + S, mask=stored, other=0))
    k0, k1, k2, k3 = _row_pieces(first + ROWS_K, row, stored, tile.key_column(tl.arange(0, 4 * U), U, WIDE), C, D, tl.float16, KB == 8)
    raw = _product(k0, q0) + _product(k1, q1)
    if KB != 8:
        raw += _product(k2, q2) + _product(k3, q3)
    s = raw * ks[:, None] + kz[:, None] * q_sum[None, :]
    if SOFT_CAP:
        s = soft_cap * _tanh(s / soft_cap)
    return s, vs, vz


@triton.jit
def sink_values(
    first,
    row,
    stored,
    weight,
    C: tl.constexpr,
    U: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    VB: tl.constexpr,
    ROWS_V: tl.constexpr,
):
    """sum_r v[r] weight[r, N], as four pieces float32 [4U, N], two of them zero for 8 bits. weight: bfloat16, e * scale; where that is [W, SP, N], the
    sums are of each."""
    x0, x1, x2, x3 = _row_pieces(first + ROWS_V, row, stored, tile.value_column(tl.arange(0, 4 * U), WIDE), C, D, tl.bfloat16, VB == 8)
    v0, v1 = _product(x0.T, weight), _product(x1.T, weight)
    v2, v3 = tl.zeros_like(v0), tl.zeros_like(v1)
    if VB != 8:
        v2, v3 = _product(x2.T, weight), _product(x3.T, weight)
    return v0, v1, v2, v3


@triton.jit
def _take(s, m, denominators, zeros, scale, zero):
    """The softmax takes T more tokens: (m, what fades what has been summed [W, N], denominators, zeros, the tokens' weights bfloat16 [W, T, N]).

    s  float32 [W, T, N], scores        scale, zero  float32 [W, T] of the tokens' values
    """
    W: tl.constexpr = s.shape[0]
    T: tl.constexpr = s.shape[1]
    N: tl.constexpr = s.shape[2]
    m_new = tl.maximum(m, tl.max(s, 1))
    fade = tl.exp2(m - m_new)
    e = tl.exp2(s - m_new[:, None, :])
    denominators = denominators * fade[:, None, :] + tl.sum(e.reshape(W, T // 8, 8, N), 1)
    zeros = zeros * fade[:, None, :] + tl.sum((e * zero[:, :, None]).reshape(W, T // 8, 8, N), 1)
    return m_new, fade, denominators, zeros, round_to(e * scale[:, :, None], tl.bfloat16)


@triton.jit
def _fetch_ahead(address, nbytes):
    """Has the L2 cache fetch nbytes[i] (none: 0) from address[i], both multiples of 16; thread i asks."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $3; setp.ne.and.u32 p, $2, 0, p;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r", [address.to(tl.int64), nbytes.to(tl.int32), tl.full(nbytes.shape, nbytes.shape[0], tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _join_twos(top, denominator, zero, a, H: tl.constexpr):
    """`_join_warps` of each two of 2 H warps."""
    R: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    P: tl.constexpr = a.shape[2]
    top0, top1 = top.reshape(N, H, 2).split()
    denominator0, denominator1 = denominator.reshape(N, H, 2).split()
    zero0, zero1 = zero.reshape(N, H, 2).split()
    a0, a1 = a.reshape(R, N, P, H, 2).split()
    top = tl.maximum(top0, top1)
    fade0, fade1 = tl.exp2(top0 - top), tl.exp2(top1 - top)
    a = a0 * fade0[None, :, None, :] + a1 * fade1[None, :, None, :]
    return top, denominator0 * fade0 + denominator1 * fade1, zero0 * fade0 + zero1 * fade1, a


@triton.jit
def _join_warps(top, denominator, zero, a, W: tl.constexpr):
    """What W <= 8 warps have of some rows, top, denominator, zero [N, W] and a [R, N, P, W], as what all have, without W.

    A reduction would store, add up and store again, one after the other. Here warps exchange all they have, and each adds up by itself.
    """
    if W == 8:
        top, denominator, zero, a = _join_twos(top, denominator, zero, a, 4)
    if W >= 4:
        top, denominator, zero, a = _join_twos(top, denominator, zero, a, 2)
    if W >= 2:
        top, denominator, zero, a = _join_twos(top, denominator, zero, a, 1)
    N: tl.constexpr = top.shape[0]
    return top.reshape(N), denominator.reshape(N), zero.reshape(N), a.reshape(a.shape[0], N, a.shape[2])


@triton.jit
def _sum_of_parts(
    sums, ends, counters, part, parts, a, top, denominator, live, ROWS: tl.constexpr, LOG_FAN: tl.constexpr, ROUND: tl.constexpr
):
    """(whether this program has it, the sum of a sequence's parts), from its part of it.

    a                     float32 [N, R], what has been summed; top, denominator  [N]
    sums, ends, counters  where the sequence's part 0 leaves its own, in slot 1 of two; part i > 0 does in slot 2 i. Slots have ROWS >= N rows

    Parts are joined as a tree: of FAN neighbours the last to arrive adds up all, in order, and stands for them among FAN times as many. What is
    left takes one load's time for each level of the tree and ROUND parts, and no program ever waits for another.
    """
    N: tl.constexpr = a.shape[0]
    R: tl.constexpr = a.shape[1]
    FAN: tl.constexpr = 1 << LOG_FAN
    ns, rs = tl.arange(0, N), tl.arange(0, R)
    log_step = 0
    whole = True
    while tl.condition(whole & (parts > 1 << log_step), disable_licm=True):
        step = 1 << log_step
        begin = part & -(FAN << log_step)
        members = tl.minimum((parts - begin + step - 1) >> log_step, FAN)
        if members > 1:
            slot = tl.where(part == 0, 1, 2 * part)
            tl.store(sums + slot * (ROWS * R) + ns[:, None] * R + rs[None, :], a, mask=live[:, None])
            tl.store(ends + slot * (2 * ROWS) + ns, top)
            tl.store(ends + slot * (2 * ROWS) + ROWS + ns, denominator)
            counter = counters + 2 * (begin + step)  # the second member's, which is the second of no other group
            tl.debug_barrier()  # all of the program's threads have stored before one of them says so
            whole = tl.atomic_add(counter, 1, sem="acq_rel") == members - 1
            if whole:
                tl.store(counter, 0)
                top = tl.full((N,), NOTHING, tl.float32)
                denominator = tl.zeros((N,), tl.float32)
                a = tl.zeros((N, R), tl.float32)
                for i in tl.range(0, members, ROUND, disable_licm=True):
                    member = i + tl.arange(0, ROUND)
                    there = tl.broadcast_to((member < members)[None, :], (N, ROUND))
                    other = begin + member * step
                    slots = tl.where(other == 0, 1, 2 * other)
                    end = ends + slots[None, :] * (2 * ROWS) + ns[:, None]  # [N, ROUND]
                    tops = tl.load(end, mask=there, other=NOTHING, cache_modifier=".cg")
                    denominators = tl.load(end + ROWS, mask=there, other=0.0, cache_modifier=".cg")
                    at = sums + slots[None, :, None] * (ROWS * R) + ns[:, None, None] * R + rs[None, None, :]
                    x = tl.load(at, mask=(there & live[:, None])[:, :, None], other=0.0, cache_modifier=".cg")
                    top_new = tl.maximum(top, tl.max(tops, 1))
                    fade, fades = tl.exp2(top - top_new), tl.exp2(tops - top_new[:, None])
                    top = top_new
                    denominator = denominator * fade + tl.sum(denominators * fades, 1)
                    a = a * fade[:, None] + tl.sum(x * fades[:, :, None], 1)
                tl.debug_barrier()  # all of the program's threads have loaded before one of them stores in the first one's place
        part = begin
        log_step += LOG_FAN
    return whole, a, top, denominator


@triton.jit
def _first_half(x):
    """The first half of x's rows."""
    N: tl.constexpr = x.shape[0] // 2
    if len(x.shape) == 1:
        first, _ = x.reshape(2, N).permute(1, 0).split()
    else:
        first, _ = x.reshape(2, N, x.shape[1]).permute(1, 2, 0).split()
    return first


@triton.jit
def _twice(x):
    """x's rows, and then the same again."""
    if len(x.shape) == 1:
        return tl.join(x, x).permute(1, 0).reshape(2 * x.shape[0])
    else:
        return tl.join(x, x).permute(2, 0, 1).reshape(2 * x.shape[0], x.shape[1])


@triton.jit
def _shares_of(count, chunk):
    """count / chunk, rounded up, of integers whose sum is below 2 ** 21: there float32 does not take the half away."""
    return (((count + chunk).to(tl.float32) - 0.5) / chunk.to(tl.float32)).to(tl.int32)


@triton.jit
def _chunk(count, B, shares, LEAST: tl.constexpr):
    """(pages of a share, count), from how many pages each of B sequences has to read.

    A share that has pages of two sequences turns two sets of queries and leaves two parts, which takes about as long as two pages. Where up to two
    more pages a share avoid that, each sequence counts as many as its shares would have if all were full, so that none has pages of the next.
    """
    chunk = tl.maximum(tl.cdiv(tl.sum(count, 0), shares), LEAST)
    if (B > 1) & (B <= shares):
        found = 0
        for i in tl.static_range(3):
            some = chunk + 2 - i
            found = tl.where(tl.sum(_shares_of(count, some), 0) <= shares, some, found)
        if found > 0:
            chunk = found
            count = _shares_of(count, chunk) * chunk
    return chunk, count


# what changes from batch to batch must not have a compilation of its own each time
@triton.jit(
    do_not_specialize=["B", "stride_bt", "stride_lse"], do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"]
)
def decode_kernel(
    q, pages, block_table, seq_lens, query_start_loc, sums, ends, counters, out, lse, sink_logits,
    B, stride_q, stride_qh, stride_p, stride_ph, stride_bt, stride_o, stride_oh, stride_lse, scale, soft_cap,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_LSE: tl.constexpr, HAS_SINK: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, K_PIECES: tl.constexpr, K_JP: tl.constexpr, K_A: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, V_PIECES: tl.constexpr, V_JP: tl.constexpr, V_A: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BB: tl.constexpr,
    LEAST: tl.constexpr, LOG_FAN: tl.constexpr, ROUND: tl.constexpr, HALF: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[i, hq] and lse[i, hq] of ref.decode. Program (h, r, s): the s-th share of pages of KV head h, for its r-th N rows.
    Shares without pages are the last programs of a launch, so that multiprocessors have as many with pages, give or take one.

    sums      float32 [r, h, s, 2, N, 4 VU, V pieces]      what a program leaves of a sequence that is not its own alone: first and last one
    ends      float32 [r, h, s, 2, 2, N]                   the maximum and the denominator that go with them
    counters  int32 [r, h, s, 2], zeros                    how many have left their sums, see `_sum_of_parts`
    """
    after_previous(PDL)
    KU: tl.constexpr = K_JP * K_WIDE
    VU: tl.constexpr = V_JP * V_WIDE
    NPV: tl.constexpr = 2 if VB == 8 else 4
    K8: tl.constexpr = KB == 8
    V8: tl.constexpr = VB == 8
    share, shares = tl.program_id(2), tl.num_programs(2)
    h = tl.program_id(0)
    first_slot = (tl.program_id(1) * tl.num_programs(0) + h) * shares * 2

    # the pages of all sequences, numbered through
    each = tl.arange(0, BB)
    here = each < B
    lens = tl.load(seq_lens + each, mask=here, other=0)
    asked = tl.load(query_start_loc + each + 1, mask=here, other=0) - tl.load(query_start_loc + each, mask=here, other=0)
    count = tl.cdiv(lens, P)
    if WINDOW > 0:
        count -= tl.maximum(lens - asked + 1 - WINDOW, 0) // P
    count = tl.where(asked > 0, tl.maximum(count, 1), 0)
    chunk, count = _chunk(count, B, shares, LEAST)
    stops = tl.cumsum(count, 0)
    at = share * chunk
    last = tl.minimum(at + chunk, tl.sum(count, 0))

    mask = tile.nibble(stride_p)
    n = tl.program_id(1) * N + tl.arange(0, N)
    # what depends on the thread alone is computed where it is used: before the loop it would take registers that the pages' loop needs
    while tl.condition(at < last, disable_licm=True):
        b = tl.sum((stops <= at).to(tl.int32), 0)
        stop = tl.sum(tl.where(each == b, stops, 0), 0)
        start = stop - tl.sum(tl.where(each == b, count, 0), 0)
        length = tl.load(seq_lens + b)
        first_token = tl.load(query_start_loc + b)
        queries = tl.load(query_start_loc + b + 1) - first_token
        first_page = 0
        if WINDOW > 0:
            first_page = tl.maximum(length - queries + 1 - WINDOW, 0) // P
        p0 = first_page + at - start
        p1 = first_page + tl.minimum(last, stop) - start
        until_page = tl.minimum(p1, tl.cdiv(length, P))
        head_pages = pages + h.to(tl.int64) * stride_ph
        table = block_table + b.to(tl.int64) * stride_bt
        live = n < queries * GROUP
        tokens = (first_token + n // GROUP).to(tl.int64)
        hq = h * GROUP + n % GROUP
        until = length - queries + n // GROUP  # the row's own position
        since = tl.zeros((N,), tl.int32)
        if WINDOW > 0:
            since = tl.maximum(until - (WINDOW - 1), 0)

        x0, x1, x2, x3 = load_queries(q, tokens, hq, live, stride_q, stride_qh, KC, D, KB, ROTATE, BLOCK_K)
        if AHEAD > 0:
            # on their way to the L2 cache while the queries are turned: rows, then pages, since what all programs ask for at once takes its time
            i = tl.arange(0, 2 * AHEAD)
            soon = p0 + tl.maximum(i - 1, 0)
            page_soon = head_pages + tl.load(table + soon, mask=soon < until_page, other=0).to(tl.int64) * stride_p
            of_rows = tl.where((i == 0) & (p0 == 0), ROWS_V + S * DV - ROW_SCALES, 0)
            of_page = tl.where((i > 0) & (i <= AHEAD), ROW_SCALES, 0)
            _fetch_ahead(page_soon + tl.where(i == 0, ROW_SCALES, 0), tl.where(soon < until_page, of_rows + of_page, 0))
        q0, q1, q2, q3, q_sum, offset = rotate_queries(
            x0, x1, x2, x3, q, tokens, hq, live, stride_q, stride_qh, scale, KC, KU, K_WIDE, D, DP, KB, ROTATE, BLOCK_K
        )
        qw0 = tl.broadcast_to(q0[None, :, :], (W, 4 * KU, N))
        qw1 = tl.broadcast_to(q1[None, :, :], (W, 4 * KU, N))
        qw2 = tl.broadcast_to(q2[None, :, :], (W, 4 * KU, N))
        qw3 = tl.broadcast_to(q3[None, :, :], (W, 4 * KU, N))

        m = tl.full((W, N), NOTHING, tl.float32)
        denominators = tl.zeros((W, 8, N), tl.float32)  # summed over every eighth token
        zeros = tl.zeros((W, 8, N), tl.float32)
        weights = tl.zeros((W, 16, N), tl.float32)  # of tokens, summed as they are multiplied: 16 times the same
        o0 = tl.zeros((W, 4 * VU, N), tl.float32)
        o1 = tl.zeros((W, 4 * VU, N), tl.float32)
        o2 = tl.zeros((W, 4 * VU, N), tl.float32)
        o3 = tl.zeros((W, 4 * VU, N), tl.float32)
        if S > 0:
            if p0 == 0:
                # the sequence's first tokens, from their rows: what the first warp starts from
                first = head_pages + tl.load(table).to(tl.int64) * stride_p
                row = tl.arange(0, SP)
                stored = (row < S) & (row < length)
                s, vs, vz = sink_scores(
                    first, row, stored, qw0, qw1, qw2, qw3, q_sum, soft_cap, SOFT_CAP, S, KC, KU, K_WIDE, D, KB, ROW_SCALES, ROWS_K
                )
                seen = stored[:, None] & (row[:, None] <= until[None, :]) & (row[:, None] >= since[None, :])
                s = tl.where(seen[None] & (tl.arange(0, W)[:, None, None] == 0), s, NOTHING)
                m, _, denominators, zeros, weight = _take(s, m, denominators, zeros, vs[None], vz[None])
                o0, o1, o2, o3 = sink_values(first, row, stored, weight, VC, VU, V_WIDE, DV, VB, ROWS_V)
                o0, o1 = o0 / tile.down(0, VB, PTX), o1 / tile.down(1, VB, PTX)
                o2, o3 = o2 / tile.down(2, VB, PTX), o3 / tile.down(3, VB, PTX)
        in_page = tl.arange(0, W)[:, None] * T + tl.arange(0, T)[None, :]
        not_before = tl.maximum(since, S)  # sinks are read from their rows

        for p in range(p0, until_page):
            page = head_pages + tl.load(table + p).to(tl.int64) * stride_p
            t = p * P + in_page
            stored = t < length
            kp = tl.load((page + SCALES_K).to(tl.pointer_type(tl.int32)) + in_page, mask=stored, other=0)
            vp = tl.load((page + SCALES_V).to(tl.pointer_type(tl.int32)) + in_page, mask=stored, other=0)
            xk, xh = tile.load_keys(
                (page + CODES_K).to(tl.pointer_type(tl.int16)), (page + HIGH_K).to(tl.pointer_type(tl.int16)), KB, K_PIECES, K_JP, K_A, K_N, K_WIDE,
                HIGH_A, HIGH_N, HIGH_WIDE, W,
            )  # fmt: skip
            # two sums side by side: a warp waits for each product before it adds the next
            raw = dot(tile.keys(xk, xh, 0, mask, KB, W, T, KU, PTX), qw0, tl.broadcast_to(-offset[None, None, :], (W, T, N)))
            other = dot(tile.keys(xk, xh, 1, mask, KB, W, T, KU, PTX), qw1, tl.zeros((W, T, N), tl.float32))
            if not K8:
                raw = dot(tile.keys(xk, xh, 2, mask, KB, W, T, KU, PTX), qw2, raw)
                other = dot(tile.keys(xk, xh, 3, mask, KB, W, T, KU, PTX), qw3, other)
            raw += other
            ks, kz = tile.scale_and_zero(kp)
            shift = kz[:, :, None] * q_sum[None, None, :]
            if MEAN:
                mean = (page + MEAN_K).to(tl.pointer_type(tl.float16))
                none = tl.zeros((W, 16, N), tl.float32)
                of_mean = dot(_mean_piece(mean, 0, KC, K_PIECES, K_JP, K_WIDE, D, W), qw0, none)
                more = dot(_mean_piece(mean, 1, KC, K_PIECES, K_JP, K_WIDE, D, W), qw1, none)
                if not K8:
                    of_mean += dot(_mean_piece(mean, 2, KC, K_PIECES, K_JP, K_WIDE, D, W), qw2, none)
                    more += dot(_mean_piece(mean, 3, KC, K_PIECES, K_JP, K_WIDE, D, W), qw3, none)
                of_mean += more
                # its 16 rows are alike, as are the tile's rows that they are added to
                shift = (shift.reshape(W, T // 16, 16, N) + of_mean[:, None, :, :]).reshape(W, T, N)
            s = raw * ks[:, :, None] + shift
            if SOFT_CAP:
                s = soft_cap * _tanh(s / soft_cap)
            s = tl.where((t[:, :, None] <= until[None, None, :]) & (t[:, :, None] >= not_before[None, None, :]), s, NOTHING)

            vs, vz = tile.scale_and_zero(vp)
            m, fade, denominators, zeros, weight = _take(s, m, denominators, zeros, vs * tile.up(VB, PTX), vz)
            xv = tile.load_values((page + CODES_V).to(tl.pointer_type(tl.int16)), V_PIECES, V_JP, V_A, V_N, V_WIDE, W)
            o0 = dot(tile.value_codes(xv, 0, VB, PTX), weight, o0 * fade[:, None, :])
            o1 = dot(tile.value_codes(xv, 1, VB, PTX), weight, o1 * fade[:, None, :])
            if not V8:
                o2 = dot(tile.value_codes(xv, 2, VB, PTX), weight, o2 * fade[:, None, :])
                o3 = dot(tile.value_codes(xv, 3, VB, PTX), weight, o3 * fade[:, None, :])
                weights = dot(tl.full((W, 16, T), 1.0, tl.bfloat16), weight, weights * fade[:, None, :])

        o0, o1, o2, o3 = o0 * tile.down(0, VB, PTX), o1 * tile.down(1, VB, PTX), o2 * tile.down(2, VB, PTX), o3 * tile.down(3, VB, PTX)

        # the warps meet
        zero = tl.sum(zeros, 1)
        if not V8:
            zero -= tile.code_offset(VB) / (16 * tile.up(VB, PTX)) * tl.sum(weights, 1)
        top, denominator, zero, a = _join_warps(
            m.T, tl.sum(denominators, 1).T, zero.T, _together(o0, o1, o2, o3, V8).permute(1, 2, 3, 0), W
        )
        a += zero[None, :, None]
        a = a.permute(1, 0, 2).reshape(N, 4 * VU * NPV)

        one = start // chunk
        parts = (stop - 1) // chunk - one + 1  # programs that this sequence is shared out to
        whole = True
        if parts > 1:
            slot = first_slot + 2 * one
            if HALF:
                a, top, denominator = _first_half(a), _first_half(top), _first_half(denominator)
            some = tl.program_id(1) * N + tl.arange(0, a.shape[0])
            whole, a, top, denominator = _sum_of_parts(
                sums + slot.to(tl.int64) * (N * 4 * VU * NPV), ends + slot.to(tl.int64) * (2 * N), counters + slot, share - one, parts,
                a, top, denominator, some < queries * GROUP, N, LOG_FAN, ROUND,
            )  # fmt: skip
            if HALF:
                a, top, denominator = _twice(a), _twice(top), _twice(denominator)

        if whole:
            if HAS_SINK:
                logit = tl.load(sink_logits + hq).to(tl.float32) * 1.4426950408889634
                sink_top = tl.maximum(top, logit)
                sink_fade = tl.exp2(top - sink_top)
                top = sink_top
                denominator = denominator * sink_fade + tl.exp2(logit - top)
            else:
                sink_fade = tl.full((N,), 1.0, tl.float32)
            seen = top > NOTHING
            norm = tl.where(seen, sink_fade / denominator, 0.0)
            if HAS_LSE:
                tl.store(
                    lse + tokens * stride_lse + hq,
                    tl.where(seen, (top + tl.log2(denominator)) * 0.6931471805599453, float("-inf")),
                    mask=live,
                )
            a0, a1, a2, a3 = _apart(a.reshape(N, 4 * VU, NPV).permute(1, 0, 2), V8)
            store_output(
                out, a0, a1, a2, a3, norm, tokens, hq, live, stride_o, stride_oh, VC, VU, V_WIDE, DV, DVP, VB, ROTATE, BLOCK_V, PTX
            )
        at = start + p1 - first_page


# ---- launch

MIN_ROWS = 8 if torch.version.hip is None else 16  # the tensor core's least
MAX_ROWS = 16  # rows of a program; more are shared out to several, which read the pages again


def rows_of(group: int, max_query_len: int) -> tuple[int, int]:
    """(N, how many programs share a KV head's rows)."""
    rows = group * max_query_len
    n = min(max(_pow2(rows), MIN_ROWS), MAX_ROWS)
    return n, -(-rows // n)


def half_empty(group: int, max_query_len: int) -> bool:
    """Whether the second half of a program's rows is empty."""
    return 2 * group * max_query_len <= rows_of(group, max_query_len)[0]


@dataclass(frozen=True)
class Launch:
    """programs   per multiprocessor; a KV head's shares of the pages come from it
    stages     of loads
    registers  a thread may have; None: any
    tokens     of a page that a warp takes
    pages      at least, that are worth a program
    fan        parts of a sequence that one program adds up, a power of two
    round      how many of them it loads at once, a power of two
    halve      whether that is half of the rows of twice as many, where the other half is empty
    ahead      pages that a program asks for before it turns to its queries, a power of two or 0
    """

    programs: int
    stages: int
    registers: int | None = None
    tokens: int = 32
    pages: int = 2
    fan: int = 16
    round: int = 4
    halve: bool = False
    ahead: int = 2


def launch_of(page: Page, n: int) -> Launch:
    """As many programs as a multiprocessor's registers hold, and no fewer: programs that come up while the kernel before them still runs go where there
    is room, so that some multiprocessors would get more of them than others.

    Found by bench/attention.py on an H100. Programs of four warps rather than two add up fewer parts in the end, in less time: 1 x 32,768 tokens took
    24.0 us with 528 programs and 21.4 with 264. With small heads, instructions decide: a warp that takes 64 tokens of a page rather than 32 has a
    fifth fewer, and loads a lot of parts at once without running out of registers.
    """
    dim = max(page.head_dim, page.v_head_dim)
    if dim <= 64 and n == MIN_ROWS:
        return Launch(4 * 128 // page.page_size, 4, tokens=64, round=8)
    launch = Launch(2 * 128 // page.page_size, 6)
    # elsewhere many parts at once would take registers from the loop over pages
    light = page.k_bits == page.v_bits == 4 and dim <= 128 and n == MIN_ROWS
    return replace(launch, fan=32, round=max(1, page.page_size // 8), halve=True) if light else launch


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


# The workspace begins with the counters, as many for every batch: where one call counts, no other call may have left its sums.
COUNTERS = 1 << 16


def shares_of(device: torch.device, blocks: int, launch: Launch) -> int:
    """Programs that a KV head's pages (for one block of rows) are shared out to: together one wave."""
    return max(1, min(_multiprocessors(device) * launch.programs, COUNTERS // 2) // blocks)


def _sizes(shares: int, n: int, blocks: int, page: Page) -> tuple[int, int]:
    """float32 of `sums` and of `ends`."""
    slots = blocks * shares * 2
    v = page.v
    values = (2 if page.v_bits == 8 else 4) * 4 * _pow2(v.pieces) * v.w
    return slots * values * n, slots * 2 * n


def workspace_bytes(max_batch: int, num_heads: int, num_kv_heads: int, page: Page, max_query_len: int, device: torch.device) -> int:
    """What `decode` needs; as much for every max_batch."""
    if device.type == "cpu" and not INTERPRET.value:
        return 16
    sizes = []
    for queries in range(1, max_query_len + 1):
        n, blocks = rows_of(num_heads // num_kv_heads, queries)
        sizes.append(sum(_sizes(shares_of(device, num_kv_heads * blocks, launch_of(page, n)), n, num_kv_heads * blocks, page)))
    return 4 * (COUNTERS + max(sizes))


@cache
def _launcher(
    page: Page, launch: Launch, group: int, n: int, half: bool, batch_block: int, window: int, soft_cap: bool, lse: bool, sink: bool
) -> Launcher:
    runs = tile.runs_of(page, launch.tokens)
    registers = {"maxnreg": launch.registers} if tile.PTX and launch.registers else {}
    return Launcher(
        decode_kernel, GROUP=group, WINDOW=window, SOFT_CAP=soft_cap, HAS_LSE=lse, HAS_SINK=sink,
        SP=max(16, _pow2(page.sinks) if page.sinks else 0), W=runs, T=page.page_size // runs, N=n, BB=batch_block,
        LEAST=launch.pages, LOG_FAN=launch.fan.bit_length() - 1, ROUND=launch.round * (1 + half), HALF=half,
        AHEAD=launch.ahead if on_hopper() else 0, PTX=tile.PTX,
        num_warps=runs, num_stages=launch.stages, **tile.page_constants(page, runs), **dependent_launch(), **registers,
    )  # fmt: skip


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    workspace: Tensor,
    out: Tensor,
    lse: Tensor | None,
    page: Page,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """See op.py."""
    batch, heads = seq_lens.shape[0], pages.shape[1]
    group = q.shape[1] // heads
    n, blocks = rows_of(group, max_query_len)
    launch = launch or launch_of(page, n)
    half = launch.halve and half_empty(group, max_query_len)
    shares = min(shares_of(q.device, heads * blocks, launch), batch * triton.cdiv(max_seq_len, page.page_size))
    sums, ends = _sizes(shares, n, heads * blocks, page)
    if workspace.numel() < 4 * (COUNTERS + sums + ends):
        raise ValueError(f"the workspace has {workspace.numel()} bytes and {4 * (COUNTERS + sums + ends)} are needed; see decode_workspace")
    counters = workspace[: 4 * COUNTERS].view(torch.int32)
    floats = workspace[4 * COUNTERS : 4 * (COUNTERS + sums + ends)].view(torch.float32)
    out = out.view(q.shape[0], q.shape[1], page.v_head_dim)
    _launcher(page, launch, group, n, half, batch_block(batch), window, soft_cap > 0, lse is not None, sink_logits is not None)(
        (heads, blocks, shares),
        q, pages, block_table, seq_lens, query_start_loc, floats, floats[sums:], counters, out,
        floats if lse is None else lse, floats if sink_logits is None else sink_logits,
        batch, q.stride(0), q.stride(1), pages.stride(0), pages.stride(1), block_table.stride(0), out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), scale * LOG2E, soft_cap * LOG2E,
    )  # fmt: skip
