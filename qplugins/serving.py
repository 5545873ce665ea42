"""What the configs of both adapters do and say alike: the names that a map knows a layer's matrices by, and the refusals at start-up."""

from collections.abc import Callable, Mapping, Sequence

from qplugins.kv_map import KVMap
from qplugins.layer_map import PRESETS, LayerMap


def part_names(packed: Mapping[str, Sequence[str]], prefix: str) -> list[str]:
    """The names that a map knows the matrices of an engine's layer by: q_proj, k_proj, v_proj for qkv_proj.

    packed: the engine's table of fused layers
    """
    parent, _, leaf = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(leaf) or [leaf]]


def rename(layer_map: LayerMap, renamed: Callable[[str], str | None]) -> LayerMap:
    """The map with its module names as the engine's model has them. `renamed` takes a weight's name, and gives None for one that is dropped."""

    def target(name: str) -> str:
        if name.startswith("re:") or "." not in name:
            return name
        return (renamed(f"{name}.weight") or f"{name}.weight").removesuffix(".weight")

    return layer_map.rename(target)


def plain_checkpoint() -> ValueError:
    """For --quantization qplugins on a checkpoint that is not quantized."""
    presets = [f"qplugins-{p}" for p in PRESETS]
    return ValueError(
        "--quantization qplugins serves quantized checkpoints, and this one has no quantization_config. "
        f"Quantize it while loading with one of --quantization {', '.join(presets)}, or once with `qplugins quantize`."
    )


def check_producer(quantization_config: Mapping, engine: str) -> None:
    """Raises ValueError for a quantized checkpoint in a layout that is not read here."""
    producer = quantization_config.get("quant_method", "")
    if producer not in ("compressed-tensors", "qplugins"):
        raise ValueError(
            f"--quantization qplugins reads checkpoints in the compressed-tensors layout; this one says quant_method {producer!r}. "
            f"Leave --quantization out to serve it by {engine}'s own methods."
        )


def unused_kv_scheme(quantization_config: Mapping) -> str | None:
    """A sentence, for a checkpoint whose kv_cache_scheme is none that is served here (FP8 with stored scales); None where there is none."""
    scheme = quantization_config.get("kv_cache_scheme")
    if not scheme or KVMap.from_config(quantization_config).default is not None:
        return None
    return (
        f"the checkpoint's kv_cache_scheme ({scheme.get('num_bits')} bits, {scheme.get('type', 'int')}) and its scales are not used: "
        "the KV cache has the dtype that --kv-cache-dtype names"
    )


def quantized_already(preset: str) -> ValueError:
    """For --quantization qplugins-<preset> on a checkpoint that is quantized."""
    return ValueError(
        f"--quantization qplugins-{preset} quantizes plain checkpoints; this one has a quantization_config. Use --quantization qplugins."
    )


def check_experts(layer_map: LayerMap, prefix: str, engine: str) -> None:
    """Raises ValueError where a map quantizes the experts called `prefix`; those that it leaves alone are the engine's own."""
    rule = next((r for part in ("gate_proj", "w1", "down_proj") if (r := layer_map.rule_for(f"{prefix}.0.{part}"))), None)
    if rule is not None:
        raise ValueError(
            f"{prefix}: the checkpoint's experts are quantized ({rule.formats[0].name}), and this version serves dense layers only. "
            f"Leave --quantization out to serve it by {engine}'s own methods, or name the experts under ignore when quantizing."
        )
