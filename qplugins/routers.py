"""How an engine's loader reaches the parts of a layer.

vLLM and SGLang load alike: a checkpoint's `k_proj.X` is renamed to `qkv_proj.X`, and the loader of the layer's parameter X is called with
the tensor and the part that it is ("k"). So for every stored name X a layer has one empty parameter, a router, whose loader passes the
tensor on to the part that it belongs to. Routers are gone after loading.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qplugins.formats import Format
from qplugins.layer import MixedLinear, Shard, Span
from qplugins.layer_map import LayerMap


def formats(layer_map: LayerMap, names: Sequence[str], parts: Sequence[Span]) -> list[Format]:
    """Each part's format, by its shape on this rank. Raises ValueError as `shards` does, and for a format that does not fit."""
    return [_format(layer_map, name, part) for name, part in zip(_each(names, parts), parts, strict=True)]


def shards(names: Sequence[str], formats: Sequence[Format], parts: Sequence[Span], dtype: torch.dtype) -> list[Shard]:
    """Every part of a layer, to be loaded. names: the checkpoint's, one a part or one for all.

    Raises ValueError for a layer that the engine builds of other parts than it has names for.
    """
    return [Shard(name, fmt, part, dtype) for name, fmt, part in zip(_each(names, parts), formats, parts, strict=True)]


# matrices that engines build as several parts, and load as one (Qwen3.5's query, key and value of linear attention)
PARTS = {"in_proj_qkv": 3}


def _each(names: Sequence[str], parts: Sequence[Span]) -> Sequence[str]:
    if len(names) == 1:
        return [*names] * len(parts)
    if len(names) != len(parts):
        names = [name for name in names for _ in range(PARTS.get(name.rpartition(".")[2], 1))]
    if len(names) != len(parts):
        raise ValueError(
            f"{', '.join(names)}: the engine builds this layer of {len(parts)} matrices, its model names {len(names)}; it cannot be quantized"
        )
    return names


def _format(layer_map: LayerMap, name: str, part: Span) -> Format:
    try:
        return layer_map.format_for(name, "Linear", *part.shape)
    except ValueError as e:
        if part.columns == (0, part.k):
            raise
        raise ValueError(
            f"{e}. This rank holds columns {part.columns[0]}..{part.columns[1]} of {part.k}: a smaller tensor parallel size helps too"
        ) from None


def part_of(shard_id, parts: int) -> Sequence[int]:
    """The parts, by index, that a loader's `shard_id` means: "q", "k", "v", a number, several numbers, or None for all."""
    if shard_id is None:
        return range(parts)
    if isinstance(shard_id, tuple | list):
        return shard_id
    return ("qkv".index(shard_id) if isinstance(shard_id, str) else shard_id,)


def add_router(layer: nn.Module, name: str, dtype: torch.dtype, loader: Callable) -> None:
    """An empty parameter `name`, whose loader the engine calls with the parameter, a tensor, and what part it is."""
    router = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    router.weight_loader = loader
    layer.register_parameter(name, router)


def part_loader(load: Callable[[Tensor, Sequence[int]], None], parts: int) -> Callable:
    """The loader of a router on a layer of so many parts: `load(tensor, ids)` gets the tensor, and the parts that it is, by index."""

    def loader(param: nn.Parameter, tensor: Tensor, shard_id=None) -> None:
        load(tensor, part_of(shard_id, parts))

    return loader


def add_routers(layer: nn.Module, mixed: MixedLinear) -> None:
    """One router for every name that a part stores."""
    for shard in mixed.shards:
        for p in shard.format.params:
            if not hasattr(layer, p.name):
                add_router(layer, p.name, p.dtype or shard.dtype, part_loader(partial(mixed.load, p.name), len(mixed.shards)))


def remove_routers(layer: nn.Module, mixed: MixedLinear) -> None:
    for name in {p.name for shard in mixed.shards for p in shard.format.params}:
        delattr(layer, name)
