"""A chunk's queries against what was cached before the chunk. decode.py has the arithmetic; here rows are many, and one program walks all pages.

A row is a query token of one of the query heads that share a KV head, ROWS of them in a program, so a page is decoded once for all of them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qplugins.kernels.attention.decode import LOG2E, NOTHING, _tanh, rotated_queries, sink_scores, sink_values, store_output
from qplugins.kernels.common.device import dot, round_to
from qplugins.kernels.common.launch import Launcher
from qplugins.kernels.kv import tile
from qplugins.kernels.kv.page import Page, _pow2

ROWS = 64
WARPS = 8
STAGES = 2


@triton.jit
def _mean_shift(q, mean, piece: tl.constexpr, C: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr):
    """float32 [N]: a piece of q . mean."""
    column = tile.key_column(tl.arange(0, 4 * U), U, WIDE)
    d = piece * C + column
    x = tl.load(mean + d, mask=(column < C) & (d < D), other=0.0).to(tl.float32)
    return tl.sum(q.to(tl.float32) * x[:, None], 0)


@triton.jit(
    do_not_specialize=["stride_bt", "stride_lse"], do_not_specialize_on_alignment=["block_table", "context_lens", "query_start_loc"]
)
def prefill_kernel(
    q, pages, block_table, context_lens, query_start_loc, out, lse, sink_logits,
    stride_q, stride_qh, stride_p, stride_ph, stride_bt, stride_o, stride_oh, stride_lse, scale, soft_cap,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, HAS_SINK: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    MEAN: tl.constexpr, ROTATE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KC: tl.constexpr, K_PIECES: tl.constexpr, K_JP: tl.constexpr, K_A: tl.constexpr, K_N: tl.constexpr, K_WIDE: tl.constexpr,
    VC: tl.constexpr, V_PIECES: tl.constexpr, V_JP: tl.constexpr, V_A: tl.constexpr, V_N: tl.constexpr, V_WIDE: tl.constexpr,
    HIGH_A: tl.constexpr, HIGH_N: tl.constexpr, HIGH_WIDE: tl.constexpr,
    CODES_K: tl.constexpr, HIGH_K: tl.constexpr, CODES_V: tl.constexpr, SCALES_K: tl.constexpr, SCALES_V: tl.constexpr, MEAN_K: tl.constexpr,
    ROW_SCALES: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    N: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out[i, hq] and lse[i, hq] of ref.prefill. Program (r, h, b): the r-th N rows of KV head h in sequence b."""
    KU: tl.constexpr = K_JP * K_WIDE
    VU: tl.constexpr = V_JP * V_WIDE
    K8: tl.constexpr = KB == 8
    V8: tl.constexpr = VB == 8
    h, b = tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + b)
    first_token = tl.load(query_start_loc + b)
    queries = tl.load(query_start_loc + b + 1) - first_token
    n = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= queries * GROUP:
        return
    live = n < queries * GROUP
    tokens = (first_token + n // GROUP).to(tl.int64)
    hq = h * GROUP + n % GROUP
    since = tl.zeros((N,), tl.int32)
    first_page = 0
    if WINDOW > 0:
        since = tl.maximum(context + n // GROUP - (WINDOW - 1), 0)
        first_page = tl.minimum(tl.min(since, 0), context) // P

    q0, q1, q2, q3, q_sum, offset = rotated_queries(
        q, tokens, hq, live, stride_q, stride_qh, scale, KC, KU, K_WIDE, D, DP, KB, ROTATE, BLOCK_K
    )

    top = tl.full((N,), NOTHING, tl.float32)
    denominator = tl.zeros((N,), tl.float32)
    zeros = tl.zeros((N,), tl.float32)
    o0 = tl.zeros((4 * VU, N), tl.float32)
    o1 = tl.zeros((4 * VU, N), tl.float32)
    o2 = tl.zeros((4 * VU, N), tl.float32)
    o3 = tl.zeros((4 * VU, N), tl.float32)
    table = block_table + b.to(tl.int64) * stride_bt
    if S > 0:
        if (first_page == 0) & (context > 0):
            first = pages + tl.load(table).to(tl.int64) * stride_p + h.to(tl.int64) * stride_ph
            row = tl.arange(0, SP)
            stored = (row < S) & (row < context)
            row_s, row_vs, row_vz = sink_scores(
                first, row, stored, q0, q1, q2, q3, q_sum, soft_cap, SOFT_CAP, S, KC, KU, K_WIDE, D, KB, ROW_SCALES, ROWS_K
            )
            row_s = tl.where(stored[:, None] & (row[:, None] >= since[None, :]), row_s, NOTHING)
            top = tl.maximum(top, tl.max(row_s, 0))
            row_e = tl.where(row_s > NOTHING, tl.exp2(row_s - top[None, :]), 0.0)
            denominator = tl.sum(row_e, 0)
            zeros = tl.sum(row_e * row_vz[:, None], 0)
            row_weight = round_to(row_e * row_vs[:, None], tl.bfloat16)
            o0, o1, o2, o3 = sink_values(first, row, stored, row_weight, VC, VU, V_WIDE, DV, VB, ROWS_V)

    mask = tile.nibble(stride_q)
    in_page = tl.arange(0, P)
    not_before = tl.maximum(since, S)  # sinks are read from their rows
    for p in range(first_page, tl.cdiv(context, P)):
        page = pages + tl.load(table + p).to(tl.int64) * stride_p + h.to(tl.int64) * stride_ph
        t = p * P + in_page
        stored = t < context
        ks, kz = tile.scale_and_zero(tl.load((page + SCALES_K).to(tl.pointer_type(tl.int32)) + in_page, mask=stored, other=0))
        vs, vz = tile.scale_and_zero(tl.load((page + SCALES_V).to(tl.pointer_type(tl.int32)) + in_page, mask=stored, other=0))
        xk, xh = tile.load_keys(
            (page + CODES_K).to(tl.pointer_type(tl.int16)), (page + HIGH_K).to(tl.pointer_type(tl.int16)), KB, K_PIECES, K_JP, K_A, K_N, K_WIDE,
            HIGH_A, HIGH_N, HIGH_WIDE, 1,
        )  # fmt: skip
        raw = tl.zeros((P, N), tl.float32)
        raw = dot(tile.keys(xk, xh, 0, mask, KB, 1, P, KU, PTX).reshape(P, 4 * KU), q0, raw)
        raw = dot(tile.keys(xk, xh, 1, mask, KB, 1, P, KU, PTX).reshape(P, 4 * KU), q1, raw)
        if not K8:
            raw = dot(tile.keys(xk, xh, 2, mask, KB, 1, P, KU, PTX).reshape(P, 4 * KU), q2, raw)
            raw = dot(tile.keys(xk, xh, 3, mask, KB, 1, P, KU, PTX).reshape(P, 4 * KU), q3, raw)
        shift = tl.zeros((N,), tl.float32)
        if MEAN:
            mean = (page + MEAN_K).to(tl.pointer_type(tl.float16))
            shift = _mean_shift(q0, mean, 0, KC, KU, K_WIDE, D) + _mean_shift(q1, mean, 1, KC, KU, K_WIDE, D)
            if not K8:
                shift += _mean_shift(q2, mean, 2, KC, KU, K_WIDE, D) + _mean_shift(q3, mean, 3, KC, KU, K_WIDE, D)
        s = (raw - offset[None, :]) * ks[:, None] + kz[:, None] * q_sum[None, :] + shift[None, :]
        if SOFT_CAP:
            s = soft_cap * _tanh(s / soft_cap)
        s = tl.where(stored[:, None] & (t[:, None] >= not_before[None, :]), s, NOTHING)
        top_new = tl.maximum(top, tl.max(s, 0))
        fade = tl.exp2(top - top_new)
        top = top_new
        e = tl.where(s > NOTHING, tl.exp2(s - top[None, :]), 0.0)
        denominator = denominator * fade + tl.sum(e, 0)
        weight = round_to(e * vs[:, None], tl.bfloat16)
        zeros = zeros * fade + tl.sum(e * vz[:, None], 0)
        if not V8:
            zeros -= tile.value_offset(VB) * tl.sum(weight.to(tl.float32), 0)
        xv = tile.load_values((page + CODES_V).to(tl.pointer_type(tl.int16)), V_PIECES, V_JP, V_A, V_N, V_WIDE, 1)
        o0 = dot(tile.values(xv, 0, mask, VB, PTX).reshape(4 * VU, P), weight, o0 * fade[None, :])
        o1 = dot(tile.values(xv, 1, mask, VB, PTX).reshape(4 * VU, P), weight, o1 * fade[None, :])
        if not V8:
            o2 = dot(tile.values(xv, 2, mask, VB, PTX).reshape(4 * VU, P), weight, o2 * fade[None, :])
            o3 = dot(tile.values(xv, 3, mask, VB, PTX).reshape(4 * VU, P), weight, o3 * fade[None, :])

    if HAS_SINK:
        logit = tl.load(sink_logits + hq).to(tl.float32) * 1.4426950408889634
        top_new = tl.maximum(top, logit)
        fade = tl.exp2(top - top_new)
        top = top_new
        denominator = denominator * fade + tl.exp2(logit - top)
        zeros *= fade
        o0 *= fade[None, :]
        o1 *= fade[None, :]
        o2 *= fade[None, :]
        o3 *= fade[None, :]
    seen = denominator > 0
    norm = tl.where(seen, 1.0 / denominator, 0.0)
    tl.store(lse + tokens * stride_lse + hq, tl.where(seen, (top + tl.log2(denominator)) * 0.6931471805599453, float("-inf")), mask=live)
    o0 += zeros[None, :]
    o1 += zeros[None, :]
    o2 += zeros[None, :]
    o3 += zeros[None, :]
    store_output(out, o0, o1, o2, o3, norm, tokens, hq, live, stride_o, stride_oh, VC, VU, V_WIDE, DV, DVP, VB, ROTATE, BLOCK_V, PTX)


@cache
def _launcher(page: Page, group: int, window: int, soft_cap: bool, sink: bool) -> Launcher:
    return Launcher(
        prefill_kernel, GROUP=group, WINDOW=window, SOFT_CAP=soft_cap, HAS_SINK=sink, SP=max(16, _pow2(page.sinks) if page.sinks else 0),
        N=ROWS, PTX=tile.PTX, num_warps=WARPS, num_stages=STAGES, **tile.page_constants(page, 1),
    )  # fmt: skip


def prefill(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    page: Page,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    batch, heads = context_lens.shape[0], pages.shape[1]
    group = q.shape[1] // heads
    out = torch.empty(*q.shape[:2], page.v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    longest = q.shape[0] if max_query_len is None else max_query_len
    _launcher(page, group, window, soft_cap > 0, sink_logits is not None)(
        (triton.cdiv(longest * group, ROWS), heads, batch),
        q, pages, block_table, context_lens, query_start_loc, out, lse, lse if sink_logits is None else sink_logits,
        q.stride(0), q.stride(1), pages.stride(0), pages.stride(1), block_table.stride(0), out.stride(0), out.stride(1), lse.stride(0),
        scale * LOG2E, soft_cap * LOG2E,
    )  # fmt: skip
    return out, lse
