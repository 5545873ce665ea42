"""The platform, for SGLang 0.5.23 and, where marked, 0.5.16."""

import sys

from sglang.srt.platforms import interface
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum


class CpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode=None) -> str:
        return "eager"

    if hasattr(interface, "PlatformCapabilities"):
        capabilities = interface.PlatformCapabilities()
    else:  # 0.5.16: without capabilities an out-of-tree platform is asked for everything

        def init_backend(self) -> None:
            """0.5.16 concludes from the attention backend's name that there is Triton; it is told otherwise."""
            from sglang.srt.utils import common

            told = common.support_triton
            for module in list(sys.modules.values()):
                if getattr(module, "support_triton", None) is told:
                    module.support_triton = lambda backend: False

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self):
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

            def allocator(size: int, *, page_size: int, **kwargs):
                if page_size > 1:
                    return PagedTokenToKVPoolAllocator(size, page_size=page_size, **kwargs)
                return TokenToKVPoolAllocator(size, **kwargs)

            return allocator
