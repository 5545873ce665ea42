"""vLLM's attention over KV pages of ours: backend, metadata and implementation, the same on CPUs and GPUs.

A step's batch has its decodes first (up to 8 query tokens each, with speculative decoding), then its prompts' chunks. New keys and values are
written into pages first; then

    decode    over pages alone, the new tokens among them
    prefill   over the chunk's own keys and values as the model made them, by the engine's FlashAttention; for what was cached before the
              chunk over pages; the two are joined by their log-sum-exps. A prompt that fits one chunk never sees a quantized value.

vLLM picks a backend class before it knows the layer. Once a model is loaded, each layer of ours is given a class of its own kind of page
(`bind`), so that layers of one model can differ; the classes in attention_cpu.py and attention_cuda.py are what it picks first.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from qplugins.kernels.attention import ref
from qplugins.kernels.attention.op import MAX_QUERY_LEN, decode, decode_workspace, merge, prefill
from qplugins.kernels.attention.warm import Calls, warm
from qplugins.kernels.kv.op import write
from qplugins.kernels.kv.page import Page
from qplugins.kv import KV_LAYOUTS, context
from qplugins.vllm import kv

logger = init_logger("vllm.qplugins")


@dataclass
class Prefill:
    """The prompts' chunks of a batch. Tensors are on the device, numbers and `slices` are known without asking it.

    query_start_loc [B + 1], from 0; block_table [B, pages]; context_lens [B]: tokens cached before the chunk; tokens: the chunks' sum
    """

    query_start_loc: Tensor
    block_table: Tensor
    context_lens: Tensor
    tokens: int
    max_query_len: int
    max_context_len: int
    slices: list[context.Slice]


@dataclass
class PagedMetadata:
    """A batch. Attributes up to `causal` are vLLM's; sequences [: num_decodes] are decodes, with num_decode_tokens tokens, each with at most
    max_decode_query_len."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    causal: bool
    num_decodes: int
    num_decode_tokens: int
    max_decode_query_len: int
    prefill: Prefill | None


class PagedBackend(AttentionBackend):
    """A backend for layers with one kind of page. `bind` makes the classes."""

    page: ClassVar[Page]
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_impl_cls() -> type["PagedImpl"]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type["PagedBuilder"]:
        return PagedBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int]:
        return [cls.page.page_size]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # a page is one block of one head in one run of bytes
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, state_content_bytes=cls.page.nbytes // cls.page.page_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in KV_LAYOUTS

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


@functools.cache
def bind(stock: type[AttentionBackend], page: Page) -> type[PagedBackend]:
    """The backend for such pages where vLLM chose `stock`, under whose name it goes: vLLM knows backends by an enumeration."""
    name = f"PagedBackend_{page}"
    return type(
        name, (PagedBackend,), {"page": page, "get_name": staticmethod(stock.get_name), "__qualname__": name, "__module__": __name__}
    )


class PagedBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Metadata without a word from the device: what a launch depends on comes from vLLM's numbers on the host."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        if max_decode_query_len(vllm_config) <= MAX_QUERY_LEN:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.page = next(layer.impl.page for layer in layers)
        self.heads = kv_cache_spec.num_kv_heads
        self.gathers = any(not layer.impl.window for layer in layers)  # else nobody asks for slices
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=max_decode_query_len(vllm_config) <= MAX_QUERY_LEN)
        reserve(vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> PagedMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError(
                "KV pages are read by causal attention only, and this batch asks for another; leave --kv-cache-dtype out"
            )
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(m, decode_threshold=self.reorder_batch_threshold)
        return PagedMetadata(
            m.num_actual_tokens,
            m.max_query_len,
            m.max_seq_len,
            m.query_start_loc,
            m.seq_lens,
            m.block_table_tensor,
            m.slot_mapping,
            True,
            decodes,
            decode_tokens,
            min(m.max_query_len, self.reorder_batch_threshold),
            self._prefill(m, decodes, decode_tokens) if prefills else None,
        )

    def _prefill(self, m: CommonAttentionMetadata, decodes: int, decode_tokens: int) -> Prefill:
        starts = m.query_start_loc_cpu[decodes : m.num_reqs + 1]
        query_lens = starts[1:] - starts[:-1]
        # exact for prompts, an upper bound for others: those have a context anyway, and its length on the device counts
        seq_lens = m.seq_lens_cpu_upper_bound if m.seq_lens_cpu_upper_bound is not None else m.seq_lens.cpu()
        contexts = (seq_lens[decodes : m.num_reqs] - query_lens).clamp_(min=0)
        query_start_loc = m.query_start_loc[decodes:] - decode_tokens
        longest = int(contexts.max())
        context_lens = m.seq_lens[decodes:] - (query_start_loc[1:] - query_start_loc[:-1])
        return Prefill(
            query_start_loc,
            m.block_table_tensor[decodes:],
            context_lens,
            int(starts[-1]) - decode_tokens,
            int(query_lens.max()),
            longest,
            context.slices(context_lens, contexts, self.page.page_size) if self.gathers and longest else [],
        )


class PagedImpl(AttentionImpl[PagedMetadata]):
    """Attention of one layer. sliding_window: tokens that a query sees, itself included."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        self.vllm_config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.window, self.soft_cap, self.sinks = sliding_window or 0, logits_soft_cap or 0.0, sinks
        self.page: Page | None = None
        self.raw = chunk_attention(self)
        if why := self.refuses(alibi_slopes, attn_type, kv_sharing_target_layer_name, {k: v for k, v in unknown.items() if v is not None}):
            raise ValueError(f"--kv-cache-dtype {kv_cache_dtype}: {why}; leave --kv-cache-dtype out")
        kv.layout(self.vllm_config, kv_cache_dtype).page(head_size, kv.page_size(self.vllm_config))

    def refuses(self, alibi_slopes: Any, attn_type: str, shared: str | None, unknown: dict[str, Any]) -> str | None:
        """What `kv.refuses` cannot see before the layers are built."""
        if alibi_slopes is not None:
            return "attention with linear biases (ALiBi) is not served"
        if attn_type != AttentionType.DECODER:
            return f"this model has {attn_type} attention, and only a decoder's is served"
        if shared is not None:
            return f"a layer that shares the KV cache of {shared} is not served"
        if unknown:
            return f"this model's attention has {', '.join(unknown)}, which is not served"
        return None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The first time that the layer can be found: gives it its page, and the backend that goes with it."""
        if self.page is not None:
            return
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        layer = next(x for x in layers if getattr(x, "impl", None) is self)
        self.kv_cache_dtype, self.page = kv.page_of(self.vllm_config, layer)
        layer.kv_cache_dtype = self.kv_cache_dtype
        layer.attn_backend = bind(layer.attn_backend, self.page)

    def pages(self, kv_cache: Tensor) -> Tensor:
        """[blocks, heads, tokens, bytes] -> [blocks, heads, bytes of a page]"""
        if self.page is None:
            raise RuntimeError("the attention layers were not finished after loading: this load format skips process_weights_after_loading")
        return kv_cache.view(*kv_cache.shape[:2], -1)

    def do_kv_cache_update(self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        m: PagedMetadata | None = get_attention_context(layer.layer_name)[0]
        if m is None:
            return
        if has_kv_transfer_group() and get_kv_transfer_group().has_connector_metadata():
            # the page before an opened one is read for its mean, so it must have arrived
            get_kv_transfer_group().wait_for_layer_load(layer.layer_name)
        write(self.pages(kv_cache), key, value, slot_mapping, m.query_start_loc, m.seq_lens, m.block_table, self.page, m.max_query_len)

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, heads, D], key and value [tokens, kv heads, D], output [tokens, heads, D]: written. Tokens may be padded at the end."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention over KV pages does not quantize its output")
        m = attn_metadata
        if m is None:  # memory is being measured: take what serving will take
            reserve(self.vllm_config, query.device)
            self.measure(query)
            return output.zero_()
        pages, d = self.pages(kv_cache), m.num_decode_tokens
        if m.num_decodes:
            decode(
                query[:d],
                pages,
                m.block_table[: m.num_decodes],
                m.seq_lens[: m.num_decodes],
                m.query_start_loc[: m.num_decodes + 1],
                workspace(query.device),
                self.page,
                max_query_len=m.max_decode_query_len,
                max_seq_len=m.max_seq_len,
                scale=self.scale,
                out=output[:d],
                window=self.window,
                soft_cap=self.soft_cap,
                sink_logits=self.sinks,
            )
        if p := m.prefill:
            rows = slice(d, d + p.tokens)
            q, k, v = query[rows], key[rows], value[rows]
            out, lse = self.raw(self, q, k, v, p.query_start_loc, p.query_start_loc, p.max_query_len, p.max_query_len, True)
            if p.max_context_len:
                for part in self.cached(q, pages, p):
                    out, lse = merge(out, lse, *part)
            if self.sinks is not None:
                out = context.with_sink_logits(out, lse, self.sinks)
            output[rows] = out
        return output

    def cached(self, q: Tensor, pages: Tensor, p: Prefill):
        """Attention of the chunks to what was cached before them, in one or several parts: out [tokens, heads, D], lse [tokens, heads]."""
        if self.window:  # few pages are read
            yield prefill(
                q,
                pages,
                p.block_table,
                p.context_lens,
                p.query_start_loc,
                self.page,
                max_query_len=p.max_query_len,
                scale=self.scale,
                window=self.window,
                soft_cap=self.soft_cap,
            )
            return

        def flash(k: Tensor, v: Tensor, part: context.Slice) -> tuple[Tensor, Tensor]:
            return self.raw(self, q, k, v, p.query_start_loc, part.cu_lens, p.max_query_len, part.longest, False)

        yield from context.attend(flash, pages, p.block_table, p.slices, self.page, q.dtype)

    def measure(self, query: Tensor) -> None:
        """Takes and leaves the memory of a chunk with a long context, so that vLLM's measurement of its peak has it."""
        if query.device.type == "cpu":
            return
        sizes = [3 * query.numel() * query.element_size()]
        if not self.window:
            sizes.append(2 * context.TOKENS * self.num_kv_heads * self.head_size * query.element_size())
        held = [torch.empty(n, dtype=torch.uint8, device=query.device) for n in sizes]
        del held


