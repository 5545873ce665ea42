"""What vLLM picks on CPUs, where it always picks CPU_ATTN: the stock backend, except for layers with KV pages of ours."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from qplugins.kv import KV_LAYOUTS
from qplugins.vllm import compat
from qplugins.vllm.attention import PagedImpl


class CPUImpl(CPUAttentionBackendImpl):
    """Is never one: building it gives the stock implementation or ours, by the layer's dtype."""

    def __new__(cls, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, *args: Any, **kwargs: Any):
        made = PagedImpl if kv_cache_dtype in KV_LAYOUTS else CPUAttentionBackendImpl
        return made(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, *args, **kwargs)


class CPUBuilder(CPUAttentionMetadataBuilder):
    """The stock builder, of the layers that are not ours in a run that is."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        if vllm_config.cache_config.cache_dtype in KV_LAYOUTS:
            with compat.plain_cache_dtype(vllm_config):
                super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        else:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)


class CPUBackend(CPUAttentionBackend):
    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in KV_LAYOUTS or super().supports_kv_cache_dtype(kv_cache_dtype)

    @staticmethod
    def get_impl_cls() -> type[CPUImpl]:
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        return CPUBuilder
