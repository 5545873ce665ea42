"""Which attention layer keeps its keys and values in which layout.

A KV map is one layout for all layers and, where wanted, others by layer number; negative numbers count from the end:

    default int4_sink, layers {"int8_sink": [0, 1, -2, -1]}

It comes from the engine's command line, or from a checkpoint, whose quantization_config may say

    "kv_cache_scheme": {"num_bits": 4, ...}                       compressed-tensors' own key
    "qplugins": {"kv_layers": {"int8_sink": [0, 1, -2, -1]}}      where a single scheme is too little; other readers pass over it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qplugins.kv import get_layout

SCHEMES = {4: "int4_sink", 5: "k5v4_sink", 8: "int8_sink"}  # bits of an integer kv_cache_scheme -> the layout that serves it


@dataclass(frozen=True)
class KVMap:
    """default: the layout of the layers that `layers` does not name, None where it is left to the command line.
    layers: (layout, layer numbers), a number at most once."""

    default: str | None = None
    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in (*([self.default] if self.default else []), *(name for name, _ in self.layers)):
            get_layout(name)

    @classmethod
    def parse(cls, layers: Any, default: str | None = None) -> "KVMap":
        """Of {layout: [layer numbers]}, as JSON gives it. Raises ValueError for anything else."""
        if not isinstance(layers, Mapping):
            raise ValueError(f'kv_layers should be an object like {{"int8_sink": [0, 1, -2, -1]}}, is {layers!r}')
        for name, numbers in layers.items():
            if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
                raise ValueError(f"kv_layers gives {name} to {numbers!r}; that should be a list of layer numbers, such as [0, 1, -2, -1]")
        return cls(default, tuple((name, tuple(numbers)) for name, numbers in layers.items()))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "KVMap":
        """Of a checkpoint's quantization_config; empty where it says nothing about KV that is ours to serve.

        A scheme of 4, 5 or 8 integer bits, and one of 4 floating-point bits, names how much a value may take; its scales, if the checkpoint
        has any, are not needed: ours are of each token. FP8 is left to the engine.
        """
        scheme = config.get("kv_cache_scheme") or {}
        if not isinstance(scheme, Mapping):
            raise ValueError(f"quantization_config: kv_cache_scheme should be an object, is {scheme!r}")
        bits, kind = scheme.get("num_bits"), scheme.get("type", "int")
        default = SCHEMES.get(bits) if kind == "int" or bits == 4 else None
        own = config.get("qplugins") or {}
        try:
            return cls.parse(own.get("kv_layers") or {}, default)
        except ValueError as e:
            raise ValueError(f"quantization_config, qplugins: {e}") from None

    def resolve(self, num_layers: int) -> list[str]:
        """Every layer's layout. Raises ValueError for a layer that is not there, one that is named twice, and where there is no default."""
        found: list[str | None] = [self.default] * num_layers
        named: dict[int, str] = {}
        for name, numbers in self.layers:
            for n in numbers:
                if not -num_layers <= n < num_layers:
                    raise ValueError(f"the KV map gives {name} to layer {n}, and this model has layers 0 to {num_layers - 1}")
                layer = n % num_layers
                if layer in named:
                    raise ValueError(f"the KV map names layer {layer} twice, for {named[layer]} and for {name}")
                named[layer] = found[layer] = name
        if missing := [i for i, name in enumerate(found) if name is None]:
            raise ValueError(f"the KV map says nothing of layers {missing}; give --kv-cache-dtype the layout that all others have")
        return found  # type: ignore[return-value]