# ---- the chunk's own keys and values


def chunk_attention(impl: PagedImpl):
    """The attention over plain keys and values of this machine, as torch_chunk describes it."""
    if impl.vllm_config.device_config.device_type == "cpu":
        return torch_chunk
    from qplugins.vllm.attention_cuda import flash_chunk

    return flash_chunk(impl)


def torch_chunk(
    impl: PagedImpl, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, D] over k and v: see ref.varlen. max_q, max_k: the longest sequence's."""
    return ref.varlen(q, k, v, cu_q, cu_k, causal, impl.scale, impl.window, impl.soft_cap)


# ---- the decode kernel's workspace: one a device, for all layers in turn

_workspaces: dict[torch.device, Tensor] = {}
_reserved: set[tuple] = set()


def workspace(device: torch.device) -> Tensor:
    return _workspaces[_numbered(device)]


def _numbered(device: torch.device) -> torch.device:
    return torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def reserve(config: VllmConfig, device: torch.device) -> None:
    """Makes the workspace, once for the largest layer and batch, and compiles what batches of any make-up launch. Called where vLLM measures
    memory, and again before it captures graphs."""
    device = _numbered(device)
    batch = max(config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
    queries = min(max_decode_query_len(config), MAX_QUERY_LEN)
    impls = [x.impl for x in config.compilation_config.static_forward_context.values() if isinstance(getattr(x, "impl", None), PagedImpl)]
    for shape in dict.fromkeys((i.num_heads, i.num_kv_heads, i.page) for i in impls if i.page):
        if (device, batch, queries, shape) in _reserved:
            continue
        _reserved.add((device, batch, queries, shape))
        found = torch.empty(0, dtype=torch.uint8) if device.type == "cpu" else decode_workspace(batch, *shape, queries, device)
        if device not in _workspaces or _workspaces[device].numel() < found.numel():
            _workspaces[device] = found
    for i in impls:
        if i.page:
            traits = i.window, i.soft_cap > 0, i.sinks is not None
            warm(Calls(i.page, i.num_heads, i.num_kv_heads, config.model_config.dtype, batch, queries, *traits), _workspaces[device])
