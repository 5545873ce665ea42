"""`--kv-cache-dtype int4_sink` and its siblings in vLLM: the names, what they cannot do, and which layer has which layout.

    vllm serve MODEL --kv-cache-dtype int4_sink
    vllm serve MODEL --kv-cache-dtype int4_sink --additional-config '{"qplugins": {"kv_layers": {"int8_sink": [0, 1, -2, -1]}}}'

Three steps of an engine's life. `register`, as the plugin is loaded, makes the names known and puts the backends of attention.py in the
engine's table. `settle`, once the command line has become a configuration and before anything is loaded, takes the layout from the checkpoint
where the command line does not name one, and refuses what cannot be served. `page_of`, in the workers, says how a layer's pages are laid out.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from qplugins.kernels.kv.page import Page
from qplugins.kv import KV_LAYOUTS, get_layout
from qplugins.kv_map import KVMap

logger = init_logger("vllm.qplugins")

PAGE_SIZE = 128  # tokens, unless --block-size says 64
OPTIONS = ("kv_layers", "kv_sinks")


def register() -> None:
    """Makes the layouts known to vLLM. Once a process; register.py sees to that."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from qplugins.vllm import compat

    for name in KV_LAYOUTS:
        compat.register_kv_cache_dtype(name, torch.uint8)
    # A CPU has one backend. Of CUDA's, TURBOQUANT is asked last, so that ours there is chosen by the dtype and by nothing else.
    register_backend(AttentionBackendEnum.CPU_ATTN, "qplugins.vllm.attention_cpu.CPUBackend")
    register_backend(AttentionBackendEnum.TURBOQUANT, "qplugins.vllm.attention_cuda.CUDABackend")

    stock = EngineArgs.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(*args: Any, **kwargs: Any) -> VllmConfig:
        config = stock(*args, **kwargs)
        settle(config)
        return config

    # vLLM has no hook between the command line and the loading of a model
    EngineArgs.create_engine_config = create_engine_config


def options(config: VllmConfig) -> dict[str, Any]:
    """What --additional-config says to us about KV. Raises ValueError for what it should not say."""
    additional = config.additional_config
    own = additional.get("qplugins", {}) if isinstance(additional, dict) else {}
    if not isinstance(own, dict) or any(key not in OPTIONS for key in own):
        raise ValueError(f'--additional-config: "qplugins" should be an object with {" or ".join(OPTIONS)}, is {own!r}')
    return own


def kv_map(config: VllmConfig) -> KVMap:
    """The map of a run. The command line's layers go before the checkpoint's; a layout on the command line that the checkpoint does not name
    is for all layers."""
    own, dtype = options(config), config.cache_config.cache_dtype
    checkpoint: KVMap = getattr(config.quant_config, "kv_map", KVMap())
    default = dtype if dtype in KV_LAYOUTS else checkpoint.default if dtype == "auto" else None
    if "kv_layers" in own:
        return KVMap.parse(own["kv_layers"], default)
    if dtype != "auto" and default is None:
        return KVMap()
    return replace(checkpoint, default=default) if checkpoint.default in (None, default) else KVMap(default)


def settle(config: VllmConfig) -> None:
    """Raises ValueError, in a sentence with the way out, for a configuration that our KV layouts cannot serve."""
    chosen = kv_map(config)
    if chosen.default is None:
        if chosen.layers:
            raise ValueError("a KV map needs a layout for the layers that it does not name: add --kv-cache-dtype int4_sink")
        if options(config):
            raise ValueError("--additional-config: qplugins' kv_sinks needs --kv-cache-dtype int4_sink, or another layout of qplugins")
        return
    config.cache_config.cache_dtype = chosen.default
    if why := refuses(config):
        raise ValueError(f"--kv-cache-dtype {chosen.default}: {why}")
    names = chosen.resolve(config.model_config.hf_text_config.num_hidden_layers)
    for name in dict.fromkeys(names):
        if why := layout(config, name).refuses(config.model_config.get_head_size(), page_size(config)):
            raise ValueError(f"--kv-cache-dtype {name}: {why}")
    if len(set(names)) > 1:
        logger.info("KV layouts by layer: %s", ", ".join(f"{i} {name}" for i, name in enumerate(names)))


def refuses(config: VllmConfig) -> str | None:
    """Why a model or a run cannot have KV pages of ours; None where it can. Head and page sizes are the layout's to judge."""
    model, parallel = config.model_config, config.parallel_config
    if model.use_mla:
        return (
            "models with multi-head latent attention (MLA) cache one latent a token, not keys and values; use --kv-cache-dtype fp8 or auto"
        )
    if model.attn_type in ("encoder_only", "encoder_decoder", "attention_free"):
        return f"this model's attention is {model.attn_type}, and only a decoder's is served; leave --kv-cache-dtype out"
    if model.is_hybrid:
        return "models that mix attention with state-space layers are not served; leave --kv-cache-dtype out"
    text = model.hf_text_config
    if getattr(text, "attention_chunk_size", None):
        return "attention in local chunks (Llama 4) is not served; leave --kv-cache-dtype out"
    if getattr(text, "num_kv_shared_layers", None):
        return "layers that share another layer's KV cache are not served; leave --kv-cache-dtype out"
    if getattr(model, "is_mm_prefix_lm", False):
        return "attention in both directions over images is not served; leave --kv-cache-dtype out"
    if config.cache_config.kv_cache_dtype_skip_layers:
        return (
            "--kv-cache-dtype-skip-layers would mix 16-bit pages with ours; give the layers that must not change int8_sink instead, "
            'with --additional-config \'{"qplugins": {"kv_layers": {"int8_sink": [0, -1]}}}\''
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "a page belongs to one rank, so context parallelism is not served; use tensor parallelism"
    if model.dtype == torch.float32 and config.device_config.device_type != "cpu":
        return "kernels compute in 16 bits and this run is in float32; use --dtype bfloat16 or float16"
    return None


def page_size(config: VllmConfig) -> int:
    """Tokens of a page: the engine's block size where the user chose it. Others are vLLM's default for some backend."""
    cache = config.cache_config
    return cache.block_size if cache.user_specified_block_size else PAGE_SIZE


def layout(config: VllmConfig, name: str):
    """A layout with the run's number of sink tokens."""
    sinks = options(config).get("kv_sinks")
    found = get_layout(name)
    if sinks is None:
        return found
    if type(sinks) is not int:
        raise ValueError(f"--additional-config: qplugins' kv_sinks should be a whole number, is {sinks!r}")
    return replace(found, sinks=sinks)


def page_of(config: VllmConfig, layer: torch.nn.Module) -> tuple[str, Page]:
    """The layout of an attention layer, and its page. A map speaks of the model that is served; its draft has the run's layout throughout."""
    from vllm.model_executor.models.utils import extract_layer_index

    name, speculative = layer.kv_cache_dtype, config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft is speculative.target_model_config or config.model_config is not draft:
        names = kv_map(config).resolve(config.model_config.hf_text_config.num_hidden_layers)
        number = extract_layer_index(layer.layer_name)
        name = names[number] if number < len(names) else name
    return name, layout(config, name).page(layer.head_size, page_size(config), layer.head_size_v)
