"""The attention backend that reads and writes pages.

decode    the new token is written into its page, then attended to with all others: `decode`.
extend    the chunk's tokens are written, and attend to each other by their own keys and values, as they came, through SGLang's
          FlashAttention. What was cached before the chunk, a shared prefix or an earlier chunk, is gathered from pages for it too, or
          attended to in pages where it has a window: `prefill`. Both are merged by their log-sum-exp.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from torch import Tensor

from qplugins.kernels.attention.op import decode, decode_workspace, merge, prefill
from qplugins.kernels.attention.ref import varlen
from qplugins.kernels.attention.warm import Calls, warm
from qplugins.kernels.kv.op import write
from qplugins.kernels.kv.page import Page
from qplugins.kv import context
from qplugins.sglang import compat
from qplugins.sglang.kv import PagePool, Unsupported

logger = logging.getLogger(__name__)


@dataclass
class Metadata:
    """Of one forward pass. block_table int32 [B, n]: numbers of each sequence's pages; query_start_loc, seq_lens, context_lens: int32.

    seq_lens      tokens of each sequence, those of this pass included
    context_lens  those before it; None in decode, and where there are none
    slices        of those, to be gathered
    num_tokens    of this pass, without padding
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    context_lens: Tensor | None = None
    slices: Sequence[context.Slice] = ()


