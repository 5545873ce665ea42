"""`--kv-cache-dtype int4_sink` and its kin: the names, what follows from them, and the pool that holds the pages.

SGLang asks for one row of bytes a token in K and one in V. A page of ours is one run of bytes that holds 128 tokens of both, so the pool
keeps one tensor a layer, [num_pages, num_kv_heads, page bytes], whose slots are counted as SGLang counts: slot // 128 is the page. The
page size is therefore 128 throughout, and prefixes are shared, evicted and counted by whole pages. The dtype that SGLang sees is uint8,
which is what the bytes are, and which keeps its fused "rotate and store" kernels away from them.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from qplugins.kernels.kv.page import Page
from qplugins.kv import KV_LAYOUTS, Layout
from qplugins.kv_map import KVMap
from qplugins.sglang import compat

logger = logging.getLogger(__name__)

BACKEND = "qplugins"
PAGE_SIZE = 128


class Unsupported(ValueError):
    """Something that was asked for together with one of our KV cache dtypes cannot be. The message says what, and the way out."""


# ---- what was asked for


def _refuses(args, layout: Layout) -> str | None:
    """Why a server cannot be started with these arguments, in a sentence; None where it can."""
    name = layout.name
    wanted = {a: getattr(args, a, None) for a in ("attention_backend", "prefill_attention_backend", "decode_attention_backend")}
    for option, backend in wanted.items():
        if backend not in (None, BACKEND):
            return f"--kv-cache-dtype {name} brings its own attention; leave out --{option.replace('_', '-')} {backend}"
    if args.page_size not in (None, PAGE_SIZE):
        return f"--kv-cache-dtype {name} has pages of {PAGE_SIZE} tokens; leave out --page-size {args.page_size}"
    if chunk := getattr(args, "chunked_prefill_size", None):
        if chunk > 0 and chunk % PAGE_SIZE:
            return f"--chunked-prefill-size {chunk} is not a multiple of {PAGE_SIZE}, the page size of --kv-cache-dtype {name}"
    for option, bad in (
        ("speculative_algorithm", lambda x: x is not None),
        ("disaggregation_mode", lambda x: x not in (None, "null")),
        ("enable_hierarchical_cache", bool),
        ("enable_hisparse", bool),
        ("enable_lmcache", bool),
        ("enable_unified_memory", bool),
        ("enable_page_major_kv_layout", bool),
        ("enable_kv_cache_sharding", bool),
        ("enable_pdmux", bool),
        ("enable_two_batch_overlap", bool),
        ("prefill_only_disable_kv_cache", bool),
        ("dcp_size", lambda x: x is not None and x > 1),
    ):
        if bad(getattr(args, option, None)):
            return f"--kv-cache-dtype {name} does not work with --{option.replace('_', '-')} yet; leave out one of the two"
    if torch.version.hip:
        return (
            f"--kv-cache-dtype {name} is not there for ROCm in SGLang, whose models store keys by fused kernels of their own; use fp8_e4m3"
        )
    return None


def _resolve(args, *rest, **kwargs) -> None:
    """Before SGLang resolves its arguments: the dtype that a checkpoint asks for, and what follows from a dtype of ours."""
    if getattr(args, "_resolution_finished", False):
        return
    if args.kv_cache_dtype == "auto" and args.quantization == "qplugins":
        args.kv_cache_dtype = _of_checkpoint(Path(args.model_path)).default or "auto"
    if args.kv_cache_dtype not in KV_LAYOUTS:
        return
    if why := _refuses(args, KV_LAYOUTS[args.kv_cache_dtype]):
        raise Unsupported(why)
    args.page_size = PAGE_SIZE
    args.attention_backend = BACKEND
    # one pool for layers with and without a window: pages of both would have to be told apart
    args.disable_hybrid_swa_memory = True
    # prefill runs eagerly: its shapes differ from batch to batch, and what it reads with them
    args.cuda_graph_backend_prefill = "disabled"


def _of_checkpoint(folder: Path) -> KVMap:
    """What a checkpoint's config.json says of its KV cache; one that is still on a hub is not asked."""
    file = folder / "config.json"
    config = json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
    return KVMap.from_config(config or {})


# ---- the pool


