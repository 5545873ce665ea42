"""What differs between SGLang versions, and nothing else. Each piece says from which version on it can go."""

import importlib.util
import os
import pkgutil

import torch

from qplugins import serving

TESTED = ((0, 5, 16), (0, 5, 23))  # first and last version that the integration tests run
APP = "qplugins.sglang.app:app"
STOCK_APP = "sglang.srt.entrypoints.http_server:app"


def untested() -> str | None:
    """A sentence when the installed SGLang is not among those tested; None when it is."""
    from sglang.version import __version__

    return serving.untested("SGLang", __version__, TESTED)


def hook(target: str, function, kind: str) -> None:
    """`HookRegistry.register`, but for a target that does not exist, which SGLang would log and forget. kind: BEFORE, AFTER or AROUND.

    Raises AttributeError or ImportError.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    pkgutil.resolve_name(target)
    HookRegistry.register(target, function, HookType[kind])


def load_plugins_in_workers() -> None:
    """With --tokenizer-worker-num above 1, HTTP workers import the app by name and load no plugins: they get an app that does."""
    from sglang.srt.environ import envs

    if hasattr(envs, "SGLANG_HTTP_SERVER_APP_PATH"):
        os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", APP)
        return

    # until 0.5.16 the app's name is written in the code
    def rename(app, *args, **kwargs):
        return (APP if app == STOCK_APP else app, *args), kwargs

    hook("uvicorn.run", rename, "BEFORE")


def rank_and_size(layer, kv: bool = False) -> tuple[int, int]:
    """This process's place among those that share a linear layer's rows or columns; `kv`: those of the key and value rows."""
    if hasattr(layer, "tp_group") or hasattr(layer, "parallel_group"):
        from sglang.srt.distributed.utils import get_group_rank_size

        return get_group_rank_size(layer.kv_tp_group if kv else layer.tp_group)
    # until 0.5.16
    return getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)


def offer_kv_cache_dtypes(names: list[str]) -> None:
    """Adds to the choices of --kv-cache-dtype, which SGLang writes where it makes its command line."""

    def offer(result, parser, *args, **kwargs) -> None:
        action = parser._option_string_actions["--kv-cache-dtype"]
        action.choices = [*action.choices, *(name for name in names if name not in action.choices)]

    hook("sglang.srt.server_args.ServerArgs.add_cli_args", offer, "AFTER")


def resolution() -> str:
    """The method in which arguments are resolved. Until 0.5.16 that is their constructor."""
    from sglang.srt.server_args import ServerArgs

    return f"sglang.srt.server_args.ServerArgs.{'resolve_once' if hasattr(ServerArgs, 'resolve_once') else '__post_init__'}"


def kv_cache_dtype(configurator) -> str:
    """What --kv-cache-dtype says, of a KVCacheConfigurator."""
    found = getattr(configurator, "kv_cache_dtype_str", None)
    return configurator.server_args.kv_cache_dtype if found is None else found  # until 0.5.16


def num_kv_heads(model_config) -> int:
    """KV heads of this rank."""
    from sglang.srt.runtime_context import get_parallel

    return model_config.get_num_kv_heads(get_parallel().attn_tp_size)


def flash_attention():
    """SGLang's FlashAttention 3 over sequences of differing lengths, (q, k, v, cu_seqlens_q=, ...) -> (out, lse [heads, tokens], ...).

    None where this GPU, or the sgl_kernel that is installed, has none.
    """
    major, _ = torch.cuda.get_device_capability()
    if major not in (8, 9) or importlib.util.find_spec("sgl_kernel.flash_ops") is None:
        return None
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def num_heads(model_config) -> int:
    """Query heads of this rank."""
    from sglang.srt.runtime_context import get_parallel

    return model_config.num_attention_heads // get_parallel().attn_tp_size
