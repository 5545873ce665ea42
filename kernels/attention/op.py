"""The operators `qplugins::kv_decode`, `kv_prefill` and `kv_merge`. CPU tensors run the reference, others the Triton kernels.

As in kv/op.py, no launch depends on values on the device: a CUDA graph captured for B sequences and max_seq_len serves every shorter batch,
whose padding has seq_lens 0 or no query tokens.
"""

import torch
from torch import Tensor

from qplugins.kernels.attention import decode as decode_kernel
from qplugins.kernels.attention import merge as merge_kernel
from qplugins.kernels.attention import prefill as prefill_kernel
from qplugins.kernels.attention import ref
from qplugins.kernels.kv.op import check_pages
from qplugins.kernels.kv.page import Page

MAX_QUERY_LEN = 8  # of decode: more query tokens are a prefill

_library = torch.library.Library("qplugins", "FRAGMENT")
_library.define(
    "kv_decode(Tensor q, Tensor pages, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor(a!) workspace, Tensor(b!) out, "
    "Tensor(c!)? lse, str page, int max_query_len, int max_seq_len, float scale, int window, float soft_cap, Tensor? sink_logits) -> ()"
)
_library.define(
    "kv_prefill(Tensor q, Tensor pages, Tensor block_table, Tensor context_lens, Tensor query_start_loc, str page, int max_query_len, "
    "float scale, int window, float soft_cap, Tensor? sink_logits) -> (Tensor, Tensor)"
)
_library.define("kv_merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")


def _check_queries(q: Tensor, pages: Tensor, page: Page, max_query_len: int, limit: int | None = None) -> None:
    check_pages(pages, page)
    if q.ndim != 3 or q.shape[2] != page.head_dim or q.shape[1] % pages.shape[1] or q.stride(2) != 1:
        raise ValueError(
            f"q should be [tokens, a multiple of {pages.shape[1]} heads, {page.head_dim}], dense in the last dimension; "
            f"is {tuple(q.shape)} with strides {q.stride()}"
        )
    if limit is not None and max_query_len > limit:
        raise ValueError(f"decode takes up to {limit} query tokens a sequence, not {max_query_len}; use prefill for the others")


def _decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    workspace: Tensor,
    out: Tensor,
    lse: Tensor | None,
    page: str,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int,
    soft_cap: float,
    sink_logits: Tensor | None,
) -> None:
    layout = Page.parse(page)
    _check_queries(q, pages, layout, max_query_len, MAX_QUERY_LEN)
    if q.numel() == 0:
        return
    if q.device.type == "cpu":
        o, o_lse = ref.decode(q, pages, block_table, seq_lens, query_start_loc, layout, scale, window, soft_cap, sink_logits)
        out.copy_(o.view(out.shape))
        if lse is not None:
            lse.copy_(o_lse)
    else:
        decode_kernel.decode(
            q,
            pages,
            block_table,
            seq_lens,
            query_start_loc,
            workspace,
            out,
            lse,
            layout,
            max_query_len,
            max_seq_len,
            scale,
            window,
            soft_cap,
            sink_logits,
        )


def _prefill(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    page: str,
    max_query_len: int,
    scale: float,
    window: int,
    soft_cap: float,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = Page.parse(page)
    _check_queries(q, pages, layout, max_query_len)
    run = ref.prefill if q.device.type == "cpu" else prefill_kernel.prefill
    extra = {} if q.device.type == "cpu" else {"max_query_len": max_query_len}
    return run(q, pages, block_table, context_lens, query_start_loc, layout, scale, window, soft_cap, sink_logits, **extra)


def _prefill_fake(q, pages, block_table, context_lens, query_start_loc, page, max_query_len, scale, window, soft_cap, sink_logits):
    return q.new_empty(*q.shape[:2], Page.parse(page).v_head_dim), q.new_empty(q.shape[:2], dtype=torch.float32)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:2]:
        raise ValueError(
            f"out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and {tuple(lse_b.shape)} do not belong together"
        )
    return (ref if out_a.device.type == "cpu" else merge_kernel).merge(out_a, lse_a, out_b, lse_b)


def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a, memory_format=torch.contiguous_format), lse_a.new_empty(lse_a.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("kv_decode", _decode, _key)
    _library.impl("kv_prefill", _prefill, _key)
    _library.impl("kv_merge", _merge, _key)
torch.library.register_fake("qplugins::kv_decode", lambda *_: None, lib=_library)
torch.library.register_fake("qplugins::kv_prefill", _prefill_fake, lib=_library)
torch.library.register_fake("qplugins::kv_merge", _merge_fake, lib=_library)


def decode_workspace(
    max_batch: int, num_heads: int, num_kv_heads: int, page: Page, max_query_len: int, device: torch.device | str
) -> Tensor:
    """uint8 [bytes], zeroed: what `decode` needs beside its arguments, for batches of up to max_batch sequences of any length.

    One serves all layers of a stream in turn, also of different layouts, if it is as large as the largest. Kernels leave its counters at zero.
    """
    nbytes = decode_kernel.workspace_bytes(max_batch, num_heads, num_kv_heads, page, max_query_len, torch.device(device))
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    workspace: Tensor,
    page: Page | str,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's last tokens over all of it. The tokens themselves are read from the pages, so write them first.

    q                [T, num_heads, head_dim]; sequence b's are rows query_start_loc[b] .. query_start_loc[b + 1] - 1, at most 8
    pages            see kv/op.py
    block_table      int32 [B, max pages]: only entries below ceil(seq_lens / page_size) and within the window are read
    seq_lens         int32 [B], query tokens included; 0 for padding
    workspace        from `decode_workspace`
    max_query_len    the most query tokens of a sequence, max_seq_len the longest: upper bounds
    scale            of the logits, usually head_dim ** -0.5
    out              [T, num_heads, v_head_dim], written and returned; made where it is None
    lse              float32 [T, num_heads], written where given: the natural logarithm of the softmax's denominator
    window           tokens that a query sees, itself included; 0: all
    soft_cap         c in c * tanh(logit / c); 0: none
    sink_logits      [num_heads]: a logit per head that takes part in the denominator only
    Rows of sequences with seq_lens 0 are zero, and rows after query_start_loc[B] are left as they are (zero on a CPU).
    """
    page = Page.parse(str(page))
    if out is None:
        out = q.new_empty(*q.shape[:2], page.v_head_dim)
    torch.ops.qplugins.kv_decode(
        q,
        pages,
        block_table,
        seq_lens,
        query_start_loc,
        workspace,
        out,
        lse,
        str(page),
        max_query_len,
        max_seq_len,
        scale,
        window,
        soft_cap,
        sink_logits,
    )
    return out


def prefill(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    page: Page | str,
    *,
    max_query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk's tokens over what was cached before the chunk: out [T, num_heads, v_head_dim] and lse float32 [T, num_heads].

    context_lens  int32 [B]: cached tokens before the chunk; the chunk's i-th token stands at position context_lens[b] + i
    Give `sink_logits` to one of the two attentions that `merge` joins, not to both. Where nothing is visible, out is 0 and lse -inf (the sink's logit).
    """
    return torch.ops.qplugins.kv_prefill(
        q, pages, block_table, context_lens, query_start_loc, str(page), max_query_len, scale, window, soft_cap, sink_logits
    )


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of tokens: out [T, num_heads, DV], lse float32 [T, num_heads] (any strides)."""
    return torch.ops.qplugins.kv_merge(out_a, lse_a, out_b, lse_b)