class PageAttention(AttentionBackend):
    """Chosen by the KV cache dtype. One for all layers of a rank."""

    def __init__(self, runner) -> None:
        super().__init__()
        self.pool = runner.token_to_kv_pool
        if not isinstance(self.pool, PagePool):
            raise Unsupported("--attention-backend qplugins reads KV pages; choose it through --kv-cache-dtype, which brings both")
        self.page_size = self.pool.page_size
        self.device = torch.device(runner.device)
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.max_context_len = runner.model_config.context_len
        self.num_heads = compat.num_heads(runner.model_config)
        self.workspace = self._workspace(self.req_to_token.shape[0])
        for page in dict.fromkeys(self.pool.layer_pages):
            sizes = self.num_heads, self.pool.head_num, runner.model_config.dtype, self.req_to_token.shape[0]
            warm(Calls(page, *sizes, lse=True), self.workspace)
        self.metadata: Metadata | None = None
        self.graph: Metadata | None = None
        if self.device.type == "cpu":
            self.chunk = _chunk_reference
        else:
            flash = compat.flash_attention()
            self.chunk = _chunk_torch if flash is None else _chunk_flash(flash)
            logger.info("attention of a prefill chunk to itself: %s", "PyTorch's FlashAttention" if flash is None else "FlashAttention 3")

    def _workspace(self, batch: int) -> Tensor:
        """For the layer that needs most; layers run one after another."""
        pages = set(self.pool.layer_pages)
        return max(
            (decode_workspace(batch, self.num_heads, self.pool.head_num, page, 1, self.device) for page in pages), key=torch.Tensor.numel
        )

    def _block_table(self, requests: Tensor, max_seq_len: int) -> Tensor:
        # a page's tokens lie in slots side by side, so its first slot names it
        first = self.req_to_token[requests, : max_seq_len : self.page_size]
        return (first // self.page_size).to(torch.int32)

    # ---- what a pass looks like

    def init_forward_metadata(self, forward_batch) -> None:
        mode, bs = forward_batch.forward_mode, forward_batch.batch_size
        if mode.is_idle():
            self.metadata = None
            return
        if mode.is_target_verify() or mode.is_draft_extend_v2() or not (mode.is_decode() or mode.is_extend()):
            raise Unsupported(f"attention over KV pages has no mode {mode.name}")
        seq_lens = forward_batch.seq_lens.to(torch.int32)
        max_seq_len = int(forward_batch.seq_lens_cpu.max())
        table = self._block_table(forward_batch.req_pool_indices, max_seq_len)
        if mode.is_decode():
            start = torch.arange(bs + 1, dtype=torch.int32, device=self.device)
            self.metadata = Metadata(table, start, seq_lens, 1, max_seq_len, bs)
            return
        lens = forward_batch.extend_seq_lens_cpu
        start = torch.nn.functional.pad(forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self.metadata = Metadata(table, start, seq_lens, max(lens), max_seq_len, sum(lens))
        if any(forward_batch.extend_prefix_lens_cpu):
            self.metadata.context_lens = forward_batch.extend_prefix_lens.to(torch.int32)
            cached = torch.tensor(forward_batch.extend_prefix_lens_cpu, dtype=torch.int32)
            self.metadata.slices = context.slices(self.metadata.context_lens, cached, self.page_size)

    # ---- CUDA graphs, of decode: a graph reads these tensors, and each replay fills them before

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pages = -(-self.max_context_len // self.page_size)
        self.graph = Metadata(
            torch.zeros(max_bs, pages, dtype=torch.int32, device=self.device),
            torch.arange(max_bs + 1, dtype=torch.int32, device=self.device),
            torch.ones(max_bs, dtype=torch.int32, device=self.device),
            1,
            self.max_context_len,
            max_bs,
        )
        if max_bs > self.req_to_token.shape[0]:
            self.workspace = self._workspace(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        if not forward_batch.forward_mode.is_decode():
            raise Unsupported(f"attention over KV pages captures decode only, not {forward_batch.forward_mode.name}")
        bs, graph = forward_batch.batch_size, self.graph
        table = self._block_table(forward_batch.req_pool_indices[:bs], self.max_context_len)
        graph.block_table[:bs, : table.shape[1]].copy_(table)
        graph.seq_lens[:bs].copy_(forward_batch.seq_lens[:bs])
        self.metadata = Metadata(graph.block_table[:bs], graph.query_start_loc[: bs + 1], graph.seq_lens[:bs], 1, self.max_context_len, bs)

    # ---- a layer

    def _store(self, k: Tensor, v: Tensor, layer, slots: Tensor, save: bool) -> tuple[Tensor, Page]:
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            raise Unsupported(
                f"layer {layer.layer_id}: KV pages are for causal self-attention; leave this model's KV cache in its own dtype"
            )
        if k is None or not save:
            raise Unsupported(
                f"layer {layer.layer_id} reads another layer's KV cache, which pages do not allow; leave the KV cache in the model's dtype"
            )
        (pages, page), m = self.pool.of_layer(layer.layer_id), self.metadata
        n = m.num_tokens
        write(pages, k[:n], v[:n], slots[:n], m.query_start_loc, m.seq_lens, m.block_table, page, m.max_query_len)
        return pages, page

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None, **kwargs) -> Tensor:
        q, k, v = _heads(q, k, v, layer)
        m, (pages, page) = self.metadata, self._store(k, v, layer, forward_batch.out_cache_loc, save_kv_cache)
        out = q.new_empty(q.shape[0], q.shape[1], layer.v_head_dim)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        shape = dict(max_query_len=1, max_seq_len=m.max_seq_len, scale=layer.scaling, out=out, lse=lse, sink_logits=sinks, **_scores(layer))
        decode(q, pages, m.block_table, m.seq_lens, m.query_start_loc, self.workspace, page, **shape)
        return out.flatten(1)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None, **kwargs) -> Tensor:
        q, k, v = _heads(q, k, v, layer)
        m, (pages, page) = self.metadata, self._store(k, v, layer, forward_batch.out_cache_loc, save_kv_cache)
        n, start, longest = m.num_tokens, m.query_start_loc, m.max_query_len
        out, lse = self.chunk(q[:n], k[:n], v[:n], start, start, longest, longest, True, layer.scaling, **_scores(layer))
        if m.context_lens is not None:
            for part in self._cached(q[:n], pages, page, layer):
                out, lse = merge(out, lse, *part)
        if sinks is not None:
            out = context.with_sink_logits(out, lse, sinks)
        if n < q.shape[0]:
            out = torch.cat([out, out.new_zeros(q.shape[0] - n, *out.shape[1:])])
        return out.flatten(1)

    def _cached(self, q: Tensor, pages: Tensor, page: Page, layer) -> Iterable[tuple[Tensor, Tensor]]:
        """Attention of the chunks to what was cached before them, in one or several parts: out [tokens, heads, D], lse [tokens, heads]."""
        m, scores = self.metadata, _scores(layer)
        if scores["window"]:  # few pages are read
            shape = dict(max_query_len=m.max_query_len, scale=layer.scaling, **scores)
            return [prefill(q, pages, m.block_table, m.context_lens, m.query_start_loc, page, **shape)]

        def flash(k: Tensor, v: Tensor, part: context.Slice) -> tuple[Tensor, Tensor]:
            return self.chunk(q, k, v, m.query_start_loc, part.cu_lens, m.max_query_len, part.longest, False, layer.scaling, **scores)

        return context.attend(flash, pages, m.block_table, m.slices, page, q.dtype)


def _heads(q: Tensor, k: Tensor | None, v: Tensor | None, layer) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[T, heads * D] -> [T, heads, D]"""
    q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
    if k is None:
        return q, None, None
    return q, k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim), v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)


def _scores(layer) -> dict:
    """SGLang counts a window without the token itself, -1 or None for all."""
    window = layer.sliding_window_size
    return dict(window=window + 1 if window is not None and window >= 0 else 0, soft_cap=layer.logit_cap or 0.0)


# ---- attention over plain keys and values: ref.varlen is what each of them computes. max_q, max_k: the longest sequence's


def _chunk_flash(flash) -> Callable[..., tuple[Tensor, Tensor]]:
    def chunk(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, soft_cap) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash(
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scale,
            causal=causal,
            window_size=(window - 1, 0) if window else (-1, -1),
            softcap=soft_cap,
            return_softmax_lse=True,
        )
        return out, _of_no_keys(lse, causal)

    return chunk


def _chunk_torch(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, soft_cap) -> tuple[Tensor, Tensor]:
    """The FlashAttention that every CUDA build of PyTorch has."""
    if soft_cap:
        raise Unsupported("this model caps its attention scores, which needs SGLang's FlashAttention 3, and it is not there; use fp8_e4m3")
    sides = dict(window_size_left=window - 1, window_size_right=0) if window else {}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale, **sides)
    return out, _of_no_keys(lse, causal)


def _of_no_keys(lse: Tensor, causal: bool) -> Tensor:
    """lse [heads, tokens] -> [tokens, heads], -inf for a sequence without keys, which FlashAttention calls infinity."""
    return (lse if causal else lse.masked_fill(lse == torch.inf, -torch.inf)).T


def _chunk_reference(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window, soft_cap) -> tuple[Tensor, Tensor]:
    return varlen(q, k, v, cu_q, cu_k, causal, scale, window, soft_cap)
