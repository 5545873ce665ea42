"""What differs between vLLM versions, and nothing else. Each piece says from which version on it can go."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from qplugins import serving

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = ((0, 32), (0, 33))  # first and last minor version that the integration tests run


def untested() -> str | None:
    """A sentence when the installed vLLM is not among those tested; None when it is."""
    from vllm import __version__

    return serving.untested("vLLM", __version__, TESTED)


def register_kv_cache_dtype(name: str, storage: torch.dtype) -> None:
    """Makes a `--kv-cache-dtype` known. vLLM has a function for it from 0.33 on; `_extend_cache_dtypes` can go with 0.32."""
    import sys

    import vllm.config.cache as cache

    if not hasattr(cache, "register_kv_cache_dtype"):
        _extend_cache_dtypes(cache, name, storage)
    elif name not in cache.KV_CACHE_DTYPES:
        from vllm.v1.kv_cache_interface import KVQuantMode

        class Handler:
            def torch_dtype(self) -> torch.dtype:
                return storage

            def quant_mode(self) -> KVQuantMode:
                return KVQuantMode.CUSTOM

        Handler.name = name
        cache.register_kv_cache_dtype(name)(Handler)
    # the command line's choices are made of the configuration's types once, and kept
    if arg_utils := sys.modules.get("vllm.engine.arg_utils"):
        arg_utils._compute_kwargs.cache_clear()


def _extend_cache_dtypes(cache: ModuleType, name: str, storage: torch.dtype) -> None:
    """For vLLM 0.32. The names are one `typing.Literal` that every module has imported: its arguments are extended in place, and the
    validators that pydantic made of it are made again."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    STR_DTYPE_TO_TORCH_DTYPE[name] = storage
    if name not in cache.CacheDType.__args__:
        cache.CacheDType.__args__ += (name,)
        for config in (cache.CacheConfig, SpeculativeConfig, VllmConfig):
            rebuild_dataclass(config, force=True)


@contextlib.contextmanager
def plain_cache_dtype(config: "VllmConfig") -> Iterator[None]:
    """Within it, the run's KV dtype is "auto". Stock builders of layers that are not ours read the run's name for one, and 0.33's refuses
    to know ours. Can go when builders ask their own spec."""
    cache = config.cache_config
    name, cache.cache_dtype = cache.cache_dtype, "auto"
    try:
        yield
    finally:
        cache.cache_dtype = name