class PagePool(MHATokenToKVPool):
    """KV of all layers, in pages. `layouts`, one a layer, are set by the subclass that `_build` makes."""

    layouts: list[Layout]

    def _create_buffers(self) -> None:
        if self.post_capture_active:
            raise Unsupported(
                f"--kv-cache-dtype {self.layouts[0].name} does not work with KV memory that is sized after CUDA graph capture"
            )
        self.layer_pages = [layout.page(self.head_dim, self.page_size, self.v_head_dim) for layout in self.layouts]
        num_pages = -(-(self.size + self.page_size) // self.page_size)  # page 0 takes what padding writes
        with self.memory_saver_adapter.region("kv_cache"):
            shapes = [(num_pages, self.head_num, page.nbytes) for page in self.layer_pages]
            self.pages = [torch.zeros(shape, dtype=torch.uint8, device=self.device) for shape in shapes]
        rows = num_pages * self.page_size
        # for those who count and list buffers: all bytes are with K, V has none
        self.k_buffer = [p.view(rows, -1) for p in self.pages]
        self.v_buffer = [p.new_empty(rows, 0) for p in self.pages]
        for name in ("k_scale_buffer", "v_scale_buffer", "native_k_scale_buffer", "native_v_scale_buffer", "dq_k_buffer", "dq_v_buffer"):
            setattr(self, name, None)
        self._kv_buffer_descs = None
        self._init_data_ptrs_and_strides()

    def of_layer(self, layer_id: int) -> tuple[torch.Tensor, Page]:
        """uint8 [num_pages, num_kv_heads, page bytes], and what they mean."""
        i = layer_id - self.start_layer
        return self.pages[i], self.layer_pages[i]

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Address, bytes and bytes a page, of every layer."""
        return (
            [p.data_ptr() for p in self.pages],
            [p.nbytes for p in self.pages],
            [p[0].nbytes for p in self.pages],
        )

    def _only_pages(self, *args, **kwargs):
        raise Unsupported(
            f"--kv-cache-dtype {self.layouts[0].name} keeps tokens in pages, which only the attention backend {BACKEND!r} reads and writes"
        )

    set_kv_buffer = get_cpu_copy = load_cpu_copy = move_kv_cache = _only_pages
    _get_key_buffer = _get_value_buffer = get_key_buffer = get_value_buffer = get_kv_buffer = _only_pages


def _layouts(configurator) -> list[Layout] | None:
    """The layout of each of the model's layers; None where the dtype is not one of ours. Raises Unsupported for a model that has no pages.

    The command line's name is for all layers that the checkpoint does not name.
    """
    name = compat.kv_cache_dtype(configurator)
    if name not in KV_LAYOUTS:
        return None
    config = configurator.model_config
    if configurator.use_mla_backend:
        raise Unsupported(
            f"--kv-cache-dtype {name} stores keys and values of heads, and this model keeps one latent vector (MLA); use fp8_e4m3"
        )
    if config.is_encoder_decoder:
        raise Unsupported(f"--kv-cache-dtype {name} is for decoders, and this model has cross-attention; leave --kv-cache-dtype out")
    stored = getattr(config.hf_config, "quantization_config", None) or {}
    chosen = KVMap.from_config(stored if isinstance(stored, dict) else stored.to_dict())
    chosen = replace(chosen, default=name) if chosen.default in (None, name) else KVMap(name)
    layouts = [KV_LAYOUTS[n] for n in chosen.resolve(config.num_hidden_layers)]
    for layout in layouts:
        if why := layout.refuses(config.head_dim, PAGE_SIZE, config.v_head_dim):
            raise Unsupported(why)
    return layouts


def _dtype(original, **kwargs):
    if kwargs["server_args_kv_cache_dtype"] in KV_LAYOUTS:
        return None, torch.uint8
    return original(**kwargs)


def _build(original, self, *, mha_pool_class, **kwargs):
    if (layouts := _layouts(self)) is not None:
        own = layouts[self.layer_info.start_layer : self.layer_info.end_layer]
        mha_pool_class = type("PagePool", (PagePool,), {"layouts": own})
    return original(self, mha_pool_class=mha_pool_class, **kwargs)


def _build_elsewhere(original, self, **kwargs):
    """Where SGLang would build a pool that is none of ours."""
    if _layouts(self) is not None:
        raise Unsupported(
            f"--kv-cache-dtype {compat.kv_cache_dtype(self)} is for models whose layers all have ordinary attention; leave it out for this one"
        )
    return original(self, **kwargs)


def _cell_size(original, self, configurator, num_layers: int) -> int:
    """Bytes that a token takes, from which SGLang tells how many fit."""
    if (layouts := _layouts(configurator)) is None:
        return original(self, configurator, num_layers)
    config, start = configurator.model_config, configurator.layer_info.start_layer
    own = layouts[start : start + num_layers]
    return compat.num_kv_heads(config) * sum(x.token_bytes(config.head_dim, PAGE_SIZE, config.v_head_dim) for x in own)


def _backend(runner):
    from qplugins.sglang.attention import PageAttention

    return PageAttention(runner)


def register() -> None:
    """Raises AttributeError where this SGLang lacks something that is needed."""
    configurator = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
    compat.offer_kv_cache_dtypes(list(KV_LAYOUTS))
    compat.hook(compat.resolution(), _resolve, "BEFORE")
    compat.hook("sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype", _dtype, "AROUND")
    compat.hook(f"{configurator}._build_mha_kv_pool", _build, "AROUND")
    for kind in ("hybrid_swa", "hybrid_linear"):
        compat.hook(f"{configurator}._build_{kind}_kv_pool", _build_elsewhere, "AROUND")
    compat.hook("sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size", _cell_size, "AROUND")
    register_attention_backend(BACKEND)(_backend)
