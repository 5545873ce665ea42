"""What vLLM picks on CUDA for KV dtypes of ours: the last backend in its list, TURBOQUANT, which for its own dtypes stays what it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version, is_flash_attn_varlen_func_available
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend, TurboQuantAttentionImpl

from qplugins.kernels.kv.page import HEAD_DIMS
from qplugins.kv import KV_LAYOUTS
from qplugins.vllm.attention import PagedBackend, PagedImpl


class CUDAImpl(TurboQuantAttentionImpl):
    """Is never one: building it gives the stock implementation or ours, by the layer's dtype."""

    def __new__(
        cls, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto", *args, **kwargs
    ):
        made = PagedImpl if kv_cache_dtype in KV_LAYOUTS else TurboQuantAttentionImpl
        return made(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, *args, **kwargs)


class Selectable(PagedBackend):
    """What a layer with KV pages asks of its backend while vLLM is choosing."""

    supported_dtypes = [torch.float16, torch.bfloat16]

    @classmethod
    def get_name(cls) -> str:
        return "TURBOQUANT"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int]:
        return [64, 128]


class CUDABackend(TurboQuantAttentionBackend):
    @classmethod
    def validate_configuration(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *args: Any, **kwargs: Any) -> list[str]:
        asked = Selectable if kv_cache_dtype in KV_LAYOUTS else TurboQuantAttentionBackend
        return asked.validate_configuration(head_size, dtype, kv_cache_dtype, *args, **kwargs)

    @staticmethod
    def get_impl_cls() -> type[CUDAImpl]:
        return CUDAImpl


def flash_chunk(impl: PagedImpl) -> Callable[..., tuple[Tensor, Tensor]]:
    """The engine's FlashAttention for one layer; arguments and results as of `attention.torch_chunk`. Raises ValueError where there is none."""
    if not is_flash_attn_varlen_func_available():
        raise ValueError(f"--kv-cache-dtype {impl.kv_cache_dtype} needs FlashAttention for prompts, and this vLLM has none")
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=impl.head_size)
    options: dict[str, Any] = {} if version is None else {"fa_version": version}
    window = [impl.window - 1, 0] if impl.window else [-1, -1]

    def chunk(impl: PagedImpl, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool):
        out, lse = flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            max_seqlen_q=max_q,
            cu_seqlens_q=cu_q,
            max_seqlen_k=max_k,
            cu_seqlens_k=cu_k,
            softmax_scale=impl.scale,
            causal=causal,
            window_size=window,
            softcap=impl.soft_cap,
            return_softmax_lse=True,
            **options,
        )[:2]
        if not causal:
            # of a sequence without keys, which is what FlashAttention calls infinity
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, lse.transpose(0, 1)

    return chunk
