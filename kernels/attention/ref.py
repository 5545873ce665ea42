"""Attention over KV pages, in float32 torch: the definition of the kernels in this folder, and what runs on a CPU.

For a query token at position i of its sequence and a query head whose KV head is h,

    s[t]  = scale * q . k[t]                 over the visible t;   with a soft cap c:  c * tanh(s / c)
    lse   = log(sum_t exp(s[t]) + exp(sink))                       sink: the head's learned logit, where the model has one
    out   = sum_t exp(s[t] - lse) v[t]

Visible are t <= i, and with a window w only the last w of them: i - w < t. k and v are read from the pages in rotated space, so q is rotated
before and the output after; q.k and the sum do not change by it.
"""

from itertools import pairwise

import torch
from torch import Tensor

from qplugins.kernels.kv import ref as kv
from qplugins.kernels.kv.page import Page
from qplugins.kernels.kv.rotation import rotate


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, soft_cap: float = 0.0, sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [n, HQ, D], k [t, H, D], v [t, H, DV], visible bool [n, t] -> out float32 [n, HQ, DV], lse [n, HQ]; zeros and -inf where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    grouped = q.to(torch.float32).unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # [H, group, n, D]
    s = scale * grouped.flatten(1, 2) @ k.to(torch.float32).permute(1, 2, 0)  # [H, group * n, t]
    if soft_cap:
        s = soft_cap * torch.tanh(s / soft_cap)
    s = s.unflatten(1, (group, -1)).masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(s, -1)  # [H, group, n]
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(torch.float32).view(-1, group, 1))
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = (weights.flatten(1, 2) @ v.to(torch.float32).transpose(0, 1)).unflatten(1, (group, -1))
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float, window: int = 0, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """q [tokens, HQ, D] of sequences that cu_q [B + 1] tells apart, over plain k and v told apart by cu_k: out in q's dtype, lse float32 [tokens, HQ].

    causal  a sequence's queries are its last tokens, all of them keys too; otherwise each query sees every key of its sequence
    window  tokens that a query sees, itself included; 0: all
    """
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    lse = torch.full(q.shape[:2], -torch.inf)
    step = 256  # rows at once: scores of long prompts would not fit in memory
    for (a, b), (start, stop) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for i in range(a, b, step):
            j = min(b, i + step)
            row = torch.arange(i - a, j - a)[:, None]
            column = torch.arange(j - a if causal else stop - start)[None, :]
            visible = column <= row if causal else torch.ones(len(row), column.shape[1], dtype=torch.bool)
            if window:
                visible = visible & (column > row - window)
            end = start + column.shape[1]
            out[i:j], lse[i:j] = attend(q[i:j], k[start:end], v[start:end], visible, scale, soft_cap)
    return out, lse


def _over_pages(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    stops: list[int],
    firsts: list[int],
    page: Page,
    scale: float,
    window: int,
    soft_cap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sequence b's first query stands at position firsts[b] and sees cached tokens up to its own, below stops[b]."""
    out = torch.zeros(*q.shape[:2], page.v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    cu = query_start_loc.tolist()
    for b, (stop, first) in enumerate(zip(stops, firsts, strict=True)):
        n = cu[b + 1] - cu[b]
        if n <= 0:
            continue
        start = max(0, first - window + 1) // page.page_size * page.page_size if window else 0
        i = first + torch.arange(n, device=q.device)[:, None]
        t = torch.arange(start, max(start, stop), device=q.device)[None, :]
        visible = (t <= i) & (t > i - window) if window else t <= i
        if start < stop:
            k, v = kv.sequence(pages, block_table[b], start, stop, page)
        else:
            k, v = (torch.zeros(0, pages.shape[1], d, device=q.device) for d in (page.head_dim, page.v_head_dim))
        rq = q[cu[b] : cu[b + 1]]
        o, lse[cu[b] : cu[b + 1]] = attend(rotate(rq) if page.rotate else rq, k, v, visible, scale, soft_cap, sink_logits)
        out[cu[b] : cu[b + 1]] = rotate(o) if page.rotate else o
    return out, lse


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    page: Page,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The last tokens of each sequence against all of it, themselves included, once they are written. See op.py."""
    lens, cu = seq_lens.tolist(), query_start_loc.tolist()
    firsts = [n - (cu[b + 1] - cu[b]) for b, n in enumerate(lens)]
    return _over_pages(q, pages, block_table, query_start_loc, lens, firsts, page, scale, window, soft_cap, sink_logits)


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
) -> tuple[Tensor, Tensor]:
    """A chunk's tokens against the context_lens tokens that were cached before it, without the chunk itself. See op.py."""
    lens = context_lens.tolist()
    return _over_pages(q, pages, block_table, query_start_loc, lens, lens, page, scale, window, soft_cap, sink_logits)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of tokens, from the results over each: out [n, HQ, DV] in out_a's dtype, lse [n, HQ]."""
    lse = torch.logaddexp(lse_a, lse_b)
    at = lse.masked_fill(lse == -torch.inf, 0)
    out = out_a.to(torch.float32) * torch.exp(lse_a - at)[..., None] + out_b.to(torch.float32) * torch.exp(lse_b - at)[..., None]
    return out.to(out_a.dtype), lse
